"""Conversations: their string, their tokens, and who wrote each token, against a walk over every character."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from language import make_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fmxnn.activations import Conversations, conversations, harvest
from fmxnn.activations.chat import Role
from fmxnn.activations.models import open_tokenizer

CHAT = Path(__file__).parent.parent / "examples" / "tiny-lm-chat"

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
)
LLAMA = """{%- if messages[0].role == 'system' -%}
    {%- set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set system = '' -%}
    {%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('roles must alternate') -}}
    {%- endif -%}
    {%- if message.role == 'user' -%}
        {{- bos_token + '[INST] ' + ((system if loop.first else '') + message.content).strip() + ' [/INST]' -}}
    {%- else -%}
        {{- ' ' + message.content.strip() + ' ' + eos_token -}}
    {%- endif -%}
{%- endfor -%}"""
GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}
{% endif %}{% for message in messages -%}
<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}
{{ message['content'] | trim }}<end_of_turn>
{% endfor %}"""
MARKED = """{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}{% if message.role == 'assistant' %}
{% generation %}{{ message.content + '<|im_end|>' + '\n' }}{% endgeneration %}
{% else %}{{ message.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"""
PLAIN = """{% for message in messages %}{{ message.role.capitalize() + ': ' + message.content }}
{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}{{ eos_token }}"""
STRIPPED = "{% for message in messages %}{{ message.role | upper }}>{{ message.content.strip() }}|{% endfor %}"
TEMPLATES = {"chatml": CHATML, "llama": LLAMA, "gemma": GEMMA, "marked": MARKED, "plain": PLAIN, "stripped": STRIPPED,
    "tiny": (CHAT / "chat_template.jinja").read_text()}  # fmt: skip

WORDS = ["hello", "user", "model", "assistant", "system", "<|im_start|>", "[INST]", "<<SYS>>", "|", "User:", "</s>"]
PIECES = [*WORDS, "héllo", "Grüße", "\U0001f98a", "\U0001f469\u200d\U0001f680", "\u3042\u3044", "hello. hello.", "a", " ",
    "  ", "\n", "\n\n", ".", "e\u0301", "'s", "\ue000"]  # fmt: skip
contents = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)


@st.composite
def talks(draw, system=True):
    """A system message or none, then turns of the user and the assistant."""
    few = draw(st.lists(contents, min_size=1, max_size=3))
    roles = [*(["system"] if system and draw(st.booleans()) else []), *["user", "assistant"] * 3]
    count = draw(st.integers(1 + (roles[0] == "system"), 5))
    return [{"role": role, "content": draw(st.sampled_from(few))} for role in roles[:count]]


CORPUS = ["hello assistant user system model . ' s e a | > < [INST] Grüße héllo \U0001f98a \u3042", *map(str, range(99))]
CONTROLS = ["<|im_start|>", "<|im_end|>", "<s>", "</s>"]


def sentencepiece():
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(prepend_scheme="first"), decoders.Metaspace()
    made.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=120, special_tokens=["<s>", "</s>", "<unk>"], unk_token="<unk>",
        show_progress=False)
    )  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def wordpiece():
    """Lower case without accents; emoji but the fox are unknown."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    made.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=150, special_tokens=["[UNK]"], show_progress=False)
    )
    made.add_special_tokens(CONTROLS)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="[UNK]")


def trimmed():
    """Bytes whose offsets leave out spaces, with control tokens of its own, as Llama 3 has them."""
    made = Tokenizer.from_file(str(CHAT / "tokenizer.json"))
    made.post_processor = processors.ByteLevel(trim_offsets=True)
    made.add_special_tokens(CONTROLS)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


TOKENIZERS = {
    "bytes": open_tokenizer(CHAT),
    "sentencepiece": sentencepiece(),
    "wordpiece": wordpiece(),
    "trimmed": trimmed(),
}


# ---- the oracle: one character and one token at a time


def rendered(tokenizer, messages, template):
    return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)


def writers(tokenizer, messages, template):
    """Who wrote each character: the role and the number of a message or mark, or None for the template.

    A second string has other characters for those of contents, spaces for spaces, so that it is stripped as the first.
    """
    text = rendered(tokenizer, messages, template)
    letters, spaces = [chr(0xF0000 + i) for i in range(9)], [chr(0x2000 + i) for i in range(9)]
    disguised = [
        {**message, "content": "".join(spaces[i] if each.isspace() else letters[i] for each in message["content"])}
        for i, message in enumerate(messages)
    ]
    other = rendered(tokenizer, disguised, template)
    assert len(other) == len(text)
    found = [None] * len(text)
    for place, character in enumerate(other):
        for i, message in enumerate(messages):
            if character in (letters[i], spaces[i]):
                found[place] = (message["role"], i)
    opening, closing = "\U000f1000", "\U000f1001"
    shown = re.sub(r"\{%-? generation -?%\}", lambda mark: mark[0] + "{{ '" + opening + "' }}", template)
    shown = re.sub(r"\{%(-?) endgeneration -?%\}", lambda mark: "{{" + mark[1] + " '" + closing + "' }}" + mark[0], shown)
    place, inside, marks = 0, False, 0
    for character in rendered(tokenizer, messages, shown):
        if character in (opening, closing):
            inside, marks = character == opening, marks + (character == opening)
            continue
        if inside:
            found[place] = ("assistant", -marks)
        place += 1
    return text, found


def slow(tokenizer, messages, template, context):
    text, found = writers(tokenizer, messages, template)
    read = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    roles, places, counts = [], [], {}
    special = {**{token: str(added) for token, added in tokenizer.added_tokens_decoder.items() if added.special}}
    for number, (token, (start, stop)) in enumerate(zip(read["input_ids"], read["offset_mapping"], strict=True)):
        if token in special and text[start:stop].strip() == special[token]:
            first = token == tokenizer.bos_token_id and (number == 0 or token != tokenizer.eos_token_id)
            writer = None
            roles.append(Role.BOS if first else Role.TEMPLATE)
        else:
            covered = range(start, stop) if stop > start else [max(start - 1, 0)]
            writer = next((found[at] for at in covered if found[at] is not None), None)
            roles.append(Role.TEMPLATE if writer is None else Role[writer[0].upper()])
        is_answer = writer is not None and writer[0] == "assistant"
        places.append(counts.get(writer, 0) if is_answer else -1)
        counts[writer] = counts.get(writer, 0) + 1
    return text, read["input_ids"][:context], roles[:context], places[:context], len(roles) > context


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("template", TEMPLATES)
@given(st.data(), st.integers(2, 60))
def test_roles_are_those_of_a_walk_over_every_character(template, tokenizer, data, context):
    reader, shape = TOKENIZERS[tokenizer], TEMPLATES[template]
    given_talks = data.draw(st.lists(talks(system=template not in ("gemma", "tiny")), min_size=1, max_size=3))
    chat = conversations(given_talks, reader, context=context, template=shape)
    for number, talk in enumerate(given_talks):
        text, ids, roles, places, is_cut = slow(reader, talk, shape, context)
        short = chat.ids.shape[1] - len(ids)
        assert chat.rendered[number] == text
        assert chat.ids[number].tolist()[: len(ids)] == ids
        assert chat.roles[number].tolist() == [*roles, *[Role.PADDING] * short]
        assert chat.answer_position[number].tolist() == [*places, *[-1] * short]
        assert bool(chat.is_cut[number]) == is_cut
        kept = [place > 0 and role != Role.BOS for place, role in enumerate(roles)]
        assert chat.keep[number].tolist() == [*kept, *[False] * short]
