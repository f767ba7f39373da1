"""Send answers: whole, or as server-sent events, until the client disconnects."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing, suppress
from typing import Any, Protocol, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse

from lit_llm.inference.completion import Completion
from serve.errors import ApiError
from serve.openai.answers import Shape

T = TypeVar("T")
LOG = logging.getLogger("serve")
PING_SECONDS = 5.0


class Closable(Protocol):
    """What frees its resources when closed."""

    async def aclose(self) -> None:
        """Close it; again without effect."""


async def whole(pieces: AsyncGenerator[tuple[int, Completion], None], count: int) -> list[list[Completion]]:
    """All pieces of each of `count` choices."""
    answers: list[list[Completion]] = [[] for _ in range(count)]
    async with aclosing(pieces):
        async for index, piece in pieces:
            answers[index].append(piece)
    return answers


async def events(
    shape: Shape, pieces: AsyncGenerator[tuple[int, Completion], None], *, with_usage: bool
) -> AsyncGenerator[str, None]:
    """Server-sent events: the roles, the texts and finish reasons, the usage, `[DONE]`."""
    def event(value: dict[str, Any]) -> str:
        return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"

    lasts: dict[int, Completion] = {}
    async with aclosing(pieces):
        for opening in shape.openings():
            yield event(opening)
        try:
            async for index, piece in pieces:
                for chunk in shape.chunks(index, piece):
                    yield event(chunk)
                lasts[index] = piece
        except ApiError as error:  # too late for a status: send the error in the stream, without [DONE]
            yield event(error.body)
            return
        except Exception:
            LOG.exception("a stream failed")
            yield event(ApiError(500, "internal error").body)
            return
        if with_usage:
            yield event(shape.accounts(list(lasts.values())))
        yield "data: [DONE]\n\n"


class EventStream(StreamingResponse):
    """A stream of server-sent events: headers at once, comments while it waits, closed with its connection.

    Proxies and clients end a connection on which nothing arrives for some time, so a comment is sent while a request
    waits. Closing the sources frees the engine's slots at once and not at garbage collection, also if the client
    disconnects before the first event.

    Args:
        content: The events.
        sources: What the events are made of, such as `EngineClient.ask`'s replies; closed at the end.
        ping_seconds: A comment is sent after this time without an event.
    """

    def __init__(self, content: AsyncGenerator[str, None], sources: Sequence[Closable], *,
                 ping_seconds: float = PING_SECONDS) -> None:
        self._events, self._sources, self._ping_seconds = content, sources, ping_seconds
        self._sent_at, self._open = 0.0, False
        super().__init__(content, media_type="text/event-stream",
                         headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the stream."""
        async def noted(message: Any) -> None:
            self._open = message["type"] == "http.response.start" or message.get("more_body", False)
            self._sent_at = time.monotonic()
            await send(message)

        pings = asyncio.create_task(self._ping(send))
        try:
            await super().__call__(scope, receive, noted)
        finally:
            pings.cancel()
            await self._events.aclose()
            for source in self._sources:
                await source.aclose()

    async def _ping(self, send: Any) -> None:
        while True:
            await asyncio.sleep(self._ping_seconds / 2)
            if self._open and time.monotonic() - self._sent_at >= self._ping_seconds:
                self._sent_at = time.monotonic()
                await send({"type": "http.response.body", "body": b": ping\n\n", "more_body": True})


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
