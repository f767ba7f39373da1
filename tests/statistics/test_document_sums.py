"""If this breaks: figures of an evaluation do not follow from its documents, or two evaluations cannot be compared."""

import json
import math

import numpy as np
import pytest

from lit_llm.errors import InputError
from lit_llm.statistics import intervals
from lit_llm.statistics.documents import Documents

ROWS = [(3, 1, 4.5, 3, 9, 8, 1), (0, 0, 2.0, 2, 6, 6, 1), (3, 1, 1.5, 1, 3, 3, 0), (7, 0, 10.0, 4, 12, 5, 4)]


def test_rows_of_one_document_are_added_in_any_order():
    whole = Documents.of_rows(ROWS, ["a", "b"])
    assert whole.document.tolist() == [0, 7, 3]
    assert whole.source.tolist() == [0, 0, 1]
    assert whole.nll.tolist() == [2.0, 10.0, 6.0]
    assert whole.tokens.tolist() == [2, 4, 4]
    generator = np.random.default_rng(0)
    rows = np.column_stack([generator.integers(0, 9, 200), np.zeros(200), generator.random(200), np.ones((200, 4))])
    first = Documents.of_rows(rows)
    for _ in range(3):
        assert Documents.of_rows(generator.permutation(rows)).nll.tobytes() == first.nll.tobytes()


def test_figures():
    figures = Documents.of_rows(ROWS).figures()
    assert figures == pytest.approx({
        "nll": 1.8, "perplexity": math.exp(1.8), "bits_per_byte": 18 / math.log(2) / 30,
        "bits_per_character": 18 / math.log(2) / 22, "token_accuracy": 0.6, "tokens": 10})
    unknown = Documents.of_rows([(0, 0, 2.0, 2, 0, 0, 1)]).figures()
    assert unknown == pytest.approx({"nll": 1, "perplexity": math.e, "token_accuracy": 0.5, "tokens": 2})
    assert math.isnan(Documents.of_rows([]).figures()["nll"])


def test_sources_are_reported_worst_first():
    parts = Documents.of_rows([*ROWS, (9, 2, 0.0, 0, 0, 0, 0)], ["easy", "hard", "none"]).by_source()
    assert {name: part.figures()["nll"] for name, part in parts.items()} == {"easy": 2.0, "hard": 1.5}
    assert list(parts) == ["easy", "hard"]


def test_a_report_has_the_intervals_of_each_figure():
    generator = np.random.default_rng(1)
    tokens = generator.integers(50, 200, 60)
    nll = tokens * generator.gamma(4, 0.5, 60)
    rows = np.column_stack([np.arange(60), np.zeros(60), nll, tokens, 4 * tokens, 3 * tokens, tokens // 3])
    report = Documents.of_rows(rows).report()
    interval = intervals.ratio(nll, tokens)
    assert (report["nll_low"], report["nll_high"]) == (interval.low, interval.high)
    assert report["perplexity_high"] == math.exp(interval.high)
    assert report["bits_per_byte_low"] == pytest.approx(interval.low / math.log(2) / 4)
    assert report["bits_per_character_low"] == pytest.approx(interval.low / math.log(2) / 3)
    assert report["token_accuracy_low"] < report["token_accuracy"] < report["token_accuracy_high"] <= 1
    assert report["documents"] == 60
    assert "few_documents" not in report
    few = Documents.of_rows(rows[:8]).report()
    assert few["few_documents"]
    assert few["nll_low"] < few["nll"]
    none = Documents.of_rows(rows[:2]).report()
    assert none["few_documents"]
    assert "nll_low" not in none


def test_a_file_of_documents(tmp_path):
    documents = Documents.of_rows(ROWS, ["a", "b"])
    file = tmp_path / "documents.jsonl"
    file.write_text("".join(documents.lines({"place": ["x:1", "x:2", "y:1"]})), encoding="utf-8")
    assert json.loads(file.read_text().splitlines()[2]) == {
        "document": 3, "source": "b", "nll": 6.0, "tokens": 4, "bytes": 12, "characters": 11, "correct": 1,
        "place": "y:1"}
    again = Documents.read(file)
    assert again.names == ("a", "b")
    assert again.figures() == documents.figures()
    file.write_text(file.read_text() + '{"document": 1}\n')
    with pytest.raises(InputError, match=r"documents\.jsonl:4"):
        Documents.read(file)
