"""Decode the tokens of an engine to text, as a stream or as a whole answer.

It handles incomplete characters, stop strings and the encoding of prompts.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lit_llm.errors import InputError
from lit_llm.inference.engine import MAX_RUNNING, Engine, Event, FinishReason
from lit_llm.inference.loading import tokenizer_folder
from lit_llm.inference.logprobs import TokenLogprob
from lit_llm.inference.sampling import SamplingParams
from lit_llm.text.conversation import Conversation, Document

if TYPE_CHECKING:
    from lit_llm.text.tokenizer import Tokenizer

Prompt = Conversation | Document | Sequence[int]
HALF_CHARACTER = re.compile("(?<!\ufffd)\ufffd{1,3}$")    # a longer run is not an incomplete character
GREEDY = SamplingParams(temperature=0)


@dataclass(frozen=True, slots=True)
class Completion:
    """A piece of an answer, or the whole answer.

    Args:
        text: New text, without incomplete characters and without any part of a stop string.
        token_ids: Tokens generated since the last piece, including the stop token.
        finish_reason: `stop` (a stop token or string) or `length` (max_tokens); None while generation continues.
        prompt_tokens: Tokens of the prompt.
        completion_tokens: Tokens generated so far, including the stop token.
        logprobs: Log-probabilities of `token_ids`, if the request asks for them.
        offsets: Where the text of each of these begins in the answer's text.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    prompt_tokens: int
    completion_tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()
    offsets: tuple[int, ...] = ()


@dataclass(slots=True)
class Detokenizer:
    """Decodes the token ids of one answer incrementally; incomplete characters and stop strings are held back.

    It decodes a sliding window and not with the library's `DecodeStream`, which raises an error when a byte-fallback
    vocabulary generates bytes that are not UTF-8.

    Args:
        tokenizer: The model's tokenizer.
        prompt_tokens: Tokens of the prompt.
        stop: Strings that end the answer.
        min_tokens: Stop strings that end within these tokens have no effect.
        markers: Spellings of special tokens that are part of the text, such as those around tool calls.
        context: The last tokens of a prompt that is continued: sentencepiece leaves out the space before a first word.
    """

    tokenizer: "Tokenizer"
    prompt_tokens: int
    stop: tuple[str, ...] = ()
    min_tokens: int = 0
    markers: Mapping[int, str] = field(default_factory=dict)
    context: Sequence[int] = ()
    text: str = ""
    _ids: list[int] = field(default_factory=list)
    _drawn: int = 0
    _shown: int = 0
    _window: int = 0                                # first id that is decoded again, for the spaces between words
    _read: int = 0                                  # number of ids that are already in `text`

    def __post_init__(self) -> None:
        self._ids, self._read = list(self.context), len(self.context)

    def push(self, token_id: int, finish_reason: FinishReason | None,
             logprob: TokenLogprob | None = None) -> Completion:
        """Add a token and return the new piece, often empty. A stop string ends the answer."""
        self._drawn += 1
        before = len(self.text)
        if token_id in self.markers and finish_reason != "stop":
            self._decode("stop")                    # what is held back ends here
            self.text += self.markers[token_id]
        if finish_reason != "stop":                 # the stop token is not part of the text
            self._ids.append(token_id)
        self._decode(finish_reason)
        end = len(self.text)
        ends = [(at + len(stop), at) for stop in self.stop
                 if self._drawn > self.min_tokens and (at := self.text.find(stop, max(0, before - len(stop) + 1))) >= 0]
        if ends:                                   # the first complete stop string wins, independent of tokens
            end, finish_reason = min(ends)[1], "stop"
        elif not finish_reason:
            end -= self._partial_stop()
        piece, self._shown = self.text[self._shown:end], max(self._shown, end)
        return Completion(piece, (token_id,), finish_reason, self.prompt_tokens, self._drawn,
                          *(((logprob,), (before,)) if logprob is not None else ()))

    def _decode(self, finish_reason: FinishReason | None) -> None:
        old = self.tokenizer.decode(self._ids[self._window:self._read])
        new = self.tokenizer.decode(self._ids[self._window:])
        if finish_reason == "length":
            new = HALF_CHARACTER.sub("", new)       # an incomplete character at max_tokens
        elif not finish_reason and new.endswith("\ufffd"):
            return
        self.text += new[len(old):]
        self._window, self._read = self._read, len(self._ids)

    def _partial_stop(self) -> int:
        """Length of the longest suffix of the text that is a prefix of a stop string."""
        longest = min(max(map(len, self.stop), default=1) - 1, len(self.text) - self._shown)
        return next((count for count in range(longest, 0, -1)
                     if any(stop.startswith(self.text[-count:]) for stop in self.stop)), 0)


