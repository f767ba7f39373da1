"""Requests are answered by another server of OpenAI's API, `serve --backend URL`: vLLM, SGLang, llama.cpp, or this one.

The token ids that our renderer made are sent to its `/v1/completions`, so that prompts are those of training; its text
comes back. `BackendClient` has the interface of `EngineClient`, and no process of this server has weights.
"""

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx

from lit_llm.errors import InputError
from lit_llm.inference.guidance import Guidance
from lit_llm.inference.sampling import SamplingParams
from lit_llm.text.tokenizer import Tokenizer
from serve.engine_client import EngineClient, Limits, Reply, TextEvent, lost
from serve.errors import ApiError
from serve.worker import Beat

LOG = logging.getLogger("serve")
KEY = "LIT_LLM_BACKEND_KEY"
PROBE_SECONDS = 1.0                                 # between two questions whether the backend answers
ANSWER_SECONDS = 4.0                                # for its answer to that
CONNECT_SECONDS = 5.0
LONGEST = 1_000_000                                 # bytes of a line of its stream, and of a whole other answer
SHOWN = 300                                         # characters of its messages that clients see
MALFORMED = (ValueError, KeyError, IndexError, TypeError, AttributeError)
# Settings with the names of OpenAI's API and of vLLM. The first are always sent, because backends have other defaults:
# vLLM those of generation_config.json, llama.cpp its own. The others are sent if they have an effect.
ALWAYS = ("max_tokens", "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
SOMETIMES: dict[str, Any] = {"stop": (), "seed": None, "min_tokens": 0, "ignore_eos": False}


@dataclass(frozen=True, slots=True)
class Address:
    """Where the backend is.

    Args:
        url: Its API, ending with /v1.
        key: Its bearer key; empty without one.
    """

    url: str
    key: str = field(default="", repr=False)

    @classmethod
    def of(cls, url: str, key: str = "") -> "Address":
        """Read what a user typed; without a path, /v1 is added.

        Raises:
            InputError: It is not an address, or has a password.
        """
        try:
            parts = urlsplit(url)
            valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            valid = False
        if valid and "@" in parts.netloc:           # not quoted: it may be a secret
            raise InputError("the address must not contain a user or a password", where="--backend",
                             fix=f"set the key with ${KEY}")
        if not valid or parts.query or parts.fragment or not url.isprintable() or " " in url:
            shown = "the address" if "@" in url or "?" in url else f"'{url[:200]}'"
            raise InputError(f"{shown} is not the address of an API", where="--backend",
                             fix="give one such as http://127.0.0.1:8001/v1")
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise InputError("a key has no spaces and only printable ASCII characters", where=f"${KEY}")
        return cls(url.rstrip("/") + ("" if parts.path.strip("/") else "/v1"), key)


class BackendClient(EngineClient):
    """The connection to a backend, in place of the connection to a worker.

    Args:
        limits: Limits on accepted requests.
        address: Where the backend is.
        stop_ids: Tokens that end an answer; the backend's own do, too.
        context_length: Context length by the model's config; the backend's is used if it is shorter.
        vocab_size: Vocabulary size by the model's config.
    """

    def __init__(self, limits: Limits, address: Address, stop_ids: tuple[int, ...], context_length: int,
                 vocab_size: int) -> None:
        super().__init__(limits)
        self.address, self._stop_ids = address, stop_ids
        self._context_length, self._vocab_size = context_length, vocab_size
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._http: httpx.AsyncClient | None = None     # of the process that serves requests
        self._model = ""                            # its name at the backend
        self._obstacle: str | None = None           # why the backend cannot be used, as it was logged
        self._counts_differ = False                 # whether that was logged

    def guidance(self, tokenizer: Tokenizer) -> Guidance | InputError:
        """The reason why answers are not constrained: there is no common form of grammars."""
        return InputError("answers of a backend cannot be constrained to a schema or to required, strict or single "
                          "calls; ask without, or serve the model without --backend")

    def ask(self, prompt_ids: list[int], params: SamplingParams, adapter: str | None = None, *,
            shows_special: bool = False) -> Reply:
        """Send a request; arguments, result and errors as in `EngineClient.ask`.

        Raises:
            ApiError: Also for log-probabilities, whose tokens a backend gives as text.
        """
        if params.logprobs is not None or params.prompt_logprobs is not None:
            raise ApiError(400, "logprobs: not available with a backend, which names tokens by their text",
                           param="logprobs", code="unsupported_parameter")
        self.admit()
        reply = Reply(self, len(prompt_ids))
        self._replies[reply.request_id] = reply
        body = self._body(prompt_ids, params) | ({"skip_special_tokens": False} if shows_special else {})
        task = self._tasks[reply.request_id] = asyncio.create_task(self._answer(reply, body))
        task.add_done_callback(lambda _: self._tasks.pop(reply.request_id, None))
        return reply

    def forget(self, reply: Reply, *, cancel: bool) -> None:
        """Remove a request; one that is not finished is cancelled by closing its connection."""
        self._replies.pop(reply.request_id, None)
        if cancel and (task := self._tasks.get(reply.request_id)) is not None:
            task.cancel()

    async def listen(self, transport: Any) -> None:
        """Ask every second whether the backend answers; runs as long as the API process."""
        headers = {"Authorization": f"Bearer {self.address.key}"} if self.address.key else {}
        timeout = httpx.Timeout(self.limits.max_wait_seconds, connect=CONNECT_SECONDS)
        # No redirects, which could send the key elsewhere, and no proxies or passwords of the environment.
        async with httpx.AsyncClient(headers=headers, timeout=timeout, follow_redirects=False, trust_env=False,
                                     limits=httpx.Limits(max_connections=None)) as self._http:
            while True:
                try:
                    self._beat, self._beat_at = await self._probe(self._http), time.monotonic()
                    self._note(None)
                except ApiError as error:
                    self._beat = None
                    self._note(str(error))
                except httpx.HTTPError:
                    self._lose()
                await asyncio.sleep(PROBE_SECONDS)

    def _lose(self) -> None:
        """Refuse requests until the backend answers again."""
        self._beat = None
        self._note("it does not answer")

    async def _probe(self, http: httpx.AsyncClient) -> Beat:
        """Read the name and the context length of the backend's model."""
        async with http.stream("GET", f"{self.address.url}/models", timeout=ANSWER_SECONDS) as response:
            if response.status_code in (401, 403):
                raise ApiError(502, f"it refuses the key; set ${KEY}")
            if response.status_code != 200:
                raise ApiError(502, f"/models is answered with status {response.status_code}")
            body = await _whole(response)
        try:
            card = json.loads(body)["data"][0]
            self._model, most = str(card["id"]), card.get("max_model_len")
        except MALFORMED:
            raise ApiError(502, "/models lists no model") from None
        length = min(self._context_length, most) if isinstance(most, int) and most > 0 else self._context_length
        return Beat("backend", 0.0, length, self._vocab_size, None)

    def _note(self, obstacle: str | None) -> None:
        """Log when the backend can no longer be used, and when it can again."""
        if obstacle != self._obstacle:
            LOG.warning("the backend %s: %s", self.address.url, obstacle or "it answers again")
            self._obstacle = obstacle

    def _body(self, prompt_ids: list[int], params: SamplingParams) -> dict[str, Any]:
        stops = {*params.stop_token_ids, *(() if params.ignore_eos else self._stop_ids)}
        settings = {name: getattr(params, name) for name in ALWAYS}
        settings |= {name: value for name, neutral in SOMETIMES.items() if (value := getattr(params, name)) != neutral}
        if params.logit_bias:
            settings["logit_bias"] = {str(id_): bias for id_, bias in params.logit_bias}
        return {"model": self._model, "prompt": prompt_ids, **settings, "top_k": params.top_k or -1,
                "stop_token_ids": sorted(stops), "stream": True, "stream_options": {"include_usage": True}}

    async def _answer(self, reply: Reply, body: dict[str, Any]) -> None:
        """Push the backend's pieces, or the error, to a request."""
        assert self._http is not None, "listen has not begun"
        try:
            async with self._http.stream("POST", f"{self.address.url}/completions", json=body) as response:
                if response.status_code != 200:
                    raise self._refused(response.status_code, await _whole(response))
                pieces = 0
                async for event in self._read(response, reply.request_id, len(body["prompt"])):
                    pieces += 1
                    reply.push(event, time.monotonic())
                    if event.finish_reason:         # several tokens may come in one piece
                        self.metrics.generated_tokens.inc(max(0, event.completion_tokens - pieces))
        except ApiError as error:
            reply.fail(error)
        except (httpx.ConnectError, httpx.ConnectTimeout):
            self._lose()
            reply.fail(ApiError(503, "the engine is not ready: the backend does not answer", code="engine_not_ready",
                                headers={"Retry-After": "5"}))
        except httpx.HTTPError:
            reply.fail(lost("the connection to the backend ended"))
        except Exception:
            LOG.exception("an answer of the backend could not be read")
            reply.fail(ApiError(502, "the backend's answer could not be read", code="backend_error"))

    async def _read(self, response: httpx.Response, request_id: str,
                    prompt_tokens: int) -> AsyncGenerator[TextEvent, None]:
        """The pieces of a stream; the finish reason comes with the token counts, after all text.

        Raises:
            ApiError: An error event, another format, or an end before that of the answer.
        """
        usage: dict[str, Any] = {}
        reason, pieces = None, 0
        async for data in _data(response):
            if data == b"[DONE]":
                break
            try:
                chunk = json.loads(data)
                failed, usage = chunk.get("error"), chunk.get("usage") or usage
                choice = (chunk.get("choices") or [{}])[0]
                reason = choice.get("finish_reason") or reason
                text = (choice.get("text") or "").encode("utf-8", "replace").decode()   # JSON may have lone surrogates
            except MALFORMED:
                raise ApiError(502, "the backend's answer is not in OpenAI's format", code="backend_error") from None
            if failed:
                raise self._refused(502, data)
            if text:
                pieces += 1
                yield TextEvent(request_id, None, text=text)
        if reason not in ("stop", "length"):
            raise lost("the backend did not finish the answer")
        count = usage.get("completion_tokens")
        self._compare(prompt_tokens, usage.get("prompt_tokens"))
        yield TextEvent(request_id, None, reason, completion_tokens=count if isinstance(count, int) else pieces)

    def _compare(self, sent: int, read: Any) -> None:
        """Warn once if the backend has changed a prompt, for instance by a token before it."""
        if isinstance(read, int) and read != sent and not self._counts_differ:
            self._counts_differ = True
            LOG.warning("the backend read %d tokens of a prompt of %d: it changes prompts, so that they are not those "
                        "of training", read, sent)

    def _refused(self, status: int, body: bytes) -> ApiError:
        """Our error for one of the backend."""
        code = None
        try:
            error = json.loads(body)
            error = error.get("error") or error     # vLLM had it without the outer object
            text, code = str(error["message"]), error.get("code")
        except MALFORMED:
            text = body[:SHOWN].decode("utf-8", "replace")
        text = " ".join(text.encode("utf-8", "replace").decode().split())
        if self.address.key:
            text = text.replace(self.address.key, "***")
        if status in (400, 413, 422):
            return ApiError(400, f"the backend refuses this request: {text[:SHOWN]}",
                            code=code if isinstance(code, str) else None)
        if status == 429:
            return ApiError(429, "the backend is busy", code="queue_full", headers={"Retry-After": "1"})
        LOG.warning("the backend answered a request with status %d: %s", status, text[:SHOWN])
        if status == 503:
            return ApiError(503, "the engine is not ready: the backend answered with status 503",
                            code="engine_not_ready", headers={"Retry-After": "5"})
        return ApiError(502, "the backend could not answer this request", code="backend_error")


async def _whole(response: httpx.Response) -> bytes:
    """The body of a response, cut off if it is too long."""
    body = b""
    async for part in response.aiter_bytes():
        body += part
        if len(body) > LONGEST:
            break
    return body[:LONGEST]


async def _data(response: httpx.Response) -> AsyncIterator[bytes]:
    """The data of server-sent events, each of which is one line.

    Raises:
        ApiError: A line is too long.
    """
    rest = b""
    async for part in response.aiter_bytes():
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()
        if len(rest) > LONGEST:
            raise ApiError(502, "the backend sent a line that is too long", code="backend_error")
