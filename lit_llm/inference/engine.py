"""Token ids in, token ids out, one token per request and step; around it a thin layer where they become text.

The engine knows neither text nor HTTP, and the layer knows no model. Whoever serves requests drives `step`; requests
interleave, and each is computed alone, so its tokens are those of `model.generate` for its prompt.
"""

import itertools
import json
import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lit_llm.conversation import Conversation, Document
from lit_llm.errors import InputError
from lit_llm.inference.sampling import SamplingParams, next_ids
from lit_llm.samples import resolve

if TYPE_CHECKING:
    from lit_llm.tokenizer import Tokenizer

FinishReason = Literal["stop", "length"]
Prompt = Conversation | Document | Sequence[int]
HALF_CHARACTER = re.compile("(?<!\ufffd)\ufffd{1,3}$")    # a longer run is no character cut short: show it
GREEDY = SamplingParams(temperature=0)


@dataclass(frozen=True, slots=True)
class Event:
    """One step of one request: a token, or the error that ended it.

    Args:
        request_id: Whose.
        token_id: The token drawn; the stop token too. None only beside an error.
        finish_reason: None while there is more to come.
        error: What went wrong with this request alone; it is already gone from the engine.
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
    """New tokens that a request may have.

    Raises:
        InputError: The prompt and `max_tokens` do not fit into the context; it names both numbers.
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
    """A request's whole state: what is read next, what has been read, and how many tokens are left."""

    pending_ids: list[int]
    left: int
    params: SamplingParams
    generator: Any
    cache: Any = None


