"""Random patterns, weights, batches and crosscoders, all in float64."""

import torch
from hypothesis import strategies as st

import fmxnn
from fmxnn import (
    BatchTopK,
    ConcatWeight,
    CPWeight,
    Crosscoder,
    CrossLayerDecoder,
    CrossLayerEncoder,
    DenseWeight,
    EinsumWeight,
    JumpReLU,
    LayerMask,
    PlacedWeight,
    ProjectedWeight,
    Projection,
    RaggedWeight,
    RestrictedWeight,
    SumWeight,
    TensorRingWeight,
    TopK,
)

CLASSES = [cls for cls in vars(fmxnn).values() if isinstance(cls, type) and issubclass(cls, torch.nn.Module)] + [
    torch.nn.ReLU
]
AXES = ("layers", "d_model", "latents")
KNOWN = (
    "latents layers d_model",
    "d_model latents layers",
    "latents r, d_model r, layers r",
    "layers r, r d_model, r latents",
    "latents r2 r3, r1 d_model r2, r3 layers r1",
    "latents r, p q r, d_model q, layers p",
    "latents d_model, latents layers",
    "latents layers r, d_model r",
    "layers r latents, layers d_model r",
    "latents r, latents s, d_model r, layers s, r s",
)
seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(1, 3)
batches = st.lists(st.integers(1, 3), max_size=3).map(tuple)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@st.composite
def patterns(draw):
    """The three axes and up to three bonds, thrown at random on up to four terms; a bond joins two terms or more."""
    count = draw(st.integers(1, 4))
    terms = [[] for _ in range(count)]
    some = st.sets(st.integers(0, count - 1), min_size=1, max_size=2)
    for axis in AXES:
        for i in draw(some):
            terms[i].append(axis)
    if count > 1:
        for bond in draw(st.sets(st.sampled_from(["r", "s", "r3"]))):
            for i in draw(st.sets(st.integers(0, count - 1), min_size=2, max_size=count)):
                terms[i].append(bond)
    for i, term in enumerate(terms):
        terms[i] = draw(st.permutations(term))
    return (
        ", ".join(" ".join(term) for term in terms if term and term != ["latents"])
        if _written(terms)
        else draw(st.sampled_from(KNOWN))
    )


def _written(terms):
    left = [word for term in terms if term and term != ["latents"] for word in term]
    return all(axis in left for axis in AXES)


@st.composite
def factorized(draw, layers=None, d_model=None, latents=None):
    torch.manual_seed(draw(seeds))
    pattern = draw(st.one_of(st.sampled_from(KNOWN), patterns()))
    words = dict.fromkeys(pattern.replace(",", " ").split())
    given = {"layers": layers, "d_model": d_model, "latents": latents}
    return EinsumWeight(pattern, **{word: given.get(word) or draw(sizes) for word in words}).double()


@st.composite
def named(draw, layers=None, d_model=None, latents=None):
    torch.manual_seed(draw(seeds))
    axes = [given or draw(st.integers(1, 4)) for given in (layers, d_model, latents)]
    which = draw(st.sampled_from(["dense", "cp", "cp default", "ring", "ring default"]))
    if which == "dense":
        return DenseWeight(*axes).double()
    if which.startswith("cp"):
        return CPWeight(*axes, rank=draw(sizes) if which == "cp" else None).double()
    return TensorRingWeight(*axes, ranks=(draw(sizes), draw(sizes), draw(sizes)) if which == "ring" else None).double()


@st.composite
def weights(draw, layers=None, d_model=None, latents=None, depth=1):
    """Any weight: a named one, a random pattern, or what is made of others: sum, concatenation, projected, placed,
    restricted, ragged.
    """
    kind = draw(
        st.sampled_from(
            ["factorized", "factorized", "named", "sum", "concat", "projected", "placed", "restricted", "ragged"]
            if depth
            else ["factorized", "named"]
        )
    )
    if kind in ("factorized", "named"):
        return draw((factorized if kind == "factorized" else named)(layers, d_model, latents))
    layers, d_model = layers or draw(sizes), d_model or draw(sizes)
    if kind == "projected":
        latents = latents or draw(sizes)
        rank = draw(st.integers(1, latents))
        return ProjectedWeight(Projection(latents, rank), draw(weights(layers, d_model, rank, depth - 1))).double()
    if kind == "placed":
        at = draw(st.one_of(st.integers(0, layers - 1), st.sets(st.integers(0, layers - 1), min_size=1).map(sorted)))
        here = draw(st.integers(1, layers - at)) if isinstance(at, int) else len(at)
        part = draw(weights(here, draw(st.integers(1, d_model)), latents, depth - 1))
        return PlacedWeight(part, layers=layers, at=at, d_model=d_model)
    if kind == "restricted":
        groups = [
            sorted(draw(st.sets(st.integers(0, layers - 1), min_size=1)))
            for _ in range(draw(st.integers(1, 3)) if latents is None else 1)
        ]
        latents = latents or len(groups) * draw(st.integers(1, 2))
        return RestrictedWeight(
            draw(st.one_of(factorized(layers, d_model, latents), named(layers, d_model, latents))), at=groups
        )
    if kind == "ragged":
        widths = draw(st.permutations([d_model, *(draw(st.integers(1, d_model)) for _ in range(layers - 1))]))
        return RaggedWeight(draw(weights(layers, d_model, latents, depth - 1)), widths=widths)
    if kind == "sum":
        latents = latents or draw(sizes)
        return SumWeight(*(draw(weights(layers, d_model, latents, depth - 1)) for _ in range(draw(st.integers(1, 3)))))
    if latents is None:
        return ConcatWeight(*(draw(weights(layers, d_model, None, depth - 1)) for _ in range(draw(st.integers(1, 3)))))
    cut = draw(st.integers(0, latents - 1))
    parts = [part for part in (cut, latents - cut) if part]
    return ConcatWeight(*(draw(weights(layers, d_model, part, depth - 1)) for part in parts))


@st.composite
def crosscoders(draw):
    """An encoder and a decoder of any weights with the same latents."""
    reader = draw(weights())
    writer = draw(weights(latents=reader.latents))
    k = draw(st.integers(1, reader.latents))
    gate = draw(
        st.sampled_from([TopK(k), BatchTopK(k), BatchTopK(k, decay=0.5), JumpReLU(reader.latents), torch.nn.ReLU()])
    )
    mask = draw(st.sampled_from([None, LayerMask(0.0), LayerMask(0.3)]))
    return Crosscoder(CrossLayerEncoder(reader, gate, mask=mask), CrossLayerDecoder(writer)).double()