class TextEngine:
    """An engine with a tokenizer, for chat, samples in training, comparisons, and files of prompts.

    Args:
        engine: An engine without other requests.
        tokenizer: The model's tokenizer; its stop ids end answers as well.
    """

    def __init__(self, engine: Engine, tokenizer: "Tokenizer") -> None:
        self.engine, self.tokenizer = engine, tokenizer
        engine.stop_ids |= frozenset(tokenizer.stop_ids)
        self._names = itertools.count()

    @classmethod
    def load(cls, folder: str | Path, *, device: str = "auto", dtype: str = "auto", adapter: str | Path | None = None,
             threads: int | str = "auto", max_running: int = MAX_RUNNING) -> "TextEngine":
        """Load model and tokenizer of a folder; arguments and errors as in `Engine.load`."""
        from lit_llm.text.tokenizer import Tokenizer

        tokenizer = Tokenizer.load(tokenizer_folder(str(folder), adapter))   # first, because the weights take longer
        return cls(Engine.load(folder, device=device, dtype=dtype, adapter=adapter, threads=threads,
                               max_running=max_running), tokenizer)

    def encode(self, prompt: Prompt) -> list[int]:
        """Prompt ids: of a conversation with its generation prompt, of a document's beginning, or given ids."""
        if isinstance(prompt, Conversation):
            return self.tokenizer.encode_prompt(prompt)
        if isinstance(prompt, Document):
            return self.tokenizer.encode_document(prompt, end=False).input_ids.tolist()
        return list(prompt)

    def stream(self, prompt: Prompt, params: SamplingParams = GREEDY) -> Iterator[Completion]:
        """Stream the pieces of an answer, the last with a finish_reason; closing the iterator cancels it.

        Raises:
            InputError: The prompt does not fit, or the model's logits are not finite.
        """
        assert not self.engine.has_work, "one answer at a time"
        ids = self.encode(prompt)
        request_id = f"answer-{next(self._names)}"
        detokenizer = Detokenizer(self.tokenizer, len(ids), params.stop, params.min_tokens)
        self.engine.add(request_id, ids, params)
        try:
            while self.engine.has_work:
                for event in self.engine.step():    # none while a long prompt is being read
                    piece = _piece(event, detokenizer)
                    yield piece
                    if piece.finish_reason:
                        return
        finally:
            self.engine.cancel(request_id)

    def generate(self, prompt: Prompt, params: SamplingParams = GREEDY) -> Completion:
        """Generate a whole answer."""
        return _joined(list(self.stream(prompt, params)))

    def generate_many(
        self, prompts: Iterable[tuple[Sequence[int], SamplingParams]]
    ) -> Iterator[tuple[int, Completion]]:
        """Generate whole answers to many prompts, batched by the engine; closing the iterator cancels the others.

        Args:
            prompts: Token ids and settings; taken as the engine has room.

        Yields:
            The number of the prompt, from 0, and its answer, in the order in which they end.

        Raises:
            InputError: A prompt does not fit, or the model's logits are not finite.
        """
        assert not self.engine.has_work, "the engine answers for one caller"
        waiting, running = enumerate(prompts), dict[str, tuple[int, Detokenizer, list[Completion]]]()
        try:
            while True:
                while self.engine.stats.waiting < self.engine.max_running and (item := next(waiting, None)) is not None:
                    number, (ids, params) = item
                    name = f"answer-{next(self._names)}"
                    self.engine.add(name, ids, params)
                    running[name] = number, Detokenizer(self.tokenizer, len(ids), params.stop, params.min_tokens), []
                if not running:
                    return
                for event in self.engine.step():
                    if event.request_id not in running:
                        continue
                    number, detokenizer, pieces = running[event.request_id]
                    pieces.append(_piece(event, detokenizer))
                    if pieces[-1].finish_reason:
                        self.engine.cancel(event.request_id)    # a stop string ends the text, not the request
                        del running[event.request_id]
                        yield number, _joined(pieces)
        finally:
            for name in running:
                self.engine.cancel(name)


def _piece(event: Event, detokenizer: Detokenizer) -> Completion:
    """The text of a step.

    Raises:
        InputError: The model's logits are not finite.
    """
    if isinstance(event.error, FloatingPointError):
        raise InputError(f"{event.error} (inf or nan)", where="model", fix="use float32, or other weights")
    if event.error or event.token_id is None:
        raise event.error or RuntimeError("the engine returned no token")
    return detokenizer.push(event.token_id, event.finish_reason, event.logprob)


def _joined(pieces: Sequence[Completion]) -> Completion:
    """The whole answer."""
    text, ids = "".join(piece.text for piece in pieces), tuple(id_ for piece in pieces for id_ in piece.token_ids)
    last = pieces[-1]
    return Completion(text, ids, last.finish_reason, last.prompt_tokens, last.completion_tokens,
                      tuple(logprob for piece in pieces for logprob in piece.logprobs))
