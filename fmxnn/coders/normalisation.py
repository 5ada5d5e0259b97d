"""Activations centred and brought to one size, layer by layer."""

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from fmxnn.coders.crosscoder import Crosscoder, crosscoder_in
from fmxnn.core.errors import ShapeError
from fmxnn.core.sizes import sizes_of
from fmxnn.weights.weight import Weight


class Normalisation(nn.Module):
    """`... layers d_model -> ... layers d_model`: (x - mean) * scale, with a scale for each layer.

    The buffers `scale` (`layers`) and `mean` (`layers d_model`) start at one and zero, and stay float32 or wider
    however the module is cast. `fit_normalisation` finds them in activations, `Normalisation.of` takes them.

    ```python
    normalisation = fx.Normalisation.of(torch.tensor([1.0, 0.1]), torch.randn(2, 8))
    x = torch.randn(10, 2, 8)
    torch.testing.assert_close(normalisation.inverse(normalisation(x)), x)
    ```
    """

    scale: Tensor
    mean: Tensor

    def __init__(self, layers: int, d_model: int):
        super().__init__()
        self.layers, self.d_model = sizes_of("Normalisation", layers=layers, d_model=d_model)
        self.register_buffer("scale", torch.ones(self.layers))
        self.register_buffer("mean", torch.zeros(self.layers, self.d_model))

    @classmethod
    def of(cls, scale: Tensor, mean: Tensor) -> "Normalisation":
        """From a scale of `layers`, finite and above zero, and a mean of `layers d_model`; float64 stays float64.

        Raises ShapeError for other shapes and ValueError for other numbers.
        """
        if mean.ndim != 2 or scale.shape != mean.shape[:1]:
            raise ShapeError(
                "Normalisation.of takes scale (layers) and mean (layers, d_model), "
                f"got {tuple(scale.shape)} and {tuple(mean.shape)}"
            )
        made = cls(*mean.shape)
        made.scale, made.mean = (
            value.detach().to(torch.promote_types(value.dtype, torch.float32), copy=True) for value in (scale, mean)
        )
        made.check()
        return made

    @override
    def extra_repr(self) -> str:
        """The sizes, as the constructor takes them."""
        return f"layers={self.layers}, d_model={self.d_model}"

    def forward(self, x: Tensor) -> Tensor:
        """`... layers d_model -> ... layers d_model`: normalised. Raises ShapeError for other layers or d_model."""
        self._check_layers(x)
        return ((x - self.mean) * self.scale.unsqueeze(-1)).to(x.dtype)

    def inverse(self, x: Tensor) -> Tensor:
        """`... layers d_model -> ... layers d_model`: x / scale + mean, back in the units of the data.

        Raises ShapeError as `forward` does.
        """
        self._check_layers(x)
        return (x / self.scale.unsqueeze(-1) + self.mean).to(x.dtype)

    def inverted(self) -> "Normalisation":
        """The normalisation whose `forward` is this one's `inverse`, in float64."""
        self.check()
        scale, mean = self.scale.double(), self.mean.double()
        return Normalisation.of(1 / scale, -mean * scale.unsqueeze(-1))

    def check(self) -> None:
        """Raises ValueError, naming the layers, unless every scale is finite and above zero and every mean finite."""
        bad = (~self.scale.isfinite() | (self.scale <= 0)).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"a normalisation needs finite scales > 0, got {self.scale[bad].tolist()} at layers axis {bad}; "
                "1 leaves a layer as it is"
            )
        bad = (~self.mean.isfinite()).any(-1).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"a normalisation needs finite means, got NaN or infinity at layers axis {bad}; "
                "0 leaves a coordinate as it is"
            )

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Normalisation":
        before = self.scale, self.mean
        super()._apply(fn, recurse)
        if self.scale.dtype.itemsize < 4:
            self.scale, self.mean = (value.to(self.scale.device) for value in before)
        return self

    def _check_layers(self, x: Tensor) -> None:
        if x.shape[-2:] != (self.layers, self.d_model):
            raise ShapeError(
                f"the normalisation is made for (..., layers={self.layers}, d_model={self.d_model}), "
                f"got {tuple(x.shape)}; stack one activation per layer: torch.stack(hidden, dim=-2)"
            )


