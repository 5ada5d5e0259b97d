"""Tokenizers of different kinds, and slow answers to where their tokens end."""

from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

TINY = Path(__file__).parent.parent / "examples" / "tiny-lm"
TRAINED_ON = [text[:2000] for text in list(topics.values())[:20]]


@cache
def byte_level():
    """The tokenizer of tiny-lm: each token is a run of bytes, so that several may spell out one character."""
    return AutoTokenizer.from_pretrained(TINY)


@cache
def metaspace(prefix="always"):
    """As sentencepiece makes them: pieces of text with spaces written as "▁", and bytes where there is no piece."""
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix)
    trained.train_from_iterator(TRAINED_ON, trainers.UnigramTrainer(vocab_size=300, show_progress=False))
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((f"<0x{byte:02X}>", -20.0) for byte in range(256))]
    pieces += [(piece, -len(piece) / 3 - 2.0) for piece in sorted(trained.get_vocab()) if piece != "<unk>"]
    made = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix)
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=prefix)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@cache
def _byte_of():
    """What byte each character of a byte-level vocabulary stands for, as GPT-2 chose them."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + i): byte for i, byte in enumerate(other)}


def spelled(tokenizer, token):
    """The bytes that a token of these tokenizers stands for."""
    piece = tokenizer.convert_ids_to_tokens(token)
    if tokenizer is byte_level():
        return bytes(_byte_of()[character] for character in piece)
    if piece.startswith("<0x"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode()


def ends(text, tokenizer):
    """Character by character: the token after which exactly the text up to it has been spelled out."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    said = [b"".join(spelled(tokenizer, token) for token in ids[: count + 1]) for count in range(len(ids))]
    added = len(said[-1]) - len(text.encode()) if ids else 0  # a space in front, which the tokenizer put there
    assert added in (0, 1)
    found = {}
    for character in range(1, len(text) + 1):
        for number, so_far in enumerate(said):
            if so_far[added:] == text[:character].encode() and len(so_far) > added:
                found[character] = number
    return ids, found
