"""Documents, messages and conversations: validated, immutable values, read from and written to OpenAI's dict format."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import lru_cache
from itertools import islice
from typing import Any, Literal, get_args

from lit_llm.errors import InputError, did_you_mean

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[str, ...] = get_args(Role)
ALIASES = {"developer": "system", "function": "tool", "human": "user", "gpt": "assistant", "model": "assistant"}
TRAIN_KEYS = ("train", "weight", "loss_weight", "loss_mask", "loss")    # names of this flag in other trainers
PARTS = {"text": "text", "input_text": "text", "output_text": "text", "reasoning": "thought", "thinking": "thought",
         "tool_call": "call"}                           # type of a content part -> kind of its value
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
KNOWN_KEYS = frozenset(("role", "content", "tool_calls", "tool_call_id", "name", "function_call", "refusal", "audio",
                        "annotations", *TRAIN_KEYS, *REASONING_KEYS))
UNKNOWN = 20                                            # keys of a message that are checked for misspellings


@dataclass(frozen=True, slots=True)
class Document:
    """Plain text for pretraining: it has no roles, and every token is supervised."""

    text: str


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation.

    Args:
        role: `system`, `user`, `assistant` or `tool`.
        content: The text, verbatim; may be empty.
        reasoning_content: The assistant's reasoning, separate from the content that the user sees.
        tool_calls: In OpenAI's format: `{"type": "function", "id": ..., "function": {"name": ..., "arguments": ...}}`.
            The arguments are an object or its JSON text, as in the record.
        tool_call_id: On a tool message, the id of the call that it answers.
        name: Name of the speaker or function, for templates that show it.
        train: Overrides `data.train_on` for this message; null follows it. OpenAI's `weight: 0` is read as false, as
            are `loss_weight`, `loss_mask` and `loss` of other trainers.
        in_parts: Whether the content came as a list of parts, which some chat templates require.
    """

    role: Role
    content: str = ""
    reasoning_content: str | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    train: bool | None = None
    in_parts: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether the message has only a role and a content."""
        return not (self.reasoning_content or self.tool_calls or self.tool_call_id or self.name)

    @property
    def is_empty(self) -> bool:
        """Whether the message has no content, no reasoning and no tool calls."""
        return not (self.content.strip() or (self.reasoning_content or "").strip() or self.tool_calls)

    @classmethod
    def from_openai(cls, raw: object) -> "Message":
        """Create a message from a dict in OpenAI's format.

        Unknown keys (`id`, `timestamp`) are ignored; a key that looks like a misspelling of a known one is an error, so
        that a typo never drops content silently.
        """
        if not isinstance(raw, Mapping):
            raise InputError(f"a message must be an object with role and content, not {_kind(raw)}")
        _refuse_typos(raw)
        role = str(raw.get("role"))
        role = ALIASES.get(role, role)
        if role not in ROLES:
            shown = repr(raw.get("role"))[:40]
            raise InputError(f"unknown role {shown}; use one of {', '.join(ROLES)}.{did_you_mean(role, list(ROLES))}")
        if raw.get("audio") is not None:
            raise InputError("images and audio are not supported, only text")
        calls = tuple(_tool_call(call) for call in _listed(raw.get("tool_calls"), "tool_calls"))
        if raw.get("function_call"):                # OpenAI's deprecated format for a single call
            calls += (_tool_call({"function": raw["function_call"]}),)
        content, thoughts, more = _content(raw.get("content"))
        calls += more
        if "content" not in raw and not calls and role != "tool":
            raise InputError(f"no content; the message's keys are {', '.join(str(key)[:30] for key in raw)}")
        if calls and role != "assistant":
            raise InputError(f"tool_calls are allowed on assistant messages only, not on role '{role}'")
        spoken = next((text for key in REASONING_KEYS if (text := _optional_text(raw, key)) is not None), thoughts)
        return cls(role=role, content=content, reasoning_content=spoken, tool_calls=calls,  # type: ignore[arg-type]
                   tool_call_id=_optional_text(raw, "tool_call_id"), name=_optional_text(raw, "name"),
                   train=_train_flag(raw), in_parts=isinstance(raw.get("content"), list | tuple))

    def to_openai(self) -> dict[str, Any]:
        """The dict that chat templates and OpenAI clients expect; keys without a value are left out."""
        out: dict[str, Any] = {"role": self.role, "content": self.content}
        for key in ("reasoning_content", "tool_call_id", "name"):
            if (value := getattr(self, key)) is not None:
                out[key] = value
        if self.tool_calls:
            out["tool_calls"] = [dict(call) for call in self.tool_calls]
        return out


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order, with the tools that the assistant may call.

    The chat template decides which roles may follow each other and whether a message may be empty.

    Args:
        messages: At least one.
        tools: Function schemas in OpenAI's format, passed to the chat template.
        template_args: Values of chat template variables for this conversation, such as `enable_thinking`.
    """

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = field(default=())
    template_args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.messages:
            raise InputError("a conversation needs at least one message")

    @classmethod
    def from_openai(cls, messages: object, tools: object = None, template_args: object = None) -> "Conversation":
        """Create a conversation from a list of messages in OpenAI's format.

        Raises:
            InputError: Not a list, an empty list, an unknown role or a misspelt key; the error names the message.
        """
        if not isinstance(messages, list | tuple):
            raise InputError(f"messages must be a list, not {_kind(messages)}")
        parsed = []
        for place, raw in enumerate(messages):
            try:
                parsed.append(Message.from_openai(raw))
            except InputError as error:
                raise InputError(f"message {place + 1}: {error.what}", fix=error.fix) from None
        listed = _listed(_parsed(tools), "tools")
        if not all(isinstance(tool, Mapping) for tool in listed):
            raise InputError("a tool must be an object: a function schema in OpenAI's format")
        if isinstance(template_args, str):
            template_args = _json(template_args, "the template's arguments are a string that is")
        if not isinstance(template_args, Mapping | None):
            raise InputError(f"the template's arguments must be an object, not {_kind(template_args)}")
        return cls(tuple(parsed), tuple(listed), {str(key): value for key, value in (template_args or {}).items()})

    def to_openai(self) -> list[dict[str, Any]]:
        """The list of dicts that chat templates and OpenAI clients expect."""
        return [message.to_openai() for message in self.messages]

    def append(self, message: Message) -> "Conversation":
        """A new conversation with one more message."""
        return replace(self, messages=(*self.messages, message))

    def upto(self, count: int) -> "Conversation":
        """A new conversation of the first `count` messages."""
        return replace(self, messages=self.messages[:count])


