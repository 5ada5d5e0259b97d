"""Released formats of one layer and of causal layers, written file by file as their libraries write them; and what they
compute, as loops.
"""

import json
from itertools import chain

import torch
from safetensors.torch import save_file

RELU, TOPK, GROUPMAX, JUMP = "relu", "topk", "groupmax", "jump"


def randn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


# ---- writers: each gives the names of the files that hold tensors ----


def to_json(folder, name, config):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(config))


def write_saelens(folder, tensors, architecture, **cfg):
    d_in, d_sae = tensors["W_enc"].shape
    common = {
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float32",
        "device": "cuda",
        "apply_b_dec_to_input": True,
        "reshape_activations": "none",
    }
    metadata = {
        "sae_lens_version": "6.5.1",
        "model_name": "gpt2",
        "hook_name": "blocks.8.hook_resid_pre",
        "hook_head_index": None,
    }
    to_json(
        folder,
        "cfg.json",
        {**common, "normalize_activations": "none", "metadata": metadata, "architecture": architecture, **cfg},
    )
    save_file(tensors, folder / "sae_weights.safetensors")
    return ["sae_weights.safetensors"]


def write_old_saelens(folder, tensors, *, version, k=None, ones=False, **cfg):
    """Versions 3 to 5: everything in one level, no architecture before 4, a top k by the name of the activation and its
    arguments.
    """
    d_in, d_sae = tensors["W_enc"].shape
    said = {
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float32",
        "device": "cuda",
        "model_name": "gpt2-small",
        "prepend_bos": True,
    }
    hook = "hook_point" if version == 3 else "hook_name"
    said |= {hook: "blocks.8.hook_resid_pre", f"{hook}_head_index" if version == 3 else "hook_head_index": None}
    said |= {"normalize_activations": False if version == 3 else "none", "finetuning_scaling_factor": False}
    said |= {"activation_fn" if version == 3 else "activation_fn_str": "relu" if k is None else "topk"}
    said |= {"activation_fn_kwargs": {} if k is None else {"k": k}}
    if version > 3:
        said |= {"sae_lens_training_version": f"{version}.3.1", "apply_b_dec_to_input": True}
        said["architecture"] = "jumprelu" if "threshold" in tensors else "topk" if k and version == 5 else "standard"
    to_json(folder, "cfg.json", {**said, **cfg})
    extra = {"scaling_factor": torch.ones(d_sae, dtype=tensors["W_enc"].dtype)} if ones else {}
    save_file({**tensors, **extra}, folder / "sae_weights.safetensors")
    return ["sae_weights.safetensors"]


def write_sparsify(folder, tensors, **cfg):
    f, d = tensors["encoder.weight"].shape
    known = {
        "activation": "topk",
        "expansion_factor": 32,
        "normalize_decoder": True,
        "num_latents": f,
        "k": 2,
        "multi_topk": False,
    }
    to_json(folder, "cfg.json", {**known, "skip_connection": "W_skip" in tensors, "transcode": False, "d_in": d, **cfg})
    save_file(tensors, folder / "sae.safetensors")
    return ["sae.safetensors"]


def write_dictionary_learning(folder, tensors, dict_class="BatchTopKSAE", **trainer):
    f, d = tensors["encoder.weight"].shape
    known = {
        "trainer_class": "BatchTopKTrainer",
        "dict_class": dict_class,
        "activation_dim": d,
        "dict_size": f,
        "k": 9,
        "layer": 8,
        "lr": 1e-4,
    }
    to_json(folder, "config.json", {"trainer": {**known, **trainer}, "buffer": {"d_submodule": d, "ctx_len": 128}})
    torch.save(tensors, folder / "ae.pt")
    return ["ae.pt"]


def write_gemma_scope(folder, files, **cfg):
    width = sum(len(tensors["b_enc"]) for tensors in files)
    hooks = [f"model.layers.{7 + i}.output" for i in range(len(files))]
    known = {
        "hf_hook_point_in": hooks,
        "hf_hook_point_out": hooks,
        "width": width,
        "model_name": "gemma-v3-270m-pt",
        "architecture": "jump_relu",
    }
    affine = "affine_skip_connection" in files[0]
    to_json(folder, "config.json", {**known, "l0": 50, "affine_connection": affine, "type": "crosscoder", **cfg})
    for i, tensors in enumerate(files):
        save_file(tensors, folder / f"params_layer_{i}.safetensors")
    return [f"params_layer_{i}.safetensors" for i in range(len(files))]


