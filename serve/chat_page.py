"""Send the chat page: its files, which are read once, and what it asks about the model."""

from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI
from fastapi.responses import JSONResponse, Response

from lit_llm.inference.sampling import DEFAULT_TEMPERATURE
from lit_llm.inference.usage import read_usage
from serve.openai.routes import Routes

FOLDER = Path(__file__).parent / "page"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
# Nothing from elsewhere and nothing inline; `require-trusted-types-for` makes innerHTML and its like an error.
POLICY = ("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
          "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
          "require-trusted-types-for 'script'; trusted-types 'none'")
HEADERS = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
           "Cache-Control": "no-cache"}


def add_routes(app: FastAPI, routes: Routes, folder: str) -> None:
    """Add the page's routes. Its files need no key, because they are the same for every model; `/page/model` does.

    Args:
        app: The application.
        routes: The API's routes.
        folder: The model's folder, whose card is read.
    """
    usage = read_usage(folder)

    async def model() -> Response:
        context_length = routes.engine.beat.context_length
        facts: dict[str, Any] = {"name": routes.names[0], "context": context_length, "temperature": DEFAULT_TEMPERATURE,
                                 "questions": usage.questions, "turns": usage.turns}
        return JSONResponse(facts, headers={"Cache-Control": "no-store"})

    for file in FOLDER.iterdir():
        if file.suffix in TYPES:
            path = "/" if file.name == "index.html" else f"/page/{file.name}"
            app.add_api_route(path, _sender(file), methods=["GET"], include_in_schema=False)
    app.add_api_route("/page/model", model, methods=["GET"], include_in_schema=False,
                      dependencies=[Depends(routes.authorize)])


def _sender(file: Path) -> Any:
    """A route that sends one file."""
    content, kind = file.read_bytes(), TYPES[file.suffix]

    async def send() -> Response:
        return Response(content, media_type=kind, headers=HEADERS)

    return send
