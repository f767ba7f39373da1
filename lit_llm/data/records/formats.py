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
STANDARD_KEYS = (
    "text", "instruction", "input", "output", "history", "system", "prompt", "completion", "tools", "label", *TURNS)


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
    content = FORMATS[recognise(seen.record) if format == "auto" else format](seen)
    if isinstance(content, Conversation):
        _refuse_untrainable(seen)
        texts = [text for message in content.messages for text in (message.content, message.reasoning_content or "")]
    else:
        texts = [content.text]
    if any("\0" in text for text in texts):
        raise InputError("the text contains a NUL character (\\u0000), which is not allowed", fix="Remove it.")
    if notes is not None:
        notes.update(seen.unread())
        if isinstance(content, Conversation) and any(map(_BLANK.search, texts)):
            notes.add(OPEN_NOTE)
    return content


# ---- the formats -----------------------------------------------------------------------------------------------------

class Fields:
    """A record that remembers which of its keys were read; the others are counted in the report."""

    def __init__(self, record: Mapping[str, object]) -> None:
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


OPEN_NOTE = "a {{placeholder}} is not filled in"
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
    turn_list = listed(record.need(key))
    if not isinstance(turn_list, list):
        raise InputError(f"{key} must be a list, not {shown(turn_list)}")
    return _conversation(record, [
        message for number, turn in enumerate(turn_list, 1) for message in _turn(turn, number)])


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
_BUILT_IN = frozenset(FORMATS)


def version(format: str) -> str:
    """Version of a user's own format, which is part of the key of cached tokens; empty for this project's formats.

    It is a hash of the file that defines the function, so it changes with other functions of the file as well.

    Raises:
        InputError: The function is not defined in a file, so the cache could not detect changes of it.
    """
    if format in _BUILT_IN or format not in FORMATS:
        return ""
    try:
        file = inspect.getsourcefile(FORMATS[format])
        return hashlib.sha256(Path(str(file)).read_bytes()).hexdigest()
    except (OSError, TypeError):
        raise InputError(f"the function of format '{format}' is not defined in a file", where="data.sources.format",
                         fix="Define it in a module.") from None


# ---- a question and its answer ---------------------------------------------------------------------------------------

def _pair(record: Fields, ask: str, answer: str) -> Conversation:
    question, below, answer_text = record.need(ask), [key for key in BELOW if key != ask], record.need(answer)
    more = [_string(value, key) for key in below if (value := record.get(key))]
    if answer == "instances":
        more, answer_text = _instance(answer_text)
        answer = "output"
    messages = []
    history = listed(record.get("history") or [])
    if not isinstance(history, list):
        raise InputError(f"history must be a list of pairs [question, answer], not {shown(history)}")
    for number, pair in enumerate(history, start=1):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise InputError(f"history {number} must be a pair [question, answer], not {shown(pair)}")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    if isinstance(question, list):
        before = [message for number, turn in enumerate(question, 1) for message in _turn(turn, number)]
        messages += [{**turn, "train": False} if turn["role"] == "assistant" else turn for turn in before]
        question = ""
    if full_question := "\n".join(part for part in (_string(question, ask), *more) if part):
        messages.append({"role": "user", "content": full_question})
    if not history and (not answer_text or (isinstance(answer_text, str) and not answer_text.strip())):
        raise InputError(f"{answer} is empty, so there is no answer to train on")
    after = answer_text if isinstance(answer_text, list) else [answer_text]
    if isinstance(answer_text, list | Mapping) and answer_text:
        messages += [message for number, turn in enumerate(after, 2) for message in _turn(turn, number)]
    else:
        messages.append({"role": "assistant", "content": _string(answer_text or "", answer)})
    return _conversation(record, messages)


def _instance(instances: object) -> tuple[list[str], str]:
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


def _turn(turn: object, number: int) -> list[dict[str, Any]]:
    """The messages of a turn, in OpenAI's format."""
    if isinstance(turn, str):                           # LIMA: alternating questions and answers
        return [{"role": ("assistant", "user")[number % 2], "content": turn}]
    if not isinstance(turn, Mapping):
        raise InputError(f"message {number}: a message must be an object with role and content, not {shown(turn)}")
    for pair in PAIRS:
        if all(key in turn for key in pair):
            both = [{"role": role, "content": turn[key]} for role, key in zip(("user", "assistant"), pair, strict=True)]
            return [{"role": "system", "content": turn["system"]}, *both] if turn.get("system") else both
    role_key, text_key = ("role", "content") if "role" in turn else ("from", "value")
    if role_key == "role" and "content" not in turn and "value" in turn:
        text_key = "value"
    if role_key not in turn or (role_key == "from" and text_key not in turn):
        needs = "role and content, or from and value" if role_key not in turn else "from and value"
        raise InputError(f"message {number} needs the keys {needs}; it has {keys(turn)}")
    speaker = SPEAKERS.get(str(turn[role_key]).lower())
    if speaker is None:
        allowed = list(SPEAKERS) if role_key == "from" else ["system", "user", "assistant", "tool"]
        noun = "speaker" if role_key == "from" else role_key
        raise InputError(f"message {number}: unknown {noun} '{str(turn[role_key])[:40]}'; use "
                         f"one of {', '.join(allowed[:8])}.{did_you_mean(str(turn[role_key])[:40], allowed)}")
    message = {key: value for key, value in turn.items() if key not in ("role", "from", "value")}
    if text_key in turn:
        message["content"] = turn[text_key]
    if speaker != "call":
        return [{**message, "role": speaker}]
    calls = turn.get(text_key)
    if isinstance(calls, str):
        try:
            calls = json.loads(calls)
        except (ValueError, RecursionError):
            raise InputError(f"message {number}: a {turn[role_key]}'s value must be JSON with name and arguments, "
                             f"not {shown(calls)}") from None
    functions = [{"function": call} for call in (calls if isinstance(calls, list) else [calls])]
    return [{**message, "role": "assistant", "content": "", "tool_calls": functions}]


def _tools(tools: object) -> Any:
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


def _refuse_untrainable(record: Fields) -> None:
    if record.get("label", "kto_tag") is False:
        raise InputError("label is false, which marks a bad answer in preference data, so it must not be trained on",
                         fix="Set data.on_bad_record to quarantine: it leaves such records out and keeps the others.")
    for key in MEDIA:
        if record.get(key):
            raise InputError(f"the record has '{key}'; images and audio are not supported, only text")


def _renamed(record: Mapping[str, object], columns: Mapping[str, str]) -> dict[str, Any]:
    for standard_key, record_key in columns.items():
        if standard_key not in STANDARD_KEYS:
            raise InputError(f"columns maps '{standard_key}', which no format has; use {', '.join(STANDARD_KEYS)}."
                             f"{did_you_mean(standard_key, list(STANDARD_KEYS))}")
        if record_key not in record:
            raise InputError(f"columns names '{record_key}', but the record's keys are {keys(record)}."
                             f"{did_you_mean(record_key, names(record))}")
    unmapped = {key: value for key, value in record.items() if key not in columns.values() and key not in columns}
    return {**unmapped, **{standard_key: record[record_key] for standard_key, record_key in columns.items()}}


def _absent(key: str, record: Mapping[str, object]) -> InputError:
    return InputError(f"the key '{key}' is missing; the record has {keys(record)}."
                      f"{did_you_mean(key, names(record))}")


def _string(value: object, key: str) -> str:
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        hint = " (NaN is how pandas writes a missing value; null is JSON's)" if value != value else ""
        raise InputError(f"{key} must be a string, not {kind}: {shown(value)}{hint}")
    return value
