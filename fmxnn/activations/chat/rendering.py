"""One string of a conversation, and who wrote which of its characters; needs transformers."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from fmxnn.activations.chat.roles import SPOKEN, Role, Span
from fmxnn.core.excerpt import cut

Message = dict[str, str]
_MARKS = re.compile(r"\{%[-+]?\s*generation\b")
_PRIVATE = range(0xE000, 0xF900)  # characters that Unicode gives no meaning


@dataclass(frozen=True)
class Rendered:
    """The string of a conversation, and the characters that its messages wrote.

    ```python
    from fmxnn.activations.chat.rendering import Rendered
    from fmxnn.activations.chat.roles import Role, Span

    Rendered("User: hello", (Span(6, 11, Role.USER),))
    ```
    """

    text: str
    spans: tuple[Span, ...]


class ChatTemplate:
    """Renders conversations by the chat template of a tokenizer, or by another Jinja string.

    ```python
    from fmxnn.activations.chat.rendering import ChatTemplate
    from fmxnn.activations.models import open_tokenizer

    template = ChatTemplate(open_tokenizer("examples/tiny-lm-chat"))
    template.render([{"role": "user", "content": "Who are you?"}], "conversation 0").text
    ```
    """

    def __init__(self, tokenizer: Any, template: str | None = None):
        name = str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
        try:
            self.template = cast(str, tokenizer.get_chat_template(template))
        except ValueError as error:
            raise ValueError(
                f"the tokenizer {cut(name)} has no chat template; give one as template=, a Jinja string, or take the "
                "tokenizer of the chat model"
            ) from error
        self.special_tokens = cast(dict[str, Any], tokenizer.special_tokens_map)

    def render(self, messages: Sequence[Message], where: str) -> Rendered:
        """The string of a conversation; `where` names it in an error.

        What stands between `{% generation %}` marks is the assistant's. The place of any other content is where
        another content makes the string differ.

        Raises ValueError for a template that fails, and for one that leaves out, repeats or rewrites a content so that
        its place is not certain.
        """
        text, marks = self._string(messages, where, marked=_MARKS.search(self.template) is not None)
        spans = [Span(start, stop, Role.ASSISTANT) for start, stop in marks]
        for number, message in enumerate(messages):
            role, found = SPOKEN[message["role"]], self._place(messages, number, text, where)
            is_seen = found is not None and found[0] < found[1]
            is_marked = role is Role.ASSISTANT and bool(marks)
            if message["content"].strip() and not is_seen and not is_marked:
                raise ValueError(
                    f"{where}: the template leaves out, repeats or rewrites the content of message {number} "
                    f"({message['role']}), so the roles are not certain; take the message out, or give a template "
                    "that writes each content once"
                )
            if found is not None and not any(found[0] < stop and start < found[1] for start, stop in marks):
                spans.append(Span(*found, role))
        return Rendered(text, tuple(spans))

    def _place(self, messages: Sequence[Message], number: int, text: str, where: str) -> tuple[int, int] | None:
        """The characters of one content, if what stands around it is the same around another content."""
        content = messages[number]["content"]
        first, last = _absent(text, content)
        for other in (first + content + last, first + last):
            changed = {**messages[number], "content": other}
            given, _ = self._string([*messages[:number], changed, *messages[number + 1 :]], where, marked=False)
            before, _, rest = given.partition(first)
            _, _, after = rest.partition(last)
            stop = len(text) - len(after)
            once = given.count(first) == rest.count(last) == given.count(last) == 1
            if once and len(before) <= stop and text.startswith(before) and text.endswith(after):
                return len(before), stop
        return None

    def _string(self, messages: Sequence[Message], where: str, *, marked: bool) -> tuple[str, list[tuple[int, int]]]:
        """The string, and the characters between which generation marks stand."""
        try:
            texts, marks = cast(
                tuple[list[str], list[list[tuple[int, int]]]],
                render_jinja_template(
                    conversations=[list(messages)],
                    chat_template=self.template,
                    return_assistant_tokens_mask=marked,
                    **self.special_tokens,
                ),
            )
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise ValueError(
                f"{where}: the chat template fails ({cut(str(error))}); change the conversation or give another "
                "template="
            ) from error
        return texts[0], marks[0] if marked else []


def _absent(*texts: str) -> tuple[str, str]:
    """Two characters that are in none of the texts."""
    used = set[str]().union(*texts)
    first, last = islice((character for character in map(chr, _PRIVATE) if character not in used), 2)
    return first, last
