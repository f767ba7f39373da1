"""The engine's process: it receives orders and sends events, both as token ids.

Orders (`Add`, `Cancel`) arrive on LitServe's request queue; the worker sends a `Beat` every second and one list of
events per engine step. It replaces LitServe's loops, which support neither cancelling nor sleeping while idle.
"""

import os
import queue
import signal
import sys
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from litserve import LitAPI
from litserve.loops import LitLoop

from lit_llm.errors import InputError
from lit_llm.inference.engine import Engine, EngineStats, Event
from lit_llm.inference.guidance import Guidance
from lit_llm.inference.sampling import SamplingParams

BEAT_SECONDS = 1.0
CONSUMER = 0                                        # there is one API process


@dataclass(frozen=True, slots=True)
class Add:
    """Start a request."""

    request_id: str
    prompt_ids: list[int]
    params: SamplingParams
    adapter: str | None = None                      # its name; null is the base


@dataclass(frozen=True, slots=True)
class Cancel:
    """Cancel a request."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Beat:
    """A heartbeat of the worker.

    Args:
        boot: Id of the worker process; when it changes, requests of the previous process are lost.
        step_age: Seconds since the start of the current step; it grows when a device hangs.
        context_length: Context length in tokens.
        vocab_size: Vocabulary size in tokens.
        stats: Statistics of the engine; null of a backend.
    """

    boot: str
    step_age: float
    context_length: int
    vocab_size: int
    stats: EngineStats | None


@dataclass(frozen=True, slots=True)
class Ended:
    """Sent by the main process: the worker has ended, and another one starts."""


class EngineAPI(LitAPI):
    """Loads the engine in LitServe's worker process.

    Args:
        folder: Folder for `Engine.load`.
        options: Other arguments of `Engine.load`.
        spec: The routes.
    """

    def __init__(self, folder: str, options: dict[str, Any], *, spec: Any) -> None:
        super().__init__(spec=spec, loop=EngineLoop())
        self.folder, self.options = folder, options

    def setup(self, device: str) -> None:
        """In the worker: load the model, or print the error and exit with code 2."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)    # Ctrl-C goes to all processes; the main one stops this
        from transformers.utils import logging

        logging.disable_progress_bar()
        try:
            self.engine = Engine.load(self.folder, **self.options)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            os._exit(2)
        if choice := self.engine.threads:
            print(f"threads: {choice.count}, {choice.why} (--threads N sets it)", file=sys.stderr, flush=True)
        print(_how_computed(self.engine), file=sys.stderr, flush=True)

    def predict(self, x: Any, **kwargs: Any) -> Any:
        """Unused: `EngineLoop` drives the engine."""
        raise AssertionError

    def authorize(self, request: Request) -> None:
        """Delegate to the spec, which stays in the API process."""
        self.spec.authorize(request)


class EngineLoop(LitLoop):
    """Steps the engine while there are requests, and sleeps otherwise."""

    def __call__(self, lit_api: Any, device: str, worker_id: int, request_queue: Any, transport: Any,
                 workers_setup_status: Any, callback_runner: Any) -> None:
        """LitServe's entry point in the worker; never returns."""
        self._parent = os.getppid()
        self._send = lambda message: transport.send(message, consumer_id=CONSUMER)
        self._engine: Engine = lit_api.engine
        self._orders: queue.SimpleQueue[Add | Cancel] = queue.SimpleQueue()
        self._stepping_since: float | None = None
        for task in (lambda: self._read(request_queue), self._beat, self._prepare):
            threading.Thread(target=_or_die, args=(task,), daemon=True).start()
        _or_die(self._work)

    def _work(self) -> None:
        while True:
            events = self._obey()
            self._stepping_since = time.monotonic()
            events += self._engine.step()
            self._stepping_since = None
            if events:
                self._send([_portable(event) for event in events])

    def _obey(self) -> list[Event]:
        """Execute all received orders; wait for one if the engine is idle."""
        refused = []
        while not (self._orders.empty() and self._engine.has_work):
            order = self._orders.get()
            if isinstance(order, Cancel):
                self._engine.cancel(order.request_id)
                continue
            try:
                self._engine.add(order.request_id, order.prompt_ids, order.params, order.adapter)
            except InputError as error:
                refused.append(Event(order.request_id, None, error=error))
                break                               # send the event now, even if the engine is idle
        return refused

    def _read(self, request_queue: Any) -> None:
        """Drain the queue in a separate thread: polling takes 0.2 ms, which would slow down every step."""
        while True:
            # A get without a timeout would outlive a killed worker in the queue's process and take an order.
            with suppress(queue.Empty):
                order = request_queue.get(timeout=BEAT_SECONDS)
                if isinstance(order, Add) and order.params.grammar and self._engine.constraints:
                    with suppress(InputError):          # compiled here, so that no step waits for it
                        self._engine.constraints(order.params.grammar, self._engine.vocab_size)
                self._orders.put(order)

    def _prepare(self) -> None:
        """Make constraints ready before the first request needs them."""
        if isinstance(self._engine.constraints, Guidance):
            self._engine.constraints.prepare()

    def _beat(self) -> None:
        boot = uuid.uuid4().hex
        while os.getppid() == self._parent:
            since = self._stepping_since
            age = 0.0 if since is None else time.monotonic() - since
            self._send(Beat(boot, age, self._engine.context_length, self._engine.vocab_size, self._engine.stats))
            time.sleep(BEAT_SECONDS)
        os._exit(1)                                 # the main process was killed: free the memory


def _how_computed(engine: Engine) -> str:
    """The message at the server's start about simultaneous requests."""
    if engine.obstacle:
        return f"requests are computed one by one: {engine.obstacle}"
    return (f"requests are computed together, at most {engine.max_running} at a time; keys and values of at most "
            f"{engine.cache_tokens:,} tokens ({engine.cache_bytes / 1e9:.2g} GB) are kept")


def _or_die(task: Any) -> None:
    """Run a part of the worker; if one part or the queues' process fails, the whole worker exits."""
    try:
        task()
    except (EOFError, OSError):
        os._exit(1)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)


def _portable(event: Event) -> Event:
    """The event, with its exception replaced by one that can be pickled."""
    if event.error is None or isinstance(event.error, InputError):
        return event
    return Event(event.request_id, None, error=RuntimeError(f"{type(event.error).__name__}: {event.error}"[:300]))
