"""If this breaks: a client that disconnects keeps its slot forever, a full server answers no request, a dead worker looks alive,
processes are left behind, or requests without a key are accepted.
"""

import contextlib
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[2]
ENDLESS = {"messages": [{"role": "user", "content": "Tell me all"}], "max_tokens": 15_000, "temperature": 0}


def test_hanging_up_frees_the_slot(server):
    server.until(lambda: server.health() == (200, 0))
    with server.http.stream("POST", "/v1/chat/completions", json=ENDLESS | {"stream": True}) as reply:
        texts = reply.iter_text()                   # kept: httpx hangs up when it is collected
        next(texts)
        assert server.health()[1] == 1
    server.until(lambda: server.health() == (200, 0), 2)
    with pytest.raises(httpx.ReadTimeout):
        server.http.post("/v1/chat/completions", json=ENDLESS, timeout=1)
    server.until(lambda: server.health() == (200, 0), 2)
    start = time.monotonic()                        # the engine is free too, not only the count
    assert server.http.post("/chat", json={"message": "Hi", "max_length": 3}).status_code == 200
    assert time.monotonic() - start < 5


def test_a_client_that_reads_nothing_loses_its_slot(server):
    """It stays connected; the log-probabilities of its prompt alone are more than the systems on both sides keep for it."""
    body = json.dumps({"prompt": [5, 6, 7, 8] * 2000, "echo": True, "logprobs": 20, "max_tokens": 11_000, "stream": True}).encode()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", server.port))
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                       b"Content-Length: %d\r\n\r\n" % len(body) + body)
        server.until(lambda: server.health()[1] == 1)
        server.until(lambda: server.health() == (200, 0), 30)
        client.settimeout(10)
        answer = b"".join(iter(lambda: client.recv(1 << 16), b""))      # what was under way; then the server has closed it
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"[DONE]" not in answer
    assert server.http.post("/chat", json={"message": "Hi", "max_length": 3}).status_code == 200


def test_hanging_up_frees_the_tokenizer_too(server):
    """Before the engine gets it: a chat that is being tokenized is in flight, and is dropped when its client disconnects."""
    server.until(lambda: server.health() == (200, 0))
    long = {"messages": [{"role": "user", "content": "ab " * 330_000}], "max_tokens": 1}
    body = json.dumps(long).encode()
    seen = []
    for _ in range(4):
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                           b"Content-Length: %d\r\n\r\n" % len(body) + body)
            time.sleep(0.15)
            seen.append(server.health()[1])
    assert max(seen) >= 1
    server.until(lambda: server.health() == (200, 0), 5)


