"""Connect the API process to the worker: prompts go out, and events come back to the request they belong to.

Admits, watches the worker's beat, and cancels what nobody waits for any more.
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
from serve.schema import ApiError, bad_request
from serve.worker import BEAT_SECONDS, CONSUMER, Add, Beat, Cancel

SILENT_SECONDS = 6 * BEAT_SECONDS                   # a worker that has not beaten for so long is dead
STUCK_SECONDS = 60.0                                # a step of so long: not ready, but it may come back


@dataclass(frozen=True, slots=True)
class Limits:
    """How much is taken on.

    Args:
        max_running: Requests computed at a time.
        max_waiting: Requests that may wait for their turn; more get 429.
        max_body_bytes: Of a request's body; more gets 413.
    """

    max_running: int = 8
    max_waiting: int = 64
    max_body_bytes: int = 1_000_000


class EngineLine:
    """Requests in flight, and whether the engine lives.

    Args:
        limits: Admission.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.orders: Any = None                     # LitServe's request queue, set before the fork
        self.queues_pid = 0                         # of the process that holds the queues
        self._inboxes: dict[str, asyncio.Queue[Event]] = {}
        self._arriving = 0                          # requests on their way here
        self._beat: Beat | None = None
        self._beat_at = 0.0

    @property
    def beat(self) -> Beat:
        """The worker's last sign of life.

        Raises:
            ApiError: 503 while there is none.
        """
        if self._beat is None or time.monotonic() - self._beat_at > SILENT_SECONDS:
            raise ApiError(503, "the engine is not ready", code="engine_not_ready", headers={"Retry-After": "5"})
        return self._beat

    @property
    def ready(self) -> bool:
        """Whether a request would be computed."""
        try:
            return self.beat.step_age < STUCK_SECONDS
        except ApiError:
            return False

    @property
    def in_flight(self) -> int:
        """Requests that somebody waits for, those that are still tokenized among them."""
        return len(self._inboxes) + self._arriving

    @contextmanager
    def arriving(self) -> Generator[None, None, None]:
        """A request takes its place before it is tokenized, which takes its time too.

        Raises:
            ApiError: 503 without an engine, 429 when the queue is full.
        """
        self.admit()
        self._arriving += 1
        try:
            yield
        finally:
            self._arriving -= 1

    def admit(self) -> None:
        """Refuse early what would only wait.

        Raises:
            ApiError: 503 without an engine, 429 when the queue is full.
        """
        waiting = self.in_flight - self.limits.max_running
        if self.beat and waiting >= self.limits.max_waiting:
            raise ApiError(429, f"the server is busy: {self.in_flight} requests are running or waiting",
                           code="queue_full", headers={"Retry-After": "1"})

    async def ask(self, prompt_ids: list[int], params: SamplingParams) -> AsyncGenerator[Event, None]:
        """A request's events until its last; closing the iterator earlier cancels the request.

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
                # one that was lost with a worker may lie in the queue for the next, which nobody would read
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
        """Hand every event to its request; runs as long as the API process."""
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
        """Fail what waits for a dead worker, and end with a dead main process."""
        parent = os.getppid()
        while True:
            await asyncio.sleep(BEAT_SECONDS / 2)
            if self._beat and time.monotonic() - self._beat_at > SILENT_SECONDS:
                self._fail_all("the engine is gone; the request is lost")
            if os.getppid() != parent:              # killed: nobody else is left to end the queues' process
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
