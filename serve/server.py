"""Build the server: LitServe's processes with the routes, worker loop and chat page of this package."""

import asyncio
import multiprocessing
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from litserve import LitServer
from litserve.utils import WorkerSetupStatus
from starlette.exceptions import HTTPException

from lit_llm.errors import InputError
from lit_llm.inference.loading import model_folder, tokenizer_folder
from lit_llm.text.tokenizer import Tokenizer
from serve import chat_page, private
from serve.engine_client import Limits
from serve.errors import ApiError
from serve.openai.routes import Routes
from serve.worker import EngineAPI

WORDS = {400: None, 404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of the server.

    Args:
        model: A run folder, or any folder that transformers loads.
        name: Model name in the API; null uses the name of the folder or run.
        host: Address to listen at.
        port: Port to listen at.
        keys: Bearer keys.
        limits: Limits on accepted requests.
        engine: Options of `Engine.load`.
        log_level: Log level of uvicorn and LitServe.
        strict: Refuse requests with fields that have no effect.
    """

    model: str
    name: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    keys: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    engine: dict[str, Any] = field(default_factory=dict)
    log_level: str = "warning"
    strict: bool = False


class Server(LitServer):
    """A LitServe server with its own response transport, whose main process detects a worker that failed to start."""

    greeting = ""

    def _init_manager(self, num_api_servers: int) -> Any:
        manager = super()._init_manager(num_api_servers)
        self.lit_api.spec.engine.queues_pid = private.queues_pid(manager)
        return manager

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """In the API process: route the worker's events as long as requests are served."""
        engine = self.lit_api.spec.engine
        answers = private.response_transport(self)
        tasks = [asyncio.create_task(engine.listen(answers)), asyncio.create_task(engine.watch())]
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
            if WorkerSetupStatus.READY in self.workers_setup_status.values():
                return
            time.sleep(0.05)
        raise SystemExit(max(1, self.inference_workers[0].exitcode))


def build(settings: Settings, routes: type[Routes] = Routes) -> Server:
    """Build the server, ready to `run`.

    Args:
        settings: What to serve, and where.
        routes: The routes; a subclass adds others in `routes`.

    Raises:
        InputError: No such model, no tokenizer, or a port that is in use.
    """
    folder = model_folder(settings.model)
    _check_port(settings.host, settings.port)
    tokenizer = Tokenizer.load(tokenizer_folder(folder, settings.engine.get("adapter")))
    name = settings.name or _name(folder)
    spec = routes(tokenizer, tuple(dict.fromkeys([name, settings.model])), settings.limits, settings.keys,
                  strict=settings.strict)
    options = {"max_running": settings.limits.max_running, "stop_ids": tokenizer.stop_ids, **settings.engine}
    # LitServe would start a worker on each GPU, so it gets none; the engine selects its device itself.
    server = Server(EngineAPI(folder, options, spec=spec), accelerator="cpu", devices=1, workers_per_device=1,
                    timeout=False, max_payload_size=settings.limits.max_body_bytes, restart_workers=True)
    place = f"http://127.0.0.1:{settings.port}" if ":" not in settings.host else f"http://[::1]:{settings.port}"
    server.greeting = f"Serving {name}: chat page {place}/, OpenAI base_url {place}/v1. Press Ctrl-C to stop."
    server.app.title = "lit_llm"
    _own_routes(server.app, spec)
    chat_page.add_routes(server.app, spec, folder)
    _own_errors(server.app)
    return server


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


# ---- replacements of LitServe's routes and errors --------------------------------------------------------------------

def _own_routes(app: FastAPI, routes: Routes) -> None:
    """Replace LitServe's page and health checks, all without a key; drop /docs, which loads external scripts."""
    theirs = {"/", "/health", "/info", "/docs", "/redoc", "/docs/oauth2-redirect"}
    app.router.routes = [route for route in app.router.routes if getattr(route, "path", None) not in theirs]

    async def live() -> Response:
        return JSONResponse({"status": "live"})

    async def ready() -> Response:
        is_ready = routes.engine.ready
        return JSONResponse({"status": "ready" if is_ready else "not ready", "in_flight": routes.engine.in_flight},
                            status_code=200 if is_ready else 503)

    app.add_api_route("/health/live", live, methods=["GET"])
    app.add_api_route("/health/ready", ready, methods=["GET"])


def _own_errors(app: FastAPI) -> None:
    """Return every error in OpenAI's format, without quoting the request."""
    async def ours(request: Request, error: Any) -> Response:
        return JSONResponse(error.body, status_code=error.status, headers=error.headers)

    async def invalid(request: Request, error: Any) -> Response:
        first = error.errors()[0]
        place = [str(part) for part in first["loc"] if part != "body"][:4]
        if first["type"] == "json_invalid":
            return await ours(request, ApiError(400, "the body is not valid JSON"))
        if not place:
            return await ours(request, ApiError(400, "the body must be a JSON object, sent as application/json"))
        where = f"{'.'.join(place)[:80]}: "
        return await ours(request, ApiError(400, f"{where}{first['msg'][:200]}", param=place[0][:80]))

    async def http(request: Request, error: Any) -> Response:
        texts = {404: f"there is no route {request.url.path[:80]}", 405: f"{request.method} is not allowed here",
                 413: "the body is too large"}
        text = texts.get(error.status_code, str(error.detail)[:200])
        return await ours(request, ApiError(error.status_code, text, code=WORDS.get(error.status_code),
                                            headers=error.headers))

    async def broken(request: Request, error: Any) -> Response:
        return await ours(request, ApiError(500, "internal error"))

    app.add_exception_handler(ApiError, ours)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, broken)


def end_children() -> None:
    """End all child processes, also after an interrupted start."""
    for child in multiprocessing.active_children():
        child.terminate()
    for child in multiprocessing.active_children():
        child.join(2)
        if child.is_alive():
            child.kill()
