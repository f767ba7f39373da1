"""If this breaks: the chat page offers no example questions, a model of single questions is given whole conversations, or a model
card from the internet stops the server.
"""

import json

import pytest
import yaml

from lit_llm.exports.card import card
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
