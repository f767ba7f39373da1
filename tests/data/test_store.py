"""If this breaks: a run trains on stale or incomplete tokens or on those of another source, or a bad record is ignored silently."""

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from lit_llm.data.inspect.terminal import _records
from lit_llm.data.records.record import Place
from lit_llm.data.records.sources import Source
from lit_llm.data.tokens.prepare import prepare
from lit_llm.data.tokens.store import SEQUENCE, Block, Writer
from lit_llm.errors import InputError
from lit_llm.text.conversation import Conversation, Document


def chat(question="q", answer="a"):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def bytes_of(store):
    return {path.name: path.read_bytes() for path in sorted(store.folder.iterdir())}


def test_the_store_holds_what_the_tokenizer_gives(tokenizer, jsonl):
    records = [chat("你好", "hi"), {"text": "a book"}, chat("q" * 30, "a" * 20)]
    store = prepare(Source(jsonl(records)), tokenizer)
    expected = [tokenizer.encode_conversation(Conversation.from_openai(records[0]["messages"]))[0],
                tokenizer.encode_document(Document("a book")),
                tokenizer.encode_conversation(Conversation.from_openai(records[2]["messages"]))[0]]
    assert len(store) == 3
    for number, (row, sequence) in enumerate(zip(store.sequences, expected, strict=True)):
        part = slice(row["offset"], row["offset"] + row["length"])
        assert store.tokens[part].tolist() == sequence.input_ids.tolist()
        assert (store.marks[part] & 1).astype(bool).tolist() == (sequence.labels != -100).tolist()
        assert row["supervised"] == (sequence.labels[1:] != -100).sum()
        assert store.place(number).endswith(f"data.jsonl:{number + 1}")
    assert store.report.tokens == len(store.tokens) == sum(map(len, expected))
    assert store.tokens.dtype == np.uint16
    assert store.sequences["ended"].tolist() == [0, 1, 0]


def test_reused_while_nothing_changes_and_rebuilt_when_something_does(tokenizer, jsonl):
    path = jsonl([chat("a", "b")])
    first = prepare(Source(path), tokenizer)
    born = (first.folder / "tokens.bin").stat().st_mtime_ns
    again = prepare(Source(path, weight=3.0), tokenizer)
    assert (again.key, (again.folder / "tokens.bin").stat().st_mtime_ns) == (first.key, born)
    others = {prepare(Source(path, format="messages"), tokenizer).key,
              prepare(Source(path), tokenizer, train_on="all").key,
              prepare(Source(jsonl([chat("a", "c")])), tokenizer).key}
    assert len(others | {first.key}) == 4


def test_killed_at_any_moment_the_next_run_makes_the_same_store(tokenizer, jsonl, tmp_path):
    source = Source(jsonl([chat(f"question {number}", f"answer {number}") for number in range(1000)]))
    cache = tmp_path / "cut"
    prepare(source, tokenizer, cache_dir=str(tmp_path / "warm"))
    began = time.monotonic()
    expected = prepare(source, tokenizer, cache_dir=str(tmp_path / "whole"))
    took, unfinished = time.monotonic() - began, 0
    for share in (0.02, 0.2, 0.5, 0.8, 0.95):
        child = os.fork()
        if not child:
            prepare(source, tokenizer, cache_dir=str(cache))
            os._exit(0)
        time.sleep(took * share)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        unfinished += len(list(cache.glob("*.tmp-*")))
    assert unfinished
    assert bytes_of(prepare(source, tokenizer, cache_dir=str(cache))) == bytes_of(expected)
    assert {entry.name for entry in cache.iterdir()} == {expected.key, expected.key + ".lock"}


def test_two_at_once_write_it_once(tokenizer, jsonl):
    path = jsonl([chat(f"q{number}", "a") for number in range(500)])
    with ThreadPoolExecutor(3) as pool:
        stores = list(pool.map(lambda _: prepare(Source(path), tokenizer), range(3)))
    assert len({store.key for store in stores}) == 1
    assert not list(stores[0].folder.parent.glob("*.tmp-*"))