def test_the_page_needs_nothing_from_elsewhere(server):
    reply = server.http.get("/")
    assert reply.status_code == 200
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    for word in ("http://", "https://", "@import", "innerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert word not in reply.text, word
    assert all(place.startswith(("/page/", "page/", "data:", "#")) for place in re.findall(r'(?:src|href)="([^"]*)"', reply.text))
    assert server.http.get("/health/live").json() == {"status": "live"}


def ask(server, results, body, stream):
    headers = {"Authorization": "Bearer sesame"}
    try:
        if not stream:
            results.append(server.http.post("/v1/chat/completions", json=body, headers=headers))
            return
        with server.http.stream("POST", "/v1/chat/completions", json=body | {"stream": True}, headers=headers) as reply:
            results.append("".join(reply.iter_text()))
    except httpx.TransportError as error:
        results.append(error)


def background(server, count, body=ENDLESS, stream=False):
    results: list = []
    threads = [threading.Thread(target=ask, args=(server, results, body, stream)) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads, results


def assert_all_ended(server):
    deadline = time.monotonic() + 5
    while server.members() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert server.members() == []
    assert "Traceback" not in server.process.stderr.read()


def refused(port):
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except ConnectionRefusedError:
        return True
    return False


@pytest.mark.slow
def test_keys_limits_a_killed_worker_and_the_end(start_server, endless_model):
    """All stages of one server in order, because each start takes seconds."""
    server = start_server("--model", endless_model, "--api-key", "sesame", "--api-key", "second", "--max-running", "1",
                          "--max-waiting", "1", "--name", "tale", "--name", "alias", "--max-wait-seconds", "3", "--drain-seconds", "4")
    headers = {"Authorization": "Bearer sesame"}

    # A key opens the API; the page and the health checks stay open.
    for wrong in ({}, {"Authorization": "Bearer sesam"}, {"Authorization": "Bearer"}, {"Authorization": "sésame".encode()}):
        for path in ("/v1/models", "/v1/models/tale"):
            reply = server.http.get(path, headers=wrong)
            assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")
        assert server.http.post("/chat", json={"message": "Hi"}, headers=wrong).status_code == 401
    for key in ("sesame", "second"):
        models = server.http.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).json()["data"]
        assert [model["id"] for model in models] == ["tale", "alias"]
    assert server.http.get("/").status_code == server.http.get("/health/ready").status_code == 200

    # One runs, one waits, the third is told to come back. The second waits too long and is told so.
    streams, streamed = background(server, 1, stream=True)
    server.until(lambda: server.health() == (200, 1))
    threads, results = background(server, 1)
    server.until(lambda: server.health() == (200, 2))
    reply = server.http.post("/chat", json={"message": "Hi"}, headers=headers)
    assert (reply.status_code, reply.json()["error"]["code"], reply.headers["retry-after"]) == (429, "queue_full", "1")
    threads[0].join(20)
    assert (results[0].status_code, results[0].json()["error"]["code"], results[0].headers["retry-after"]) == (503, "wait_timeout", "5")
    assert streams[0].is_alive()

    # The worker is killed: waiting clients get an error within two seconds, the server is not ready, and another worker starts.
    threads, results = background(server, 1)
    server.until(lambda: server.health() == (200, 2))
    killed = time.monotonic()
    os.kill(server.worker(), signal.SIGKILL)
    for thread in (*threads, *streams):
        thread.join(20)
    assert time.monotonic() - killed < 2
    assert (results[0].status_code, results[0].json()["error"]["code"]) == (503, "engine_lost")
    assert json.loads(streamed[0].removesuffix("\n\n").rpartition("data: ")[2])["error"]["code"] == "engine_lost"
    assert "[DONE]" not in streamed[0]
    assert server.health() == (503, 0)
    assert server.http.post("/chat", json={"message": "Hi", "max_length": 2}, headers=headers).status_code == 503
    assert server.http.get("/health/live").status_code == 200
    server.until_ready()
    for _ in range(3):
        assert server.http.post("/chat", json={"message": "Hi", "max_length": 2}, headers=headers).status_code == 200
    assert "lit_llm_worker_restarts_total 1.0" in server.http.get("/metrics").text

    # SIGTERM: new requests are refused at once; unfinished ones get an error; every process ends, with code 0.
    streams, streamed = background(server, 1, stream=True)
    server.until(lambda: server.health() == (200, 1))
    server.process.send_signal(signal.SIGTERM)
    server.until(lambda: server.health()[0] == 503, 2)
    reply = server.http.post("/chat", json={"message": "Hi"}, headers=headers)
    assert (reply.status_code, reply.json()["error"]["code"], reply.headers["retry-after"]) == (503, "shutting_down", "5")
    assert server.http.get("/health/ready").json()["status"] == "shutting down"
    assert streams[0].is_alive()
    assert server.process.wait(60) == 0
    streams[0].join(5)
    assert json.loads(streamed[0].removesuffix("\n\n").rpartition("data: ")[2])["error"]["code"] == "shutting_down"
    assert refused(server.port)
    assert_all_ended(server)


def test_the_verb_is_the_same_server(start_server, endless_model, tmp_path):
    """By the installed command; Ctrl-C lets running answers end, and then every process."""
    script = tmp_path / "lit-llm"
    script.write_text("import sys\nfrom lit_llm.__main__ import run\nif __name__ == '__main__':\n    sys.exit(run())\n")
    server = start_server("--model", endless_model, "--name", "tale", "--drain-seconds", "120", command=(str(script), "serve"))
    assert server.http.get("/v1/models").json()["data"][0]["id"] == "tale"
    threads, results = background(server, 1, ENDLESS | {"max_tokens": 1500}, stream=True)
    server.until(lambda: server.health() == (200, 1))
    os.killpg(server.process.pid, signal.SIGINT)    # as a terminal does: to every process
    assert server.process.wait(150) == 0
    threads[0].join(5)
    assert results[0].endswith("data: [DONE]\n\n")
    assert_all_ended(server)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_at_once(number, start_server, endless_model):
    server = start_server("--model", endless_model)
    threads, results = background(server, 1, stream=True)
    server.until(lambda: server.health() == (200, 1))
    server.process.send_signal(signal.SIGTERM)
    server.until(lambda: server.health()[0] == 503, 2)
    start = time.monotonic()
    server.process.send_signal(number)
    assert server.process.wait(5) == 128 + number
    assert time.monotonic() - start < 2
    threads[0].join(5)
    assert isinstance(results[0], httpx.TransportError)
    assert_all_ended(server)


@pytest.mark.parametrize("words", [["--help"], ["--model", "no/such/folder"], ["--modle", "x"], ["--model", "x", "--port", "0"]])
def test_the_verb_takes_the_same_options(words, tmp_path):
    done = [subprocess.run([sys.executable, "-m", *command, *words], cwd=tmp_path, capture_output=True, text=True,
                           env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}, timeout=60)
            for command in (["serve"], ["lit_llm", "serve"])]
    outputs = [" ".join((process.stdout + process.stderr).replace("python -m lit_llm serve", "python -m serve").split())
            for process in done]
    assert (done[0].returncode, outputs[0]) == (done[1].returncode, outputs[1])


