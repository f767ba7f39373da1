"""Generate tokens for several requests, one token per request and step.

The engine works on token ids. Its caller drives `step`; requests are interleaved but computed separately, so the tokens
of a request are those of `model.generate` for its prompt.
"""

import json
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lit_llm import names
from lit_llm.errors import InputError
from lit_llm.inference.sampling import SamplingParams, next_ids
from lit_llm.system import origin
from lit_llm.text import check

if TYPE_CHECKING:
    from lit_llm.system.threads import Choice

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Event:
    """One step of one request: a token, or the error that ended it.

    Args:
        request_id: The request.
        token_id: The generated token, possibly the stop token; None only with an error.
        finish_reason: None while generation continues.
        error: An error of this request only, which the engine has already removed.
    """

    request_id: str
    token_id: int | None
    finish_reason: FinishReason | None = None
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Requests `running` and `waiting` now; `prompt_tokens` and `generated_tokens` since the start."""

    running: int
    waiting: int
    prompt_tokens: int
    generated_tokens: int


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


@dataclass(slots=True)
class _Request:
    """State of a request: pending input, all tokens so far, and the remaining number of tokens."""

    pending_ids: list[int]
    all_ids: list[int]
    left: int
    params: SamplingParams
    generator: Any
    cache: Any = None


class Engine:
    """A simple engine: one key-value cache per request; all requests advance in turn, one token per step.

    It favours exactness over speed: nothing is padded or batched across requests, so no request can change the results
    of another. A server uses only `add`, `cancel`, `step`, `has_work`, `stats` and the two sizes.

    Args:
        model: A transformers causal LM in eval mode, with an attention that reads a cache (`sdpa`, `eager`, ...).
        stop_ids: Tokens that end an answer, in addition to the model's own `generation_config.eos_token_id`.
        max_running: Requests computed concurrently; others wait in order of arrival.
    """

    def __init__(self, model: Any, *, stop_ids: Sequence[int] = (), max_running: int = 8) -> None:
        self.model, self.max_running = model, max_running
        self.stop_ids = frozenset(stop_ids) | _own_stop_ids(model)
        config = model.config.get_text_config()
        self.context_length = int(getattr(config, "max_position_embeddings", None) or 2048)
        self.vocab_size = int(config.vocab_size)
        self._waiting: deque[tuple[str, _Request]] = deque()
        self._running: dict[str, _Request] = {}
        self._reads_cache: bool | None = None           # determined at the first request
        self._prompt_tokens = self._generated_tokens = 0
        self.threads: Choice | None = None          # CPU threads, if `load` chose them

    @classmethod
    def load(cls, folder: str | Path, *, device: str = "auto", dtype: str = "auto", adapter: str | Path | None = None,
             stop_ids: Sequence[int] = (), max_running: int = 8, threads: int | str = "auto") -> "Engine":
        """Load an engine from a folder that transformers can load.

        Args:
            folder: An export, or a PEFT adapter folder (the adapter is merged into its base).
            device: `auto` uses the GPU if there is one.
            dtype: `auto` uses the checkpoint's dtype.
            adapter: Folder of a PEFT adapter to merge into the model.
            stop_ids: As in `Engine`.
            max_running: As in `Engine`.
            threads: CPU threads; auto measures which number gives the fastest forward pass (see `threads.py`).

        Raises:
            InputError: No such folder, no loadable model in it, or an invalid number of threads.
        """
        from lit_llm.system.threads import number, settle

        if threads != "auto":
            number(threads)                         # first, because the weights take longer
        loaded = _load(str(folder), device, dtype, adapter)
        engine = cls(loaded, stop_ids=stop_ids, max_running=max_running)
        if loaded.device.type == "cpu":
            engine.threads = settle(threads, lambda: _forward_alone(loaded))
        return engine

    def add(self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        """Queue a request; invalid values are refused here, not in a later step.

        Raises:
            InputError: An empty prompt, an id outside the vocabulary, or more tokens than the context has.
        """
        import torch

        assert request_id not in self._running, "request ids are used once"
        prompt = [int(id_) for id_ in prompt_ids]
        if not prompt:
            raise InputError("the prompt is empty", where="prompt")
        if not 0 <= min(prompt) <= max(prompt) < self.vocab_size:
            raise InputError(f"token ids must be from 0 to {self.vocab_size - 1}", where="prompt")
        left = budget(len(prompt), params, self.context_length)
        generator = None
        if params.seed is not None and not params.greedy:
            generator = torch.Generator(device=self.model.device).manual_seed(params.seed)
        self._waiting.append((request_id, _Request(prompt, list(prompt), left, params, generator)))

    def cancel(self, request_id: str) -> bool:
        """Remove a request and free its cache; false if it is unknown. No event follows."""
        before = len(self._waiting)
        self._waiting = deque(item for item in self._waiting if item[0] != request_id)
        return self._running.pop(request_id, None) is not None or len(self._waiting) < before

    def step(self) -> list[Event]:
        """Advance every running request by one token; the first step of a request reads its whole prompt."""
        while self._waiting and len(self._running) < self.max_running:
            request_id, request = self._waiting.popleft()
            self._running[request_id] = request
        return [self._advance(request_id, request) for request_id, request in list(self._running.items())]

    @property
    def has_work(self) -> bool:
        """Whether any request is running or waiting."""
        return bool(self._running or self._waiting)

    @property
    def stats(self) -> EngineStats:
        """Current and total counts."""
        return EngineStats(len(self._running), len(self._waiting), self._prompt_tokens, self._generated_tokens)

    def _advance(self, request_id: str, request: _Request) -> Event:
        try:
            token_id = self._forward(request)
        except Exception as error:                  # out of memory, non-finite logits: fails only this request
            self._running.pop(request_id)
            return Event(request_id, None, error=error)
        request.left -= 1
        self._generated_tokens += 1
        reason: FinishReason | None = "stop" if token_id in self.stop_ids else None if request.left else "length"
        if reason:
            self._running.pop(request_id)
        return Event(request_id, token_id, reason)

    def _forward(self, request: _Request) -> int:
        """Read the pending tokens and sample the next token, which becomes pending."""
        import torch
        from transformers import DynamicCache

        # no_grad, not inference_mode: a model in training may keep tensors of this forward pass (rotary tables).
        with torch.no_grad():
            if self._reads_cache is None:
                self._reads_cache = _reads_cache(self.model, request.all_ids)
            if request.cache is None:
                request.cache = DynamicCache(config=self.model.config) if self._reads_cache else ()
                self._prompt_tokens += len(request.all_ids)
            ids = torch.tensor([request.pending_ids if self._reads_cache else request.all_ids],
                               device=self.model.device)
            cached = {"past_key_values": request.cache, "use_cache": True, "logits_to_keep": 1}
            output = self.model(input_ids=ids, **(cached if self._reads_cache else {}))
            logits_BV = output.logits[:, -1].float()
            token_id = int(next_ids(logits_BV, [request.params], [request.generator]))
        request.pending_ids = [token_id]
        request.all_ids.append(token_id)
        return token_id


def _reads_cache(model: Any, prompt: list[int]) -> bool:
    """Whether a token after a cache has the same logits as after the tokens themselves.

    Architectures that keep another state (Mamba, RWKV) accept the argument but ignore it: each token would be
    processed as if it were the first. For them all tokens are read again for each new token, which is slow but correct.
    """
    import torch
    from transformers import DynamicCache

    ids = torch.tensor([(prompt * 3)[:6] if len(prompt) < 3 else prompt[:6]], device=model.device)
    want = model(input_ids=ids).logits[:, -1].float()
    try:
        cache = DynamicCache(config=model.config)
        model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
        have = model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
    except Exception:                                   # an argument that it does not accept
        return False
    return bool((have.float() - want).norm() <= 0.1 * want.norm())


# ---- loading ---------------------------------------------------------------------------------------------------------

def model_folder(model: str) -> str:
    """The folder of the weights: a run's export, or a folder or hub id unchanged.

    Raises:
        InputError: No such folder, or nothing loadable in it.
    """
    folder = names.path_of(model)
    if not folder.is_dir():
        if folder.exists() or names.is_path(model) or "/" not in model:
            raise InputError(f"there is no folder {model}", where="model", fix="give a run's folder or its export/, or "
                             "any folder that transformers loads; `python -m lit_llm fit` makes one")
        return model
    for place in (folder, folder / "export"):
        if (place / "config.json").is_file() or (place / "adapter_config.json").is_file():
            return str(place)
    raise InputError(f"{model} holds no model: neither config.json nor export/", where="model",
                     fix="a run has its export/ when its fit has finished" if (folder / "checkpoints").is_dir() else "")


def _adapter_base(folder: str) -> str | None:
    """The base that a PEFT adapter folder names; None if the folder is not an adapter."""
    file = Path(folder, "adapter_config.json")
    if not file.is_file() or Path(folder, "config.json").is_file():
        return None
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"it is not valid JSON: {str(error)[:120]}", where=str(file)) from None
    base = facts.get("base_model_name_or_path") if isinstance(facts, dict) else None
    if not base or not isinstance(base, str):
        raise InputError("it does not name a base", where=str(file), fix="set base_model_name_or_path, or give the "
                         "base as --model and this folder as --adapter")
    return base


def _trained_on(adapter: str | Path) -> dict[str, Any]:
    """The manifest of the checkpoint that an adapter belongs to; empty if there is none."""
    try:
        facts = json.loads((Path(adapter).absolute().parent / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def tokenizer_folder(folder: str, adapter: str | Path | None = None) -> str:
    """The folder of a model's tokenizer: of the adapter, of its run, of the model, or of its base."""
    for place in [Path(given).resolve() for given in (adapter, folder) if given]:
        run = place.parent.parent.parent            # of RUN/checkpoints/step_N/adapter
        trained = [run / "tokenizer"] if (place / "adapter_config.json").is_file() else []
        if tokenizer_home := next((home for home in [place, *trained] if (home / "tokenizer.json").is_file()), None):
            return str(tokenizer_home)
    return _adapter_base(folder) or folder