def write_circuit_tracer(folder, files):
    """`files` is a list of (what W_enc_i holds, what W_dec_i holds), keys without their number."""
    folder.mkdir(parents=True, exist_ok=True)
    hooks = "feature_input_hook: hook_resid_mid\nfeature_output_hook: hook_mlp_out\n"
    (folder / "config.yaml").write_text(f'model_name: "google/gemma-2-2b"\nmodel_kind: cross_layer_transcoder\n{hooks}')
    for i, (encoder, decoder) in enumerate(files):
        save_file({f"{key}_{i}": tensor for key, tensor in encoder.items()}, folder / f"W_enc_{i}.safetensors")
        save_file({f"{key}_{i}": tensor for key, tensor in decoder.items()}, folder / f"W_dec_{i}.safetensors")
    return [f"W_{kind}_{i}.safetensors" for i in range(len(files)) for kind in ("enc", "dec")]


# ---- random tensors ----


def saelens_tensors(d, f, *, threshold, dtype=torch.float64):
    made = {
        "W_enc": randn(d, f, dtype=dtype),
        "b_enc": randn(f, dtype=dtype),
        "W_dec": randn(f, d, dtype=dtype),
        "b_dec": randn(d, dtype=dtype),
    }
    return {**made, "threshold": randn(f, dtype=dtype)} if threshold else made


def sparsify_tensors(d, f, *, skip, dtype=torch.float64):
    made = {"encoder.weight": randn(f, d, dtype=dtype), "encoder.bias": randn(f, dtype=dtype)}
    made |= {"W_dec": randn(f, d, dtype=dtype), "b_dec": randn(d, dtype=dtype)}
    return {**made, "W_skip": randn(d, d, dtype=dtype)} if skip else made


def dictionary_learning_tensors(d, f, *, k, threshold, dtype=torch.float64):
    made = {
        "b_dec": randn(d, dtype=dtype),
        "k": torch.tensor(k, dtype=torch.int),
        "threshold": torch.tensor(threshold, dtype=torch.float32),
    }
    return {
        **made,
        "decoder.weight": randn(d, f, dtype=dtype),
        "encoder.weight": randn(f, d, dtype=dtype),
        "encoder.bias": randn(f, dtype=dtype),
    }


def poly_tensors(d, f, ranks, *, shared, dtype=torch.float64):
    """What the two modes save: C1 to C3, the lambdas, and U_shared beside three empty places, or U1 to U3."""
    made = {f"C{i + 1}": randn(d, r, dtype=dtype) for i, r in enumerate(ranks)}
    made |= {"lambda2": randn((), dtype=dtype), "lambda3": randn((), dtype=dtype)}
    if not shared:
        return made | {f"U{i + 1}": randn(f, r, dtype=dtype) for i, r in enumerate(ranks)}
    return (
        made
        | {"U_shared": randn(f, ranks[0], dtype=dtype)}
        | {f"U{i + 1}": torch.zeros(f, r, dtype=dtype) for i, r in enumerate(ranks)}
    )


def gemma_scope_files(layers, d, f, *, skip, causal=True, dtype=torch.float64):
    files = []
    for i in range(layers):
        made = {
            "w_enc": randn(d, f, dtype=dtype),
            "b_enc": randn(f, dtype=dtype),
            "threshold": randn(f, dtype=dtype).abs(),
        }
        made |= {"w_dec": randn(f, layers, d, dtype=dtype), "b_dec": randn(d, dtype=dtype)}
        if causal:
            made["w_dec"][:, :i] = 0
        files.append(made | ({"affine_skip_connection": randn(d, d, dtype=dtype)} if skip else {}))
    return files


def circuit_tracer_files(layers, d, f, *, threshold, dtype=torch.float64):
    files = []
    for i in range(layers):
        encoder = {"W_enc": randn(f, d, dtype=dtype), "b_enc": randn(f, dtype=dtype), "b_dec": randn(d, dtype=dtype)}
        if threshold:
            encoder["threshold"] = randn(f, dtype=dtype).abs()
        files.append((encoder, {"W_dec": randn(f, layers - i, d, dtype=dtype)}))
    return files


