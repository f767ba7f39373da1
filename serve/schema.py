"""Check requests in OpenAI's JSON, and form answers and errors as OpenAI does.

A field is used, documented as ignored, or refused: never silently dropped.
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

MOST = 2**31 - 1                                    # new tokens; longer numbers have no use
# Accepted and without effect: they are bookkeeping of OpenAI's own service.
IGNORED = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
                     "parallel_tool_calls"})
# Not supported: refused, unless they ask for what happens anyway.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "echo": (False,), "suffix": ("",), "logprobs": (False,), "top_logprobs": (0,),
    "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},), "tools": ([],),
    "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (), "prediction": (),
    "reasoning_effort": (), "verbosity": (), "web_search_options": (),
}


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: HTTP status.
        message: For the person who sent the request; repeats nothing long of what came.
        param: The field at fault.
        code: OpenAI's machine-readable word.
        kind: OpenAI's `type`; null derives it from the status.
        headers: Of the response.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None,
                 kind: str | None = None, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kind or kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def bad_request(error: InputError, *, param: str | None = None, code: str | None = None) -> ApiError:
    """A user error of the core as a 400; its place is a field here."""
    field = error.where or None
    text = f"{field}: {error.what}" if field else error.what
    return ApiError(400, text, param=param or field, code=code)


class Body(BaseModel):
    """The base of all request bodies: exact types, and unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        _check_text(body)
        kept = {}
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
            kept[name] = value
        return kept


class StreamOptions(Body):
    """Extras of a stream."""

    include_usage: bool = False
    include_obfuscation: bool | None = None         # padding against eavesdroppers; harmless to leave out


class Sampling(Body):
    """The fields that chat and plain completions share."""

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
        """As the engine takes them, with OpenAI's defaults.

        Raises:
            ApiError: More than OpenAI's four stop strings, or an empty or overlong one.
        """
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(stop) > 4:
            raise ApiError(400, "stop: at most 4 strings", param="stop")
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
            raise ApiError(400, "stream_options: only with stream true", param="stream_options")
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
    """POST /v1/completions: text, or token ids, to go on from."""

    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int | None = Field(16, ge=1, le=MOST)        # OpenAI's default

    @field_validator("prompt")
    @classmethod
    def _one_prompt(cls, prompt: Any) -> Any:
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            if len(prompt) > 1:
                raise ApiError(400, "prompt: one prompt a request", param="prompt", code="unsupported_parameter")
            return prompt[0]
        return prompt


class ChatBody(Body):
    """POST /chat: one message, one answer.

    Args:
        message: What the user says.
        max_length: New tokens at most (not prompt and answer together); clipped to what the context leaves.
        temperature: 0 always takes the likeliest token.
    """

    message: str = Field(min_length=1)
    max_length: int = Field(100, ge=1, le=MOST)
    temperature: float = Field(0.7, ge=0, le=2)


def _check_text(body: Any) -> None:
    """Refuse what JSON can spell and nobody downstream takes: half surrogates, and endless nesting.

    Raises:
        ApiError: One is there, at any depth.
    """
    try:
        json.dumps(body, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ApiError(400, "the text holds half a surrogate pair, which is no character") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None


# ---- answers ---------------------------------------------------------------------------------------------------------

def usage(last: Completion) -> dict[str, int]:
    """Token counts; the stop token is counted, as `generate` returns it."""
    return {"prompt_tokens": last.prompt_tokens, "completion_tokens": last.completion_tokens,
            "total_tokens": last.prompt_tokens + last.completion_tokens}


class Shape:
    """One response of one kind: everything it sends carries the same id and time.

    Args:
        chat: Chat completions, or plain ones.
        model: The name that clients know.
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
        said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        return {**self._whole, "choices": [self._choice(said, last.finish_reason)], "usage": usage(last)}

    def opening(self) -> dict[str, Any] | None:
        """The chunk that names the speaker; plain completions have none."""
        return self._with({"role": "assistant", "content": ""}, None) if self.chat else None

    def chunk(self, piece: Completion) -> dict[str, Any]:
        """A piece of text."""
        return self._with({"content": piece.text} if self.chat else {"text": piece.text}, None)

    def closing(self, last: Completion) -> dict[str, Any]:
        """The chunk with the finish_reason."""
        return self._with({} if self.chat else {"text": ""}, last.finish_reason)

    def accounts(self, last: Completion) -> dict[str, Any]:
        """The chunk with the token counts."""
        return {**self._chunk, "choices": [], "usage": usage(last)}

    def _with(self, said: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        return {**self._chunk, "choices": [self._choice({"delta": said} if self.chat else said, finish_reason)]}

    @staticmethod
    def _choice(said: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        return {"index": 0, **said, "logprobs": None, "finish_reason": finish_reason}
