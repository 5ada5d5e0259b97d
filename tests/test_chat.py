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
{% generation %}{{ '> ' + message.content + '<|im_end|>' + '\n' }}{% endgeneration %}
{% else %}{{ message.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"""
PLAIN = """{% for message in messages %}{{ message.role.capitalize() + ': ' + message.content }}
{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}{{ eos_token }}"""
STRIPPED = "{% for message in messages %}{{ message.role | upper }}>{{ message.content.strip() }}|{% endfor %}"
TEMPLATES = {"chatml": CHATML, "llama": LLAMA, "gemma": GEMMA, "marked": MARKED, "plain": PLAIN, "stripped": STRIPPED,
    "tiny": (CHAT / "chat_template.jinja").read_text()}  # fmt: skip

WORDS = ["hello", "user", "model", "assistant", "system", "<|im_start|>", "[INST]", "<<SYS>>", "|", "User:", "</s>"]
STRANGE = ["héllo", "Grüße", "\U0001f98a", "\U0001f469\u200d\U0001f680", "\u3042\u3044", "e\u0301", "\ue000"]
PIECES = [*WORDS, *STRANGE, "hello. hello.", "a", " ", "  ", "\n", "\n\n", ".", "'s"]


@st.composite
def talks(draw, system=True, pieces=PIECES):
    """A system message or none, then turns of the user and the assistant."""
    contents = st.lists(st.sampled_from(pieces), max_size=6).map("".join)
    few = draw(st.lists(contents, min_size=1, max_size=3))
    roles = [*(["system"] if system and draw(st.booleans()) else []), *["user", "assistant"] * 3]
    count = draw(st.integers(1 + (roles[0] == "system"), 5))
    return [{"role": role, "content": draw(st.sampled_from(few))} for role in roles[:count]]


CORPUS = [
    "hello assistant user system model . ' s e a | > < [INST] Grüße héllo \U0001f98a \u3042",
    *map(str, range(99)),
]
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
    shown = re.sub(
        r"\{%(-?) endgeneration -?%\}", lambda mark: "{{" + mark[1] + " '" + closing + "' }}" + mark[0], shown
    )
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


# ---- what is read, kept and refused

TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "I am Pip."},
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "I am Pip, again."},
]
BYTES = TOKENIZERS["bytes"]


def test_tiny_lm_chat_reads_what_it_was_trained_on():
    chat = conversations([TALK[1:]], CHAT)
    text = "User: Who are you?\nAssistant: I am Pip.\nUser: Who are you?\nAssistant: I am Pip, again."
    assert chat.rendered == (f"<|endoftext|>{text}<|endoftext|>",)
    assert chat.ids[0].tolist() == [0, *BYTES(text, add_special_tokens=False)["input_ids"], 0]
    asked = BYTES.apply_chat_template(TALK[1:2], tokenize=False, add_generation_prompt=True)
    assert asked == "<|endoftext|>User: Who are you?\nAssistant:"


@pytest.mark.parametrize("template", ["tiny", "marked"])
@given(talks(system=False, pieces=[piece for piece in PIECES if piece.isascii()]))  # theirs cuts a character's bytes
def test_generation_marks_are_read_as_transformers_reads_them(template, talk):
    shape = TEMPLATES[template]
    read = BYTES.apply_chat_template(talk, chat_template=shape, return_dict=True, return_assistant_tokens_mask=True)
    chat = conversations([talk], BYTES, template=shape, context=512)
    assert chat.ids[0].tolist() == read["input_ids"]
    answers = [
        bool(mask) and token != 0 for mask, token in zip(read["assistant_masks"], read["input_ids"], strict=True)
    ]
    assert (chat.roles[0] == Role.ASSISTANT).tolist() == answers


def test_the_first_tokens_of_each_answer_are_counted_from_zero():
    chat = conversations([TALK], BYTES, template=CHATML, context=256)
    answers = chat.where((chat.answer_position >= 0) & (chat.answer_position < 3))
    assert BYTES.decode(answers.ids[answers.keep]) == "I am PI am P"
    last = chat.answer_position.max()
    assert BYTES.decode(chat.ids[chat.answer_position == last]) == "."


def test_only_and_without_keep_the_tokens_of_roles():
    chat = conversations([TALK, TALK[:3]], BYTES, template=CHATML, context=256)
    said = {role: BYTES.decode(part.ids[0][part.keep[0]])
            for role in ("system", "user", "assistant") for part in [chat.only(role)]}  # fmt: skip
    assert said == {"system": "Be kind.", "user": "Who are you?" * 2, "assistant": "I am Pip.I am Pip, again."}
    assert torch.equal(chat.only("user", Role.SYSTEM).keep, chat.without("assistant", "template").keep)
    assert torch.equal(chat.only("template").keep | chat.without("template").keep, chat.keep)
    assert torch.equal(chat.only("user", "assistant").only("user").keep, chat.only("user").keep)
    assert chat.only("user").digest != chat.digest
    assert chat.only("user").rendered == chat.rendered


@given(st.lists(talks(), min_size=2, max_size=5), st.data())
def test_slices_and_splits_hold_what_belongs_to_their_conversations(few, data):
    chat = conversations(few, BYTES, template=CHATML, context=40)
    at = data.draw(st.integers(1, len(few) - 1))
    front, rest = chat[:at], chat[at:]
    for part, some in ((front, few[:at]), (rest, few[at:])):
        again = conversations(some, BYTES, template=CHATML, context=40)
        width = again.ids.shape[1]
        assert isinstance(part, Conversations)
        assert part.rendered == again.rendered
        assert torch.equal(part.is_cut, again.is_cut)
        for name in ("ids", "keep", "roles", "answer_position"):
            assert torch.equal(getattr(part, name)[:, :width], getattr(again, name))
    split, _ = chat.split(front.tokens)
    assert isinstance(split, Conversations)
    assert torch.equal(split.roles, front.roles)


def test_a_digest_knows_the_roles():
    chat = conversations([TALK], BYTES, template=CHATML)
    other = conversations([[{**message, "role": "user"} for message in TALK[:1]]], BYTES, template=PLAIN)
    again = conversations(
        [[{**TALK[0], "role": "tool"}]], BYTES, template=PLAIN.replace("message.role.capitalize()", "'User'")
    )
    assert torch.equal(other.ids, again.ids)
    assert other.digest != again.digest
    assert chat.digest == conversations([TALK], BYTES, template=CHATML).digest


def test_a_long_conversation_is_cut_and_counted():
    chat = conversations([TALK, TALK[:1]], BYTES, template=CHATML, context=32)
    assert chat.ids.shape == (2, 32)
    assert (chat.is_cut.tolist(), chat.cut) == ([True, False], 1)
    assert chat.rendered[0].endswith("again.<|im_end|>\n")
    assert repr(chat) == f"Conversations(2 of up to 32 tokens, 1 of them cut; {chat.tokens} tokens kept)"


def test_a_template_without_bos_drops_its_first_token_and_keeps_its_other_ones():
    chat = conversations([TALK], TOKENIZERS["trimmed"], template=CHATML, context=256)
    assert chat.keep[0].tolist() == [False, *[True] * (chat.ids.shape[1] - 1)]
    assert Role.BOS not in chat.roles


def test_a_harvest_of_answers_has_their_roles():
    chat = conversations([TALK[1:3], TALK[1:]], CHAT).only("assistant")
    stream = harvest(str(CHAT), chat, layers=[3], batch=8, dtype=torch.float32)
    seen = 0
    for x, context, position in stream.with_tokens():
        assert x.shape == (8, 1, 128)
        assert (chat.roles[context, position] == Role.ASSISTANT).all()
        seen += len(x)
    assert seen == chat.tokens // 8 * 8


def test_conversations_come_from_files_datasets_and_lists(tmp_path):
    few = [TALK, TALK[1:2], TALK[1:3]]
    expected = conversations(few, BYTES, template=CHATML)
    lines, whole, bare = tmp_path / "a.jsonl", tmp_path / "b.json", tmp_path / "c.jsonl"
    lines.write_text("".join(json.dumps({"id": 1, "conversation": talk}) + "\n\n" for talk in few))
    whole.write_text(json.dumps([{"messages": talk} for talk in few], indent=1))
    bare.write_text("\n".join(map(json.dumps, few)))
    dataset = datasets.Dataset.from_dict({"chat": few, "messages": [[]] * 3})
    for source, column in (
        (lines, None), (str(lines), "conversation"), (whole, None), (bare, None), (dataset, "chat"), (iter(few), None),
        ([{"conversations": talk} for talk in few], None),
    ):  # fmt: skip
        made = conversations(source, BYTES, template=CHATML, column=column)
        assert made.rendered == expected.rendered
        assert made.digest == expected.digest


def test_a_tool_speaks_too():
    chat = conversations([[*TALK, {"role": "tool", "content": "42"}]], BYTES, template=CHATML, context=256)
    assert BYTES.decode(chat.ids[chat.roles == Role.TOOL]) == "42"


MESSAGE = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ([], "needs at least one conversation, got none"),
        ([[MESSAGE], []], "conversation 1 has no messages; take it out"),
        ([[MESSAGE], [MESSAGE, {"role": "human", "content": "a"}]], "message 1 of conversation 1 has the role 'human', "
            "and the roles of messages are system, user, assistant, tool; rename it"),
        ([[{"from": "human", "value": "a"}]], 'message 0 of conversation 0 needs a "role" and a "content" that are '
            "strings, got the entries from, value"),
        ([[{"role": "user", "content": None}]], 'a "content" that are strings, got the entries role, content'),
        ([["hello"]], 'message 0 of conversation 0 needs a "role" and a "content" that are strings, got str'),
        (["hello"], "conversation 0 is a list of messages .* got str"),
        ([MESSAGE], "conversation 0 is a single message; give a list of conversations"),
        ([{"text": "a", "id": 1}], 'conversation 0: a record needs a column "messages", got the columns text, id; name '
            "it by column="),
        ([{"messages": "a"}], "conversation 0 is a list of messages .* got str; name another column by column="),
        ([[{"role": "user", "content": "a\ud800"}]], "message 0 of conversation 0: half of a surrogate pair"),
        (datasets.DatasetDict(train=datasets.Dataset.from_dict({"messages": [[MESSAGE]]})),
            r"got DatasetDict with the splits train; give one of them, such as data\['train'\]"),
    ],
)  # fmt: skip
def test_what_is_no_conversation_is_named(source, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        conversations(source, BYTES)
    assert len(str(caught.value)) < 350


def test_a_broken_file_is_named_with_its_line(tmp_path):
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": [MESSAGE]}) + "\n\n" + json.dumps({"other": []}))
    with pytest.raises(ValueError, match=r"conversation 1 \(.*chat.jsonl, line 3\): .* got the columns other"):
        conversations(file, BYTES)
    with pytest.raises(ValueError, match='column "chat", got the columns messages'):
        conversations(file, BYTES, column="chat")
    with pytest.raises(FileNotFoundError, match="no chat file 'none.jsonl', and a string that stands alone is a path"):
        conversations("none.jsonl", BYTES)


@pytest.mark.parametrize(
    ("template", "talk", "sentence"),
    [
        (GEMMA, TALK, r"conversation 1: the chat template fails \(System role not supported\); .*template="),
        (LLAMA, [MESSAGE, MESSAGE], r"conversation 1: the chat template fails \(roles must alternate\)"),
        ("{{ messages[0].content + 5 }}", [MESSAGE], "conversation 0: the chat template fails .*str"),
        ("{{ messages[5].content }}", [MESSAGE], "conversation 0: the chat template fails .*has no element 5"),
        ("{% for", [MESSAGE], "conversation 0: the chat template fails"),
        ("{{ messages[0].role }}", [MESSAGE], "leaves out, repeats or rewrites the content of message 0"),
        ("{{ messages[0].content }}" * 2, [MESSAGE], "the content of message 0 .user., so the roles are not certain"),
        ("{{ messages[0].content if messages[0].content | length < 5 }}", [{**MESSAGE, "content": "long one"}],
            "conversation 1: .* the content of message 0"),
        ("{{ messages[0].content | reverse }}", [{**MESSAGE, "content": "ab"}], "the content of message 0"),
        ("{{ messages[0].content | length }}{{ messages[0].content }}", [MESSAGE], "the content of message 0"),
        ("{{ messages[0].content }}{{ messages[0].content | length }}", [MESSAGE], "the content of message 0"),
        ("{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}", TALK,
            "conversation 1: .* message 0 .system.* take the message out"),
    ],
)  # fmt: skip
def test_a_template_that_fails_or_hides_a_content_is_named(template, talk, sentence):
    few = [[MESSAGE], talk]
    with pytest.raises(ValueError, match=sentence) as caught:
        conversations(few, BYTES, template=template)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("<{{ messages[0].content | upper }}>", "<ABCDEFGH>"),
        ("<{{ messages[0].content[:3] }}>", "<abc>"),
        ("<{{ messages[0].content.split('d')[-1] }}>", "<efgh>"),
        ("<{{ messages[0].content | replace('d', '--') }}>", "<abc--efgh>"),
    ],
)
def test_a_content_that_is_changed_where_it_stands_keeps_its_role(template, text):
    chat = conversations([[{"role": "user", "content": "abcdefgh"}]], BYTES, template=template)
    assert chat.rendered == (text,)
    assert BYTES.decode(chat.ids[chat.roles == Role.USER]) == text[1:-1]


def test_what_a_template_writes_because_of_a_content_is_not_of_that_content():
    template = "{% for m in messages %}{{ 'loud: ' if '!' in m.content else 'soft: ' }}{{ m.content }}|{% endfor %}"
    chat = conversations([[{**MESSAGE, "content": "hey!"}, MESSAGE]], BYTES, template=template)
    assert chat.rendered == ("loud: hey!|soft: a|",)
    assert BYTES.decode(chat.ids[chat.roles == Role.USER]) == " hey! a"


def test_marks_say_what_an_answer_is_where_its_content_is_rewritten():
    template = "{% for m in messages %}{% generation %}{{ m.content | reverse }}{% endgeneration %}|{% endfor %}"
    chat = conversations([[{"role": "assistant", "content": "abc"}]], BYTES, template=template)
    assert chat.rendered == ("cba|",)
    assert BYTES.decode(chat.ids[chat.roles == Role.ASSISTANT]) == "cba"


def test_an_empty_content_that_a_template_leaves_out_is_no_fault():
    template = "{% for m in messages if m.content %}{{ m.role }}: {{ m.content }}{% endfor %}"
    chat = conversations([[MESSAGE, {"role": "assistant", "content": ""}]], BYTES, template=template)
    assert chat.rendered == ("user: a",)


def test_a_tokenizer_without_a_template_or_offsets_is_refused():
    with pytest.raises(ValueError, match="has no chat template; give one as template=.* tokenizer of the chat model"):
        conversations([[MESSAGE]], make_tokenizer())
    with pytest.raises(ValueError, match="needs a tokenizer that says which characters .* SimpleNamespace does not"):
        conversations([[MESSAGE]], SimpleNamespace(is_fast=False))


@pytest.mark.parametrize("context", [1, 0, 2.5, True])
def test_a_context_too_short_is_refused(context):
    with pytest.raises(ValueError, match=f"at least one more, got context={context}"):
        conversations([TALK], BYTES, context=context)


def test_roles_and_masks_that_leave_nothing_are_refused():
    chat = conversations([TALK[1:3]], BYTES)
    for ask in (chat.only, chat.without):
        with pytest.raises(ValueError, match="a role is one of padding, bos, template, .*got 'human'"):
            ask("human")
    with pytest.raises(ValueError, match=r"only\(system\) leaves no token .* template, user, assistant; choose"):
        chat.only("system")
    with pytest.raises(ValueError, match=r"only\(\) leaves no token"):
        chat.only()
    with pytest.raises(ValueError, match=r"where needs a bool .*, \(contexts=1, context=\d+\), got torch.int8"):
        chat.where(chat.roles)
    with pytest.raises(ValueError, match="where leaves no token"):
        chat.where(chat.answer_position > 99)
