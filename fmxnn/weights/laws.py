"""The laws of weights, shipped, for weights of your own: every fast method does what the slow ones do."""

from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import cast

import torch
from torch import Tensor, nn

from fmxnn.core.outputs import check_gives
from fmxnn.core.recipe import build, describe
from fmxnn.core.sizes import sizes_of
from fmxnn.sparse.codes import to_codes, to_csr
from fmxnn.weights.parted import parts_of, write_codes
from fmxnn.weights.scaling import scale_
from fmxnn.weights.table_rows import as_rowed, nearest_rows, write_rows
from fmxnn.weights.weight import LayerScalable, Scalable, Startable, Tabled, Weight, table_of

_DRAWS, _MOST = 64, 1024


def check_weight(weight: Weight, *, tokens: int = 6, classes: Iterable[type[nn.Module]] = ()) -> None:
    """Raises AssertionError, naming the law and the method, unless `weight` obeys every law of a cross-layer weight.

    Reading, writing, atoms and norms are compared with the dense form, shapes and dtypes included. What else the weight
    gives is compared with these: its table, its rows, its start, its scales and its parts. Sparse codes and their
    gradients are compared with dense ones, and the recipe has to build the same weight again.

    Make the weight small and float64. `classes` are those its recipe needs beside its own. The weight stays as it is.

    ```python
    fx.check_weight(fx.TensorRingWeight(2, 3, 5, ranks=(2, 2, 2)).double())
    ```
    """
    check_gives("check_weight", "a weight", weight, "layers d_model latents to_latents to_layers")
    like, (tokens,) = next(weight.parameters()), sizes_of("check_weight", tokens=tokens)
    x = torch.randn(tokens, weight.layers, weight.d_model, dtype=like.dtype, device=like.device)
    z = torch.randn(tokens, weight.latents, dtype=like.dtype, device=like.device).relu()
    _check_parts(weight)
    _check_maps(weight, x, z)
    _check_batches(weight, x, z)
    _check_table(weight, x, z)
    _check_sparse(weight, x, z)
    _check_rows(weight)
    _check_start(weight)
    _check_scales(weight)
    _check_recipe(weight, classes)


def _check_maps(weight: Weight, x: Tensor, z: Tensor) -> None:
    """What every weight gives, against the dense form."""
    dense, index = weight.to_dense(), torch.randint(weight.latents, (3,), device=x.device)
    sizes = weight.layers, weight.d_model, weight.latents
    _same("to_dense() is layers d_model latents", tuple(dense.shape), sizes)
    _equal("to_latents(x) = <x, to_dense()>", weight.to_latents(x), torch.einsum("tld,ldn->tn", x, dense))
    _equal("to_layers(z) = <z, to_dense()>", weight.to_layers(z), torch.einsum("tn,ldn->tld", z, dense))
    _equal("atoms(i) = to_dense()[..., i]", weight.atoms(index), dense[..., index])
    _equal("atoms of one latent", weight.atoms(0), dense[..., 0])
    _equal("atoms(slice) = to_dense()[..., slice]", weight.atoms(slice(1, None)), dense[..., 1:])
    _equal("norms() = norms of to_dense()", weight.norms(), dense.norm(dim=1))


def _check_batches(weight: Weight, x: Tensor, z: Tensor) -> None:
    """Any number of batch axes, none among them."""
    maps: list[tuple[str, Callable[[Tensor], Tensor], Tensor]] = [
        ("to_latents", weight.to_latents, x),
        ("to_layers", weight.to_layers, z),
    ]
    if isinstance(weight, Tabled) and weight.table is not None:
        maps += [("to_bonds", weight.to_bonds, x), ("from_bonds", weight.from_bonds, weight.to_bonds(x).detach())]
    for name, run, given in maps:
        _equal(f"{name} of one token = its row in {name} of all", run(given[0]), run(given)[0])
        _equal(f"{name} with two batch axes = {name} with one", run(given[:, None]), run(given)[:, None])


