"""PolySAE: SAELens files whose decoder adds products of projections of the codes."""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from fmxnn.coders.crosscoder import Crosscoder
from fmxnn.coders.multilinear import MultilinearDecoder, ProductTerm
from fmxnn.coders.polynomial import NonlinearDecoder, PolynomialDecoder, PowerTerm
from fmxnn.core.errors import FormatError
from fmxnn.core.kinds import is_list
from fmxnn.saving.formats.dense import rows
from fmxnn.saving.formats.format import Format, Options, Reading, allocate, peek, setting, settings
from fmxnn.saving.formats.one_layer import dictionary
from fmxnn.saving.formats.saelens import (
    CONFIG,
    WEIGHTS,
    architecture_of,
    fill_encoder,
    gate_of,
    in_units_of_the_data,
    input_scale,
    is_poly,
    is_rescaled,
    layout,
    scale_latents,
    stated,
)
from fmxnn.saving.formats.tensors import Tensors
from fmxnn.weights.factorized import DenseWeight
from fmxnn.weights.projected import ProjectedWeight, Projection

ARCHITECTURES = ("poly_topk", "poly_jumprelu", "topk", "jumprelu", "standard")
TRAINED = {"aux_loss_coefficient", "decoder_init_norm"}
"""Settings that its class for training writes and its class for use does not have."""
_STARTS = {2: -0.5, 3: 0.5}
_BLOCK = 256


