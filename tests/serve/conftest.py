"""Real servers: `python -m serve` in processes of their own, on free ports."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


class ServerProcess:
    """`python -m serve`, or another command that serves, started when made."""

    def __init__(self, *words, command=("-m", "serve")):
        import httpx

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, *command, "--port", str(self.port), *words]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, env=environment, cwd="/", stderr=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True, start_new_session=True)
        self.http = httpx.Client(base_url=self.url, timeout=60)
        with contextlib.suppress(BaseException):
            self.until_ready()
            return
        self.kill()
        raise AssertionError(f"not ready: {self.process.stderr.read()[-2000:]}")

    def until_ready(self, seconds=120):
        self.until(lambda: self.health()[0] == 200, seconds)

    def health(self):
        import httpx

        try:
            reply = self.http.get("/health/ready")
            return reply.status_code, reply.json().get("in_flight")
        except httpx.TransportError:
            return 0, None

    def until(self, true, seconds=10):
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, "it never came true"
            assert self.process.poll() is None, "the server ended"
            time.sleep(0.05)

    def members(self):
        """Process ids of the whole group: LitServe's main, queue, worker and API processes."""
        ids = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(ValueError, OSError, IndexError):
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                if int(fields[2]) == self.process.pid and fields[0] != "Z":
                    ids.append(int(entry.name))
        return ids

    def worker(self):
        """The process with the model: the one that multiprocessing has spawned."""
        for pid in self.members():
            with contextlib.suppress(OSError):
                if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return pid
        return None

    def api(self):
        """The process that serves requests: the younger of the two that were forked (the other one has the queues)."""
        def command(pid):
            return Path(f"/proc/{pid}/cmdline").read_bytes()

        return max(pid for pid in self.members() if command(pid) == command(self.process.pid))

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="session")
def server(endless_model):
    """One server for all tests that leave it as it was."""
    running = ServerProcess("--model", endless_model, "--write-seconds", "2")
    yield running
    running.kill()


@pytest.fixture(scope="session")
def start_server():
    """`start_server("--model", ...)`: another one, for tests that break it."""
    started = []

    def start(*words, **options):
        started.append(ServerProcess(*words, **options))
        return started[-1]

    yield start
    for running in started:
        running.kill()


@pytest.fixture(scope="session")
def start_front(start_server, tmp_path_factory):
    """`start_front(folder, url)`: a server whose answers are computed by another one; it gets no weights of the model."""
    def start(folder, url):
        copied = tmp_path_factory.mktemp("front") / Path(folder).name
        copied.mkdir()
        for file in Path(folder).iterdir():
            if file.suffix != ".safetensors":
                (copied / file.name).write_bytes(file.read_bytes())
        return start_server("--model", str(copied), "--backend", url)

    return start


@pytest.fixture(scope="session")
def calling(tiny_tokenizer, tmp_path_factory, start_server):
    """A server of a model that calls tools by itself."""
    from calling import train

    folder = str(tmp_path_factory.mktemp("calling") / "calling")
    train(tiny_tokenizer, folder)
    return start_server("--model", folder)
