"""Send answers: whole, or as server-sent events, until the client disconnects."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse

from lit_llm.inference.completion import Completion
from serve.errors import ApiError
from serve.openai.answers import Shape

T = TypeVar("T")


async def whole(pieces: AsyncGenerator[tuple[int, Completion], None], count: int) -> list[list[Completion]]:
    """All pieces of each of `count` choices."""
    answers: list[list[Completion]] = [[] for _ in range(count)]
    async with aclosing(pieces):
        async for index, piece in pieces:
            answers[index].append(piece)
    return answers


async def events(
    shape: Shape, first: tuple[int, Completion], rest: AsyncGenerator[tuple[int, Completion], None], *, with_usage: bool
) -> AsyncGenerator[str, None]:
    """Server-sent events: the roles, the texts and finish reasons, the usage, `[DONE]`."""
    def event(value: dict[str, Any]) -> str:
        return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"

    lasts: dict[int, Completion] = {}
    async with aclosing(rest):
        for opening in shape.openings():
            yield event(opening)
        try:
            for chunk in shape.chunks(*first):
                yield event(chunk)
            lasts[first[0]] = first[1]
            async for index, piece in rest:
                for chunk in shape.chunks(index, piece):
                    yield event(chunk)
                lasts[index] = piece
        except ApiError as error:  # too late for a status: send the error in the stream, without [DONE]
            yield event(error.body)
            return
        if with_usage:
            yield event(shape.accounts(list(lasts.values())))
        yield "data: [DONE]\n\n"


class EventStream(StreamingResponse):
    """A stream that is closed with its connection, not at garbage collection, to free the engine's slot."""

    def __init__(self, content: AsyncGenerator[str, None]) -> None:
        self._events = content
        super().__init__(content, media_type="text/event-stream",
                         headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the stream."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()


async def until_disconnect(request: Request, work: Awaitable[T]) -> T:
    """Await the work; cancel it when the client disconnects.

    Raises:
        ApiError: 499 if the client has closed the connection.
    """
    task, disconnect = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError(499, "the client closed the connection")
    finally:
        for part in (task, disconnect):
            part.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await part


async def _disconnected(request: Request) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(0.1)
