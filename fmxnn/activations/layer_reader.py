"""Activations of a language model, read at chosen places."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fmxnn.activations.places import Layer, find_places


class _Read(Exception):  # no error: it ends the forward once everything asked for has been read
    pass


class LayerReader:
    """`contexts context -> contexts context layers d_model`: activations at `layers`, in the order given.

    Layers are counted from zero. The forward stops after the last of them, so later blocks and the head are not run.
    Gradients are off. Raises ValueError for a layer that the model lacks or that is given twice.

    - `at`: where in each layer; by default the residual stream after its block
    - `path`: where the blocks of an unknown family are

    ```python
    from fmxnn.activations.layer_reader import LayerReader

    model = nn.Module()
    model.config = None
    model.blocks = nn.ModuleList([nn.Identity(), nn.Identity()])
    reader = LayerReader(model, layers=[0, 1], path="blocks")
    ```
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer], *, at: str = "block_out", path: str | None = None):
        self.model, self.layers, self.at = model, tuple(layers), at
        self.places = find_places(model, self.layers, at=at, path=path)

    def __call__(self, ids: Tensor) -> Tensor:
        """`contexts context -> contexts context layers d_model`"""
        return read_together((self,), ids)[0]


@torch.no_grad()
def read_together(readers: Sequence[LayerReader], ids: Tensor) -> tuple[Tensor, ...]:
    """`contexts context -> contexts context layers d_model`: what each reader of one model gives, from one forward."""
    places = [place for reader in readers for place in reader.places]
    read: dict[int, Tensor] = {}

    def keep(number: int) -> Callable[[Tensor], None]:
        def see(x: Tensor) -> None:
            read[number] = x
            if len(read) == len(places):
                raise _Read

        return see

    hooks = [place.hook(keep(number)) for number, place in enumerate(places)]
    try:
        readers[0].model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    except _Read:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    sides = iter(read[number] for number in range(len(places)))
    return tuple(torch.stack([next(sides) for _ in reader.places], dim=-2) for reader in readers)
