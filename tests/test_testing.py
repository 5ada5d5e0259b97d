"""The shipped laws: each has a broken weight that it catches, and names the method that is wrong."""

import re
from pathlib import Path

import pytest
import torch
from test_contracts import Slow, Whole

import fmxnn as fx
from fmxnn import CPWeight, DenseWeight, check_weight
from fmxnn.sparse.codes import Codes
from fmxnn.weights import laws


class Mine(Slow):
    """A weight by hand, with one method at a time to spoil."""

    def to_layers(self, z):
        return super().to_layers(z.to_dense() if z.layout == torch.sparse_csr else z)


class Flat(Mine):
    def to_dense(self):
        return super().to_dense().flatten(0, 1)


class Doubled(Mine):
    def to_latents(self, x):
        return 2 * super().to_latents(x)


class DoublyWritten(Mine):
    def to_layers(self, z):
        return 2 * super().to_layers(z)

    def to_dense(self):
        return super().to_dense() / 2


class Turned(Mine):
    def atoms(self, index):
        return super().atoms(index).flip(1)

    def to_dense(self):
        return Mine.atoms(self, slice(None))


class Unsliced(Mine):
    def atoms(self, index):
        return (
            super().atoms(slice(None) if index == slice(1, None) else index)
            if isinstance(index, slice)
            else super().atoms(index)
        )


class NotOne(Mine):
    def atoms(self, index):
        return super().atoms(0 if isinstance(index, int) else index) * (2 if isinstance(index, int) else 1)


class Long(Mine):
    def norms(self):
        return super().norms() + 1


class Narrow(Mine):
    def norms(self):
        return super().norms().float()


class OneAxis(Mine):
    def to_latents(self, x):
        return super().to_latents(x) if x.ndim == 3 else super().to_latents(x) * 2


class TwoAxes(Mine):
    def to_layers(self, z):
        return super().to_layers(z) * (1 if z.ndim < 3 else 2)


class HalfJoined(Mine):
    def to_bonds(self, x):
        return x.flatten(-2)


class Unread(Mine):
    def to_layers(self, z):
        out = super().to_layers(z)
        return out * 2 if z.layout == torch.sparse_csr else out


class Stuck(Mine):
    def to_layers(self, z):
        made = z.to_dense().detach() if z.layout == torch.sparse_csr else z
        return super().to_layers(made) + 0 * self.directions.sum() * z.sum()


class WrongBonds(Whole):
    def to_bonds(self, x):
        return 3 * super().to_bonds(x)


class WrongRows(Whole):
    def from_bonds(self, h):
        return 3 * super().from_bonds(h)


class WideTable(Whole):
    @property
    def table(self):
        return torch.cat([self.directions, self.directions], dim=1)


class FlatBonds(Whole):
    def to_bonds(self, x):
        return super().to_bonds(x) * (1 if x.ndim == 3 else 2)


class FlatRows(Whole):
    def from_bonds(self, h):
        return super().from_bonds(h) * (1 if h.ndim == 2 else 2)


class FrozenTable(Whole):
    @property
    def table(self):
        return self.directions.detach()


class Cheap(Whole):
    small_flops = -1.0


class Plain(Whole):
    small_flops = 0.0


class CopiedRows(Whole):
    def stored_at(self, latents):
        return self.directions.clone(), (latents,)


class OtherRows(Whole):
    def stored_at(self, latents):
        return self.directions, (self.latents - 1 - latents,)