def _check_table(weight: Weight, x: Tensor, z: Tensor) -> None:
    """Of a weight with a table: that reading and writing at it are reading and writing."""
    fast = ("table", "to_bonds", "from_bonds")
    given = [name for name in fast if hasattr(weight, name)]
    _holds("table, to_bonds and from_bonds stand together", len(given) in (0, 3), f"got {' and '.join(given)} alone")
    if not isinstance(weight, Tabled) or weight.table is None:
        return
    table = cast("Tensor", weight.table)
    bonds = weight.to_bonds(x).shape[-1]
    _same("table is latents bonds, to_bonds makes bonds", tuple(table.shape), (weight.latents, bonds))
    _equal("to_latents(x) = to_bonds(x) @ table.T", weight.to_bonds(x) @ table.T, weight.to_latents(x))
    _equal("to_layers(z) = from_bonds(z @ table)", weight.from_bonds(z @ table), weight.to_layers(z))
    _holds("small_flops is 0 or more", weight.small_flops >= 0, f"got {weight.small_flops}")


def _check_sparse(weight: Weight, x: Tensor, z: Tensor) -> None:
    """Codes in compressed rows, and their gradients, against dense ones."""
    _equal("to_layers(csr) = to_layers(dense)", weight.to_layers(to_csr(z)), weight.to_layers(z))
    expected = _gradients(weight, weight.to_layers, x, z)
    ways: dict[str, Callable[[Tensor], Tensor]] = {"sparse": lambda z: weight.to_layers(to_csr(z))}
    if table_of(weight) is not None:
        ways["table's"] = lambda z: write_codes(weight, to_codes(to_csr(z)))
        _equal("from_bonds of sums of rows = to_layers(dense)", ways["table's"](z), weight.to_layers(z))
    for name, write in ways.items():
        for got, wanted in zip(_gradients(weight, write, x, z), expected, strict=True):
            _equal(f"gradients of the {name} path = gradients of the dense path", got, wanted)


def _gradients(weight: Weight, write: Callable[[Tensor], Tensor], x: Tensor, z: Tensor) -> list[Tensor]:
    z = z.clone().requires_grad_()
    loss = (write(z) - x).pow(2).sum()
    on_codes, *on_weight = torch.autograd.grad(loss, [z, *weight.parameters()], materialize_grads=True)
    return [on_codes * (z > 0), *on_weight]  # a code that is not stored has no gradient


