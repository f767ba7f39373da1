"""A model behind OpenAI's API, of this project's server or of any other."""

import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from lit_llm.errors import InputError
from lit_llm.inference.chat.session import FullContextError
from lit_llm.inference.completion import Completion
from lit_llm.inference.sampling import SamplingParams
from lit_llm.text.conversation import Message

KEYS = ("LIT_LLM_API_KEY", "OPENAI_API_KEY")
SECONDS = 600                                       # of silence, after which a request is given up
LONGEST = 1_000_000                                 # bytes of a line of a stream, and of an error
FULL = ("context_length_exceeded", "maximum context length", "context size", "context window")


class RemoteModel:
    """A model of a server.

    Args:
        url: Address of the API, such as http://127.0.0.1:8000/v1; without a path, /v1 is added.
        name: Name of the model; null takes the first one that the server lists.
        template_args: Values of the chat template's variables.

    Raises:
        InputError: The address is wrong, or no server answers there.
    """

    def __init__(self, url: str, name: str | None = None, template_args: Mapping[str, Any] | None = None) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise InputError(f"'{url[:200]}' is not the address of an API", where="url",
                             fix="give one such as http://127.0.0.1:8000/v1")
        self.url = url.rstrip("/") + ("" if parts.path.strip("/") else "/v1")
        self._template_args = template_args or {}
        self._opener = urllib.request.build_opener(_NoRedirect)     # a redirect could send the key elsewhere
        self.name = name or self._first_model()

    def stream(self, messages: Sequence[Message], params: SamplingParams, *, alone: bool) -> Iterator[Completion]:
        """Stream an answer; the server decides whether it fits."""
        body = {"model": self.name, "messages": [message.to_openai() for message in messages], "stream": True,
                "stream_options": {"include_usage": True}, "temperature": params.temperature, "top_p": params.top_p,
                **{name: value for name, value in (("max_tokens", params.max_tokens), ("seed", params.seed),
                                                   ("top_k", params.top_k), ("min_p", params.min_p),
                                                   ("stop", list(params.stop)),
                                                   ("chat_template_kwargs", dict(self._template_args))) if value}}
        with self.request("/chat/completions", body) as reply:
            yield from _pieces(reply)

    def _first_model(self) -> str:
        with self.request("/models") as reply:
            try:
                return str(json.loads(reply.read(LONGEST))["data"][0]["id"])
            except (ValueError, KeyError, IndexError, TypeError):
                raise InputError(f"{self.url}/models lists no model", where="url",
                                 fix="name it: --model NAME") from None

    def request(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Send a request, with the key that the environment has; the response must be closed.

        Args:
            path: Below the address of the API, such as /completions.
            body: Posted as JSON; null requests with GET.

        Raises:
            InputError: No server answers, or it refuses.
        """
        key = next((value for name in KEYS if (value := os.environ.get(name))), None)
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        data = None if body is None else json.dumps(body).encode()
        try:
            return self._opener.open(urllib.request.Request(self.url + path, data, headers), timeout=SECONDS)
        except urllib.error.HTTPError as error:
            with error:
                _refuse(error.code, error.read(LONGEST))
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise InputError(f"no server answers at {self.url}: {reason}", where="url",
                             fix="start one: python -m serve --model FOLDER") from None


def check_options(**options: Any) -> None:
    """Refuse options that only a model of this machine has: each must be null or auto.

    Raises:
        InputError: One of them is set.
    """
    for name, value in options.items():
        if value not in (None, "auto"):
            raise InputError(f"{value} has no effect with url: the server has loaded its model", where=name,
                             fix="leave it out")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """Follow none."""


def _refuse(status: int, body: bytes) -> NoReturn:
    """Raise the error of a response."""
    try:
        error = json.loads(body)["error"]
        text, code = str(error["message"]), str(error.get("code"))
    except (ValueError, KeyError, TypeError, AttributeError):
        text, code = body.decode("utf-8", "replace").strip()[:200] or "no explanation", ""
    text = " ".join(text.split())[:500]
    if status == 400 and any(words in f"{code} {text.lower()}" for words in FULL):
        raise FullContextError(text, where="prompt", fix="shorten the message")
    raise InputError(f"the server refused with status {status}: {text}", where="url",
                     fix=f"set {KEYS[0]} to its key" if status == 401 else "")


def _pieces(reply: Any) -> Iterator[Completion]:
    """The pieces of a stream; reasoning that comes apart is written between <think> marks, as models write it."""
    tokens, prompt_tokens, thinking, ended = 0, 0, False, False
    for line in _lines(reply):
        if line == "[DONE]":
            ended = True
            break
        event = json.loads(line)
        if error := event.get("error"):
            _refuse(reply.status, json.dumps({"error": error}).encode())
        choice = (event.get("choices") or [{}])[0]
        delta = choice.get("delta") or {}
        text, thought = delta.get("content") or "", delta.get("reasoning_content") or delta.get("reasoning") or ""
        shown = f"<think>{thought}" if thought and not thinking else thought
        thinking = thinking or bool(thought)
        if text:
            shown, thinking = f"{shown}</think>\n{text}" if thinking else text, False
        usage = event.get("usage") or {}
        tokens = usage.get("completion_tokens") or tokens + bool(shown)
        prompt_tokens = usage.get("prompt_tokens") or prompt_tokens
        yield Completion(shown, (), choice.get("finish_reason"), prompt_tokens, tokens)
    if not ended:
        raise InputError("the connection ended before the answer did", where="url", fix="/retry asks again")


def _lines(reply: Any) -> Iterator[str]:
    """The data of the events; comments, which keep a connection open, are left out."""
    try:
        while line := reply.readline(LONGEST):
            if line.startswith(b"data:"):
                yield line[5:].decode("utf-8", "replace").strip()
    except (OSError, ValueError) as error:
        raise InputError(f"the connection was lost: {error}", where="url", fix="/retry asks again") from None
