"""Build the server: LitServe's processes with the routes, worker loop and chat page of this package."""

import asyncio
import functools
import os
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from litserve import LitServer
from litserve.utils import WorkerSetupStatus
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from lit_llm.errors import InputError
from lit_llm.inference.guidance import Guidance
from lit_llm.inference.loading import model_folder, sizes, tokenizer_folder
from lit_llm.text.tokenizer import Tokenizer
from serve import chat_page, private
from serve.engine_client import EngineClient, Limits
from serve.errors import ApiError
from serve.http import openapi, operations
from serve.http.connection import Connection
from serve.http.gate import LOG, Admission, Gate, response
from serve.lifecycle import CLOSE_SECONDS, NOTICE_SECONDS, Drain
from serve.openai import tokens
from serve.openai.routes import Routes
from serve.worker import CONSUMER, Ended, EngineAPI

if TYPE_CHECKING:
    from serve.backend import Address

WORDS = {400: None, 404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}
LONGEST_PAUSE = 30.0                                # between two starts of a worker that dies while loading


@dataclass(frozen=True, slots=True)
class Network:
    """How clients connect.

    Args:
        host: Address to listen at.
        port: Port to listen at.
        allowed_hosts: Values of the Host header that are served besides loopback and `host`.
        cors_origins: Origins whose pages may read responses.
        keep_alive_seconds: Time that an idle connection stays open.
        request_seconds: Time for a client to send a request.
        write_seconds: Time in which a client must read something of its answer.
        max_connections: Connections; further ones get status 503.
        drain_seconds: Time for running requests at shutdown.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    keep_alive_seconds: int = 75
    request_seconds: int = 30
    write_seconds: int = 60
    max_connections: int = 512
    drain_seconds: int = 30

    def uvicorn(self) -> dict[str, Any]:
        """Options of uvicorn."""
        http = functools.partial(Connection, request_seconds=self.request_seconds, write_seconds=self.write_seconds,
                                 most=self.max_connections)
        return {"http": http, "ws": "none", "access_log": False, "server_header": False,
                "timeout_keep_alive": self.keep_alive_seconds}


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of the server.

    Args:
        model: A run folder, or any folder that transformers loads.
        names: Model names in the API; without any, the name of the folder or run.
        network: How clients connect.
        keys: Bearer keys.
        limits: Limits on accepted requests.
        engine: Options of `Engine.load`.
        log_level: Log level of uvicorn and LitServe.
        strict: Refuse requests with fields that have no effect.
        backend: Another server that computes the answers; null computes them here.
    """

    model: str
    names: tuple[str, ...] = ()
    network: Network = field(default_factory=Network)
    keys: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    engine: dict[str, Any] = field(default_factory=dict)
    log_level: str = "warning"
    strict: bool = False
    backend: "Address | None" = None


