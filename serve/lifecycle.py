"""How the server ends: signals in the main process, and the time for running requests in the API process."""

import asyncio
import multiprocessing
import os
import signal
import socket
import threading
import time
from typing import Any

from serve.engine_client import EngineClient
from serve.errors import ApiError

NOTICE_SECONDS = 2.0                                # for clients to receive the error of an unfinished request
CLOSE_SECONDS = 3.0                                 # for connections to close after that


def end_on_signals(server: Any) -> None:
    """In the main process: the first SIGTERM or Ctrl-C ends the server in order, the second one at once.

    LitServe alone would leave its other processes running after a SIGTERM.
    """
    main_pid = os.getpid()

    def end(signum: int, frame: Any) -> None:
        if os.getpid() != main_pid:                 # forked processes inherit the handler
            return
        if server.stopping:
            for child in multiprocessing.active_children():
                child.kill()
            os._exit(128 + signum)
        server.stopping = True
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)


def end_children() -> None:
    """End all child processes, also after an interrupted start."""
    for child in multiprocessing.active_children():
        child.terminate()
    for child in multiprocessing.active_children():
        child.join(2)
        if child.is_alive():
            child.kill()


class Drain:
    """In the API process: after SIGTERM, waits for running requests, and ends the process.

    New requests get status 503 meanwhile. uvicorn alone would refuse connections at once, and cut the answers that are
    unfinished when the time is over.

    Args:
        engine: The requests in flight.
        seconds: Time for them.
        listener: The listening socket, which other processes hold as well.
    """

    def __init__(self, engine: EngineClient, seconds: float, listener: socket.socket | None) -> None:
        self.engine, self.seconds, self.listener = engine, seconds, listener
        self.task: asyncio.Task[None] | None = None

    def install(self) -> None:
        """Replace uvicorn's handler of SIGTERM, and ignore Ctrl-C, which the main process passes on as SIGTERM."""
        if threading.current_thread() is not threading.main_thread():
            return                                  # the application runs in a test
        end_uvicorn: Any = signal.getsignal(signal.SIGTERM)
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, lambda: None)
        loop.add_signal_handler(signal.SIGTERM, self._begin, end_uvicorn)

    def _begin(self, end_uvicorn: Any) -> None:
        self.engine.draining = True
        self.task = self.task or asyncio.create_task(self._finish(end_uvicorn))

    async def _finish(self, end_uvicorn: Any) -> None:
        await self._until_idle(self.seconds)
        self.engine.closed = True
        self.engine.fail_all(ApiError(503, "the server is shutting down; the answer is not finished",
                                      code="shutting_down", headers={"Retry-After": "5"}))
        await self._until_idle(NOTICE_SECONDS)
        end_uvicorn(signal.SIGTERM, None)
        await asyncio.sleep(0.2)                    # uvicorn has closed its own socket by then
        if self.listener is not None:               # refuse connections, which would wait for the other processes
            self.listener.shutdown(socket.SHUT_RDWR)
        await asyncio.sleep(CLOSE_SECONDS)
        end_uvicorn(signal.SIGINT, None)            # do not wait for clients that read nothing

    async def _until_idle(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self.engine.in_flight and time.monotonic() < end:
            await asyncio.sleep(0.05)
