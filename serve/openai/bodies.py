"""Validate requests in OpenAI's JSON format.

Every field is used, documented as ignored, or refused; none is dropped silently.
"""

import json
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lit_llm.errors import InputError, did_you_mean
from lit_llm.inference.sampling import DEFAULT_TEMPERATURE, SamplingParams
from serve.errors import ApiError, bad_request

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
        """Sampling parameters for the engine, with OpenAI's defaults, except for the temperature.

        Raises:
            ApiError: More than four stop strings (OpenAI's limit), or an empty or overlong one.
        """
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(stop) > 4:
            raise ApiError(400, "stop: at most 4 strings are allowed", param="stop")
        try:
            return SamplingParams(
                max_tokens=self.max_tokens, stop=stop, seed=self.seed, top_k=self.top_k or 0,
                temperature=DEFAULT_TEMPERATURE if self.temperature is None else self.temperature,
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
    chat_template_kwargs: dict[str, Any] | None = None      # vLLM's and SGLang's names, with the next two
    continue_final_message: bool = False
    add_generation_prompt: bool | None = None               # follows from continue_final_message

    @model_validator(mode="after")
    def _one_limit(self) -> "ChatCompletionBody":
        if self.max_completion_tokens is not None:
            self.max_tokens = self.max_completion_tokens
        return self

    @model_validator(mode="after")
    def _one_end(self) -> "ChatCompletionBody":
        if self.add_generation_prompt is not None and self.add_generation_prompt == self.continue_final_message:
            raise ApiError(400, "add_generation_prompt must be the opposite of continue_final_message",
                           param="add_generation_prompt")
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
    temperature: float = Field(DEFAULT_TEMPERATURE, ge=0, le=2)


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
