"""How fast answers come, as ratios measured in one run: our server against `transformers serve` and the chapter's FastAPI.

All servers live at once, each with the same random Llama of 32 million parameters in float32, and take turns of some
seconds: at 1, 8 and 32 clients, each of which asks for 64 tokens again and again over HTTP. Ours runs in bfloat16 as well,
and one client is compared with `model.generate` in a process of its own, without HTTP. Prints output tokens/s, the
seconds to the first token (median and 95th percentile), and their ratios; then the longest gap of a running stream while a
long prompt arrives, and the first token of that prompt when it comes again.

    python tests/benchmarks/serve.py                   # about fifteen minutes
    python tests/benchmarks/serve.py --rounds 1 --clients 8 --only ours transformers

Every server chooses its threads itself: do not set OMP_NUM_THREADS.
"""

import argparse
import itertools
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from contextlib import ExitStack, contextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NEW, CONTEXT = 64, 2048
CHAPTER = '''
import sys, uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from transformers import pipeline

app, generate = FastAPI(), pipeline("text-generation", model=sys.argv[1], device="cpu")


class Ask(BaseModel):
    message: str
    max_length: int


@app.get("/health")
def health():
    return {}


@app.post("/chat")
def chat(ask: Ask):
    return generate(ask.message, max_new_tokens=ask.max_length, do_sample=False, return_full_text=False)[0]


uvicorn.run(app, port=int(sys.argv[2]), log_level="error")
'''

GENERATE = '''
import json, sys, time, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval(), AutoTokenizer.from_pretrained(sys.argv[1])
print("ready", flush=True)
for line in sys.stdin:
    ids = tokenizer.apply_chat_template([{"role": "user", "content": json.loads(line)}], add_generation_prompt=True,
                                        return_tensors="pt", return_dict=True)["input_ids"]
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=int(sys.argv[2]), do_sample=False)
    print("done", flush=True)
'''


def make_model(folder, tokenizer):
    """A random Llama whose answers never end by themselves.

    It never generates tokens that are no text by themselves, such as a part of a character: they have zero embeddings,
    and the head is tied to these. Servers differ in when they send such tokens, which is not what is measured here.
    """
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    hf = AutoTokenizer.from_pretrained(tokenizer)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(hf), hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=CONTEXT, tie_word_embeddings=True))
    pieces = hf.batch_decode([[id_] for id_ in range(len(hf))], skip_special_tokens=True)
    with torch.no_grad():
        model.model.embed_tokens.weight[[not piece or "\ufffd" in piece for piece in pieces]] = 0
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    hf.save_pretrained(folder)


@contextmanager
def started(command, ready, folder):
    """A server of its own until it answers at `ready`; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([word.format(port=port) for word in command], cwd=folder, start_new_session=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"})
    try:
        end = time.monotonic() + 240
        while True:
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}{ready}", timeout=5):
                break
            if time.monotonic() > end or process.poll() is not None:
                raise SystemExit(f"error: {' '.join(command)} did not start")
            time.sleep(0.5)
        yield port, process.pid
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def stream(port, path, body, arrived):
    """One request; `arrived` gets the time of each piece of text. Returns the tokens that came."""
    connection = HTTPConnection("127.0.0.1", port, timeout=300)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    reply, tokens = connection.getresponse(), 0
    if reply.status != 200:
        raise RuntimeError(f"{reply.status}: {reply.read()[:300]!r}")
    for line in reply:
        if line.startswith(b"data: {"):
            event = json.loads(line[6:])
            tokens = (event.get("usage") or {}).get("completion_tokens") or tokens
            if any(choice["delta"].get("content") for choice in event.get("choices", ())):
                arrived.append(time.perf_counter())
        elif line.startswith(b"{"):
            arrived.append(time.perf_counter())
            tokens = NEW
    connection.close()
    if not arrived:                                 # random bytes that are no text
        arrived.append(time.perf_counter())
    return tokens


def words(draw, count):
    """Text of about that many tokens."""
    return " ".join(draw.choice(("the", "house", "river", "green", "and", "of", "stone", "walks")) for _ in range(count))


class Bare:
    """`model.generate` in a process of its own, for one client.

    Args:
        folder: The model's.
    """

    name, model, most = "generate", None, 1

    def __init__(self, folder):
        self.process = subprocess.Popen([sys.executable, "-c", GENERATE, folder, str(NEW)], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout.readline() == "ready\n"

    def load(self, clients, seconds, seed):
        """Tokens/s, and no seconds to the first token."""
        draw, began, tokens = random.Random(seed * 1000), time.perf_counter(), 0
        while time.perf_counter() < began + seconds:
            self.process.stdin.write(json.dumps(words(draw, draw.randrange(20, 40))) + "\n")
            self.process.stdin.flush()
            assert self.process.stdout.readline() == "done\n"
            tokens += NEW
        return tokens / (time.perf_counter() - began), [float("nan")]


class Contestant:
    """A server and how it is asked.

    Args:
        name: As printed.
        port: Where it listens.
        model: As its API calls it; null for the chapter's.
    """

    most = 1 << 20                                  # clients at once

    def __init__(self, name, port, model):
        self.name, self.port, self.model = name, port, model

    def ask(self, prompt, arrived, new=NEW):
        if self.model is None:
            return stream(self.port, "/chat", {"message": prompt, "max_length": new}, arrived)
        return stream(self.port, "/v1/chat/completions", {
            "model": self.model, "messages": [{"role": "user", "content": prompt}], "max_tokens": new, "temperature": 0,
            "stream": True, "stream_options": {"include_usage": True}}, arrived)

    def load(self, clients, seconds, seed):
        """Tokens/s of all clients, and seconds to the first token of each request."""
        end, tokens, firsts, lock = time.perf_counter() + seconds, [0], [], threading.Lock()
        began = time.perf_counter()

        def client(number):
            draw = random.Random(seed * 1000 + number)
            while time.perf_counter() < end:
                arrived, start = [], time.perf_counter()
                count = self.ask(words(draw, draw.randrange(20, 40)), arrived)
                with lock:
                    tokens[0] += count
                    firsts.append(arrived[0] - start)

        threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return tokens[0] / (time.perf_counter() - began), firsts

    def long_prompt(self):
        """The longest gap of a running stream while a long prompt arrives, and the prompt's first token thrice."""
        prompt, gaps, firsts = words(random.Random(1), 1000), [], []
        for turn in range(3):
            arrived, late = [], []
            other = threading.Thread(target=self.ask, args=("Tell me of the river.", arrived, 400))
            other.start()
            while len(arrived) < 10:
                time.sleep(0.01)
            start = time.perf_counter()
            self.ask(prompt if turn < 2 else f"{prompt} And then?", late, 2)
            firsts.append(late[0] - start)
            other.join()
            during = [moment for moment in arrived if moment > start - 1]
            gaps.append(max(later - earlier for earlier, later in itertools.pairwise(during)))
        return gaps, firsts


