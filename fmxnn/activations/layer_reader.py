"""Activations of a model, read at chosen places."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from fmxnn.activations.configs import check_unfolded
from fmxnn.activations.families import is_compiled
from fmxnn.activations.places import Layer, Place, check_layers, find_places
from fmxnn.core.errors import ShapeError
from fmxnn.core.excerpt import excerpt

Forward = Callable[[nn.Module, Tensor], object]
"""Runs a model on token ids, `contexts context`; what it returns is not looked at."""


class AllRead(Exception):  # no error
    """Ends the forward once everything asked for has been read."""


def call_language_model(model: nn.Module, ids: Tensor) -> None:
    """`contexts context -> `: runs a language model of transformers, without a cache and with no token masked."""
    model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)


class LayerReader:
    """`contexts context -> contexts context layers d_model`: activations at `layers`, in the order given.

    The forward stops after the last of them, so later blocks and the head are not run. Gradients are off.

    - `layers`: numbers of layers, counted from zero, and names of places; see `harvest`
    - `at`: where in each numbered layer; by default the residual stream after its block
    - `path`: where the blocks of an unknown family are
    - `call`: runs a model that is no language model of transformers, as `lambda model, ids: model(ids)`

    Raises TypeError for a model that is not opened. Raises ValueError for a place that the model lacks or that is given
    twice, and for weights that TransformerLens folded. Reading raises ValueError for a place that the forward does not
    reach, that it reaches twice before all are read, or that holds no `contexts context d_model`.

    ```python
    from fmxnn.activations.layer_reader import LayerReader

    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4))
    reader = LayerReader(model, ["0", "1"], call=lambda model, ids: model(ids))
    reader(torch.tensor([[5, 6, 7]])).shape  # 1, 3, 2, 4
    ```
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        *,
        at: str = "block_out",
        path: str | None = None,
        call: Forward = call_language_model,
    ):
        _check_opened(model)
        check_unfolded(model)
        self.model, self.layers, self.at, self.call = model, check_layers(layers), at, call
        self.places = find_places(model, self.layers, at=at, path=path)

    def __call__(self, ids: Tensor) -> Tensor:
        """`contexts context -> contexts context layers d_model`"""
        return read_together((self,), ids)[0]


def _check_opened(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"a model is read that is opened, got {excerpt(model)}; open it: model, tokenizer = "
            "fmxnn.activations.models.open_model(name)"
        )


@torch.no_grad()
def read_together(readers: Sequence[LayerReader], ids: Tensor) -> tuple[Tensor, ...]:
    """`contexts context -> contexts context layers d_model`: what each reader of one model gives, from one forward."""
    places = [place for reader in readers for place in reader.places]
    read: dict[int, Tensor] = {}

    def keep(number: int) -> Callable[[Tensor], None]:
        def see(x: Tensor) -> None:
            if number in read:
                raise ValueError(f"{places[number].name} ran twice in one forward, so it is no one place; read another")
            read[number] = x
            if len(read) == len(places):
                raise AllRead

        return see

    hooks = [place.hook(keep(number)) for number, place in enumerate(places)]
    try:
        with _eager(readers[0].model):
            readers[0].call(readers[0].model, ids)
    except AllRead:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    _check_read(readers[0].model, places, read, ids)
    sides = iter(read[number] for number in range(len(places)))
    return tuple(_stacked(reader, [next(sides) for _ in reader.places]) for reader in readers)


def _eager(model: nn.Module) -> AbstractContextManager[object]:
    """Runs compiled modules as they were written, since compiled code has no hooks but those of its first call."""
    return torch.compiler.set_stance("force_eager") if is_compiled(model) else nullcontext()


def _check_read(model: nn.Module, places: Sequence[Place], read: dict[int, Tensor], ids: Tensor) -> None:
    missed = ", ".join(place.name for number, place in enumerate(places) if number not in read)
    if missed:
        raise ValueError(
            f"the forward of {type(model).__name__} never reached {missed:.200}; read a module that runs, or run the "
            "model so that it does with call=..."
        )
    for number, place in enumerate(places):
        if read[number].ndim != 3 or read[number].shape[:2] != ids.shape:
            raise ShapeError(
                f"{place.name} is read as (contexts={ids.shape[0]}, context={ids.shape[1]}, d_model), got "
                f"{tuple(read[number].shape)}; read a module that gives one vector for each token id"
            )


def _stacked(reader: LayerReader, sides: Sequence[Tensor]) -> Tensor:
    if len({side.shape[-1] for side in sides}) > 1:
        widths = ", ".join(f"{place.name} {side.shape[-1]}" for place, side in zip(reader.places, sides, strict=True))
        raise ShapeError(f"layers that are read together have one d_model, got {widths:.200}; read them one by one")
    return torch.stack(list(sides), dim=-2)
