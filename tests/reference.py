"""Every formula again, as plain loops over indices."""

from itertools import pairwise, permutations, product
from math import exp, log, sqrt, tanh

import torch


def einsum(pattern, sizes, operands):
    """The Einstein sum of `pattern` ('a b, b -> a', batch axes as '...'), one multiplication at a time."""
    left, _, right = pattern.partition("->")
    terms = [term.split() for term in left.split(",")]
    named = [sum(word != "..." for word in term) for term in terms]
    shapes = [tuple(x.shape[: x.ndim - n]) for term, n, x in zip(terms, named, operands) if "..." in term]
    axes = {f"batch{i}": size for i, size in enumerate(shapes[0] if shapes else ())}
    opened = [[word for axis in term for word in ([w for w in axes] if axis == "..." else [axis])] for term in terms]
    output = [word for axis in right.split() for word in ([w for w in axes] if axis == "..." else [axis])]
    every = {**axes, **{word: sizes[word] for term in terms for word in term if word != "..."}}
    arrays = [x.detach().numpy() for x in operands]
    total = torch.zeros([every[word] for word in output], dtype=torch.float64)
    summed = total.numpy()
    for index in product(*(range(size) for size in every.values())):
        at = dict(zip(every, index))
        value = 1.0
        for term, array in zip(opened, arrays):
            value *= array[tuple(at[word] for word in term)]
        summed[tuple(at[word] for word in output)] += value
    return total


def dense(weight):
    """`layers d_model latents` of one pattern."""
    return einsum(weight.pattern + " -> layers d_model latents", weight.sizes, list(weight.factors))


def ring(g1, g2, g3):
    """W[l, d, i] = Tr(G1[:, d, :] G2[:, i, :] G3[:, l, :])."""
    total = torch.zeros(g3.shape[1], g1.shape[1], g2.shape[1], dtype=torch.float64)
    for layer, coordinate, latent in product(*map(range, total.shape)):
        total[layer, coordinate, latent] = torch.trace(g1[:, coordinate, :] @ g2[:, latent, :] @ g3[:, layer, :])
    return total


def cp(a, u, v):
    """W[l, d, i] = sum_r A[d, r] U[i, r] V[l, r]."""
    total = torch.zeros(len(v), len(a), len(u), dtype=torch.float64)
    for layer, coordinate, latent in product(*map(range, total.shape)):
        total[layer, coordinate, latent] = sum(a[coordinate, r] * u[latent, r] * v[layer, r] for r in range(a.shape[1]))
    return total


def tucker(table, core, over_d_model, over_layers):
    """W[l, d, i] = sum_pqr U[i, r] C[p, q, r] A[d, q] V[l, p]."""
    total = torch.zeros(len(over_layers), len(over_d_model), len(table), dtype=torch.float64)
    for layer, coordinate, latent in product(*map(range, total.shape)):
        for p, q, r in product(*map(range, core.shape)):
            total[layer, coordinate, latent] += (
                table[latent, r] * core[p, q, r] * over_d_model[coordinate, q] * over_layers[layer, p]
            )
    return total


def read(x, w):
    """z[i] = sum_l sum_d x[l, d] W[l, d, i], for any batch."""
    flat = x.reshape(-1, *x.shape[-2:])
    out = torch.zeros(len(flat), w.shape[2], dtype=torch.float64)
    for t, layer, coordinate in product(range(len(flat)), range(w.shape[0]), range(w.shape[1])):
        out[t] += flat[t, layer, coordinate] * w[layer, coordinate]
    return out.reshape(*x.shape[:-2], w.shape[2])


def write(z, w):
    """x[l, d] = sum_i z[i] W[l, d, i], for any batch."""
    flat = z.reshape(-1, z.shape[-1])
    out = torch.zeros(len(flat), *w.shape[:2], dtype=torch.float64)
    for t, latent in product(range(len(flat)), range(w.shape[2])):
        out[t] += flat[t, latent] * w[:, :, latent]
    return out.reshape(*z.shape[:-1], *w.shape[:2])


def norms(w):
    return torch.tensor(
        [
            [sqrt(sum(w[i, j, n].item() ** 2 for j in range(w.shape[1]))) for n in range(w.shape[2])]
            for i in range(w.shape[0])
        ]
    ).double()


