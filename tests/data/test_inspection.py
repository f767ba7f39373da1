"""If this breaks: `inspect` shows other supervised tokens than the model is trained on, or counts that do not add up."""

import re

import numpy as np
import pytest

from lit_llm.data.datamodule import TextDataModule
from lit_llm.data.inspect.inspection import examine
from lit_llm.data.inspect.page import as_page
from lit_llm.data.inspect.terminal import as_text, ledger
from lit_llm.data.records.sources import Source
from lit_llm.errors import InputError
from lit_llm.text.conversation import Conversation

TALKS = [{"messages": [{"role": "system", "content": "Be <b>kind</b>."}, {"role": "user", "content": f"Say {n} \x1b[31m红"},
                       {"role": "assistant", "content": f"it is {n}"}]} for n in range(20)]


@pytest.fixture
def seen(tokenizer_folder, jsonl):
    def look(records, rows=2, **settings):
        data = TextDataModule([Source(jsonl(records))], tokenizer=str(tokenizer_folder), seq_len=256, **settings)
        data.prepare_data()
        data.setup("fit")
        return data, examine(data, rows)
    return look


def test_what_is_shown_is_what_is_learned(seen):
    """The coloured text of the first packed sequences is exactly the text of their labels."""
    data, inspection = seen(TALKS)
    tokenizer = data.tokenizer
    segments = [segment for row in inspection.shown for segment in row]
    supervised_texts = ["".join(run.text for run in segment.runs if run.supervised) for segment in segments]
    batch = data.train_dataloader().batch(0)
    wanted = []
    for labels, ids in zip(batch["labels"][:2].tolist(), batch["input_ids"][:2].tolist(), strict=True):
        text = tokenizer.decode([label for label in labels if label != -100], skip_special_tokens=False)
        wanted += [part + "<|im_end|>" for part in text.split("<|im_end|>")[:-1]]
        assert ids[0] == tokenizer.encode_prompt(Conversation.from_openai(TALKS[0]["messages"]))[0]
    assert supervised_texts == wanted
    assert [segment.supervised for segment in segments] == [len(tokenizer.encode_text(text)) - len("<|im_end|>") + 1
                                                         for text in wanted]
    assert [f"it is {int(segment.place.rsplit(':', 1)[1]) - 1}<|im_end|>" for segment in segments] == supervised_texts
    assert all(re.fullmatch(r"it is \d+<\|im_end\|>", text) for text in supervised_texts)
    assert {run.speaker for segment in segments for run in segment.runs} == {"system", "user", "assistant", "template"}
    assert {run.text for segment in segments for run in segment.runs if run.special} == {"<|im_start|>", "<|im_end|>"}


def test_counts_by_speaker(seen):
    """Compared with the tokenizer on each content separately; tokens are bytes here."""
    _, inspection = seen(TALKS)
    (report,) = inspection.reports
    size = {role: sum(len(message["content"].encode()) for talk in TALKS for message in talk["messages"]
                      if message["role"] == role) for role in ("system", "user", "assistant")}
    assert report.speakers["system"] == (size["system"], 0)
    assert report.speakers["user"] == (size["user"], 0)
    assert report.speakers["assistant"] == (size["assistant"] + 20, size["assistant"] + 20)     # with stop tokens
    assert sum(tokens for tokens, _ in report.speakers.values()) == report.tokens
    assert sum(supervised for _, supervised in report.speakers.values()) == report.supervised
    assert report.stopless == report.double_bos == 0


def test_stages_add_up(seen):
    data, inspection = seen([*TALKS, {"text": "x" * 700}], val_fraction=0.3)
    for stage in inspection.stages:
        assert sum(stage.lengths[1]) == stage.sequences
        assert stage.tokens == data.plans[stage.name].rows.lengths.sum()
    assert inspection.stages[0].lengths[1][-1] + inspection.stages[1].lengths[1][-1] == 1      # longer than data.seq_len


