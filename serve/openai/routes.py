"""The HTTP routes: answer requests as JSON or as server-sent events.

They run in the API process, which has the tokenizer, and send token ids to the engine (`engine_client.EngineClient`).
"""

import asyncio
import hmac
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from functools import cached_property
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from litserve.specs.base import LitSpec

from lit_llm.errors import InputError
from lit_llm.inference.completion import Completion, Detokenizer
from lit_llm.inference.engine import Event
from lit_llm.inference.sampling import SamplingParams
from lit_llm.text.conversation import Conversation, Document, Message
from lit_llm.text.tokenizer import Tokenizer
from serve import private
from serve.engine_client import EngineClient, Limits, Reply, TextEvent
from serve.errors import ApiError, bad_request
from serve.openai.answers import Shape
from serve.openai.bodies import ChatBody, ChatCompletionBody, CompletionBody, Sampling
from serve.openai.choices import Choice, checked, fitted, merged, samples
from serve.openai.ignored import IgnoredFields
from serve.openai.logprobs import LogprobWriter
from serve.openai.replies import PLAIN, Plan, Planner, Requirements
from serve.openai.streams import EventStream, events, until_disconnect, whole

T = TypeVar("T")


class Routes(LitSpec):
    """OpenAI's routes and `/chat` for one model.

    Args:
        tokenizer: The model's tokenizer.
        names: Names of the model; responses use the first one.
        limits: Limits on accepted requests.
        keys: Bearer keys; without keys the API is open.
        unlisted: Further names that are accepted, such as the path of the model.
        strict: Refuse fields that have no effect.
        adapters: Names of adapters, each served as a model of its own.
        engine: The connection to what computes answers; null is that to the worker.
    """

    def __init__(self, tokenizer: Tokenizer, names: tuple[str, ...], limits: Limits, keys: tuple[str, ...], *,
                 unlisted: tuple[str, ...] = (), strict: bool = False, adapters: tuple[str, ...] = (),
                 engine: EngineClient | None = None) -> None:
        super().__init__()
        self.ignored = IgnoredFields(strict=strict)
        self.api_path = "/v1/chat/completions"
        self.names, self.keys, self.engine = names, keys, engine or EngineClient(limits)
        self.adapters, self._accepted = adapters, {*names, *unlisted, *adapters}
        self.tokenizer, self._created = tokenizer, int(time.time())
        self._logprobs = LogprobWriter(tokenizer)
        self.guidance = self.engine.guidance(tokenizer)
        self._planner = Planner(tokenizer, self.guidance)
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
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        key_bytes = key.strip().encode() if scheme.lower() == "bearer" else b""
        # Every key is compared in constant time, so that the duration reveals nothing.
        if self.keys and not any([hmac.compare_digest(key_bytes, accepted.encode()) for accepted in self.keys]):
            raise ApiError(401, "missing or wrong API key: send `Authorization: Bearer KEY`", code="invalid_api_key",
                           headers={"WWW-Authenticate": "Bearer"})

    # ---- routes ------------------------------------------------------------------------------------------------------

    async def chat_completions(self, body: ChatCompletionBody, request: Request) -> Response:
        """Answer a conversation."""
        self.check_model(body.model)
        ignored = body.ignored_fields
        if body.reasoning_effort is not None and "reasoning_effort" not in self.tokenizer.template_variables:
            ignored += ("reasoning_effort",)
        headers = self.ignored.headers(ignored)
        params, requirements = body.params(), body.requirements()

        def encode() -> tuple[list[int], Plan]:
            ids = self.prompt(body, requirements)
            return ids, self._planner.plan(requirements, ids)

        ids, plan = await self.encode(encode, "messages", request)
        params = replace(self._fit(ids, params, "messages"), grammar=plan.grammar)
        choices = [Choice(ids, sample, at, plan=plan, continues=bool(body.continue_final_message))
                   for at, sample in enumerate(samples(params, body.n or 1))]
        return await self._serve(choices, body, request, headers, chat=True)

    async def completions(self, body: CompletionBody, request: Request) -> Response:
        """Continue texts or tokens."""
        self.check_model(body.model)
        headers = self.ignored.headers(body.ignored_fields)
        params, echo = body.params(), bool(body.echo)
        plan = PLAIN if body.skip_special_tokens is not False else Plan(markers=self._planner.special_texts)
        prompts = await self.encode(lambda: [self._read(prompt) for prompt in body.prompts], "prompt", request)
        choices = []
        for ids, text in prompts:
            fit = self._fit(ids, params, "prompt")
            choices += [Choice(ids, sample, at, text if echo else None, body.max_tokens == 0, plan, continues=True)
                        for at, sample in enumerate(samples(fit, body.n or 1))]
        return await self._serve(choices, body, request, headers, chat=False)

    async def chat(self, body: ChatBody, request: Request) -> Response:
        """The simple endpoint: answer a single message."""
        headers = self.ignored.headers(body.ignored_fields)
        ids = await self.encode(lambda: self.tokenizer.encode_prompt(Conversation((Message("user", body.message),))),
                                 "message", request)
        params = SamplingParams(max_tokens=body.max_length, temperature=body.temperature)
        choice = Choice(ids, self._fit(ids, params, "message"))
        async with aclosing(self.engine.ask(ids, choice.params)) as reply:
            (pieces,) = await until_disconnect(request, whole(merged([self.pieces(choice, reply)]), 1))
        return JSONResponse({"response": "".join(piece.text for piece in pieces)}, headers=headers)

    async def models(self) -> Response:
        """List the served model, by each of its names, and its adapters."""
        return JSONResponse({"object": "list", "data": [self._card(name) for name in (*self.names, *self.adapters)]})

    async def model(self, name: str) -> Response:
        """The served model by name."""
        self.check_model(name)
        return JSONResponse(self._card(name))

    # ---- the stages of a request -------------------------------------------------------------------------------------

    def _fit(self, ids: list[int], params: SamplingParams, field: str) -> SamplingParams:
        """The settings for a prompt.

        Raises:
            ApiError: 400 for ids that the model does not have, or a prompt that does not fit.
        """
        beat = self.engine.beat
        checked(ids, params, beat.vocab_size, field)
        return fitted(ids, params, beat.context_length, field)

    async def _serve(self, choices: list[Choice], body: Sampling, request: Request, headers: dict[str, str], *,
                     chat: bool) -> Response:
        self.engine.admit(len(choices))
        adapter = body.model if body.model in self.adapters else None
        replies = [self.engine.ask(choice.ids, choice.params, adapter, shows_special=bool(choice.plan.markers))
                   for choice in choices]
        shape = Shape(adapter or self.names[0], choices, self._logprobs, chat=chat)
        pieces = merged([self.pieces(*pair) for pair in zip(choices, replies, strict=True)])
        if not body.stream:
            try:
                answers = await until_disconnect(request, whole(pieces, len(choices)))
            finally:
                for reply in replies:
                    await reply.aclose()
            return JSONResponse(shape.whole(answers), headers=headers)
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        stream = EventStream(events(shape, pieces, with_usage=with_usage), replies)
        stream.headers.update(headers)
        return stream

    async def encode(self, encode: Callable[[], T], field: str, request: Request) -> T:
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

    async def pieces(self, choice: Choice, events: Reply) -> AsyncGenerator[Completion, None]:
        """Decode the events of `EngineClient.ask`; closing the stream cancels the request."""
        params = choice.params
        detokenizer = Detokenizer(self.tokenizer, len(choice.ids), params.stop, params.min_tokens,
                                  choice.plan.markers, choice.context)
        at_space = self._drops_space and not choice.continues
        async with aclosing(events):
            is_first = True
            async for reply in events:
                if is_first and choice.echo is not None:
                    yield self._echoed(choice, reply)
                is_first = False
                if choice.is_empty:
                    return
                if isinstance(reply, TextEvent):
                    text = reply.text.removeprefix(" ") if at_space else reply.text
                    at_space = at_space and not reply.text
                    yield Completion(text, (), reply.finish_reason, len(choice.ids), reply.completion_tokens)
                    continue
                assert reply.token_id is not None
                piece = detokenizer.push(reply.token_id, reply.finish_reason, reply.logprob)
                if choice.echo and piece.offsets:
                    piece = replace(piece, offsets=tuple(len(choice.echo) + offset for offset in piece.offsets))
                yield piece
                if piece.finish_reason:
                    return

    @cached_property
    def _drops_space(self) -> bool:
        """Whether a text loses the space before its first word (sentencepiece), but not where it continues another."""
        words = (id_ for id_, spelling in enumerate(self.tokenizer.spellings) if spelling[:1] == b" " != spelling)
        word = next(words, None)
        return word is not None and not self.tokenizer.decode([word]).startswith(" ")

    def _echoed(self, choice: Choice, first: Event) -> Completion:
        """The piece that repeats the prompt, with its log-probabilities if there are any."""
        text, count, offsets = choice.echo or "", len(choice.ids), []
        detokenizer = Detokenizer(self.tokenizer, count)
        for token in first.prompt_logprobs:
            offsets.append(min(len(detokenizer.text), len(text)))
            detokenizer.push(token.token_id, None)
        return Completion(text, (), "length" if choice.is_empty else None, count, 0, first.prompt_logprobs,
                          tuple(offsets))

    def _read(self, prompt: str | list[int]) -> tuple[list[int], str]:
        """Ids and text of a prompt."""
        if isinstance(prompt, str):
            return self.tokenizer.encode_document(Document(prompt), end=False).input_ids.tolist(), prompt
        vocab_size = self.tokenizer.vocab_size
        return prompt, self.tokenizer.decode(id_ for id_ in prompt if 0 <= id_ < vocab_size)

    def prompt(self, body: ChatCompletionBody, requirements: Requirements) -> list[int]:
        """Render the messages of a request as for training."""
        template_args = dict(body.chat_template_kwargs or {})
        self.tokenizer.check_template_args(template_args, "chat_template_kwargs")
        if body.reasoning_effort is not None and "reasoning_effort" in self.tokenizer.template_variables:
            template_args.setdefault("reasoning_effort", body.reasoning_effort)
        conversation = Conversation.from_openai(body.messages, requirements.tools, template_args)
        if body.continue_final_message:
            return self.tokenizer.encode_continuation(conversation)
        return self.tokenizer.encode_prompt(conversation, generation_prompt=body.add_generation_prompt is not False)

    def check_model(self, name: str | None) -> None:
        """Check the name of a model.

        Raises:
            ApiError: 404 if it is not served.
        """
        if name and name not in self._accepted:
            raise ApiError(404, f"this server has no such model; it serves {self._all_names()}", param="model",
                           code="model_not_found")

    def _all_names(self) -> str:
        return ", ".join(f"'{name}'" for name in (self.names[0], *self.adapters))

    def _card(self, name: str) -> dict[str, Any]:
        return {"id": name or self.names[0], "object": "model", "created": self._created, "owned_by": "lit_llm",
                "max_model_len": self.engine.beat.context_length}