@torch.no_grad()
def _check_rows(weight: Weight) -> None:
    """Of a weight whose rows are stored somewhere: that they are found, and written without a trace elsewhere."""
    copy = deepcopy(weight)
    if (rowed := as_rowed(copy)) is None:
        return
    table, dense = cast("Tensor", rowed.table).clone(), copy.to_dense().clone()
    latents = torch.randperm(copy.latents)[: (copy.latents + 1) // 2].to(table.device)
    parameter, index = rowed.stored_at(latents)
    mine = any(parameter is own for own in copy.parameters())
    _holds("stored_at gives a parameter of the weight", mine, "got another tensor, so what is written there is lost")
    _equal("stored_at(latents) = table[latents]", parameter[index].reshape(len(latents), -1), table[latents])
    atoms = dense[..., latents].movedim(-1, 0)
    found = rowed.from_bonds(nearest_rows(rowed, atoms))
    _equal("from_bonds(nearest rows of atoms) = atoms; set small_flops, 0 is for bonds = layers d_model", found, atoms)
    rows = torch.randn_like(table[latents])
    write_rows(rowed, latents, rows)
    table[latents] = rows
    _equal("writing rows at stored_at changes these rows of the table", cast("Tensor", rowed.table), table)
    dense[..., latents] = rowed.from_bonds(rows).movedim(0, -1)
    _equal("writing rows at stored_at changes these atoms and no others", copy.to_dense(), dense)


@torch.no_grad()
def _check_start(weight: Weight) -> None:
    """Of a weight that can be drawn: that its entries have the deviation asked for, on average over many draws."""
    if not isinstance(weight, Startable):
        return
    copy = deepcopy(weight)
    device = next(copy.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # the same draws at every call
        torch.manual_seed(0)
        _gives_itself("normal_(std)", copy, copy.normal_(0.5))
        first = copy.to_dense().clone()
        torch.manual_seed(0)
        copy.normal_(1.5)
        _equal("normal_(3 std) = 3 normal_(std)", copy.to_dense(), 3 * first)
        square, there, ratio = torch.zeros_like(first), first != 0, 0.0
        for number in range(1, _MOST + 1):  # a product of Gaussians has a long tail: the more draws, the nearer
            square += copy.to_dense().square()
            ratio = (square[there].mean() / number).sqrt().item() / 1.5
            if number >= _DRAWS and 0.8 < ratio < 1.25:
                break
            copy.normal_(1.5)
    _holds("normal_(std) draws entries of deviation std", 0.5 < ratio < 2, f"got {ratio:.2g} std")


@torch.no_grad()
def _check_scales(weight: Weight) -> None:
    """Of a weight that can be scaled, whole or layer by layer: that it is."""
    dense = weight.to_dense()
    if isinstance(weight, Scalable):
        copy = deepcopy(weight)
        _gives_itself("scale_(factor)", copy, copy.scale_(3.0))
        _equal("scale_(3) makes to_dense() 3 times as large", copy.to_dense(), 3 * dense)
    itself = isinstance(weight, LayerScalable)
    if itself or weight.made_of():
        copy, factors = deepcopy(weight), torch.rand(weight.layers, dtype=dense.dtype, device=dense.device) + 0.5
        scale_((copy,), factors)
        name = "scale_layers_(factors)" if itself else "scale_layers_ of what it is made_of"
        _equal(f"{name} multiplies each layer of to_dense()", copy.to_dense(), dense * factors[:, None, None])


def _check_parts(weight: Weight) -> None:
    """Of a weight in parts: that these have its latents and fit into its layers."""
    parts = parts_of(weight)
    _same("parts() have all latents", sum(part.weight.latents for part in parts), weight.latents)
    for part in parts:
        fits = len(part.at) == part.weight.layers and list(part.at) == sorted(set(part.at) & set(range(weight.layers)))
        _holds("parts() are at as many layers as their weights have, ascending", fits, f"got at={part.at}")


@torch.no_grad()
def _check_recipe(weight: Weight, classes: Iterable[type[nn.Module]]) -> None:
    """That a saved weight comes back."""
    again, state = build(describe(weight), [*map(type, weight.modules()), *classes]), weight.state_dict()
    shapes = [{name: tuple(tensor.shape) for name, tensor in found.items()} for found in (again.state_dict(), state)]
    _same("build(describe(weight)) has the same state", *shapes)
    like = next(weight.parameters())
    again.to(like.device, like.dtype).load_state_dict(state)
    _equal("build(describe(weight)) writes the same", cast("Weight", again).to_dense(), weight.to_dense())


def _holds(law: str, is_so: bool, got: str) -> None:
    if not is_so:
        raise AssertionError(f"the law {law!r} does not hold: {got}")


def _same(law: str, got: object, expected: object) -> None:
    _holds(law, got == expected, f"expected {expected!r:.200}, got {got!r:.200}")


def _gives_itself(method: str, weight: object, given: object) -> None:
    _holds(f"{method} gives the weight itself", given is weight, f"got {type(given).__name__}")


def _equal(law: str, got: Tensor, expected: Tensor) -> None:
    _same(f"{law}: shape", tuple(got.shape), tuple(expected.shape))
    _same(f"{law}: dtype", got.dtype, expected.dtype)

    def said(_: str) -> str:
        error = (got - expected).abs().max().item()
        return f"the law {law!r} does not hold: off by up to {error:.3g}, where values reach {expected.abs().max():.3g}"

    torch.testing.assert_close(got, expected, msg=said)