def test_duplicates_are_counted_and_left_out_on_request(seen):
    records = [*TALKS, *TALKS[:5], TALKS[0]]
    _, counted = seen(records)
    data, without = seen(records, dedup=True)
    assert counted.stages[0].notes["duplicates"] == 6
    assert counted.stages[0].sequences == 26
    assert without.stages[0].sequences == 20
    assert sorted(data.plans["train"].corpus.index) == list(range(20))
    assert "6 records are exact duplicates of earlier ones" in as_text(counted, colour=False)


def test_a_terminal_and_a_page_show_the_same_and_run_nothing(seen):
    _, inspection = seen([*TALKS, {"text": "<script>alert(1)</script> \x1b]0;title\x07"}], rows=9)
    plain, coloured, page = as_text(inspection, colour=False), as_text(inspection, colour=True), as_page(inspection, "a<b")
    assert "⟦it is 3<|im_end|>⟧" in plain
    assert "\x1b[32mit is 3\x1b[0m\x1b[32m\x1b[1m<|im_end|>\x1b[0m" in coloured
    assert "\x1b" not in plain
    assert "\x1b]0" not in coloured
    assert "<script>alert" not in page
    assert "alert(1)&lt;/script&gt;" in page
    assert "<title>a&lt;b</title>" in page
    assert not re.search(r"(src|href)=", page)


def test_too_many_bad_records_stop(seen):
    bad = [{"messages": [{"role": "user", "content": f"alone {n}"}]} for n in range(5)]
    with pytest.raises(InputError, match="5 of 25 records are bad"):
        seen([*TALKS, *bad], on_bad_record="quarantine")
    _, inspection = seen([*TALKS, *bad], on_bad_record="quarantine", bad_record_limit=0.2)
    assert inspection.reports[0].quarantined == 5


def test_records_of_several_sequences_are_no_duplicates_of_themselves(load, tmp_path, jsonl):
    """Qwen3 rewrites history, so that each of two answers is a sequence of its own."""
    from tests.conversations import QWEN3

    tokenizer = load(QWEN3)
    talk = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2", "reasoning_content": "one more"},
            {"role": "user", "content": "and 1?"}, {"role": "assistant", "content": "3", "reasoning_content": "again"}]
    assert len(tokenizer.encode_conversation(Conversation.from_openai(talk))) == 2
    data = TextDataModule([Source(jsonl([{"messages": talk}, {"messages": talk}]))], seq_len=256, dedup=True)
    data._tokenizer = tokenizer
    data.prepare_data()
    data.setup("fit")
    assert np.sort(data.plans["train"].corpus.index).tolist() == [0, 1]


def test_long_text_and_long_names_fit_a_terminal(seen, monkeypatch):
    """Of a long answer its head and tail; tables within 80 columns, a path by its end."""
    monkeypatch.setenv("COLUMNS", "80")
    _, inspection = seen([*TALKS, {"messages": [{"role": "user", "content": "Tell"},
                                                {"role": "assistant", "content": "head" + "-" * 150 + "tail"}]}], rows=9)
    lines = as_text(inspection, colour=False, characters=30).split("\n")
    assert f"⟦head{'-' * 16} ... 128 more characters ... {'-' * 6}tail<|im_end|>⟧" in lines
    assert max(len(line) for line in lines if "data.jsonl" not in line or "  " in line) <= 80
    drawn = {f"/a/very/long/path/{'x' * 90}/{name}.jsonl": {"sequences": 10**9, "tokens": 10**12, "supervised": 10**11}
             for name in ("one", "two")}
    table = ledger(drawn, "drawn")
    assert max(map(len, table)) <= 80
    assert [line.split()[0][-9:] for line in table[1:]] == ["one.jsonl", "two.jsonl"]
    assert table[1].split()[1:] == ["1,000,000,000", "1,000,000,000,000", "100,000,000,000", "50.0%"]
