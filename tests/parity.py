"""How far what is read is from the formula in loops: `python tests/parity.py` prints the largest error of each format, relative to the largest value."""

import tempfile
import warnings
from pathlib import Path

import foreign_crosscoders as foreign
import torch

import fmxnn as fx

SIZES, TOKENS, SEEDS = (3, 16, 32), 16, 5
CASES = {
    "ckkissane": [(foreign.ckkissane, {})],
    "dictionary_learning_crosscoder, CrossCoder": [
        (foreign.dictionary_learning, {"batch": False, "scaled": s}) for s in ("newer", "older", "nan")
    ],
    "dictionary_learning_crosscoder, BatchTopKCrossCoder": [(foreign.dictionary_learning, {"code": code}) for code in range(1, 6)],
    "crosscode": [(foreign.crosscode, {"activation": name, "k": 4}) for name in foreign.ACTIVATIONS],
    "llamascopium": [(foreign.llamascopium, {"act": act, "k": 4}) for act in ("relu", "topk", "jumprelu")],
}


def error(write, options, dtype, seed):
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        formula = write(Path(folder), *SIZES, dtype, **options)
        module = fx.from_pretrained(folder)
    x = torch.randn(TOKENS, *SIZES[:2], dtype=dtype)
    x_hat = formula(x, torch.ones(SIZES[0]))[1] if write is foreign.ckkissane else formula(x)[1]
    return float((module(x) - x_hat).abs().max() / x_hat.abs().max())


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for name, cases in CASES.items():
        found = [max(error(*case, dtype, seed) for case in cases for seed in range(SEEDS)) for dtype in (torch.float32, torch.float64)]
        print(f"{name:<52} float32 {found[0]:.1e}  float64 {found[1]:.1e}")
