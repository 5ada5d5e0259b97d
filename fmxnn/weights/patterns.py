"""The contractions that a weight's pattern stands for, planned once."""

from collections import Counter
from math import prod

from fmxnn.core.contraction import MAX_AXES, MAX_PATTERN, MAX_TERMS, PLANNED_BATCH, Contraction, check_sizes, read_terms
from fmxnn.core.errors import PatternError
from fmxnn.core.excerpt import excerpt

AXES = ("layers", "d_model", "latents")
READS = "layers d_model"
"""The axes of the activations, where a weight does not name others."""

Terms = tuple[tuple[str, ...], ...]


class Maps:
    """The planned contractions of a pattern over activations of the axes `reads`; holds no tensors."""

    def __init__(self, terms: Terms, sizes: dict[str, int], reads: tuple[str, ...] = AXES[:2]):
        axes, rows = (*reads, "latents"), [_batched(term) for term in terms]
        self.table = _table(terms)
        self.atoms = _contraction(rows, ("...", *reads), sizes)
        self.gram = _gram(rows, axes, sizes, self.atoms.flops)
        self.small_flops = 0.0
        if self.table is None:
            self.to_latents = _contraction([("...", *reads), *terms], ("...", "latents"), sizes)
            self.to_layers = _contraction([("...", "latents"), *terms], ("...", *reads), sizes)
            return
        small = [term for i, term in enumerate(terms) if i != self.table]
        self.bonds = tuple(word for word in terms[self.table] if word != "latents")
        self.to_bonds = _contraction([("...", *reads), *small], ("...", *self.bonds), sizes)
        self.from_bonds = _contraction([("...", *self.bonds), *small], ("...", *reads), sizes)
        self.small_flops = (self.to_bonds.flops + self.from_bonds.flops) / 2 / PLANNED_BATCH if small else 0.0


class LayerMaps:
    """The same of one layer, whose slices of the factors have no axis `layers`.

    A term of `layers` alone keeps it, of size 1.
    """

    def __init__(self, terms: Terms, sizes: dict[str, int], reads: tuple[str, ...] = AXES[:2]):
        sizes, inner = sizes | {"layers": 1}, reads[1:]
        self.terms = terms = tuple(tuple(word for word in term if word != "layers") or term for term in terms)
        self.table = _table(terms)
        self.atoms = _contraction([_batched(term) for term in terms], ("...", *inner), sizes)
        self.to_layers = _contraction([("...", "latents"), *terms], ("...", *inner), sizes)
        self.dense_flops = self.atoms.flops * sizes["latents"] / PLANNED_BATCH
        matrix = 2.0 * sizes["latents"] * prod(sizes[word] for word in inner)
        if self.table is None:
            self.to_latents = _contraction([("...", *inner), *terms], ("...", "latents"), sizes)
            self.saved = self.to_latents.flops / PLANNED_BATCH - matrix
            return
        self.bonds = tuple(word for word in terms[self.table] if word != "latents")
        small = [term for i, term in enumerate(terms) if i != self.table]
        self.to_bonds = _contraction([("...", *inner), *small], ("...", *self.bonds), sizes)
        self.from_bonds = _contraction([("...", *self.bonds), *small], ("...", *inner), sizes)
        at_table = 2.0 * sizes["latents"] * prod(sizes[word] for word in self.bonds)
        self.saved = (self.to_bonds.flops if small else 0.0) / PLANNED_BATCH + at_table - matrix

    def is_denser(self, tokens: int) -> bool:
        """Whether the matrix, multiplied out and read by so many tokens, takes fewer FLOP than the factors do."""
        return self.dense_flops < tokens * self.saved


def _table(terms: Terms) -> int | None:
    """Which term is the table, if `latents` stands in one alone and not by itself."""
    carriers = [i for i, term in enumerate(terms) if "latents" in term]
    return carriers[0] if len(carriers) == 1 and len(terms[carriers[0]]) > 1 else None


def _gram(rows: list[tuple[str, ...]], axes: tuple[str, ...], sizes: dict[str, int], most: int) -> Contraction | None:
    """The squared norms without the atoms, where that costs less than `most` and a pattern holds every bond twice."""
    bonds = [word for word in sizes if word not in axes]
    if 2 * len(rows) > MAX_TERMS or len(sizes) + len(bonds) > MAX_AXES:
        return None
    twins = [tuple(f"{word}_twin" if word in bonds else word for word in row) for row in rows]
    gram = _contraction(rows + twins, ("...", "layers"), sizes | {f"{word}_twin": sizes[word] for word in bonds})
    return gram if gram.flops < most else None


def _batched(term: tuple[str, ...]) -> tuple[str, ...]:
    return ("...", *(word for word in term if word != "latents")) if "latents" in term else term


def _contraction(terms: list[tuple[str, ...]], output: tuple[str, ...], sizes: dict[str, int]) -> Contraction:
    words = {word for term in terms for word in term}
    pattern = ", ".join(" ".join(term) for term in terms) + " -> " + " ".join(output)
    return Contraction(pattern, **{word: size for word, size in sizes.items() if word in words})


def read_axes(reads: str) -> tuple[str, ...]:
    """The axes of the activations: `layers` and then at least one other. Raises PatternError."""
    terms = read_terms(reads)
    words = terms[0]
    if len(terms) > 1 or words[0] != "layers" or len(words) < 2 or {"latents", "..."} & {*words}:
        raise PatternError(
            f"reads names the axes of the activations, layers first and one or more after it, got {excerpt(reads)}; "
            "write 'layers positions d_model'"
        )
    return words


def read_weight(pattern: str, sizes: dict[str, int], reads: tuple[str, ...] = AXES[:2]) -> Terms:
    """The terms of a weight's pattern. Raises PatternError for a pattern or sizes that make no weight."""
    if len(pattern) > MAX_PATTERN // 5:  # norms are of a pattern that holds each bond twice
        raise PatternError(f"a weight's pattern has at most {MAX_PATTERN // 5:,} characters, got {len(pattern):,}")
    terms = read_terms(pattern)
    words, axes = [word for term in terms for word in term], (*reads, "latents")
    if "..." in words or "->" in pattern:
        raise PatternError(f"a weight's pattern names its factors alone, without '...' or '->', got {excerpt(pattern)}")
    for axis in axes:
        if axis not in words:
            named = f"{', '.join(axes[:-1])} and latents"
            raise PatternError(f"a weight has the axes {named}, and {excerpt(pattern)} has no {excerpt(axis)[1:-1]}")
    check_sizes(pattern, set(words), sizes)
    for word, count in Counter(words).items():
        if word not in axes and count == 1:
            raise PatternError(
                f"the bond {excerpt(word)} of {excerpt(pattern)} stands in one term only and joins nothing; "
                "name it in a second term or drop it"
            )
    return terms
