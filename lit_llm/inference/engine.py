"""Generate tokens for several requests, one token per request and step.

The engine works on token ids, and its caller drives `step`. All requests of a step are computed in one forward pass if
a trial has shown that their logits are those of each request alone, and one by one otherwise.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lit_llm.errors import InputError
from lit_llm.inference import loading
from lit_llm.inference.constraint import Constraint, Factory
from lit_llm.inference.logprobs import TokenLogprob, logprobs
from lit_llm.inference.sampling import SamplingParams, adjust, next_ids

if TYPE_CHECKING:
    from torch import Tensor

    from lit_llm.inference.forward.adapters import Adapters
    from lit_llm.inference.forward.request import Answer, Request
    from lit_llm.system.threads import Choice

FinishReason = Literal["stop", "length"]
MAX_RUNNING = 32


@dataclass(frozen=True, slots=True)
class Event:
    """One step of one request: a token, or the error that ended it.

    Args:
        request_id: The request.
        token_id: The generated token, possibly the stop token; None only with an error.
        finish_reason: None while generation continues.
        error: An error of this request only, which the engine has already removed.
        logprob: The token's log-probability, if the request asks for it.
        prompt_logprobs: Of the tokens of the prompt, with its first token if the request asks for them.
    """

    request_id: str
    token_id: int | None
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    logprob: TokenLogprob | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Requests now, and tokens since the start.

    Args:
        running: Requests that are computed.
        waiting: Requests that wait for their turn or for room.
        prompt_tokens: Of all prompts.
        generated_tokens: Of all answers.
        reused_tokens: Tokens of prompts that were not read, since an earlier request began with them.
        cached_tokens: Tokens of running requests whose keys and values are kept.
        cache_limit: Maximum number of tokens whose keys and values are kept; 0 if requests share no pass.
    """

    running: int
    waiting: int
    prompt_tokens: int
    generated_tokens: int
    reused_tokens: int = 0
    cached_tokens: int = 0
    cache_limit: int = 0


def budget(prompt_tokens: int, params: SamplingParams, context_length: int) -> int:
    """Maximum number of new tokens of a request.

    Raises:
        InputError: The prompt and `max_tokens` do not fit into the context; the error names both numbers.
    """
    room = context_length - prompt_tokens
    if room < 1:
        raise InputError(f"the prompt has {prompt_tokens} tokens, and the model's context of {context_length} tokens "
                         "leaves no room for an answer", where="prompt", fix="shorten the prompt")
    if params.max_tokens is not None and params.max_tokens > room:
        raise InputError(f"the prompt has {prompt_tokens} tokens and max_tokens is {params.max_tokens}: together "
                         f"{prompt_tokens + params.max_tokens}, but the model's context is {context_length} tokens",
                         where="max_tokens", fix=f"shorten the prompt, or set max_tokens to at most {room}")
    return room if params.max_tokens is None else params.max_tokens


