"""If this breaks: a client that hangs up keeps its slot for ever, a full server answers nobody, a dead worker looks alive,
processes stay behind, or strangers get in without a key.
"""

import json
import os
import queue
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


def test_hanging_up_frees_the_tokenizer_too(server):
    """Before the engine is asked: a chat that is still tokenized is in flight, and nobody's when its client is gone."""
    server.until(lambda: server.health() == (200, 0))
    long = {"messages": [{"role": "user", "content": "ab " * 330_000}], "max_tokens": 1}
    body = json.dumps(long).encode()
    seen = []
    for _ in range(4):
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                           b"Content-Length: %d\r\n\r\n" % len(body) + body)
            time.sleep(0.15)
            seen.append(server.health()[1])
    assert max(seen) >= 1
    server.until(lambda: server.health() == (200, 0), 5)


def test_the_page_needs_nothing_from_elsewhere(server):
    reply = server.http.get("/")
    assert reply.status_code == 200
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    for word in ("http://", "https://", "src=", "@import", "innerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert word not in reply.text, word
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


def assert_ends_in_order(server, number, *, tokens):
    """After a signal a running answer is finished, then every process ends, with code 0."""
    threads, results = background(server, 1, ENDLESS | {"max_tokens": tokens}, stream=True)
    server.until(lambda: server.health() == (200, 1))
    server.process.send_signal(number)
    assert server.process.wait(60) == 0
    threads[0].join(5)
    assert results[0].endswith("data: [DONE]\n\n")
    deadline = time.monotonic() + 5
    while server.members() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert server.members() == []
    assert "Traceback" not in server.process.stderr.read()


@pytest.mark.slow
def test_keys_limits_a_killed_worker_and_the_end(start_server, endless_model):
    """The life of one server, told in order, as each start takes seconds."""
    server = start_server("--model", endless_model, "--api-key", "sesame", "--api-key", "second", "--max-running", "1",
                          "--max-waiting", "1", "--name", "tale")
    headers = {"Authorization": "Bearer sesame"}

    # A key opens the API; the page and the health checks stay open.
    for wrong in ({}, {"Authorization": "Bearer sesam"}, {"Authorization": "Bearer"}, {"Authorization": "sésame".encode()}):
        for path in ("/v1/models", "/v1/models/tale"):
            reply = server.http.get(path, headers=wrong)
            assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")
        assert server.http.post("/chat", json={"message": "Hi"}, headers=wrong).status_code == 401
    for key in ("sesame", "second"):
        assert server.http.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).json()["data"][0]["id"] == "tale"
    assert server.http.get("/").status_code == server.http.get("/health/ready").status_code == 200

    # One runs, one waits, the third is told to come back.
    threads, results = background(server, 2)
    server.until(lambda: server.health() == (200, 2))
    reply = server.http.post("/chat", json={"message": "Hi"}, headers=headers)
    assert (reply.status_code, reply.json()["error"]["code"], reply.headers["retry-after"]) == (429, "queue_full", "1")

    # The worker is killed: who waits for it is told, and another worker comes up.
    os.kill(server.worker(), signal.SIGKILL)
    for thread in threads:
        thread.join(20)
    assert [(reply.status_code, reply.json()["error"]["code"]) for reply in results] == [(503, "engine_lost")] * 2
    # Where the next one is up before the silence is noticed, the reply says so, and it is ready; else nothing is.
    ready = 200 if all("restarted" in reply.json()["error"]["message"] for reply in results) else 503
    assert server.health() == (ready, 0)
    assert server.http.post("/chat", json={"message": "Hi", "max_length": 2}, headers=headers).status_code == ready
    assert server.http.get("/health/live").status_code == 200
    server.until_ready()
    for _ in range(3):
        assert server.http.post("/chat", json={"message": "Hi", "max_length": 2}, headers=headers).status_code == 200

    # SIGTERM: what runs is finished, then every process ends, with code 0.
    assert_ends_in_order(server, signal.SIGTERM, tokens=1500)


def test_the_verb_is_the_same_server(start_server, endless_model, tmp_path):
    """By the installed command; Ctrl-C lets running answers end, and then every process."""
    script = tmp_path / "lit-llm"
    script.write_text("import sys\nfrom lit_llm.__main__ import run\nif __name__ == '__main__':\n    sys.exit(run())\n")
    server = start_server("--model", endless_model, "--name", "tale", command=(str(script), "serve"))
    assert server.http.get("/v1/models").json()["data"][0]["id"] == "tale"
    assert_ends_in_order(server, signal.SIGINT, tokens=60)


@pytest.mark.parametrize("words", [["--help"], ["--model", "no/such/folder"], ["--modle", "x"], ["--model", "x", "--port", "0"]])
def test_the_verb_takes_the_same_options(words, tmp_path):
    done = [subprocess.run([sys.executable, "-m", *command, *words], cwd=tmp_path, capture_output=True, text=True,
                           env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}, timeout=60)
            for command in (["serve"], ["lit_llm", "serve"])]
    said = [" ".join((each.stdout + each.stderr).replace("python -m lit_llm serve", "python -m serve").split())
            for each in done]
    assert (done[0].returncode, said[0]) == (done[1].returncode, said[1])


@pytest.mark.slow
def test_a_killed_main_process_leaves_nothing(start_server, endless_model):
    server = start_server("--model", endless_model)
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait()
    deadline = time.monotonic() + 20
    while server.members():
        assert time.monotonic() < deadline, server.members()
        time.sleep(0.2)


@pytest.mark.parametrize(("words", "said"), [
    (("--model", "no/such/folder"), "no folder"), (("--model", "."), "no model"), (("--model", "MODEL", "--port", "80"), "--port"),
    (("--model", "MODEL", "--host", "0.0.0.0"), "--api-key"), (("--model", "MODEL", "--port", "TAKEN"), "another --port"),
    (("--model", "BROKEN"), "cannot load"), ((), "--model"), (("--model", "MODEL", "--max-running", "0"), "--max-running"),
    (("--model", "MODEL", "--device", "x"), "--device"), (("--model", "MODEL", "--adapter", "x"), "--adapter"),
    (("--model", "a" * 400), "too long"),
])
def test_a_mistake_takes_a_few_lines_and_code_2(words, said, server, endless_model, tmp_path):
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
    assert said in error
    assert "Traceback" not in error
    if words:
        assert len(error.strip().splitlines()) <= 6


def test_a_request_that_was_lost_with_a_worker_is_not_left_to_the_next():
    """It was told 503 and comes again; the new worker finds it in the queue, and would draw it to its end for nobody."""
    import asyncio

    from lit_llm.inference.sampling import SamplingParams
    from serve.engine_client import EngineClient, Limits
    from serve.errors import ApiError
    from serve.worker import Add, Beat, Cancel

    class Beats:
        """The worker's end: beats of two boots."""

        boots = iter(["first", "second"])

        async def areceive(self, consumer):
            await asyncio.sleep(0.05)
            return Beat(boot, 0.0, 99, 99, None) if (boot := next(self.boots, None)) else await asyncio.sleep(60)

    async def run():
        client = EngineClient(Limits())
        client.orders = queue.SimpleQueue()
        listening = asyncio.create_task(client.listen(Beats()))
        while client._beat is None:
            await asyncio.sleep(0.01)
        with pytest.raises(ApiError, match="restarted"):
            async for _ in client.ask([1, 2], SamplingParams()):
                pass
        listening.cancel()
        return [type(client.orders.get_nowait()) for _ in range(client.orders.qsize())], client.in_flight

    assert asyncio.run(run()) == ([Add, Cancel], 0)
