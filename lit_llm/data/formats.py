"""One record in, one Document or Conversation out.

Pure functions, one per format of the field; `recognise` tells them apart by their keys. Whatever is wrong is an
InputError that says what would be right. Knows nothing of files, tokens or templates.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from lit_llm.conversation import ALIASES, ROLES, Conversation, Document
from lit_llm.errors import InputError, did_you_mean

SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
                  "function_call": "assistant", "observation": "tool", "tool": "tool", "function_response": "tool"}


def convert(record: dict[str, Any] | str, *, format: str = "auto",
            columns: Mapping[str, str] | None = None) -> Document | Conversation:
    """What a record means.

    Args:
        record: A parsed object, or the text of a document.
        format: A name in `FORMATS`, or `auto`.
        columns: Our key to the record's own, `{"prompt": "question"}`; the record's key no longer counts as itself.

    Raises:
        InputError: An unknown format, a missing key, a wrong type, nothing to learn from.

    >>> convert({"q": "1+1?", "a": "2"}, columns={"prompt": "q", "completion": "a"}).messages[1].content
    '2'
    """
    if format != "auto" and format not in FORMATS:
        raise InputError(f"unknown format '{format}'; use auto, {', '.join(FORMATS)}."
                         f"{did_you_mean(format, list(FORMATS))}")
    if isinstance(record, str):
        if format not in ("auto", "text"):
            raise InputError(f"format '{format}' needs objects with keys, and this file is plain text")
        return Document(record)
    if columns:
        record = _renamed(record, columns)
    return FORMATS[recognise(record) if format == "auto" else format](record)


def recognise(record: Mapping[str, Any]) -> str:
    """The name of the format that a record's keys show.

    Raises:
        InputError: None fits; it names the keys there are.

    >>> recognise({"instruction": "hi", "output": "hello"})
    'alpaca'
    """
    if "chosen" in record and "rejected" in record:
        raise InputError("this is a preference record (chosen, rejected); fine-tuning here learns from one answer",
                         fix="Make it prompt and completion: `columns: {prompt: ..., completion: chosen}`.")
    for key in ("messages", "conversations"):
        turns = record.get(key)
        if isinstance(turns, list):
            return "sharegpt" if turns and isinstance(turns[0], Mapping) and "from" in turns[0] else "messages"
    if isinstance(record.get("conversation"), list):
        return "firefly"
    for name, keys in (("alpaca", ("instruction", "output")), ("prompt", ("prompt", "completion")),
                       ("firefly", ("kind", "input", "target")), ("text", ("text",))):
        if all(key in record for key in keys):
            return name
    raise InputError(f"no known format has the keys {_keys(record)}",
                     fix="Map them, for instance `columns: {prompt: question, completion: answer}`; known are text; "
                         "instruction, input, output; prompt, completion; messages; conversations.")


# ---- the formats -----------------------------------------------------------------------------------------------------

def text(record: Mapping[str, Any]) -> Document:
    """`{"text": ...}`; a list of strings (verses, paragraphs) is joined by newlines."""
    value = _need(record, "text")
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        value = "\n".join(value)
    return Document(_string(value, "text"))


def alpaca(record: Mapping[str, Any]) -> Conversation:
    """`instruction`, `input` (below the instruction, may be empty), `output`, with optional `system` and `history`."""
    asked = [_string(_need(record, "instruction"), "instruction"), _string(record.get("input") or "", "input")]
    answer = _string(_need(record, "output"), "output")
    if not answer.strip():
        raise InputError("output is empty: nothing to learn from")
    messages = []
    if record.get("system"):
        messages.append({"role": "system", "content": _string(record["system"], "system")})
    for number, pair in enumerate(record.get("history") or [], start=1):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise InputError(f"history {number} must be a pair [question, answer], not {json.dumps(pair)[:40]}")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    messages += [{"role": "user", "content": "\n".join(part for part in asked if part)},
                 {"role": "assistant", "content": answer}]
    return Conversation.from_openai(messages)


def messages(record: Mapping[str, Any]) -> Conversation:
    """OpenAI's `messages`, or `conversations` with role and content; optional `tools` and `system`."""
    turns = _turns(record)
    if record.get("system") and not _begins_with_system(turns, "role"):
        turns = [{"role": "system", "content": record["system"]}, *turns]
    return Conversation.from_openai(turns, _tools(record.get("tools")))


def sharegpt(record: Mapping[str, Any]) -> Conversation:
    """`conversations` of `{"from": ..., "value": ...}`, function calls and observations included."""
    turns = _turns(record)
    messages = [_sharegpt_turn(turn, number) for number, turn in enumerate(turns, start=1)]
    if record.get("system") and not _begins_with_system(messages, "role"):
        messages.insert(0, {"role": "system", "content": record["system"]})
    return Conversation.from_openai(messages, _tools(record.get("tools")))


