"""Small crosscoders written as other libraries write them, and what they compute, in loops: nothing here knows fmxnn.

A writer fills a folder with random weights and gives its formula: from `tokens layers d_model` to the codes and `tokens
layers d_model`.
"""

import json

import torch
import yaml
from safetensors.torch import save_file

ACTIVATIONS = (
    "ReLUActivation",
    "TopkActivation",
    "BatchTopkActivation",
    "GroupMaxActivation",
    "AnthropicSTEJumpReLUActivation",
)


def save(tensors, path):
    (save_file if path.suffix == ".safetensors" else torch.save)(
        {key: value.contiguous() for key, value in tensors.items()}, path
    )


def affine(x, weight, bias):
    """`tokens layers d_model, layers d_model latents, latents`: a sum over layers and coordinates, one latent after
    another.
    """
    out = torch.zeros(len(x), weight.shape[-1], dtype=torch.float64)
    for t in range(len(x)):
        for f in range(weight.shape[-1]):
            out[t, f] = bias[f].double()
            for layer in range(weight.shape[0]):
                out[t, f] += (x[t, layer].double() * weight[layer, :, f].double()).sum()
    return out


def written(z, weight, bias):
    """`tokens latents or tokens layers latents, layers latents d_model, layers d_model`: the atoms of each layer, added
    one after another.
    """
    out = torch.zeros(len(z), *bias.shape, dtype=torch.float64)
    for t in range(len(z)):
        for layer in range(len(bias)):
            code = z[t] if z.ndim == 2 else z[t, layer]
            out[t, layer] = bias[layer].double()
            for f in range(len(code)):
                out[t, layer] += code[f] * weight[layer, f].double()
    return out


def norms(weight):
    """`layers latents d_model`: the length of each atom at each layer, in loops."""
    return torch.tensor(
        [[sum(float(v) ** 2 for v in atom) ** 0.5 for atom in layer] for layer in weight], dtype=torch.float64
    )


def ckkissane(folder, layers, d_model, latents, dtype, *, stem="cc_weights", **_):
    t = {"W_enc": torch.randn(layers, d_model, latents), "W_dec": torch.randn(latents, layers, d_model)}
    t |= {"b_enc": torch.randn(latents), "b_dec": torch.randn(layers, d_model)}
    t = {key: value.to(dtype) for key, value in t.items()}
    save(t, folder / f"{stem}.pt")
    config = folder / ("cfg.json" if stem == "cc_weights" else f"{stem}_cfg.json")
    config.write_text(
        json.dumps(
            {"d_in": d_model, "dict_size": latents, "enc_dtype": "fp32", "model_name": "gemma-2-2b", "device": "cuda:0"}
        )
    )

    def formula(x, scale):
        z = affine(x.double() * scale.double()[:, None], t["W_enc"], t["b_enc"]).clamp(min=0)
        return z, written(z, t["W_dec"].transpose(0, 1), t["b_dec"]) / scale.double()[:, None]

    return formula