class Engine:
    """The plain engine: a key-value cache for each request, all of them advanced in turn, one token per step.

    Exact before fast: nothing is padded or batched across requests, so no request can change another's numbers. A
    server uses only `add`, `cancel`, `step`, `has_work`, `stats` and the two sizes; another backend offers the same.

    Args:
        model: A transformers causal LM in eval mode, with an attention that reads a cache (`sdpa`, `eager`, ...).
        stop_ids: Tokens that end an answer, besides the model's own `generation_config.eos_token_id`.
        max_running: Requests computed at a time; the others wait in order of arrival.
    """

    def __init__(self, model: Any, *, stop_ids: Sequence[int] = (), max_running: int = 8) -> None:
        self.model, self.max_running = model, max_running
        self.stop_ids = frozenset(stop_ids) | _own_stop_ids(model)
        config = model.config.get_text_config()
        self.context_length = int(getattr(config, "max_position_embeddings", None) or 2048)
        self.vocab_size = int(config.vocab_size)
        self._waiting: deque[tuple[str, _Request]] = deque()
        self._running: dict[str, _Request] = {}
        self._prompt_tokens = self._generated_tokens = 0

    @classmethod
    def load(cls, folder: str | Path, *, device: str = "auto", dtype: str = "auto", adapter: str | Path | None = None,
             stop_ids: Sequence[int] = (), max_running: int = 8) -> "Engine":
        """An engine on a folder that transformers can load.

        Args:
            folder: An export, or a PEFT adapter's folder (its base is loaded and the adapter merged into it).
            device: `auto` takes the GPU where there is one.
            dtype: `auto` takes the checkpoint's own.
            adapter: A PEFT adapter's folder to merge into the model.
            stop_ids: As in `Engine`.
            max_running: As in `Engine`.

        Raises:
            InputError: No such folder, or it holds no loadable model.
        """
        return cls(_load(str(folder), device, dtype, adapter), stop_ids=stop_ids, max_running=max_running)

    def add(self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        """Queue a request; everything that could fail later for its values fails here.

        Raises:
            InputError: An empty prompt, an id outside the vocabulary, or more tokens than the context holds.
        """
        import torch

        assert request_id not in self._running, "request ids are used once"
        prompt = [int(id_) for id_ in prompt_ids]
        if not prompt:
            raise InputError("the prompt has no tokens", where="prompt")
        if not 0 <= min(prompt) <= max(prompt) < self.vocab_size:
            raise InputError(f"token ids must be from 0 to {self.vocab_size - 1}", where="prompt")
        left = budget(len(prompt), params, self.context_length)
        generator = None
        if params.seed is not None and not params.greedy:
            generator = torch.Generator(device=self.model.device).manual_seed(params.seed)
        self._waiting.append((request_id, _Request(prompt, left, params, generator)))

    def cancel(self, request_id: str) -> bool:
        """Forget a request and free its cache; false if it is not there. No event follows."""
        before = len(self._waiting)
        self._waiting = deque(item for item in self._waiting if item[0] != request_id)
        return self._running.pop(request_id, None) is not None or len(self._waiting) < before

    def step(self) -> list[Event]:
        """Advance every running request by one token; a new one reads its whole prompt in its first step."""
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
        """Counts of now and since the start."""
        return EngineStats(len(self._running), len(self._waiting), self._prompt_tokens, self._generated_tokens)

    def _advance(self, request_id: str, request: _Request) -> Event:
        try:
            token_id = self._forward(request)
        except Exception as error:                  # out of memory, logits that are not numbers: this request's alone
            self._running.pop(request_id)
            return Event(request_id, None, error=error)
        request.left -= 1
        self._generated_tokens += 1
        reason: FinishReason | None = "stop" if token_id in self.stop_ids else None if request.left else "length"
        if reason:
            self._running.pop(request_id)
        return Event(request_id, token_id, reason)

    def _forward(self, request: _Request) -> int:
        """Read what is pending, draw one token, make it pending."""
        import torch
        from transformers import DynamicCache

        if request.cache is None:
            request.cache = DynamicCache(config=self.model.config)
            self._prompt_tokens += len(request.pending_ids)
        # no_grad, not inference_mode: a model in training may keep tensors that this forward makes (rotary tables).
        with torch.no_grad():
            ids = torch.tensor([request.pending_ids], device=self.model.device)
            output = self.model(input_ids=ids, past_key_values=request.cache, use_cache=True, logits_to_keep=1)
            logits_BV = output.logits[:, -1].float()
            token_id = int(next_ids(logits_BV, [request.params], [request.generator]))
        request.pending_ids = [token_id]
        return token_id


# ---- loading ---------------------------------------------------------------------------------------------------------

def model_folder(model: str) -> str:
    """Where the weights lie: a run's export, a folder as it is, or a hub id as it is.

    Raises:
        InputError: No such folder, or nothing in it that could be loaded.
    """
    folder = Path(resolve(model)).expanduser()
    if not folder.is_dir():
        if folder.exists() or folder.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
            raise InputError(f"there is no folder {model}", where="model", fix="give a run's folder or its export/, or "
                             "any folder that transformers loads; `python -m lit_llm fit` makes one")
        return model
    for place in (folder, folder / "export"):
        if (place / "config.json").is_file() or (place / "adapter_config.json").is_file():
            return str(place)
    raise InputError(f"{model} holds no model: neither config.json nor export/", where="model",
                     fix="a run has its export/ when its fit has finished" if (folder / "checkpoints").is_dir() else "")


def _adapter_base(folder: str) -> str | None:
    """The base that a PEFT adapter's folder names; None where the folder is no adapter."""
    file = Path(folder, "adapter_config.json")
    if not file.is_file() or Path(folder, "config.json").is_file():
        return None
    return str(json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path"))


def tokenizer_folder(folder: str) -> str:
    """Where the tokenizer of a model lies: with it, or with an adapter's base."""
    return folder if Path(folder, "tokenizer.json").is_file() else _adapter_base(folder) or folder


def _load(folder: str, device: str, dtype: str, adapter: str | Path | None) -> Any:
    """A model with its adapter merged, on its device, in eval mode."""
    import torch
    from safetensors import SafetensorError

    from lit_llm.model import load_adapter, load_causal_lm, merge

    if base := _adapter_base(folder):
        folder, adapter = base, folder
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if dtype == "auto":
        file = Path(folder, "config.json")
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    if not isinstance(kind := getattr(torch, dtype, None), torch.dtype):
        raise InputError(f"unknown dtype '{dtype}'; use auto, float32 or bfloat16", where="dtype")
    try:
        model: Any = load_causal_lm(folder, dtype=kind, attention="sdpa")
        if adapter:
            model = merge(load_adapter(model, adapter))
    except InputError:
        raise
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
        raise InputError(f"cannot load {adapter or folder}: {(str(error).splitlines() or ['?'])[0][:200]}",
                         where="model") from None
    return model.to(device).eval()


def _own_stop_ids(model: Any) -> frozenset[int]:
    own = getattr(model.generation_config, "eos_token_id", None)
    return frozenset([own] if isinstance(own, int) else own or ())


# ---- text ------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True, slots=True)
class Completion:
    """A piece of an answer as it comes, or all of it.

    Args:
        text: What is new, ready to show: no half character, nothing of a stop string.
        token_ids: The tokens drawn since the last piece, the stop token included.
        finish_reason: `stop` (a stop token or string) or `length` (max_tokens); None while there is more to come.
        prompt_tokens: Tokens of the prompt.
        completion_tokens: Tokens drawn so far, the stop token included.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    prompt_tokens: int
    completion_tokens: int


@dataclass(slots=True)
class Detokenizer:
    """One answer's token ids in, its text out in pieces; half a character or half a stop string is held back.

    Decodes a sliding window, not the library's `DecodeStream`: that raises where a byte-fallback vocabulary draws bytes
    which are no UTF-8.
    """

    tokenizer: "Tokenizer"
    prompt_tokens: int
    stop: tuple[str, ...] = ()
    text: str = ""
    _ids: list[int] = field(default_factory=list)
    _drawn: int = 0
    _shown: int = 0
    _window: int = 0                                # ids from here on are decoded again, for the spaces between words
    _read: int = 0                                  # ids before here are in `text`

    def push(self, token_id: int, finish_reason: FinishReason | None) -> Completion:
        """The piece that a token completes, often empty. A stop string ends the answer whatever the engine said."""
        self._drawn += 1
        if finish_reason != "stop":                 # the stop token itself is never text
            self._ids.append(token_id)
        before = len(self.text)
        self._decode(finish_reason)
        end = len(self.text)
        found = [(at + len(stop), at) for stop in self.stop
                 if (at := self.text.find(stop, max(0, before - len(stop) + 1))) >= 0]
        if found:                                   # the first to be complete wins, however tokens cut the text
            end, finish_reason = min(found)[1], "stop"
        elif not finish_reason:
            end -= self._held()
        piece, self._shown = self.text[self._shown:end], max(self._shown, end)
        return Completion(piece, (token_id,), finish_reason, self.prompt_tokens, self._drawn)

    def _decode(self, finish_reason: FinishReason | None) -> None:
        old = self.tokenizer.decode(self._ids[self._window:self._read])
        new = self.tokenizer.decode(self._ids[self._window:])
        if finish_reason == "length":
            new = HALF_CHARACTER.sub("", new)       # what max_tokens cut
        elif not finish_reason and new.endswith("\ufffd"):
            return
        self.text += new[len(old):]
        self._window, self._read = self._read, len(self._ids)

    def _held(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = min(max(map(len, self.stop), default=1) - 1, len(self.text) - self._shown)
        return next((count for count in range(longest, 0, -1)
                     if any(stop.startswith(self.text[-count:]) for stop in self.stop)), 0)


class TextEngine:
    """An engine with a tokenizer, for those who want one answer at a time: chat, samples while training, comparisons.

    Args:
        engine: With nothing else to do.
        tokenizer: The model's own; its stop ids end answers too.
    """

    def __init__(self, engine: Engine, tokenizer: "Tokenizer") -> None:
        self.engine, self.tokenizer = engine, tokenizer
        engine.stop_ids |= frozenset(tokenizer.stop_ids)
        self._names = itertools.count()

    @classmethod
    def load(cls, folder: str | Path, *, device: str = "auto", dtype: str = "auto",
             adapter: str | Path | None = None) -> "TextEngine":
        """Model and tokenizer of a folder; arguments and errors are `Engine.load`'s."""
        from lit_llm.tokenizer import Tokenizer

        tokenizer = Tokenizer.load(tokenizer_folder(str(folder)))   # before the weights, which take longer
        return cls(Engine.load(folder, device=device, dtype=dtype, adapter=adapter), tokenizer)

    def encode(self, prompt: Prompt) -> list[int]:
        """Prompt ids: a conversation with its generation prompt, a document's beginning, or ids as they are."""
        if isinstance(prompt, Conversation):
            return self.tokenizer.encode_prompt(prompt)
        if isinstance(prompt, Document):
            return self.tokenizer.encode_document(prompt, end=False).input_ids.tolist()
        return list(prompt)

    def stream(self, prompt: Prompt, params: SamplingParams = GREEDY) -> Iterator[Completion]:
        """Pieces of the answer as they come, the last with a finish_reason; closing the iterator cancels it."""
        assert not self.engine.has_work, "one answer at a time"
        ids = self.encode(prompt)
        request_id = f"answer-{next(self._names)}"
        detokenizer = Detokenizer(self.tokenizer, len(ids), params.stop)
        self.engine.add(request_id, ids, params)
        try:
            while self.engine.has_work:
                (event,) = self.engine.step()
                if event.error or event.token_id is None:
                    raise event.error or RuntimeError("the engine gave no token")
                piece = detokenizer.push(event.token_id, event.finish_reason)
                yield piece
                if piece.finish_reason:
                    return
        finally:
            self.engine.cancel(request_id)

    def generate(self, prompt: Prompt, params: SamplingParams = GREEDY) -> Completion:
        """The whole answer."""
        pieces = list(self.stream(prompt, params))
        text, ids = "".join(piece.text for piece in pieces), tuple(id_ for piece in pieces for id_ in piece.token_ids)
        last = pieces[-1]
        return Completion(text, ids, last.finish_reason, last.prompt_tokens, last.completion_tokens)
