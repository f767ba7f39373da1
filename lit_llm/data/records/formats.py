"""Convert a record of any supported format to a Document or a Conversation.

A record is a text, a list of turns, or a question and its answer, under various names. Errors are InputErrors that say
what would be right; unused keys are noted, to be counted. `recognition.py` determines the format of a record.
"""

import hashlib
import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lit_llm.data.records.recognition import (
    BELOW,
    NAMED,
    PAIRS,
    TURNS,
    keys,
    listed,
    names,
    pair_keys,
    recognise,
    turns_key,
)
from lit_llm.data.records.record import shown, size_of_value
from lit_llm.errors import InputError, did_you_mean
from lit_llm.text.conversation import KNOWN_KEYS, Conversation, Document

SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
            "tool": "tool", "function_call": "call", "observation": "tool", "developer": "system", "function": "tool",
            "tool_call": "call", "tool_response": "tool", "function_response": "tool", "ipython": "tool",
            "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "model": "assistant", "prompter": "user"}
SYSTEM, TOOLS = ("system", "system_prompt"), ("tools", "functions")
TEMPLATE_ARGS = ("chat_template_kwargs", "template_args")  # variables of the chat template
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
MESSAGES, RENDERED = 4000, 4_000_000_000  # limits on messages of a conversation, and on messages times characters
OURS = ("text", "instruction", "input", "output", "history", "system", "prompt", "completion", "tools", "label", *TURNS)


def convert(record: dict[str, Any] | str, *, format: str = "auto", columns: Mapping[str, str] | None = None,
            notes: set[str] | None = None) -> Document | Conversation:
    """Convert a record.

    Args:
        record: A parsed object, or the text of a document.
        format: A name in `FORMATS`, or `auto`.
        columns: Standard key -> the record's key, `{"prompt": "question"}`; that key then loses its own meaning.
        notes: Notes about unused keys and unfilled placeholders are added to it.

    Raises:
        InputError: An unknown format, a missing key, a wrong type, or no answer.

    >>> convert({"q": "1+1?", "a": "2"}, columns={"prompt": "q", "completion": "a"}).messages[1].content
    '2'
    """
    if format != "auto" and format not in FORMATS:
        raise InputError(f"unknown format '{format}'; use auto, {', '.join(FORMATS)}."
                         f"{did_you_mean(format, list(FORMATS))}")
    if isinstance(record, str):
        if format not in ("auto", "text"):
            raise InputError(f"format '{format}' needs objects with keys, but this file is plain text")
        return Document(record)
    seen = Fields(_renamed(record, columns) if columns else record)
    said = FORMATS[recognise(seen.record) if format == "auto" else format](seen)
    if isinstance(said, Conversation):
        _refuse_what_is_not_to_learn(seen)
        texts = [text for message in said.messages for text in (message.content, message.reasoning_content or "")]
    else:
        texts = [said.text]
    if any("\0" in text for text in texts):
        raise InputError("the text contains a NUL character (\\u0000), which is not allowed", fix="Remove it.")
    if notes is not None:
        notes.update(seen.unread())
        if isinstance(said, Conversation) and any(map(_BLANK.search, texts)):
            notes.add(OPEN_NOTE)
    return said


# ---- the formats -----------------------------------------------------------------------------------------------------

