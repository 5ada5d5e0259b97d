"""What a stored folder holds: its files, what is said of them, and how activations become bytes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmxnn.activations.source import Sides
from fmxnn.core.errors import FormatError, IntegrityError
from fmxnn.core.excerpt import excerpt
from fmxnn.core.files.strict_json import Limits, entry, parse_json, strict_json
from fmxnn.core.kinds import is_list, is_object

ABOUT, TEXT, JOURNAL = "store.json", "text.safetensors", "journal.sha256"
SHARD = 128 * 2**20
"""Bytes of a shard, unless asked for otherwise."""
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
}
"""What activations are stored as."""
FLOATS = {**{name: dtype for name, dtype in DTYPES.items() if dtype.is_floating_point}, "float64": torch.float64}
"""What batches are made of."""
NAMES = ("x", "y")
"""What the sides are called in a shard."""
_CODES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I8": torch.int8}
_WAY_OUT = "store it again in another folder"
SKIP = f"{_WAY_OUT}, or read what is left with damaged='skip'"
_LIMITS = Limits("a store.json", values=100_000, way_out=_WAY_OUT, error=FormatError)
_HEADER = Limits("a header", values=1_000, way_out=_WAY_OUT, error=IntegrityError)
_KINDS = {
    "model": str,
    "revision": (str, type(None)),
    "source": dict,
    "layers": list,
    "dtype": str,
    "given": str,
    "rows": int,
    "shuffle": dict,
    "sides": list,
    "rows_a_shard": int,
}


class Layout(NamedTuple):
    """How the rows of a store lie in its shards: `rows_a_shard` in each, and in the last what is left."""

    sides: tuple[tuple[int, int], ...]
    dtype: str
    rows: int
    rows_a_shard: int

    @property
    def shards(self) -> int:
        """How many shards there are."""
        return -(-self.rows // self.rows_a_shard)

    def span(self, shard: int) -> tuple[int, int]:
        """The first row of a shard, and the one after its last."""
        return shard * self.rows_a_shard, min((shard + 1) * self.rows_a_shard, self.rows)

    def shapes(self, shard: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """The dtype and shape of the tensors that hold activations in a shard."""
        start, stop = self.span(shard)
        found = dict[str, tuple[torch.dtype, tuple[int, ...]]]()
        for name, (layers, d_model) in zip(NAMES, self.sides, strict=False):
            found[name] = DTYPES[self.dtype], (stop - start, layers, d_model)
            if self.dtype == "int8":
                found[f"{name}_scale"] = torch.float32, (stop - start, layers)
        return found


def shard_name(shard: int) -> str:
    """The file of a shard."""
    return f"shard-{shard:05d}.safetensors"


def row_bytes(sides: tuple[tuple[int, int], ...], dtype: str) -> int:
    """The bytes of one token."""
    scale = 4 if dtype == "int8" else 0
    return sum(layers * (d_model * DTYPES[dtype].itemsize + scale) for layers, d_model in sides)


def pack(sides: Sides, dtype: str) -> dict[str, Tensor]:
    """`tokens layers d_model`, each: the tensors of a shard that hold them."""
    packed = dict[str, Tensor]()
    for name, x in zip(NAMES, sides, strict=False):
        if dtype != "int8":
            packed[name] = x.to("cpu", DTYPES[dtype]).contiguous()
            continue
        scale = x.abs().amax(-1).to("cpu", torch.float32) / 127
        steps = x.to("cpu", torch.float32) / scale.where(scale > 0, 1.0).unsqueeze(-1)
        packed[name], packed[f"{name}_scale"] = steps.round().clamp(-127, 127).to(torch.int8), scale
    return packed


def unpack(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`tokens layers d_model, tokens layers -> tokens layers d_model`: activations from what a shard holds."""
    return x.to(dtype) if scale is None else (x.to(torch.float32) * scale.unsqueeze(-1)).to(dtype)


def read_about(folder: Path) -> dict[str, Any]:
    """What `store.json` says. Raises FormatError for one that is missing or broken."""
    path = folder / ABOUT
    if not path.is_file():
        raise FormatError(
            f"{folder} holds no {ABOUT}, so it is no store of activations; give the folder that `store` wrote"
        )
    found = strict_json(path, _LIMITS)
    for name, kind in _KINDS.items():
        if not isinstance(entry(found, name), kind):
            raise FormatError(f"{path} gives {name} as {excerpt(entry(found, name))}, which it cannot be; {_WAY_OUT}")
    if (
        not is_object(found)
        or found.get("version") != 1
        or found["given"] not in FLOATS
        or found["dtype"] not in DTYPES
        or found["rows"] < 1
        or found["rows_a_shard"] < 1
    ):
        raise FormatError(f"{path} describes no store that this version of fmxnn reads; {_WAY_OUT}")
    return dict(found)


def layout_of(about: Mapping[str, Any]) -> Layout:
    """How the rows of a store lie. Raises FormatError for sides that are none."""
    sides = about["sides"]
    if not (
        0 < len(sides) <= len(NAMES) and all(is_list(each) and [type(n) for n in each] == [int, int] for each in sides)
    ):
        raise FormatError(f"{ABOUT} gives the sides {excerpt(sides)}, and one is [layers, d_model]; {_WAY_OUT}")
    return Layout(
        tuple((layers, d_model) for layers, d_model in sides), about["dtype"], about["rows"], about["rows_a_shard"]
    )


def offsets(path: Path, shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, int]:
    """Where in a safetensors file each tensor begins; only the header is read.

    Raises IntegrityError for a file that is missing or cut, and for tensors of other dtypes or shapes.
    """
    if not path.is_file():
        raise IntegrityError(f"{path} is missing; {SKIP}")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if 8 + length > size or length > _HEADER.bytes:
            raise IntegrityError(f"{path} is cut: its header has {length:,} bytes, and the file {size:,}; {SKIP}")
        header = parse_json(file.read(length), path, _HEADER)
    found = dict[str, int]()
    for name, (dtype, shape) in shapes.items():
        here = entry(header, name)
        where = entry(here, "data_offsets")
        count = torch.Size(shape).numel() * dtype.itemsize
        if (
            _CODES.get(str(entry(here, "dtype"))) != dtype
            or entry(here, "shape") != list(shape)
            or not (is_list(where) and [type(n) for n in where] == [int, int] and where[1] - where[0] == count)
        ):
            raise IntegrityError(f"{path} holds {name} as {excerpt(here)}, expected {dtype} {shape}; {SKIP}")
        if 8 + length + where[1] > size:
            raise IntegrityError(
                f"{path} is cut: it has {size:,} bytes, and its header tells of {8 + length + where[1]:,}; {SKIP}"
            )
        found[name] = 8 + length + where[0]
    return found