@pytest.mark.slow
@pytest.mark.parametrize("which", ["main", "API"])
def test_a_killed_process_leaves_nothing(which, start_server, endless_model):
    """Neither that of the main process nor that of the requests; the worker is started again instead."""
    server = start_server("--model", endless_model)
    os.kill(server.process.pid if which == "main" else server.api(), signal.SIGKILL)
    assert server.process.wait(20) == (-signal.SIGKILL if which == "main" else 1)
    deadline = time.monotonic() + 20
    while server.members():
        assert time.monotonic() < deadline, server.members()
        time.sleep(0.2)


@pytest.mark.parametrize(("words", "message"), [
    (("--model", "no/such/folder"), "no folder"), (("--model", "."), "no model"), (("--model", "MODEL", "--port", "80"), "--port"),
    (("--model", "MODEL", "--host", "0.0.0.0"), "--api-key"), (("--model", "MODEL", "--port", "TAKEN"), "another --port"),
    (("--model", "BROKEN"), "cannot load"), ((), "--model"), (("--model", "MODEL", "--max-running", "0"), "--max-running"),
    (("--model", "MODEL", "--device", "x"), "--device"), (("--model", "MODEL", "--adapter", "x"), "--adapter"),
    (("--model", "a" * 400), "too long"),
])
def test_a_mistake_takes_a_few_lines_and_code_2(words, message, server, endless_model, tmp_path):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(endless_model, broken)
    (broken / "model.safetensors").write_bytes(b"\0" * 50)
    names = {"MODEL": endless_model, "TAKEN": str(server.port), "BROKEN": str(broken)}
    with subprocess.Popen([sys.executable, "-m", "serve", *(names.get(word, word) for word in words)], cwd=tmp_path, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
                          start_new_session=True) as process:
        _, error = process.communicate(timeout=120)
    assert process.returncode == 2, error
    assert message in error
    assert "Traceback" not in error
    if words:
        assert len(error.strip().splitlines()) <= 6


@contextlib.asynccontextmanager
async def connected(worker):
    """A client that listens to a worker's end, from its first beat on."""
    import asyncio

    from serve.engine_client import EngineClient, Limits

    client = EngineClient(Limits())
    client.orders = queue.SimpleQueue()
    listening = asyncio.create_task(client.listen(worker))
    while client._beat is None:
        await asyncio.sleep(0.01)
    yield client
    listening.cancel()


def sent(client):
    """Types of the orders that a client has sent."""
    return [type(client.orders.get_nowait()) for _ in range(client.orders.qsize())]