@torch.no_grad()
def fit_normalisation(batches: Iterable[Tensor], *, centred: bool = True, target: float | None = None) -> Normalisation:
    """`... layers d_model -> `: the normalisation that gives each layer mean zero and one norm, from one pass.

    `target` is the root mean square norm that each layer gets; None is sqrt(d_model), coordinates of variance one on
    average. `centred=False` leaves the mean at zero and scales alone. Sums are float64.
    Raises ShapeError for batches of different layers and ValueError for a layer that cannot be scaled.
    """
    if target is not None and not 0 < target < float("inf"):
        raise ValueError(
            f"fit_normalisation needs a finite target > 0, the root mean square norm of each layer, got {target=}"
        )
    count, dtype = 0, torch.float32
    origin = total = square = torch.empty(0)
    for number, x in enumerate(batches):
        if x.ndim < 3 or (number and x.shape[-2:] != origin.shape):
            wanted = f"layers={origin.shape[0]}, d_model={origin.shape[1]}" if number else "layers, d_model"
            raise ShapeError(
                f"batch {number} of the activations is {tuple(x.shape)}, expected (..., {wanted}); "
                "one tensor goes in as [x]"
            )
        rows = x.flatten(0, -3).double()
        if not number:  # sums about a token: a mean that is large beside the spread then costs no digits
            origin = rows[:1].sum(0) * centred
            total, square = torch.zeros_like(origin), torch.zeros_like(origin[:, 0])
            dtype = torch.promote_types(x.dtype, torch.float32)
        rows = rows - origin
        count, total, square = count + len(rows), total + rows.sum(0), square + rows.pow(2).sum((0, -1))
    if not count:
        raise ValueError("fit_normalisation needs activations, got no tokens")
    shift = total / count * centred
    norm = (square / count - shift.pow(2).sum(-1)).clamp(min=0).sqrt()
    bad = (~norm.isfinite() | (norm == 0)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            "fit_normalisation needs finite activations that vary at every layer, got a root mean square norm of "
            f"{norm[bad].tolist()} at layers axis {bad} over {count} tokens; leave these layers out"
        )
    scale = (len(shift[0]) ** 0.5 if target is None else target) / norm
    return Normalisation.of(scale.to(dtype), (origin + shift).to(dtype))


class Normalised(nn.Module):
    """`... layers d_model -> ... layers d_model`: a crosscoder of normalised activations, in the units of the data.

    - `crosscoder`: a Crosscoder or a SkipCrosscoder, trained on normalised activations; codes are its own.
    - `normalisation`: of what it reads.
    - `output`: of what it writes (None: the same); a cross-layer transcoder needs both.

    It is saved and loaded as any module; `fold` makes a plain crosscoder of it. The skip of a SkipCrosscoder reads and
    writes normalised activations too; `decode` is without it, and it is not folded. Raises ShapeError where a
    normalisation does not fit.

    ```python
    encoder = fx.CrossLayerEncoder(fx.DenseWeight(2, 8, 20), fx.TopK(4))
    crosscoder = fx.Crosscoder(encoder, fx.CrossLayerDecoder(fx.DenseWeight(2, 8, 20)))
    x = torch.randn(100, 2, 8) * torch.tensor([1.0, 30.0]).view(2, 1)
    normalised = fx.Normalised(crosscoder, fx.fit_normalisation([x]))
    torch.testing.assert_close(fx.fold(normalised)(x), normalised(x), rtol=1e-3, atol=1e-3)
    ```
    """

    def __init__(self, crosscoder: nn.Module, normalisation: Normalisation, *, output: Normalisation | None = None):
        super().__init__()
        for part in (normalisation, output):
            if part is not None and not isinstance(part, Normalisation):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TypeError(
                    f"Normalised takes a Normalisation, got {part!r}; make one: Normalisation.of(scale, mean)"
                )
        if isinstance(crosscoder, Normalised):
            raise TypeError(
                "Normalised takes a Crosscoder or a SkipCrosscoder, got Normalised; normalise what it holds"
            )
        inner = crosscoder_in(crosscoder)
        self.crosscoder = cast("Crosscoder", crosscoder)
        self.normalisation = normalisation
        self.output = normalisation if output is None else output
        _check_fit("reads", inner.encoder.weight, self.normalisation, "")
        _check_fit("writes", inner.decoder.weight, self.output, "; give one for what it writes: output=...")

    def __getattr__(self, name: str) -> Any:
        """Says where encoder and decoder are: those inside know normalised activations. Raises AttributeError."""
        if name in ("encoder", "decoder"):
            raise AttributeError(
                f"a Normalised has no {name} in the units of the data; measure or train fx.fold(normalised), or "
                "normalised.crosscoder on normalised activations"
            )
        return super().__getattr__(name)

    def encode(self, x: Tensor, *, layout: torch.layout = torch.strided) -> Tensor:
        """`... layers d_model -> ... latents`: the codes of activations in the units of the data.

        `layout` is that of Crosscoder.encode.
        """
        return self.crosscoder.encode(self.normalisation(x), layout=layout)

    def decode(self, z: Tensor) -> Tensor:
        """`... latents -> ... layers d_model`: in the units of the data; codes dense or torch.sparse_csr"""
        return self.output.inverse(self.crosscoder.decode(z))

    def forward(self, x: Tensor) -> Tensor:
        """`... layers d_model -> ... layers d_model`"""
        return self.output.inverse(self.crosscoder(self.normalisation(x)))

    def within(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """`... layers d_model, ... layers d_model -> `: what the crosscoder reads in training, and is to rebuild.

        Both in normalised units, in which all layers count alike.
        """
        read = self.normalisation(x)
        return read, read if y is x and self.output is self.normalisation else self.output(y)


def _check_fit(verb: str, weight: Weight, normalisation: Normalisation, way_out: str) -> None:
    theirs, ours = (weight.layers, weight.d_model), (normalisation.layers, normalisation.d_model)
    if theirs != ours:
        raise ShapeError(
            f"the crosscoder {verb} layers={theirs[0]}, d_model={theirs[1]}, and the normalisation is made for "
            f"layers={ours[0]}, d_model={ours[1]}{way_out or '; make them equal'}"
        )