def topk(pre, k):
    """Per token, the k largest positive values stay."""
    flat = pre.reshape(-1, pre.shape[-1])
    out = torch.zeros_like(flat)
    for t, row in enumerate(flat.tolist()):
        for n in sorted(range(len(row)), key=lambda n: -row[n])[:k]:
            out[t, n] = max(row[n], 0.0)
    return out.reshape(pre.shape)


def batchtopk(pre, k):
    """Over all tokens together, the tokens * k largest positive values stay."""
    flat = pre.reshape(-1, pre.shape[-1])
    places = list(product(range(flat.shape[0]), range(flat.shape[1])))
    out = torch.zeros_like(flat)
    for t, n in sorted(places, key=lambda place: -flat[place].item())[: flat.shape[0] * k]:
        out[t, n] = max(flat[t, n].item(), 0.0)
    return out.reshape(pre.shape)


def reconstruction_loss(x, x_hat):
    """mean over tokens of 1/L sum_l ||x_l - x_hat_l||^2."""
    tokens, other = x.reshape(-1, *x.shape[-2:]).tolist(), x_hat.reshape(-1, *x.shape[-2:]).tolist()
    losses = [
        sum(sum((a - b) ** 2 for a, b in zip(row, hat)) for row, hat in zip(token, guess)) / len(token)
        for token, guess in zip(tokens, other)
    ]
    return torch.tensor(sum(losses) / len(losses), dtype=torch.float64)


def l1_penalty(z, norms):
    """mean over tokens of sum_i z_i sum_l ||d_il||."""
    rows = z.reshape(-1, z.shape[-1]).tolist()
    return torch.tensor(
        sum(row[n] * sum(layer[n] for layer in norms.tolist()) for row in rows for n in range(len(row))) / len(rows)
    ).double()


def dead_latent_loss(residual, pre, dead, w, k_aux, score=None):
    """The top k_aux dead latents, by their score, rebuild the residual; a share of its variance, less with few dead."""
    residual, pre = residual.reshape(-1, *residual.shape[-2:]), pre.reshape(-1, pre.shape[-1])
    k_aux = min(k_aux, pre.shape[1])
    among = [n for n in range(pre.shape[1]) if dead[n]]
    error, spread, mean = 0.0, 0.0, sum(residual) / len(residual)
    for token, row in zip(residual, pre):
        chosen = sorted(among, key=lambda n: -row[n].item() * (1 if score is None else score[n].item()))[:k_aux]
        rebuilt = sum((max(row[n].item(), 0.0) * w[:, :, n] for n in chosen), torch.zeros_like(token))
        error += ((token - rebuilt) ** 2).sum().item()
        spread += ((token - mean) ** 2).sum().item()
    return torch.tensor(error / spread * min(1.0, len(among) / k_aux), dtype=torch.float64)


def token_losses(clean, logits, ids, keep):
    """Cross-entropy and KL(clean || logits), each a mean over predictions made at a kept token and of one."""
    entropy = divergence = count = 0
    for c, t in product(range(len(ids)), range(ids.shape[1] - 1)):
        if keep[c, t] and keep[c, t + 1]:
            p, q = ([exp(v) for v in row[c, t].tolist()] for row in (clean, logits))
            p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
            entropy -= log(q[ids[c, t + 1]])
            divergence += sum(a * log(a / b) for a, b in zip(p, q))
            count += 1
    return entropy / count, divergence / count


def saebench(batches, guesses):
    """SAEBench 0.6.0's mse and explained variance of one layer, from lists that it concatenates over batches."""
    mse, squares, per_dimension, residuals = [], [], [], []
    for x, x_hat in zip(batches, guesses):
        errors = [sum((a - b) ** 2 for a, b in zip(*rows)) for rows in zip(x.tolist(), x_hat.tolist())]
        mse += [error / len(x) for error in errors]
        squares.append(sum(v * v for row in x.tolist() for v in row) / len(x))
        per_dimension += [sum(v * v for v in column) / len(x) for column in x.T.tolist()]
        residuals.append(sum(errors) / len(x))
    squares, per_dimension, residuals = (sum(values) / len(values) for values in (squares, per_dimension, residuals))
    return sum(mse) / len(mse), 1 - residuals / (squares - per_dimension**2)


def off_to_on(encode, x):
    """How many tokens switch a latent on when a layer is zeroed (layers latents), and at how many it is off."""
    z = encode(x).tolist()
    switched = []
    for layer in range(x.shape[1]):
        masked = x.clone()
        masked[:, layer] = 0
        gone = encode(masked).tolist()
        switched.append([sum(z[t][i] == 0 and gone[t][i] > 0 for t in range(len(z))) for i in range(len(z[0]))])
    return switched, [sum(row[i] == 0 for row in z) for i in range(len(z[0]))]


