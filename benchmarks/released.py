"""Files that other libraries' own classes wrote, read by fmxnn and compared with those classes: `.venv-bench/bin/python
benchmarks/released.py`.

The environment is the one of `make bench` (`python benchmarks/environment.py` makes it alone).
"""

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault(
    "OMP_WAIT_POLICY", "passive"
)  # before torch is loaded, see "One busy core" in docs/performance.md

import torch
from common import print_table
from peers import without_nnsight
from safetensors.torch import save_file
from torch import Tensor, nn

import fmxnn as fx

D_MODEL, LATENTS, K = 32, 96, 5
Written = tuple[str, Callable[[Tensor], Tensor]]
Case = tuple[str, Callable[[Path], object], Callable[[Tensor], Tensor]]
"""A name, what writes a folder, and what its class computes."""
TOP_K = {"activation_fn_kwargs": {"k": K}}
OLDER: dict[str, dict[str, object]] = {
    "3 Standard": {"hook_point": "blocks.0.hook_resid_pre", "normalize_activations": False},
    "4 Standard": {"activation_fn_str": "relu", "activation_fn_kwargs": {}, "architecture": "standard"},
    "4 TopK": {"activation_fn_str": "topk", **TOP_K, "architecture": "standard"},
    "5 TopK": {"activation_fn_str": "topk", **TOP_K, "architecture": "topk"},
    "5 JumpReLU": {"activation_fn_str": "relu", "activation_fn_kwargs": {}, "architecture": "jumprelu"},
}
"""Settings as versions before 6 wrote them, beside the sizes."""
TOLERANCE = 1e-5


def main() -> int:
    """Writes, reads, compares and prints; 1 where one differs."""
    torch.manual_seed(0)
    x, rows = torch.randn(256, D_MODEL), []
    with TemporaryDirectory() as parent, torch.no_grad():
        for number, (name, theirs) in enumerate(written(Path(parent))):
            mine = fx.from_pretrained(Path(parent) / str(number))(x.unsqueeze(-2)).squeeze(-2)
            expected = theirs(x)
            rows.append([name, float((mine - expected).abs().max() / (1 + expected.abs().max()))])
    print_table(
        "released formats against the libraries' own classes, float32",
        ["", "largest difference / (1 + largest number)"],
        rows,
    )
    return int(any(error > TOLERANCE for _, error in rows))


def written(parent: Path) -> Iterator[Written]:
    """One folder after the other, each named by its number, with the function that its writer's class computes."""
    number = 0
    for make in (sae_lens, sparsify, dictionary_learning):
        for name, save, run in make():
            folder = parent / str(number)
            save(folder)
            if isinstance(run, Loaded):
                run.folder = str(folder)
            yield name, run
            number += 1


def sae_lens() -> Iterator[Case]:
    """SAELens: standard, jumprelu and topk, with and without its options, and the settings that its versions 3 to 5
    wrote, through its own loader.
    """
    package = importlib.import_module("sae_lens")
    for kind, options in (
        ("Standard", {}),
        ("Standard", {"apply_b_dec_to_input": True}),
        ("JumpReLU", {}),
        ("TopK", {"k": K}),
        ("TopK", {"k": K, "rescale_acts_by_decoder_norm": True}),
    ):
        config = getattr(package, f"{kind}SAEConfig")(d_in=D_MODEL, d_sae=LATENTS, **options)
        sae = drawn(getattr(package, f"{kind}SAE")(config))
        said = ", ".join(f"{key}={value}" for key, value in options.items())
        yield f"SAELens {kind} {said}".strip(), sae.save_model, sae
    for kind, said in OLDER.items():
        version, name = kind.split()
        sae = drawn(getattr(package, f"{name}SAE")(getattr(package, f"{name}SAEConfig")(d_in=D_MODEL, d_sae=LATENTS)))

        def save(folder: Path, sae: nn.Module = sae, said: dict[str, object] = said) -> None:
            folder.mkdir()
            save_file(sae.state_dict(), folder / "sae_weights.safetensors")
            known = {
                "d_in": D_MODEL,
                "d_sae": LATENTS,
                "dtype": "float32",
                "device": "cpu",
                "model_name": "gpt2",
                "hook_name": "h",
            }
            (folder / "cfg.json").write_text(json.dumps(known | said))

        yield f"SAELens {version}, its settings: {name}", save, Loaded(package.SAE.load_from_disk)


class Loaded:
    """What a library's own loader makes of the folder that was written last."""

    def __init__(self, load: Callable[[str], Callable[[Tensor], Tensor]]):
        self.load, self.folder = load, ""

    def __call__(self, x: Tensor) -> Tensor:
        """`tokens d_model -> tokens d_model`"""
        return self.load(self.folder)(x)


def sparsify() -> Iterator[Case]:
    """eai-sparsify's TopK coder."""
    package = importlib.import_module("sparsify")
    coder = drawn(package.SparseCoder(D_MODEL, package.SparseCoderConfig(num_latents=LATENTS, k=K), device="cpu"))
    yield "eai-sparsify", coder.save_to_disk, lambda x: coder(x).sae_out


def dictionary_learning() -> Iterator[Case]:
    """dictionary_learning's BatchTopK and TopK, each as it encodes where it is not told otherwise; TopK by SAELens'
    loader too.
    """
    without_nnsight()
    for module, kind in (("batch_top_k", "BatchTopKSAE"), ("top_k", "AutoEncoderTopK")):
        sae = drawn(
            getattr(importlib.import_module(f"dictionary_learning.trainers.{module}"), kind)(D_MODEL, LATENTS, K)
        )
        sae.threshold.fill_(0.4)

        def save(folder: Path, sae: nn.Module = sae, kind: str = kind) -> None:
            folder.mkdir()
            torch.save(sae.state_dict(), folder / "ae.pt")
            trainer = {
                "dict_class": kind,
                "activation_dim": D_MODEL,
                "dict_size": LATENTS,
                "k": K,
                "lm_name": "gpt2",
                "layer": 0,
            }
            trainer |= {"submodule_name": "resid_post_layer_0"}
            (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}}))

        yield f"dictionary_learning {kind}", save, sae
        yield f"dictionary_learning {kind}, SAELens' loader", save, Loaded(by_sae_lens)


def by_sae_lens(folder: str) -> Callable[[Tensor], Tensor]:
    """What SAELens makes of a folder of dictionary_learning, its download being a look into that folder."""
    package, loaders = (
        importlib.import_module("sae_lens"),
        importlib.import_module("sae_lens.loading.pretrained_sae_loaders"),
    )

    def here(repo_id: str, filename: str, **_: object) -> str:
        return str(Path(repo_id) / filename)

    def convert(path: str, device: str, cfg_overrides: object = None) -> tuple[dict[str, object], dict[str, Tensor]]:
        config, tensors, _ = loaders.dictionary_learning_sae_huggingface_loader_1(
            path, ".", device, cfg_overrides=cfg_overrides
        )
        return config, tensors

    there, loaders.hf_hub_download = loaders.hf_hub_download, here
    try:
        return package.SAE.load_from_disk(folder, converter=convert)
    finally:
        loaders.hf_hub_download = there


def drawn(module: nn.Module) -> nn.Module:
    """Every parameter drawn anew, thresholds above zero."""
    for name, parameter in module.named_parameters():
        parameter.data.normal_(0, 0.3)
        if "threshold" in name:
            parameter.data.abs_()
    return module


if __name__ == "__main__":
    sys.exit(main())
