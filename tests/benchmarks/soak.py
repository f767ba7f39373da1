"""Memory of the server over many mixed requests with cancels, and what it answers.

    python -m tests.benchmarks.soak --model DIR [--requests 10000] [--clients 16]

It starts `python -m serve`, sends requests of all kinds (chat and completions, whole and streamed, several answers, refused
ones, streams that the client leaves), and prints the resident memory of the API process and of the worker after the first
tenth and then after each tenth.
"""

import argparse
import asyncio
import collections
import json
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[2]
WORDS = ["the", "kite", "flies", "high", "over", "a", "hill", "风筝", "飞得", "很高", "red", "blue", "what", "colour"]


def resident(pid: int) -> float:
    """Megabytes of a process that are in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def processes(main: int) -> tuple[int, int]:
    """Process ids of the API process and of the worker: of the two forks the younger, and the one that was spawned."""
    forks, worker = [], 0
    for entry in Path("/proc").iterdir():
        try:
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            words = (entry / "cmdline").read_bytes()
        except (ValueError, OSError, IndexError):
            continue
        if parent == main and b"spawn_main" in words:
            worker = int(entry.name)
        elif parent == main and b"resource_tracker" not in words:
            forks.append(int(entry.name))
    return max(forks), worker


def request(draw: random.Random) -> tuple[str, dict, bool]:
    """(path, body, whether the client leaves early) of a random request."""
    text = " ".join(draw.choice(WORDS) for _ in range(draw.choice([3, 10, 60])))
    body: dict = {"max_tokens": draw.randint(1, 24), "temperature": draw.choice([0, 0.7, 1.0])}
    path = draw.choice(["/v1/chat/completions", "/v1/completions"])
    body |= {"prompt": text} if path == "/v1/completions" else {"messages": [{"role": "user", "content": text}]}
    body |= draw.choice([{}, {}, {"n": 2}, {"stop": ["a", "风"]}, {"seed": 5}, {"top_k": 5, "top_p": 0.9}, {"temperature": 9}, {"max_tokens": 0.5}])
    if draw.random() < 0.6:
        body["stream"] = True
    leaves = draw.random() < 0.2
    if leaves:
        body["max_tokens"] = 200
    return path, body, leaves


async def client(http: httpx.AsyncClient, draws: "asyncio.Queue[random.Random]", seen: collections.Counter) -> None:
    """Send requests until none is left."""
    while not draws.empty():
        path, body, leaves = request(draws.get_nowait())
        try:
            async with http.stream("POST", path, json=body) as reply:
                parts = 0
                async for text in reply.aiter_text():
                    parts += 1
                    if '"error"' in text and reply.status_code == 200:
                        seen["error event"] += 1
                    if leaves and parts > 2:
                        break
                seen["left" if leaves and reply.status_code == 200 else str(reply.status_code)] += 1
        except httpx.HTTPError as error:
            seen[type(error).__name__] += 1


async def measure(url: str, main: int, count: int, clients: int) -> None:
    """Send all requests, and print a line after each tenth."""
    api, worker = processes(main)
    seen: collections.Counter = collections.Counter()
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    lines = []
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as http:
        start = time.monotonic()
        for tenth in range(10):
            draws: asyncio.Queue[random.Random] = asyncio.Queue()
            for number in range(count // 10):
                draws.put_nowait(random.Random(tenth * count + number))
            await asyncio.gather(*(client(http, draws, seen) for _ in range(clients)))
            while (await http.get("/health/ready")).json()["in_flight"]:
                await asyncio.sleep(0.1)
            lines.append((resident(api), resident(worker)))
            print(f"{(tenth + 1) * count // 10:6} requests, {time.monotonic() - start:6.0f} s: API process {lines[-1][0]:.1f} MB, "
                  f"worker {lines[-1][1]:.1f} MB", flush=True)
    print("answers:", json.dumps(dict(seen)))
    print(f"growth after the first tenth: API process {lines[-1][0] - lines[0][0]:+.1f} MB, worker {lines[-1][1] - lines[0][1]:+.1f} MB")


def main() -> None:
    """Start the server and measure it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=16)
    options = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "serve", "--model", options.model, "--port", str(port)]
    server = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)})
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            try:
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            except httpx.TransportError:
                assert server.poll() is None, "the server ended"
            time.sleep(0.2)
        asyncio.run(measure(url, server.pid, options.requests, options.clients))
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
