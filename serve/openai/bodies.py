"""Validate requests in OpenAI's JSON format.

Fields that this server does not know are collected in `ignored_fields`, since clients send the fields of other servers;
fields that it knows and does not support are refused, unless their value asks for the default.
"""

import json
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator
from pydantic.json_schema import SkipJsonSchema

from lit_llm.errors import InputError
from lit_llm.inference.sampling import DEFAULT_TEMPERATURE, SamplingParams
from lit_llm.system import ranges
from serve.errors import ApiError, bad_request
from serve.openai.replies import Requirements, requirements_of

MOST = 2**31 - 1                                    # limit on new tokens
MOST_PROMPTS = 2048
# Accepted without effect: bookkeeping of OpenAI's own service, and hints for speed.
IGNORED = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
                     "prompt_cache_retention", "prediction"})
# Not supported: refused unless the value requests the default behaviour.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "suffix": ("",), "functions": ([],), "function_call": ("none", "auto"), "modalities": (["text"],), "audio": (),
    "web_search_options": (), "use_beam_search": (False,), "prompt_embeds": (),
}


def _whole(value: Any) -> Any:
    """JSON does not distinguish 1 and 1.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]


def limited(name: str) -> Any:
    """An optional field with the range of a sampling setting."""
    numbers = ranges.of(f"chat.{name}")
    assert numbers is not None
    (only,) = numbers.ranges
    return Field(None, gt=only.low, le=only.high) if only.above else Field(None, ge=only.low, le=only.high)


class Body(BaseModel):
    """Base class of request bodies.

    Args:
        ignored_fields: Names of fields that have no effect, as the client wrote them.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    ignored_fields: SkipJsonSchema[tuple[str, ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        _check_text(body)
        fields = cls.model_fields.keys() - {"ignored_fields"}
        for name in (name for name in body if name in NEUTRAL and name not in fields):
            if body[name] is not None and body[name] not in NEUTRAL[name]:
                raise ApiError(400, f"this server does not support {name} with this value", param=name,
                               code="unsupported_parameter")
        others = tuple(name for name in body if name not in fields | IGNORED | NEUTRAL.keys())
        return {name: body[name] for name in body if name in fields} | {"ignored_fields": others}


class StreamOptions(Body):
    """Options of a stream."""

    include_usage: bool = False
    include_obfuscation: bool | None = None         # padding against eavesdropping; may be left out


class Sampling(Body):
    """Fields shared by chat completions and plain completions, with the names of OpenAI and of vLLM."""

    model: str | None = Field(None, max_length=512)
    max_tokens: Whole | None = Field(None, ge=1, le=MOST)
    temperature: float | None = limited("temperature")
    top_p: float | None = limited("top_p")
    top_k: Whole | None = Field(None, ge=-1, le=MOST)
    min_p: float | None = limited("min_p")
    repetition_penalty: float | None = limited("repetition_penalty")
    presence_penalty: float | None = limited("presence_penalty")
    frequency_penalty: float | None = limited("frequency_penalty")
    logit_bias: dict[str, float] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Whole] | None = None
    min_tokens: Whole | None = limited("min_tokens")
    ignore_eos: bool | None = None
    seed: Whole | None = limited("seed")
    n: Whole | None = Field(None, ge=1, le=128)
    best_of: Whole | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None

    def params(self) -> SamplingParams:
        """Sampling parameters for the engine, with OpenAI's defaults, except for the temperature.

        Raises:
            ApiError: A setting is not valid.
        """
        names = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
                 "min_tokens", "ignore_eos")
        set_fields = {name: value for name in names if (value := getattr(self, name)) is not None}
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        top, prompt_top = self._logprobs()
        try:
            return SamplingParams(
                max_tokens=self.max_tokens or None, stop=stop, seed=self.seed, top_k=max(self.top_k or 0, 0),
                logit_bias=_biases(self.logit_bias or {}), stop_token_ids=tuple(self.stop_token_ids or ()),
                logprobs=top, prompt_logprobs=prompt_top, **{"temperature": DEFAULT_TEMPERATURE, **set_fields})
        except InputError as error:
            raise bad_request(error) from None

    def _logprobs(self) -> tuple[int | None, int | None]:
        """Numbers of log-probabilities with each token of the answer and of the prompt."""
        return None, None

    @model_validator(mode="after")
    def _consistent(self) -> "Sampling":
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options is allowed only with stream: true", param="stream_options")
        if self.best_of not in (None, 1, self.n):
            raise ApiError(400, "best_of: only the value of n is supported", param="best_of",
                           code="unsupported_parameter")
        if self.stream_options is not None:
            self.ignored_fields += tuple(f"stream_options.{name}" for name in self.stream_options.ignored_fields)
        return self