def percentile(values, share):
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--seconds", type=float, default=12, help="of a turn")
    arguments.add_argument("--clients", type=int, nargs="*", default=[1, 8, 32])
    arguments.add_argument("--tokenizer", default=str(ROOT / "lit_llm" / "samples" / "base"))
    arguments.add_argument("--only", nargs="*", default=["ours", "ours-bf16", "transformers", "chapter", "generate"])
    arguments.add_argument("--options", nargs="*", default=[], help="more options of our server, such as --threads=1")
    options = arguments.parse_args()
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        make_model(f"{folder}/model", options.tokenizer)
        Path(folder, "chapter.py").write_text(CHAPTER)
        own_command = [sys.executable, "-m", "serve", "--model", f"{folder}/model", "--port", "{port}", *options.options]
        commands = {
            "ours": (own_command, "/health/ready", "model"),
            "ours-bf16": ([*own_command, "--dtype", "bfloat16"], "/health/ready", "model"),
            "transformers": (["transformers", "serve", f"{folder}/model", "--continuous-batching", "--port",
                              "{port}", "--device", "cpu", "--dtype", "float32"], "/health", f"{folder}/model"),
            "chapter": ([sys.executable, "chapter.py", f"{folder}/model", "{port}"], "/health", None)}
        contestants = []
        for name in options.only:
            if name == "generate":
                contestants.append(Bare(f"{folder}/model"))
                stack.callback(contestants[-1].process.kill)
            else:
                command, ready, model = commands[name]
                contestants.append(Contestant(name, stack.enter_context(started(command, ready, folder))[0], model))
            contestants[-1].load(min(2, contestants[-1].most), 3, 9)        # warm
        for clients in options.clients:
            taking_part = [contestant for contestant in contestants if clients <= contestant.most]
            speeds = {contestant.name: [] for contestant in contestants}
            firsts = {contestant.name: [] for contestant in contestants}
            for turn in range(options.rounds):
                for contestant in taking_part:
                    speed, waited = contestant.load(clients, options.seconds, turn)
                    speeds[contestant.name].append(speed)
                    firsts[contestant.name] += waited
            for contestant in taking_part:
                ratio = statistics.median(one / other for one, other in
                                          zip(speeds["ours"], speeds[contestant.name], strict=True)) if "ours" in speeds else 0
                print(f"{clients:3} clients  {contestant.name:<13} {statistics.median(speeds[contestant.name]):7.1f} tokens/s   first "
                      f"token {statistics.median(firsts[contestant.name]):6.2f} s, 95th "
                      f"{percentile(firsts[contestant.name], 0.95):6.2f} s   ours is {ratio:.2f} times", flush=True)
        for contestant in contestants:
            if contestant.model is not None:
                gaps, firsts = contestant.long_prompt()
                print(f"long prompt  {contestant.name:<13} longest gap of a stream {max(gaps):.2f} s; first token "
                      f"{firsts[0]:.2f} s, again {firsts[1]:.2f} s, with more behind it {firsts[2]:.2f} s", flush=True)


if __name__ == "__main__":
    main()
