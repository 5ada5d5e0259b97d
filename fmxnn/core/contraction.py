"""Einstein sums over named axes, planned once by opt_einsum."""

import re
from functools import partial
from math import ceil, prod
from typing import Any

import opt_einsum
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fmxnn.core.errors import PatternError, ShapeError
from fmxnn.core.excerpt import cut, excerpt
from fmxnn.core.memory_order import BATCH, Step, arrange
from fmxnn.core.ordering import BoundedOrder
from fmxnn.core.sizes import whole

PLANNED_BATCH = 1024
"""The number of tokens that a plan assumes behind `...`; it moves the order of contraction, never the result."""

BUDGET = 6 * 2**20
"""Bytes of the largest intermediate on a CPU: a larger one is made in parts, and once more for its gradient instead of
being kept.
"""

MAX_AXES, MAX_TERMS, MAX_PATTERN = 51, 52, 100_000
"""Axes: torch.einsum has letters for as many beside the batch. Terms, and characters of a pattern."""

MAX_ENTRIES = 10**300
"""The product of all sizes, which the planner takes as a float."""

_WORD = re.compile(r"[A-Za-z_]\w*")


def read_terms(pattern: str) -> tuple[tuple[str, ...], ...]:
    """Splits `latents r, d_model r` into its terms, each a tuple of axis words. Raises PatternError."""
    who = f"the pattern {excerpt(pattern)}"
    if len(pattern) > MAX_PATTERN:
        raise PatternError(f"{who} has {len(pattern):,} characters, and a pattern has at most {MAX_PATTERN:,}")
    terms = tuple(tuple(term.split()) for term in pattern.split(","))
    if len(terms) > MAX_TERMS:
        raise PatternError(f"{who} has {len(terms)} terms, and a pattern has at most {MAX_TERMS}")
    for term in terms:
        if not term:
            raise PatternError(f"{who} has an empty term; write terms as 'latents r, d_model r'")
        if BATCH in term[1:]:
            raise PatternError(f"{who} has '...' inside the term {excerpt(' '.join(term))}; batch axes come first")
        seen: set[str] = set()
        for word in term:
            if word != BATCH and not _WORD.fullmatch(word):
                raise PatternError(f"{who} has {excerpt(word)} where an axis stands; an axis is one word like d_model")
            if word in seen:
                raise PatternError(
                    f"{who} repeats the axis {excerpt(word)} in the term {excerpt(' '.join(term))}; give the second "
                    "one a name of its own"
                )
            seen.add(word)
    axes = {word for term in terms for word in term} - {BATCH}
    if len(axes) > MAX_AXES:
        raise PatternError(f"a pattern has at most {MAX_AXES} axes, got {len(axes)}")
    return terms


def check_sizes(pattern: str, words: set[str], sizes: dict[str, int]) -> None:
    """Raises PatternError unless every axis of the pattern, and nothing else, has a whole positive size."""
    who = f"the pattern {excerpt(pattern)}"
    for word in sorted(words - sizes.keys()):
        raise PatternError(
            f"{who} needs a size for the axis {excerpt(word)}, got sizes for {_listed(sizes)}; pass {cut(word)}=..."
        )
    for word in sorted(sizes.keys() - words):
        raise PatternError(f"{who} has no axis {excerpt(word)}; its axes are {_listed(words)}")
    for word, size in sizes.items():
        if (whole(size) or 0) < 1:
            raise PatternError(f"{who} needs whole sizes of 1 or more, got {cut(word)}={excerpt(size)}")
    if prod(sizes.values()) > MAX_ENTRIES:
        raise PatternError(f"{who} has axes of more than {MAX_ENTRIES:.0e} entries together; no tensor is so large")


