"""Split the text of an answer into reasoning, content and tool calls while it is generated."""

import json
import secrets
import string
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from lit_llm.text.replies.source import NAME, EndError, MismatchError, Reader, Source
from lit_llm.text.replies.syntax import CallSyntax, Keyed, Reasoning, keyed_value, types_of

LETTERS = string.ascii_letters + string.digits
MOST_CALLS = 128                                        # further calls are read as content


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of an answer.

    Args:
        kind: `reasoning`, `content`, `call` (a call begins) or `arguments` (text of the arguments of the last call).
        text: The text, or the name of the called function.
        index: Number of the call.
        call_id: Id of the call, for `call`: nine letters and digits, the only form that every chat template accepts.
    """

    kind: Literal["reasoning", "content", "call", "arguments"]
    text: str
    index: int = 0
    call_id: str = ""


@dataclass(slots=True)
class Reply:
    """A whole answer; each call is the name of the function and the text of its arguments."""

    content: str = ""
    reasoning: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)


class ReplyParser:
    """Reads an answer piece by piece.

    A call of a function that the request does not have, and a call that is not written as the template writes it, are
    content.

    Args:
        reasoning: The tags of reasoning; null if the template has none.
        in_reasoning: Whether the prompt has opened the block.
        syntax: How calls are written; null where the request has no tools.
        functions: Name of each function -> JSON schema of its arguments.
    """

    def __init__(self, reasoning: Reasoning | None = None, *, in_reasoning: bool = False,
                 syntax: CallSyntax | None = None, functions: Mapping[str, dict[str, Any]] | None = None) -> None:
        self._reasoning, self._in_reasoning = reasoning, in_reasoning
        self._syntax, self._functions = syntax, functions or {}
        self._source, self._parts = Source(), list[Part]()
        self.calls = 0                                  # begun so far
        self._reader = self._read()

    def push(self, text: str, *, final: bool = False) -> list[Part]:
        """Add text, and return the parts that are complete; with `final` all of the rest."""
        self._source.text += text
        self._source.ended |= final
        with suppress(StopIteration):
            next(self._reader)
        parts, self._parts = self._parts, []
        return parts

    def whole(self, text: str, size: int = 0) -> Reply:
        """Read a whole text, which arrives in pieces of `size` characters; 0 is all at once."""
        reply, size = Reply(), size or len(text) or 1
        for at in range(0, len(text) or 1, size):
            for part in self.push(text[at:at + size], final=at + size >= len(text)):
                if part.kind == "call":
                    reply.calls.append((part.text, ""))
                elif part.kind == "arguments":
                    name, arguments = reply.calls[part.index]
                    reply.calls[part.index] = (name, arguments + part.text)
                elif part.kind == "reasoning":
                    reply.reasoning += part.text
                else:
                    reply.content += part.text
        return reply

    def _read(self) -> Reader[None]:
        if self._reasoning is not None:
            yield from self._read_reasoning(self._reasoning)
        yield from self._read_answer()

    def _read_reasoning(self, tags: Reasoning) -> Reader[None]:
        source = self._source
        start = source.at
        try:
            if not self._in_reasoning:
                yield from source.literal(tags.start)
            yield from source.spaces()
        except (EndError, MismatchError):
            source.at = start
            return
        if (yield from self._show_until(tags.end.strip(), "reasoning")):
            yield from source.spaces()

    def _read_answer(self) -> Reader[None]:
        syntax = self._syntax
        if syntax is None:
            yield from self._show_until("", "content")
        elif syntax.marker:
            while (yield from self._show_until(syntax.marker, "content", consume=False)):
                if not (yield from self._calls(syntax)):
                    source, start = self._source, self._source.at
                    source.at = source.text.index(syntax.marker, start) + 1
                    self._show("content", source.text[start:source.at])
        else:                                           # calls without a marker are the whole answer
            yield from self._calls(syntax)
            yield from self._show_until("", "content")

    def _show(self, kind: Literal["reasoning", "content"], text: str) -> None:
        if text:
            self._parts.append(Part(kind, text))

    def _show_until(self, tag: str, kind: Literal["reasoning", "content"], *, consume: bool = True) -> Reader[bool]:
        """Show text up to the white space before a tag, or to the end.

        Returns:
            Whether the tag was found; the position is then before that white space, or behind the tag with `consume`.
        """
        source = self._source
        while True:
            position = source.text.find(tag, source.at) if tag else -1
            if position >= 0:
                text = source.text[source.at:position].rstrip()
                self._show(kind, text)
                source.at = position + len(tag) if consume else source.at + len(text)
                return True
            end = len(source.text)
            if tag:
                end -= next((size for size in range(min(len(tag) - 1, end - source.at), 0, -1)
                             if source.text.endswith(tag[:size])), 0)
                while end > source.at and source.text[end - 1].isspace():
                    end -= 1
            if source.ended:
                end = len(source.text)
            self._show(kind, source.text[source.at:end])
            source.at = max(source.at, end)
            if not (yield from source.more()):
                return False

    # ---- calls -------------------------------------------------------------------------------------------------------

    def _calls(self, syntax: CallSyntax) -> Reader[bool]:
        """Read calls; false, with the position as before, if there is none."""
        source = self._source
        start, before, begun = source.at, self.calls, self.calls
        try:
            yield from source.spaces()
            yield from source.literal(syntax.opening)
            while self.calls < MOST_CALLS:
                begun = self.calls
                yield from self._call(syntax)
                start = source.at
                if syntax.separator.strip() and (yield from source.follows(syntax.separator)):
                    yield from source.literal(syntax.separator)
                elif syntax.separator.strip() or not (yield from source.follows(syntax.begin)):
                    break
            begun = self.calls
            if (yield from source.follows(syntax.closing)):
                yield from source.literal(syntax.closing)
                start = source.at
        except MismatchError:
            if self.calls == begun:
                source.at = start
        except EndError:                                # max_tokens ended the answer within a call: no content
            rest, tag = source.text[start:].strip(), (syntax.opening + syntax.begin).strip()
            if self.calls > before or (syntax.marker and len(rest) > len(tag)):
                source.at = len(source.text)
                return True
            source.at = start
        if self.calls > before:
            yield from source.spaces()                  # white space around calls is not content
        return self.calls > before

    def _call(self, syntax: CallSyntax) -> Reader[None]:
        yield from self._source.literal(syntax.begin)
        call = _Call(self)
        if syntax.object_keys:
            yield from self._source.spaces()
            yield from self._object(call, *syntax.object_keys, as_text=syntax.as_text)
        else:
            yield from self._in_order(call, syntax)
        with suppress(EndError, MismatchError):         # a model may end its answer there
            yield from self._source.literal(syntax.end)

    def _object(self, call: "_Call", name_key: str, arguments_key: str, *, as_text: bool) -> Reader[None]:
        source = self._source
        yield from source.exactly("{")
        while True:
            yield from source.spaces()
            key = yield from source.string()
            yield from source.literal(":")
            yield from source.spaces()
            if key == name_key:
                call.name((yield from source.string()))
            elif key == arguments_key:
                yield from self._arguments(call, as_text=as_text)
            else:
                yield from source.value(lambda text: None)
            yield from source.spaces()
            if (yield from source.char()) == "}":
                break
            yield from source.exactly(",")
        source.at += 1
        call.finish()

    def _arguments(self, call: "_Call", *, as_text: bool) -> Reader[None]:
        if as_text and (yield from self._source.char()) == '"':
            call.show((yield from self._source.string()))
        else:
            yield from self._source.value(call.show)

    def _in_order(self, call: "_Call", syntax: CallSyntax) -> Reader[None]:
        source = self._source
        yield from source.spaces()
        if syntax.name_first:
            call.name((yield from source.match(NAME)))
            yield from source.literal(syntax.middle)
        if syntax.keyed is not None:
            yield from self._keyed(call, syntax.keyed, syntax.after)
        else:
            yield from source.spaces()
            if (yield from source.char()) not in '{"':
                raise MismatchError
            yield from self._arguments(call, as_text=syntax.as_text)
        if not syntax.name_first:
            yield from source.literal(syntax.middle)
            yield from source.spaces()
            call.name((yield from source.match(NAME)))
        call.finish()

    def _keyed(self, call: "_Call", keyed: Keyed, after: str) -> Reader[None]:
        source, first = self._source, True
        schema = self._functions.get(call.called, {})
        properties = schema.get("properties")
        while True:
            yield from source.spaces()
            if not first and keyed.separator.strip():
                if not (yield from source.follows(keyed.separator)):
                    break
                yield from source.literal(keyed.separator)
            if keyed.key_start.strip():
                if not (yield from source.follows(keyed.key_start)):
                    break
                yield from source.literal(keyed.key_start)
            elif first and (yield from source.follows(after)):
                break
            yield from source.spaces()
            key = yield from source.match(NAME)
            yield from source.literal(keyed.key_end)
            text = yield from self._keyed_text(keyed)
            kinds = types_of(properties.get(key), schema) if isinstance(properties, dict) else set()
            value = json.dumps(keyed_value(text, keyed.quoting, kinds), ensure_ascii=False, default=str)
            call.show(f"{'{' if first else ', '}{json.dumps(key, ensure_ascii=False)}: {value}")
            first = False
        call.show("{}" if first else "}")

    def _keyed_text(self, keyed: Keyed) -> Reader[str]:
        """The text of a value: up to the literal that ends it, or as far as Python's syntax reaches."""
        source = self._source
        if keyed.value_end.strip():
            start = keyed.key_end[len(keyed.key_end.rstrip()):]
            end = keyed.value_end[:len(keyed.value_end) - len(keyed.value_end.lstrip())]
            text: str = yield from source.until(keyed.value_end.strip())
            return text.removeprefix(start).removesuffix(end)
        start_at, depth, quote = source.at, 0, ""
        while True:
            letter = yield from source.char()
            if quote:
                source.at += letter == "\\"
                quote = "" if letter == quote else quote
            elif letter in "\"'":
                quote = letter
            elif depth == 0 and letter in ",)]}":
                return source.text[start_at:source.at].strip()
            else:
                depth += (letter in "([{") - (letter in ")]}")
            source.at += 1


class _Call:
    """A call that is being read: it begins when its name is known, and its arguments wait for that."""

    def __init__(self, parser: ReplyParser) -> None:
        self._parser, self.called, self._waiting = parser, "", list[str]()
        self._shown = False

    def name(self, name: str) -> None:
        if name not in self._parser._functions or self.called:
            raise MismatchError
        self.called = name
        call_id = "".join(secrets.choice(LETTERS) for _ in range(9))
        self._parser._parts.append(Part("call", name, self._parser.calls, call_id))
        self._parser.calls += 1
        for text in self._waiting:
            self.show(text)

    def show(self, text: str) -> None:
        if not self.called:
            self._waiting.append(text)
        else:
            self._shown = True
            self._parser._parts.append(Part("arguments", text, self._parser.calls - 1))

    def finish(self) -> None:
        if not self.called:
            raise MismatchError
        if not self._shown:
            self.show("{}")
