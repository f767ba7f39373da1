"""The HTTP routes: answer requests as JSON or as server-sent events.

They run in the API process, which has the tokenizer, and send token ids to the engine (`engine_client.EngineClient`).
"""

import asyncio
import hmac
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from litserve.specs.base import LitSpec

from lit_llm.errors import InputError
from lit_llm.inference.completion import Completion, Detokenizer
from lit_llm.inference.engine import budget
from lit_llm.inference.sampling import SamplingParams
from lit_llm.text.conversation import Conversation, Document, Message
from lit_llm.text.tokenizer import Tokenizer
from serve import private
from serve.engine_client import EngineClient, Limits
from serve.errors import ApiError, bad_request
from serve.openai.answers import Shape
from serve.openai.bodies import ChatBody, ChatCompletionBody, CompletionBody, Sampling
from serve.openai.streams import EventStream, events, until_disconnect, whole


class Routes(LitSpec):
    """OpenAI's routes and `/chat` for one model.

    Args:
        tokenizer: The model's tokenizer.
        names: Accepted model names; responses use the first one.
        limits: Limits on accepted requests.
        keys: Bearer keys; without keys the API is open.
    """

    def __init__(self, tokenizer: Tokenizer, names: tuple[str, ...], limits: Limits, keys: tuple[str, ...]) -> None:
        super().__init__()
        self.api_path = "/v1/chat/completions"
        self.names, self.keys, self.engine = names, keys, EngineClient(limits)
        self.tokenizer, self._created = tokenizer, int(time.time())
        # One thread: tokenizing a long prompt must not block other streams, and calls must not overlap.
        self._encoding = ThreadPoolExecutor(1, "tokenizer")
        for path, (method, route) in self.routes().items():
            self.add_endpoint(path, route, [method])

    def routes(self) -> dict[str, tuple[str, Callable[..., Awaitable[Response]]]]:
        """Path -> (HTTP method, handler), all behind `authorize`; a subclass adds its own to these.

        A handler is a coroutine with FastAPI's parameters; `tokenizer`, `encode` and `pieces` reach the model.
        """
        return {"/v1/chat/completions": ("POST", self.chat_completions), "/v1/completions": ("POST", self.completions),
                "/chat": ("POST", self.chat), "/v1/models": ("GET", self.models),
                "/v1/models/{name:path}": ("GET", self.model)}

    def __getstate__(self) -> dict[str, Any]:
        """LitServe pickles the spec for the worker, which needs only its path and kind."""
        return {"api_path": self.api_path}

    @property
    def stream(self) -> bool:
        """Declare a stream, so that LitServe does not compress it."""
        return True

    def setup(self, server: Any) -> None:
        """LitServe passes the queue of the worker before it forks the API process."""
        self.engine.orders = private.request_queue(server, self.api_path)

    def authorize(self, request: Request) -> None:
        """Accept requests with a valid key.

        Raises:
            ApiError: 401 otherwise.
        """
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        # Every key is compared in constant time, so that the duration reveals nothing.
        if self.keys and not any([hmac.compare_digest(given, key.encode()) for key in self.keys]):
            raise ApiError(401, "missing or wrong API key: send `Authorization: Bearer KEY`", code="invalid_api_key",
                           headers={"WWW-Authenticate": "Bearer"})

    # ---- routes ------------------------------------------------------------------------------------------------------

    async def chat_completions(self, body: ChatCompletionBody, request: Request) -> Response:
        """Answer a conversation."""
        return await self._serve(body, request, lambda: self._prompt(body), "messages")

    async def completions(self, body: CompletionBody, request: Request) -> Response:
        """Continue a text."""
        prompt = body.prompt

        def encode() -> list[int]:
            if isinstance(prompt, str):
                return self.tokenizer.encode_document(Document(prompt), end=False).input_ids.tolist()
            return [id_ for id_ in prompt if isinstance(id_, int)]

        return await self._serve(body, request, encode, "prompt")

    async def chat(self, body: ChatBody, request: Request) -> Response:
        """The simple endpoint: answer a single message."""
        ids = await self.encode(lambda: self.tokenizer.encode_prompt(Conversation((Message("user", body.message),))),
                                 "message", request)
        room = budget_or_400(ids, SamplingParams(), self.engine.beat.context_length, "message")
        params = SamplingParams(max_tokens=min(body.max_length, room), temperature=body.temperature)
        text, _ = await until_disconnect(request, whole(self.pieces(ids, params)))
        return JSONResponse({"response": text})

    async def models(self) -> Response:
        """List the served model."""
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, name: str) -> Response:
        """The served model by name."""
        self._check_model(name)
        return JSONResponse(self._card())

    # ---- the stages of a request -------------------------------------------------------------------------------------

    async def _serve(self, body: Sampling, request: Request, encode: Callable[[], list[int]], field: str) -> Response:
        self._check_model(body.model)
        params = body.params()
        ids = await self.encode(encode, field, request)
        context_length, vocab_size = self.engine.beat.context_length, self.engine.beat.vocab_size
        if not ids or not 0 <= min(ids) <= max(ids) < vocab_size:
            raise ApiError(400, f"{field}: at least one token, with ids from 0 to {vocab_size - 1}", param=field)
        budget_or_400(ids, params, context_length, field)
        shape = Shape(self.names[0], chat=field == "messages")
        pieces = self.pieces(ids, params)
        if not body.stream:
            return JSONResponse(shape.whole(*await until_disconnect(request, whole(pieces))))
        # Await the first piece here, so that an error before it can set the HTTP status.
        first = await until_disconnect(request, anext(pieces))
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        return EventStream(events(shape, first, pieces, with_usage=with_usage))

    async def encode(self, encode: Callable[[], list[int]], field: str, request: Request) -> list[int]:
        """Run `encode` in the thread that tokenizes.

        Raises:
            ApiError: 400 that names `field`, where it raises an `InputError`; 429 where too many requests wait.
        """
        try:
            with self.engine.arriving():
                work = asyncio.get_running_loop().run_in_executor(self._encoding, encode)
                return await until_disconnect(request, work)
        except InputError as error:
            raise bad_request(InputError(error.what, where=error.where or field)) from None

    async def pieces(self, ids: list[int], params: SamplingParams) -> AsyncGenerator[Completion, None]:
        """Stream the answer; closing the stream cancels the request."""
        detokenizer = Detokenizer(self.tokenizer, len(ids), params.stop)
        async with aclosing(self.engine.ask(ids, params)) as replies:
            async for reply in replies:
                assert reply.token_id is not None
                piece = detokenizer.push(reply.token_id, reply.finish_reason)
                yield piece
                if piece.finish_reason:
                    return

    def _prompt(self, body: ChatCompletionBody) -> list[int]:
        given = body.chat_template_kwargs or {}
        self.tokenizer.check_template_args(given, "chat_template_kwargs")
        conversation = Conversation.from_openai(body.messages, template_args=given)
        if body.continue_final_message:
            return self.tokenizer.encode_continuation(conversation)
        return self.tokenizer.encode_prompt(conversation)

    def _check_model(self, name: str | None) -> None:
        if name and name not in self.names:
            raise ApiError(404, f"this server has no such model; it serves '{self.names[0]}'", param="model",
                           code="model_not_found")

    def _card(self) -> dict[str, Any]:
        return {"id": self.names[0], "object": "model", "created": self._created, "owned_by": "lit_llm",
                "max_model_len": self.engine.beat.context_length}


def budget_or_400(ids: list[int], params: SamplingParams, context_length: int, field: str) -> int:
    """Maximum number of new tokens of a request.

    Raises:
        ApiError: 400 if prompt and answer do not fit; the error names both numbers.
    """
    try:
        return budget(len(ids), params, context_length)
    except InputError as error:
        raise ApiError(400, error.what, param=field, code="context_length_exceeded") from None