# ---- loops: x is `tokens d_model` or `tokens layers d_model`; each gives pre-activations, codes and output ----


def lists(tensor):
    return tensor.double().tolist()


def affine(row, columns, bias):
    """bias_j + sum_d row_d columns[d][j]"""
    return [bias[j] + sum(row[d] * columns[d][j] for d in range(len(row))) for j in range(len(bias))]


def gated(pre, kind, amount=None):
    """One token's codes: all positives, the `amount` largest positives, one of each group, or the positives above a
    threshold each.
    """
    if kind == TOPK:
        order = sorted(range(len(pre)), key=lambda j: -pre[j])[:amount]
        return [value if j in order and value > 0 else 0.0 for j, value in enumerate(pre)]
    if kind == GROUPMAX:  # the largest of each of `amount` runs of neighbours
        size = len(pre) // amount
        largest = [max(pre[first : first + size]) for first in range(0, len(pre), size)]
        return [value if value > 0 and value == largest[j // size] else 0.0 for j, value in enumerate(pre)]
    above = [0.0] * len(pre) if kind == RELU else amount
    return [value if value > 0 and value > above[j] else 0.0 for j, value in enumerate(pre)]


def transposed(rows):
    return [list(column) for column in zip(*rows)]


def single(x, w_enc, b_enc, w_dec, b_dec, *, subtract, gate, scale=1.0):
    """x' = scale x; u = (x' - subtract) w_enc + b_enc; x_hat = (gate(u) w_dec + b_dec) / scale. `w_enc` is [d][f],
    `w_dec` [f][d].
    """
    pre = [affine([scale * a - b for a, b in zip(row, subtract)], w_enc, b_enc) for row in lists(x)]
    codes = [gated(row, *gate) for row in pre]
    out = [[value / scale for value in affine(z, w_dec, b_dec)] for z in codes]
    return tensors(pre, codes, out)


def tensors(*values):
    return tuple(torch.tensor(value, dtype=torch.float64) for value in values)


def saelens(x, t, *, kind, k=None, apply=True, scale=1.0, rescale=False):
    w_enc, w_dec, b_enc, b_dec = lists(t["W_enc"]), lists(t["W_dec"]), lists(t["b_enc"]), lists(t["b_dec"])
    subtract = b_dec if apply else [0.0] * len(b_dec)
    if rescale:  # codes are chosen and shown in units of the decoder's norms, and divided by them before decoding
        norms = [sum(v * v for v in row) ** 0.5 for row in w_dec]
        w_enc = [[v * n for v, n in zip(row, norms)] for row in w_enc]
        b_enc = [v * n for v, n in zip(b_enc, norms)]
        w_dec = [[v / n for v in row] for row, n in zip(w_dec, norms)]
    gate = {RELU: (RELU,), TOPK: (TOPK, k), JUMP: (JUMP, lists(t.get("threshold", torch.empty(0))))}[kind]
    return single(x, w_enc, b_enc, w_dec, b_dec, subtract=subtract, gate=gate, scale=scale)


def sparsify(x, t, *, k, transcode=False, kind=TOPK):
    b_dec = lists(t["b_dec"])
    subtract = [0.0] * len(b_dec) if transcode else b_dec
    w_enc = transposed(lists(t["encoder.weight"]))
    pre, codes, out = single(
        x, w_enc, lists(t["encoder.bias"]), lists(t["W_dec"]), b_dec, subtract=subtract, gate=(kind, k)
    )
    if "W_skip" in t:
        skip = lists(t["W_skip"])
        for token, row in enumerate(lists(x)):
            for d in range(len(row)):
                out[token, d] += sum(skip[d][e] * row[e] for e in range(len(row)))
    return pre, codes, out


def dictionary_learning(x, t, gate):
    """f = relu((x - b_dec) enc^T + b), kept by `gate`; x_hat = f dec^T + b_dec."""
    w_enc, w_dec, b_dec = (
        transposed(lists(t["encoder.weight"])),
        transposed(lists(t["decoder.weight"])),
        lists(t["b_dec"]),
    )
    return single(x, w_enc, lists(t["encoder.bias"]), w_dec, b_dec, subtract=b_dec, gate=gate)


def poly(x, t, ranks, *, gate, order=3, shared, apply=True, rescale=None):
    """b + a1 C1^T + l2 (a1 a2)[:r2] C2^T + l3 (a1 a2 a3)[:r3] C3^T, with a_k = z U_k, or all of them z U_shared.

    `rescale` is by which norms codes are multiplied before they are chosen, and divided before they are decoded: those
    of "W_dec", or of what each writes "alone".
    """
    u = [lists(t["U_shared" if shared else f"U{i + 1}"]) for i in range(3)]
    factors, c = [1.0, float(t["lambda2"]), float(t["lambda3"])], [lists(t[f"C{i + 1}"]) for i in range(3)]

    def written(z):
        row = [0.0] * len(c[0])
        for degree in range(1, order + 1):
            for r in range(ranks[degree - 1]):
                product = factors[degree - 1]
                for i in range(degree):
                    product *= sum(z[j] * u[i][j][r] for j in range(len(z)))
                row = [value + product * c[degree - 1][d][r] for d, value in enumerate(row)]
        return row

    latents = range(len(t["b_enc"]))
    norms = [1.0 for _ in latents]
    if rescale == "W_dec":
        norms = [sum(v * v for v in row) ** 0.5 for row in lists(t["W_dec"])]
    if rescale == "alone":
        norms = [sum(v * v for v in written([float(i == j) for i in latents])) ** 0.5 for j in latents]
    w_enc = [[v * n for v, n in zip(row, norms)] for row in lists(t["W_enc"])]
    b_enc, b_dec = [v * n for v, n in zip(lists(t["b_enc"]), norms)], lists(t["b_dec"])
    pre, codes, _ = single(
        x, w_enc, b_enc, lists(t["W_dec"]), b_dec, subtract=b_dec if apply else [0.0] * len(b_dec), gate=gate
    )
    out = [[v + b for v, b in zip(written([a / n for a, n in zip(z, norms)]), b_dec)] for z in lists(codes)]
    return pre, codes, torch.tensor(out, dtype=torch.float64)


def gemma_scope(x, files):
    """u_i = x_i w_enc_i + b_enc_i, f_i = relu(u_i)[u_i > threshold_i], x_hat_o = sum_i f_i w_dec_i[:, o] + b_dec_o (+
    x_o skip_o).
    """
    pre, codes, out = [], [], []
    for token in lists(x):
        us = [affine(token[i], lists(t["w_enc"]), lists(t["b_enc"])) for i, t in enumerate(files)]
        fs = [gated(u, JUMP, lists(t["threshold"])) for u, t in zip(us, files)]
        written = []
        for o, t in enumerate(files):
            row = lists(t["b_dec"])
            for i, source in enumerate(files):
                row = affine(fs[i], lists(source["w_dec"][:, o]), row)
            written.append(
                affine(token[o], lists(t["affine_skip_connection"]), row) if "affine_skip_connection" in t else row
            )
        pre.append(list(chain(*us)))
        codes.append(list(chain(*fs)))
        out.append(written)
    return tensors(pre, codes, out)


def circuit_tracer(x, files):
    """f_i = gate(x_i W_enc_i^T + b_enc_i), y_o = sum_{i <= o} f_i W_dec_i[:, o - i] + b_dec_o."""
    pre, codes, out = [], [], []
    for token in lists(x):
        us = [affine(token[i], transposed(lists(e["W_enc"])), lists(e["b_enc"])) for i, (e, _) in enumerate(files)]
        fs = [
            gated(u, JUMP, lists(e["threshold"])) if "threshold" in e else gated(u, RELU)
            for u, (e, _) in zip(us, files)
        ]
        written = []
        for o, (e, _) in enumerate(files):
            row = lists(e["b_dec"])
            for i in range(o + 1):
                row = affine(fs[i], lists(files[i][1]["W_dec"][:, o - i]), row)
            written.append(row)
        pre.append(list(chain(*us)))
        codes.append(list(chain(*fs)))
        out.append(written)
    return tensors(pre, codes, out)
