"""Every formula again, as plain loops over indices."""

from itertools import permutations, product
from math import sqrt

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
            total[layer, coordinate, latent] += table[latent, r] * core[p, q, r] * over_d_model[coordinate, q] * over_layers[layer, p]
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
        [[sqrt(sum(w[i, j, n].item() ** 2 for j in range(w.shape[1]))) for n in range(w.shape[2])] for i in range(w.shape[0])]
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


def dead_latent_loss(residual, pre, dead, w, k_aux):
    """The top k_aux dead latents rebuild the residual; a share of its variance, less with fewer dead."""
    residual, pre = residual.reshape(-1, *residual.shape[-2:]), pre.reshape(-1, pre.shape[-1])
    k_aux = min(k_aux, pre.shape[1])
    among = [n for n in range(pre.shape[1]) if dead[n]]
    error, spread, mean = 0.0, 0.0, sum(residual) / len(residual)
    for token, row in zip(residual, pre):
        chosen = sorted(among, key=lambda n: -row[n].item())[:k_aux]
        rebuilt = sum((max(row[n].item(), 0.0) * w[:, :, n] for n in chosen), torch.zeros_like(token))
        error += ((token - rebuilt) ** 2).sum().item()
        spread += ((token - mean) ** 2).sum().item()
    return torch.tensor(error / spread * min(1.0, len(among) / k_aux), dtype=torch.float64)


def planted(z, atoms, offset):
    """x[l, d] = offset[l, d] + sum_i z_i atom_i[l, d], token by token."""
    return torch.stack([offset + sum((row[i].item() * atoms[i] for i in range(len(atoms))), torch.zeros_like(offset)) for row in z])


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
    return max(sum(max(gain[i, j].item(), 0.0) for i, j in zip(rows, choice)) for choice in permutations(columns, len(rows)))


def detection_f1(learned, true):
    """2 hits / (2 hits + false alarms + misses) over tokens."""
    hits = sum(a and b for a, b in zip(learned.tolist(), true.tolist()))
    wrong = sum(a != b for a, b in zip(learned.tolist(), true.tolist()))
    return 2 * hits / (2 * hits + wrong)


def overlap(learned, true, share):
    """Precision, recall and IoU of the layers on which two atoms' norms exceed `share` of their largest."""
    sets = [{layer for layer, norm in enumerate(norms) if norm > share * max(norms)} for norms in (learned.tolist(), true.tolist())]
    both = len(sets[0] & sets[1])
    return [both / len(sets[0]), both / len(sets[1]), both / len(sets[0] | sets[1])]
