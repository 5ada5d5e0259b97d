"""The laws of weights, shipped, for weights of your own."""

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor

from fmxnn.core.recipe import build, describe
from fmxnn.sparse.codes import to_csr
from fmxnn.weights.weight import Tabled, Weight


def check_weight(weight: Weight, *, tokens: int = 6, classes: Iterable[type[torch.nn.Module]] = ()) -> None:
    """Raises AssertionError, naming the law, unless `weight` obeys every law of a cross-layer weight.

    Reading, writing, atoms and norms agree with the dense form; writing is the adjoint of reading; what a weight reads
    and writes at its table, where it has one, is what it reads and writes; sparse codes and their gradients agree with
    dense ones; the recipe builds a weight of the same state. Make the weight small and float64. `classes` are those its recipe needs beside its own.
    """
    like = next(weight.parameters())
    x = torch.randn(tokens, weight.layers, weight.d_model, dtype=like.dtype, device=like.device)
    z = torch.randn(tokens, weight.latents, dtype=like.dtype, device=like.device).relu()
    dense = weight.to_dense()
    index = torch.randint(weight.latents, (3,), device=like.device)
    _equal(
        "to_dense() is layers d_model latents",
        torch.tensor(dense.shape),
        torch.tensor([weight.layers, weight.d_model, weight.latents]),
    )
    _equal("to_latents(x) = <x, to_dense()>", weight.to_latents(x), torch.einsum("tld,ldn->tn", x, dense))
    _equal("to_layers(z) = <z, to_dense()>", weight.to_layers(z), torch.einsum("tn,ldn->tld", z, dense))
    _equal("<to_latents(x), z> = <x, to_layers(z)>", (weight.to_latents(x) * z).sum(), (x * weight.to_layers(z)).sum())
    _equal("atoms(i) = to_dense()[..., i]", weight.atoms(index), dense[..., index])
    _equal("atoms of one latent", weight.atoms(0), dense[..., 0])
    _equal("norms() = norms of to_dense()", weight.norms(), dense.norm(dim=1))
    _check_table(weight, x, z)
    _equal("to_layers(csr) = to_layers(dense)", weight.to_layers(to_csr(z)), weight.to_layers(z))
    for sparse, full in zip(
        _gradients(weight, to_csr, x, z), _gradients(weight, torch.Tensor.clone, x, z), strict=True
    ):
        _equal("gradients of the sparse path = gradients of the dense path", sparse, full)
    again = build(describe(weight), [type(weight), *classes])
    same = {name: tensor.shape for name, tensor in again.state_dict().items()} == {
        name: tensor.shape for name, tensor in weight.state_dict().items()
    }
    _equal("build(describe(weight)) has the same state", torch.tensor(same), torch.tensor(True))


def _check_table(weight: Weight, x: Tensor, z: Tensor) -> None:
    """Of a weight with a table: that reading and writing at it are reading and writing."""
    table = weight.table if isinstance(weight, Tabled) else None
    if table is None or not isinstance(weight, Tabled):
        return
    _equal("to_latents(x) = to_bonds(x) @ table.T", weight.to_bonds(x) @ cast("Tensor", table).T, weight.to_latents(x))
    _equal("to_layers(z) = from_bonds(z @ table)", weight.from_bonds(z @ cast("Tensor", table)), weight.to_layers(z))


def _gradients(weight: Weight, form: object, x: Tensor, z: Tensor) -> list[Tensor]:
    z = z.clone().requires_grad_()
    codes = to_csr(z) if form is to_csr else z.clone()
    loss = (weight.to_layers(codes) - x).pow(2).sum()
    on_codes, *on_weight = torch.autograd.grad(loss, [z, *weight.parameters()])
    return [on_codes * (z > 0), *on_weight]  # a code that is not stored has no gradient


def _equal(law: str, got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, msg=lambda text: f"the law {law!r} does not hold: {text}")
