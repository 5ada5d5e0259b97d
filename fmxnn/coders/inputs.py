"""Activations as a crosscoder takes them: checked, on its device, and in blocks."""

from collections.abc import Sequence

from torch import Tensor

from fmxnn.coders.crosscoder import Crosscoder
from fmxnn.core.errors import ShapeError
from fmxnn.weights.weight import check_layers


def check_activations(
    crosscoder: Crosscoder, shape: Sequence[int], layers: Sequence[int | str] = (), *, writes: bool = False
) -> None:
    """Raises ShapeError for activations of other layers or d_model than the crosscoder reads (and `writes`).

    The sentence names the `layers` of the language model where they are given.
    """
    sides = {"reads": crosscoder.encoder.weight} | ({"writes": crosscoder.decoder.weight} if writes else {})
    for verb, weight in sides.items():
        if tuple(shape[-2:]) != (weight.layers, weight.d_model):
            given = f" from the layers {', '.join(map(str, layers))}" if layers else ""
            raise ShapeError(
                f"the crosscoder {verb} (..., layers={weight.layers}, d_model={weight.d_model}), "
                f"got {tuple(shape)}{given}; give it the layers that it was trained on, in their order"
            )


HELD = 1 << 22
"""Pre-activations made at once: 16 MiB in float32."""


def blocks(crosscoder: Crosscoder, x: Tensor, *, whole: bool) -> Sequence[Tensor]:
    """`... layers d_model -> tokens layers d_model`: in the crosscoder's dtype and on its device, a block at a time.

    Blocks are cut so that few pre-activations are made at once, unless the batch stays `whole`. There is none of no
    tokens.
    Raises ShapeError for other layers or d_model.
    """
    check_activations(crosscoder, x.shape)
    like = crosscoder.encoder.bias
    flat = x.to(like.device, like.dtype).reshape(-1, *x.shape[-2:])
    return flat.split(len(flat) if whole else max(1, HELD // len(like))) if len(flat) else ()


def check_batch(crosscoder: Crosscoder, x: Tensor, y: Tensor | None) -> None:
    """`... tokens layers d_model, ... tokens layers d_model -> `: refuses a batch that cannot be trained on.

    Raises ShapeError or TypeError.
    """
    check_layers("encoder", crosscoder.encoder.weight, x)
    _check_tokens("x", x)
    check_targets(crosscoder, x, y, way_out="step(x, y)")
    if y is not None:
        _check_tokens("y", y)


def check_targets(crosscoder: Crosscoder, x: Tensor, y: Tensor | None, *, way_out: str = "(x, y)") -> None:
    """`... layers d_model, ... layers d_model -> `: raises ShapeError where y is not what is rebuilt from x.

    Without y that is x itself, where encoder and decoder have the same layers and d_model.
    """
    reader, writer = crosscoder.encoder.weight, crosscoder.decoder.weight
    wanted = (*x.shape[:-2], writer.layers, writer.d_model)
    if y is None and (reader.layers, reader.d_model) == (writer.layers, writer.d_model):
        return
    if y is None or y.shape != wanted:
        raise ShapeError(
            f"from x of {tuple(x.shape)} the crosscoder rebuilds y of {wanted}, its decoder's layers={writer.layers} "
            f"and d_model={writer.d_model}, got {'none' if y is None else tuple(y.shape)}; "
            f"give the same tokens: {way_out}"
        )


def _check_tokens(name: str, given: Tensor) -> None:
    wanted, shape = f"a step takes {name} of (..., tokens, layers, d_model)", tuple(given.shape)
    if len(shape) < 3:
        raise ShapeError(f"{wanted}, got {shape} without an axis of tokens; give one token as {name}.unsqueeze(0)")
    if not given.numel():
        raise ShapeError(f"{wanted}, got {shape}, which holds no tokens; leave empty batches out")
    if not given.is_floating_point():
        raise TypeError(f"{wanted} in floating point, got {given.dtype}; give real activations, such as {name}.float()")
