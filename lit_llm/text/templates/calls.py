"""Tool calls in rendered text: whether a text shows them, and which form of arguments a chat template needs.

The arguments of a call are an object, or JSON text as OpenAI sends them; chat templates differ in which of the two they
render correctly.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any

ENTITY = re.compile(r"&(?:#\d+|#x[0-9a-fA-F]+|lt|gt|amp|quot|apos);")
PROBE_TOOL = {"type": "function", "function": {
    "name": "probe", "description": "", "parameters": {"type": "object", "properties": {}, "required": []}}}
PROBED = {"probe_place": 'Kyoto "1"', "probe_days": 37}
RIGHT, SHOWN, QUOTED, BAD = 3, 2, 1, 0                  # how a text renders a call's arguments
MOST = 5000                                             # positions of a text at which JSON is searched for
Messages = list[dict[str, Any]]


def arguments_of(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments as an object."""
    arguments = call["function"]["arguments"]
    parsed: dict[str, Any] = json.loads(arguments) if isinstance(arguments, str) else arguments
    return parsed


def spelled(messages: Messages, *, as_text: bool) -> Messages:
    """The same messages with every call's arguments as an object or as JSON text; existing text is unchanged."""
    def one(call: dict[str, Any]) -> dict[str, Any]:
        arguments = call["function"]["arguments"]
        if isinstance(arguments, str) == as_text:
            return call
        own = json.dumps(arguments, ensure_ascii=False, default=str) if as_text else json.loads(arguments)
        return call | {"function": call["function"] | {"arguments": own}}

    return [message | {"tool_calls": [one(call) for call in message["tool_calls"]]}
            if message.get("tool_calls") else message for message in messages]


def preferred(render: Callable[[Messages], str]) -> tuple[bool, bool]:
    """Whether a template renders arguments correctly that are objects, and whether those that are text.

    A probe call is rendered in both forms, alone and with its result, and parsed from the text.
    """
    scores = {False: 0, True: 0}
    good = {False: True, True: True}
    for calls, text in ((1, ""), (2, ""), (1, "x")):
        question: Messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": text, "tool_calls": [
            {"type": "function", "id": f"abcdefgh{number}", "function": {"name": "probe", "arguments": PROBED}}
            for number in range(calls)]}]
        answered: Messages = [{"role": "tool", "content": "y", "tool_call_id": f"abcdefgh{number}", "name": "probe"}
                    for number in range(calls)]
        for messages in (question, [*question, *answered]):
            quality_of = {}
            for as_text in (False, True):
                quality_of[as_text] = BAD
                with suppress(Exception):               # a template may raise anything
                    quality_of[as_text] = quality(render(spelled(messages, as_text=as_text)), PROBED)
            best = max(quality_of.values())
            for as_text, score in quality_of.items():
                scores[as_text] += score
                good[as_text] &= score == best
    if not any(good.values()):
        good = {form: score == max(scores.values()) for form, score in scores.items()}
    return good[False], good[True]


# ---- what a text shows -----------------------------------------------------------------------------------------------

def quality(text: str, arguments: Mapping[str, object], *sources: Any) -> int:
    """How a text renders a call's arguments: as JSON, key by key, as JSON within a string, or incorrectly.

    An HTML entity that is neither in the arguments nor in the other sources of the text is always incorrect.
    """
    if new_entities(text, arguments, *sources):
        return BAD
    values = list(_values(text))
    if not arguments or any(_holds(value, arguments) for value in values):
        return RIGHT
    inner = [json.loads(value) for value in values if isinstance(value, str) and _is_json(value)]
    if any(_holds(value, arguments) for value in inner):
        return QUOTED
    shown = all(any(form in text for form in _leaf_forms(leaf)) for leaf in [*arguments, *_leaves(arguments)])
    return SHOWN if shown else BAD


def shows_calls(text: str, calls: Sequence[Mapping[str, Any]], *sources: Any) -> bool:
    """Whether calls can be read from a text: the names, and the arguments as JSON or one by one."""
    return all(call["function"]["name"] in text for call in calls) and all(
        quality(text, arguments_of(call), calls, *sources) > BAD for call in calls)


def new_entities(text: str, *sources: Any) -> bool:
    """Whether a text contains an HTML entity that none of the JSON-like values contains."""
    entities = set(ENTITY.findall(text))
    entities_of_sources = (ENTITY.findall(part) for source in sources for part in strings(source))
    return bool(entities and entities.difference(*entities_of_sources))


def shows(text: str, content: str) -> bool:
    """Whether a text contains a content: literally (without white space at its ends), escaped, or as JSON."""
    content = content.strip()
    if not content or any(form.strip() in text for form in escaped(content)):
        return True
    lines = [line.strip() for line in content.split("\n") if line.strip()]
    if len(lines) > 1 and all(line in text for line in lines):
        return True
    return _is_json(content) and any(_holds(value, json.loads(content)) for value in _values(text))


def escaped(text: str) -> Iterator[str]:
    """A text, and its escaped forms in JSON, nested JSON, Python's `repr` and HTML."""
    yield text
    for ascii_only in (False, True):
        once = json.dumps(text, ensure_ascii=ascii_only)[1:-1]
        yield once
        yield json.dumps(once, ensure_ascii=False)[1:-1]
    yield repr(text)[1:-1]


def strings(value: object) -> Iterator[str]:
    """Every string in a JSON-like value, including keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from strings(inner)


def _leaf_forms(leaf: object) -> Iterator[str]:
    if isinstance(leaf, str):
        yield from escaped(leaf)
    else:
        yield from (str(leaf), json.dumps(leaf, default=str))


def _values(text: str) -> Iterator[Any]:
    """Every JSON object, list and string in a text."""
    decoder = json.JSONDecoder()
    for match in islice(re.finditer(r'[{\["]', text), MOST):
        with suppress(ValueError, RecursionError):
            yield decoder.raw_decode(text, match.start())[0]


def _is_json(text: str) -> bool:
    if not text.lstrip().startswith(("{", "[", '"')):
        return False
    with suppress(ValueError, RecursionError):
        json.loads(text)
        return True
    return False


def _holds(value: object, wanted: object) -> bool:
    if value == wanted:
        return True
    inner: Sequence[Any] = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(_holds(one, wanted) for one in inner)


def _leaves(value: object) -> Iterator[Any]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner)
    else:
        yield value
