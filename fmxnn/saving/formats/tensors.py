"""Tensors in files that others wrote: known by their headers, checked as a whole, read a block at a time."""

import math
import warnings
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fmxnn.core.errors import FormatError
from fmxnn.core.excerpt import cut, listed
from fmxnn.core.files.integrity import IntegrityError
from fmxnn.saving.formats.format import Options
from fmxnn.saving.formats.headers import FOREIGN, read_headers
from fmxnn.saving.formats.memory import check_room
from fmxnn.saving.formats.mistaken import check_kind
from fmxnn.saving.formats.torch_files import check_archive, torch_file, unmapped

BLOCK = 1 << 23
"""Bytes read at once."""

_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
}
_Index = tuple[int | slice, ...]


class _Header(NamedTuple):
    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class Tensors:
    """The tensors of safetensors and torch files, by key; `prefix` is taken off the keys that start with it.

    Opening reads headers only. `check` accounts for every key and for memory before anything is allocated. `fill`
    copies block by block, so that no more than a block is held twice. A torch file is read as tensors and nothing else.

    Raises IntegrityError for a file that is missing or cut. Raises FormatError for one with anything but tensors in it.

    ```python
    from pathlib import Path

    from safetensors.torch import save_file

    from fmxnn.saving.formats.tensors import Tensors

    save_file({"W_enc": torch.randn(3, 5), "b_enc": torch.zeros(5)}, "sae.safetensors")
    tensors = Tensors(Path("sae.safetensors"))
    tensors.check({"W_enc": "d_model latents", "b_enc": "latents"})  # {'d_model': 3, 'latents': 5}
    ```
    """

    def __init__(self, *paths: Path, prefix: str = ""):
        self.paths, self.prefix = paths, prefix
        self._headers: dict[str, _Header] = {}
        for path in paths:
            for header in _headers(path):
                key = header.key.removeprefix(prefix)
                if key in self._headers:
                    raise FormatError(
                        f"{path} holds {key}, which {self._headers[key].path} holds already; take one of them away"
                    )
                self._headers[key] = header

    def __contains__(self, key: str) -> bool:
        return key in self._headers

    @property
    def keys(self) -> tuple[str, ...]:
        """All of them, without the prefix."""
        return tuple(self._headers)

    @property
    def dtype(self) -> torch.dtype:
        """That of the largest tensor."""
        return max(self._headers.values(), key=lambda header: math.prod(header.shape)).dtype

    @property
    def numbers(self) -> int:
        """How many numbers all tensors hold together."""
        return sum(math.prod(header.shape) for header in self._headers.values())

    def shape(self, key: str) -> tuple[int, ...] | None:
        """The shape of one tensor, None where there is none: for formats that are told apart by it."""
        return self._headers[key].shape if key in self._headers else None

    def check(
        self,
        layout: Mapping[str, str],
        *,
        optional: Mapping[str, str] | None = None,
        sizes: Mapping[str, int] | None = None,
    ) -> dict[str, int]:
        """Accounts for every key, and gives the size of each word of `layout`: `{"W_enc": "layers d_model latents"}`.

        A number in it stands for itself. A word has one size: that in `sizes`, else that of the first tensor that has
        it. Keys of `optional` may be missing. Raises FormatError with every key that is missing, unknown, of another
        shape or not of a floating type. Scalars may be of any type.
        """
        wanted, found = {**layout, **(optional or {})}, dict(sizes or {})
        faults = [f"{key} is missing" for key in layout if key not in self._headers]
        faults += [f"{key} is unknown" for key in self._headers if key not in wanted]
        if not faults:  # what is missing may be what the shapes are to be compared with
            faults = [
                fault
                for key, words in wanted.items()
                if key in self._headers
                for fault in _faults(self._headers[key], words, found, key)
            ]
        if faults:
            raise FormatError(
                f"{self._named()} does not fit its format: {listed(faults)}; name another: format=, or ask who wrote it"
            )
        return found

    def fitting_dtype(self, options: Options) -> torch.dtype:
        """The dtype to load as, once it is known that all of it fits. Raises MemoryError where it does not."""
        dtype = options.dtype or self.dtype
        check_room(self._named(), self.numbers, dtype, options.device)
        return dtype

    def read(self, key: str) -> Tensor:
        """A small tensor, on the processor and in the file's dtype."""
        return self._block(self._headers[key], ()).clone()

    @torch.no_grad()
    def fill(self, target: Tensor, key: str, *, start: tuple[int, ...] = ()) -> None:
        """Copies a tensor into `target`, a parameter or a view of one whose axes are in the file's order.

        On the meta device nothing is read. With `start`, an index of the tensor, only the part of the target's shape
        that begins there is read. Warns of NaN, which nothing else would name.
        """
        if target.is_meta:
            return
        header, shape = self._headers[key], tuple(target.shape)
        holed = False
        spread = (
            -(-math.prod(header.shape[1:]) // max(math.prod(shape[1:]), 1)) if start else 1
        )  # a part is mapped with what lies between
        for index in _blocks(shape, header.dtype.itemsize * spread):
            block = self._block(header, _moved(index, shape, start) if start else index)
            holed = holed or bool(block.isnan().any())
            target[index].copy_(block)
        if holed:
            warnings.warn(
                f"{header.path} holds NaN in {key}, and what is computed from it is NaN; fetch it again, or ask who "
                "made it",
                stacklevel=2,
            )

    def _block(self, header: _Header, index: _Index) -> Tensor:
        """Opened anew for each block, so that a file's pages do not pile up."""
        if header.path.suffix != ".safetensors":
            return torch_file(header.path)[header.key][index]
        try:
            with safe_open(header.path, framework="pt") as file:
                return file.get_slice(header.key)[index] if index else file.get_tensor(header.key)
        except (OSError, SafetensorError) as error:
            raise IntegrityError(f"{header.path} cannot be read: {error}; fetch it again") from error
        except RuntimeError as error:
            raise unmapped(header.path, error) from error

    def _named(self) -> str:
        return (
            str(self.paths[0])
            if len(self.paths) == 1
            else f"{self.paths[0].parent} ({', '.join(path.name for path in self.paths)})"
        )


def _faults(header: _Header, pattern: str, sizes: dict[str, int], key: str) -> Iterator[str]:
    """What is wrong with a tensor's shape and type; words that have no size yet take theirs from it."""
    words = pattern.split()
    if len(words) == len(header.shape):
        for word, size in zip(words, header.shape, strict=True):
            sizes.setdefault(word, int(word) if word.isdigit() else size)
    if header.shape != tuple(sizes.get(word, -1) for word in words):
        named = ", ".join(f"{word}={sizes[word]}" if word in sizes and not word.isdigit() else word for word in words)
        yield f"{key} has the shape {header.shape}, expected ({named})"
    if header.shape and not header.dtype.is_floating_point:
        yield f"{key} holds {str(header.dtype).removeprefix('torch.')}, expected a floating type"


def _headers(path: Path) -> Iterator[_Header]:
    if not path.is_file():
        raise IntegrityError(f"{path} is missing; fetch it again")
    check_kind(path)
    if path.suffix != ".safetensors":
        check_archive(path)
        for key, tensor in torch_file(path).items():
            kind = (
                tensor.layout
                if tensor.layout != torch.strided
                else torch.device("meta")
                if tensor.is_meta
                else tensor.dtype
            )
            if kind not in _DTYPES.values():
                raise _unknown(path, key, str(kind).removeprefix("torch."))
            yield _Header(path, key, tuple(tensor.shape), tensor.dtype)
        return
    for key, (shape, dtype) in read_headers(path, way_out="fetch it again", most=FOREIGN).items():
        if dtype not in _DTYPES:
            raise _unknown(path, key, dtype)
        yield _Header(path, key, shape, _DTYPES[dtype])


def _unknown(path: Path, key: str, kind: str) -> FormatError:
    return FormatError(
        f"{path} holds {cut(key)} as {kind}, and known are dense {', '.join(_DTYPES)}; save it again as one of them"
    )


def _blocks(shape: tuple[int, ...], itemsize: int) -> Iterator[_Index]:
    """Indices that cut a tensor into contiguous blocks of at most BLOCK bytes, or longer single rows."""
    axis, row = 0, math.prod(shape) * itemsize
    while axis < len(shape) and row > BLOCK:
        row //= shape[axis]
        axis += 1
    if not axis:
        yield ()
        return
    step = max(BLOCK // max(row, 1), 1)
    for before in product(*(range(size) for size in shape[: axis - 1])):
        for start in range(0, shape[axis - 1], step):
            yield (*before, slice(start, start + step))


def _moved(index: _Index, shape: tuple[int, ...], start: tuple[int, ...]) -> _Index:
    """A block of a part of this shape as a block of the tensor in which the part begins at `start`."""
    whole = (*index, *(slice(0, size) for size in shape[len(index) :]))
    return tuple(
        first + at if isinstance(at, int) else slice(first + at.start, first + min(at.stop, size))
        for at, first, size in zip(whole, start, shape, strict=True)
    )
