"""If this breaks: behind `--backend`, answers differ from those of the same model served alone, a client that hangs up leaves the
backend computing, a dead backend looks ready, or a key is shown.

The backend is a second real server of this project, which gets token ids and sends text, as vLLM does.
"""

import json
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import openai
import pytest

from lit_llm.errors import InputError
from lit_llm.inference.sampling import SamplingParams
from serve.backend import Address

ROOT = Path(__file__).resolve().parents[2]
KITE = [{"role": "user", "content": "A kite 什么颜色?"}]
SAMPLED = {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2, "presence_penalty": 0.3,
           "frequency_penalty": 0.2, "seed": 5, "logit_bias": {"7": 2.0}, "min_tokens": 3}
ENDLESS = {"messages": KITE, "max_tokens": 15_000, "temperature": 0}


@pytest.fixture(scope="module")
def backend(start_server, endless_model):
    """The last test kills it."""
    server = start_server("--model", endless_model, "--api-key", "sesame")
    server.http.headers["Authorization"] = "Bearer sesame"
    return server


@pytest.fixture(scope="module")
def front(start_front, backend, endless_model):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIT_LLM_BACKEND_KEY", "sesame")
        return start_front(endless_model, backend.url)


def answer(server, path, body):
    """Choices and usage of a whole answer."""
    reply = server.http.post(path, json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"], reply.json()["usage"]


def streamed(server, path, body):
    """Text, finish reasons and usage of a streamed answer."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    made = (client.chat.completions if "messages" in body else client.completions).create
    options = {name: body.pop(name) for name in ("top_k", "min_p", "repetition_penalty", "min_tokens") if name in body}
    chunks = list(made(model="endless", stream=True, stream_options={"include_usage": True}, extra_body=options, **body))
    choices = [choice for chunk in chunks for choice in chunk.choices]
    texts = [(choice.delta.content if "messages" in body else choice.text) or "" for choice in choices]
    return "".join(texts), [choice.finish_reason for choice in choices if choice.finish_reason], chunks[-1].usage.to_dict()


@pytest.mark.parametrize(("path", "body"), [
    ("/v1/chat/completions", {"messages": KITE, "max_tokens": 20, "temperature": 0}),
    ("/v1/chat/completions", {"messages": KITE, "max_tokens": 20, **SAMPLED}),
    ("/v1/completions", {"prompt": "Once upon", "max_tokens": 12, "temperature": 0, "echo": True}),
], ids=["greedy", "sampled", "continued"])
def test_answers_are_those_of_the_backend_asked_directly(path, body, front, backend):
    expected = answer(backend, path, body)
    assert answer(front, path, body) == expected
    text, reasons, usage = streamed(front, path, dict(body))
    (choice,), counts = expected
    assert (text, reasons, usage) == (choice["text"] if "text" in choice else choice["message"]["content"], ["length"], counts)


def test_stop_strings_n_lists_and_the_simple_route(front, backend):
    whole = answer(backend, "/v1/completions", {"prompt": "Once", "max_tokens": 30, "temperature": 0})[0][0]["text"]
    for body in ({"prompt": "Once", "max_tokens": 30, "temperature": 0, "stop": whole[8:11]},
                 {"prompt": [[9, 10, 11], [12]], "n": 2, "seed": 3, "temperature": 1, "max_tokens": 6}):
        expected = answer(backend, "/v1/completions", body)
        assert answer(front, "/v1/completions", body) == expected
    assert len(expected[0]) == 4
    says = [server.http.post("/chat", json={"message": "Hi", "max_length": 5, "temperature": 0}).json() for server in (front, backend)]
    assert says[0] == says[1]
    for server, declared in ((front, True), (backend, False)):
        assert ("502" in server.http.get("/openapi.json").json()["paths"]["/chat"]["post"]["responses"]) is declared
    models = front.http.get("/v1/models").json()["data"]
    assert (models[0]["id"], models[0]["max_model_len"]) == ("endless", 20_000)


def test_hanging_up_frees_the_backend(front, backend):
    backend.until(lambda: backend.health() == (200, 0))
    with front.http.stream("POST", "/v1/chat/completions", json=ENDLESS | {"stream": True}) as reply:
        texts = reply.iter_text()
        while "content" not in next(texts) or backend.health()[1] == 0:
            pass
        assert (front.health()[1], backend.health()[1]) == (1, 1)
    backend.until(lambda: (front.health(), backend.health()) == ((200, 0), (200, 0)), 3)
    assert front.worker() is None                   # no process has weights


@pytest.mark.parametrize(("status", "body", "expected"), [
    ("400 Bad Request", b'{"error": {"message": "of key s3same no", "code": "x"}}', (400, "x")), ("429 Busy", b"{}", (429, "queue_full")),
    ("401 No", b"sesame", (502, "backend_error")), ("307 Elsewhere\r\nLocation: http://127.0.0.1:1/", b"", (502, "backend_error")),
    ("503 Later", b"\xff", (503, "engine_not_ready")), ("200 OK", b"data: [1]\n\n", (502, "backend_error")),
    ("200 OK", b'data: {"choices": [{"text": "a"}]}\n\ndata: [DONE]\n\n', (503, "engine_lost")),
    ("200 OK", b'data: {"error": {"message": "it broke", "code": 500}}\n\n', (502, "backend_error")),
    ("200 OK", b"data: " + b"a" * 1_100_000, (502, "backend_error")),
])
def test_errors_of_a_backend_become_ours(status, body, expected):
    """Bytes that a socket sends, because no real backend has all of these failures."""
    import asyncio

    from serve.backend import BackendClient
    from serve.engine_client import Limits
    from serve.errors import ApiError

    async def respond(reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        assert "authorization: Bearer s3same" in head.replace("Authorization", "authorization")
        models = head.startswith("GET")
        if not models:                              # a backend's own defaults, which may be others, have no effect
            sent = json.loads(await reader.readexactly(int(re.search(r"content-length: (\d+)", head.lower())[1])))
            neutral = {"top_p": 1, "top_k": -1, "min_p": 0, "repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}
            assert sent | neutral | {"prompt": [1, 2], "stop_token_ids": [2], "max_tokens": 3, "temperature": 1} == sent
        content = b'{"data": [{"id": "m", "max_model_len": 50}]}' if models else body
        writer.write(f"HTTP/1.1 {'200 OK' if models else status}\r\nContent-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode())
        writer.write(content)
        await writer.drain()
        writer.close()

    async def run():
        async with await asyncio.start_server(respond, "127.0.0.1", 0) as backend:
            port = backend.sockets[0].getsockname()[1]
            client = BackendClient(Limits(), Address.of(f"http://127.0.0.1:{port}", "s3same"), (2,), 99, 99)
            listening = asyncio.create_task(client.listen(None))
            while not client.ready:
                await asyncio.sleep(0.01)
            assert client.beat.context_length == 50
            with pytest.raises(ApiError) as caught:
                async for _ in client.ask([1, 2], SamplingParams(max_tokens=3)):
                    pass
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)
            return caught.value, client.in_flight

    error, in_flight = asyncio.run(run())
    assert (error.status, error.body["error"]["code"], in_flight) == (*expected, 0)
    assert "s3same" not in error.body["error"]["message"]


def test_the_space_before_a_first_word_is_that_of_our_decoder(stories):
    """A backend decodes behind the prompt, where sentencepiece's first word has a space; the text of a turn begins without it."""
    import asyncio

    from lit_llm.text.tokenizer import Tokenizer
    from serve.engine_client import Limits, Reply, TextEvent
    from serve.openai.choices import Choice
    from serve.openai.routes import Routes

    async def read(tokenizer, texts, *, continues):
        routes = Routes(tokenizer, ("tale",), Limits(), ())
        reply = Reply(routes.engine, 2)
        for text in texts:
            reply.push(TextEvent(reply.request_id, None, text=text), 0.0)
        reply.push(TextEvent(reply.request_id, None, "stop", completion_tokens=3), 0.0)
        return [piece async for piece in routes.pieces(Choice([5, 6], SamplingParams(), continues=continues), reply)]

    tokenizer = Tokenizer.load(stories)
    ids = tokenizer.encode_text("Once there")
    decoded = tokenizer.decode(ids)
    behind = tokenizer.decode([*ids, *ids]).removeprefix(decoded)      # as a backend does
    pieces = asyncio.run(read(tokenizer, [behind[:3], behind[3:]], continues=False))
    assert ("".join(piece.text for piece in pieces), behind) == (decoded, f" {decoded}")
    assert (pieces[-1].finish_reason, pieces[-1].completion_tokens, pieces[-1].prompt_tokens) == ("stop", 3, 2)
    assert "".join(piece.text for piece in asyncio.run(read(tokenizer, [behind], continues=True))) == behind


@pytest.mark.parametrize("url", ["127.0.0.1:8001", "ftp://a/v1", "http://", "http://a:99999", "http://user:hunter2@a/v1",
                                 "http://a/v1?key=hunter2", "http://a b/v1", "file:///etc/passwd"])
def test_an_address_that_is_none(url):
    with pytest.raises(InputError) as caught:
        Address.of(url)
    assert "hunter2" not in str(caught.value)
    assert caught.value.where == "--backend"


def test_addresses_and_options(endless_model):
    assert [Address.of(url).url for url in ("http://a:1", "https://a/", "http://[::1]:8/x/v1/")] == [
        "http://a:1/v1", "https://a/v1", "http://[::1]:8/x/v1"]
    with pytest.raises(InputError):
        Address.of("http://a", "two words")
    assert "hidden" not in repr(Address.of("http://a", "hidden"))
    with socket.socket() as closed:                 # nothing listens there
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        done = subprocess.run([sys.executable, "-m", "serve", "--model", endless_model, "--backend", url, "--dtype", "bfloat16"],
                              cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, "--dtype" in done.stderr, "no effect with --backend" in done.stderr) == (2, True, True)


def test_a_backend_that_dies(front, backend):
    reply = front.http.post("/v1/completions", json={"prompt": [1] * 9, "max_tokens": 2, "stop_token_ids": [19_999]})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "stop_token_ids")
    seen: list = []

    def stream():
        with front.http.stream("POST", "/v1/chat/completions", json=ENDLESS | {"stream": True}) as reply:
            seen.extend(reply.iter_lines())

    thread = threading.Thread(target=stream)
    thread.start()
    front.until(lambda: len(seen) > 10)
    backend.kill()
    thread.join(20)
    assert json.loads([line for line in seen if line][-1].removeprefix("data: "))["error"]["code"] == "engine_lost"
    front.until(lambda: front.health() == (503, 0), 5)
    reply = front.http.post("/v1/completions", json={"prompt": "Hi"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "engine_not_ready")
    front.process.send_signal(signal.SIGTERM)
    assert front.process.wait(20) == 0
    log = front.process.stderr.read()
    assert f"the backend {backend.url}/v1: it does not answer" in log
    assert "sesame" not in log
    assert "Traceback" not in log
