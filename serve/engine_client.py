"""Connect the API process to the engine worker: send prompts, and route events back to their requests.

It admits requests, monitors the worker's heartbeat, and cancels requests whose client has disconnected.
"""

import asyncio
import os
import signal
import time
import uuid
from collections.abc import AsyncGenerator, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lit_llm.errors import InputError
from lit_llm.inference.engine import Event
from lit_llm.inference.sampling import SamplingParams
from serve.errors import ApiError, bad_request
from serve.worker import BEAT_SECONDS, CONSUMER, Add, Beat, Cancel

SILENT_SECONDS = 6 * BEAT_SECONDS                   # a worker without a heartbeat for this long is dead
STUCK_SECONDS = 60.0                                # a step that takes this long: not ready, but it may recover


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits on accepted requests.

    Args:
        max_running: Requests computed concurrently.
        max_waiting: Requests that may wait; further ones get status 429.
        max_body_bytes: Size limit of a request's body; larger ones get status 413.
    """

    max_running: int = 32
    max_waiting: int = 64
    max_body_bytes: int = 1_000_000


class EngineClient:
    """The API process's connection to the engine: requests in flight and the engine's state.

    Args:
        limits: Limits on accepted requests.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.orders: Any = None                     # LitServe's request queue, set before the fork
        self.queues_pid = 0                         # process that owns the queues
        self._inboxes: dict[str, asyncio.Queue[Event]] = {}
        self._arriving = 0                          # requests that are being tokenized
        self._beat: Beat | None = None
        self._beat_at = 0.0

    @property
    def beat(self) -> Beat:
        """The worker's last heartbeat.

        Raises:
            ApiError: 503 if there is none.
        """
        if self._beat is None or time.monotonic() - self._beat_at > SILENT_SECONDS:
            raise ApiError(503, "the engine is not ready", code="engine_not_ready", headers={"Retry-After": "5"})
        return self._beat

    @property
    def ready(self) -> bool:
        """Whether a new request would be computed."""
        try:
            return self.beat.step_age < STUCK_SECONDS
        except ApiError:
            return False

    @property
    def in_flight(self) -> int:
        """Number of requests with a waiting client, including those that are being tokenized."""
        return len(self._inboxes) + self._arriving

    @contextmanager
    def arriving(self) -> Generator[None, None, None]:
        """Reserve a place for a request before it is tokenized, because tokenizing takes time as well.

        Raises:
            ApiError: 503 without an engine, 429 when the queue is full.
        """
        self.admit()
        self._arriving += 1
        try:
            yield
        finally:
            self._arriving -= 1

    def admit(self, count: int = 1) -> None:
        """Refuse requests that could not be queued.

        Raises:
            ApiError: 503 without an engine, 429 when the queue is full, 400 if it never has room for so many.
        """
        most = self.limits.max_running + self.limits.max_waiting
        if self.beat and count > most:
            raise ApiError(400, f"n: {count} answers; this server computes at most {most} at a time", param="n")
        if self.in_flight + count > most:
            raise ApiError(429, f"the server is busy: {self.in_flight} requests are running or waiting",
                           code="queue_full", headers={"Retry-After": "1"})

    async def ask(self, prompt_ids: list[int], params: SamplingParams) -> AsyncGenerator[Event, None]:
        """Send a request and yield its events; closing the iterator early cancels the request.

        Raises:
            ApiError: Not admitted, refused by the engine, or lost with it.
        """
        self.admit()
        request_id = uuid.uuid4().hex
        inbox = self._inboxes[request_id] = asyncio.Queue()
        running = True
        try:
            self.orders.put(Add(request_id, prompt_ids, params))
            while running:
                event = await inbox.get()
                # an order lost with a worker may still be in the next worker's queue, without a reader for its events
                lost = isinstance(event.error, ConnectionError)
                running = lost or not (event.finish_reason or event.error)
                if event.error:
                    raise _as_api_error(event.error)
                yield event
        finally:
            del self._inboxes[request_id]
            if running:
                self.orders.put(Cancel(request_id))

    async def listen(self, transport: Any) -> None:
        """Route every event to its request; runs as long as the API process."""
        while True:
            message = await transport.areceive(CONSUMER)
            if isinstance(message, Beat):
                if self._beat and message.boot != self._beat.boot:
                    self._fail_all("the engine was restarted; the request is lost")
                self._beat, self._beat_at = message, time.monotonic()
            for event in message if isinstance(message, list) else ():
                if inbox := self._inboxes.get(event.request_id):
                    inbox.put_nowait(event)

    async def watch(self) -> None:
        """Fail requests of a dead worker, and exit when the main process is dead."""
        parent = os.getppid()
        while True:
            await asyncio.sleep(BEAT_SECONDS / 2)
            if self._beat and time.monotonic() - self._beat_at > SILENT_SECONDS:
                self._fail_all("the engine process ended; the request is lost")
            if os.getppid() != parent:              # it was killed: the queues' process must be ended here
                os.kill(self.queues_pid, signal.SIGKILL)
                signal.raise_signal(signal.SIGTERM)

    def _fail_all(self, why: str) -> None:
        for request_id, inbox in self._inboxes.items():
            inbox.put_nowait(Event(request_id, None, error=ConnectionError(why)))


def _as_api_error(error: Exception) -> ApiError:
    if isinstance(error, InputError):
        return bad_request(error)
    if isinstance(error, ConnectionError):
        return ApiError(503, str(error), code="engine_lost", headers={"Retry-After": "5"})
    return ApiError(500, "the engine could not compute this request", code="engine_error")
