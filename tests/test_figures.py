"""If this breaks: a reported metric belongs to another model, other data or another step than stated: in `metrics.json`, in the
model card, in the last lines of a fit, or in the output of `validate` and `test`.
"""

import csv
import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file
from test_cli import call, place, refused, write  # noqa: F401

TRAIN = [{"prompt": f"say {number}", "completion": f"one two {number}"} for number in range(6)]
OTHER = [{"prompt": f"name {number}", "completion": f"Tom {number} and the kite"} for number in range(7)]


@pytest.fixture
def run(place):  # noqa: F811
    """A run whose best checkpoint is not its last: here the best is the one with the largest loss."""
    write("train.jsonl", *TRAIN)
    write("held.jsonl", *OTHER)
    write("other.jsonl", *OTHER[::-1], {"prompt": "who?", "completion": "me"})
    config = yaml.safe_load(Path("ok.yaml").read_text())
    config["data"] |= {"sources": [{"path": "train.jsonl"}], "val_sources": [{"path": "held.jsonl"}],
                       "test_sources": [{"path": "held.jsonl"}], "packing": "none"}
    config["model"] |= {"lr": 0.01, "schedule": "constant", "warmup": 0}
    config["trainer"] |= {"max_steps": 6, "val_check_interval": 2, "callbacks": [
        {"class_path": "lit_llm.training.run.checkpoint.StepCheckpoint", "init_args": {"mode": "max"}}]}
    Path("own.yaml").write_text(yaml.safe_dump(config))
    code, out, err = call("fit", "--config", "own.yaml")
    assert code == 0, err
    return Path("run"), out


def manifest(run, pointer):
    return json.loads((run / "checkpoints" / (run / "checkpoints" / pointer).read_text().strip() / "manifest.json").read_text())


def test_the_figures_are_those_of_the_exported_checkpoint(run):
    """Printed, in the model card and in metrics.json; those of the last checkpoint are printed as well."""
    run, out = run
    best, last = manifest(run, "BEST"), manifest(run, "LATEST")
    assert best["step"] < last["step"] == 6
    assert best["figures"]["val/perplexity"] > last["figures"]["val/perplexity"] + 1
    assert best["figures"]["val/nll"] == best["score"]
    measured = call("validate", "--config", "run/config.yaml", "--ckpt_path", "best", "--trainer.default_root_dir", "run")[1]
    assert float(dict(line.split() for line in measured.splitlines())["val/perplexity"]) == pytest.approx(
        best["figures"]["val/perplexity"], rel=1e-5)
    after = re.search(r"([\d.]+) before, ([\d.]+) after .*step (\d+), which is exported", out)
    assert float(after[2]) == pytest.approx(best["figures"]["val/perplexity"], abs=1e-3)
    assert int(after[3]) == best["step"]
    assert f"step 6, has perplexity {last['figures']['val/perplexity']:.3f}" in out
    card = (run / "export" / "README.md").read_text()
    table = dict(re.findall(r"^\| (\S+) \| (\S+)(?: \(95 % interval \S+ to \S+\))? \|$", card, re.MULTILINE))
    assert float(table["val/perplexity"]) == pytest.approx(best["figures"]["val/perplexity"], rel=1e-5)
    assert float(table["before/val/perplexity"]) == pytest.approx(float(after[1]), abs=1e-3)
    assert f"step {best['step']}." in card
    assert str(Path.cwd()) not in card                      # paths of this machine are not published
    code, _, err = call("export", "--run", "run", "--checkpoint", "last")
    assert code == 0, err
    assert f"vllm serve {run.absolute() / 'export'}" in err      # not run here: vLLM is not a dependency
    table = dict(re.findall(r"^\| (\S+) \| (\S+)(?: \(95 % interval \S+ to \S+\))? \|$", (run / "export" / "README.md").read_text(), re.MULTILINE))
    assert float(table["val/perplexity"]) == pytest.approx(last["figures"]["val/perplexity"], rel=1e-5)