def dictionary_learning(
    folder,
    layers,
    d_model,
    latents,
    dtype,
    *,
    batch=True,
    code=1,
    scaled="newer",
    threshold=1.0,
    k=2,
    file="model.safetensors",
    prefix="",
    old=False,
    order=None,
    writes=None,
):
    """`scaled` is "newer" (a scale for each layer), "older" (one), "nan" (a normaliser that was never given).

    `order` is `encoder_layers`, which layer each row of the encoder reads; `writes` is how many the decoder writes. A
    folder with a trainer's settings has the arguments of the class as strings.
    """
    reads = list(range(layers)) if order is None else order
    written_layers = layers if writes is None else writes
    t = {"encoder.weight": torch.randn(len(reads), d_model, latents), "encoder.bias": torch.randn(latents)}
    t |= {
        "decoder.weight": torch.randn(written_layers, latents, d_model),
        "decoder.bias": torch.randn(written_layers, d_model),
    }
    mean, std = torch.randn(layers, d_model), torch.rand(layers, d_model) + 0.1
    if scaled == "nan":
        mean, std = mean * torch.nan, std * torch.nan
    rms = torch.tensor(1.5)
    g = rms / ((std**2).sum() if scaled == "older" else (std**2).sum(-1)).add(1e-8).sqrt()
    if not old:
        t |= {
            "code_normalization_id": torch.tensor(code),
            "target_rms": rms,
            "activation_mean": mean,
            "activation_std": std,
        }
        t |= {"activation_global_scale": torch.ones(layers) if scaled == "nan" else g}
    t = {key: value.to(dtype) if value.is_floating_point() else value for key, value in t.items()}
    limits = torch.tensor([threshold + i for i in range(layers)] if code == 5 else threshold)
    if batch:
        t |= {"k": torch.tensor(k, dtype=torch.int32), "threshold": limits}
    save({prefix + key: value for key, value in t.items()}, folder / file)
    said = {"activation_dim": d_model, "dict_size": latents, "num_layers": layers, "k": 100}
    said["dict_class"] = "BatchTopKCrossCoder" if batch else "CrossCoder"
    given = {"encoder_layers": order, "num_decoder_layers": writes, "init_with_transpose": order is None}
    hub = {**said, **given}
    trainer = {"trainer": {**said, "dict_class_kwargs": {key: str(value) for key, value in given.items()}}}
    (folder / "config.json").write_text(json.dumps(hub if file.startswith("model.") else trainer))

    def formula(x):
        m, s = torch.zeros(layers, 1), torch.ones(layers)
        if not old and scaled != "nan":
            m, s = t["activation_mean"].double(), t["activation_global_scale"].double().expand(layers)
        read = (x.double() - m) * s.double()[:, None]
        if (
            batch and code == 5 and not old and scaled != "nan"
        ):  # encode normalises, and encode_decoupled calls the encode that does again
            read = (read - m) * s.double()[:, None]
        relu = affine(read[:, reads], t["encoder.weight"], t["encoder.bias"]).clamp(min=0)
        each, z = norms(t["decoder.weight"]), relu
        concat = (each**2).sum(0) ** 0.5
        score = {1: each.sum(0), 2: concat, 3: concat + 0.1 * each.sum(0), 4: torch.ones(latents), 5: each}[
            1 if old else code
        ]
        if batch and code == 5:
            z = torch.stack([relu * (relu * score[layer] > limits[layer]) for layer in range(layers)], dim=1)
        elif batch:
            z = relu * (relu * score > limits)
        out = written(z, t["decoder.weight"], t["decoder.bias"])
        return z, out if old or scaled == "nan" else out / (s.double()[:, None] + 1e-8) + m

    return formula


