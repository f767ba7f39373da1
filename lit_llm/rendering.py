r"""A conversation and a jinja chat template in; the text out, with the spans of it that are contents.

Knows characters, never token ids, nor where an answer begins and stops: that is `template.py`'s.

    <|im_start|>user\n What is 2+2? <|im_end|>\n<|im_start|>assistant\n 4 <|im_end|> \n
                       ~~~~literal~~                                    ~literal
                                                                        ^^answer^^^^   supervised: stop token too
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from lit_llm.conversation import ROLES, Conversation
from lit_llm.errors import InputError

Span = tuple[int, int]
PROBE_TOOL = {"type": "function", "function": {
    "name": "probe", "description": "", "parameters": {"type": "object", "properties": {}, "required": []}}}


@dataclass(frozen=True, slots=True)
class Rendered:
    """Text with its anatomy; all spans are character offsets into `text`.

    Args:
        text: What the model reads, special tokens spelled out.
        literals: Where the content of others stands: every spelled token in there is only text.
        words: Where the assistant's content stands: control tokens in there are only text, but what it says with tokens
            that are not special (`<think>`) is read as it said it.
        answers: For each assistant turn that the text shows as it was produced: (message index, start, stop); start is
            where the generation prompt ends, stop lies behind the stop token.
        speakers: (start, stop, role) of each content.
    """

    text: str
    literals: tuple[Span, ...]
    words: tuple[Span, ...] = ()
    answers: tuple[tuple[int, int, int], ...] = ()
    speakers: tuple[tuple[int, int, str], ...] = ()


class Renderer:
    """A jinja chat template, and the proof that what it rendered is understood.

    Args:
        render: `(messages, tools, add_generation_prompt) -> text`; the tokenizer's sandboxed jinja.
        special_tokens: Spellings that the tokenizer turns into control tokens; a stop token is one of them.
    """

    def __init__(self, render: Callable[[list[dict], list[dict] | None, bool], str], special_tokens: list[str]) -> None:
        self._render = render
        ordered = sorted(special_tokens, key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, ordered)) or r"(?!)")
        self._skeletons: dict[tuple[Any, ...], list[str] | None] = {}

    def text(self, conversation: Conversation, *, generation_prompt: bool = False) -> str:
        """The rendered text.

        Raises:
            InputError: The template refuses this conversation (a role it lacks, two equal roles in a row, tools).
        """
        messages, tools = conversation.to_openai(), [dict(tool) for tool in conversation.tools] or None
        try:
            return self._render(messages, tools, generation_prompt)
        except InputError as error:
            if error.what.startswith("the chat template"):
                raise
            reason = error.what
        except Exception as error:                  # a template is a stranger's program: it may raise anything
            reason = str(error)[:200] or type(error).__name__
        if any(message.tool_calls for message in conversation.messages):
            with suppress(Exception):               # some want a call's arguments as OpenAI sends them, JSON text
                return self._render(_with_text_arguments(messages), tools, generation_prompt)
        if tools is None and "NoneType" in reason and self._renders(messages, [PROBE_TOOL]):
            reason = "it is one for tools, and here are none"
        raise InputError(f"the chat template refuses this conversation: {reason}")

    def _renders(self, messages: list[dict], tools: list[dict]) -> bool:
        with suppress(Exception):
            return bool(self._render(messages, tools, False))
        return False

    # ---- where content stands ----------------------------------------------------------------------------------------

    def contents(self, conversation: Conversation, text: str, generation_prompt: bool) -> list[tuple[int, Span]]:
        """(message index, span) of contents in `text`: of all, else of all but the assistant's.

        Templates that rewrite answers (they drop old thinking) still write what others say as it is.
        """
        for roles in (ROLES, tuple(role for role in ROLES if role != "assistant"), ()):
            found = self._literals(conversation, text, generation_prompt, roles)
            if found is not None:
                break
        for place, message in enumerate(conversation.messages):
            if message.role not in roles:
                self.refuse_forgery(f"message {place + 1}", message.content)
        return found or []

    def _literals(self, conversation: Conversation, text: str, generation_prompt: bool,
                  roles: tuple[str, ...]) -> list[tuple[int, Span]] | None:
        """(message index, span) of every content of these roles, or None where the template changed one.

        The same conversation is rendered once more with a mark in place of each content: what stands between the marks
        is the template's own text. If those pieces with the contents between them spell `text`, the spans are proven.
        """
        pieces = self._skeleton(conversation, text, generation_prompt, roles)
        if pieces is None or not text.startswith(pieces[0]):
            return None
        found, at = [], len(pieces[0])
        for number, own in zip(pieces[1::2], pieces[2::2], strict=True):
            place = int(number)
            for content in _as_written(conversation.messages[place].content):
                if text.startswith(content + own, at):
                    found.append((place, (at, at + len(content))))
                    at += len(content) + len(own)
                    break
            else:
                return None
        return found if at == len(text) else None

    def _skeleton(self, conversation: Conversation, text: str, generation_prompt: bool,
                  roles: tuple[str, ...]) -> list[str] | None:
        """The template's own text around marks, with the marks' numbers between; None where it refuses them.

        Contents are gone from it, so conversations of one shape share it: same roles, and nothing but contents.
        """
        plain = not conversation.tools and all(message.is_plain for message in conversation.messages)
        shared = plain and all(message.role in roles for message in conversation.messages)
        mark = _unused([text, *(message.content for message in conversation.messages), *(
            () if plain else [*strings(conversation.to_openai()), *strings(conversation.tools)])])
        shape = (mark, generation_prompt, roles, *((message.role, bool(message.content))
                                                   for message in conversation.messages))
        if shared and shape in self._skeletons:
            return self._skeletons[shape]
        marked = replace(conversation, messages=tuple(
            replace(message, content=f"{mark}{place}{mark}") if message.content and message.role in roles else message
            for place, message in enumerate(conversation.messages)))
        try:
            pieces = re.split(f"{mark}([0-9]+){mark}", self.text(marked, generation_prompt=generation_prompt))
        except InputError:
            pieces = None
        if shared and len(self._skeletons) < 1000:
            self._skeletons[shape] = pieces
        return pieces

    def refuse_forgery(self, where: str, value: Any) -> None:
        """Refuse strings, also within lists and objects, that spell a control token."""
        for text in strings(value):
            if found := self.special.search(text):
                raise InputError(f"{where} spells the control token {found[0]!r} where the chat template may change "
                                 "it, so it could pass for the template's own")


def _with_text_arguments(messages: list[dict]) -> list[dict]:
    """The same messages with each call's arguments as JSON text."""
    return [message | {"tool_calls": [
        call | {"function": call["function"] | {"arguments": json.dumps(call["function"]["arguments"])}}
        for call in message["tool_calls"]]} if "tool_calls" in message else message for message in messages]


def _as_written(content: str) -> Iterator[str]:
    """A content and the trimmed forms in which templates write it."""
    seen = set()
    for form in (content, content.strip(), content.lstrip(), content.rstrip(), content.strip("\n"),
                 content.lstrip("\n"), content.rstrip("\n")):
        if form not in seen:
            seen.add(form)
            yield form


def strings(value: Any) -> Iterator[str]:
    """Every string in a JSON-like value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from strings(inner)


def _unused(texts: list[str]) -> str:
    """A private-use character that none of the texts holds."""
    for mark in map(chr, range(0xF8FF, 0xDFFF, -1)):
        if not any(mark in text for text in texts):
            return mark
    raise InputError("this conversation uses every private-use character of Unicode")