def test_a_later_measurement_keeps_the_record_of_the_run(run):
    run, _ = run
    best = manifest(run, "BEST")
    rows, record = (run / "metrics.csv").read_text(), json.loads((run / "metrics.json").read_text())
    assert (record["checkpoint"], record["step"]) == (f"step_{best['step']}", best["step"])
    assert (record["last/step"], record["val/nll"]) == (6, best["score"])
    # another checkpoint of the run, on the run's data: it is named, and metrics before training are unchanged
    assert call("validate", "--config", "run/config.yaml", "--ckpt_path", "last")[0] == 0
    last = json.loads((run / "metrics.json").read_text())
    assert (last["step"], last["val/nll"]) == (6, pytest.approx(manifest(run, "LATEST")["score"], rel=1e-6))
    assert {key: value for key, value in last.items() if key.startswith("before/")} == {
        key: value for key, value in record.items() if key.startswith("before/")} != {}
    # its test metrics are stored beside its validation metrics
    assert call("test", "--config", "run/config.yaml", "--ckpt_path", "last")[0] == 0
    both = json.loads((run / "metrics.json").read_text())
    assert both["val/nll"] == last["val/nll"] == pytest.approx(both["test/nll"], rel=1e-6)
    # other data, a part of the data, and the base itself: recorded separately
    metrics_before = (run / "metrics.json").read_text()
    for words, says in ((["--ckpt_path", "best", "--data.val_sources", "[{path: other.jsonl}]"], "data.sources[0] was 7 sequences"),
                        (["--ckpt_path", "best", "--data.seq_len", 32], "data.seq_len was 64 and is 32"),
                        (["--ckpt_path", "best", "--trainer.limit_val_batches", 1], "trainer.limit_val_batches"),
                        ([], "not a checkpoint of the run")):
        lines = len((run / "evaluations.jsonl").read_text().splitlines())
        code, out, err = call("validate", "--config", "run/config.yaml", *words)
        assert code == 0, err
        line = json.loads((run / "evaluations.jsonl").read_text().splitlines()[lines])
        assert f"val/nll              {line['val/nll']:.9g}" in out
        assert line["checkpoint"] == (f"step_{best['step']}" if words else None)
        assert (says in line["other_data"]) if words else not line["other_data"]
    assert (run / "metrics.json").read_text() == metrics_before
    assert (run / "metrics.csv").read_text() == rows


def test_a_checkpoint_is_not_measured_as_part_of_another_model(run, tiny_model):
    """Another base of the same shape gave figures without a word, one of another shape a traceback."""
    folder, _ = run
    base = Path(yaml.safe_load((folder / "config.yaml").read_text())["model"]["base"])
    shutil.copytree(base, "same")
    shutil.copytree(base, "near")
    weights = load_file("near/model.safetensors")
    save_file({name: weight * 1.5 for name, weight in weights.items()}, "near/model.safetensors", metadata={"format": "pt"})
    shutil.copytree(base, "worded")
    with open("worded/chat_template.jinja", "a") as stream:
        stream.write("{{ '' }}")
    command = ["validate", "--config", "run/config.yaml", "--ckpt_path", "best"]
    refused(*command, "--model.base", "near", says=["another base", str(base), "near"])
    refused(*command, "--model.base", tiny_model("qwen3"), says="another base")
    refused(*command, "--data.tokenizer", "worded", says="another template")
    refused(*command, "--model.lora", "null", says="another peft")
    refused(*command, "--model.lora.r", 3, says="another peft (r 2, not 3)")
    code, _, err = call(*command, "--model.base", "same")
    assert code == 0, err


