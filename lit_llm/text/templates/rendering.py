r"""Render a conversation with a Jinja chat template, and find the spans of the contents in the text.

It works on characters, not on token ids; `template.py` determines where answers begin and end.

    <|im_start|>user\n What is 2+2? <|im_end|>\n<|im_start|>assistant\n 4 <|im_end|> \n
                       ~~~~literal~~                                    ~literal
                                                                        ^^answer^^^^   supervised, with the stop token
"""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from lit_llm.errors import InputError
from lit_llm.text.conversation import ROLES, Conversation
from lit_llm.text.templates.calls import PROBE_TOOL, Messages, preferred, spelled, strings
from lit_llm.text.templates.jinja import Render

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Rendered:
    """A rendered text with its spans; all spans are character offsets into `text`.

    Args:
        text: The text that the model reads, with special tokens spelled out.
        literals: Spans of contents of other roles: every spelled token in them is plain text.
        assistant_spans: Spans of the assistant's contents: control tokens in them are plain text, but added tokens that
            are not special (`<think>`) are encoded as tokens.
        answers: For each assistant message that the text shows as it was generated: (message index, start, stop); start
            is where the generation prompt ends, stop is after the stop token.
        speakers: (start, stop, role) of each content.
    """

    text: str
    literals: tuple[Span, ...]
    assistant_spans: tuple[Span, ...] = ()
    answers: tuple[tuple[int, int, int], ...] = ()
    speakers: tuple[tuple[int, int, str], ...] = ()