def test_a_request_that_was_lost_with_a_worker_is_not_left_to_the_next():
    """Its client got 503 and retries; the new worker finds it in the queue, and would generate it to its end for no client."""
    import asyncio

    from lit_llm.inference.sampling import SamplingParams
    from serve.errors import ApiError
    from serve.worker import Add, Beat, Cancel

    class Beats:
        """The worker's end: beats of two boots."""

        boots = iter(["first", "second"])

        async def areceive(self, consumer):
            await asyncio.sleep(0.05)
            return Beat(boot, 0.0, 99, 99, None) if (boot := next(self.boots, None)) else await asyncio.sleep(60)

    async def run():
        async with connected(Beats()) as client:
            with pytest.raises(ApiError, match="restarted"):
                async for _ in client.ask([1, 2], SamplingParams()):
                    pass
        return sent(client), client.in_flight

    assert asyncio.run(run()) == ([Add, Cancel], 0)


def test_a_shutdown_does_not_refuse_a_request_that_is_being_tokenized():
    """It arrived before, so it is answered like the running ones; one that arrives later is refused."""
    import asyncio

    from lit_llm.inference.sampling import SamplingParams
    from serve.errors import ApiError
    from serve.worker import Add, Beat

    class OneBeat:
        """The worker's end."""

        beats = iter([Beat("boot", 0.0, 99, 99, None)])

        async def areceive(self, consumer):
            return next(self.beats, None) or await asyncio.sleep(60)

    async def run():
        async with connected(OneBeat()) as client:
            with client.arriving():
                client.draining = True
                with pytest.raises(ApiError, match="shutting down"), client.arriving():
                    pass
            client.ask([1, 2], SamplingParams())
            client.closed = True                    # the time for running requests is over
            with pytest.raises(ApiError, match="shutting down"):
                client.ask([1, 2], SamplingParams())
        return sent(client), client.in_flight

    assert asyncio.run(run()) == ([Add], 1)


def test_a_request_that_takes_too_long_is_ended():
    """Also in the engine: after its first token, 504; a stream that waits gets comments meanwhile, and is closed with its client."""
    import asyncio

    from lit_llm.inference.engine import EngineStats, Event
    from lit_llm.inference.sampling import SamplingParams
    from serve.engine_client import EngineClient, Limits
    from serve.errors import ApiError
    from serve.openai.streams import EventStream
    from serve.worker import Add, Beat, Cancel

    class OneToken:
        """The worker's end: a beat, then one token of each request, and no more."""

        def __init__(self, orders):
            self.orders, self.began = orders, False

        async def areceive(self, consumer):
            if not self.began:
                self.began = True
                return Beat("boot", 0.0, 99, 99, EngineStats(0, 0, 0, 0))
            while self.orders.empty() or not isinstance(order := self.orders.get_nowait(), Add):
                await asyncio.sleep(0.02)
            return [Event(order.request_id, 5)]

    async def run():
        client = EngineClient(Limits(max_seconds=1))
        orders = queue.SimpleQueue()
        sent = []
        client.orders = type("Orders", (), {"put": lambda self, order: (sent.append(order), orders.put(order))})()
        tasks = [asyncio.create_task(client.listen(OneToken(orders))), asyncio.create_task(client.watch())]
        while client._beat is None:
            await asyncio.sleep(0.01)
        reply = client.ask([1, 2], SamplingParams())
        assert (await anext(reply)).token_id == 5
        with pytest.raises(ApiError) as caught:
            await anext(reply)
        assert (caught.value.status, client.in_flight) == (504, 0)

        reply = client.ask([1, 2], SamplingParams())
        messages = []

        async def send(message):
            messages.append(message)

        async def receive():
            await asyncio.sleep(0.5)
            return {"type": "http.disconnect"}

        async def content():
            async for event in reply:
                yield f"data: {event.token_id}\n\n"

        stream = EventStream(content(), [reply], ping_seconds=0.1)
        await stream({"type": "http", "asgi": {"spec_version": "2.3"}}, receive, send)
        assert client.in_flight == 0
        for task in tasks:
            task.cancel()
        return [type(order) for order in sent], messages

    orders, (start, *bodies) = asyncio.run(run())
    assert orders == [Add, Cancel, Add, Cancel]
    assert start["type"] == "http.response.start"
    texts = [body["body"] for body in bodies]
    assert texts[0] == b"data: 5\n\n"
    assert set(texts[1:]) == {b": ping\n\n"}
    assert 2 <= len(texts) - 1 <= 5