def top_words(entries, tokens, contexts, spare=4):
    """{latent: [(word, activation, places)]} from (latent, word, place, activation) one by one; a place counts once, by
    its largest activation.

    Words by their largest activation; of each, the strongest places among those as strong as the word of rank spare *
    tokens.
    """
    best = {}
    for latent, word, place, activation in entries:
        if activation > 0:
            best[latent, word, place] = max(activation, best.get((latent, word, place), 0.0))
    found = {}
    for latent in {latent for latent, _, _ in best}:
        mine = sorted((-a, place, word) for (owner, word, place), a in best.items() if owner == latent)
        words = list(dict.fromkeys(word for _, _, word in mine))
        last = (
            next((entry for entry in mine if entry[2] == words[spare * tokens - 1]), None)
            if len(words) >= spare * tokens
            else mine[-1]
        )
        rows = []
        for word in words[:tokens]:
            there = [entry for entry in mine if entry[2] == word and entry <= last][:contexts]
            rows.append((word, -there[0][0], [place for _, place, _ in there]))
        found[latent] = rows
    return found


def histogram(values, bins=64):
    """Counts of positive values over `bins` equal bins from 0 to the smallest power of two above all of them, and the
    width of a bin.
    """
    edge = 2.0**-1074
    while max(values) >= edge:
        edge *= 2
    counts = [0] * bins
    for value in values:
        counts[next(i for i in range(bins) if value < edge * (i + 1) / bins)] += 1
    return counts, edge / bins


def latent_cosines(w):
    """`latents latents`: cosines of atoms, all layers in one; 0 with an atom of zeros."""
    atoms = [w[:, :, n].flatten().tolist() for n in range(w.shape[2])]
    lengths = [sqrt(sum(v * v for v in atom)) for atom in atoms]
    total = torch.zeros(len(atoms), len(atoms), dtype=torch.float64)
    for i, j in product(range(len(atoms)), repeat=2):
        if lengths[i] and lengths[j]:
            total[i, j] = sum(a * b for a, b in zip(atoms[i], atoms[j])) / lengths[i] / lengths[j]
    return total


def kind_by_hand(semantic, surface):
    """What a judge's two scores make of a latent."""
    if semantic > 0.7 and surface < 0.3:
        return "semantic"
    if surface > 0.7 and semantic < 0.3:
        return "surface"
    return "other"


def wilson_by_bisection(count, total):
    """The shares p at which |count / total - p| is 1.959964 standard deviations sqrt(p (1 - p) / total)."""
    share, z = count / total, 1.959963984540054

    def turn(inside, outside):
        for _ in range(200):
            middle = (inside + outside) / 2
            if abs(share - middle) <= z * (middle * (1 - middle) / total) ** 0.5:
                inside = middle
            else:
                outside = middle
        return inside

    return turn(share, 0.0), turn(share, 1.0)


def planted(z, atoms, offset):
    """x[l, d] = offset[l, d] + sum_i z_i atom_i[l, d], token by token."""
    return torch.stack(
        [offset + sum((row[i].item() * atoms[i] for i in range(len(atoms))), torch.zeros_like(offset)) for row in z]
    )


def cosines(atoms, w):
    """`features latents`: cosine of true atoms and the atoms of w, over layers and coordinates together."""
    found = torch.zeros(len(atoms), w.shape[2], dtype=torch.float64)
    for feature, latent in product(range(len(atoms)), range(w.shape[2])):
        a, b = atoms[feature].flatten().tolist(), w[:, :, latent].flatten().tolist()
        length = sqrt(sum(v * v for v in a)) * sqrt(sum(v * v for v in b))
        found[feature, latent] = sum(v * u for v, u in zip(a, b)) / length if length else float("nan")
    return found


def best_matching(cosine):
    """The largest sum of positive cosines that any one-to-one matching has, by trying all."""
    features, latents = cosine.shape
    rows, columns = (range(features), range(latents)) if features <= latents else (range(latents), range(features))
    gain = cosine if features <= latents else cosine.T
    return max(
        sum(max(gain[i, j].item(), 0.0) for i, j in zip(rows, choice)) for choice in permutations(columns, len(rows))
    )