# ---- reading loose JSON ----------------------------------------------------------------------------------------------

def _kind(value: object) -> str:
    return {"NoneType": "null", "str": "a string", "dict": "an object", "list": "a list"}.get(
        type(value).__name__, f"a {type(value).__name__}")


def _listed(value: object, what: str) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list | tuple):
        raise InputError(f"{what} must be a list, not {_kind(value)}")
    return list(value)


def _parsed(value: object) -> Any:
    """JSON stored as a string, as ShareGPT files store tools."""
    if not isinstance(value, str):
        return value
    return _json(value, "tools is a string that is") if value.strip() else None


def _content(content: object) -> tuple[str, str | None, tuple[dict[str, Any], ...]]:
    """Content, reasoning and tool calls of a content value: a string, null, or a list of parts."""
    if content is None or isinstance(content, str):
        return content or "", None, ()
    if not isinstance(content, list | tuple):
        raise InputError(f"content must be a string, not {_kind(content)}")
    texts: list[str] = []
    thought: list[str] = []
    calls: list[dict[str, Any]] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get("text", part.get("value", part.get("thinking"))) if isinstance(part, Mapping) else None
        if not isinstance(text, str) or kind not in PARTS:
            shown = f"one of type '{str(kind)[:20]}'" if kind else _kind(part)
            raise InputError('content parts must be {"type": "text", "text": "..."}, '
                             f"not {shown}; images and audio are not supported")
        if PARTS[kind] == "call":
            calls.append(_tool_call(_json(text, "a tool_call's value is")))
        else:
            (texts if PARTS[kind] == "text" else thought).append(text)
    return "".join(texts), "".join(thought) if thought else None, tuple(calls)


def _optional_text(raw: Mapping[str, object], key: str) -> str | None:
    value = raw.get(key)
    if value is None or isinstance(value, str):
        return value
    raise InputError(f"{key} must be a string, not {_kind(value)}")


def _train_flag(raw: Mapping[str, object]) -> bool | None:
    for key in TRAIN_KEYS:
        value = raw.get(key)
        if value is None or (key == "loss" and not isinstance(value, bool)):    # `loss: 2.3` is a measurement
            continue
        if value not in (0, 1):
            raise InputError(f"{key} must be 0, 1, true or false, not {repr(value)[:40]}")
        return bool(value)
    return None


def _refuse_typos(raw: Mapping[str, object]) -> None:
    for key in islice((key for key in raw if key not in KNOWN_KEYS), UNKNOWN):
        if (meant := _nearly(str(key)[:40])) and meant not in raw:
            raise InputError(f"unknown key '{str(key)[:40]}' in a message. Did you mean '{meant}'?")


@lru_cache(maxsize=1024)                                # files repeat their keys; a comparison takes about 100 us
def _nearly(key: str) -> str | None:
    return next(iter(get_close_matches(key, sorted(KNOWN_KEYS), n=1, cutoff=0.75)), None)


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what} not JSON: {str(error)[:80]}") from None


def _tool_call(raw: Any) -> dict[str, Any]:
    function = raw.get("function", raw if "arguments" in raw else None) if isinstance(raw, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InputError('a tool call must be {"type": "function", "function": {"name": ..., "arguments": ...}}')
    stored = function.get("arguments")
    arguments = stored if not isinstance(stored, str) else {} if not stored.strip() else _json(
        stored, f"the arguments of '{function['name'][:40]}' are")
    if not isinstance(arguments, Mapping | None):
        raise InputError(f"the arguments of '{function['name'][:40]}' must be an object, not {_kind(arguments)}")
    own = stored if isinstance(stored, str) and stored.strip() else dict(arguments or {})
    call = {"type": "function", "function": {"name": function["name"], "arguments": own}}
    return {"id": raw["id"], **call} if raw.get("id") is not None else call