class Engine:
    """Queues requests, computes the logits after their tokens, and samples the next tokens.

    A server uses only `add`, `cancel`, `step`, `has_work`, `stats` and the two sizes.

    Args:
        model: A transformers causal LM in eval mode, with an attention that reads a cache (`sdpa`, `eager`, ...). Its
            attention is replaced if requests can share a pass.
        stop_ids: Tokens that end an answer, in addition to the model's own `generation_config.eos_token_id`.
        max_running: Requests computed concurrently; others wait in order of arrival.
        cache_tokens: Maximum number of tokens whose keys and values are kept, of all requests together; null allows
            what `max_running` requests can need, limited by the memory. Requests wait if there is no room.
        constraints: Builds the constraints of requests with a grammar; null refuses these.
        adapters: LoRA adapters that are attached to the model, which requests name; null is none.
    """

    def __init__(self, model: Any, *, stop_ids: Sequence[int] = (), max_running: int = MAX_RUNNING,
                 cache_tokens: int | None = None, constraints: Factory | None = None,
                 adapters: "Adapters | None" = None) -> None:
        self.model, self.max_running, self.constraints = model, max_running, constraints
        self.stop_ids = frozenset(stop_ids) | _own_stop_ids(model)
        self.context_length, self.vocab_size = loading.model_sizes(model)
        self._waiting: deque[Request] = deque()
        self._running: dict[str, Request] = {}          # in order of arrival
        self._prompt_tokens = self._generated_tokens = 0
        self.threads: Choice | None = None              # CPU threads, if `load` chose them
        self.obstacle: str | None = None                # why requests are computed one by one
        self.cache_tokens, self.cache_bytes = 0, 0      # of a model whose requests share a pass
        self._forward = self._choose_forward(cache_tokens, adapters)

    def _choose_forward(self, cache_tokens: int | None, attached: "Adapters | None") -> Any:
        from lit_llm.inference.forward import adapters, alone, batched, proof

        attached = attached or adapters.Adapters()
        self.obstacle = proof.obstacle(self.model)
        if self.obstacle is not None:
            return alone.Alone(self.model, attached)
        bytes_per_token = proof.bytes_a_token(self.model)
        if cache_tokens is None:
            room = loading.cache_memory(self.model.device) // bytes_per_token
            cache_tokens = min(self.max_running * self.context_length, room)
        forward = batched.Batched(self.model, cache_tokens, self.context_length, attached)
        self.cache_tokens = forward.slots.limit
        self.cache_bytes = self.cache_tokens * bytes_per_token
        return forward

    @classmethod
    def load(cls, folder: str | Path, *, device: str = "auto", dtype: str = "auto", adapter: str | Path | None = None,
             stop_ids: Sequence[int] = (), max_running: int = MAX_RUNNING, threads: int | str = "auto",
             constraints: Factory | None = None, adapters: Mapping[str, str | Path] | None = None,
             quantize: str | None = None) -> "Engine":
        """Load an engine from a folder that transformers can load.

        Args:
            folder: An export, or a PEFT adapter folder (the adapter is merged into its base; virtual tokens of prompt
                tuning, prefix tuning and P-tuning are read before each request, which is then computed alone).
            device: `auto` uses the GPU if there is one.
            dtype: `auto` uses the checkpoint's dtype.
            adapter: Folder of a PEFT adapter to merge into the model.
            stop_ids: As in `Engine`.
            max_running: As in `Engine`.
            threads: CPU threads; auto measures which number gives the fastest forward pass (see `threads.py`).
            constraints: As in `Engine`.
            adapters: Name -> folder of a PEFT adapter that is not merged, and that requests select by its name.
            quantize: `nf4` or `int8` keeps the weights of linear layers except the head in 4 or 8 bits (bitsandbytes).

        Raises:
            InputError: No such folder, no loadable model in it, or an invalid number of threads.
        """
        from lit_llm.inference.forward import adapters as unmerged
        from lit_llm.kernels import packed_linear
        from lit_llm.system.threads import number, settle

        if threads != "auto":
            number(threads)                         # first, because the weights take longer
        for adapter_folder in (adapters or {}).values():
            loading.check_base(str(folder), adapter_folder)
        loaded = loading.load(str(folder), device, dtype, adapter, quantize)
        attached = unmerged.load(loaded, adapters or {})
        packed_linear.pack(loaded)
        choice = settle(threads, lambda: _passes(loaded, max_running)) if loaded.device.type == "cpu" else None
        engine = cls(loaded, stop_ids=stop_ids, max_running=max_running, constraints=constraints,
                     adapters=attached)
        engine.threads = choice
        return engine

    @property
    def adapters(self) -> frozenset[str]:
        """Names of the adapters that requests may select."""
        names: frozenset[str] = self._forward.adapters.names
        return names

    def add(self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams,
            adapter: str | None = None) -> None:
        """Queue a request; invalid values are refused here, not in a later step.

        Args:
            request_id: Used once.
            prompt_ids: Tokens of the prompt.
            params: How its tokens are drawn.
            adapter: Name of the adapter that is applied to it; null is the base.

        Raises:
            InputError: An empty prompt, an id outside the vocabulary, more tokens than the context has, a grammar
                that cannot be used, or an unknown adapter.
        """
        import torch

        from lit_llm.inference.forward.request import Request

        assert request_id not in self._running, "request ids are used once"
        prompt = [int(id_) for id_ in prompt_ids]
        if not prompt:
            raise InputError("the prompt is empty", where="prompt")
        if adapter is not None and adapter not in self.adapters:
            raise InputError(f"there is no adapter '{adapter[:80]}'", where="adapter")
        count = min(self.vocab_size, self._forward.adapters.vocabularies.get(adapter, self.vocab_size))
        if not 0 <= min(prompt) <= max(prompt) < count:
            others = "" if count == self.vocab_size else "; the vocabulary of another adapter is larger"
            raise InputError(f"token ids must be from 0 to {count - 1}{others}", where="prompt")
        params.check_ids(self.vocab_size)
        left = budget(len(prompt), params, self.context_length)
        generator = None
        if params.seed is not None and not params.greedy:
            generator = torch.Generator(device=self.model.device).manual_seed(params.seed)
        constraint = self._constraint(params)
        self._waiting.append(Request(request_id, prompt, len(prompt), left, params, generator, constraint,
                                     adapter=adapter))

    def _constraint(self, params: SamplingParams) -> Constraint | None:
        if params.grammar is None:
            return None
        if self.constraints is None:
            raise InputError("this engine cannot constrain answers", where="grammar")
        return self.constraints(params.grammar, self.vocab_size)

    def cancel(self, request_id: str) -> bool:
        """Remove a request and free its cache; false if it is unknown. No event follows."""
        before = len(self._waiting)
        self._waiting = deque(waiting for waiting in self._waiting if waiting.name != request_id)
        if (request := self._running.pop(request_id, None)) is not None:
            self._forward.end(request)
        return request is not None or len(self._waiting) < before

    def step(self) -> list[Event]:
        """Compute a token for every request whose prompt has been read, and the next part of other prompts."""
        self._admit()
        answers: list[Answer] = self._forward.advance(list(self._running.values()))
        for request in reversed(self._forward.preempted()):
            del self._running[request.name]
            self._waiting.appendleft(request)       # its tokens are read again later
        return [self._event(answer, *drawn) for answer, drawn in zip(answers, self._drawn(answers), strict=True)]

    @property
    def has_work(self) -> bool:
        """Whether any request is running or waiting."""
        return bool(self._running or self._waiting)

    @property
    def stats(self) -> EngineStats:
        """Current and total counts."""
        return EngineStats(len(self._running), len(self._waiting), self._prompt_tokens, self._generated_tokens,
                           self._forward.reused_tokens, self._forward.cached_tokens, self.cache_tokens)

    def _admit(self) -> None:
        for request in list(self._waiting):
            if self._forward.is_read(request, self._running.values()):
                continue                            # samples of one prompt: it is read once
            if len(self._running) >= self.max_running or not self._forward.begin(request):
                break
            self._waiting.remove(request)
            self._running[request.name] = request
            if len(request.ids) == request.prompt_tokens:       # else it was preempted
                self._prompt_tokens += request.prompt_tokens

    def _drawn(self, answers: "list[Answer]") -> "list[tuple[int | Exception, TokenLogprob | None]]":
        """Sample a token for each answer, greedy ones in one operation; an error where there is one."""
        import torch

        outcomes: list[Any] = [answer.error for answer in answers]
        tokens: list[TokenLogprob | None] = [None] * len(answers)
        whole = [at for at, answer in enumerate(answers) if answer.logits is not None]
        if not whole:
            return list(zip(outcomes, tokens, strict=True))
        logits = torch.stack([answers[at].logits for at in whole])      # type: ignore[misc]
        with_logprobs = [row for row, at in enumerate(whole) if answers[at].request.params.logprobs is not None]
        raw = logits[with_logprobs] if with_logprobs else logits    # a copy, before the logits are changed
        for row, finite in enumerate(logits.amax(-1).isfinite().tolist()):
            request = answers[whole[row]].request
            outcomes[whole[row]] = (self._change(logits[row], request) if finite
                                 else FloatingPointError("the model's logits are not finite"))
        likeliest = logits.argmax(-1).tolist()
        for row, at in enumerate(whole):
            request = answers[at].request
            if outcomes[at] is None and request.params.greedy:
                outcomes[at] = likeliest[row]
            elif outcomes[at] is None:
                try:
                    outcomes[at] = int(next_ids(logits[row:row + 1], [request.params], [request.generator]))
                except Exception as error:          # this request's alone
                    outcomes[at] = error
        if places := [whole[row] for row in with_logprobs]:
            ids = [outcomes[at] if isinstance(outcomes[at], int) else 0 for at in places]
            counts = [answers[at].request.params.logprobs or 0 for at in places]
            for at, token in zip(places, logprobs(raw, ids, counts), strict=True):
                tokens[at] = token
        return list(zip(outcomes, tokens, strict=True))

    def _change(self, logits_V: "Tensor", request: "Request") -> Exception | None:
        """Apply the constraint and the penalties of a request in place; an error if no token is left."""
        if request.constraint is not None:
            try:
                allowed = request.constraint.allowed()
                if allowed is not None:
                    logits_V.masked_fill_(~allowed.to(logits_V.device), float("-inf"))
            except Exception as error:              # of the library of constraints: this request's alone
                return error
            if not bool(logits_V.amax() > float("-inf")):
                return RuntimeError("the constraint allows no token")
        if request.params.adjusts:
            prompt, answer = request.ids[:request.prompt_tokens], request.ids[request.prompt_tokens:]
            try:
                adjust(logits_V, request.params, prompt, answer, self._stop_ids(request.params))
            except Exception as error:
                return error
        return None

    def _stop_ids(self, params: SamplingParams) -> frozenset[int]:
        """Tokens that end an answer with these settings."""
        own = frozenset[int]() if params.ignore_eos else self.stop_ids
        return own.union(params.stop_token_ids) if params.stop_token_ids else own

    def _event(self, answer: "Answer", drawn: int | Exception, logprob: TokenLogprob | None) -> Event:
        request = answer.request
        stops = drawn in self._stop_ids(request.params)
        if request.constraint is not None and isinstance(drawn, int) and not stops:
            try:
                request.constraint.accept(drawn)
            except Exception as error:
                drawn = error
        if isinstance(drawn, Exception):            # fails only this request
            del self._running[request.name]
            self._forward.end(request, broken=True)
            return Event(request.name, None, error=drawn)
        first = len(request.ids) == request.prompt_tokens
        request.ids.append(drawn)
        request.left -= 1
        self._generated_tokens += 1
        reason: FinishReason | None = "stop" if stops else None if request.left else "length"
        if reason:
            del self._running[request.name]
            self._forward.end(request)
        prompt: tuple[TokenLogprob, ...] = ()
        if first and request.params.prompt_logprobs is not None:
            prompt = (TokenLogprob(request.ids[0], None), *request.prompt_logprobs)
        return Event(request.name, drawn, reason, logprob=logprob, prompt_logprobs=prompt)


def _passes(model: Any, max_running: int) -> None:
    """Passes over one token, 8 and 32, whose costs are close to those of steps with so many requests."""
    import torch

    with torch.no_grad():
        for tokens in sorted({min(max_running, count) for count in (1, 8, 32)}):
            model(input_ids=torch.zeros(1, tokens, dtype=torch.int64, device=model.device), use_cache=False)


def _own_stop_ids(model: Any) -> frozenset[int]:
    own = getattr(model.generation_config, "eos_token_id", None)
    return frozenset([own] if isinstance(own, int) else own or ())