def detection_f1(learned, true):
    """2 hits / (2 hits + false alarms + misses) over tokens."""
    hits = sum(a and b for a, b in zip(learned.tolist(), true.tolist()))
    wrong = sum(a != b for a, b in zip(learned.tolist(), true.tolist()))
    return 2 * hits / (2 * hits + wrong)


def overlap(learned, true, share):
    """Precision, recall and IoU of the layers on which two atoms' norms exceed `share` of their largest."""
    sets = [
        {layer for layer, norm in enumerate(norms) if norm > share * max(norms)}
        for norms in (learned.tolist(), true.tolist())
    ]
    both = len(sets[0] & sets[1])
    return [both / len(sets[0]), both / len(sets[1]), both / len(sets[0] | sets[1])]


def best_threshold(values, positive):
    """The threshold and F1 of «positive where value > threshold», over thresholds that occur, the highest of equals."""
    best = (float("nan"), -1.0)
    for threshold in sorted(set(values), reverse=True):
        kept = [label for value, label in zip(values, positive) if value > threshold]
        f1 = 2 * sum(kept) / (len(kept) + sum(positive))
        if f1 > best[1]:
            best = (threshold, f1)
    return best


def area_between(values, positive):
    """The 1-Wasserstein distance of both classes: the area between their distribution functions."""
    own = [value for value, label in zip(values, positive) if label]
    rest = [value for value, label in zip(values, positive) if not label]
    total, points = 0.0, sorted(values)
    for left, right in pairwise(points):
        below = [sum(value <= left for value in side) / len(side) for side in (own, rest)]
        total += abs(below[0] - below[1]) * (right - left)
    return total


def auroc(scores, positive):
    """The share of pairs of one text of the label and one of the rest that the scores order rightly, ties half."""
    own = [score for score, label in zip(scores, positive) if label]
    rest = [score for score, label in zip(scores, positive) if not label]
    return sum((a > b) + 0.5 * (a == b) for a, b in product(own, rest)) / len(own) / len(rest)


def probed(train, train_positive, test, test_positive):
    """The fmx protocol on equal classes: latent, threshold, and F1, AUROC, balanced accuracy and both distances on the
    test texts.
    """
    found = []
    for n in range(train.shape[1]):
        values = train[:, n].tolist()
        threshold, f1 = best_threshold(values, train_positive)
        mean = sum(values) / len(values)
        spread = sqrt(sum((value - mean) ** 2 for value in values) / len(values))
        gap = sum(value if label else -value for value, label in zip(values, train_positive)) / sum(train_positive)
        found.append((f1, abs(gap) / spread if spread else 0.0, -n, threshold, spread))
    _, _, latent, threshold, spread = max(found)
    scores = test[:, -latent].tolist()
    taken = [score > threshold for score in scores]
    hits = sum(a and b for a, b in zip(taken, test_positive))
    right = [
        sum((a == b) for a, b in zip(taken, test_positive) if b == side) / sum(b == side for b in test_positive)
        for side in (True, False)
    ]
    distance = area_between(scores, test_positive)
    f1 = 2 * hits / (sum(taken) + sum(test_positive))
    return (
        -latent,
        threshold,
        [f1, auroc(scores, test_positive), sum(right) / 2, distance, distance / spread if spread else float("nan")],
    )


def polynomial(z, w, bias, u, terms):
    """x[l, d] = b + sum_i w z_i + sum over (degree, coefficient, c) of coefficient sum_r c[l, d, r] (sum_i z_i u[i,
    r])^degree.
    """
    out = torch.zeros(len(z), *bias.shape, dtype=torch.float64)
    for t, layer, coordinate in product(range(len(z)), *map(range, bias.shape)):
        value = bias[layer, coordinate].item() + sum(
            z[t, i].item() * w[layer, coordinate, i].item() for i in range(len(u))
        )
        for degree, coefficient, c in terms:
            for r in range(c.shape[2]):
                value += (
                    coefficient
                    * c[layer, coordinate, r].item()
                    * sum(z[t, i].item() * u[i, r].item() for i in range(len(u))) ** degree
                )
        out[t, layer, coordinate] = value
    return out


def gram_schmidt(u):
    """Orthonormal columns of the same spans, column by column: the Q of the QR decomposition whose R has a positive
    diagonal.
    """
    columns = []
    for column in u.T:
        for done in columns:
            column = column - (column * done).sum() * done
        columns.append(column / sqrt((column * column).sum().item()))
    return torch.stack(columns, dim=1)


