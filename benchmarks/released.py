"""Files that other libraries' own classes wrote, read by fmxnn and compared with those classes: `.venv-bench/bin/python benchmarks/released.py`.

The environment is the one of `make bench` (`python benchmarks/environment.py` makes it alone).
"""

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is loaded, see "One busy core" in docs/performance.md

import torch
from common import print_table
from peers import without_nnsight
from torch import Tensor, nn

import fmxnn as fx

D_MODEL, LATENTS, K = 32, 96, 5
Written = tuple[str, Callable[[Tensor], Tensor]]
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
    print_table("released formats against the libraries' own classes, float32", ["", "largest difference / (1 + largest number)"], rows)
    return int(any(error > TOLERANCE for _, error in rows))


def written(parent: Path) -> Iterator[Written]:
    """One folder after the other, each named by its number, with the function that its writer's class computes."""
    number = 0
    for make in (sae_lens, sparsify, dictionary_learning):
        for name, save, run in make():
            folder = parent / str(number)
            save(folder)
            yield name, run
            number += 1


def sae_lens() -> Iterator[tuple[str, Callable[[Path], object], Callable[[Tensor], Tensor]]]:
    """SAELens: standard, jumprelu and topk, with and without its options that are folded."""
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


def sparsify() -> Iterator[tuple[str, Callable[[Path], object], Callable[[Tensor], Tensor]]]:
    """eai-sparsify's TopK coder."""
    package = importlib.import_module("sparsify")
    coder = drawn(package.SparseCoder(D_MODEL, package.SparseCoderConfig(num_latents=LATENTS, k=K), device="cpu"))
    yield "eai-sparsify", coder.save_to_disk, lambda x: coder(x).sae_out


def dictionary_learning() -> Iterator[tuple[str, Callable[[Path], object], Callable[[Tensor], Tensor]]]:
    """dictionary_learning's BatchTopK and TopK, read by their thresholds."""
    without_nnsight()
    for module, kind in (("batch_top_k", "BatchTopKSAE"), ("top_k", "AutoEncoderTopK")):
        sae = drawn(getattr(importlib.import_module(f"dictionary_learning.trainers.{module}"), kind)(D_MODEL, LATENTS, K))
        sae.threshold.fill_(0.4)

        def save(folder: Path, sae: nn.Module = sae, kind: str = kind) -> None:
            folder.mkdir()
            torch.save(sae.state_dict(), folder / "ae.pt")
            trainer = {"dict_class": kind, "activation_dim": D_MODEL, "dict_size": LATENTS, "k": K}
            (folder / "config.json").write_text(json.dumps({"trainer": trainer}))

        yield f"dictionary_learning {kind}", save, lambda x, sae=sae: sae.decode(sae.encode(x, use_threshold=True))


def drawn(module: nn.Module) -> nn.Module:
    """Every parameter drawn anew, thresholds above zero."""
    for name, parameter in module.named_parameters():
        parameter.data.normal_(0, 0.3)
        if "threshold" in name:
            parameter.data.abs_()
    return module


if __name__ == "__main__":
    sys.exit(main())