class ChatCompletionBody(Sampling):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(min_length=1, max_length=2048)
    max_completion_tokens: Whole | None = Field(None, ge=1, le=MOST)
    logprobs: bool | None = None
    top_logprobs: Whole | None = limited("logprobs")
    chat_template_kwargs: dict[str, Any] | None = None      # vLLM's and SGLang's name
    reasoning_effort: str | None = Field(None, max_length=40)
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None

    def requirements(self) -> Requirements:
        """What the request asks of its answer, but for sampling.

        Raises:
            ApiError: A field of tools or of the response format is invalid.
        """
        try:
            return requirements_of(self.tools, self.tool_choice, self.parallel_tool_calls, self.response_format)
        except InputError as error:
            raise bad_request(error) from None

    def _logprobs(self) -> tuple[int | None, int | None]:
        return (self.top_logprobs or 0 if self.logprobs else None), None

    @model_validator(mode="after")
    def _chat_is_consistent(self) -> "ChatCompletionBody":
        if self.max_completion_tokens is not None:
            self.max_tokens = self.max_completion_tokens
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs: only with logprobs: true", param="top_logprobs")
        if self.continue_final_message:
            if self.add_generation_prompt:
                raise ApiError(400, "continue_final_message: not together with add_generation_prompt: true",
                               param="continue_final_message")
            if self.messages[-1].get("role") != "assistant":
                raise ApiError(400, "continue_final_message: the last message must be the assistant's",
                               param="continue_final_message")
        return self


class CompletionBody(Sampling):
    """POST /v1/completions: texts or token ids to continue."""

    prompt: str | list[Whole] | list[str] | list[list[Whole]]
    max_tokens: Whole | None = Field(16, ge=0, le=MOST)      # OpenAI's default
    logprobs: Whole | None = limited("logprobs")
    echo: bool | None = None
    skip_special_tokens: bool | None = None         # vLLM's name; false writes special tokens into the text

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """A list of prompts, also if there is only one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else self.prompt

    def _logprobs(self) -> tuple[int | None, int | None]:
        return self.logprobs, self.logprobs if self.echo else None

    @field_validator("prompt")
    @classmethod
    def _some_prompts(cls, prompt: Any) -> Any:
        if not prompt or (isinstance(prompt, list) and not isinstance(prompt[0], int) and len(prompt) > MOST_PROMPTS):
            raise ApiError(400, f"prompt: a text, token ids, or a list of at most {MOST_PROMPTS} of them; none of them "
                           "empty", param="prompt")
        return prompt

    @model_validator(mode="after")
    def _no_answer_only_with_echo(self) -> "CompletionBody":
        if self.max_tokens == 0 and not self.echo:
            raise ApiError(400, "max_tokens: 0 is allowed only with echo: true", param="max_tokens")
        return self


class ChatBody(Body):
    """POST /chat: one message and its answer.

    Args:
        message: The user's message.
        max_length: Maximum number of new tokens (without the prompt), reduced to the remaining context.
        temperature: 0 always picks the most likely token.
    """

    message: str = Field(min_length=1)
    max_length: Whole = Field(100, ge=1, le=MOST)
    temperature: float = Field(DEFAULT_TEMPERATURE, ge=0, le=2)


def _biases(biases: dict[str, float]) -> tuple[tuple[int, float], ...]:
    """Biases by token id.

    Raises:
        InputError: A key that is not a token id.
    """
    try:
        return tuple((int(id_[:20]), bias) for id_, bias in biases.items())
    except ValueError:
        raise InputError("each key must be a token id, such as \"50\"", where="logit_bias") from None


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