class Fields:
    """A record that remembers which of its keys were read; the others are counted in the report."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.record, self.keys = record, set[str]()

    def get(self, *names: str) -> Any:
        """The value of the first of these keys that exists and is not null."""
        for key in names:
            if self.record.get(key) is not None:
                self.keys.add(key)
                return self.record[key]
        return None

    def need(self, key: str) -> Any:
        """The value of a key, or an error that names the existing keys."""
        if key not in self.record:
            raise _absent(key, self.record)
        self.keys.add(key)
        return self.record[key]

    def unread(self) -> Iterator[str]:
        """Keys that were not read; at most 20 of each kind, to limit the report."""
        extra = [str(key) for key, value in self.record.items() if value is not None and key not in self.keys]
        turns = next((value for key in TURNS if key in self.keys and isinstance(value := self.record[key], list)), [])
        inner = {str(key) for turn in turns if isinstance(turn, Mapping) for key in turn if key not in _IN_TURNS}
        yield from (f"the key '{key[:40]}' is not used" for key in extra[:20])
        yield from (f"the key '{key[:40]}' of a message is not used" for key in sorted(inner)[:20])


OPEN_NOTE = "a {{placeholder}} is left open"
_BLANK = re.compile(r"\{\{ *\w{1,40} *\}\}")
_IN_TURNS = KNOWN_KEYS | {"from", "value", "system"} | {key for pair in PAIRS for key in pair}


def text(record: Fields) -> Document:
    """`{"text": ...}`; a list of strings (verses, paragraphs) is joined by newlines."""
    value = record.need("text")
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        value = "\n".join(value)
    return Document(_string(value, "text"))


def turns(record: Fields) -> Conversation:
    """A list of turns under `messages`, `conversations` or `conversation`, with optional `system` and `tools`.

    A turn has the form of OpenAI (role, content), of ShareGPT (from, value; including function calls and observations),
    of Firefly (human and assistant in one), or is a string, alternating between question and answer.
    """
    key = turns_key(record.record) or next((key for key in TURNS if key in record.record), TURNS[0])
    told = listed(record.need(key))
    if not isinstance(told, list):
        raise InputError(f"{key} must be a list, not {shown(told)}")
    return _conversation(record, [message for number, turn in enumerate(told, 1) for message in _turn(turn, number)])


def alpaca(record: Fields) -> Conversation:
    """`instruction`, `input` (appended to it, may be empty), `output`, with optional `system`, `history` and `tools`.

    Also accepted under other names: question, query, prompt or problem; context; answer, response, completion,
    solution or target.
    """
    return _pair(record, *(pair_keys(record.record) or NAMED[0]))


def prompt(record: Fields) -> Conversation:
    """`prompt` and `completion`, each a string or a list of messages; only the completion is supervised."""
    return _pair(record, *NAMED[1])


def firefly(record: Fields) -> Conversation:
    """`conversation`, a list of `{"human": ..., "assistant": ...}`; or the older form `kind`, `input`, `target`."""
    return turns(record) if "conversation" in record.record else _pair(record, "input", "target")


FORMATS: dict[str, Callable[[Fields], Document | Conversation]] = {
    "text": text, "alpaca": alpaca, "messages": turns, "sharegpt": turns, "prompt": prompt, "firefly": firefly}
_OURS = frozenset(FORMATS)


def version(format: str) -> str:
    """What tells the code of a format from outside apart from its code of yesterday; empty for those that ship.

    It is a hash of the file that holds the function, so functions that it calls there count, too.

    Raises:
        InputError: The code of the format is in no file, so tokens made by it could not be told from others.
    """
    if format in _OURS or format not in FORMATS:
        return ""
    try:
        file = inspect.getsourcefile(FORMATS[format])
        return hashlib.sha256(Path(str(file)).read_bytes()).hexdigest()
    except (OSError, TypeError):
        raise InputError(f"the code of format '{format}' is in no file", where="data.sources.format",
                         fix="Define the function in a module.") from None


# ---- a question and its answer ---------------------------------------------------------------------------------------

def _pair(record: Fields, ask: str, answer: str) -> Conversation:
    asked, below, answered = record.need(ask), [key for key in BELOW if key != ask], record.need(answer)
    more = [_string(value, key) for key in below if (value := record.get(key))]
    if answer == "instances":
        more, answered = _instance(answered)
        answer = "output"
    messages = []
    history = listed(record.get("history") or [])
    if not isinstance(history, list):
        raise InputError(f"history must be a list of pairs [question, answer], not {shown(history)}")
    for number, pair in enumerate(history, start=1):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise InputError(f"history {number} must be a pair [question, answer], not {shown(pair)}")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    if isinstance(asked, list):
        before = [message for number, turn in enumerate(asked, 1) for message in _turn(turn, number)]
        messages += [{**turn, "train": False} if turn["role"] == "assistant" else turn for turn in before]
        asked = ""
    if said := "\n".join(part for part in (_string(asked, ask), *more) if part):
        messages.append({"role": "user", "content": said})
    if not history and (not answered or (isinstance(answered, str) and not answered.strip())):
        raise InputError(f"{answer} is empty: nothing to learn from")
    after = answered if isinstance(answered, list) else [answered]
    if isinstance(answered, list | Mapping) and answered:
        messages += [message for number, turn in enumerate(after, 2) for message in _turn(turn, number)]
    else:
        messages.append({"role": "assistant", "content": _string(answered or "", answer)})
    return _conversation(record, messages)


def _instance(instances: Any) -> tuple[list[str], str]:
    if not isinstance(instances, list) or len(instances) != 1 or not isinstance(instances[0], Mapping):
        raise InputError("instances must contain one object with input and output",
                         fix="Write each further instance as a separate record.")
    one = Fields(instances[0])
    return [_string(one.get("input") or "", "input")], _string(one.need("output"), "output")


# ---- turns -----------------------------------------------------------------------------------------------------------

def _conversation(record: Fields, messages: list[dict[str, Any]]) -> Conversation:
    system = record.get(*SYSTEM)
    if system and not (messages and messages[0]["role"] == "system"):
        messages.insert(0, {"role": "system", "content": system})
    elif system and messages[0].get("content") != system:
        raise InputError("two system prompts: one under a key of the record and one in its first message")
    _refuse_huge(messages)
    return Conversation.from_openai(messages, _tools(record.get(*TOOLS)), record.get(*TEMPLATE_ARGS))


def _turn(turn: Any, number: int) -> list[dict[str, Any]]:
    """The messages of a turn, in OpenAI's format."""
    if isinstance(turn, str):                           # LIMA: alternating questions and answers
        return [{"role": ("assistant", "user")[number % 2], "content": turn}]
    if not isinstance(turn, Mapping):
        raise InputError(f"message {number}: a message must be an object with role and content, not {shown(turn)}")
    for pair in PAIRS:
        if all(key in turn for key in pair):
            both = [{"role": role, "content": turn[key]} for role, key in zip(("user", "assistant"), pair, strict=True)]
            return [{"role": "system", "content": turn["system"]}, *both] if turn.get("system") else both
    by, words = ("role", "content") if "role" in turn else ("from", "value")
    if by == "role" and "content" not in turn and "value" in turn:
        words = "value"
    if by not in turn or (by == "from" and words not in turn):
        needs = "role and content, or from and value" if by not in turn else "from and value"
        raise InputError(f"message {number} needs the keys {needs}; it has {keys(turn)}")
    speaker = SPEAKERS.get(str(turn[by]).lower())
    if speaker is None:
        known = list(SPEAKERS) if by == "from" else ["system", "user", "assistant", "tool"]
        raise InputError(f"message {number}: unknown {'speaker' if by == 'from' else by} '{str(turn[by])[:40]}'; use "
                         f"one of {', '.join(known[:8])}.{did_you_mean(str(turn[by])[:40], known)}")
    message = {key: value for key, value in turn.items() if key not in ("role", "from", "value")}
    if words in turn:
        message["content"] = turn[words]
    if speaker != "call":
        return [{**message, "role": speaker}]
    calls = turn.get(words)
    if isinstance(calls, str):
        try:
            calls = json.loads(calls)
        except (ValueError, RecursionError):
            raise InputError(f"message {number}: a {turn[by]}'s value must be JSON with name and arguments, "
                             f"not {shown(calls)}") from None
    functions = [{"function": call} for call in (calls if isinstance(calls, list) else [calls])]
    return [{**message, "role": "assistant", "content": "", "tool_calls": functions}]


