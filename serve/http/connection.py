"""Connections of clients: each request must arrive within a time, and the number of connections is limited."""

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from serve.errors import ApiError

SPARE = 64                                          # connections above the limit that still get an answer


class Connection(H11Protocol):
    """An HTTP/1.1 connection. h11 limits the size of its headers, which uvicorn's faster protocol does not.

    uvicorn itself waits for ever for the rest of a request, and for the first byte of a new connection.

    Args:
        request_seconds: Time for a client to send each of its requests, or the first one after connecting.
        most: Number of connections; further ones get status 503 and are closed.
        options: Arguments of uvicorn's class.
    """

    def __init__(self, *, request_seconds: float, most: int, **options: Any) -> None:
        super().__init__(**options)
        self.request_seconds, self.most = request_seconds, most
        self.arrival_limit: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Start the time of the first request, or refuse the connection."""
        super().connection_made(transport)
        if len(self.connections) > self.most + SPARE:
            transport.abort()
        elif len(self.connections) > self.most:
            self.app = _too_many
        self._time_arrival(unfinished=True)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the time."""
        self._time_arrival(unfinished=False)
        super().connection_lost(exc)

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


async def _too_many(scope: Any, receive: Any, send: Any) -> None:
    """The answer on a connection above the limit."""
    error = ApiError(503, "too many connections are open", code="too_many_connections", headers={"Retry-After": "1"})
    headers = [(b"content-type", b"application/json"), (b"connection", b"close"), (b"retry-after", b"1")]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(error.body).encode()})
