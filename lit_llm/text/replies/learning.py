"""Learn from a chat template how it writes tool calls and reasoning: render probes, and compare the texts.

What is learned is then proven: calls of many kinds are rendered, parsed and must be equal. A template whose calls do
not read back is refused with the reason.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from lit_llm.errors import InputError
from lit_llm.text.conversation import Conversation, Message
from lit_llm.text.replies.parser import ReplyParser
from lit_llm.text.replies.source import ID
from lit_llm.text.replies.syntax import CallSyntax, Keyed, Reasoning, keyed_value, parameters_of
from lit_llm.text.templates.template import ChatTemplate

NAMES = ("probe_alpha", "probe_beta", "probe_gamma")
IDS = ("probeId01", "probeId02", "probeId03")
QUESTION = Message("user", "x")
CONTENT = "Let me see."
# Arguments of the proof: kinds of values, and texts that templates and parsers get wrong.
PROOFS: tuple[dict[str, Any], ...] = (
    {}, {"text": "Kyoto", "count": 3}, {"text": 'a "quoted" \\ back', "more": "l'eau <b> & </b>"},
    {"text": "东京 🙂 é", "more": "two\nlines\n"}, {"text": "37", "more": "true", "flag": True, "ratio": -2.5},
    {"place": {"city": "Paris", "at": [1, 2.5, {"x": None}]}, "names": ["a", "b, c", "{}"]},
    {"text": "", "flag": False}, {"text": " padded ", "more": "[1, {\"a\": 2}]"},
)
PARTIAL = re.compile(r"[^\s<\[{(]*")                    # of a word, up to where a tag, a bracket or white space begins
TYPES = {"text": "string", "more": "string", "count": "integer", "flag": "boolean", "ratio": "number",
         "place": "object", "names": "array", "key_one": "integer", "key_two": "integer"}
TOOLS: tuple[dict[str, Any], ...] = tuple({"type": "function", "function": {
    "name": name, "description": "A probe.", "parameters": {
        "type": "object", "required": [],
        "properties": {key: {"type": kind, "description": "A value."} for key, kind in TYPES.items()}}}}
    for name in NAMES)


def call_syntax(template: ChatTemplate, tags: Reasoning | None) -> CallSyntax:
    """How a template writes tool calls, proven by reading rendered calls.

    Args:
        template: The template.
        tags: Its tags of reasoning.

    Raises:
        InputError: The template renders no calls, in a form that is not known, or some calls do not read back.
    """
    probe = Probe(template, tags)
    syntax = _learned(probe)
    syntax = replace(syntax, after_content=_shows_content(probe, syntax))
    for arguments in PROOFS:
        _prove(probe, syntax, [arguments])
    if syntax.several:
        _prove(probe, syntax, PROOFS[1:4])
        _prove(probe, syntax, PROOFS[4:6])
    return syntax


def reasoning(template: ChatTemplate, source: str) -> Reasoning | None:
    """The tags around the reasoning of an answer, or null if the template has none.

    Args:
        template: The template.
        source: Its source. Templates that remove reasoning from their texts name the tags there.
    """
    message = Message("assistant", "probed content", reasoning_content="probed reasoning")
    with suppress(InputError):
        prompt = template.text(Conversation((QUESTION,)), generation_prompt=True)
        answer = template.answer_text(Conversation((QUESTION, message)))
        before, separator, rest = answer.partition("probed reasoning")
        between = rest.partition("probed content")[0].strip()
        tag = (prompt + before).split()[-1:] if separator else []
        tag = tag and [tag[0][max(tag[0].rfind("<"), tag[0].rfind("[")):]]
        if tag and between and between != tag[0]:
            return Reasoning(tag[0], between)
    for start, end in (("<think>", "</think>"), ("[THINK]", "[/THINK]")):
        if end in source:
            return Reasoning(start, end)
    return None


# ---- probes ----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True, slots=True)
class Probe:
    """Renders answers with calls.

    Args:
        template: The template.
        tags: Its tags of reasoning; a block that an answer begins with is left out.
    """

    template: ChatTemplate
    tags: Reasoning | None

    def text(self, calls: Sequence[tuple[str, Mapping[str, object]]], content: str = "") -> str:
        """An answer with these calls, without its stop token; `ID` stands for the ids of the calls."""
        made = tuple({"type": "function", "id": id_, "function": {"name": name, "arguments": dict(arguments)}}
                     for id_, (name, arguments) in zip(IDS, calls, strict=False))
        message = Message("assistant", content, tool_calls=made)
        text = self.template.answer_text(Conversation((QUESTION, message), TOOLS))
        ends = [at for stop in (*self.template.stop_tokens, self.template.eos) if (at := text.find(stop)) > 0]
        text = text[:min(ends, default=len(text))]
        if self.tags is not None:
            start, end = re.escape(self.tags.start), re.escape(self.tags.end)
            text = re.sub(rf"\A\s*(?:{start})?\s*{end}\s*", "", text)
        for id_ in IDS:
            text = text.replace(id_, ID)
        return text


def _learned(probe: Probe) -> CallSyntax:
    one, two = {"key_one": 481516, "key_two": 234299}, {"key_one": 108631, "key_two": 777123}
    calls = [(NAMES[0], one), (NAMES[1], two), (NAMES[2], {"key_one": 990017, "key_two": 650041})]
    try:
        alone = probe.text(calls[:1])
    except InputError as error:
        raise InputError(f"the chat template has no tool calls: {error.what}") from None
    form, (start, stop) = _form(alone, *calls[0])
    head, tail = alone[:start], alone[stop:]
    syntax = replace(form, before=head, after=tail)
    with suppress(InputError):
        syntax = _with_several(syntax, head, tail, probe.text(calls[:2]), probe.text(calls), calls)
    syntax = _as_object(syntax)
    if syntax.keyed is not None:
        keyed = replace(syntax.keyed, quoting=_quoting(probe, syntax.keyed))
        syntax = replace(syntax, keyed=keyed)
    return syntax


def _with_several(syntax: CallSyntax, head: str, tail: str, two: str, three: str,
                  calls: Sequence[tuple[str, Mapping[str, object]]]) -> CallSyntax:
    """Divide what surrounds a call: into what begins and ends every call, and what surrounds all of them."""
    spans, at = [], 0
    for call in calls[:2]:
        _, (start, stop) = _form(two[at:], *call)
        spans.append((at + start, at + stop))
        at += stop
    between = two[spans[0][1]:spans[1][0]]
    before = _common_end(head, between)
    after = _common(between[:len(between) - len(before)], tail)
    separator = between[len(after):len(between) - len(before)]
    if two[:spans[0][0]] != head or two[spans[1][1]:] != tail or three.count(between) < 2:
        raise InputError("calls beside each other are written differently")
    return replace(syntax, opening=head[:len(head) - len(before)], before=before, after=after, separator=separator,
                   closing=tail[len(after):], several=True)


def _form(text: str, name: str, arguments: Mapping[str, object]) -> tuple[CallSyntax, tuple[int, int]]:
    """The middle of a call, and its span from the name to the arguments or the other way round."""
    at = text.find(name)
    if at < 0:
        raise InputError(f"the chat template does not show the name of a called function: {text[:80]!r}")
    named = (at, at + len(name))
    for start, stop, as_text in _json_spans(text, arguments):
        first, second = sorted([named, (start, stop)])
        if first[1] <= second[0]:
            middle = text[first[1]:second[0]]
            form = CallSyntax("", "", middle, "", name_first=first == named, as_text=as_text)
            return form, (first[0], second[1])
    return _keyed_form(text, named, arguments)


def _json_spans(text: str, arguments: Mapping[str, object]) -> Iterator[tuple[int, int, bool]]:
    """Where a text has the arguments as a JSON object, or as a JSON string that contains it."""
    decoder = json.JSONDecoder()
    for at, letter in enumerate(text):
        if letter in '{"':
            with suppress(ValueError):
                value, stop = decoder.raw_decode(text, at)
                if value == arguments:
                    yield at, stop, False
                elif isinstance(value, str) and json.loads(value) == arguments:
                    yield at, stop, True


def _keyed_form(text: str, named: tuple[int, int], arguments: Mapping[str, Any]) -> tuple[CallSyntax, tuple[int, int]]:
    """The literals of a call whose arguments are written one by one."""
    at, edges = named[1], list[tuple[int, int]]()
    for pair in arguments.items():
        for part in map(str, pair):
            begin = text.find(part, at)
            if begin < 0:
                raise InputError(f"the chat template writes calls in a form that cannot be read back: {text[:80]!r}")
            at = begin + len(part)
            edges.append((begin, at))
    (key, value), (other, other_value) = zip(edges[::2], edges[1::2], strict=True)
    head, between, tail = text[named[1]:key[0]], text[value[1]:other[0]], text[other_value[1]:]
    key_start = _from_tag(_common_end(head, between))
    if not key_start.strip():                           # `name(key=value, key=value)`: white space belongs to the comma
        key_start = ""
    value_end = _common(between[:len(between) - len(key_start)], tail)
    separator = between[len(value_end):len(between) - len(key_start)]
    if text[other[1]:other_value[0]] != text[key[1]:value[0]]:
        raise InputError("the chat template writes the arguments of a call in different forms")
    keyed = Keyed(key_start, text[key[1]:value[0]], value_end, separator, "raw")
    form = CallSyntax("", "", head[:len(head) - len(key_start)], "", keyed=keyed)
    return form, (named[0], other_value[1] + len(value_end))


def _as_object(syntax: CallSyntax) -> CallSyntax:
    """Recognize a call that is a JSON object with the name and the arguments as values of two keys."""
    if syntax.keyed is not None:
        return syntax
    sample = '"{}"' if syntax.as_text else "{}"
    fields = (NAMES[0], sample) if syntax.name_first else (sample, NAMES[0])
    text = (syntax.before + fields[0] + syntax.middle + fields[1] + syntax.after).replace(ID, IDS[0])
    at = syntax.before.rfind("{")
    with suppress(ValueError):
        value = json.JSONDecoder().raw_decode(text, at)[0] if at >= 0 else None
        keys = {json.dumps(inner): key for key, inner in value.items()} if isinstance(value, dict) else {}
        if json.dumps(NAMES[0]) in keys and json.dumps(json.loads(sample)) in keys:
            return replace(syntax, object_keys=(keys[json.dumps(NAMES[0])], keys[json.dumps(json.loads(sample))]))
    return syntax


def _quoting(probe: Probe, keyed: Keyed) -> Any:
    """Whether a string value is written as it is, or quoted."""
    text = probe.text([(NAMES[0], {"text": "probed value"})])
    start = text.index("text" + keyed.key_end) + len("text" + keyed.key_end)
    written = text[start:].partition(keyed.value_end.strip() or ")")[0].strip()
    if keyed_value(written, "json", set()) != "probed value":
        raise InputError(f"the chat template writes string arguments in an unknown form: {written[:40]!r}")
    return "raw" if written == "probed value" else "json"


# ---- proofs ----------------------------------------------------------------------------------------------------------

def read(syntax: CallSyntax, text: str, tools: Sequence[Mapping[str, object]], size: int = 0) -> tuple[str, list[Any]]:
    """Content and calls `(name, arguments)` of a text; it arrives in pieces of `size` characters, 0 for all at once."""
    reply = ReplyParser(syntax=syntax, functions=parameters_of(tools)).whole(text, size)
    return reply.content, [(name, json.loads(arguments)) for name, arguments in reply.calls]


def _shows_content(probe: Probe, syntax: CallSyntax) -> bool:
    """Whether calls are read behind a content."""
    with suppress(InputError, ValueError):
        call = (NAMES[0], PROOFS[1])
        return read(syntax, probe.text([call], CONTENT), TOOLS) == (CONTENT, [call])
    return False


def _prove(probe: Probe, syntax: CallSyntax, arguments: Sequence[dict[str, Any]]) -> None:
    """Render calls, read them whole and in pieces, and compare.

    Raises:
        InputError: They are not equal.
    """
    calls = list(zip(NAMES, arguments, strict=False))
    content = CONTENT if syntax.after_content and len(calls) > 1 else ""
    shown = json.dumps(list(arguments), ensure_ascii=False)[:100]
    try:
        text = probe.text(calls, content)
    except InputError as error:
        raise InputError(f"the chat template does not render calls with the arguments {shown}: {error.what}") from None
    for size in (0, 1, 3):
        try:
            parsed = read(syntax, text, TOOLS, size)
        except ValueError:
            parsed = ("", [])
        if parsed != (content, calls):
            raise InputError(f"the chat template writes calls that do not read back: the arguments {shown} are "
                             f"rendered as {text[:160]!r}")


def _common(one: str, other: str) -> str:
    size = next((at for at, (left, right) in enumerate(zip(one, other, strict=False)) if left != right), None)
    return one[:min(len(one), len(other)) if size is None else size]


def _common_end(one: str, other: str) -> str:
    """The common end of two literals, from the beginning of a tag, a bracket or white space."""
    common = _common(one[::-1], other[::-1])[::-1]
    return common if common == one else _from_tag(common)


def _from_tag(text: str) -> str:
    return text[len(PARTIAL.match(text)[0]):]           # type: ignore[index]