def _tools(tools: Any) -> Any:
    """OpenAI wraps a schema as `{"type": "function", "function": ...}`; ShareGPT files do not, and often use text."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError):
            raise InputError(f"tools is a string that is not JSON: {shown(tools)}") from None
    if not isinstance(tools, list):
        return tools
    if bad := [tool for tool in tools if not isinstance(tool, Mapping)]:
        raise InputError(f"a tool must be an object with a name, not {shown(bad[0])}")
    return [dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)} for tool in tools]


# ---- refused records -------------------------------------------------------------------------------------------------

def _refuse_huge(messages: list[dict[str, Any]]) -> None:
    """Refuse conversations that would take minutes, because each answer is rendered with all that precedes it."""
    if len(messages) > MESSAGES:
        raise InputError(f"the conversation has {len(messages):,} messages; at most {MESSAGES:,} are allowed",
                         fix="Split it into several records.")
    if (size := size_of_value(messages)) * len(messages) > RENDERED:
        raise InputError(f"the conversation is too long: with {len(messages):,} messages, at most "
                         f"{RENDERED // len(messages):,} characters are allowed, not {size:,}",
                         fix="Split it into several records.")


def _refuse_what_is_not_to_learn(record: Fields) -> None:
    if record.get("label", "kto_tag") is False:
        raise InputError("label is false, which marks a bad answer in preference data, so it must not be trained on",
                         fix="data.on_bad_record: quarantine sets such records aside and keeps the good answers.")
    for key in MEDIA:
        if record.get(key):
            raise InputError(f"the record has '{key}'; images and audio are not supported, only text")


def _renamed(record: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    for ours, theirs in columns.items():
        if ours not in OURS:
            raise InputError(f"columns maps '{ours}', which no format has; use {', '.join(OURS)}."
                             f"{did_you_mean(ours, list(OURS))}")
        if theirs not in record:
            raise InputError(f"columns names '{theirs}', but the record's keys are {keys(record)}."
                             f"{did_you_mean(theirs, names(record))}")
    kept = {key: value for key, value in record.items() if key not in columns.values() and key not in columns}
    return {**kept, **{ours: record[theirs] for ours, theirs in columns.items()}}


def _absent(key: str, record: Mapping[str, Any]) -> InputError:
    return InputError(f"the key '{key}' is missing; the record has {keys(record)}."
                      f"{did_you_mean(key, names(record))}")


def _string(value: Any, key: str) -> str:
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        hint = " (NaN is how pandas writes a missing value; null is JSON's)" if value != value else ""
        raise InputError(f"{key} must be a string, not {kind}: {shown(value)}{hint}")
    return value
