"""The choices of a response: each prompt is answered `n` times, and each answer is a request of the engine."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TypeVar

from lit_llm.errors import InputError
from lit_llm.inference.sampling import SamplingParams
from serve.errors import ApiError, bad_request
from serve.openai.replies import PLAIN, Plan

T = TypeVar("T")
CONTEXT = 8                                         # tokens of a prompt that are decoded with those behind it
SEEDS = 2**63                                       # seeds are below this


@dataclass(frozen=True, slots=True)
class Choice:
    """One answer.

    Args:
        ids: Its prompt.
        params: How it is sampled.
        sample: Which answer to this prompt it is; the prompt's tokens are counted with the first.
        echo: The text of the prompt, if it is part of the answer's text.
        is_empty: Whether nothing is generated: the engine's token is left out.
        plan: How the text of a chat completion is read.
        continues: Whether its text continues the prompt's text instead of being a turn of its own.
    """

    ids: list[int]
    params: SamplingParams
    sample: int = 0
    echo: str | None = None
    is_empty: bool = False
    plan: Plan = PLAIN
    continues: bool = False

    @property
    def context(self) -> list[int]:
        """The last tokens of the prompt that the text continues."""
        return self.ids[-CONTEXT:] if self.continues else []


def fitted(ids: Sequence[int], params: SamplingParams, context_length: int, field: str) -> SamplingParams:
    """The settings with `max_tokens` reduced to the room that the prompt leaves.

    Raises:
        ApiError: 400 if the prompt leaves no room, in the words by which clients recognize this error.
    """
    room = context_length - len(ids)
    if room < 1:
        raise ApiError(400, f"This model's maximum context length is {context_length} tokens. However, your {field} "
                       f"resulted in {len(ids)} tokens. Please reduce the length of the {field}.", param=field,
                       code="context_length_exceeded")
    most = min(room, room if params.max_tokens is None else params.max_tokens)
    return replace(params, max_tokens=most, min_tokens=min(params.min_tokens, most))


def checked(ids: Sequence[int], params: SamplingParams, vocab_size: int, field: str) -> None:
    """Refuse token ids that the model does not have.

    Raises:
        ApiError: 400 that names the field.
    """
    if not ids or not 0 <= min(ids) <= max(ids) < vocab_size:
        raise ApiError(400, f"{field}: at least one token, with ids from 0 to {vocab_size - 1}", param=field)
    try:
        params.check_ids(vocab_size)
    except InputError as error:
        raise bad_request(error) from None


def samples(params: SamplingParams, count: int) -> list[SamplingParams]:
    """The settings of `count` answers to a prompt; the first has the given seed, and each other the next one."""
    if params.seed is None:
        return [params] * count
    return [replace(params, seed=(params.seed + at + SEEDS) % (2 * SEEDS) - SEEDS) for at in range(count)]


async def merged(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """The items of several streams as they come, each with the index of its stream; closing it closes them all."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for item in only:
                yield 0, item
        return
    inbox: asyncio.Queue[tuple[int, T] | Exception | None] = asyncio.Queue()

    async def forward(index: int, stream: AsyncGenerator[T, None]) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    inbox.put_nowait((index, item))
            inbox.put_nowait(None)
        except Exception as error:
            inbox.put_nowait(error)

    tasks = [asyncio.create_task(forward(*numbered)) for numbered in enumerate(streams)]
    try:
        running = len(tasks)
        while running:
            arrived = await inbox.get()
            if isinstance(arrived, Exception):
                raise arrived
            if arrived is None:
                running -= 1
            else:
                yield arrived
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
