"""What a crosscoder asks of its decoder."""

from typing import Protocol

from torch import Tensor, nn

from fmxnn.weights.factorized import Weight


class Decoder(Protocol):
    """A module with a linear part and a bias, and whatever it adds to them; CrossLayerDecoder adds nothing.

    It is handed tensors. One that takes sparse codes gives `from_codes(z: Codes)` beside `forward`, which is then run in its place.
    """

    @property
    def weight(self) -> Weight:
        """The linear part, which starts, metrics and the auxiliary loss read."""
        ...

    @property
    def bias(self) -> nn.Parameter:
        """`layers d_model`"""
        ...

    def __call__(self, z: Tensor) -> Tensor:
        """`... latents -> ... layers d_model`; codes dense or torch.sparse_csr"""
        ...
