"""If this breaks: a model forgets what it could do before and nobody is told, a run with guard documents trains another model than one
without, or the rise that is reported depends on batch size, packing, processes or a resume.

Oracles: transformers' own loss on each document alone, and numpy.
"""

import contextlib
import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from run_processes import content, differences, metrics_rows, write_data

from lit_llm import Source, TextDataModule
from lit_llm.data import guard
from lit_llm.statistics import intervals
from tests.test_cli import call, refused

STORY = "Tom has a red kite . He runs up the hill with it . The wind is strong today . The kite flies over the river and the trees"
FORGETS = {"model.lr": 0.5, "model.lora": None, "model.schedule": "constant", "model.warmup": 0}


def stories(folder, count=40):
    """Documents of different lengths, one of them longer than a packed sequence, with a duplicate."""
    words = STORY.split()
    texts = [" ".join(words[at % 7:at % 7 + 5 + at % 9]) + f" {at}" for at in range(count)]
    texts += [STORY + " " + STORY, texts[0]]
    file = Path(folder) / "stories.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(file)


@pytest.fixture(scope="module")
def home(tmp_path_factory, run_processes, tiny_model):
    """A folder with chats, stories and the config of a run that has guard documents."""
    folder = run_processes.folder
    chats, text = write_data(folder), stories(folder)
    config = {
        "model": {"base": tiny_model("llama"), "lora": {"r": 4, "dropout": 0.1}, "lr": 1e-2},
        "data": {"sources": [{"path": chats}], "val_sources": [{"path": chats}], "guard_sources": [{"path": text}],
                 "seq_len": 64, "batch_size": 1, "packing": "none"},
        "trainer": {"accelerator": "cpu", "devices": 1, "max_epochs": 2, "accumulate_grad_batches": 2, "log_every_n_steps": 1,
                    "callbacks": [{"class_path": "lit_llm.training.run.checkpoint.StepCheckpoint",
                                   "init_args": {"every_n_steps": 3, "keep_last": 9}}]}}
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder


def fit(run_processes, name, *options, ranks=1, code=0):
    """A run in the folder `name`; what it printed on stderr."""
    ended = run_processes.run("fit", "--config", "run.yaml", "--trainer.default_root_dir", name, *options, ranks=ranks)
    assert set(ended["codes"]) == {code}, ended["outputs"]
    return ended["outputs"][0]["err"]


def guard_rows(run):
    """The rows of `metrics.csv` with figures of the guard documents: step -> metric -> value."""
    with open(run / "metrics.csv", newline="") as stream:
        rows = [{name: float(value) for name, value in row.items() if value and name.startswith(("guard/", "step"))}
                for row in csv.DictReader(stream)]
    return {int(row.pop("step")): row for row in rows if "guard/nll" in row}


@pytest.fixture(scope="module")
def run(home, run_processes):
    """The run with its output."""
    return home / "whole", fit(run_processes, "whole")


def test_the_figures_are_those_of_transformers_alone(home, run, run_processes, tiny_model):
    """Before training by the base, at the end by the export: each document in a forward pass of its own."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, _ = run
    rows = guard_rows(folder)
    assert list(rows) == [0, 5, 10]
    texts = list(dict.fromkeys(json.loads(line)["text"] for line in (home / "stories.jsonl").read_text().splitlines()))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("llama"))
    chosen = {tuple(ids[:64]) for ids in (_ids(tokenizer, text) for text in texts)}
    sums = {}
    for name, path in (("base", tiny_model("llama")), ("tuned", folder / "export")):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
        with torch.no_grad():
            sums[name] = np.array([float(model(torch.tensor([ids]), labels=torch.tensor([ids])).loss) * (len(ids) - 1)
                                   for ids in sorted(chosen)])
    tokens = np.array([len(ids) - 1 for ids in sorted(chosen)])
    assert rows[0]["guard/tokens"] == tokens.sum()
    assert rows[0]["guard/nll"] == pytest.approx(sums["base"].sum() / tokens.sum(), rel=1e-5)
    assert rows[0]["guard/rise"] == 0
    assert rows[10]["guard/nll"] == pytest.approx(sums["tuned"].sum() / tokens.sum(), rel=1e-4)
    rise = (sums["tuned"] - sums["base"]).sum() / tokens.sum()
    assert rows[10]["guard/rise"] == pytest.approx(rise, abs=1e-4)
    interval = intervals.paired(sums["tuned"], sums["base"], tokens)
    width = interval.high - interval.low
    assert rows[10]["guard/rise_low"] == pytest.approx(interval.low, abs=0.1 * width)      # the order of documents differs
    assert rows[10]["guard/rise_high"] == pytest.approx(interval.high, abs=0.1 * width)
    measured = json.loads((folder / "metrics.json").read_text())
    assert measured["before/guard/nll"] == rows[0]["guard/nll"]
    figures = json.loads((folder / "checkpoints" / "step_10" / "manifest.json").read_text())["figures"]
    assert figures["guard/nll"] == rows[10]["guard/nll"]


def _ids(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [tokenizer.bos_token_id, *ids] if tokenizer.bos_token_id is not None else ids


def test_training_is_bit_identical_with_and_without(home, run, run_processes):
    """Weights, optimizer, random states and the place in the data; with dropout, which draws random numbers."""
    fit(run_processes, "without", "--data.guard_sources", "null")
    kept = [[{name: value for name, value in row.items() if not name.startswith("guard/")} for row in metrics_rows(home / name)]
            for name in ("whole", "without")]
    assert kept[0] == kept[1]
    found = [content(home / name / "checkpoints" / "step_10") for name in ("whole", "without")]
    assert [line for line in differences(*found) if "/Forgetting/" not in line and "/guard/" not in line] == []


def test_a_resumed_run_compares_with_the_values_before_training(home, run, run_processes):
    shutil.copytree(run[0], home / "resumed")
    for step in (5, 6, 9, 10):
        shutil.rmtree(home / "resumed" / "checkpoints" / f"step_{step}")
    fit(run_processes, "resumed", "--ckpt_path", "last")
    assert guard_rows(home / "resumed") == guard_rows(run[0])


@pytest.mark.parametrize(("strategy", "ranks"), [("auto", 1), ("ddp", 2), ("deepspeed_stage_3", 2), ("fsdp2", 2)])
def test_the_figures_do_not_depend_on_batches_packing_and_processes(home, run, run_processes, strategy, ranks):
    """Before training, where the weights are equal; with two processes that share each layer's weights as well."""
    name = f"{strategy}_{ranks}"
    fit(run_processes, name, "--data.packing", "best_fit", "--data.batch_size", 3, "--trainer.devices", ranks,
        "--trainer.strategy", strategy, "--trainer.max_epochs", 1, "--model.lora", "null", ranks=ranks)
    rows, expected = guard_rows(home / name), guard_rows(run[0])[0]
    assert rows[0].keys() == expected.keys()
    for metric, value in expected.items():
        assert rows[0][metric] == pytest.approx(value, rel=1e-6), metric
    last = rows[max(rows)]
    assert max(rows) > 0
    assert last["guard/rise"] == pytest.approx(last["guard/nll"] - expected["guard/nll"], abs=1e-5)