class Renderer:
    """Renders with a Jinja chat template and verifies the structure of the text.

    Args:
        render: `(messages, tools, add_generation_prompt, template_args) -> text`; the tokenizer's sandboxed jinja.
        special_tokens: Spellings that the tokenizer turns into control tokens; a stop token is one of them.
    """

    def __init__(self, render: Render, special_tokens: list[str]) -> None:
        self._render = render
        ordered = sorted(special_tokens, key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, ordered)) or r"(?!)")
        self._skeletons: dict[tuple[Any, ...], list[str] | None] = {}

    def text(self, conversation: Conversation, *, generation_prompt: bool = False) -> str:
        """Render the text.

        Raises:
            InputError: The template refuses this conversation (an unsupported role, repeated roles, tools).
        """
        messages, tools = conversation.to_openai(), [dict(tool) for tool in conversation.tools] or None
        reason = ""
        if any(message.in_parts for message in conversation.messages) and self._wants_parts:
            messages = [raw | {"content": [{"type": "text", "text": raw["content"]}]} if message.in_parts else raw
                        for raw, message in zip(messages, conversation.messages, strict=True)]
        for form in self._forms(messages):
            try:
                return self._render(form, tools, generation_prompt, conversation.template_args)
            except InputError as error:
                if error.what.startswith("the chat template"):
                    raise
                reason = reason or error.what
            except Exception as error:              # a template is untrusted code and may raise anything
                reason = reason or str(error)[:200] or type(error).__name__
        if tools is None and "NoneType" in reason and self._renders(messages, [PROBE_TOOL]):
            reason = "it is a template for tools, and this conversation has none"
        raise InputError(f"the chat template refuses this conversation: {reason}")

    def _renders(self, messages: Messages, tools: list[dict]) -> bool:
        with suppress(Exception):
            return bool(self._render(messages, tools, False, {}))
        return False

    def _forms(self, messages: Messages) -> Iterator[Messages]:
        """The messages with the arguments of calls as text or as objects, the preferred form first."""
        if not any(message.get("tool_calls") for message in messages):
            yield messages
            return
        as_object, as_text = self._arguments
        if as_object and as_text:
            yield messages                              # as in the record
        elif as_object or as_text:
            yield spelled(messages, as_text=as_text)
        yield spelled(messages, as_text=as_text)
        yield spelled(messages, as_text=not as_text)

    @cached_property
    def _wants_parts(self) -> bool:
        """Whether the template shows contents only if they are a list of parts."""
        def shown(content: object) -> bool:
            with suppress(Exception):
                return "probed" in self._render([{"role": "user", "content": content}], None, False, {})
            return False

        return not shown("probed") and shown([{"type": "text", "text": "probed"}])

    @cached_property
    def _arguments(self) -> tuple[bool, bool]:
        """Whether the template renders a call's arguments correctly as objects, and whether as text."""
        return preferred(lambda messages: self._render(messages, [PROBE_TOOL], False, {}))

    # ---- spans of contents -------------------------------------------------------------------------------------------

    def contents(self, conversation: Conversation, text: str, generation_prompt: bool) -> list[tuple[int, Span]]:
        """(message index, span) of contents in `text`: of all roles, or of all roles but the assistant.

        Templates that rewrite answers (they drop earlier reasoning) still render the contents of other roles unchanged.
        """
        for roles in (ROLES, tuple(role for role in ROLES if role != "assistant"), ()):
            spans = self._literals(conversation, text, generation_prompt, roles)
            if spans is not None:
                break
        for place, message in enumerate(conversation.messages):
            if message.role not in roles:
                self.refuse_forgery(f"message {place + 1}", message.content)
        return spans or []

    def _literals(self, conversation: Conversation, text: str, generation_prompt: bool,
                  roles: tuple[str, ...]) -> list[tuple[int, Span]] | None:
        """(message index, span) of every content of these roles, or None where the template changed one of them.

        The same conversation is rendered again with a marker in place of each content; the text between the markers is
        the template's own. If these parts with the contents between them equal `text`, the spans are proven.
        """
        pieces = self._skeleton(conversation, text, generation_prompt, roles)
        if pieces is None or not text.startswith(pieces[0]):
            return None
        spans, at = [], len(pieces[0])
        for number, own in zip(pieces[1::2], pieces[2::2], strict=True):
            place = int(number)
            for content in _as_written(conversation.messages[place].content):
                if text.startswith(content + own, at):
                    spans.append((place, (at, at + len(content))))
                    at += len(content) + len(own)
                    break
            else:
                return None
        return spans if at == len(text) else None

    def _skeleton(self, conversation: Conversation, text: str, generation_prompt: bool,
                  roles: tuple[str, ...]) -> list[str] | None:
        """The template's own text around markers, with the markers' numbers between; None where it refuses them.

        It contains no contents, so it is shared by conversations of the same shape: same roles, only contents differ.
        """
        plain = not conversation.tools and all(message.is_plain for message in conversation.messages)
        shared = plain and all(message.role in roles for message in conversation.messages)
        mark = _unused([text, *(message.content for message in conversation.messages), *(
            () if plain else [*strings(conversation.to_openai()), *strings(conversation.tools)])])
        own = json.dumps(conversation.template_args, default=str) if conversation.template_args else ""
        shape = (mark, generation_prompt, roles, own, *((message.role, bool(message.content), message.in_parts)
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

    def refuse_forgery(self, where: str, value: object) -> None:
        """Refuse strings that spell a control token, also within lists and objects."""
        for text in strings(value):
            if match := self.special.search(text):
                raise InputError(f"{where} spells the control token {match[0]!r} at a place that the chat template may "
                                 "rewrite, so it could be taken for a token of the template")


def _as_written(content: str) -> Iterator[str]:
    """A content and its trimmed forms, as templates render them."""
    seen = set()
    for form in (content, content.strip(), content.lstrip(), content.rstrip(), content.strip("\n"),
                 content.lstrip("\n"), content.rstrip("\n")):
        if form not in seen:
            seen.add(form)
            yield form


def _unused(texts: list[str]) -> str:
    """A private-use character that none of the texts contains."""
    for mark in map(chr, range(0xF8FF, 0xDFFF, -1)):
        if not any(mark in text for text in texts):
            return mark
    raise InputError("this conversation uses every private-use character of Unicode")
