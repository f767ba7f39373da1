"""If this breaks: a client whose prompt, tokenizer or connection goes wrong ends or changes the answers of the others.

The server's application on a real socket, with the worker's loop in a thread of this process, so that a test can break parts.
"""

import queue
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest
import uvicorn

from tests.tiny_models import MEMORY, NAN, poison

PARSER = "Say it again: one two three four five. " * 3      # a prompt whose answer cannot be decoded


class Transport:
    """LitServe's transport between threads."""

    def __init__(self):
        self.messages = queue.SimpleQueue()

    def send(self, message, consumer_id):
        self.messages.put(message)

    async def areceive(self, consumer):
        import asyncio

        while self.messages.empty():
            await asyncio.sleep(0.002)
        return self.messages.get()


@pytest.fixture(scope="module")
def client(endless_model):
    from lit_llm.inference.engine import Engine
    from serve.openai import routes as routes_module
    from serve.server import Network, Settings, build
    from serve.worker import EngineLoop

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        network = Network(port=probe.getsockname()[1])
    server = build(Settings(endless_model, network=network))
    spec, orders, transport = server.lit_api.spec, queue.Queue(), Transport()
    spec.engine.orders = orders
    engine = Engine.load(endless_model, max_running=8)
    poison(engine.model)
    api = type("Api", (), {"engine": engine})()
    threading.Thread(target=EngineLoop(), args=(api, "cpu", 0, orders, transport, None, None), daemon=True).start()

    @contextmanager
    def broken_decoding():
        push, patch = routes_module.Detokenizer.push, pytest.MonkeyPatch()

        def broken(self, *arguments):
            if self.prompt_tokens == len(spec.tokenizer.encode_text(PARSER)):
                raise RuntimeError("a bug")
            return push(self, *arguments)

        patch.setattr(routes_module.Detokenizer, "push", broken)
        yield
        patch.undo()

    async def lifespan(app):
        import asyncio

        tasks = [asyncio.create_task(spec.engine.listen(transport)), asyncio.create_task(spec.engine.watch())]
        yield
        for task in tasks:
            task.cancel()

    from contextlib import asynccontextmanager

    server.app.router.lifespan_context = asynccontextmanager(lifespan)
    running = uvicorn.Server(uvicorn.Config(server.app, port=network.port, log_level="critical", **network.uvicorn()))
    thread = threading.Thread(target=running.run)
    with broken_decoding():
        thread.start()
        with httpx.Client(base_url=f"http://127.0.0.1:{network.port}", timeout=60) as http:
            while not running.started or http.get("/health").status_code != 200:
                time.sleep(0.02)
            http.spec = spec
            yield http
        running.should_exit = True
        thread.join(10)


def ask(client, prompt, stream):
    body = {"prompt": prompt, "max_tokens": 20, "temperature": 0, "stream": stream}
    if not stream:
        reply = client.post("/v1/completions", json=body)
        return reply.status_code, reply.json()["choices"][0]["text"] if reply.status_code == 200 else reply.json()["error"]
    import json

    with client.stream("POST", "/v1/completions", json=body) as reply:
        assert reply.status_code == 200
        parts = [part.removeprefix("data: ") for part in "".join(reply.iter_text()).split("\n\n") if part.startswith("data: ")]
    if parts[-1] != "[DONE]":
        return 500, json.loads(parts[-1])["error"]
    return 200, "".join(json.loads(part)["choices"][0]["text"] for part in parts[:-1])


def hang_up(client):
    with client.stream("POST", "/v1/completions", json={"prompt": "The kite", "max_tokens": 5000, "stream": True}) as reply:
        next(reply.iter_text())
    return "gone"


def test_poison_harms_nobody_else_over_http(client):
    healthy = ["The kite", "风筝是什么颜色", "Tom has a red kite", [30, 40, 50, 60]]
    alone = {str(prompt): ask(client, prompt, False) for prompt in healthy}
    assert all(status == 200 for status, _ in alone.values())
    draw = random.Random(4)
    kinds = [*healthy, [5, NAN, 6], [MEMORY, 7], PARSER, None]
    mixture = [(draw.choice(kinds), draw.random() < 0.5) for _ in range(48)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda case: hang_up(client) if case[0] is None else ask(client, *case), mixture))
    for (prompt, _), answer in zip(mixture, answers, strict=True):
        if prompt is None:
            continue
        if prompt in healthy:
            assert answer == alone[str(prompt)], prompt
        else:
            status, error = answer
            assert (status, error["type"]) == (500, "server_error"), prompt
            assert error["message"] in ("internal error", "the engine could not compute this request")
    deadline = time.monotonic() + 5
    while client.get("/health").json()["in_flight"] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert client.get("/health").json()["in_flight"] == 0
