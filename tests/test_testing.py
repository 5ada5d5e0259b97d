import re

import pytest
import torch

from fmxnn import CPWeight, DenseWeight, Weight, check_weight


class Mine(Weight):
    """A dense weight by hand, with one method at a time to spoil."""

    def __init__(self, latents: int):
        super().__init__()
        self.layers, self.d_model, self.latents = 2, 3, latents
        self.weight = torch.nn.Parameter(torch.randn(2, 3, latents, dtype=torch.float64))

    def to_latents(self, x):
        return torch.einsum("...ld,ldn->...n", x, self.weight)

    def to_layers(self, z):
        return torch.einsum("...n,ldn->...ld", z.to_dense() if z.layout == torch.sparse_csr else z, self.weight)


class Doubled(Mine):
    def to_latents(self, x):
        return 2 * super().to_latents(x)


class Turned(Mine):
    def atoms(self, index):
        return super().atoms(index).flip(1)

    def to_dense(self):
        return Mine.atoms(self, slice(None))


class Long(Mine):
    def norms(self):
        return super().norms() + 1


class Stuck(Mine):
    def to_layers(self, z):
        return (
            super().to_layers(z.to_dense().detach() if z.layout == torch.sparse_csr else z)
            + 0 * self.weight.sum() * z.sum()
        )


class Unread(Mine):
    def to_layers(self, z):
        out = super().to_layers(z)
        return out * 2 if z.layout == torch.sparse_csr else out


def test_a_weight_of_ones_own_passes():
    check_weight(Mine(4))
    check_weight(CPWeight(2, 3, 4, rank=2).double(), tokens=1)


@pytest.mark.parametrize(
    ("weight", "law"),
    [
        (Doubled(4), "to_latents(x) = <x, to_dense()>"),
        (Turned(4), "atoms(i) = to_dense()[..., i]"),
        (Long(4), "norms() = norms of to_dense()"),
        (Unread(4), "to_layers(csr) = to_layers(dense)"),
        (Stuck(4), "gradients of the sparse path = gradients of the dense path"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_broken_weight_fails_and_the_law_is_named(weight, law):
    with pytest.raises(AssertionError, match=f"^{re.escape(f'the law {law!r} does not hold: ')}"):
        check_weight(weight)


def test_a_constructor_that_takes_another_size_fails():
    weight = Mine(4)
    weight.weight = torch.nn.Parameter(torch.randn(2, 3, 4, 1, dtype=torch.float64)[..., 0])
    weight.extra = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
    weight.to_layers = lambda z: Mine.to_layers(weight, z) + 0 * weight.extra
    with pytest.raises(
        AssertionError, match=re.escape("the law 'build(describe(weight)) has the same state' does not hold: ")
    ):
        check_weight(weight)


def test_a_dense_weight_in_float32_passes_too():
    check_weight(DenseWeight(2, 3, 4))
