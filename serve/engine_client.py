"""Connect the API process to the engine worker: send prompts, and route events back to their requests.

It admits requests, limits their time, monitors the worker, and cancels requests whose client has disconnected.
"""

import asyncio
import os
import signal
import time
import uuid
from collections.abc import AsyncIterator, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lit_llm.errors import InputError
from lit_llm.inference.engine import EngineStats, Event
from lit_llm.inference.guidance import Guidance, guidance_or_reason
from lit_llm.inference.sampling import SamplingParams
from lit_llm.text.tokenizer import Tokenizer
from serve.errors import ApiError, bad_request
from serve.http.gate import shutting_down
from serve.http.metrics import Metrics
from serve.worker import BEAT_SECONDS, CONSUMER, Add, Beat, Cancel, Ended

SILENT_SECONDS = 6 * BEAT_SECONDS                   # a worker without a heartbeat for this long hangs
STUCK_SECONDS = 60.0                                # a step that takes this long: not ready, but it may recover


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits on accepted requests.

    Args:
        max_running: Requests computed concurrently.
        max_waiting: Requests that may wait; further ones get status 429.
        max_body_bytes: Size limit of a request's body; larger ones get status 413.
        max_wait_seconds: Time until a request's first token.
        max_seconds: Time for a whole request.
    """

    max_running: int = 32
    max_waiting: int = 64
    max_body_bytes: int = 1_000_000
    max_wait_seconds: float = 300
    max_seconds: float = 3600


@dataclass(frozen=True, slots=True)
class TextEvent(Event):
    """One step of a request that a backend answers: text instead of a token.

    Args:
        text: New text.
        completion_tokens: Tokens of the whole answer, with its finish reason.
    """

    text: str = ""
    completion_tokens: int = 0


class EngineClient:
    """The API process's connection to the engine: requests in flight and the engine's state.

    Args:
        limits: Limits on accepted requests.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits, self.metrics = limits, Metrics()
        self.orders: Any = None                     # LitServe's request queue, set before the fork
        self.queues_pid = 0                         # process that owns the queues
        self.draining = False                       # the server shuts down: no new requests
        self.closed = False                         # the time for running requests is over
        self._replies: dict[str, Reply] = {}
        self._arriving = 0                          # requests that are being tokenized
        self._beat: Beat | None = None
        self._beat_at = 0.0
        self.metrics.of_engine(self)

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
            return not self.draining and self.beat.step_age < STUCK_SECONDS
        except ApiError:
            return False

    @property
    def stats(self) -> EngineStats | None:
        """The worker's last statistics; null without a worker."""
        return self._beat.stats if self._beat else None

    @property
    def in_flight(self) -> int:
        """Number of requests with a waiting client, including those that are being tokenized."""
        return len(self._replies) + self._arriving

    @contextmanager
    def arriving(self) -> Generator[None, None, None]:
        """Reserve a place for a request before it is tokenized, because tokenizing takes time as well.

        Raises:
            ApiError: 503 without an engine or at shutdown, 429 when the queue is full.
        """
        if self.draining:
            raise shutting_down()
        self.admit()
        self._arriving += 1
        try:
            yield
        finally:
            self._arriving -= 1

    def admit(self, count: int = 1) -> None:
        """Refuse requests that could not be queued. Those that arrived before a shutdown began are still computed.

        Raises:
            ApiError: 503 without an engine, 429 when the queue is full, 400 if it never has room for so many.
        """
        if self.closed:
            raise shutting_down()
        most = self.limits.max_running + self.limits.max_waiting
        if self.beat and count > most:
            raise ApiError(400, f"n: {count} answers; this server computes at most {most} at a time", param="n")
        if self.in_flight + count > most:
            raise ApiError(429, f"the server is busy: {self.in_flight} requests are running or waiting",
                           code="queue_full", headers={"Retry-After": "1"})

    def guidance(self, tokenizer: Tokenizer) -> Guidance | InputError:
        """The factory of the engine's constraints, or the reason why answers cannot be constrained."""
        return guidance_or_reason(tokenizer)

    def ask(self, prompt_ids: list[int], params: SamplingParams, adapter: str | None = None, *,
            shows_special: bool = False) -> "Reply":
        """Send a request to the engine.

        Args:
            prompt_ids: Tokens of the prompt.
            params: How its tokens are drawn.
            adapter: Name of the adapter that is applied; null is the base.
            shows_special: Whether special tokens are part of the text, for an engine that sends text.

        Returns:
            Its events; the caller closes it, which cancels a request that is not finished.

        Raises:
            ApiError: Not admitted.
        """
        self.admit()
        reply = Reply(self, len(prompt_ids))
        self._replies[reply.request_id] = reply
        self.orders.put(Add(reply.request_id, prompt_ids, params, adapter))
        return reply

    def forget(self, reply: "Reply", *, cancel: bool) -> None:
        """Remove a request, and cancel it in the engine if it may still be there."""
        if self._replies.pop(reply.request_id, None) is not None and cancel:
            self.orders.put(Cancel(reply.request_id))

    async def listen(self, transport: Any) -> None:
        """Route every event to its request; runs as long as the API process."""
        while True:
            message = await transport.areceive(CONSUMER)
            if isinstance(message, Beat):
                self._count_reused(message)
                if self._beat and message.boot != self._beat.boot:
                    self.fail_all(lost("the engine was restarted"))
                self._beat, self._beat_at = message, time.monotonic()
            elif isinstance(message, Ended):
                self._beat = None
                self.metrics.restarts.inc()
                self.fail_all(lost("the engine process ended"))
            elif isinstance(message, list):
                now = time.monotonic()
                for event in message:
                    if reply := self._replies.get(event.request_id):
                        reply.push(event, now)

    async def watch(self) -> None:
        """Fail requests that take too long or whose worker hangs, and exit when the main process is dead."""
        parent = os.getppid()
        while True:
            await asyncio.sleep(BEAT_SECONDS / 2)
            now = time.monotonic()
            if self._beat and now - self._beat_at > SILENT_SECONDS:
                self.fail_all(lost("the engine process does not respond"))
            for reply in self._replies.values():
                if (error := reply.overdue(now, self.limits)) is not None:
                    reply.fail(error)
            if os.getppid() != parent:              # it was killed: the queues' process must be ended here
                os.kill(self.queues_pid, signal.SIGKILL)
                os._exit(1)

    def fail_all(self, error: ApiError) -> None:
        """End every request with an error."""
        for reply in self._replies.values():
            reply.fail(error)

    def _count_reused(self, beat: Beat) -> None:
        earlier = self.stats if self._beat and self._beat.boot == beat.boot else None
        if beat.stats:
            self.metrics.reused_tokens.inc(max(0, beat.stats.reused_tokens - (earlier.reused_tokens if earlier else 0)))


