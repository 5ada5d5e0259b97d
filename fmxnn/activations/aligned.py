"""One text in the tokens of several tokenizers: tokens that end at the same character are a pair."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from fmxnn.activations.pieces import grouped
from fmxnn.activations.text import Contexts, first_token


@runtime_checkable
class WithText(Protocol):
    """Contexts that know their text, one string for each context."""

    @property
    def rendered(self) -> Sequence[str]:
        """The text of each context."""
        ...


class Count(NamedTuple):
    """How many tokens a tokenizer made of a text, and how many of these have a partner in every other tokenizer.

    ```python
    from fmxnn.activations.aligned import Count

    Count(tokens=100, paired=90).dropped  # 10
    ```
    """

    tokens: int
    paired: int

    @property
    def dropped(self) -> int:
        """The tokens without a partner, and those that are never kept, such as BOS."""
        return self.tokens - self.paired


@dataclass(frozen=True)
class Aligned:
    """The same text for several models, row for row.

    The i-th kept token of a row is of the same place in the text in all of them.

    - `contexts`: the rows and positions that a stream speaks of
    - `each`: what each model reads
    - `counts`: of each model, what was dropped; none where all read the same contexts

    ```python
    from fmxnn.activations.aligned_text import aligned_contexts
    from fmxnn.activations.models import open_tokenizer

    one = open_tokenizer("examples/tiny-lm")
    both = aligned_contexts(["The whale was seen off the coast again. " * 20], [one, one], context=32)
    assert both.counts[0].dropped == 0
    ```
    """

    contexts: Contexts
    each: tuple[Contexts, ...]
    counts: tuple[Count, ...] = ()


def same_for_all(contexts: Contexts, models: int) -> Aligned:
    """Contexts that every model reads as they are, so that nothing is dropped."""
    return Aligned(contexts, (contexts,) * models)


# ---- which tokens are a pair


class Tokens(NamedTuple):
    """The tokens of one text: their ids, and the character after each, 0 where a token ends inside a character.

    ```python
    from fmxnn.activations.aligned import Tokens

    Tokens(torch.tensor([35, 3485]), ends=torch.tensor([1, 3]))
    ```
    """

    ids: Tensor
    ends: Tensor

    def then(self, token: int, end: int) -> "Tokens":
        """These tokens and one more."""
        ids, ends = (functional.pad(each, (0, 1), value=new) for each, new in ((self.ids, token), (self.ends, end)))
        return Tokens(ids, ends)


def finished(spans: Tensor) -> Tensor:
    """`tokens 2 -> tokens`: the character after each token, 0 where a character is not complete there.

    `spans` has, for each token, its first character and the one after its last. A character is not complete at a token
    if a later token spells more of it, as for the bytes of an emoji. If several tokens end at one character, only the
    last of them counts.
    """
    starts, ends = spans.long().unbind(1)
    if not len(ends):
        return ends
    never = torch.full((1,), torch.iinfo(torch.int64).max)
    ahead = torch.cat([starts[1:], never]).flip(0).cummin(0).values.flip(0)
    last = torch.cat([ends[1:], never]) != ends
    return ends.where((ends == ends.cummax(0).values) & (ends <= ahead) & last, 0)


def pairs(ends: Sequence[Tensor]) -> list[Tensor]:
    """`tokens -> pairs`, for each tokenizer: which of its tokens end at the same characters, in order."""
    common = ends[0][ends[0] > 0]
    for other in ends[1:]:
        common = common[torch.isin(common, other)]
    return [torch.isin(each, common).nonzero().squeeze(1) for each in ends]


def tokens_of(texts: Sequence[str], tokenizer: Any) -> list[Tokens]:
    """The tokens of each text alone, without BOS, all made at once."""
    made = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return [
        Tokens(torch.tensor(ids, dtype=torch.int32), finished(torch.tensor(spans).view(-1, 2)))
        for ids, spans in zip(made["input_ids"], made["offset_mapping"], strict=True)
    ]


def check_pairs(pairs: int) -> None:
    """Raises ValueError for none."""
    if not pairs:
        raise ValueError(
            "nowhere in the text do tokens of all tokenizers end at the same character; give more text, or one "
            "tokenizer for all models"
        )


# ---- contexts that are there already, and know their text


def aligned_to(given: Contexts, rendered: Sequence[str], tokenizers: Sequence[Any], *, longest: int | None) -> Aligned:
    """`contexts context -> contexts context`: contexts, and their text in the tokens of the other tokenizers.

    Which tokens are kept, and their roles, are those of the given contexts, less the tokens that have no partner. A
    context of the others is cut to `longest` tokens. Raises ValueError where no tokenizer gives the ids of the
    contexts, and where no tokens end at the same character.
    """
    made = [_tokenised(rendered, tokenizer) for tokenizer in tokenizers]
    placed = [_placed(given.ids, texts) for texts in made]
    known = next((ends for ends in placed if ends is not None), None)
    if known is None:
        names = ", ".join(type(tokenizer).__name__ for tokenizer in tokenizers)
        raise ValueError(
            f"the contexts hold other tokens than the tokenizers of the models ({names[:200]}) make of their text; "
            "make them with the tokenizer of one of the models"
        )
    sides = [
        _alone(texts, tokenizer, longest) if ends is None else _OfModel(given.ids, known)
        for texts, tokenizer, ends in zip(made, tokenizers, placed, strict=True)
    ]
    keep, *kept = _kept([known.where(given.keep, 0), *(side.ends for side in sides)])
    check_pairs(int(keep.sum()))
    contexts = replace(given, keep=keep)
    return Aligned(
        contexts,
        tuple(
            contexts if side.ids is given.ids else Contexts(side.ids, mask)
            for side, mask in zip(sides, kept, strict=True)
        ),
        tuple(
            Count(given.tokens if side.ids is given.ids else sum(len(text.ids) for text in texts), int(keep.sum()))
            for side, texts in zip(sides, made, strict=True)
        ),
    )


class _OfModel(NamedTuple):
    """`contexts context`, both: what one model reads, and the character behind each token, 0 where there is none."""

    ids: Tensor
    ends: Tensor


def _tokenised(rendered: Sequence[str], tokenizer: Any) -> list[Tokens]:
    parts = grouped((text, True) for text in rendered)
    return [each for some in parts for each in tokens_of([text for text, _ in some], tokenizer)]


def _placed(ids: Tensor, texts: Sequence[Tokens]) -> Tensor | None:
    """`contexts context`: the character behind each token of the contexts, None where they hold other tokens."""
    ends = torch.zeros(ids.shape, dtype=torch.int64)
    for row, text, there in zip(ids, texts, ends, strict=True):
        for begin in (0, 1):  # a text may begin with its BOS
            count = min(len(text.ids), len(row) - begin)
            if torch.equal(row[begin : begin + count], text.ids[:count]):
                there[begin : begin + count] = text.ends[:count]
                break
        else:
            return None
    return ends


def _alone(texts: Sequence[Tokens], tokenizer: Any, longest: int | None) -> _OfModel:
    """Each text behind one BOS (or EOS), cut to `longest` tokens; BOS is in no pair."""
    first = first_token(tokenizer, 2 if longest is None else longest)
    ids, ends = list[Tensor](), list[Tensor]()
    for text in texts:
        begin = int(text.ids[:1].tolist() != [first])
        ids.append(functional.pad(text.ids, (begin, 0), value=first)[:longest])
        ends.append(functional.pad(text.ends, (begin, 0))[:longest])
    padded = pad_sequence(ids, batch_first=True, padding_value=first)
    return _OfModel(padded, pad_sequence(ends, batch_first=True).where(padded != first, 0))


def _kept(ends: Sequence[Tensor]) -> list[Tensor]:
    """`contexts context`, for each tokenizer: which tokens are in a pair."""
    masks = [torch.zeros(each.shape, dtype=torch.bool) for each in ends]
    for row in range(len(ends[0])):
        for mask, at in zip(masks, pairs([each[row] for each in ends]), strict=True):
            mask[row, at] = True
    return masks
