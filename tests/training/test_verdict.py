"""If this breaks: a run that learned nothing ends without a warning, or a good run gets one."""

import json
import math
from pathlib import Path

import pytest

from lit_llm.cli import examples
from lit_llm.report.verdict import Course, course_of, warnings

GOOD = Course(360, 4.0, True, [3.0, 1.0, 0.3, 0.1, 0.06], [(90, 0.3), (180, 0.1), (270, 0.066), (360, 0.067)], 1.5)


@pytest.mark.parametrize("course", [
    GOOD,
    Course(2400, 11.0, False, [7.3, 2.0, 0.8, 0.7], [(800, 0.9), (2400, 0.85)], 7.5),          # a toy from scratch
    Course(30, 40.0, True, [4.0, 0.9, 0.05]),                                   # few steps, but all of it is known
    Course(3000, 1.0, True, [1.9, 1.4, 1.3], [(1000, 1.35), (3000, 1.31)], 1.8),               # SFT of a real model
    Course(50_000, None, False, [10.9, 4.0, 3.2]),                                             # a streamed corpus
])
def test_good_runs_are_not_blamed(course):
    assert warnings(course) == []


@pytest.mark.parametrize(("course", "words"), [
    (Course(2, 1.0, True, [6.1, 5.9]), ["2 steps in 1.0 passes over the data are too few", "still 5.90 nats"]),
    (Course(80, 40.0, True, [7.0, 3.0, 1.5]), ["still 1.50 nats per token after 40 passes over the same data"]),
    (Course(500, 0.3, True, [5.0, 3.1]), ["still 3.10 nats per token (perplexity 22.2)"]),
    (Course(400, 1.0, False, [9.0, 6.0]), ["still 6.00 nats"]),
    (Course(360, 30.0, True, [3.0, 0.01], [(100, 1.0), (200, 1.4), (360, 2.0)], 3.0),
     ["validation rises: perplexity 2.718 at step 100, 7.389 at the end"]),
    (Course(360, 9.0, True, [3.0, 0.01], [(100, 2.0), (360, 2.5)], 1.0), ["worse than before training"]),
])
def test_each_fault_is_named(course, words):
    messages = warnings(course)
    assert len(messages) == len(words)
    for sentence, expected in zip(messages, words, strict=True):
        assert expected in sentence


def test_losses_that_are_no_numbers_are_left_out():
    assert warnings(Course(360, 4.0, True, [0.5, math.nan], [(10, math.nan)])) == []


def test_a_run_on_two_records_says_it_all(lit_llm, tmp_path: Path):
    """The whole verb: warnings on stdout, trained prompts with what they should be answered beside what they are."""
    rows = [{"messages": [{"role": "user", "content": f"Where is the {animal}?"},
                          {"role": "assistant", "content": f"The {animal} is here."}]} for animal in ("cat", "dog")]
    (tmp_path / "two.jsonl").write_text("\n".join(map(json.dumps, rows)))
    root = Path(__file__).resolve().parents[2]
    done = lit_llm("fit", "--config", root / "configs/sft.yaml", "--config", root / "configs/with/cpu.yaml",
                   "--data.sources", f"[{{path: {tmp_path / 'two.jsonl'}}}]", "--data.val_sources", "null",
                   "--trainer.max_epochs", 2, "--trainer.default_root_dir", tmp_path / "run")
    assert done.code == 0, done.err
    assert "warning: 2 steps in 2.0 passes over the data are too few" in done.out
    assert done.out.count("(trained)") == 2
    assert done.out.count("  expected The ") == 2
    assert course_of(tmp_path / "run").steps == 2
    assert course_of(tmp_path / "run").answers


def test_an_example_is_cut_where_the_answer_begins(tmp_path: Path):
    """A later turn of the user's belongs to neither prompt nor answer."""
    from lit_llm import Source, TextDataModule

    talk = [("user", "A cat?"), ("assistant", "Yes."), ("user", "A dog?"), ("assistant", "No.")]
    (tmp_path / "one.jsonl").write_text(json.dumps({"messages": [{"role": role, "content": text} for role, text in talk]}))
    data = TextDataModule(sources=[Source(str(tmp_path / "one.jsonl"))], tokenizer="sample:base", seq_len=64)
    data.prepare_data()
    data.setup("fit")
    (example,) = examples.choose(data)
    assert example.kind == "trained"
    assert data.tokenizer.decode(example.prompt).endswith("A cat?\nassistant\n")
    assert data.tokenizer.decode(example.expected) == "Yes."