def _load(folder: str, device: str, dtype: str, adapter: str | Path | None) -> Any:
    """Load a model with its adapter merged, on its device, in eval mode."""
    import torch
    from safetensors import SafetensorError

    from lit_llm.models.adapters.starting import merged
    from lit_llm.models.load import load_causal_lm, stored_dtype

    facts = _trained_on(adapter or folder) if adapter or _adapter_base(folder) else {}
    if base := _adapter_base(folder):
        folder, adapter = names.resolve(origin.found(base, facts.get("base_hash"), Path(folder))), folder
    elif (wanted := facts.get("base_hash")) and origin.content_hash(folder) not in (None, wanted):
        raise InputError(f"the adapter {adapter} was trained on another base, {facts.get('base')}", where="adapter",
                         fix=f"give --model {facts.get('base')}, or the folder where that base lies now")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"{device} cannot be used: {str(error).splitlines()[0][:160]}", where="device",
                         fix="leave it out: auto selects an available device") from None
    kind = stored_dtype(folder) if dtype == "auto" else getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype):
        raise InputError(f"unknown dtype '{dtype}'; use auto, float32 or bfloat16", where="dtype")
    try:
        model: Any = load_causal_lm(folder, dtype=kind)
        if adapter:
            check.check_weights(folder, model)
            model = merged(model, Path(adapter))
            if Path(adapter, "generation_config.json").is_file():       # where its training taught it to stop
                model.generation_config = model.generation_config.from_pretrained(str(adapter))
    except InputError:
        raise
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
        raise InputError(f"cannot load {adapter or folder}: {(str(error).splitlines() or ['?'])[0][:200]}",
                         where="model") from None
    model = model.to(device).eval()
    if not adapter:
        check.check_weights(folder, model)
    return model


def _forward_alone(model: Any) -> None:
    """A forward pass of one token without a cache, whose cost is close to that of a step."""
    import torch

    with torch.no_grad():
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=False)


def _own_stop_ids(model: Any) -> frozenset[int]:
    own = getattr(model.generation_config, "eos_token_id", None)
    return frozenset([own] if isinstance(own, int) else own or ())