def normalise(x, scale, mean):
    """(x - mean) * scale, a number at a time."""
    out = torch.zeros_like(x.reshape(-1, *x.shape[-2:]))
    for token, row in zip(out, x.reshape(-1, *x.shape[-2:])):
        for layer, j in product(range(row.shape[0]), range(row.shape[1])):
            token[layer, j] = (row[layer, j].item() - mean[layer, j].item()) * scale[layer].item()
    return out.reshape(x.shape)


def normalisation(x, target):
    """Mean of each coordinate, and target / sqrt(mean over tokens of ||x - mean||^2) of each layer, in two passes."""
    rows = x.reshape(-1, *x.shape[-2:]).tolist()
    layers, coordinates = range(x.shape[-2]), range(x.shape[-1])
    mean = [[sum(row[layer][j] for row in rows) / len(rows) for j in coordinates] for layer in layers]
    square = [
        sum((row[layer][j] - mean[layer][j]) ** 2 for row in rows for j in coordinates) / len(rows) for layer in layers
    ]
    scale = [target / sqrt(value) for value in square]
    return torch.tensor(scale, dtype=torch.float64), torch.tensor(mean, dtype=torch.float64)


def block_sparse(blocks, layers, d_model):
    """W[at[j], d, first + i] = w[j, d, i] for each block (w, at), latents counted on from block to block; zero
    elsewhere.
    """
    out, first = torch.zeros(layers, d_model, sum(w.shape[2] for w, _ in blocks), dtype=torch.float64), 0
    for w, at in blocks:
        for j, d, i in product(*map(range, w.shape)):
            out[at[j], d, first + i] = w[j, d, i].item()
        first += w.shape[2]
    return out


def score(w, kind):
    """The selection score of each latent, from its atom's norm at each layer: summed, of all layers together, or 1 and
    0.1 of the two.
    """
    found = []
    for latent in range(w.shape[2]):
        norms = [sqrt(sum(value * value for value in w[layer, :, latent].tolist())) for layer in range(w.shape[0])]
        concat = sqrt(sum(norm * norm for norm in norms))
        found.append({"sum": sum(norms), "concat": concat, "mixed": concat + 0.1 * sum(norms)}[kind])
    return torch.tensor(found, dtype=torch.float64)


def groupmax(pre, k):
    """The largest of each of k groups of neighbours, every other value 0."""
    rows = []
    for row in pre.reshape(-1, pre.shape[-1]).tolist():
        size, out = len(row) // k, []
        for group in range(k):
            values = row[group * size : (group + 1) * size]
            out += [value if at == values.index(max(values)) else 0.0 for at, value in enumerate(values)]
        rows.append(out)
    return torch.tensor(rows, dtype=pre.dtype).reshape(pre.shape)


def jump_gradient(pre, upstream, threshold, bandwidth):
    """Of a JumpReLU, to the logarithm of each threshold: the sum of -upstream threshold^2 / bandwidth over the entries
    in its window.
    """
    found = [0.0] * len(threshold)
    for row, ups in zip(pre.reshape(-1, len(threshold)).tolist(), upstream.reshape(-1, len(threshold)).tolist()):
        for n, (value, up) in enumerate(zip(row, ups)):
            limit = threshold[n].item()
            if abs(value - limit) < bandwidth / 2:
                found[n] -= up * limit * limit / bandwidth
    return torch.tensor(found, dtype=torch.float64)


def multilinear(z, w, bias, terms):
    """x_hat[t, l, d] = bias[l, d] + sum_i W[l, d, i] z[t, i] + sum over (c, C, projections) of c sum_r C[l, d, r]
    prod_U (sum_i z[t, i] U[i, r]).
    """
    total = bias.detach().expand(len(z), *bias.shape).clone()
    linear, rows, out = w.tolist(), z.tolist(), total.numpy()
    numbers = [(c, weight.tolist(), [u.tolist() for u in projections]) for c, weight, projections in terms]
    for token, layer, coordinate in product(*map(range, total.shape)):
        row = rows[token]
        value = sum(a * b for a, b in zip(linear[layer][coordinate], row))
        for coefficient, weight, projections in numbers:
            for r, written in enumerate(weight[layer][coordinate]):
                term = coefficient * written
                for u in projections:
                    term *= sum(row[i] * u[i][r] for i in range(len(row)))
                value += term
        out[token, layer, coordinate] += value
    return total


