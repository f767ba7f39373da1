"""If this breaks: damaged weights silently give a useless model, or a damaged or foreign adapter causes a traceback.

Every command that reads a checkpoint runs on a real one that was damaged after it was written.
"""

import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch

from lit_llm.models.adapters import patterns
from tests.test_cli import call, place

assert place                                        # a fixture
STEP = Path("run/checkpoints/step_1")
FIT = ["fit", "--config", "ok.yaml", "--trainer.max_steps", "1", "--trainer.num_sanity_val_steps", "0"]


@pytest.fixture(scope="module")
def made():
    """Runs by their options, copied where they are wanted."""
    return {}


@pytest.fixture
def run(place, made, tmp_path_factory):
    """`run(...)`: a folder `run` with one checkpoint; `adapter` is a loose copy of its adapter."""
    def prepare(*options):
        if options not in made:
            code, _, err = call(*FIT, *options)
            assert code == 0, err
            made[options] = tmp_path_factory.mktemp("made") / "run"
            shutil.move("run", made[options])
        shutil.copytree(made[options], "run")
        if (STEP / "adapter").is_dir():
            shutil.copytree(STEP / "adapter", "adapter")

    return prepare


def refused(*words, says):
    """Exit code 2, and at most six lines that name what is wrong."""
    code, _, err = call(*words)
    assert code == 2, err
    assert "Traceback" not in err
    message = err[err.index("error: "):]
    assert len(message.splitlines()) <= 6
    for word in [says] if isinstance(says, str) else says:
        assert word in message, message


def change(file, count=100):
    """Other bytes in the middle of the tensors."""
    content = bytearray(file.read_bytes())
    content[-count:] = os.urandom(count)
    file.write_bytes(content)


def cut(file):
    file.write_bytes(file.read_bytes()[:-200])


def base_of():
    return json.loads((STEP / "manifest.json").read_text())["base"]


@pytest.mark.parametrize("damage", [change, cut, Path.unlink])
def test_no_reader_takes_an_adapter_that_is_not_as_it_was_written(run, damage):
    run()
    damage(STEP / "adapter/adapter_model.safetensors")
    says = "adapter_model.safetensors"
    refused("export", "--run", "run", says=says)
    refused("chat", "--model", base_of(), "--adapter", STEP / "adapter", "--prompt", "a", says=says)
    refused("chat", "--model", STEP / "adapter", "--prompt", "a", says=says)
    refused("validate", "--config", "ok.yaml", "--ckpt_path", STEP, says=says)
    refused("validate", "--config", "ok.yaml", "--ckpt_path", "best", says=says)
    lone = ["--model.lora", "null", "--trainer.default_root_dir", "other"]
    refused(*FIT, *lone, "--model.adapter", "run", says=says)
    refused(*FIT, *lone, "--model.adapter", STEP / "adapter", "--model.merge_adapter", "true", says=says)
    assert not Path("run/export.partial").exists()


def test_a_config_of_an_adapter_that_was_changed(run):
    run()
    file = STEP / "adapter/adapter_config.json"
    file.write_text(file.read_text().replace('"lora_alpha": 32.0', '"lora_alpha": 64.0'))
    refused("export", "--run", "run", says=["adapter_config.json", "was changed"])
    refused("chat", "--model", base_of(), "--adapter", STEP / "adapter", "--prompt", "a", says="adapter_config.json")


def test_a_weight_file_that_was_added(run):
    run()
    (STEP / "adapter/first").mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(STEP / "adapter" / name, STEP / "adapter/first" / name)
    refused("export", "--run", "run", says=["first/adapter_model.safetensors", "was added"])


@pytest.mark.parametrize("damage", [change, cut])
def test_whole_weights(run, damage):
    run("--model.lora", "null")
    damage(STEP / "model/model.safetensors")
    refused("export", "--run", "run", says=["model.safetensors", "another checkpoint"])
    shutil.copytree("run/tokenizer", STEP / "model", dirs_exist_ok=True)
    refused("chat", "--model", STEP / "model", "--prompt", "a", says="model.safetensors")
    refused(*FIT, "--model.base", STEP / "model", "--data.tokenizer", "run/tokenizer", "--trainer.default_root_dir",
            "other", says="model.safetensors")