class Server(LitServer):
    """A LitServe server with its own response transport, which notices at once that one of its processes has ended."""

    greeting = ""
    network = Network()
    has_worker = True                               # not with a backend
    stopping = False                                # a signal has come
    failed = False                                  # a process other than the worker has ended by itself
    listener: socket.socket | None = None

    def serve(self, log_level: str = "warning") -> None:
        """Run until a signal or a failure.

        Raises:
            KeyboardInterrupt: A signal came before the server was up.
            SystemExit: Code 1 after a failure.
        """
        self.uvicorn_graceful_timeout = round(self.network.drain_seconds + NOTICE_SECONDS + CLOSE_SECONDS + 2)
        # At level info, our own log has a line for each request; LitServe's advertises routes that are not here.
        self.run(host=self.network.host, port=self.network.port, num_api_servers=1, generate_client_file=False,
                 log_level="warning" if log_level == "info" else log_level, **self.network.uvicorn())
        if self.failed:
            raise SystemExit(1)

    def _init_manager(self, num_api_servers: int) -> Any:
        manager = super()._init_manager(num_api_servers)
        self.lit_api.spec.engine.queues_pid = private.queues_pid(manager)
        return manager

    def _start_server(self, port: int, count: int, log_level: str, sockets: Any, kind: str, **options: Any) -> Any:
        """Keep a copy of the listening socket, with which the API process can refuse connections at its end."""
        self.listener = sockets[0].dup()
        return super()._start_server(port, count, log_level, sockets, kind, **options)

    def launch_inference_worker(self, lit_api: Any) -> Any:
        """Start the worker, if there is one."""
        return super().launch_inference_worker(lit_api) if self.has_worker else []

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """In the API process: route the worker's events as long as requests are served."""
        engine = self.lit_api.spec.engine
        answers = private.response_transport(self)
        tasks = [asyncio.create_task(engine.listen(answers)), asyncio.create_task(engine.watch())]
        for task in tasks:
            task.add_done_callback(_end_without)
        drain = Drain(engine, self.network.drain_seconds, self.listener)
        drain.install()
        print(self.greeting, flush=True)
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await asyncio.wait_for(task, 2)

    def verify_worker_status(self) -> None:
        """Wait for the worker; LitServe's own method waits forever if the worker dies while loading."""
        while not any(worker.exitcode is not None for worker in self.inference_workers):
            if not self.has_worker or WorkerSetupStatus.READY in self.workers_setup_status.values():
                return
            time.sleep(0.05)
        raise SystemExit(max(1, self.inference_workers[0].exitcode))

    def _start_worker_monitoring(self, manager: Any, uvicorn_workers: dict[int, Any]) -> None:
        """Replace LitServe's monitor, which looks every two seconds and tells the API process nothing."""
        threading.Thread(target=self._monitor, args=(uvicorn_workers[0],), daemon=True, name="monitor").start()

    def _monitor(self, api: Any) -> None:
        pause = 0.0
        while True:
            began = time.monotonic()
            ended = wait([*(worker.sentinel for worker in self.inference_workers), api.sentinel])
            if self.stopping:
                return
            if api.sentinel in ended:
                print("error: the process that serves requests has ended", file=sys.stderr, flush=True)
                self.failed = True
                private.shutdown_event(self).set()
                return
            worker = self.inference_workers[0]
            worker.join()
            print(f"the engine process ended with code {worker.exitcode}; another one starts", file=sys.stderr,
                  flush=True)
            private.response_transport(self).send(Ended(), consumer_id=CONSUMER)
            pause = 0.0 if time.monotonic() - began > LONGEST_PAUSE else min(LONGEST_PAUSE, 2 * pause + 1)
            time.sleep(pause if pause > 1 else 0)   # the first restart is immediate
            if not self.stopping:
                self.inference_workers[0] = self.launch_single_inference_worker(self.lit_api, 0)


def build(settings: Settings, routes: type[Routes] = Routes) -> Server:
    """Build the server, ready to `serve`.

    Args:
        settings: What to serve, and where.
        routes: The routes; a subclass adds others in `routes`.

    Raises:
        InputError: No such model, no tokenizer, or a port that is in use.
    """
    folder, network = model_folder(settings.model), settings.network
    _check_port(network.host, network.port)
    adapters: dict[str, str] = settings.engine.get("adapters") or {}
    names = settings.names or (_name(folder),)
    if doubled := adapters.keys() & {*names, settings.model}:
        raise InputError(f"'{min(doubled)}' is the name of the model and of an adapter", where="--adapter")
    tokenizer = _shared_tokenizer(folder, [settings.engine["adapter"]] if settings.engine.get("adapter") else
                                  list(adapters.values()))
    engine = _backend_client(settings.backend, settings.limits, folder, tokenizer) if settings.backend else None
    spec = routes(tokenizer, tuple(dict.fromkeys(names)), settings.limits, settings.keys, unlisted=(settings.model,),
                  strict=settings.strict, adapters=tuple(adapters), engine=engine)
    options = {"max_running": settings.limits.max_running, "stop_ids": tokenizer.stop_ids, **settings.engine}
    if isinstance(spec.guidance, Guidance):
        options["constraints"] = spec.guidance
    # LitServe would start a worker on each GPU, so it gets none; the engine selects its device itself.
    server = Server(EngineAPI(folder, options, spec=spec), accelerator="cpu", devices=1, workers_per_device=1,
                    timeout=False, restart_workers=True)
    place = f"http://127.0.0.1:{network.port}" if ":" not in network.host else f"http://[::1]:{network.port}"
    origin = f" of {settings.backend.url}" if settings.backend else ""
    server.greeting = (f"Serving {names[0]}{origin}: chat page {place}/, OpenAI base_url {place}/v1. "
                       "Press Ctrl-C to stop.")
    server.network, server.has_worker = network, engine is None
    _own_app(server.app, spec, settings, folder)
    return server


