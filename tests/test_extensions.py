"""If this breaks: a user's own packing policy, loss, metric, callback, format or endpoint needs changes in this package, or the
code that CONTRIBUTING.md shows for them does not run.

The code blocks of CONTRIBUTING.md become a real package outside of this repository; it uses public names only.
"""

import contextlib
import csv
import importlib
import json
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lit_llm import CausalLMModule, Document, InputError, Source, TextDataModule, Tokenizer, Trainer

ROOT = Path(__file__).resolve().parents[1]
RECORDS = [{"prompt": f"say {word}", "completion": " ".join([word] * times)}
           for word, times in (("one", 1), ("two", 2), ("three", 3), ("seven", 7), ("five", 5))]
SCRIPT = """
import json, sys
from tests.test_extensions import trained
from my_llm.loss import WithZLoss
if __name__ == "__main__":
    base, folder = sys.argv[1:]
    loss, weights = trained(WithZLoss, base, folder, batch_size=2, devices=2, strategy="ddp")
    print(json.dumps([loss, weights]))
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """Folder with the package `my_llm`, made of the code in CONTRIBUTING.md; on the path."""
    folder = tmp_path_factory.mktemp("outside")
    (folder / "my_llm").mkdir()
    (folder / "my_llm" / "__init__.py").touch()
    code = re.findall(r"```python\n# my_llm/(\w+)\.py\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    for name, text in code:
        code_lines = [line for line in text.splitlines() if not re.match(r'(import|from) |\s*"""|\s*$', line)]
        assert len(code_lines) <= 10, f"{name}: at most ten lines of code, without imports and docstrings"
        assert len(text.splitlines()) <= 15, name
        (folder / "my_llm" / f"{name}.py").write_text(text)
    assert {name for name, _ in code} == {"packing", "loss", "metric", "callback", "format", "endpoint"}
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    for name in [name for name in sys.modules if name.split(".")[0] == "my_llm"]:
        del sys.modules[name]


def chats(folder):
    file = Path(folder) / "chats.jsonl"
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in RECORDS[:4]))
    return Source(str(file))


def trained(kind, base, folder, *, batch_size=4, accumulate=1, devices=1, strategy="auto", steps=1, callbacks=(), **options):
    """Loss of the first step of a module's run on the chats, and some weights after it."""
    source = chats(folder)
    torch.manual_seed(0)
    module = kind(base=base, lr=1.0, eps=1.0, warmup=0, schedule="constant")        # a step of about the gradient
    data = TextDataModule([source], val_sources=[source], tokenizer=base, seq_len=64, batch_size=batch_size, packing="none",
                          cache_dir=str(folder), **options)
    trainer = Trainer(accelerator="cpu", devices=devices, strategy=strategy, max_steps=steps, max_epochs=-1,
                      accumulate_grad_batches=accumulate, enable_progress_bar=False, enable_checkpointing=False,
                      log_every_n_steps=1, num_sanity_val_steps=0, default_root_dir=str(folder), callbacks=list(callbacks))
    trainer.exports = False
    trainer.fit(module, datamodule=data)
    weight = next(weight for name, weight in module.named_parameters() if "q_proj" in name)
    return float(trainer.callback_metrics["train/loss"]), weight.detach().flatten()[:200].tolist()


# ---- a packing policy ------------------------------------------------------------------------------------------------

def test_a_packing_policy(package, tiny_model, tmp_path, monkeypatch):
    from lit_llm.data.rows import packing

    monkeypatch.setattr(packing, "POLICIES", packing.POLICIES.copy())
    source = Source(str(tmp_path / "texts.jsonl"))
    Path(source.path).write_text("".join(json.dumps({"text": "word " * size}) + "\n" for size in (1, 3, 1, 4, 1, 1, 8, 2)))
    data = TextDataModule([source], tokenizer=tiny_model("llama"), seq_len=32, packing="in_order", cache_dir=str(tmp_path))
    with pytest.raises(InputError, match=r"data\.packing: 'in_order' is not one of concat, best_fit, none"):
        data.setup("fit")
    importlib.reload(importlib.import_module("my_llm.packing"))
    data.setup("fit")
    rows = data.plans["train"].rows
    packed = [rows.row(number) for number in range(len(rows))]
    lengths = rows.lengths.tolist()
    assert [segment for row in packed for segment in row] == sorted(segment for row in packed for segment in row)
    assert all(length <= 32 for length in lengths)
    for number, row in enumerate(packed[1:]):            # a new packed sequence begins only if the segment does not fit into the previous one
        assert lengths[number] + row[0][2] - row[0][1] > 32
    assert len(rows) < len(data.plans["train"].corpus)
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].shape[1] == 32


