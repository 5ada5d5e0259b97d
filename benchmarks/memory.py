"""Temporaries of a training step beyond parameters and gradients, each contender in a process of its own, from its
second step on.
"""

import argparse
import json
import os

os.environ.setdefault(
    "OMP_WAIT_POLICY", "passive"
)  # before torch is loaded, see "One busy core" in docs/performance.md

from common import (
    MB,
    add_common,
    finish,
    peak,
    prepared,
    print_table,
    reset_peak,
    shape_of,
    size_flags,
    subprocess_json,
)
from contest import Shape, contender, makers


def main() -> None:
    """Measures all, or one where `--one` names it."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_common(parser)
    parser.add_argument("--one", help="one contender, in this process")
    arguments = prepared(parser)
    shape = shape_of(arguments)
    if arguments.one:
        print(json.dumps(temporaries(shape, arguments.one)))
        return
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(
        2**20
    )  # freed blocks go back at once, so that the peak is of tensors and not of the allocator's past
    names = list(makers(shape.activations()[:1], shape))
    found = {name: subprocess_json("memory.py", f"--one={name}", *size_flags(arguments)) for name in names}
    rows = [[name, one.get("MiB", one.get("failed")), one.get("gradients MiB")] for name, one in found.items()]
    print_table("temporaries of one training step beyond parameters and gradients", ["", "MiB", "gradients, MiB"], rows)
    finish(arguments, "memory", {"shape": shape.numbers(), "temporaries": found})


def temporaries(shape: Shape, name: str) -> dict[str, float]:
    """Peak of the second step, less what was resident before it and less the gradients: code and the libraries'
    workspaces come once.
    """
    x = shape.activations()
    field = contender(makers(x, shape)[name]())
    field.step()
    field.clear()
    before = reset_peak()
    field.step()
    highest, gradients = peak(), field.gradient_bytes()
    return {"MiB": round((highest - before - gradients) / MB, 1), "gradients MiB": round(gradients / MB, 1)}


if __name__ == "__main__":
    main()