def test_the_base_is_known_by_its_content(run, monkeypatch):
    """Moved, the same bytes are found or can be named; other bytes are refused, by export and by chat."""
    folder, _ = run
    config = yaml.safe_load((folder / "config.yaml").read_text())
    base = config["model"]["base"]
    adapter = next((folder / "checkpoints").glob("step_*/adapter"))
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == base
    shutil.copytree(base, "models/tiny")
    shutil.copytree(base, "near")
    weights = load_file("near/model.safetensors")
    save_file({name: weight * 1.5 for name, weight in weights.items()}, "near/model.safetensors", metadata={"format": "pt"})
    wanted = load_file(folder / "export" / "model.safetensors")
    # the run's base folder was deleted; a copy of it is beside the run
    for file in folder.glob("checkpoints/step_*/manifest.json"):
        facts = json.loads(file.read_text()) | {"base": "/gone/models/tiny"}
        file.write_text(json.dumps(facts))
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    for words in ([], ["--base", "../models/tiny"], ["--base", base]):
        code, _, err = call("export", "--run", "../run", "--out", "new", *words)
        assert code == 0, err
        exported = load_file("new/model.safetensors")
        assert all((exported[name] == weight).all() for name, weight in wanted.items())
    adapter = Path("..") / adapter
    refused("export", "--run", "../run", "--base", "../near", says=["not the base", "../near"])
    refused("chat", "--model", "../near", "--adapter", adapter, "--prompt", "say 1", says="trained on another base")
    code, out, err = call("chat", "--model", "../models/tiny", "--adapter", adapter, "--prompt", "say 1", "--max_tokens", 4, "--temperature", 0)
    assert code == 0, err
    (adapter / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text().replace(base, "/gone/models/tiny"))
    manifest = json.loads((adapter.parent / "manifest.json").read_text())
    content = (adapter / "adapter_config.json").read_bytes()
    manifest["files"]["adapter/adapter_config.json"] = {
        "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (adapter.parent / "manifest.json").write_text(json.dumps(manifest))
    again = call("chat", "--model", adapter, "--prompt", "say 1", "--max_tokens", 4, "--temperature", 0)
    assert again[:2] == (0, out), again[2]


def test_a_run_resumes_with_any_spelling_of_its_paths(place, monkeypatch):  # noqa: F811
    """By absolute paths, from another folder, with moved copies; a real difference is reported with the key's name."""
    code, _, err = call("fit", "--config", "ok.yaml")
    assert code == 0, err
    base = yaml.safe_load(Path("ok.yaml").read_text())["model"]["base"]
    Path("elsewhere").mkdir()
    shutil.copytree(base, "elsewhere/copied")
    shutil.copy("good.jsonl", "elsewhere/renamed.jsonl")
    monkeypatch.chdir("elsewhere")
    words = ["fit", "--config", "../ok.yaml", "--model.base", "copied", "--data.sources", "[{path: renamed.jsonl}]",
             "--data.val_sources", "[{path: ../good.jsonl}]", "--trainer.default_root_dir", "../run", "--ckpt_path", "last"]
    for changed, says in ((["--data.seq_len", 32], "data.seq_len was 64 and is 32"),
                          (["--data.packing", "none"], "data.packing was best_fit and is none"),
                          (["--data.sources", "[{path: other.jsonl}]"], "data.sources[0] was 8 sequences (good.jsonl) and is 2 (other.jsonl)"),
                          (["--data.seed", 5], "seed was 0 and is 5")):
        write("other.jsonl", {"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"})
        message = refused(*words, *changed, "--trainer.max_steps", 3, says=says)
        assert not re.search(r"\b[0-9a-f]{12,}\b", message)
    code, _, err = call(*words, "--trainer.max_steps", 3)
    assert code == 0, err
    code, _, err = call("fit", "--config", Path("../run/config.yaml").absolute(), "--trainer.max_steps", 4, "--ckpt_path", "last")
    assert code == 0, err


def test_a_model_in_the_hub_s_cache_is_its_local_snapshot(tmp_path, monkeypatch, tiny_model):
    """The layout of the hub's client, filled by hand: there is no network here."""
    import huggingface_hub.constants

    from lit_llm.system import origin

    snapshot = tmp_path / "models--owner--name" / "snapshots" / "abc"
    shutil.copytree(tiny_model("llama"), snapshot)
    (tmp_path / "models--owner--name" / "refs").mkdir()
    (tmp_path / "models--owner--name" / "refs" / "main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    import huggingface_hub.file_download as client

    if hasattr(client, "constants"):
        monkeypatch.setattr(client.constants, "HF_HUB_CACHE", str(tmp_path))
    assert origin.content_hash("owner/name") == origin.content_hash(tiny_model("llama")) is not None
    assert origin.content_hash("owner/nothing") is None
    assert origin.recorded("owner/name") == "owner/name"


@pytest.mark.parametrize(("steps", "every", "logged"), [(3, 10, [0, 1, 2, 3]), (5, 2, [0, 2, 4, 5])])
def test_every_step_of_a_short_run_is_in_its_record(steps, every, logged, place):  # noqa: F811
    """Also the last step of any run and what was measured before the first; a step has one number everywhere."""
    words = ["--trainer.max_steps", steps, "--trainer.log_every_n_steps", every, "--trainer.check_val_every_n_epoch", 9]
    code, out, err = call("fit", "--config", "ok.yaml", *words)
    assert code == 0, err
    with open("run/metrics.csv", newline="") as handle:
        rows = {int(row["step"]): row for row in csv.DictReader(handle)}
    assert list(rows) == logged
    assert all(float(rows[step]["train/loss"]) > 0 for step in logged[1:])
    record = json.loads(Path("run/metrics.json").read_text())
    assert record["step"] == steps
    assert float(rows[0]["val/nll"]) == pytest.approx(record["before/val/nll"])
    assert float(rows[steps]["val/nll"]) == pytest.approx(record["val/nll"])
    assert f"training loss at step {steps}: {float(rows[steps]['train/loss']):.3f}" in out
    assert Path(f"run/checkpoints/step_{steps}").is_dir()


def test_figures_of_other_validation_data_are_not_compared(run):
    """A run resumes with other validation data: the best checkpoint on the old data is not the best on the new."""
    folder, _ = run
    best = manifest(folder, "BEST")["step"]
    code, out, err = call("fit", "--config", "own.yaml", "--data.val_sources", "[{path: other.jsonl}]", "--ckpt_path", "last",
                          "--trainer.max_steps", 8)
    assert code == 0, err
    now = manifest(folder, "BEST")
    assert now["step"] == 8 > best
    assert "before," not in out
    record = json.loads((folder / "metrics.json").read_text())
    assert record["step"] == 8
    assert not [key for key in record if key.startswith("before/")]