def test_forgetting_is_reported_and_can_stop_the_run(home, run_processes):
    options = [word for key, value in FORGETS.items() for word in (f"--{key}", "null" if value is None else value)]
    said = fit(run_processes, "high", *options, "--trainer.stop_on_forgetting", 0.5)
    rows = guard_rows(home / "high")
    assert list(rows) == [0, 5]                         # the first validation ends it
    (line,) = [line for line in said.splitlines() if line.startswith("forgetting: ")]
    assert f"{rows[5]['guard/nll']:.3f} nats per token at step 5, {rows[0]['guard/nll']:.3f} before training" in line
    assert f"({rows[5]['guard/rise']:+.3f}, 95 % interval {rows[5]['guard/rise_low']:+.3f} to" in line
    assert rows[5]["guard/rise_low"] > 0.5
    report = json.loads((home / "high" / "report.json").read_text())
    assert "trainer.stop_on_forgetting: 0.5" in report["run"]["reason"]
    assert (home / "high" / "export" / "config.json").is_file()
    fit(run_processes, "high", "--ckpt_path", "last", *options)     # without the limit it continues
    assert list(guard_rows(home / "high")) == [0, 5, 10]


def test_other_guard_documents_after_a_resume_are_a_new_start(home, run, run_processes):
    shutil.copytree(run[0], home / "other")
    (home / "fewer.jsonl").write_text("".join(f'{{"text": "{STORY[:20 + at]}"}}\n' for at in range(30)))
    said = fit(run_processes, "other", "--ckpt_path", "last", "--trainer.max_epochs", 3, "--data.guard_sources",
               "[{path: fewer.jsonl}]")
    assert "so a rise is measured from step 10 on" in said
    assert guard_rows(home / "other")[15]["guard/rise"] != guard_rows(home / "other")[15]["guard/nll"]


def test_a_run_without_validation_data_is_measured_at_its_ends(home, run_processes):
    fit(run_processes, "ends", "--data.val_sources", "null", "--trainer.max_epochs", 1)
    assert list(guard_rows(home / "ends")) == [0, 5]


# ---- which documents -------------------------------------------------------------------------------------------------

def chosen(files, tokens, tokenizer="sample:tokenizer", **options):
    data = TextDataModule([Source(str(files[0]))], guard_sources=[Source(str(file)) for file in files], tokenizer=tokenizer,
                          guard_tokens=tokens, **options)
    data.quiet = True
    data.prepare_data()
    data.setup("fit")
    return data.plans["guard"]


def test_the_sample_is_bounded_and_the_same_in_any_order(tmp_path):
    """Of 3,000 documents, of which a few are very long, and of a second source with few."""
    texts = [f"{STORY} {at}" * (40 if at % 100 == 0 else 1) for at in range(3000)]
    many, turned, few = (tmp_path / name for name in ("many.jsonl", "turned.jsonl", "few.jsonl"))
    many.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    turned.write_text("".join(json.dumps({"text": text}) + "\n" for text in reversed(texts)))
    few.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:3]))
    plan = chosen([many, few], 4000)
    used = np.bincount(plan.corpus.store_of[plan.rows.segments.sequence], plan.rows.segment_supervised, 2)
    assert 1800 < used[0] <= 2000                      # half of the tokens for each source
    assert (plan.corpus.store_of == 1).sum() == 3
    assert plan.rows.segments.lengths.max() <= 2000 // guard.DOCUMENTS + 1
    assert (plan.corpus.store_of == 0).sum() >= guard.DOCUMENTS
    same = chosen([turned], 4000)
    assert set(same.corpus.column("content")) >= set(chosen([many], 4000).corpus.column("content"))


def test_too_few_documents_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text(STORY)
    Path("chats.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    config = ["--model.base", "sample:base", "--data.sources", "[{path: chats.jsonl}]", "--trainer.accelerator", "cpu"]
    refused("fit", *config, "--data.guard_sources", "[{path: book.txt}]", says="data.guard_sources: 1 different documents")
    refused("fit", *config, "--trainer.stop_on_forgetting", "0.1", says="trainer.stop_on_forgetting: there are no guard documents")
    with contextlib.suppress(AssertionError):
        assert call("fit", *config, "--data.guard_sources", "[{path: nowhere.txt}]")[0] == 2
