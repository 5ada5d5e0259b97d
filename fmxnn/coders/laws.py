"""The laws of decoders, shipped, for decoders of your own."""

from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import cast

import torch
from torch import Tensor, nn

from fmxnn.coders.decoder import CodesWriter, Decoder, each_prefix, why_not_written, written_prefixes
from fmxnn.core.outputs import check_gives
from fmxnn.core.recipe import build, describe
from fmxnn.sparse.codes import to_codes, to_csr


def check_decoder(decoder: Decoder, *, tokens: int = 6, classes: Iterable[type[nn.Module]] = ()) -> None:
    """Raises AssertionError, naming the law and so the method, unless `decoder` obeys every law of a decoder.

    It writes `layers d_model` for any batch axes, its bias where no latent is active, and the same from
    torch.sparse_csr codes. Of what it gives beside `forward`, `from_codes` writes the same with the same gradients, and
    `write_prefixes` in eval mode what the first latents alone write. The recipe builds a decoder of the same state.

    Make the decoder small and float64. `classes` are those its recipe needs beside its own.

    ```python
    fx.check_decoder(fx.CrossLayerDecoder(fx.DenseWeight(2, 3, 5)))
    ```
    """
    check_gives("check_decoder", "a decoder", decoder, "weight bias")
    check_gives("check_decoder", "a decoder with a weight", decoder.weight, "layers d_model latents to_layers")
    decoder = deepcopy(decoder)
    weight, bias, module = decoder.weight, decoder.bias, cast("nn.Module", decoder)
    nn.init.normal_(bias)  # a bias of zeros would not be missed
    z = torch.randn(tokens, weight.latents, dtype=bias.dtype, device=bias.device).relu()
    layers = weight.layers, weight.d_model
    _equal("bias is layers d_model", torch.tensor(bias.shape), torch.tensor(layers))
    x_hat = decoder(z)
    _equal("forward(z) is tokens layers d_model", torch.tensor(x_hat.shape), torch.tensor((tokens, *layers)))
    _equal("forward(z) is the same whatever batch axes z has", decoder(z.unsqueeze(0))[0], x_hat)
    _equal("forward(0) = bias", decoder(torch.zeros_like(z)), bias.expand_as(x_hat))
    _equal("forward(csr) = forward(dense)", decoder(to_csr(z)), x_hat)
    if isinstance(decoder, CodesWriter) and not why_not_written(decoder):
        _check_codes(decoder, decoder, z)
    _check_prefixes(decoder, z)
    again = build(describe(module), [type(part) for part in module.modules()] + list(classes))
    mine, theirs = ({key: value.shape for key, value in each.state_dict().items()} for each in (module, again))
    _equal("build(describe(decoder)) has the same state", torch.tensor(mine == theirs), torch.tensor(True))


def _check_codes(decoder: Decoder, writer: CodesWriter, z: Tensor) -> None:
    """`from_codes` against `forward`, with the gradients of codes and parameters."""
    _equal("from_codes(codes) = forward(z)", writer.from_codes(to_codes(to_csr(z))), decoder(z))
    names = ["the codes", *(name for name, _ in cast("nn.Module", decoder).named_parameters())]
    fast = _gradients(decoder, lambda given: writer.from_codes(to_codes(to_csr(given))), z)
    for name, ours, theirs in zip(names, fast, _gradients(decoder, decoder, z), strict=True):
        _equal(f"the gradient of from_codes in {name} = that of forward", ours, theirs)


def _check_prefixes(decoder: Decoder, z: Tensor) -> None:
    module = cast("nn.Module", decoder)
    training, stops = module.training, [1, max(2, z.shape[-1] // 2), z.shape[-1]]
    stops = sorted({min(stop, z.shape[-1]) for stop in stops})
    module.eval()
    try:
        for codes in (z, to_csr(z), to_codes(to_csr(z))):
            found = [x_hat.view(-1, *x_hat.shape[-2:]) for x_hat in written_prefixes(decoder, codes, stops)]
            for stop, ours, theirs in zip(stops, found, each_prefix(decoder, z, stops), strict=True):
                _equal(f"write_prefixes(z, stops) = forward of the first {stop} latents", ours, theirs)
    finally:
        module.train(training)


def _gradients(decoder: Decoder, write: Callable[[Tensor], Tensor], z: Tensor) -> list[Tensor]:
    parameters, given = list(cast("nn.Module", decoder).parameters()), z.clone().requires_grad_()
    x_hat = write(given)
    weights = torch.linspace(1, 2, x_hat.numel(), dtype=x_hat.dtype, device=x_hat.device).view_as(x_hat)
    found = torch.autograd.grad(
        (x_hat * weights).sum(), [given, *parameters], allow_unused=True, materialize_grads=True
    )
    return [found[0] * (z > 0), *found[1:]]  # a code that is not stored has no gradient


def _equal(law: str, got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, msg=lambda text: f"the law {law!r} does not hold: {text}")