@pytest.mark.parametrize(("policy", "says"), [
    (lambda lengths, seq_len: lengths * 0, "made a packed sequence of .* tokens, but data.seq_len is 32"),
    (lambda lengths, seq_len: torch.arange(len(lengths)).numpy() * 2, "counted from 0 without gaps"),
    (lambda lengths, seq_len: torch.arange(len(lengths) - 1).numpy(), "return the index of a packed sequence for each of .* segments")])
def test_a_wrong_packing_policy_is_refused(policy, says, tiny_model, tmp_path, monkeypatch):
    from lit_llm.data.rows import packing

    monkeypatch.setitem(packing.POLICIES, "wrong", policy)
    data = TextDataModule([chats(tmp_path)], tokenizer=tiny_model("llama"), seq_len=32, packing="wrong", cache_dir=str(tmp_path))
    with pytest.raises(InputError, match=says):
        data.setup("fit")


# ---- a term in the loss ----------------------------------------------------------------------------------------------

def test_a_term_in_the_loss_under_accumulation_and_on_two_ranks(package, tiny_model, tmp_path):
    """Mean NLL plus mean squared normaliser over all supervised tokens of the step, however it is divided."""
    from transformers import AutoModelForCausalLM

    kind = importlib.import_module("my_llm.loss").WithZLoss
    base = tiny_model("llama")
    whole, weights = trained(kind, base, tmp_path / "whole")
    parts, divided = trained(kind, base, tmp_path / "parts", batch_size=1, accumulate=4)
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": f"{package}{os.pathsep}{ROOT}"}
    done = subprocess.run([sys.executable, str(script), base, str(tmp_path / "ranks")], env=environment, cwd=tmp_path,
                          capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    printed = [line for line in done.stdout.splitlines() if line.startswith("[") and line.endswith("]")]
    ranks, shared = json.loads(printed[-1])         # a progress bar of the other rank may write after it

    tokenizer, model = Tokenizer.load(base), AutoModelForCausalLM.from_pretrained(base).double()
    total, count = 0.0, 0
    data = TextDataModule([chats(tmp_path / "oracle")], tokenizer=base, seq_len=64, packing="none", cache_dir=str(tmp_path))
    data.setup("fit")
    corpus = data.plans["train"].corpus
    assert tokenizer.fingerprint == data.tokenizer.fingerprint
    for sequence in range(len(corpus)):
        ids, supervised = corpus.read(sequence, 0, int(corpus.lengths[sequence]))
        row, where = torch.tensor(ids.astype(int)), torch.tensor(supervised[1:])
        with torch.no_grad():
            logits = model(input_ids=row[None]).logits[0, :-1][where]
        normaliser = logits.logsumexp(-1)
        total += float((normaliser - logits.gather(1, row[1:][where][:, None])[:, 0] + 1e-4 * normaliser**2).sum())
        count += int(where.sum())
    assert whole == pytest.approx(total / count, rel=1e-5)
    assert [parts, ranks] == pytest.approx([whole, whole], rel=1e-5)
    plain, unlike = trained(CausalLMModule, base, tmp_path / "plain")
    assert plain < whole
    for other in (divided, shared):
        assert other == pytest.approx(weights, abs=1e-6)
    assert unlike != pytest.approx(weights, abs=1e-6)


# ---- a metric and a callback -----------------------------------------------------------------------------------------

def test_a_metric_and_a_validation_callback(package, tiny_model, tmp_path):
    """The metric is a column of the run's figures; the callback ends the run at the validation that it waits for."""
    kind = importlib.import_module("my_llm.metric").WithWorstBatch
    stop = importlib.import_module("my_llm.callback").StopAtPerplexity
    trained(kind, tiny_model("llama"), tmp_path / "never", steps=3, batch_size=1, callbacks=[stop(0.5)])
    with (tmp_path / "never" / "metrics.csv").open() as stream:
        never = list(csv.DictReader(stream))
    measured = [row for row in never if row.get("val/worst_nll")]
    assert measured
    assert all(float(row["val/worst_nll"]) > float(row["val/nll"]) for row in measured)
    assert max(int(row["step"]) for row in never) == 3
    trained(kind, tiny_model("llama"), tmp_path / "soon", steps=9, batch_size=4, callbacks=[stop(1e9)])
    with (tmp_path / "soon" / "metrics.csv").open() as stream:
        assert max(int(row["step"]) for row in csv.DictReader(stream)) < 9


# ---- a format --------------------------------------------------------------------------------------------------------

def test_a_dataset_format(package, tiny_model, tmp_path, monkeypatch):
    from lit_llm.data.records import formats
    from lit_llm.data.tokens.encode import SourceEncoder
    from lit_llm.data.tokens.prepare import prepare

    monkeypatch.setattr(formats, "FORMATS", formats.FORMATS.copy())
    rows = [{"ask": "say one", "reply": "one", "mood": "calm"}, {"ask": "say two", "reply": "two", "persona": "kind"}]
    same = [{"messages": [*([{"role": "system", "content": row["persona"]}] if "persona" in row else []),
                          {"role": "user", "content": row["ask"]}, {"role": "assistant", "content": row["reply"]}]}
            for row in rows]
    for name, records in (("mine", rows), ("same", same)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    tokenizer = Tokenizer.load(tiny_model("llama"))
    source = Source(str(tmp_path / "mine.jsonl"), format="dialog")
    with pytest.raises(InputError, match="unknown format 'dialog'"):
        prepare(source, tokenizer, cache_dir=str(tmp_path / "cache"))
    module = importlib.reload(importlib.import_module("my_llm.format"))
    store = prepare(source, tokenizer, cache_dir=str(tmp_path / "cache"))
    other = prepare(Source(str(tmp_path / "same.jsonl")), tokenizer, cache_dir=str(tmp_path / "cache"))
    assert store.tokens.tolist() == other.tokens.tolist()
    assert store.marks.tolist() == other.marks.tolist()
    (note, count), = store.report.notes.items()
    assert "'mood'" in note
    assert count == 1

    file = Path(module.__file__)                        # the tokens are those of the code that made them
    before = file.read_text()
    file.write_text(before.replace('record.need("reply")', 'record.need("reply").upper()'))
    try:
        importlib.reload(module)
        edited = prepare(source, tokenizer, cache_dir=str(tmp_path / "cache"))
    finally:
        file.write_text(before)
    assert edited.key != store.key
    assert edited.tokens.tolist() != store.tokens.tolist()

    importlib.reload(module)                            # a process that is spawned, not forked, has it too
    records = list(source.scan(parse=False))
    (tmp_path / "work").write_bytes(pickle.dumps((SourceEncoder(source, Tokenizer.load(tiny_model("llama"))), records)))
    code = ("import pickle, sys; encoder, found = pickle.load(open(sys.argv[1], 'rb')); "
            "print(encoder.block(found).tokens.tolist())")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "work")], capture_output=True, text=True, timeout=60,
                          env=os.environ | {"PYTHONPATH": f"{package}{os.pathsep}{ROOT}"}, check=True)
    assert json.loads(done.stdout) == store.tokens.tolist()


