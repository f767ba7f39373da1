"""If this breaks: the chat page offers no example questions, a model of single questions is given whole conversations, or a model
card from the internet stops the server.
"""

import json
import math
import shutil
import subprocess
import sys

import pytest
import yaml
from huggingface_hub import ModelCard

from lit_llm import names
from lit_llm.errors import InputError
from lit_llm.exports import metadata
from lit_llm.exports.card import Form, card
from lit_llm.inference.usage import Usage, read_usage


def written(folder, questions, turns):
    (folder / "data.json").write_text(json.dumps({"conversations": {"questions": questions, "turns": turns}}), encoding="utf-8")
    text = card(folder, {"step": 3}, "step_3")
    (folder / "README.md").write_text(text, encoding="utf-8")
    return text


@pytest.mark.parametrize("turns", [1, 4])
def test_a_card_says_what_its_reader_finds(turns, tmp_path):
    questions = ["马和狐狸哪个更轻？", "Is it: 'yes' or \"no\"? # {x}", "<b>|*bold*"]
    text = written(tmp_path, questions, turns)
    assert read_usage(tmp_path) == Usage(tuple(questions), turns)
    assert read_usage(tmp_path).single_turn == (turns == 1)
    head = yaml.safe_load(text.split("---")[1])
    assert head["widget"][0] == {"messages": [{"role": "user", "content": questions[0]}]}       # the hub's format
    assert "\\<b\\>\\|\\*bold\\*" in text


def test_a_run_without_conversations_claims_none(tmp_path):
    (tmp_path / "data.json").write_text('{"conversations": {}}')
    (tmp_path / "README.md").write_text(card(tmp_path, {"step": 3}, "step_3"), encoding="utf-8")
    assert read_usage(tmp_path) == Usage()
    (tmp_path / "data.json").unlink()               # a run of an earlier version
    assert "widget" not in card(tmp_path, {"step": 3}, "step_3")


@pytest.mark.parametrize("text", [
    "", "# no head", "---\n- a list\n---", "---\nwidget: {a: 1}\nturns: many\n---", "---\nwidget: [1, {text: 3}, {messages: [2]}]\n---",
    "---\nwidget: [{messages: [{role: user}, {role: user}]}]\nturns: true\n---", "---\n!!python/object/apply:os.getpid []\n---",
    "---\na: &a [x, x]\nwidget: {{{\n---", "---\n" + "[" * 30_000, "---\nwidget: [{text: '" + "x" * 300 + "'}]\n---\n", "\0\ufffd",
])
def test_any_card_is_read(text, tmp_path):
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    assert read_usage(tmp_path) == Usage()
    assert read_usage(tmp_path / "README.md") == read_usage(tmp_path / "none") == Usage()


def test_questions_of_other_cards(tmp_path):
    (tmp_path / "README.md").write_text("---\nwidget:\n" + "".join(f"- text: question {n}\n" for n in [1, 1, *range(20)]) + "---\n")
    assert read_usage(tmp_path).questions == tuple(f"question {n}" for n in (1, 0, 2, 3, 4, 5))


# ---- the hub's conventions -------------------------------------------------------------------------------------------

def measured_run(folder, base):
    """A run folder with metrics and their intervals, on a hub dataset, from a base with a card."""
    base.mkdir()
    (base / "config.json").write_text("{}")
    (base / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en, zh]\n---\n# base\n")
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": {"sources": [{"path": "owner/talks"}, {"path": "/data/own.jsonl"}]}}))
    (folder / "metrics.json").write_text(json.dumps({"checkpoint": "step_3", "step": 3, "test/perplexity": 3.5, "test/tokens": 900}))
    return {"step": 3, "base": str(base), "peft": {"class_path": "LoraConfig"}, "figures": {
        "val/nll": 1.25, "val/nll_low": 1.2, "val/nll_high": 1.3, "val/perplexity": 3.490343, "val/token_accuracy": 0.6,
        "val/tokens": 1000.0, "val/bits_per_byte": 0.7}}


def test_huggingface_hub_reads_what_was_measured_with_its_interval(tmp_path):
    """Oracle: its own `ModelCard`, as the hub reads a card."""
    facts = measured_run(tmp_path, tmp_path / "base")
    data = ModelCard(card(tmp_path, facts, "step_3", Form(picture="curves.svg"))).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "text-generation", "apache-2.0")
    assert (data.language, data.datasets, data.base_model) == (["en", "zh"], ["owner/talks"], None)
    assert {"lit_llm", "lora"} <= set(data.tags)
    results = {(result.dataset_split, result.metric_type): result for result in data.eval_results}
    assert results["validation", "nll"].metric_value == 1.25
    assert results["validation", "nll"].metric_args == {"interval_95": [1.2, 1.3], "tokens": 1000}
    low, high = results["validation", "perplexity"].metric_args["interval_95"]
    assert (low, high) == pytest.approx((math.exp(1.2), math.exp(1.3)), rel=1e-5)
    assert results["validation", "accuracy"].metric_value == 0.6
    assert results["test", "perplexity"].metric_value == 3.5
    assert results["test", "perplexity"].dataset_name == "owner/talks, own.jsonl"


def test_the_license_is_that_of_the_user_of_the_base_or_not_stated(tmp_path):
    facts = measured_run(tmp_path, tmp_path / "base")
    assert ModelCard(card(tmp_path, facts, "step_3", Form(license="mit"))).data.license == "mit"
    (tmp_path / "base" / "README.md").unlink()
    text = card(tmp_path, facts, "step_3")
    assert ModelCard(text).data.license is None
    assert "No license is stated" in text
    with pytest.raises(InputError, match="apache-2"):
        metadata.check_license("Apache License 2")


@pytest.mark.parametrize(("base", "hub_id"), [
    ("owner/name", "owner/name"), ("/cache/hub/models--owner--na.me/snapshots/0a1/", "owner/na.me"), ("gpt2/x/y", None), (None, None),
    ("sample:base", None)])
def test_the_base_is_named_by_its_hub_id(base, hub_id):
    assert metadata.base_id(base) == hub_id


@pytest.mark.parametrize("text", ["---\n- x\n---", "---\nlicense: [1]\nlanguage: {a: 1}\n---", "---\n" + "[" * 9_000, "\0", "---\nlanguage: [1, 2]\n---\n"])
def test_any_card_of_a_base_is_read(text, tmp_path):
    facts = measured_run(tmp_path, tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text(text)
    assert ModelCard(card(tmp_path, facts, "step_3")).data.license is None


def test_its_commands_load_the_folder(tmp_path, lit_llm):
    """The Python block runs, and chat and serve accept what the card gives them, in the folder."""
    shutil.copytree(names.resolve("sample:base"), tmp_path, dirs_exist_ok=True)
    text = card(tmp_path, {"step": 3}, "step_3")
    code = text.split("```python\n")[1].split("```")[0]
    subprocess.run([sys.executable, "-c", code + "\nassert model.config.vocab_size >= len(tokenizer)"], cwd=tmp_path, check=True, timeout=120)
    chat, serve = text.split("```bash\n")[1].split("```")[0].splitlines()
    done = lit_llm(*chat.removeprefix("python -m lit_llm ").split(), stdin="Hello\n")
    assert done.code == 0, done.err
    assert serve == chat.replace("lit_llm chat", "serve")
