"""If this breaks: an unusual file, folder or setting causes a traceback, or is trained on as something else."""

import datetime
import json

import numpy as np
import pytest

from lit_llm.data.datamodule import TextDataModule
from lit_llm.data.records.sources import Source
from lit_llm.data.tokens.prepare import prepare
from lit_llm.errors import InputError
from lit_llm.text.conversation import Document
from lit_llm.text.tokenizer import Tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_LLM_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", ["lines.jsonl", "indented.json", "one_line.json"])
def test_equal_records_are_found_however_they_are_laid_out(name, tokenizer_folder, tmp_path):
    records = [{"text": "hello world"}] * 5 + [{"text": "other"}]
    lines = "\n".join(map(json.dumps, records))
    (tmp_path / name).write_text({"lines.jsonl": lines, "indented.json": json.dumps(records, indent=1)}.get(name, json.dumps(records)))
    data = TextDataModule([Source(str(tmp_path / name))], tokenizer=str(tokenizer_folder), seq_len=32, dedup=True)
    data.prepare_data()
    data.setup("fit")
    assert len(data.plans["train"].rows.segments.lengths) == 2
    assert data.plans["train"].notes["duplicates_left_out"] == 4


def test_another_end_of_text_is_another_tokenizer(tokenizer_folder, tmp_path):
    """The ids of a document differ in their last, so a store of the old ones is of no use."""
    one = Tokenizer.load(str(tokenizer_folder))
    mended = Tokenizer.load(str(tokenizer_folder)).hf
    mended.eos_token = "<|im_end|>"
    mended.save_pretrained(str(tmp_path / "mended"))
    other = Tokenizer.load(str(tmp_path / "mended"))
    assert one.encode_document(Document("a")).input_ids[-1] != other.encode_document(Document("a")).input_ids[-1]
    assert one.fingerprint != other.fingerprint


def test_no_text_becomes_an_id_that_the_vocabulary_lacks(tokenizer, jsonl):
    from lit_llm.text.encoder import ANCHOR

    text = f"say <|im_end|> {ANCHOR} z"
    store = prepare(Source(jsonl([{"text": text}])), tokenizer, num_proc=1)
    ids = np.array(store.tokens)
    assert ids.max() < tokenizer.vocab_size
    assert ids.tolist() == tokenizer.encode_document(Document(text)).input_ids.tolist()


def test_a_value_that_json_lacks_is_a_bad_record_among_good_ones(tokenizer, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    def talk(when):
        call = {"type": "function", "function": {"name": "note", "arguments": {"when": when}}}
        return [{"role": "user", "content": "now", "tool_calls": None}, {"role": "assistant", "content": "", "tool_calls": [call]}]

    moment = datetime.datetime(2026, 1, 1)
    pq.write_table(pa.table({"messages": [talk(moment)]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="JSON"):
        prepare(Source(str(tmp_path / "a.parquet")), tokenizer, num_proc=1)


def test_what_a_folder_says_of_itself_is_not_read_and_the_rest_is(tmp_path):
    names = ["data.txt", "README.md", "README_zh.md", "LICENSE_DATA.txt", "notice-board.txt", "licensed.txt", "CHANGELOG.md"]
    for name in names:
        (tmp_path / name).write_text("x")
    assert [path.name for path in Source(str(tmp_path)).files()] == ["data.txt", "licensed.txt", "notice-board.txt"]


def test_reasons_are_counted_and_not_collected(tokenizer, jsonl):
    """A reason quotes its record, so a million bad ones would have a million."""
    path = jsonl([*({"text": number} for number in range(500)), {"text": "good"}])
    report = prepare(Source(path), tokenizer, num_proc=1, on_bad_record="quarantine").report
    assert sum(count for count, _ in report.dropped.values()) == 500
    assert len(report.dropped) <= 101


def test_a_reason_does_not_move_the_cursor(tokenizer_folder, jsonl):
    path = jsonl([{"text": "good"}, {"text": "hello", "\x1b]0;evil\x07\x1b[2J": 1}, {"\x1b[2J": 1}])
    data = TextDataModule([Source(path)], tokenizer=str(tokenizer_folder), seq_len=32, on_bad_record="quarantine",
                          bad_record_limit=1.0)
    data.prepare_data()
    data.setup("fit")
    assert "\x1b" not in "\n".join(data.summary())


def test_a_store_that_another_user_writes_is_not_removed(tokenizer, jsonl):
    """Its lock cannot be opened here, and that is no reason to stop."""
    store = prepare(Source(jsonl([{"text": "one"}], "a.jsonl")), tokenizer, num_proc=1)
    others = store.folder.parent / "other.tmp-1"
    others.mkdir()
    (store.folder.parent / "other.lock").mkdir()        # cannot be opened either, for root too
    prepare(Source(jsonl([{"text": "two"}], "b.jsonl")), tokenizer, num_proc=1)
    assert others.is_dir()


@pytest.mark.parametrize(("keys", "where"), [
    ({"seed": -1}, "data.seed"), ({"chat_template": "{{ x }}" * 100}, "data.chat_template"),
    ({"chat_template": "LATIN"}, "data.chat_template"), ({"path": "~nouser/x.jsonl"}, "data.sources"),
    ({"path": "x" * 300 + ".jsonl"}, "")])
def test_settings_without_effect_are_refused(keys, where, tokenizer_folder, jsonl, tmp_path):
    (tmp_path / "latin.jinja").write_bytes(b"\xe9\xff")
    keys = {name: str(tmp_path / "latin.jinja") if value == "LATIN" else value for name, value in keys.items()}
    path = keys.pop("path", None) or jsonl([{"text": "good"}])
    data = TextDataModule([Source(path)], tokenizer=str(tokenizer_folder), seq_len=32, **keys)
    with pytest.raises(InputError) as caught:
        data.prepare_data()
    assert where in caught.value.where