def skipped(x, x_hat, skip):
    """x_hat[t, l, e] + sum_d x[t, l, d] S[l, d, e]."""
    total = x_hat.clone()
    for token, layer, written in product(*map(range, total.shape)):
        total[token, layer, written] += sum(x[token, layer, d] * skip[layer, d, written] for d in range(x.shape[-1]))
    return total


def decoupled(pre, w, bias, thresholds):
    """x_hat[t, l] from latents with relu(pre) ||d_l|| above the layer's threshold, one number a layer or one a layer
    and latent.
    """
    x_hat = torch.zeros(len(pre), w.shape[0], w.shape[1], dtype=torch.float64)
    for t, layer in product(range(len(pre)), range(w.shape[0])):
        x_hat[t, layer] = bias[layer]
        for latent in range(w.shape[2]):
            norm = sqrt(sum(value * value for value in w[layer, :, latent].tolist()))
            limit = thresholds[layer] if thresholds.ndim == 1 else thresholds[layer, latent]
            if pre[t, latent] > 0 and pre[t, latent] * norm > limit:
                x_hat[t, layer] += pre[t, latent] * w[layer, :, latent]
    return x_hat


def masked(w, kept):
    """w[l, d, i] where kept(l, d, i), else 0."""
    out = torch.zeros_like(w)
    for at in product(*map(range, w.shape)):
        if kept(*at):
            out[at] = w[at].item()
    return out


def greedy_pairs(left, right):
    """All pairs of rows from the closest by cosine to the farthest; a pair is taken where neither row is in one
    already.
    """
    cosine = {}
    for i, j in product(range(len(left)), range(len(right))):
        a, b = left[i].tolist(), right[j].tolist()
        cosine[i, j] = sum(x * y for x, y in zip(a, b)) / sqrt(sum(x * x for x in a) * sum(y * y for y in b))
    taken = []
    for i, j in sorted(cosine, key=lambda pair: -cosine[pair]):
        if all(i != other and j != another for other, another in taken):
            taken.append((i, j))
    return [(i, j, cosine[i, j]) for i, j in taken]


def best_rank_error(matrix, rank):
    """||M - its best approximation of this rank|| / ||M||, from the singular values that are left out. (Eckart and
    Young 1936)
    """
    values = torch.linalg.svdvals(matrix).tolist()
    return sqrt(sum(value * value for value in values[rank:]) / sum(value * value for value in values))


def chained(saes, chains, x):
    """What a crosscoder of joined ReLU SAEs does, a latent at a time; an SAE is (encoder `latents d_model`, bias,
    decoder `latents d_model`, bias).
    """
    out = torch.stack([bias.expand(len(x), -1) for *_, bias in saes], dim=1).clone()
    for t, chain in product(range(len(x)), range(max(max(c) for c in chains) + 1)):
        members = [(layer, i) for layer, c in enumerate(chains) for i, at in enumerate(c) if at == chain]
        pre = 0.0
        for layer, i in members:
            encoder, bias, decoder, _ = saes[layer]
            pre += (
                ((encoder[i] * x[t, layer]).sum() + bias[i]).item()
                * sqrt((decoder[i] ** 2).sum().item())
                / len(members)
            )
        for layer, i in members:
            out[t, layer] += max(pre, 0.0) * saes[layer][2][i] / sqrt((saes[layer][2][i] ** 2).sum().item())
    return out


def projected(basis, wanted):
    """What is nearest to `wanted` among all sums of the rows of `basis`: Gram and Schmidt, each row twice against
    rounding.
    """
    nearest, directions = torch.zeros_like(wanted), []
    for row in basis:
        size = row.norm()
        for direction in directions * 2:
            row = row - (row @ direction) * direction
        if row.norm() > 1e-10 * size:
            directions.append(row / row.norm())
            nearest = nearest + (wanted @ directions[-1]) * directions[-1]
    return nearest


def step_gradient(pre, norms, threshold, bandwidth, stretch):
    """To each log threshold, of the tanh penalty's mean over tokens: minus threshold / bandwidth times its step, over
    the entries in the window.
    """
    rows, found = pre.reshape(-1, len(threshold)).tolist(), [0.0] * len(threshold)
    for row in rows:
        for n, (value, limit) in enumerate(zip(row, threshold.tolist())):
            if abs(value - limit) < bandwidth / 2:
                step = tanh(stretch * max(value, 0.0) * sum(norms[:, n].tolist()))
                found[n] -= limit * step / bandwidth / len(rows)
    return torch.tensor(found, dtype=torch.float64)
