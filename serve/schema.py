"""Validate requests in OpenAI's JSON format, and build responses and errors in the same format.

Every field is used, documented as ignored, or refused; none is dropped silently.
"""

import json
import time
import uuid
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lit_llm.errors import InputError, did_you_mean
from lit_llm.inference.completion import Completion
from lit_llm.inference.sampling import SamplingParams

MOST = 2**31 - 1                                    # limit on new tokens
# Accepted without effect: bookkeeping of OpenAI's own service.
IGNORED = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
                     "parallel_tool_calls"})
# Not supported: refused unless the value requests the default behaviour.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "echo": (False,), "suffix": ("",), "logprobs": (False,), "top_logprobs": (0,),
    "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},), "tools": ([],),
    "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (), "prediction": (),
    "reasoning_effort": (), "verbosity": (), "web_search_options": (),
}


class ApiError(Exception):
    """An error response.

    Args:
        status: HTTP status.
        message: Message for the client; it never quotes long parts of the request.
        param: The field that is wrong.
        code: OpenAI's machine-readable error code.
        kind: OpenAI's `type`; null derives it from the status.
        headers: Headers of the response.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None,
                 kind: str | None = None, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kind or kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def bad_request(error: InputError, *, param: str | None = None, code: str | None = None) -> ApiError:
    """Convert an `InputError` to a 400 response; its place becomes the field."""
    field = error.where or None
    text = f"{field}: {error.what}" if field else error.what
    return ApiError(400, text, param=param or field, code=code)


class Body(BaseModel):
    """Base class of request bodies: strict types, and unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        _check_text(body)
        fields = {}
        for name, value in body.items():
            if name in IGNORED and name not in cls.model_fields:
                continue
            if name in NEUTRAL and name not in cls.model_fields:
                if value is not None and value not in NEUTRAL[name]:
                    raise ApiError(400, f"this server does not support {name} with this value", param=name,
                                   code="unsupported_parameter")
                continue
            if name not in cls.model_fields:
                shown = str(name)[:40]
                raise ApiError(400, f"unknown field '{shown}'.{did_you_mean(shown, list(cls.model_fields))}",
                               param=shown, code="unknown_parameter")
            fields[name] = value
        return fields


class StreamOptions(Body):
    """Options of a stream."""

    include_usage: bool = False
    include_obfuscation: bool | None = None         # padding against eavesdropping; may be left out


class Sampling(Body):
    """Fields shared by chat completions and plain completions."""

    model: str | None = Field(None, max_length=512)
    max_tokens: int | None = Field(None, ge=1, le=MOST)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    stop: str | list[str] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool | None = False
    stream_options: StreamOptions | None = None

    def params(self) -> SamplingParams:
        """Sampling parameters for the engine, with OpenAI's defaults.

        Raises:
            ApiError: More than four stop strings (OpenAI's limit), or an empty or overlong one.
        """
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(stop) > 4:
            raise ApiError(400, "stop: at most 4 strings are allowed", param="stop")
        try:
            return SamplingParams(
                max_tokens=self.max_tokens, stop=stop, seed=self.seed, top_k=self.top_k or 0,
                temperature=1.0 if self.temperature is None else self.temperature,
                top_p=1.0 if self.top_p is None else self.top_p)
        except InputError as error:
            raise bad_request(error) from None

    @model_validator(mode="after")
    def _options_need_stream(self) -> "Sampling":
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options is allowed only with stream: true", param="stream_options")
        return self


class ChatCompletionBody(Sampling):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(min_length=1, max_length=2048)
    max_completion_tokens: int | None = Field(None, ge=1, le=MOST)
    chat_template_kwargs: dict[str, Any] | None = None      # vLLM's and SGLang's name

    @model_validator(mode="after")
    def _one_limit(self) -> "ChatCompletionBody":
        if self.max_completion_tokens is not None:
            self.max_tokens = self.max_completion_tokens
        return self


class CompletionBody(Sampling):
    """POST /v1/completions: a text or token ids to continue."""

    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int | None = Field(16, ge=1, le=MOST)        # OpenAI's default

    @field_validator("prompt")
    @classmethod
    def _one_prompt(cls, prompt: Any) -> Any:
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            if len(prompt) > 1:
                raise ApiError(400, "prompt: only one prompt per request is supported", param="prompt",
                               code="unsupported_parameter")
            return prompt[0]
        return prompt


class ChatBody(Body):
    """POST /chat: one message and its answer.

    Args:
        message: The user's message.
        max_length: Maximum number of new tokens (without the prompt), reduced to the remaining context.
        temperature: 0 always picks the most likely token.
    """

    message: str = Field(min_length=1)
    max_length: int = Field(100, ge=1, le=MOST)
    temperature: float = Field(0.7, ge=0, le=2)


def _check_text(body: Any) -> None:
    """Refuse values that JSON allows but later stages do not: lone surrogates and very deep nesting.

    Raises:
        ApiError: The body contains one at any depth.
    """
    try:
        json.dumps(body, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ApiError(400, "the text contains a lone surrogate, which is not a character") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None


# ---- answers ---------------------------------------------------------------------------------------------------------

def usage(last: Completion) -> dict[str, int]:
    """Token counts, including the stop token, as `generate` returns it."""
    return {"prompt_tokens": last.prompt_tokens, "completion_tokens": last.completion_tokens,
            "total_tokens": last.prompt_tokens + last.completion_tokens}


class Shape:
    """Builds the parts of one response, which share an id and a time.

    Args:
        chat: Whether it is a chat completion or a plain completion.
        model: Name of the model in the API.
    """

    def __init__(self, model: str, *, chat: bool) -> None:
        self.chat = chat
        name = "chat.completion" if chat else "text_completion"
        prefix = "chatcmpl" if chat else "cmpl"
        head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._whole = {**head, "object": name}
        self._chunk = {**head, "object": f"{name}.chunk" if chat else name}

    def whole(self, text: str, last: Completion) -> dict[str, Any]:
        """The body of a response that is not streamed."""
        content = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        return {**self._whole, "choices": [self._choice(content, last.finish_reason)], "usage": usage(last)}

    def opening(self) -> dict[str, Any] | None:
        """The first chunk, which names the role; plain completions have none."""
        return self._with({"role": "assistant", "content": ""}, None) if self.chat else None

    def chunk(self, piece: Completion) -> dict[str, Any]:
        """A chunk of text."""
        return self._with({"content": piece.text} if self.chat else {"text": piece.text}, None)

    def closing(self, last: Completion) -> dict[str, Any]:
        """The last chunk, with the finish_reason."""
        return self._with({} if self.chat else {"text": ""}, last.finish_reason)

    def accounts(self, last: Completion) -> dict[str, Any]:
        """The chunk with the token counts."""
        return {**self._chunk, "choices": [], "usage": usage(last)}

    def _with(self, content: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        return {**self._chunk, "choices": [self._choice({"delta": content} if self.chat else content, finish_reason)]}

    @staticmethod
    def _choice(content: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        return {"index": 0, **content, "logprobs": None, "finish_reason": finish_reason}
