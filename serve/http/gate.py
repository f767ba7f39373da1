"""What happens to a request before its route: the check of its Host header, its id, size limit, and the log line.

`Gate` is the outermost part of the application, `Admission` the innermost one; CORS, if any, is between them.
"""

import ipaddress
import logging
import re
import time
import uuid
from collections.abc import Callable
from typing import Any

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException

from lit_llm.errors import InputError
from lit_llm.system import ranges
from serve.errors import ApiError
from serve.http.metrics import Metrics

LOG = logging.getLogger("serve")
ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
POLICY = "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
SECURITY = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Content-Security-Policy": POLICY}
WHILE_DRAINING = ("/health", "/health/live", "/health/ready", "/metrics")   # answered until the end


class Gate:
    """Refuses requests for other hosts, and gives each request an id, security headers, a count and a log line.

    A page of the internet can let its name point to this machine (DNS rebinding): the browser then treats this server
    as part of that page, and only the Host header shows it.

    Args:
        app: The application behind.
        hosts: Host names and addresses that are served besides loopback and the address that a client connected to.
        metrics: Counts the responses.
    """

    def __init__(self, app: Any, *, hosts: tuple[str, ...], metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics
        self.hosts = frozenset(map(host_name, hosts))

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = _Exchange(scope, send)
        try:
            if self.serves(Headers(scope=scope).get("host"), scope.get("server")):
                await self.app(exchange.scope, receive, exchange.send)
            else:
                await exchange.refuse(ApiError(
                    403, "the Host header names a host that this server does not serve; if it is right, start the "
                    "server with --allowed-host NAME", code="host_not_allowed"), receive)
        except Exception:
            LOG.exception("request %s failed", exchange.request_id)
            if exchange.status:
                raise                               # uvicorn closes the connection, so that the client notices
            await exchange.refuse(ApiError(500, "internal error"), receive)
        finally:
            exchange.finish(self.metrics)

    def serves(self, host: str | None, server: tuple[str, int | None] | None) -> bool:
        """Whether a Host header is allowed; HTTP/1.0 has none, and no browser speaks it."""
        if host is None:
            return True
        name = host_name(host)
        if name in self.hosts or name == "localhost" or (server is not None and name == server[0].lower()):
            return True
        try:
            return ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False


class Admission:
    """Refuses requests that are too large, and new ones while the server shuts down.

    Args:
        app: The application behind.
        max_body_bytes: Size limit of a request's body.
        draining: Tells whether the server shuts down.
    """

    def __init__(self, app: Any, *, max_body_bytes: int, draining: Callable[[], bool]) -> None:
        self.app, self.max_body_bytes, self.draining = app, max_body_bytes, draining

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        error = None
        if self.draining() and scope["path"] not in WHILE_DRAINING:
            error = shutting_down()
        elif int(Headers(scope=scope).get("content-length") or 0) > self.max_body_bytes:
            error = ApiError(413, f"the body is larger than {self.max_body_bytes:,} bytes", code="body_too_large")
        if error is not None:
            await response(error)(scope, receive, send)
        else:
            await self.app(scope, self._counted(receive), send)

    def _counted(self, receive: Any) -> Any:
        """`receive` that stops reading a body sent in chunks when it becomes too large."""
        size = 0

        async def counted() -> Any:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.max_body_bytes:
                raise HTTPException(413)
            return message

        return counted


class _Exchange:
    """A request and its response."""

    def __init__(self, scope: Any, send: Any) -> None:
        header = Headers(scope=scope).get("x-request-id", "")
        self.request_id = header if ID.fullmatch(header) else uuid.uuid4().hex
        self.scope = scope | {"state": scope.get("state", {}) | {"request_id": self.request_id}}
        if scope["method"] == "HEAD":               # uvicorn leaves out the body of the response
            self.scope["method"] = "GET"
        self.method, self.status, self.start = scope["method"], 0, time.monotonic()
        self._send = send

    async def send(self, message: Any) -> None:
        """Send a part of the response, with our headers."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.request_id
            for name, value in SECURITY.items():
                headers.setdefault(name, value)
        await self._send(message)

    async def refuse(self, error: ApiError, receive: Any) -> None:
        """Answer with an error."""
        await response(error)(self.scope, receive, self.send)

    def finish(self, metrics: Metrics) -> None:
        """Count the response, and log a line without any content."""
        route = getattr(self.scope.get("route"), "path", "other")
        seconds = time.monotonic() - self.start
        metrics.response(route, self.status, seconds)
        LOG.info("request %s: %s %s %s in %.3f s", self.request_id, self.method, route, self.status or "lost", seconds)


def response(error: ApiError) -> JSONResponse:
    """The error as a response in OpenAI's format."""
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


def shutting_down() -> ApiError:
    """The error of requests that come while the server shuts down."""
    return ApiError(503, "the server is shutting down", code="shutting_down",
                    headers={"Retry-After": "5", "Connection": "close"})


def host_name(host: str) -> str:
    """The name in a Host header, without port, brackets and a final dot, in lower case."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return (host.rpartition(":")[0] if host.count(":") == 1 else host).removesuffix(".")


def check_host(host: str) -> None:
    """Check a value of --allowed-host.

    Raises:
        InputError: It is not a host name or address.
    """
    name = host_name(host)
    if not re.fullmatch(r"[a-z0-9_.:-]{1,253}", name) or "/" in host:
        raise InputError(f"'{ranges.shown(host)}' is not a host name", where="--allowed-host",
                         fix="give the name that clients use, for instance model.example.org")


def check_origin(origin: str) -> None:
    """Check a value of --cors-origin.

    Raises:
        InputError: It is not an origin, such as https://chat.example.org.
    """
    if origin != "*" and not re.fullmatch(r"https?://(\[[0-9a-fA-F:]+\]|[A-Za-z0-9_.-]+)(:\d{1,5})?", origin):
        raise InputError(f"'{ranges.shown(origin)}' is not an origin", where="--cors-origin",
                         fix="give scheme, host and port without a path, for instance https://chat.example.org")