class Reply:
    """The events of one request, as an asynchronous iterator.

    Args:
        client: Receives the worker's events.
        prompt_tokens: Tokens of the prompt.
    """

    def __init__(self, client: EngineClient, prompt_tokens: int) -> None:
        self.request_id = uuid.uuid4().hex
        self._client, self._prompt_tokens = client, prompt_tokens
        self._inbox: asyncio.Queue[Event] = asyncio.Queue()
        self._start = time.monotonic()
        self._token_at: float | None = None         # time of the last token
        self._finished = self._failed = False

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        """The next event.

        Raises:
            ApiError: Refused by the engine, lost with it, or too late.
        """
        if self._finished:
            raise StopAsyncIteration
        event = await self._inbox.get()
        if event.error is not None:
            # A request that the engine itself has ended needs no order to cancel it. One that was lost with a worker
            # may still be in the next worker's queue.
            self._close(cancel=isinstance(event.error, ApiError))
            raise _as_api_error(event.error)
        if event.finish_reason:
            self._close(cancel=False)
        return event

    async def aclose(self) -> None:
        """Cancel the request if it is not finished."""
        self._close(cancel=True)

    def push(self, event: Event, now: float) -> None:
        """Take an event of the worker, received at a time of `time.monotonic`."""
        metrics = self._client.metrics
        if event.error is None:
            if self._token_at is None:
                metrics.first_token.observe(now - self._start)
                metrics.prompt_tokens.inc(self._prompt_tokens)
            else:
                metrics.next_token.observe(now - self._token_at)
            metrics.generated_tokens.inc()
            self._token_at = now
        self._inbox.put_nowait(event)

    def fail(self, error: ApiError) -> None:
        """End the request with an error."""
        if not self._failed:
            self._failed = True
            self._inbox.put_nowait(Event(self.request_id, None, error=error))

    def overdue(self, now: float, limits: Limits) -> ApiError | None:
        """The error of a request that takes too long at a time of `time.monotonic`."""
        taken = now - self._start
        if self._token_at is None and taken > limits.max_wait_seconds:
            return ApiError(503, f"no token within {limits.max_wait_seconds:g} seconds: the server is busy",
                            code="wait_timeout", headers={"Retry-After": "5"})
        if taken > limits.max_seconds:
            return ApiError(504, f"the request took more than {limits.max_seconds:g} seconds", code="request_timeout")
        return None

    def _close(self, *, cancel: bool) -> None:
        if not self._finished:
            self._finished = True
            self._client.forget(self, cancel=cancel)


def lost(why: str) -> ApiError:
    """The error of a request whose engine has ended."""
    return ApiError(503, f"{why}; the request is lost", code="engine_lost", headers={"Retry-After": "5"})


def _as_api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InputError):
        return bad_request(error)
    return ApiError(500, "the engine could not compute this request", code="engine_error")