class Twins(Whole):
    """Pairs of latents share a row."""

    @property
    def table(self):
        return self.directions[: (self.latents + 1) // 2].repeat_interleave(2, 0)[: self.latents]

    def to_latents(self, x):
        return self.to_bonds(x) @ self.table.T

    def to_layers(self, z):
        return self.from_bonds(fx.sparse.sum_rows(z, self.table))

    def stored_at(self, latents):
        return self.directions, (latents // 2,)


class Entangled(Whole):
    """Its small map moves with its rows."""

    def _loud(self, x):
        return x * (1 + self.directions.square().sum())

    def to_latents(self, x):
        return self._loud(super().to_latents(x))

    def to_layers(self, z):
        return self._loud(super().to_layers(z))

    def to_bonds(self, x):
        return self._loud(super().to_bonds(x))

    def from_bonds(self, h):
        return self._loud(super().from_bonds(h))


class Silent(Whole):
    def normal_(self, std):
        super().normal_(std)


class Squared(Whole):
    def normal_(self, std):
        return super().normal_(std**2)


class Loud(Whole):
    def normal_(self, std):
        return super().normal_(3 * std)


class Kept(Whole):
    def scale_(self, factor):
        super().scale_(factor)


class Rooted(Whole):
    def scale_(self, factor):
        return super().scale_(factor**0.5)


class OneLayer(Whole):
    def scale_layers_(self, factors):
        super().scale_layers_(factors.mean().expand(self.layers))


class Pair(fx.PartedWeight):
    """Two parts, the first of which knows the first layer alone."""

    def __init__(self, layers, d_model, latents):
        super().__init__()
        self.layers, self.d_model, self.latents = layers, d_model, latents
        self.first = DenseWeight(1, d_model, latents - 2)
        self.rest = DenseWeight(layers, d_model, 2)

    def parts(self):
        return fx.Part(self.first, (0,)), fx.Part(self.rest, tuple(range(self.layers)))

    def made_of(self):
        return self.parts()


class Forgetful(Pair):
    def parts(self):
        return super().parts()[:1]


class Unordered(Pair):
    def parts(self):
        return fx.Part(self.first, (0,)), fx.Part(self.rest, (1, 0))


class Swapped(Pair):
    def made_of(self):
        return fx.Part(self.first, (1,)), *self.parts()[1:]


class RowsTwice(Pair):
    def to_layers(self, z):
        return super().to_layers(z) * (2 if isinstance(z, Codes) else 1)


class Renewed(Mine):
    """Says more of itself than its recipe does."""

    gain = 1.0

    def to_latents(self, x):
        return self.gain * super().to_latents(x)

    def to_layers(self, z):
        return self.gain * super().to_layers(z)


class Grown(Mine):
    """Has a parameter that its constructor does not make."""

    def to_layers(self, z):
        return super().to_layers(z) + 0 * self.extra


def spoiled(cls):
    weight = cls(2, 3, 4).double()
    if cls is Renewed:
        weight.gain = 2.0
    if cls is Grown:
        weight.extra = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
    return weight


BROKEN = {
    Forgetful: "parts() have all latents",
    Unordered: "parts() are at as many layers as their weights have, ascending",
    Flat: "to_dense() is layers d_model latents",
    Doubled: "to_latents(x) = <x, to_dense()>",
    DoublyWritten: "to_layers(z) = <z, to_dense()>",
    Turned: "atoms(i) = to_dense()[..., i]",
    NotOne: "atoms of one latent",
    Unsliced: "atoms(slice) = to_dense()[..., slice]: shape",
    Long: "norms() = norms of to_dense()",
    Narrow: "norms() = norms of to_dense(): dtype",
    OneAxis: "to_latents of one token = its row in to_latents of all",
    TwoAxes: "to_layers with two batch axes = to_layers with one",
    FlatBonds: "to_bonds of one token = its row in to_bonds of all",
    FlatRows: "from_bonds of one token = its row in from_bonds of all",
    HalfJoined: "table, to_bonds and from_bonds stand together",
    WideTable: "table is latents bonds, to_bonds makes bonds",
    WrongBonds: "to_latents(x) = to_bonds(x) @ table.T",
    WrongRows: "to_layers(z) = from_bonds(z @ table)",
    Cheap: "small_flops is 0 or more",
    Unread: "to_layers(csr) = to_layers(dense)",
    Stuck: "gradients of the sparse path = gradients of the dense path",
    RowsTwice: "from_bonds of sums of rows = to_layers(dense)",
    FrozenTable: "gradients of the table's path = gradients of the dense path",
    CopiedRows: "stored_at gives a parameter of the weight",
    OtherRows: "stored_at(latents) = table[latents]",
    Plain: "from_bonds(nearest rows of atoms) = atoms; set small_flops, 0 is for bonds = layers d_model",
    Twins: "writing rows at stored_at changes these rows of the table",
    Entangled: "writing rows at stored_at changes these atoms and no others",
    Silent: "normal_(std) gives the weight itself",
    Squared: "normal_(3 std) = 3 normal_(std)",
    Loud: "normal_(std) draws entries of deviation std",
    Kept: "scale_(factor) gives the weight itself",
    Rooted: "scale_(3) makes to_dense() 3 times as large",
    OneLayer: "scale_layers_(factors) multiplies each layer of to_dense()",
    Swapped: "scale_layers_ of what it is made_of multiplies each layer of to_dense()",
    Grown: "build(describe(weight)) has the same state",
    Renewed: "build(describe(weight)) writes the same",
}


@pytest.mark.parametrize("cls", [Mine, Whole, Pair])
def test_a_weight_of_ones_own_passes(cls):
    check_weight(cls(2, 3, 4).double(), tokens=1)
    check_weight(cls(2, 3, 4).double())


def test_a_factorised_weight_passes_in_float32_too():
    check_weight(CPWeight(2, 3, 4, rank=2).double(), tokens=1)
    check_weight(DenseWeight(2, 3, 4))


@pytest.mark.parametrize("cls", BROKEN, ids=lambda cls: cls.__name__)
def test_a_broken_weight_fails_and_the_law_is_named(cls):
    torch.manual_seed(0)
    with pytest.raises(AssertionError, match=f"^{re.escape(f'the law {BROKEN[cls]!r} does not hold: ')}[^\n]+$"):
        check_weight(spoiled(cls))


def test_no_law_is_without_a_weight_that_it_catches():
    calls = re.findall(r'_(?:equal|same|holds|gives_itself)\(\s*f?"([^"{(]+)', Path(laws.__file__).read_text())
    assert len(calls) > 25
    assert not [law for law in calls if not any(law in known for known in BROKEN.values())]


def test_the_weight_and_the_random_numbers_of_others_stay_as_they_are():
    weight = Whole(2, 3, 4).double()
    before = [value.clone() for value in weight.state_dict().values()]
    check_weight(weight)
    assert all(torch.equal(*pair) for pair in zip(weight.state_dict().values(), before, strict=True))
