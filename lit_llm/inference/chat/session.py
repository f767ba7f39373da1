"""A conversation with a model: its messages, what is sent of them, and the figures of its answers."""

import re
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Protocol

from lit_llm.errors import InputError
from lit_llm.inference.completion import Completion, TextEngine
from lit_llm.inference.engine import budget
from lit_llm.inference.sampling import SamplingParams
from lit_llm.text.conversation import Conversation, Message

THOUGHT = re.compile(r"\s*(?:<think>)?(.*?)</think>\s*", re.S)     # a template may have opened it in the prompt


class FullContextError(InputError):
    """The messages leave no room for an answer; fewer of them may."""


class Model(Protocol):
    """What answers: an engine in this process, or a server."""

    name: str

    def stream(self, messages: Sequence[Message], params: SamplingParams, *, alone: bool) -> Iterator[Completion]:
        """Stream an answer.

        Args:
            messages: The messages, the last one by the user.
            params: Sampling parameters.
            alone: Whether nothing could be left out, so that the answer gets what room there is.

        Raises:
            FullContextError: Prompt and answer do not fit into the context.
        """


class LocalModel:
    """A model of this machine.

    Args:
        engine: Generates the answers.
        template_args: Values of the chat template's variables.
        name: Its folder, for messages.
    """

    def __init__(self, engine: TextEngine, template_args: Mapping[str, Any] | None = None, name: str = "") -> None:
        self.engine, self._template_args, self.name = engine, template_args or {}, name

    def stream(self, messages: Sequence[Message], params: SamplingParams, *, alone: bool) -> Iterator[Completion]:
        """Stream an answer of at most `max_tokens`, clipped to the context, of which a quarter is kept free for it."""
        context = self.engine.engine.context_length
        ids = self.engine.encode(Conversation(tuple(messages), template_args=self._template_args))
        wanted = min(params.max_tokens, context // 2) if params.max_tokens else context // 4
        if not alone and len(ids) + wanted > context:
            raise FullContextError(f"the context of {context} tokens is full", where="prompt")
        room = budget(len(ids), replace(params, max_tokens=None), context)
        return self.engine.stream(ids, replace(params, max_tokens=min(room, params.max_tokens or room)))


@dataclass
class Stats:
    """Figures of one answer or of several.

    Args:
        answers: Number of answers.
        prompt_tokens: Tokens of the last prompt.
        tokens: Generated tokens.
        seconds: Time of generation, from the question on.
        first: Seconds until the first text of the last answer.
    """

    answers: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    seconds: float = 0.0
    first: float = 0.0

    def __str__(self) -> str:
        rate = self.tokens / self.seconds if self.seconds else 0
        return (f"{self.tokens:,} tokens in {self.seconds:.1f} s ({rate:.1f} tokens/s), first text after "
                f"{self.first:.2f} s, {self.prompt_tokens:,} tokens in the prompt")


class Session:
    """A conversation with a model; the oldest turns are not sent where the context is full, but they are kept.

    Args:
        model: Answers.
        params: Sampling parameters.
        system: System message, which is always sent.
        multi_turn: Whether a message is sent with the messages before it.
        note: Shows a sentence to the user.
    """

    def __init__(self, model: Model, params: SamplingParams, system: str | None = None, *, multi_turn: bool = True,
                 note: Callable[[str], None] = lambda text: None) -> None:
        self.model, self.params, self.system, self.multi_turn = model, params, system, multi_turn
        self.messages: tuple[Message, ...] = ()
        self.first = 0                              # the first message that is sent
        self.last, self.total = Stats(), Stats()
        self._note = note

    @property
    def sent(self) -> tuple[Message, ...]:
        """The messages that the next prompt begins with, after the system message."""
        return self.messages[self.first:]

    def reset(self) -> None:
        """Clear all messages except the system message."""
        self.messages, self.first = (), 0

    def undo(self) -> str | None:
        """Remove the last question and its answer; returns the question, or None if there is none."""
        place = max((at for at, message in enumerate(self.messages) if message.role == "user"), default=None)
        if place is None:
            return None
        question = self.messages[place].content
        self.messages, self.first = self.messages[:place], min(self.first, place)
        return question

    def ask(self, text: str) -> Iterator[str]:
        """Stream the answer. If the iterator is closed early, the text so far is stored as the answer.

        Raises:
            InputError: The message itself does not fit into the context, or there is no answer.
        """
        before, first, answer, start = self.messages, self.first, "", time.perf_counter()
        self.messages = (*before, Message("user", text))
        figures = Stats(answers=1)
        try:
            with closing(self._pieces()) as pieces:
                for piece in pieces:
                    answer += piece.text
                    self._count(figures, piece, time.perf_counter() - start)
                    yield piece.text
        finally:
            if answer:
                self.messages = (*self.messages, message_of(answer))
            else:       # a turn without an answer is dropped: neither templates nor training have such turns
                self.messages, self.first = before, first

    def _pieces(self) -> Generator[Completion, None, None]:
        """The pieces of the answer, after leaving out the oldest turns if they do not fit."""
        head = (Message("system", self.system),) if self.system else ()
        starts = [at for at, message in enumerate(self.messages) if message.role == "user"]
        begin = self.first if self.multi_turn else starts[-1]
        left_out = 0
        while True:
            alone = begin >= starts[-1]
            plain = [replace(message, reasoning_content=None) for message in self.messages[begin:]]
            try:
                pieces = self.model.stream([*head, *plain], self.params, alone=alone)
                opening = next(pieces, None)
                break
            except FullContextError:
                if alone:
                    raise
                following = min(at for at in starts if at > begin)
                begin, left_out = following, left_out + following - begin
        if left_out:                                # only now is it certain that the rest fits
            self.first = begin
            self._note(f"the context is full: the oldest {left_out} messages are no longer sent")
        if opening is not None:
            yield opening
        yield from pieces

    def _count(self, figures: Stats, piece: Completion, seconds: float) -> None:
        if self.last is not figures:
            self.last = figures
            self.total.answers += 1
        self.total.tokens += piece.completion_tokens - figures.tokens
        self.total.seconds += seconds - figures.seconds
        figures.tokens, figures.seconds, figures.prompt_tokens = piece.completion_tokens, seconds, piece.prompt_tokens
        figures.first = figures.first or (seconds if piece.text else 0.0)


def message_of(answer: str) -> Message:
    """The message of an answer, with its reasoning apart."""
    thought = THOUGHT.match(answer)
    if thought is None:
        return Message("assistant", answer)
    return Message("assistant", answer[thought.end():], reasoning_content=thought[1].strip() or None)
