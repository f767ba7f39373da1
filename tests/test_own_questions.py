"""If this breaks: the toy does not reproduce a user's own questions and answers in the tutorial's format."""

from pathlib import Path

from tests.benchmarks.own_questions import QUESTIONS, exact

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def test_own_answers_come_back_word_for_word(lit_llm, tmp_path):
    """Some of the 50: emoji, rare characters, digits and English among them. All 50: tests/benchmarks/own_questions.py."""
    lines = QUESTIONS.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 50
    (tmp_path / "my.jsonl").write_text("\n".join(lines[::5]), encoding="utf-8")
    done = lit_llm("fit", "--config", CONFIGS / "own_questions.yaml", "--data.sources", f"[{{path: {tmp_path / 'my.jsonl'}}}]",
                   "--trainer.default_root_dir", tmp_path / "run")
    assert done.code == 0, done.err
    assert "other tokens" in done.err
    assert "warning:" not in done.out
    right, wrong = exact(tmp_path / "run/export", tmp_path / "my.jsonl")
    assert right >= 9, wrong