@pytest.mark.parametrize("manifest", ["", "[]", "{", '{"files": {"adapter/adapter_config.json": 3}}'])
def test_a_damaged_manifest(run, manifest):
    run()
    base = base_of()
    (STEP / "manifest.json").write_text(manifest)
    refused("export", "--run", "run", says=["manifest.json", "damaged"])
    refused("chat", "--model", base, "--adapter", STEP / "adapter", "--prompt", "a", says="manifest.json")
    refused("validate", "--config", "ok.yaml", "--ckpt_path", STEP, says="manifest.json")


def test_whole_ones_are_read(run):
    run()
    for words in (["export", "--run", "run"], ["validate", "--config", "ok.yaml", "--ckpt_path", STEP],
                  ["chat", "--model", base_of(), "--adapter", STEP / "adapter", "--prompt", "a", "--max_tokens", "1"],
                  ["chat", "--model", base_of(), "--adapter", "adapter", "--prompt", "a", "--max_tokens", "1"]):
        code, _, err = call(*words)
        assert code == 0, err


# ---- adapters of strangers -------------------------------------------------------------------------------------------

SLOW = "(([a-z._0-9]+)+)+!"
FOREIGN = {
    "unknown type": {"peft_type": "EVIL"}, "no type": {"peft_type": None}, "type of a type": {"peft_type": ["LORA"]},
    "other adapters": {"peft_type": "XLORA"}, "rank": {"r": "sixteen"}, "negative rank": {"r": -1},
    "alpha": {"lora_alpha": None}, "targets": {"target_modules": 5}, "in targets": {"target_modules": [1, None]},
    "no such layer": {"target_modules": ["nothing"]}, "bad regex": {"target_modules": "(q_proj"},
    "bad rank regex": {"rank_pattern": {"(": 4}}, "bad exclude": {"exclude_modules": "*"},
    "slow regex": {"target_modules": SLOW}, "tokens": {"trainable_token_indices": "x"},
    "large rank": {"r": 10**9}, "large rank of a layer": {"rank_pattern": {".*": 10**9}}, "nested": {"r": {"a": {"b": 4}}},
    "alpha of nan": {"lora_alpha": float("nan")}, "endless alpha": {"alpha_pattern": {".*": float("inf")}},
    "imports": {"megatron_config": {"hidden_size": 3}, "megatron_core": "antigravity"}}


def assert_refused_by_all(says=()):
    """Chat, fit and export refuse the separate adapter `adapter`, and write nothing."""
    refused("chat", "--model", base_of(), "--adapter", "adapter", "--prompt", "a", says=["adapter", *says])
    refused(*FIT, "--model.lora", "null", "--model.adapter", "adapter", "--trainer.default_root_dir", "other",
            says=["adapter", *says])
    shutil.rmtree(STEP / "adapter")
    shutil.copytree("adapter", STEP / "adapter")
    manifest = json.loads((STEP / "manifest.json").read_text())
    manifest["files"] = {str(file.relative_to(STEP)): {
        "bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in STEP.rglob("*") if file.is_file() and file.name != "manifest.json"}     # as a stranger would
    (STEP / "manifest.json").write_text(json.dumps(manifest))
    refused("export", "--run", "run", "--out", "exported", says=["adapter", *says])
    assert not Path("exported").exists()
    assert not Path("other/checkpoints").exists()


@pytest.mark.parametrize("keys", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_config_is_refused_in_a_line(run, keys, monkeypatch):
    monkeypatch.setattr(patterns, "PATIENCE", 1.0)
    run()
    file = Path("adapter/adapter_config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))
    began = time.monotonic()
    assert_refused_by_all()
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("text", ["", "[]", "3", '{"r": ' + "[" * 100_000, "\0"])
def test_a_file_that_is_no_config_is_refused(run, text):
    run()
    Path("adapter/adapter_config.json").write_text(text)
    assert_refused_by_all(["adapter_config.json"])


@pytest.mark.parametrize("damage", ["cut", "empty", "shapes of its weights do not match", "nan", "bin"])
def test_foreign_weights(run, damage):
    run()
    file = Path("adapter/adapter_model.safetensors")
    if damage == "cut":
        cut(file)
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage in ("shapes of its weights do not match", "nan"):
        from safetensors.torch import load_file, save_file

        save_file({name: torch.zeros(3, 3) if damage == "shapes of its weights do not match" else torch.full_like(weight, torch.nan)
                   for name, weight in load_file(file).items()}, file)
    else:
        torch.save({}, file.with_suffix(".bin"))
        file.unlink()
    assert_refused_by_all()
