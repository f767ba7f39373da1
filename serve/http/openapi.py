"""The OpenAPI document at `/openapi.json`: FastAPI's, with the errors that the server really sends."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from serve.openai.bodies import MOST_PROMPTS

ERROR = {"type": "object", "required": ["error"], "additionalProperties": False, "properties": {"error": {
    "type": "object", "required": ["message", "type", "param", "code"], "additionalProperties": False, "properties": {
        "message": {"type": "string"}, "type": {"type": "string"}, "param": {"type": ["string", "null"]},
        "code": {"type": ["string", "null"]}}}}}
ERRORS = {
    400: "The request is not valid, or its prompt does not fit into the context.",
    401: "The key is missing or wrong.",
    403: "The Host header names a host that is not served.",
    404: "There is no such model.",
    408: "The request did not arrive in time.",
    413: "The body is too large.",
    429: "Too many requests wait.",
    500: "The server could not compute this request.",
    502: "The backend could not answer.",
    503: "The engine is not ready, too busy, or the server shuts down.",
    504: "The request took too long.",
}
MESSAGE = {"type": "object", "required": ["role", "content"], "properties": {
    "role": {"type": "string", "enum": ["system", "user", "assistant", "tool"]}, "content": {}}}
TOOL = {"type": "object", "required": ["type", "function"], "properties": {
    "type": {"const": "function"}, "function": {"type": "object", "required": ["name"], "properties": {
        "name": {"type": "string", "pattern": "^[a-zA-Z0-9_.-]{1,64}$"}, "description": {"type": "string"},
        "parameters": {"type": "object"}, "strict": {"type": ["boolean", "null"]}}}}}
CHOICE = {"type": "object", "required": ["type", "function"], "properties": {
    "type": {"const": "function"}, "function": {"type": "object", "required": ["name"], "properties": {
        "name": {"type": "string"}}}}}
SCHEMA = {"type": "object", "required": ["schema"], "properties": {
    "name": {"type": "string"}, "schema": {"type": "object"}, "strict": {"type": ["boolean", "null"]}}}
FORMATS = tuple({"type": "object", "required": ["type", *more], "properties": {"type": {"const": kind}, **more}}
                for kind, more in (("text", {}), ("json_object", {}), ("json_schema", {"json_schema": SCHEMA})))
NOT_BOTH = {"not": {"required": ["add_generation_prompt", "continue_final_message"], "properties": {
    "add_generation_prompt": {"const": True}, "continue_final_message": {"const": True}}}}
STREAMED = {"anyOf": [{"properties": {"stream_options": {"type": "null"}}},
                      {"required": ["stream"], "properties": {"stream": {"const": True}}}]}
WITHOUT_BODY = (401, 403, 404, 500, 503)            # of routes that read no body
RETRY = {"Retry-After": {"description": "Seconds to wait.", "schema": {"type": "string"}}}


def describe(app: FastAPI, vocab_size: int, most_answers: int, *, strict: bool, backend: bool) -> None:
    """Let the application describe its errors and values: FastAPI would declare a 422, which is never sent.

    Args:
        app: The application.
        vocab_size: Token ids are below this.
        most_answers: Answers of a request, of all its prompts together.
        strict: Whether unknown fields are refused.
        backend: Whether another server computes the answers, which can fail with status 502.
    """
    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(title=app.title, version=app.version, routes=app.routes)
            document["components"] = document.get("components", {})
            schemas = document["components"].setdefault("schemas", {})
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            _limit(schemas, vocab_size, most_answers, strict=strict)
            schemas["Error"] = ERROR
            document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            for path, operations in document["paths"].items():
                for operation in operations.values():
                    _describe(path, operation, backend=backend)
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = document                          # type: ignore[method-assign]


def _limit(schemas: dict[str, Any], vocab_size: int, most_answers: int, *, strict: bool) -> None:
    """Add limits of values that depend on the model, and those that are checked after the types."""
    for schema in schemas.values():
        schema["additionalProperties"] = not strict
    text = {"type": "string", "minLength": 1}
    id_ = {"type": "integer", "minimum": 0, "maximum": vocab_size - 1}

    def some(items: dict[str, Any], most: int) -> dict[str, Any]:
        return {"type": "array", "items": items, "minItems": 1, "maxItems": most}

    prompts = min(most_answers, MOST_PROMPTS)
    limits: dict[str, dict[str, Any]] = {
        "prompt": {"anyOf": [text, some(id_, 10**6), some(text, prompts), some(some(id_, 10**6), prompts)]},
        "messages": some(MESSAGE, 2048), "tokens": {"type": "array", "items": id_},
        "best_of": _optional({"const": 1}),
        "n": _optional({"type": "integer", "minimum": 1, "maximum": min(most_answers, 128)}),
        "tools": _optional({"type": "array", "items": TOOL, "maxItems": 128}),
        "tool_choice": _optional({"type": "string", "enum": ["none", "auto", "required"]}, CHOICE),
        "response_format": _optional(*FORMATS)}
    for name in ("ChatCompletionBody", "CompletionBody", "DetokenizeBody"):
        properties = schemas.get(name, {}).get("properties", {})
        properties.update({field: value for field, value in limits.items() if field in properties})
        for field, items in (("stop", text | {"maxLength": 256}), ("stop_token_ids", id_)):
            if field in properties:
                lists = {"type": "array", "items": items, "maxItems": 16}
                properties[field] = _optional(lists, *([items] if field == "stop" else []))
        if "logit_bias" in properties:
            bias = {"type": "number", "minimum": -100, "maximum": 100}
            biases = {"type": "object", "propertyNames": {"pattern": "^[0-9]+$"}, "additionalProperties": bias}
            properties["logit_bias"] = _optional(biases)
    for name, rules in (("ChatCompletionBody", [NOT_BOTH, STREAMED]), ("CompletionBody", [STREAMED]),
                        ("TokenizeBody", [NOT_BOTH])):
        schemas.get(name, {})["allOf"] = rules
    if tokenized := schemas.get("TokenizeBody"):    # a text or messages
        text_only, chat = ({"type": "object", "required": [field], "properties": {field: kind, other: {"type": "null"}}}
                           for field, kind, other in (("prompt", {"type": "string"}, "messages"),
                                                      ("messages", limits["messages"], "prompt")))
        tokenized["properties"]["tools"] = limits["tools"]
        tokenized["anyOf"] = [text_only, chat]


def _optional(*kinds: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [*kinds, {"type": "null"}]}


def _describe(path: str, operation: dict[str, Any], *, backend: bool) -> None:
    responses = operation["responses"]
    responses.pop("422", None)
    if path == "/metrics":
        responses["200"]["content"] = {"text/plain": {"schema": {"type": "string"}}}
    elif "stream" in path or path.endswith("completions"):
        responses["200"]["content"]["text/event-stream"] = {}       # OpenAPI 3.1 has no schema of events
    for status in ERRORS if "requestBody" in operation else WITHOUT_BODY:
        if status == 502 and not backend:
            continue
        schema: dict[str, Any] = {"$ref": "#/components/schemas/Error"}
        if status == 503 and path.startswith("/health"):
            schema = {"type": "object"}
        responses[str(status)] = {"description": ERRORS[status], "content": {"application/json": {"schema": schema}}}
        if status in (429, 503):
            responses[str(status)]["headers"] = RETRY
    if not path.startswith(("/health", "/version")):
        operation["security"] = [{"key": []}, {}]   # without --api-key, no request needs one
