"""If this breaks: a typing mistake causes a long traceback instead of advice or leaves an incomplete run folder, a config runs
foreign code, or `config.yaml` contains a secret.

Most commands run in this process, through the `main` that `python -m lit_llm` calls; a few run in a process of their own.
"""

import contextlib
import csv
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from lit_llm.__main__ import HEAP
from lit_llm.cli.main import main
from lit_llm.report.rows import MEASURED

ROOT = Path(__file__).resolve().parents[1]
RANDOM = ["--model.base", "null", "--model.lora", "null", "--data.tokenizer", "sample:base", "--model.init"]
MANY = [{"prompt": f"say {number}", "completion": "one two three four five six seven " * 2} for number in range(6_000)]
ROWS = [{"prompt": f"say {number}", "completion": f"one two {number}"} for number in range(8)]


@pytest.fixture
def place(tmp_path, tiny_model, monkeypatch):
    """An empty folder with ok.yaml, a config that runs, and its data."""
    monkeypatch.chdir(tmp_path)
    write("good.jsonl", *ROWS)
    config = {
        "model": {"base": tiny_model("llama"), "lora": {"r": 2}},
        "data": {"sources": [{"path": "good.jsonl"}], "val_sources": [{"path": "good.jsonl"}], "seq_len": 64,
                 "batch_size": 2},
        "trainer": {"max_steps": 2, "accelerator": "cpu", "devices": 1, "default_root_dir": "run",
                    "log_every_n_steps": 1}}
    (tmp_path / "ok.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def write(name, *records):
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    Path(name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def call(*words):
    """Exit code, stdout, stderr of a command run in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(list(map(str, words)))
        except SystemExit as stop:
            code = stop.code or 0
    return code, out.getvalue(), err.getvalue()


def refused(*words, says=()):
    """Assert that the command ends as after a user's mistake; returns its message."""
    before = {path for path in Path(".").rglob("*") if "cache" not in path.parts}
    code, out, err = call(*words)
    assert code == 2, err
    message = err[err.index("error: "):]
    assert 1 <= len(message.splitlines()) <= 6, err        # sources that were read before it are listed above, one per line
    assert "Traceback" not in err
    assert not out.strip()
    assert {path for path in Path(".").rglob("*") if "cache" not in path.parts} == before, "files were left behind"
    for word in [says] if isinstance(says, str) else says:
        assert word in message
    return message


def address_space(room):
    """Bytes that this process has mapped, and room for more."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + room


def source(name, **more):
    return "--data.sources=" + json.dumps([{"path": name} | more])


def test_each_mistake_is_reported_by_a_separate_process(place):
    """As in a notebook, after a run under DeepSpeed."""
    from torch import distributed

    if fresh := not distributed.is_initialized():       # an earlier test's run may have left its own
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        for _ in range(2):
            refused("fit", "--config", "nope.yaml", says="nope.yaml")
    finally:
        if fresh:
            distributed.destroy_process_group()


def test_the_name_of_a_config_that_is_nearly_right(place):
    Path("mine.yaml").write_text("{}")
    refused("fit", "--config", "mien.yaml", says=["no file", "Did you mean 'mine.yaml'?"])


def test_the_installed_command_is_the_module(tmp_path):
    """As pip writes it: the same answers, also where the process begins again for its heap."""
    script = tmp_path / "lit-llm"
    script.write_text("import sys\nfrom lit_llm.__main__ import run\nsys.exit(run())\n")
    for words, code in ((["--help"], 0), (["fit", "--config", "nope.yaml"], 2)):
        results = [subprocess.run([sys.executable, *command, *words], cwd=tmp_path, capture_output=True, text=True,
                                  env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=120)
                   for command in ([str(script)], ["-m", "lit_llm"])]
        assert [result.returncode for result in results] == [code, code]
        assert (results[0].stdout, results[0].stderr) == (results[1].stdout, results[1].stderr)


# ---- what was typed --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("words", "says"), [
    (["--model.lrr", "1"], "Did you mean 'model.lr'?"),
    (["--learning_rate", "1"], "Did you mean 'model.lr'?"),
    (["--trainer.max_step=3"], "Did you mean 'trainer.max_steps'?"),
    (["--model.lora.rank", "3"], "Did you mean 'model.lora.r'?"),
    ([source("good.jsonl", wieght=2)], "Did you mean 'weight'?"),
    (["--trainer.strategy", "deepsped_stage_1"], "Did you mean 'deepspeed_stage_1'?"),
    (["--trainer.strategy", "deepspeed_stage_9"], "Did you mean 'deepspeed_stage_"),
    (["--trainer.precision", "bf61"], "Did you mean 'bf16'?"),
    (["--trainer.accelerator", "gpu"], "gpu"),
    (["--data.packing", "bestfit"], "Did you mean 'best_fit'?"),
    (["--data.seq_len", "long"], ["data.seq_len", "long"]),
    (["--data.val_fraction", "2"], "data.val_fraction"),
    (["--model.lr", "0"], "model.lr"), (["--model.learning_rat", "1"], "Did you mean 'model.lr'?"),
    (["--model.warmup", "-1"], "model.warmup"),
    (["--model.init", "{model_type: llama}"], ["model.base", "model.init", "one of the two"]),
    (["--model.base", "null", "--data.tokenizer", "sample:base"], ["model.base", "model.init"]),
    (["--model.base", "nobody/nothing"], ["nobody/nothing", "HF_HOME", "HF_ENDPOINT", "local folder"]),
    (["--model.base", "/no/such/folder"], "/no/such/folder"),
    (["--data.chat_template", "nope"], ["data.chat_template", "nope"]),
    (["--data.seq_len", "4096"], ["4096", "--data.seq_len 256"]),
    (["--model.lora.target_modules", "[c_attn]"], ["c_attn", "q_proj"]),
    (["--ckpt_path", "last"], "run has no last checkpoint"),
    (["--trainer.default_root_dir", "good.jsonl"], "good.jsonl"),
    (["--data.sources", "[{path:good.jsonl}]"], "a space after the colon: path: good.jsonl"),
    (["--data.sources", "good.jsonl"], ["data.sources", "[{path: FILE}]"]),
    (["--data.sources", "5"], ["data.sources", "[{path: FILE}]"]),
    ([source("good.jsonl", weight="heavy")], "data.sources.weight: 'heavy' is not a number"),
    (["--model.lora.alpha", "x"], "model.lora.alpha: 'x' is not a number"),
    (["--model.lora", "4"], ["model.lora: '4'", "LoRA", "null"]),
    (["--model.neftune_alpha", "lots"], "model.neftune_alpha: 'lots' is not one of a number, null"),
    (["--model.gradient_checkpointing", "ful"], ["selective", "auto", "true or false"]),
    (["--model.quantize", "nf5"], ["nf4, fp4, null", "Did you mean 'nf4'?"]),
    (["--trainer.max_epochs", "1.5"], "trainer.max_epochs: '1.5' is not one of a whole number, null"),
    (["other.yaml"], "--config other.yaml"),
    (["--model.betas", "[0.9, 1.5]"], "model.betas"),
    (["--model.eps", "-1"], "model.eps"),
    (["--model.weight_decay", "-0.1"], "model.weight_decay"),
    (["--model.min_lr_share", "-1"], "model.min_lr_share"),
    (["--model.neftune_alpha", "-5"], "model.neftune_alpha"),
    ([*RANDOM, "{model_type: llama, hidden_size: 32, num_attention_heads: 4, num_key_value_heads: 3}"],
     ["model.init", "3 key-value heads"]),
    (["--trainer.max_steps", "0"], "trainer.max_steps"),
    (["--trainer.max_epochs", "0"], "trainer.max_epochs"),
    (["--trainer.limit_train_batches", "0"], "trainer.limit_train_batches"),
    (["--trainer.accumulate_grad_batches", "0"], "trainer.accumulate_grad_batches"),
    (["--trainer.gradient_clip_val", "-1"], "trainer.gradient_clip_val"),
    (["--trainer.gradient_clip_algorithm", "value"], ["trainer.gradient_clip_algorithm", "norm"]),
    (["--trainer.check_val_every_n_epoch", "0"], "trainer.check_val_every_n_epoch"),
    (["--trainer.val_check_interval", "0"], "trainer.val_check_interval"),
    (["--trainer.val_check_interval", "100000"], ["trainer", "val_check_interval", "100000"]),
    (["--trainer.accelerator", "tpu"], ["trainer", "torch_xla"]),
    (["--seed_everything", "-1"], "seed_everything"),
    (["--trainer.max_skipped_steps", "0"], "trainer.max_skipped_steps"),
    (["--trainer.overfit_batches", "1"], "trainer.overfit_batches"),
    (["--trainer.reload_dataloaders_every_n_epochs", "1"], "trainer.reload_dataloaders_every_n_epochs"),
    (["--trainer.limit_train_batches", "1", "--trainer.accumulate_grad_batches", "2"], "set it to 2"),
])
def test_a_wrong_option(words, says, place):
    refused("fit", "--config", "ok.yaml", *words, says=says)


@pytest.mark.parametrize(("callback", "says"), [
    ({"class_path": "lightning.pytorch.callbacks.EarlyStoping"}, "Did you mean 'EarlyStopping'?"),
    ({"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitr": "val/nll"}}, "'monitor'"),
    ({"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "val_nll"}}, "'val/nll'"),
    ({"class_path": "lightning.pytorch.callbacks.EarlyStopping"}, "monitor"),
    ({"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "nll"}}, "'val/nll'"),
    ({"class_path": "lit_llm.training.run.checkpoint.StepCheckpoint", "init_args": {"monitor": "perplexity"}},
     "'val/perplexity'"),
    ({"class_path": "lightning.pytorch.callbacks.EMAWeightAveraging"}, "averaged weights"),
    ({"class_path": "lightning.pytorch.callbacks.GradientAccumulationScheduler", "init_args": {"scheduling": {"0": 2}}},
     "trainer.accumulate_grad_batches"),
    ({"class_path": "lightning.pytorch.callbacks.OnExceptionCheckpoint", "init_args": {"dirpath": "x"}}, "leave it out"),
])
def test_a_wrong_callback(callback, says, place):
    refused("fit", "--config", "ok.yaml", "--trainer.callbacks", json.dumps([callback]), says=says)


def test_the_current_directory_is_not_moved_aside(place):
    (place / "config.yaml").write_text("mine: true\n")
    refused("fit", "--config", "ok.yaml", "--trainer.default_root_dir", ".", says="trainer.default_root_dir")
    assert (place / "config.yaml").read_text() == "mine: true\n"


def test_lightnings_own_checkpoints_do_not_replace_ours(place):
    other = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"dirpath": "theirs"}}
    code, _, err = call("fit", "--config", "ok.yaml", "--trainer.callbacks", json.dumps([other]))
    assert code == 0, err
    assert (place / "run" / "checkpoints" / "step_2" / "manifest.json").is_file()
    assert list((place / "theirs").iterdir())


def test_early_stopping_without_validation(place):
    stop = {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "val/nll"}}
    refused("fit", "--config", "ok.yaml", "--data.val_sources", "null", "--trainer.callbacks", json.dumps([stop]),
            says="data.val_sources")


def test_nothing_to_validate_on(place):
    refused("validate", "--config", "ok.yaml", "--data.val_sources", "null", says="data.val_sources")


@pytest.mark.parametrize(("text", "says"), [
    ("model: {base: [\n  - x\n", "other.yaml:2: not YAML"),
    ("model:\n\tbase: x\n", "other.yaml:2: not YAML"),
    ("model:\n  lr: 1e-3\ndata:\n  seq_len: 64\nmodel:\n  warmup: 0\n", "other.yaml:5: 'model' also occurs in line 1"),
    ("data: {sources: [{path: a, path: b}]}\n", "'path' also occurs"),
    ("- a\n- b\n", "other.yaml"),
    ("", "other.yaml"),
    ("modle: {lr: 1}\n", "Did you mean 'model.lr'?"),
    ("model: {base:there}\n", "a space after the colon: base: there"),
    ("model: {lora: {rank: 1}}\n", "Did you mean 'model.lora.r'?"),
])
def test_a_wrong_config_file(text, says, place):
    Path("other.yaml").write_text(text)
    refused("fit", "--config", "ok.yaml", "--config", "other.yaml", says=says)


def test_float16_on_a_cpu_is_reported_as_bfloat16(place, caplog):
    """Lightning would train in another precision than configured, and its warning is hidden."""
    code, _, err = call("fit", "--config", "ok.yaml", "--trainer.precision", "16-mixed")
    assert code == 0, err
    assert "using bf16-mixed instead" in caplog.text
    caplog.clear()
    code, _, err = call("validate", "--config", "ok.yaml", "--trainer.precision", "bf16-mixed")
    assert code == 0, err
    assert "instead" not in caplog.text


def test_no_config_file(place):
    refused("fit", "--config", "nope.yaml", says="nope.yaml")
    refused("fit", "--model.base", "sample:base", says="data.sources")


def test_a_wrong_option_of_a_verb(place):
    refused("plan", "--config", "ok.yaml", "--memory", "0", says="memory")
    (place / "folder").mkdir()
    code, _, err = call("inspect", "--config", "ok.yaml", "--html", "folder")
    assert code == 2
    assert "folder: Is a directory" in err
    assert not list(place.glob("*.partial"))


def test_no_verb(place):
    refused("fti", "--config", "ok.yaml", says="'fit'")
    refused(says="fit")
    refused("export", "--run", "nope", says="nope")


# ---- what was read ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("records", "says"), [
    ([ROWS[0], ROWS[1], '{"prompt": "x", "comp'], "bad.jsonl:3"),
    ([ROWS[0], {"messages": [{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}]}],
     ["bad.jsonl:2", "'bot'", "assistant"]),
    ([{"messages": [{"role": "user", "content": "a"}]}], ["bad.jsonl:1", "no assistant message"]),
    ([{"title": "a", "body": "b"}], ["bad.jsonl:1", "title, body", "columns"]),
])
def test_bad_data(records, says, place):
    write("bad.jsonl", *records)
    refused("fit", "--config", "ok.yaml", source("bad.jsonl"), says=says)


def test_missing_data(place):
    refused("fit", "--config", "ok.yaml", source("goood.jsonl"), says=["goood.jsonl", "Did you mean 'good.jsonl'?"])
    refused("fit", "--config", "ok.yaml", source("owner/name"), says=["owner/name", "HF_HOME"])


# ---- memory ----------------------------------------------------------------------------------------------------------

def test_an_earlier_run_keeps_its_name_when_the_next_one_fails(place):
    """Memory really runs out in the first step: the earlier run is restored, and nothing else remains."""
    earlier = Path("run")
    earlier.mkdir()
    (earlier / "config.yaml").write_text("{}")
    write("many.jsonl", *MANY)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (address_space(2**28), limits[1]))
    try:
        refused("fit", "--config", "ok.yaml", source("many.jsonl"), "--data.batch_size", 100_000,
                says=["memory", "data.batch_size"])
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert (earlier / "config.yaml").read_text() == "{}"


@pytest.mark.parametrize("verb", ["fit", "validate"])
def test_an_earlier_run_is_whole_when_the_next_one_fails_before_it_begins(verb, place):
    files = [Path("run", name) for name in ("config.yaml", "metrics.csv", "data.json", "tokenizer/tokenizer.json",
                                            "checkpoints/step_2/state")]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("earlier")
    refused(verb, "--config", "ok.yaml", "--model.base", "/no/such/folder", "--data.tokenizer", "sample:base",
            says="model.base")
    assert [file.read_text() for file in files] == ["earlier"] * len(files)


def test_the_command_itself_says_so_too(place):
    """In a process of its own: exit code 2 and six lines, when the memory is gone and when a key is wrong."""
    command = [sys.executable, "-m", "lit_llm", "fit", "--config", "ok.yaml"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    write("many.jsonl", *MANY)
    room = 2 * 2**30                                # a run with a few records maps 1.2 GiB with torch's CPU build
    for more, limit, says in (([source("many.jsonl"), "--data.batch_size", "30000000"], room, "not enough memory"),
                              (["--model.lrr", "1"], None, "Did you mean 'model.lr'?")):
        cap = limit and (lambda limit=limit: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)))
        done = subprocess.run(command + more, capture_output=True, text=True, env=env, timeout=200, preexec_fn=cap)
        assert done.returncode == 2, done.stderr
        assert says in done.stderr
        assert "Traceback" not in done.stderr
        assert len(done.stderr[done.stderr.index("error: "):].splitlines()) <= 6, done.stderr
        assert not Path("run").exists()


def test_a_typed_source_takes_no_key_of_the_file_s(place):
    """As many sources typed as a file names: weight and split of the file's would be used for the typed ones."""
    config = yaml.safe_load(Path("ok.yaml").read_text())
    config["data"]["sources"] = [{"path": "other.jsonl", "columns": {"prompt": "q"}, "clean": "strip", "weight": 3}]
    Path("ok.yaml").write_text(yaml.safe_dump(config))
    for typed in ([source("good.jsonl")], ["--data.sources", '[{path: good.jsonl}]']):
        code, _, err = call("fit", "--config", "ok.yaml", *typed)
        assert code == 0, err
        (stored,) = yaml.safe_load(Path("run/config.yaml").read_text())["data"]["sources"]
        assert (Path(stored["path"]).name, stored["columns"], stored["clean"], stored["weight"]) == ("good.jsonl", {}, "none", 1.0)


# ---- foreign code and secrets ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("key", ["trainer.callbacks", "trainer.logger", "trainer.strategy"])
@pytest.mark.parametrize("name", ["evilmod.Cb", "os.system"])
def test_a_config_imports_nothing_foreign(key, name, place, monkeypatch):
    Path("evilmod.py").write_text("open('EVIL', 'w')\nclass Cb:\n    def __init__(self, command=None): pass\n")
    monkeypatch.syspath_prepend(str(place))
    spec = {"class_path": name, "init_args": {"command": "touch EVIL"}}
    value = [spec] if key.endswith("callbacks") else spec
    refused("fit", "--config", "ok.yaml", f"--{key}", json.dumps(value), says=name)
    assert not Path("EVIL").exists()
    assert "evilmod" not in sys.modules


def test_a_run_without_account_and_without_secrets(place):
    """wandb offline beside metrics.csv; the API key in the config is in no file of the run."""
    secret = "0123456789abcdef0123456789abcdef01234567"
    logger = {"class_path": "lightning.pytorch.loggers.WandbLogger",
              "init_args": {"offline": True, "project": "x", "save_dir": "logs",
                            "config": {"api_key": secret}, "notes": "mine is hf_" + secret}}
    Path("wandb.yaml").write_text(yaml.safe_dump({"trainer": {"logger": logger}}))
    code, _, err = call("fit", "--config", "ok.yaml", "--config", "wandb.yaml")
    assert code == 0, err
    (log,) = Path("logs").rglob("*.wandb")
    assert log.stat().st_size > 0
    with open("run/metrics.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert [int(row["step"]) for row in rows] == [0, 1, 2]
    assert [float(row["train/loss"] or 0) > 0 for row in rows] == [False, True, True]
    files = [path for path in Path("run").rglob("*") if path.is_file()]
    assert not [path for path in files if secret.encode() in path.read_bytes()]
    assert "WandbLogger" in Path("run/config.yaml").read_text()


# ---- configs ---------------------------------------------------------------------------------------------------------

def test_configs_merge_and_the_later_wins(place):
    """Overlays change only their keys; typed options take precedence; config.yaml has the actual settings and can be run."""
    Path("one.yaml").write_text("model: {lr: 0.25, schedule: linear}\n")
    Path("two.yaml").write_text("model: {lr: 0.125}\ndata: {batch_size: 3}\n")
    first = call("fit", "--config", "ok.yaml", "--config", "one.yaml", "--config", "two.yaml", "--trainer.max_steps", 3)
    assert first[0] == 0, first[2]
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    assert (config["model"]["lr"], config["model"]["schedule"], config["model"]["lora"]["r"]) == (0.125, "linear", 2)
    assert (config["data"]["batch_size"], config["data"]["seq_len"], config["trainer"]["max_steps"]) == (3, 64, 3)
    again = call("fit", "--config", "run/config.yaml", "--trainer.default_root_dir", "again")
    assert again[0] == 0, again[2]
    same_rows = [[{key: row[key] for key in row if key not in MEASURED} for row in csv.DictReader(text.splitlines())]
                 for text in (Path(run, "metrics.csv").read_text() for run in ("run", "again"))]
    assert len(same_rows[0]) == 4
    assert same_rows[0] == same_rows[1]
    same_bytes = [next(Path(run).glob("checkpoints/step_3/adapter/*.safetensors")).read_bytes()
                  for run in ("run", "again")]
    assert same_bytes[0] == same_bytes[1]


def test_config_before_the_verb(place):
    code, out, err = call("--config", "ok.yaml", "validate", "--data.batch_size", 1)
    assert code == 0, err
    assert "val/perplexity" in out


def test_what_validate_prints_after_fit(place):
    """The last lines of fit are commands; the one that validates gives the figure that fit logged."""
    code, out, err = call("fit", "--config", "ok.yaml")
    assert code == 0, err
    (command,) = [line.split() for line in out.splitlines() if " validate " in line]
    best = json.loads(Path("run/checkpoints", Path("run/checkpoints/BEST").read_text().strip(),
                           "manifest.json").read_text())["score"]
    code, out, err = call(*command[command.index("validate"):])
    assert code == 0, err
    printed = dict(line.split() for line in out.splitlines())
    assert float(printed["val/nll"]) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize(("method", "keys", "said"), [
    ("PromptTuningConfig", {"num_virtual_tokens": 2}, "the adapter alone, because its 2 virtual tokens cannot be merged"),
    ("AdaptionPromptConfig", {"adapter_len": 2, "adapter_layers": 1}, "not exported")])
def test_a_run_whose_adapters_cannot_be_merged_ends_well(place, method, keys, said):
    spec = {"class_path": method, "init_args": keys}
    code, out, err = call("fit", "--config", "ok.yaml", "--model.lora", "null", "--model.peft", json.dumps(spec))
    assert code == 0, err
    assert said in out
    assert "validation perplexity" in out
    assert (place / "run" / "checkpoints" / "step_2" / "adapter" / "adapter_model.safetensors").is_file()
    refused("export", "--run", "run", says="cannot be merged")


def test_a_run_tells_what_it_drew(place):
    """In the run folder and at the end; the announced number of steps is right; a resumed run continues counting."""
    write("more.jsonl", *({"text": f"a story {number}"} for number in range(20)))
    words = ["fit", "--config", "ok.yaml", "--data.sources", "[{path: good.jsonl}, {path: more.jsonl, weight: 0.25}]",
             "--data.packing", "none", "--data.batch_size", 1, "--trainer.accumulate_grad_batches", 3]
    code, out, err = call(*words, "--trainer.max_steps", -1, "--trainer.max_epochs", 2, "--trainer.default_root_dir", "whole")
    assert code == 0, err
    assert "steps: 5 per epoch, of 3 packed sequences each (the last one 1); 10 in the run" in err
    whole = json.loads(Path("whole/data.json").read_text())
    assert json.loads(Path("whole/metrics.json").read_text())["step"] == 10
    assert {name: counts["sequences"] for name, counts in whole["ledger"].items()} == {"good.jsonl": 16, "more.jsonl": 10}
    assert [source["read"] for source in whole["sources"]] == [8, 20]
    assert re.search(r"drawn in training +sequences +tokens +supervised +share\n +good.jsonl +16 ", out)
    assert call(*words, "--trainer.max_steps", 4)[0] == 0
    ledger = json.loads(Path("run/data.json").read_text())["ledger"]
    assert sum(counts["sequences"] for counts in ledger.values()) == 12
    assert call(*words, "--trainer.max_steps", -1, "--trainer.max_epochs", 2, "--ckpt_path", "last")[0] == 0
    assert json.loads(Path("run/data.json").read_text())["ledger"] == whole["ledger"]


def test_inspect_shows_the_rows_and_writes_a_page(place):
    code, out, err = call("inspect", "--config", "ok.yaml", "--rows", 1, "--html", "page.html")
    assert code == 0, err
    assert re.search(r"⟦one two \d<", out)
    assert "good.jsonl\n  8 records, 8 kept" in out
    assert "good.jsonl" not in err                      # printed once
    assert Path("page.html").read_text().startswith("<!doctype html>")
    assert not Path("run").exists()


# ---- help ------------------------------------------------------------------------------------------------------------

def test_help_names_every_key_with_its_meaning(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--help", "all"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for key, words in {"--model.lr ": "Peak learning rate", "--model.lora ": "Train low-rank adapters",
                       "--data.seq_len ": "Tokens per packed sequence", "--data.packing ": "isolated in attention",
                       "--trainer.strategy ": "deepspeed_stage_1", "--trainer.max_steps ": "",
                       "--ckpt_path ": "or a folder like"}.items():
        assert key in text
        assert words in text


@pytest.mark.parametrize(("key", "words"), [("model.lora", "Rank of the two matrices"),
                                            ("data.sources", "One corpus"), ("data.sources", "hub dataset")])
def test_help_of_a_nested_key(key, words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", f"--{key}.help"])
    assert stop.value.code == 0
    assert words in " ".join(capsys.readouterr().out.split())


def test_help_lists_the_verbs(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for verb in ("fit", "validate", "test", "prepare", "inspect", "plan", "verify-resume", "selftest", "export", "chat",
                 "serve"):
        assert f"\n    {verb} " in text


@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in getattr(os, "confstr_names", ()) or Path("/dev/nvidiactl").exists(),
                    reason="glibc's, on CPUs")
@pytest.mark.parametrize(("verb", "settings"), [("fit", ["", HEAP]), ("validate", ["", HEAP]), ("test", ["", HEAP]), ("inspect", [""])])
def test_a_run_on_cpus_begins_again_without_the_caches_of_its_heap(tmp_path, verb, settings):
    """With them a validation used 105 MB instead of 42."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os\nwith open('starts', 'a') as file: print(os.environ.get('GLIBC_TUNABLES', ''), file=file)")
    env = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    subprocess.run([sys.executable, "-m", "lit_llm", verb, "--nonsense"], cwd=tmp_path, capture_output=True, timeout=120,
                   env=env | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"})
    assert (tmp_path / "starts").read_text().splitlines() == settings


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGUSR1", 143)])
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux when a signal is heard")
def test_a_signal_while_libraries_are_imported_ends_in_one_line(place, name, code):
    """Ctrl-C during torch's import crashed in C++; SIGUSR1 of a batch system was not handled."""
    number = getattr(signal, name)
    for wait in (0.0, 0.3, 0.7):
        process = subprocess.Popen([sys.executable, "-m", "lit_llm", "fit", "--config", "ok.yaml"], stderr=subprocess.PIPE,
                                   stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
        while not (heard(process.pid, signal.SIGUSR1) or process.poll() is not None):       # the last requested one
            time.sleep(0.01)
        time.sleep(wait)
        process.send_signal(number)
        assert (process.communicate(timeout=60)[1], process.returncode) == ("error: stopped\n", code)


def heard(pid, number):
    """Whether a process has a handler for a signal."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt")]
    return int(line.split()[1], 16) >> (number - 1) & 1
