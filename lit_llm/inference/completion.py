"""Decode the tokens of an engine to text, piece by piece or an answer at a time.

Owns what stands between tokens and text: half characters, stop strings, prompts. Knows no model and no HTTP.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lit_llm.inference.engine import Engine, FinishReason, tokenizer_folder
from lit_llm.inference.sampling import SamplingParams
from lit_llm.text.conversation import Conversation, Document

if TYPE_CHECKING:
    from lit_llm.text.tokenizer import Tokenizer

Prompt = Conversation | Document | Sequence[int]
HALF_CHARACTER = re.compile("(?<!\ufffd)\ufffd{1,3}$")    # a longer run is no character cut short: show it
GREEDY = SamplingParams(temperature=0)


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
             adapter: str | Path | None = None, threads: int | str = "auto") -> "TextEngine":
        """Model and tokenizer of a folder; arguments and errors are `Engine.load`'s."""
        from lit_llm.text.tokenizer import Tokenizer

        tokenizer = Tokenizer.load(tokenizer_folder(str(folder), adapter))   # before the weights, which take longer
        return cls(Engine.load(folder, device=device, dtype=dtype, adapter=adapter, threads=threads), tokenizer)

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