def crosscode(
    folder,
    layers,
    d_model,
    latents,
    dtype,
    *,
    activation="ReLUActivation",
    k=1,
    stacked=None,
    folded=True,
    transcoder=False,
    biases=True,
):
    """`stacked` is the axes crosscode gives to layers, models and hook points; a transcoder reads one layer, without
    such an axis.
    """
    stacked = stacked or (1, layers)
    inner = () if transcoder else stacked
    t = {"_W_enc_XiDiL": torch.randn(*inner, d_model, latents), "_W_dec_LXoDo": torch.randn(latents, *stacked, d_model)}
    t |= {"b_enc_L": torch.randn(latents), "_b_dec_XoDo": torch.randn(*stacked, d_model)} if biases else {}
    t |= {"folded_scaling_factors_in_Xi": torch.rand(inner), "folded_scaling_factors_out_Xo": torch.rand(stacked)}
    if activation == ACTIVATIONS[4]:
        t |= {"_activation_fn.log_threshold_L": torch.randn(latents)}
    t = {key: value.to(dtype) for key, value in t.items()} | {"is_folded": torch.tensor(folded)}
    save(t, folder / "model.pt")
    counts = {
        "TopkActivation": {"k": k},
        "BatchTopkActivation": {"k_per_example": k},
        "GroupMaxActivation": {"k_groups": k, "latents_size": latents},
    }
    cfg = {
        "activation_fn": {"classname": activation, "cfg": counts.get(activation, {})},
        "d_model": d_model,
        "n_latents": latents,
    }
    cfg |= {"crosscoding_dims": stacked, "use_encoder_bias": biases, "use_decoder_bias": biases}
    (folder / "model_cfg.yaml").write_text(yaml.dump(cfg))  # a tuple is written with its tag

    def formula(x):
        b_enc = t.get("b_enc_L", torch.zeros(latents))
        b_dec = t.get("_b_dec_XoDo", torch.zeros(*stacked, d_model)).reshape(-1, d_model)
        pre = affine(x, t["_W_enc_XiDiL"].reshape(-1, d_model, latents), b_enc)
        z = torch.zeros_like(pre)
        rows = range(len(pre))
        if activation == ACTIVATIONS[0]:
            kept = [(i, f) for i in rows for f in range(latents) if pre[i, f] > 0]
        elif activation == ACTIVATIONS[4]:
            kept = [
                (i, f)
                for i in rows
                for f in range(latents)
                if pre[i, f] > float(t["_activation_fn.log_threshold_L"][f].double().exp())
            ]
        elif activation == ACTIVATIONS[2]:
            everything = sorted(((float(pre[i, f]), i, f) for i in rows for f in range(latents)), reverse=True)
            kept = [(i, f) for _, i, f in everything[: k * len(pre)]]
        elif activation == ACTIVATIONS[1]:
            kept = [(i, f) for i in rows for f in sorted(range(latents), key=lambda f: -float(pre[i, f]))[:k]]
        else:
            size = latents // k
            kept = [
                (i, max(range(g * size, (g + 1) * size), key=lambda f: float(pre[i, f])))
                for i in rows
                for g in range(k)
            ]
        for i, f in kept:
            z[i, f] = pre[i, f]
        return z, written(z, t["_W_dec_LXoDo"].reshape(latents, -1, d_model).transpose(0, 1), b_dec)

    return formula


def llamascopium(folder, layers, d_model, latents, dtype, *, act="relu", k=1, scaled=True):
    hooks = [f"blocks.{i}.hook_resid_post" for i in range(layers)]
    t = {"W_E": torch.randn(layers, d_model, latents), "b_E": torch.randn(layers, latents)}
    t |= {"W_D": torch.randn(layers, latents, d_model), "b_D": torch.randn(layers, d_model)}
    if act == "jumprelu":
        t |= {"activation_function.log_jumprelu_threshold": torch.randn(latents)}
    size = 10 * torch.rand(layers) + 0.1
    t |= {f"dataset_average_activation_norm.{hook}": size[i] for i, hook in enumerate(hooks)}
    t = {key: value.to(dtype) for key, value in t.items()}
    save(t, folder / "sae_weights.safetensors")
    said = {
        "sae_type": "crosscoder",
        "d_model": d_model,
        "expansion_factor": 4,
        "act_fn": act,
        "top_k": k,
        "sparsity_include_decoder_norm": True,
    }
    said |= {"hook_points": hooks, "norm_activation": "dataset-wise" if scaled else "none"}
    (folder / "config.json").write_text(json.dumps(said))

    def formula(x):
        scale = torch.tensor(
            [d_model**0.5 / float(t[f"dataset_average_activation_norm.{hook}"]) for hook in hooks], dtype=torch.float64
        )
        scale = scale[:, None] if scaled else torch.ones(layers, 1)
        u = affine(x.double() * scale, t["W_E"], t["b_E"].double().sum(0))
        z = torch.zeros(len(x), layers, latents, dtype=torch.float64)
        each = norms(t["W_D"])
        for i in range(len(x)):
            for layer in range(layers):
                weighed = u[i] * each[layer]
                if act == "relu":
                    kept = weighed > 0
                elif act == "jumprelu":
                    kept = weighed > t["activation_function.log_jumprelu_threshold"].double().exp()
                else:
                    kept = torch.zeros(latents, dtype=torch.bool)
                    kept[weighed.clamp(min=0).topk(k).indices] = True
                z[i, layer] = torch.where(kept, weighed.clamp(min=0), 0.0) / each[layer]
        return z, written(z, t["W_D"], t["b_D"]) / scale

    return formula