BAD = [chat("a", "b"), {"text": "  "}, {"messages": [{"role": "user", "content": "alone"}]},
       {"instruction": "x", "output": ""}]


def test_error_stops_at_the_first_and_leaves_nothing(tokenizer, jsonl, tmp_path):
    with pytest.raises(InputError, match=r"data\.jsonl:3: no assistant message of this conversation is trained on"):
        prepare(Source(jsonl(BAD)), tokenizer, cache_dir=str(tmp_path / "cache"))
    assert [entry.suffix for entry in (tmp_path / "cache").iterdir()] == [".lock"]


def test_quarantine_sets_aside_and_counts(tokenizer, jsonl):
    path = jsonl(BAD)
    with open(path, "a", encoding="utf-8") as stream:
        stream.write('{"broken\n')
    store = prepare(Source(path), tokenizer, on_bad_record="quarantine")
    report = store.report
    assert (report.read, report.kept, report.quarantined) == (5, 1, 3)
    assert report.read == report.kept + sum(count for count, _ in report.dropped.values())
    assert report.dropped["the text is empty"] == [1, f"{path}:2"]
    aside = [json.loads(line) for line in (store.folder / "quarantine.jsonl").read_text().splitlines()]
    assert [line["where"] for line in aside] == [f"{path}:{number}" for number in (3, 4, "5:2")]
    assert aside[0]["record"] == BAD[2]
    assert "not JSON" in aside[2]["reason"]


def test_set_aside_records_come_with_the_advice_of_error_mode(tokenizer, jsonl):
    """The `columns` that would help are in the report, in quarantine.jsonl, and in the error if no record is kept."""
    odd = {"q": "What is it?", "a": "A kite."}
    with pytest.raises(InputError) as alone:
        prepare(Source(jsonl([odd])), tokenizer)
    assert "columns: {prompt: " in alone.value.fix
    store = prepare(Source(jsonl([odd, {"prompt": "q", "completion": "a"}])), tokenizer, on_bad_record="quarantine")
    assert set(store.report.fixes.values()) == {alone.value.fix}
    assert alone.value.fix in "\n".join(_records(store.report))
    assert json.loads((store.folder / "quarantine.jsonl").read_text())["fix"] == alone.value.fix
    with pytest.raises(InputError) as none:
        prepare(Source(jsonl([odd])), tokenizer, on_bad_record="quarantine")
    assert none.value.fix == alone.value.fix
    with pytest.raises(InputError) as flood:
        store.report.refuse_flood(0.1, "Mend them.")
    assert flood.value.fix == f"{alone.value.fix} Mend them."


def test_nothing_kept_is_an_error(tokenizer, jsonl):
    for records in ([], BAD[2:]):
        with pytest.raises(InputError, match="no record"):
            prepare(Source(jsonl(records)), tokenizer, on_bad_record="quarantine")


def test_a_document_longer_than_its_length_can_say_is_refused(tmp_path):
    part = np.zeros(1, SEQUENCE)
    part["length"] = 2**30
    items = [("text", Place("big.txt", 1))]
    writer = Writer(tmp_path, "big.txt", np.dtype("<u2"))

    def add(first, last):
        empty = Block(np.zeros(0, "<u2"), np.zeros(0, np.uint8), part, [], np.array([[first, last]]), 0, 0, 0, {})
        writer.add(empty, items, [first])

    add(True, False)
    with pytest.raises(InputError, match=r"big\.txt:1: a document has more than 2,147,483,647 tokens"):
        add(False, True)


def test_a_cache_that_cannot_be_written_is_named(tokenizer, jsonl, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cache cannot be written"):
        prepare(Source(jsonl([chat()])), tokenizer, cache_dir=str(tmp_path / "file" / "cache"))
