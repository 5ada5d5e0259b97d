"""How the steps of an Einstein sum are written so that their products read what lies in memory as it lies there."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from math import prod
from operator import itemgetter
from string import ascii_letters
from typing import NamedTuple

Term = tuple[str, ...]
Pair = tuple[tuple[int, ...], Term]
BATCH = "..."
_SEARCHED = 3
"""So many steps are searched together; of more, each takes what is best for itself."""


class Step(NamedTuple):
    """The places of the operands among those still waiting, the equation in that order, and who is widened.

    A widened operand gets the other's batch axes: it stands for one view of itself a token. A batch is then many small
    products instead of one large one, which would need what the whole batch holds transposed.
    """

    taken: tuple[int, ...]
    equation: str
    widened: int | None = None


class _Way(NamedTuple):
    step: Step
    lies: Term
    """The axes of the result as they lie in memory."""
    moved: int
    """Elements that are copied first, or made for the gradient of a widened operand."""


def arrange(waiting: Sequence[Term], pairs: Sequence[Pair], size: Mapping[str, int]) -> tuple[int, list[Step]]:
    """The fewest elements moved, and the steps that do with it.

    `pairs` are (places, output) in their order; each is taken the better way round.
    """
    if not pairs:
        return 0, []
    (taken, output), *later = pairs
    ways = list(_ways(waiting, taken, output, size, last=not later))
    if len(pairs) > _SEARCHED:
        ways = [min(ways, key=lambda way: way.moved)]
    found: list[tuple[int, list[Step]]] = []
    for way in ways:
        left = [term for place, term in enumerate(waiting) if place not in taken]
        moved, steps = arrange([*left, way.lies], later, size)
        found.append((way.moved + moved, [way.step, *steps]))
    return min(found, key=itemgetter(0))


def _ways(
    waiting: Sequence[Term], taken: tuple[int, ...], output: Term, size: Mapping[str, int], *, last: bool
) -> Iterator[_Way]:
    """Both orders of a pair, plain and with the operand that has no batch axes widened."""
    terms = [waiting[place] for place in taken]
    if len(terms) != 2 or not set(terms[0]) & set(terms[1]) - set(
        output
    ):  # nothing is summed: torch multiplies, entry by entry
        yield _Way(Step(taken, _equation(terms, output, ())), output, 0)
        return
    for swap, widen in product((False, True), (False, True)):
        places, (left, right) = (taken[::-1], terms[::-1]) if swap else (taken, terms)
        batched = [BATCH in left, BATCH in right]
        if not widen:
            yield _way(Step(places, ""), left, right, output, size, last=last)
        elif batched.count(True) == 1 and BATCH in output:
            yield _way(Step(places, "", batched.index(False)), left, right, output, size, last=last)


def _way(step: Step, left: Term, right: Term, output: Term, size: Mapping[str, int], *, last: bool) -> _Way:
    """What torch.einsum does with this pair: both operands become `batch rows summed` and `batch summed columns`, one
    product follows.
    """
    larger = max((left, right), key=lambda term: prod(size[word] for word in term))
    both = {word for word in left if word in right} | ({BATCH} if step.widened is not None else set())
    batch = tuple(word for word in larger if word in both and word in output)
    summed = tuple(word for word in larger if word in both and word not in output)
    rows = tuple(word for word in left if word not in both)
    columns = tuple(word for word in right if word not in both)
    moved = sum(
        _copied(term, groups, size)
        for term, groups in ((left, (batch, rows, summed)), (right, (batch, summed, columns)))
    )
    if step.widened is not None:
        moved += prod(size[word] for word in (BATCH, *(left, right)[step.widened]))
    lies = batch + rows + columns
    if last:
        moved += prod(size[word] for word in output) * (_kept(lies, size) != _kept(output, size))
    terms = [(BATCH, *term) if step.widened == at else term for at, term in enumerate((left, right))]
    return _Way(step._replace(equation=_equation(terms, output if last else lies, summed)), lies, moved)


def _copied(term: Term, groups: tuple[Term, Term, Term], size: Mapping[str, int]) -> int:
    """The elements of the operand unless each group lies together, in its order, and the innermost axis is no batch
    axis.
    """
    lies = _kept(term, size)
    kept = [tuple(word for word in _kept(group, size) if word in lies) for group in groups]
    together = all(not group or lies[lies.index(group[0]) :][: len(group)] == group for group in kept)
    inside = not lies or lies[-1] not in kept[0]
    return 0 if together and inside else prod(size[word] for word in term)


def _kept(term: Term, size: Mapping[str, int]) -> Term:
    return tuple(word for word in term if size[word] > 1)


def _equation(terms: Sequence[Term], output: Term, summed: Term) -> str:
    """In letters; torch sums axes in the order of their letters."""
    words = [
        word for word in dict.fromkeys((*output, *summed, *(word for term in terms for word in term))) if word != BATCH
    ]
    letters = {BATCH: BATCH, **dict(zip(words, sorted(ascii_letters), strict=False))}
    return (
        ",".join("".join(letters[word] for word in term) for term in terms)
        + "->"
        + "".join(letters[word] for word in output)
    )
