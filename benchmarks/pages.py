"""Makes a folder of feature pages of a crosscoder that was not trained, and says what it took; see browser.py."""

import argparse
import json
import os
import platform
import resource
import time
from pathlib import Path

os.environ.setdefault(
    "OMP_WAIT_POLICY", "passive"
)  # before torch is loaded, see "One busy core" in docs/performance.md

import torch

import fmxnn as fx
from fmxnn.activations import harvest
from fmxnn.activations.models import open_model
from fmxnn.metrics import logit_weights
from fmxnn.reports.pages import feature_page


def main() -> None:
    """One page, timed part by part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="examples/tiny-lm")
    parser.add_argument("--text", required=True)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 5, 8])
    parser.add_argument("--latents", type=int, default=16_384)
    parser.add_argument("--k", type=int, default=24)
    parser.add_argument("--most", type=int, nargs=3, default=[20, 2, 2], help="tokens, contexts and examples")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model, tokenizer = open_model(arguments.model)
    stream = harvest(
        model, arguments.text, layers=arguments.layers, tokenizer=tokenizer, tokens=arguments.tokens, batch=1024
    )
    sizes = (len(arguments.layers), stream.d_model, arguments.latents)
    crosscoder = fx.isometric_start(
        fx.Crosscoder(
            fx.CrossLayerEncoder(fx.DenseWeight(*sizes), fx.TopK(arguments.k)),
            fx.CrossLayerDecoder(fx.DenseWeight(*sizes)),
        )
    )
    took, started = {}, time.perf_counter()

    def lap(name: str) -> None:
        nonlocal started
        took[name], started = round(time.perf_counter() - started, 1), time.perf_counter()

    promoted = logit_weights(crosscoder, model)
    lap("logit weights")
    tokens, contexts, examples = arguments.most
    page = feature_page(
        crosscoder, stream, tokenizer, tokens=tokens, contexts=contexts, examples=examples, promoted=promoted
    )
    lap("one pass over the text")
    page.save(arguments.folder)
    lap("writing")
    files = list(arguments.folder.iterdir())
    found = {
        "seconds": took,
        "files": len(files),
        "MB": round(sum(file.stat().st_size for file in files) / 1e6, 1),
        "table MB": round((arguments.folder / "table.js").stat().st_size / 1e6, 2),
        "peak MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "tokens": page.tokens,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
