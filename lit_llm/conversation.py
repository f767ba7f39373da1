"""The nouns every wing shares: a document, a message, a conversation.

Dicts in OpenAI's form flow in, validated frozen values flow out, and back. Knows nothing of tokens, templates or files.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from lit_llm.errors import InputError, did_you_mean

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[str, ...] = get_args(Role)
ALIASES = {"developer": "system", "function": "tool", "human": "user", "gpt": "assistant"}


@dataclass(frozen=True, slots=True)
class Document:
    """Plain text to pretrain on: no roles, every token is supervised."""

    text: str


@dataclass(frozen=True, slots=True)
class Message:
    """One turn.

    Args:
        role: Who speaks.
        content: What is said, verbatim; may be empty only where `tool_calls` stand.
        reasoning_content: An assistant's thinking, kept apart from what the user sees.
        tool_calls: OpenAI's form: `{"type": "function", "id": ..., "function": {"name": ..., "arguments": {...}}}`.
        tool_call_id: On a tool's message, the call it answers.
        name: The speaker's or the function's name, where the template shows it.
        train: Overrides `data.train_on` for this message; null follows it. OpenAI's `weight: 0` reads as false.
    """

    role: Role
    content: str = ""
    reasoning_content: str | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    train: bool | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it is role and content alone."""
        return not (self.reasoning_content or self.tool_calls or self.tool_call_id or self.name)

    @classmethod
    def from_openai(cls, raw: Any) -> "Message":
        """A message from OpenAI's dict; unknown keys are an error so that a typo is never silently dropped."""
        if not isinstance(raw, Mapping):
            raise InputError(f"a message must be an object with role and content, not {_kind(raw)}")
        known = {"role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name", "train", "weight",
                 "refusal", "audio", "function_call", "annotations"}
        if extra := sorted(set(map(str, raw)) - known):
            raise InputError(f"unknown key '{extra[0]}' in a message.{did_you_mean(extra[0], sorted(known))}")
        role = str(raw.get("role"))
        role = ALIASES.get(role, role)
        if role not in ROLES:
            shown = repr(raw.get("role"))[:40]
            raise InputError(f"unknown role {shown}; use one of {', '.join(ROLES)}.{did_you_mean(role, list(ROLES))}")
        if raw.get("audio") is not None:
            raise InputError("images and audio are not read, only text")
        calls = tuple(_tool_call(call) for call in _listed(raw.get("tool_calls"), "tool_calls"))
        if raw.get("function_call"):                # OpenAI's older spelling of a single call
            calls += (_tool_call({"function": raw["function_call"]}),)
        message = cls(
            role=role,  # type: ignore[arg-type]
            content=_text(raw.get("content")),
            reasoning_content=_optional_text(raw, "reasoning_content"),
            tool_calls=calls,
            tool_call_id=_optional_text(raw, "tool_call_id"),
            name=_optional_text(raw, "name"),
            train=_train_flag(raw),
        )
        if calls and role != "assistant":
            raise InputError(f"tool_calls belong to the assistant, not to role '{role}'")
        return message

    def to_openai(self) -> dict[str, Any]:
        """The dict that chat templates and OpenAI clients expect; absent keys stay absent."""
        out: dict[str, Any] = {"role": self.role, "content": self.content}
        for key in ("reasoning_content", "tool_call_id", "name"):
            if (value := getattr(self, key)) is not None:
                out[key] = value
        if self.tool_calls:
            out["tool_calls"] = [dict(call) for call in self.tool_calls]
        return out


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order, with the tools they may call.

    Args:
        messages: At least one. A system message can only be the first.
        tools: OpenAI's function schemas, handed to the chat template.
    """

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = field(default=())

    def __post_init__(self) -> None:
        if not self.messages:
            raise InputError("a conversation needs at least one message")
        for place, message in enumerate(self.messages):
            if message.role == "system" and place:
                raise InputError(f"message {place + 1} is a system message; it can only be the first")
            if not message.content and not message.tool_calls and message.role in ("user", "assistant"):
                raise InputError(f"message {place + 1} ({message.role}) is empty")

    @classmethod
    def from_openai(cls, messages: Any, tools: Any = None) -> "Conversation":
        """From a list of OpenAI messages.

        Raises:
            InputError: Not a list, no message, an unknown role or key, an empty turn; it names the message.
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
            raise InputError("a tool must be an object, OpenAI's function schema")
        return cls(tuple(parsed), tuple(listed))

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

def _kind(value: Any) -> str:
    return {"NoneType": "null", "str": "a string", "dict": "an object", "list": "a list"}.get(
        type(value).__name__, f"a {type(value).__name__}")


def _listed(value: Any, what: str) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list | tuple):
        raise InputError(f"{what} must be a list, not {_kind(value)}")
    return list(value)


def _parsed(value: Any) -> Any:
    """JSON kept as a string, as ShareGPT files hold their tools."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        raise InputError(f"tools is a string, but they are not JSON: {str(error)[:80]}") from None


def _text(content: Any) -> str:
    """A string, null, or OpenAI's content parts (text only)."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, Iterable) and not isinstance(content, Mapping):
        parts = []
        for part in content:
            if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise InputError('content parts must be {"type": "text", "text": "..."}; images and audio are not read')
            parts.append(part["text"])
        return "".join(parts)
    raise InputError(f"content must be a string, not {_kind(content)}")


def _optional_text(raw: Mapping[str, Any], key: str) -> str | None:
    value = raw.get(key)
    if value is None or isinstance(value, str):
        return value
    raise InputError(f"{key} must be a string, not {_kind(value)}")


def _train_flag(raw: Mapping[str, Any]) -> bool | None:
    for key in ("train", "weight"):
        value = raw.get(key)
        if value is not None:
            if value not in (0, 1):
                raise InputError(f"{key} must be 0, 1, true or false, not {value!r}")
            return bool(value)
    return None


def _tool_call(raw: Any) -> dict[str, Any]:
    function = raw.get("function") if isinstance(raw, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InputError('a tool call must be {"type": "function", "function": {"name": ..., "arguments": ...}}')
    arguments = function.get("arguments")
    if isinstance(arguments, str):                  # OpenAI sends JSON text; templates want the object
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise InputError(f"the arguments of '{function['name']}' are not JSON: {str(error)[:80]}") from None
    call = {"type": "function", "function": {"name": function["name"], "arguments": arguments or {}}}
    return {"id": raw["id"], **call} if raw.get("id") is not None else call
