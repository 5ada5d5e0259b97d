"""Einstein sums over named axes, planned once by opt_einsum."""

import re
from math import prod

import opt_einsum
import torch
from torch import Tensor, nn

PLANNED_BATCH = 1024
"""The number of tokens that a plan assumes behind `...`; it moves the order of contraction, never the result."""

Steps = list[tuple[tuple[int, ...], str]]
_WORD = re.compile(r"[A-Za-z_]\w*")


class PatternError(ValueError):
    """A pattern that cannot be read, or sizes that do not fit it."""


class ShapeError(ValueError):
    """A tensor whose axes are not those that a module reads."""


def read_terms(pattern: str) -> tuple[tuple[str, ...], ...]:
    """Splits `latents r, d_model r` into its terms, each a tuple of axis words. Raises PatternError."""
    terms = tuple(tuple(term.split()) for term in pattern.split(","))
    for term in terms:
        if not term:
            raise PatternError(f"the pattern {pattern!r} has an empty term; write terms as 'latents r, d_model r'")
        for word in term:
            if word != "..." and not _WORD.fullmatch(word):
                raise PatternError(f"the pattern {pattern!r} has {word!r} where an axis stands; an axis is one word like d_model")
            if term.count(word) > 1:
                raise PatternError(
                    f"the pattern {pattern!r} repeats the axis {word!r} in the term {' '.join(term)!r}; give the second one a name of its own"
                )
        if "..." in term[1:]:
            raise PatternError(f"the pattern {pattern!r} has '...' inside the term {' '.join(term)!r}; batch axes come first")
    return terms


def check_sizes(pattern: str, words: set[str], sizes: dict[str, int]) -> None:
    """Raises PatternError unless every axis of the pattern, and nothing else, has a whole positive size."""
    for word in sorted(words - sizes.keys()):
        raise PatternError(f"the pattern {pattern!r} needs a size for the axis {word!r}, got sizes for {_listed(sizes)}; pass {word}=...")
    for word in sorted(sizes.keys() - words):
        raise PatternError(f"the pattern {pattern!r} has no axis {word!r}; its axes are {_listed(words)}")
    for word, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise PatternError(f"the pattern {pattern!r} needs whole sizes of 1 or more, got {word}={size!r}")


class Contraction(nn.Module):
    """`pattern`: an Einstein sum over named axes, such as `... layers d_model, latents r, d_model r, layers r -> ... latents`.

    The order of contraction is planned in the constructor; `forward` only runs it. `...` stands for any
    number of batch axes and is planned as 1,024 tokens. The repr prints the plan and its FLOPs.
    Raises PatternError for a pattern that cannot be read and ShapeError for operands that do not fit.
    """

    def __init__(self, pattern: str, **sizes: int):
        super().__init__()
        left, arrow, right = pattern.partition("->")
        if not arrow:
            raise PatternError(f"the pattern {pattern!r} has no '->'; write 'inputs -> output'")
        self.pattern = pattern
        self.sizes = sizes
        self.terms = read_terms(left)
        if "," in right:
            raise PatternError(f"the pattern {pattern!r} has one output, got {right.strip()!r}; write 'inputs -> output'")
        self.output = read_terms(right)[0] if right.strip() else ()
        words = {word for term in self.terms for word in term}
        for word in self.output:
            if word not in words:
                raise PatternError(f"the pattern {pattern!r} has {word!r} in its output and in no input")
        check_sizes(pattern, words - {"..."}, sizes)
        self._steps, self._plan, self.flops = _plan(self.terms, self.output, sizes)

    def extra_repr(self) -> str:
        """The pattern, the sizes, the planned order and the FLOPs at 1,024 tokens."""
        sizes = ", ".join(f"{word}={size}" for word, size in self.sizes.items())
        plan = "; ".join(self._plan)
        return f"{self.pattern!r}, {sizes}; plan: {plan}; {self.flops / 1e6:.4g} MFLOP at {PLANNED_BATCH:,} tokens"

    def forward(self, *operands: Tensor) -> Tensor:
        """Sums the operands, one for each term of the pattern, in the planned order."""
        self._check(operands)
        waiting = list(operands)
        for taken, equation in self._steps:
            waiting.append(torch.einsum(equation, *[waiting.pop(i) for i in taken]))
        return waiting[0]

    def _check(self, operands: tuple[Tensor, ...]) -> None:
        if len(operands) != len(self.terms):
            raise ShapeError(f"{self.pattern!r} sums {len(self.terms)} tensors, got {len(operands)}")
        for term, operand in zip(self.terms, operands, strict=True):
            named = tuple(self.sizes[word] for word in term if word != "...")
            shape = tuple(operand.shape)
            if shape[len(shape) - len(named) :] != named or (term[:1] != ("...",) and len(shape) != len(named)):
                expected = ", ".join(word if word == "..." else f"{word}={self.sizes[word]}" for word in term)
                raise ShapeError(f"{self.pattern!r} reads ({expected}), got {shape}")


def _plan(terms: tuple[tuple[str, ...], ...], output: tuple[str, ...], sizes: dict[str, int]) -> tuple[Steps, list[str], int]:
    letters = {word: opt_einsum.get_symbol(i) for i, word in enumerate(sizes)}
    if len(letters) > 51:
        raise PatternError(f"a pattern has at most 51 axes, got {len(letters)}")
    letters["..."] = batch = opt_einsum.get_symbol(51)
    size = {**sizes, "...": PLANNED_BATCH}
    equation = ",".join("".join(letters[word] for word in term) for term in terms) + "->" + "".join(letters[word] for word in output)
    shapes = [tuple(size[word] for word in term) for term in terms]
    _, info = opt_einsum.contract_path(equation, *shapes, shapes=True, optimize="auto-hq")
    steps = [(tuple(step[0]), step[2].replace(batch, "...")) for step in info.contraction_list]
    words = {letter: word for word, letter in letters.items()} | {",": ",", "-": "-", ">": "> "}
    plan = [" ".join(words[letter] for letter in step[2]).replace(" ,", ",").replace(" - > ", " ->") for step in info.contraction_list]
    if len(terms) == 1:  # opt_einsum counts nothing for a lone transposition; a sum reads every entry once
        return steps, plan, prod(shapes[0])
    return steps, plan, int(info.opt_cost)


def _listed(words: dict[str, int] | set[str]) -> str:
    return ", ".join(sorted(words)) or "none"
