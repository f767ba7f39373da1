"""Routes for those who operate the server: health checks, metrics, the version. None needs a key."""

import importlib
import ipaddress

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from serve.http.metrics import CONTENT_TYPE
from serve.openai.routes import Routes


def add_routes(app: FastAPI, routes: Routes) -> None:
    """Add the routes to the application."""
    engine, version = routes.engine, importlib.import_module("lit_llm").__version__

    async def live() -> Response:
        return JSONResponse({"status": "live"})

    async def ready() -> Response:
        status = "shutting down" if engine.draining else "ready" if engine.ready else "not ready"
        headers = {} if engine.ready else {"Retry-After": "5"}
        return JSONResponse({"status": status, "in_flight": engine.in_flight}, headers=headers,
                            status_code=200 if engine.ready else 503)

    async def metrics(request: Request) -> Response:
        if not _is_local(request):
            routes.authorize(request)
        return Response(engine.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def lit_llm_version() -> Response:
        return JSONResponse({"version": version})

    for path, route in (("/health", ready), ("/health/live", live), ("/health/ready", ready), ("/metrics", metrics),
                        ("/version", lit_llm_version)):
        app.add_api_route(path, route, methods=["GET"])


def _is_local(request: Request) -> bool:
    """Whether the client is on this machine; uvicorn takes its address from a local proxy's X-Forwarded-For."""
    try:
        return request.client is not None and ipaddress.ip_address(request.client.host).is_loopback
    except ValueError:
        return False