def _backend_client(address: "Address", limits: Limits, folder: str, tokenizer: Tokenizer) -> EngineClient:
    """The connection to a backend; the model's folder needs its config and tokenizer only."""
    from serve.backend import BackendClient

    return BackendClient(limits, address, tokenizer.stop_ids, *sizes(folder))


def _shared_tokenizer(folder: str, adapters: list[str]) -> Tokenizer:
    """The tokenizer of a model with its adapters.

    Raises:
        InputError: The adapters were trained with different ones.
    """
    tokenizer = Tokenizer.load(tokenizer_folder(folder, adapters[0] if adapters else None))
    for adapter in adapters[1:]:
        if Tokenizer.load(tokenizer_folder(folder, adapter)).fingerprint != tokenizer.fingerprint:
            raise InputError(f"{adapters[0]} and {adapter} were trained with different tokenizers or chat templates",
                             where="--adapter", fix="serve them on two ports")
    return tokenizer


def _name(folder: str) -> str:
    path = Path(folder).expanduser().resolve()
    return path.parent.name if path.name == "export" else path.name if path.is_dir() else folder


def _check_port(host: str, port: int) -> None:
    """Check the port early; LitServe would fail with a traceback after loading the model."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(f"cannot listen on {host}:{port}: {error.strerror or error}", where="port",
                             fix="stop the program that uses it, or choose another --port") from None


def _end_without(task: "asyncio.Task[None]") -> None:
    """End the API process if a task that it cannot do without has failed; the main process then ends the others."""
    if not task.cancelled() and (error := task.exception()) is not None:
        LOG.critical("a task of the server failed", exc_info=error)
        os._exit(1)


# ---- replacements of LitServe's routes and errors --------------------------------------------------------------------

def _own_app(app: FastAPI, routes: Routes, settings: Settings, folder: str) -> None:
    """Replace LitServe's page and health checks, drop /docs, which loads external scripts, and check every request."""
    replaced = {"/", "/health", "/info", "/docs", "/redoc", "/docs/oauth2-redirect"}
    app.router.routes = [route for route in app.router.routes if getattr(route, "path", None) not in replaced]
    app.router.redirect_slashes = False             # a redirect would be built from the Host header
    app.title = "lit_llm"
    operations.add_routes(app, routes)
    chat_page.add_routes(app, routes, folder)
    tokens.add_routes(app, routes)
    openapi.describe(app, routes.tokenizer.vocab_size, settings.limits.max_running + settings.limits.max_waiting,
                     strict=settings.strict, backend=settings.backend is not None)
    _own_errors(app)
    engine, network = routes.engine, settings.network
    app.add_middleware(Admission, max_body_bytes=settings.limits.max_body_bytes, draining=lambda: engine.draining)
    if network.cors_origins:
        app.add_middleware(CORSMiddleware, allow_origins=network.cors_origins, allow_methods=["GET", "POST"],
                           allow_headers=["*"], expose_headers=["x-request-id", "retry-after"],
                           allow_private_network=True)
    app.add_middleware(Gate, hosts=(network.host, *network.allowed_hosts), metrics=engine.metrics)


def _own_errors(app: FastAPI) -> None:
    """Return every error in OpenAI's format, without quoting the request."""
    async def known_error(request: Request, error: Any) -> Response:
        return response(error)

    async def invalid(request: Request, error: Any) -> Response:
        first = error.errors()[0]
        place = [str(part) for part in first["loc"] if part != "body"][:4]
        if first["type"] == "json_invalid":
            return response(ApiError(400, "the body is not valid JSON"))
        if not place:
            return response(ApiError(400, "the body must be a JSON object, sent as application/json"))
        where = f"{'.'.join(place)[:80]}: "
        return response(ApiError(400, f"{where}{first['msg'][:200]}", param=place[0][:80]))

    async def http(request: Request, error: Any) -> Response:
        texts = {404: f"there is no route {request.url.path[:80]}", 405: f"{request.method} is not allowed here",
                 413: "the body is too large"}
        text = texts.get(error.status_code, str(error.detail)[:200])
        return response(ApiError(error.status_code, text, code=WORDS.get(error.status_code), headers=error.headers))

    app.add_exception_handler(ApiError, known_error)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