def prompt(record: Mapping[str, Any]) -> Conversation:
    """`prompt` and `completion`, each a string or a list of messages; only the completion is learned."""
    asked, answer = _need(record, "prompt"), _need(record, "completion")
    if not answer or (isinstance(answer, str) and not answer.strip()):
        raise InputError("completion is empty: nothing to learn from")
    before = asked if isinstance(asked, list) else [{"role": "user", "content": _string(asked, "prompt")}]
    after = answer if isinstance(answer, list) else [{"role": "assistant", "content": _string(answer, "completion")}]
    before = [{**turn, "train": False} if isinstance(turn, dict) and turn.get("role") == "assistant" else turn
              for turn in before]
    return Conversation.from_openai([*before, *after], _tools(record.get("tools")))


def firefly(record: Mapping[str, Any]) -> Conversation:
    """`conversation`, a list of `{"human": ..., "assistant": ...}`; or the older `kind`, `input`, `target`."""
    if "conversation" not in record:
        return prompt({"prompt": _string(_need(record, "input"), "input"),
                       "completion": _string(_need(record, "target"), "target")})
    pairs = record["conversation"]
    if not isinstance(pairs, list):
        raise InputError(f"conversation must be a list, not {json.dumps(pairs, default=str)[:40]}")
    messages = []
    for number, pair in enumerate(pairs, start=1):
        if not isinstance(pair, Mapping) or {"human", "assistant"} - set(pair):
            raise InputError(f"turn {number} of conversation must be an object with human and assistant")
        messages += [{"role": "user", "content": pair["human"]}, {"role": "assistant", "content": pair["assistant"]}]
    return Conversation.from_openai(messages)


FORMATS: dict[str, Callable[[Mapping[str, Any]], Document | Conversation]] = {
    "text": text, "alpaca": alpaca, "messages": messages, "sharegpt": sharegpt, "prompt": prompt, "firefly": firefly}


# ---- their parts -----------------------------------------------------------------------------------------------------

def _sharegpt_turn(turn: Any, number: int) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise InputError(f"message {number} must be an object with from and value")
    if "from" not in turn or "value" not in turn:
        raise InputError(f"message {number} needs the keys from and value; it has {_keys(turn)}")
    who = str(turn["from"])
    if who not in SHAREGPT_ROLES:
        known = list(SHAREGPT_ROLES)
        raise InputError(f"message {number}: unknown speaker '{who[:40]}'; use one of {', '.join(known)}."
                         f"{did_you_mean(who, known)}")
    message: dict[str, Any] = {"role": SHAREGPT_ROLES[who],
                               **{key: turn[key] for key in ("train", "weight", "name") if key in turn}}
    if who != "function_call":
        return {**message, "content": turn["value"]}
    call = turn["value"]
    if isinstance(call, str):
        try:
            call = json.loads(call)
        except (ValueError, RecursionError):
            raise InputError(f"message {number}: a function_call's value must be JSON with name and arguments, "
                             f"not {call[:40]!r}") from None
    calls = call if isinstance(call, list) else [call]
    return {**message, "content": "", "tool_calls": [{"type": "function", "function": one} for one in calls]}


def _turns(record: Mapping[str, Any]) -> list[Any]:
    for key in ("messages", "conversations"):
        if key in record:
            if not isinstance(record[key], list):
                raise InputError(f"{key} must be a list, not {json.dumps(record[key], default=str)[:40]}")
            return record[key]
    raise _absent("messages", record)


def _begins_with_system(turns: list[Any], key: str) -> bool:
    first = turns[0] if turns else None
    return isinstance(first, Mapping) and ALIASES.get(str(first.get(key)), first.get(key)) == ROLES[0]


def _tools(tools: Any) -> Any:
    """OpenAI wraps a schema as `{"type": "function", "function": ...}`; ShareGPT files hold it bare, often as text."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError):
            raise InputError(f"tools is a string that is not JSON: {tools[:40]!r}") from None
    if not isinstance(tools, list):
        return tools
    if bad := [tool for tool in tools if not isinstance(tool, Mapping)]:
        raise InputError(f"a tool must be an object with a name, not {json.dumps(bad[0], default=str)[:40]}")
    return [dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)} for tool in tools]


def _renamed(record: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    for theirs in columns.values():
        if theirs not in record:
            raise InputError(f"columns names '{theirs}', and the record's keys are {_keys(record)}."
                             f"{did_you_mean(theirs, list(map(str, record)))}")
    kept = {key: value for key, value in record.items() if key not in columns.values() and key not in columns}
    return {**kept, **{ours: record[theirs] for ours, theirs in columns.items()}}


def _need(record: Mapping[str, Any], key: str) -> Any:
    if key not in record:
        raise _absent(key, record)
    return record[key]


def _absent(key: str, record: Mapping[str, Any]) -> InputError:
    return InputError(f"the key '{key}' is missing; the record has {_keys(record)}."
                      f"{did_you_mean(key, list(map(str, record)))}")


def _keys(record: Mapping[str, Any]) -> str:
    shown = ", ".join(str(key)[:30] for key in list(record)[:8])
    return (shown + (", ..." if len(record) > 8 else "")) or "none"


def _string(value: Any, key: str) -> str:
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise InputError(f"{key} must be a string, not {kind}: {json.dumps(value, default=str)[:40]}")
    return value