class Contraction(nn.Module):
    """`pattern`: an Einstein sum over named axes.

    The order of contraction is planned in the constructor, and `forward` only runs it. `...` stands for any number of
    batch axes and is planned as 1,024 tokens. The repr prints the plan and its FLOPs. Raises PatternError for a pattern
    that cannot be read and ShapeError for operands that do not fit.

    ```python
    pattern = "... layers d_model, latents r, d_model r, layers r -> ... latents"
    read = fx.Contraction(pattern, layers=2, d_model=3, latents=5, r=4)
    x, factors = torch.randn(7, 2, 3), (torch.randn(5, 4), torch.randn(3, 4), torch.randn(2, 4))
    read(x, *factors).shape  # (7, 5)
    ```
    """

    def __init__(self, pattern: str, **sizes: int):
        super().__init__()
        left, arrow, right = pattern.partition("->")
        if not arrow:
            raise PatternError(f"the pattern {excerpt(pattern)} has no '->'; write 'inputs -> output'")
        self.pattern = pattern
        self.sizes = sizes
        self.terms = read_terms(left)
        if "," in right:
            raise PatternError(
                f"the pattern {excerpt(pattern)} has one output, got {excerpt(right.strip())}; write 'inputs -> output'"
            )
        self.output = read_terms(right)[0] if right.strip() else ()
        words = {word for term in self.terms for word in term}
        for word in self.output:
            if word not in words:
                raise PatternError(f"the pattern {excerpt(pattern)} has {excerpt(word)} in its output and in no input")
        check_sizes(pattern, words - {BATCH}, sizes)
        self._steps, self._plan, self.flops, widest = _plan(self.terms, self.output, sizes)
        self._widest = prod(sizes[word] for word in widest if word != BATCH)
        self._grows = BATCH in widest
        batched = sum(term[:1] == (BATCH,) for term in self.terms)
        self._cut = next((word for word in self.output if word in widest and (word != BATCH or batched == 1)), "")

    def extra_repr(self) -> str:
        """The pattern, the sizes, the planned order and the FLOPs at 1,024 tokens."""
        sizes = ", ".join(f"{word}={size}" for word, size in self.sizes.items())
        plan = "; ".join(self._plan)
        return f"{self.pattern!r}, {sizes}; plan: {plan}; {self.flops / 1e6:.4g} MFLOP at {PLANNED_BATCH:,} tokens"

    def forward(self, *operands: Tensor) -> Tensor:
        """Sums the operands, one for each term of the pattern, in the planned order."""
        self._check(operands)
        parts = self._parts(operands)
        if parts == 1:
            return self._sum(*operands)
        pieces = zip(*(self._pieces(*pair, parts) for pair in zip(self.terms, operands, strict=True)), strict=True)
        learned = torch.is_grad_enabled() and any(operand.requires_grad for operand in operands)
        run = partial(checkpoint, self._sum, use_reentrant=False, preserve_rng_state=False) if learned else self._sum
        return torch.cat([run(*piece) for piece in pieces], _place(self.output, self._cut))

    def _parts(self, operands: tuple[Tensor, ...]) -> int:
        """In how many parts the output is made; it is independent along each of its axes."""
        if (
            not self._cut
            or operands[0].device.type != "cpu"
            or torch.compiler.is_compiling()
            or not _checkpoints_work()
        ):
            return 1
        batches = [
            o.shape[: o.ndim - len(term) + 1] for term, o in zip(self.terms, operands, strict=True) if term[0] == BATCH
        ]
        tokens = max((batch.numel() for batch in batches), default=1) if self._grows else 1
        size = self.sizes[self._cut] if self._cut != BATCH else batches[0][0] if batches[0] else 1
        return max(1, min(size, ceil(self._widest * tokens * operands[0].element_size() / BUDGET)))

    def _pieces(self, term: tuple[str, ...], operand: Tensor, parts: int) -> tuple[Tensor, ...]:
        return operand.tensor_split(parts, _place(term, self._cut)) if self._cut in term else (operand,) * parts

    def _sum(self, *operands: Tensor) -> Tensor:
        waiting = list(operands)
        for step in self._steps:
            taken = [waiting[place] for place in step.taken]
            for place in sorted(step.taken, reverse=True):
                waiting.pop(place)
            waiting.append(_product(step, taken))
        return waiting[0]

    def _check(self, operands: tuple[Tensor, ...]) -> None:
        if len(operands) != len(self.terms):
            raise ShapeError(f"{self.pattern!r} sums {len(self.terms)} tensors, got {len(operands)}")
        for term, operand in zip(self.terms, operands, strict=True):
            named = tuple(self.sizes[word] for word in term if word != BATCH)
            shape = tuple(operand.shape)
            if shape[len(shape) - len(named) :] != named or (term[:1] != (BATCH,) and len(shape) != len(named)):
                expected = ", ".join(word if word == BATCH else f"{word}={self.sizes[word]}" for word in term)
                raise ShapeError(f"{self.pattern!r} reads ({expected}), got {shape}")


def _plan(
    terms: tuple[tuple[str, ...], ...], output: tuple[str, ...], sizes: dict[str, int]
) -> tuple[list[Step], list[str], int, tuple[str, ...]]:
    """The steps, the same in words, their FLOPs, and the axes of the largest intermediate."""
    letters = {word: opt_einsum.get_symbol(i) for i, word in enumerate(sizes)}
    letters[BATCH] = opt_einsum.get_symbol(MAX_AXES)
    size = {**sizes, BATCH: PLANNED_BATCH}
    equation = (
        ",".join("".join(letters[word] for word in term) for term in terms)
        + "->"
        + "".join(letters[word] for word in output)
    )
    shapes = [tuple(size[word] for word in term) for term in terms]
    _, info = opt_einsum.contract_path(equation, *shapes, shapes=True, optimize=BoundedOrder())
    words = {letter: word for word, letter in letters.items()} | {",": ",", "-": "-", ">": "> "}
    pairs = [
        (tuple(step[0]), tuple(words[letter] for letter in step[2].partition("->")[2]))
        for step in info.contraction_list
    ]
    _, steps = arrange(terms, pairs, size)
    plan = [
        " ".join(words[letter] for letter in step[2]).replace(" ,", ",").replace(" - > ", " ->")
        for step in info.contraction_list
    ]
    if len(terms) == 1:  # opt_einsum counts nothing for a lone transposition; a sum reads every entry once
        return steps, plan, prod(shapes[0]), ()
    widest = max((axes for _, axes in pairs[:-1]), key=lambda axes: prod(size[word] for word in axes), default=())
    return steps, plan, int(info.opt_cost), widest


def _product(step: Step, operands: list[Tensor]) -> Tensor:
    if step.widened is not None:
        before, _, after = step.equation.partition("->")[0].split(",")[1 - step.widened].partition(BATCH)
        batched, narrow = operands[1 - step.widened], operands[step.widened]
        operands[step.widened] = narrow.expand(*batched.shape[len(before) : batched.ndim - len(after)], *narrow.shape)
    return torch.einsum(step.equation, *operands)


def _checkpoints_work() -> bool:
    """Not inside the derivatives of torch.func, which forbid the hooks that a checkpoint is made of."""
    autograd: Any = getattr(torch._C, "_autograd")  # noqa: B009  # pyright: ignore[reportPrivateUsage]
    return autograd._saved_tensors_hooks_is_enabled()


def _place(term: tuple[str, ...], word: str) -> int:
    return 0 if word == BATCH else term.index(word) - len(term)


def _listed(words: dict[str, int] | set[str]) -> str:
    return cut(", ".join(sorted(words))) or "none"
