"""Connections of clients: they must send requests and read answers in time, and their number is limited."""

import asyncio
import json
import sys
from contextlib import suppress
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from serve.errors import ApiError

SPARE = 64                                          # connections above the limit that still get an answer


class Connection(H11Protocol):
    """An HTTP/1.1 connection. h11 limits the size of its headers, which uvicorn's faster protocol does not.

    uvicorn itself waits for ever for the rest of a request, for the first byte of a new connection, and for a client
    that reads nothing of its answer.

    Args:
        request_seconds: Time for a client to send each of its requests, or the first one after connecting.
        write_seconds: Time in which a client must read something of what was sent to it.
        most: Number of connections; further ones get status 503 and are closed.
        options: Arguments of uvicorn's class.
    """

    def __init__(self, *, request_seconds: float, write_seconds: float, most: int, **options: Any) -> None:
        super().__init__(**options)
        self.request_seconds, self.write_seconds, self.most = request_seconds, write_seconds, most
        self.arrival_limit: asyncio.TimerHandle | None = None
        self.reading_limit: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Start the time of the first request, or refuse the connection."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)   # writing pauses as soon as the system takes no more
        if len(self.connections) > self.most + SPARE:
            transport.abort()
        elif len(self.connections) > self.most:
            self.app = _too_many
        self._time_arrival(unfinished=True)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the times."""
        self._time_arrival(unfinished=False)
        self._stop_reading_limit()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Start the time of a client that does not read."""
        super().pause_writing()
        self._time_reading()

    def resume_writing(self) -> None:
        """Stop it: all has been sent."""
        super().resume_writing()
        self._stop_reading_limit()

    def _time_reading(self, before: int | None = None) -> None:
        """Close the connection if nothing was sent since `before`, the bytes that were left; otherwise look again."""
        left = self.transport.get_write_buffer_size() + _unsent(self.transport.get_extra_info("socket"))
        if left == before:
            self.transport.abort()                  # a polite end would wait until the rest is sent
        else:
            self.reading_limit = self.loop.call_later(self.write_seconds, self._time_reading, left)

    def _stop_reading_limit(self) -> None:
        if self.reading_limit is not None:
            self.reading_limit.cancel()
            self.reading_limit = None

    def data_received(self, data: bytes) -> None:
        """Take a part of a request."""
        super().data_received(data)
        self._time_arrival(unfinished=self._receives())

    def on_response_complete(self) -> None:
        """Begin with what the client has sent meanwhile."""
        super().on_response_complete()
        self._time_arrival(unfinished=self._receives())

    def _receives(self) -> bool:
        """Whether a request has begun and is not complete."""
        state = self.conn.their_state
        return state is h11.SEND_BODY or (state is h11.IDLE and bool(self.conn.trailing_data[0]))

    def _time_arrival(self, *, unfinished: bool) -> None:
        if unfinished and self.arrival_limit is None:
            self.arrival_limit = self.loop.call_later(self.request_seconds, self._give_up)
        elif not unfinished and self.arrival_limit is not None:
            self.arrival_limit.cancel()
            self.arrival_limit = None

    def _give_up(self) -> None:
        """Close the connection; a client that has begun a request and has no answer yet gets status 408."""
        if self.transport.is_closing():
            return
        answered = self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete
        if not answered and self._receives():
            error = ApiError(408, f"the request did not arrive within {self.request_seconds:g} seconds",
                             code="request_timeout")
            body = json.dumps(error.body).encode()
            self.transport.write(b"HTTP/1.1 408 Request Timeout\r\nContent-Type: application/json\r\nConnection: close"
                                 b"\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        self.transport.close()


def _unsent(connection: Any) -> int:
    """Bytes that the system has taken and not sent yet; 0 where it does not tell (Windows)."""
    try:
        import fcntl
        import termios
    except ImportError:
        return 0
    with suppress(OSError):
        return int.from_bytes(fcntl.ioctl(connection, termios.TIOCOUTQ, bytes(4)), sys.byteorder)
    return 0


async def _too_many(scope: Any, receive: Any, send: Any) -> None:
    """The answer on a connection above the limit."""
    error = ApiError(503, "too many connections are open", code="too_many_connections", headers={"Retry-After": "1"})
    headers = [(b"content-type", b"application/json"), (b"connection", b"close"), (b"retry-after", b"1")]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(error.body).encode()})