def _recognises(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file() and is_poly(peek(folder / CONFIG))


def _read(folder: Path, options: Options) -> Reading:
    config = folder / CONFIG
    said = settings(config)
    architecture = architecture_of(said, config, ARCHITECTURES)
    order: int = setting(said, "poly_order", int, config)
    if not 1 <= order <= 3:
        raise FormatError(f"{config} says poly_order={order}, and known are 1, 2 and 3")
    shared: bool = setting(said, "shared_u", bool, config)
    tensors = Tensors(folder / WEIGHTS)
    rescaled = is_rescaled(said, architecture)
    needed, optional = _layouts(architecture, order, shared=shared, rescaled=rescaled)
    sizes = tensors.check(needed, optional=optional, sizes=stated(said) | _ranks(said))
    _check_ranks(sizes, order, folder)
    scale = input_scale(said, config, options)
    gate = gate_of(architecture, said, config, sizes["latents"])
    make = _powers if shared and order > 1 else _products
    module = allocate(
        lambda: dictionary(gate, sizes, make(sizes, order)), tensors.fitting_dtype(options), options.device
    )
    _fill_decoder(module, tensors, shared=shared)
    fill_encoder(module, tensors)
    if rescaled:
        _take_in_norms(module, tensors, trained=not TRAINED.isdisjoint(said))
    return in_units_of_the_data(module, tensors, said, scale, ["decoder norms"] if rescaled else [])


def _layouts(architecture: str, order: int, *, shared: bool, rescaled: bool) -> tuple[dict[str, str], dict[str, str]]:
    """What is read, and what may stand there unread: W_dec, which decodes nothing, and empty places of the other mode
    and of higher orders.

    Codes that are chosen by norms take those of W_dec all the same.
    """
    every = (
        {f"U{i}": f"latents r{i}" for i in (1, 2, 3)}
        | {f"C{i}": f"d_model r{i}" for i in (1, 2, 3)}
        | {"lambda2": "", "lambda3": ""}
    )
    read = {key: words for key, words in every.items() if int(key[-1]) <= order and not (shared and key[0] == "U")}
    encoder = layout(architecture)
    needed = {key: words for key, words in encoder.items() if rescaled or key != "W_dec"} | read
    if shared:
        needed["U_shared"] = "latents r1"
    unread = {key: words for key, words in (every | {"W_dec": encoder["W_dec"]}).items() if key not in needed}
    return needed, unread


def _ranks(said: Mapping[str, Any]) -> dict[str, int]:
    given = said.get("poly_ranks") or [said.get("poly_rank")] * 3
    return {f"r{i}": rank for i, rank in enumerate(given, 1) if isinstance(rank, int)} if is_list(given) else {}


def _check_ranks(sizes: Mapping[str, int], order: int, folder: Path) -> None:
    ranks = [sizes[f"r{i}"] for i in range(1, order + 1)]
    if ranks != sorted(ranks, reverse=True) or ranks[0] > sizes["latents"]:
        raise FormatError(
            f"{folder} has the ranks {ranks}, expected none above the one before it and none above "
            f"latents={sizes['latents']}"
        )


def _projected(sizes: Mapping[str, int]) -> ProjectedWeight:
    return ProjectedWeight(Projection(sizes["latents"], sizes["r1"]), DenseWeight(1, sizes["d_model"], sizes["r1"]))


def _powers(sizes: Mapping[str, int], order: int) -> PolynomialDecoder:
    linear = _projected(sizes)
    weights = {degree: DenseWeight(1, sizes["d_model"], sizes[f"r{degree}"]) for degree in range(2, order + 1)}
    terms = [PowerTerm(weight, degree=degree, start=_STARTS[degree]) for degree, weight in weights.items()]
    return PolynomialDecoder(*terms, weight=linear, projection=linear.projection)


def _products(sizes: Mapping[str, int], order: int) -> MultilinearDecoder:
    linear = _projected(sizes)
    projections = [
        linear.projection,
        *(Projection(sizes["latents"], sizes[f"r{degree}"]) for degree in range(2, order + 1)),
    ]
    weights = {degree: DenseWeight(1, sizes["d_model"], sizes[f"r{degree}"]) for degree in range(2, order + 1)}
    terms = [
        ProductTerm(*projections[:degree], weight=weight, start=_STARTS[degree]) for degree, weight in weights.items()
    ]
    return MultilinearDecoder(*terms, weight=linear)


@torch.no_grad()
def _fill_decoder(module: Crosscoder, tensors: Tensors, *, shared: bool) -> None:
    decoder = cast("PolynomialDecoder | MultilinearDecoder", module.decoder)
    linear = cast("ProjectedWeight", decoder.weight)
    tensors.fill(linear.projection.table, "U_shared" if shared else "U1")
    tensors.fill(rows(linear.weight)[:, 0].T, "C1")
    for degree, term in enumerate(cast("list[PowerTerm | ProductTerm]", list(decoder.terms)), 2):
        tensors.fill(rows(term.weight)[:, 0].T, f"C{degree}")
        tensors.fill(term.coefficient, f"lambda{degree}")
        if isinstance(term, ProductTerm):
            tensors.fill(cast("Projection", term.projections[-1]).table, f"U{degree}")


@torch.no_grad()
def _norms(decoder: NonlinearDecoder) -> Tensor:
    """`-> latents`: the length of what each latent writes alone, at one, all terms included; a block of latents at a
    time.
    """
    wide = deepcopy(decoder).double()
    wide.bias.zero_()
    latents = wide.weight.latents
    blocks = torch.eye(latents, dtype=torch.float64, device=wide.bias.device).split(_BLOCK)
    return torch.cat([wide(block)[:, 0].norm(dim=-1) for block in blocks])


@torch.no_grad()
def _take_in_norms(module: Crosscoder, tensors: Tensors, *, trained: bool) -> None:
    """Codes are chosen and shown in units of norms, and divided by them before they are projected: in training those of
    all that a latent writes, in use those of W_dec. On the meta device they are not read.
    """
    decoder, bias = cast("NonlinearDecoder", module.decoder), module.encoder.bias
    if bias.is_meta:
        return
    norms = (_norms(decoder) if trained else tensors.read("W_dec").double().norm(dim=-1)).to(bias)
    scale_latents(module, norms)
    for part in decoder.modules():
        if isinstance(part, Projection):
            part.table.div_(norms.where(norms > 0, 1.0).unsqueeze(-1))


POLYSAE = Format("polysae", f"{CONFIG} with poly_order, with {WEIGHTS}", _recognises, _read)
