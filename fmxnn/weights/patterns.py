"""The contractions that a weight's pattern stands for, planned once."""

from collections import Counter

from fmxnn.core.contraction import MAX_AXES, MAX_PATTERN, MAX_TERMS, PLANNED_BATCH, Contraction, check_sizes, read_terms
from fmxnn.core.errors import PatternError
from fmxnn.core.excerpt import excerpt

AXES = ("layers", "d_model", "latents")


class Maps:
    """The planned contractions of a pattern; holds no tensors."""

    def __init__(self, terms: tuple[tuple[str, ...], ...], sizes: dict[str, int]):
        carriers = [i for i, term in enumerate(terms) if "latents" in term]
        self.table = carriers[0] if len(carriers) == 1 and len(terms[carriers[0]]) > 1 else None
        rows = [_batched(term) for term in terms]
        self.atoms = _contraction(rows, ("...", "layers", "d_model"), sizes)
        self.gram = _gram(terms, rows, sizes, self.atoms.flops)
        self.small_flops = 0.0
        if self.table is None:
            self.to_latents = _contraction([("...", "layers", "d_model"), *terms], ("...", "latents"), sizes)
            self.to_layers = _contraction([("...", "latents"), *terms], ("...", "layers", "d_model"), sizes)
            return
        small = [term for i, term in enumerate(terms) if i != self.table]
        self.bonds = tuple(word for word in terms[self.table] if word != "latents")
        self.to_bonds = _contraction([("...", "layers", "d_model"), *small], ("...", *self.bonds), sizes)
        self.from_bonds = _contraction([("...", *self.bonds), *small], ("...", "layers", "d_model"), sizes)
        self.small_flops = (self.to_bonds.flops + self.from_bonds.flops) / 2 / PLANNED_BATCH if small else 0.0


def _gram(
    terms: tuple[tuple[str, ...], ...], rows: list[tuple[str, ...]], sizes: dict[str, int], most: int
) -> Contraction | None:
    """The squared norms without the atoms, where that costs less than `most`; none where a pattern cannot hold every term and bond twice."""
    bonds = [word for word in sizes if word not in AXES]
    if 2 * len(terms) > MAX_TERMS or len(sizes) + len(bonds) > MAX_AXES:
        return None
    twins = [_batched(tuple(f"{word}_twin" if word not in AXES else word for word in term)) for term in terms]
    gram = _contraction(rows + twins, ("...", "layers"), sizes | {f"{word}_twin": sizes[word] for word in bonds})
    return gram if gram.flops < most else None


def _batched(term: tuple[str, ...]) -> tuple[str, ...]:
    return ("...", *(word for word in term if word != "latents")) if "latents" in term else term


def _contraction(terms: list[tuple[str, ...]], output: tuple[str, ...], sizes: dict[str, int]) -> Contraction:
    words = {word for term in terms for word in term}
    pattern = ", ".join(" ".join(term) for term in terms) + " -> " + " ".join(output)
    return Contraction(pattern, **{word: size for word, size in sizes.items() if word in words})


def read_weight(pattern: str, sizes: dict[str, int]) -> tuple[tuple[str, ...], ...]:
    """The terms of a weight's pattern. Raises PatternError for a pattern or sizes that make no weight."""
    if len(pattern) > MAX_PATTERN // 5:  # norms are of a pattern that holds each bond twice
        raise PatternError(f"a weight's pattern has at most {MAX_PATTERN // 5:,} characters, got {len(pattern):,}")
    terms = read_terms(pattern)
    words = [word for term in terms for word in term]
    if "..." in words or "->" in pattern:
        raise PatternError(f"a weight's pattern names its factors alone, without '...' or '->', got {excerpt(pattern)}")
    for axis in AXES:
        if axis not in words:
            raise PatternError(
                f"a weight has the axes layers, d_model and latents, and {excerpt(pattern)} has no {axis}"
            )
    check_sizes(pattern, set(words), sizes)
    for word, count in Counter(words).items():
        if word not in AXES and count == 1:
            raise PatternError(
                f"the bond {excerpt(word)} of {excerpt(pattern)} stands in one term only and joins nothing; name it in a second term or drop it"
            )
    return terms