# ---- an endpoint -----------------------------------------------------------------------------------------------------

def test_an_endpoint(package, tiny_model, tmp_path):
    """Behind the same key and errors as the others."""
    import httpx

    base = tiny_model("llama")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "start.py").write_text("import sys\nfrom my_llm.endpoint import WithCount\n"
                                       "from serve.server import Network, Settings, build\n"
                                       "if __name__ == '__main__':\n    network = Network(port=int(sys.argv[2]))\n"
                                       "    build(Settings(sys.argv[1], network=network), routes=WithCount).serve()\n")
    environment = os.environ | {"PYTHONPATH": f"{package}{os.pathsep}{ROOT}"}
    server = subprocess.Popen([sys.executable, str(tmp_path / "start.py"), base, str(port)], env=environment, cwd=tmp_path,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            wait(http, server)
            text = "once upon a time"
            wanted = len(Tokenizer.load(base).encode_document(Document(text), end=False))
            assert http.get("/count", params={"text": text}).json() == {"tokens": wanted}
            assert http.get("/count").status_code == 400
            assert http.get("/v1/models").json()["data"][0]["id"] == Path(base).name
            answer = http.post("/chat", json={"message": "hi", "max_length": 2})
            assert answer.status_code == 200
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def wait(http, server, seconds=100):
    import httpx

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert server.poll() is None, server.stdout.read()[-2000:]
        try:
            if http.get("/health/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError("not ready")
