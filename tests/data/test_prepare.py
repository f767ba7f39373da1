"""If this breaks: a corpus gives other tokens if it is large, if several processes tokenize it, or if one of them is killed; or
a process is left behind.
"""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lit_llm.data.records import readers, textfile
from lit_llm.data.records.record import Place
from lit_llm.data.records.sources import Source
from lit_llm.data.tokens import prepare as preparing
from lit_llm.data.tokens.encode import SourceEncoder
from lit_llm.data.tokens.prepare import prepare
from lit_llm.data.tokens.progress import Progress
from lit_llm.data.tokens.store import Report
from lit_llm.errors import InputError
from lit_llm.text import cutting
from lit_llm.text.conversation import Document

ROOT = Path(__file__).resolve().parents[2]


def bytes_of(store):
    return {path.name: path.read_bytes() for path in sorted(store.folder.iterdir())}


@pytest.fixture
def small(monkeypatch):
    """Blocks, batches and pieces of some hundred characters, so that a small text has many."""
    for module, name, value in ((textfile, "BLOCK", 700), (readers, "LONG", 3000), (cutting, "PIECE", 1500),
                                (preparing, "BATCH_RECORDS", 7), (preparing, "BATCH_SIZE", 4000)):
        monkeypatch.setattr(module, name, value)


def records():
    """All that can happen to a record."""
    for number in range(60):
        yield {"messages": [{"role": "user", "content": f"q{number} 红"}, {"role": "assistant", "content": "a" * number + "b"}]}
        yield {"text": f"text {number} <|im_end|>" * (number % 4)}
        if number % 9 == 0:
            yield {"messages": [{"role": "user", "content": "alone"}]}


def test_several_processes_write_what_one_writes(tokenizer, jsonl, tmp_path, small):
    path = jsonl(records())
    made = [prepare(Source(path), tokenizer, on_bad_record="quarantine", num_proc=count, cache_dir=str(tmp_path / str(count)))
            for count in (1, 2, 3)]
    assert bytes_of(made[0]) == bytes_of(made[1]) == bytes_of(made[2])
    assert made[0].report.quarantined == 7
    assert made[0].report.read == len(list(records()))


def test_the_first_bad_record_is_named_with_any_number_of_processes(tokenizer, jsonl, small):
    path = jsonl([*list(records())[3:90]])
    messages = set()
    for count in (1, 2):
        with pytest.raises(InputError) as caught:
            prepare(Source(path), tokenizer, num_proc=count)
        messages.add(str(caught.value))
    assert len(messages) == 1


@pytest.mark.parametrize("kind", ["tiny", "stories", "qwen2"])
@pytest.mark.parametrize("name", ["hongloumeng.txt", "war_and_peace.txt", "wiki_demo.txt"])
def test_a_long_document_is_the_tokens_of_the_whole(kind, name, load, shared_data, tmp_path, small):
    """It is read in pieces that no rule of the tokenizer sees."""
    text = (shared_data / "pretrain" / name).read_text(encoding="utf-8-sig")[:40_000]
    file = tmp_path / "long.txt"
    file.write_text(text, encoding="utf-8")
    tokenizer = load(kind)
    store = prepare(Source(str(file)), tokenizer)
    assert len(store) == 1
    assert store.sequences[0]["supervised"] == len(store.tokens) - 1
    assert store.tokens.tolist() == tokenizer.encode_document(Document(text)).input_ids.tolist()
    assert len(list(tokenizer.pieces([text]))) > 5


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(words=st.lists(st.sampled_from(["kite", "的", " ", "\n", "\n\n", "  ", "<|im_end|>", "🙂", "é", "1", "'s", "\t"]), max_size=80),
       kind=st.sampled_from(["tiny", "stories", "qwen2"]), size=st.integers(1, 30))
@example(words=["kite"] * 5 + [" "] + ["kite"] * 8, kind="stories", size=1)       # a cut nearer to the start than the context
def test_pieces_are_read_as_their_document(words, kind, size, load):
    tokenizer, text = load(kind), "".join(words)
    before = cutting.PIECE, cutting.CONTEXT
    cutting.PIECE, cutting.CONTEXT = size, 24
    try:
        pieces = list(tokenizer.pieces([text[:7], text[7:]]))
    finally:
        cutting.PIECE, cutting.CONTEXT = before
    assert "".join(piece.text for piece, *_ in pieces) == text
    ids = np.concatenate(tokenizer.encode_pieces([piece for piece, *_ in pieces]))
    assert ids.tolist() == tokenizer.encode_text(text)


def test_many_long_documents_and_short_ones(tokenizer, tmp_path, small):
    """Between separator lines; each begins and ends where it should."""
    texts = ["a\nbc " * 9, "\n" + "long line\n" * 900, "x", " y\n" * 2000, "end"]
    file = tmp_path / "books.txt"
    file.write_text("\n<|endoftext|>\n".join(texts), encoding="utf-8")
    store = prepare(Source(str(file)), tokenizer, num_proc=2)
    assert store.sequences["ended"].all()
    assert [store.tokens[row["offset"]:row["offset"] + row["length"] - 1].tolist() for row in store.sequences] == [
        tokenizer.encode_text(text) for text in file.read_text().split("<|endoftext|>")]
    assert len(set(store.sequences["content"].tolist())) == len(texts)


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
def test_packed_files(kind, tokenizer, jsonl, tmp_path):
    import pyarrow

    path = Path(jsonl([{"text": f"text {number}"} for number in range(3000)]))
    raw = path.read_bytes()
    packed = gzip.compress(raw) if kind == "gzip" else pyarrow.compress(raw, codec="zstd", asbytes=True)
    file = tmp_path / ("data.jsonl.gz" if kind == "gzip" else "data.jsonl.zst")
    file.write_bytes(packed)
    assert (prepare(Source(str(file)), tokenizer).tokens == prepare(Source(str(path)), tokenizer).tokens).all()
    file.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(InputError, match=r"is truncated or damaged|cannot be read"):
        prepare(Source(str(file)), tokenizer)


def test_killed_with_its_processes_it_leaves_none_behind(tokenizer_folder, tokenizer, jsonl, tmp_path):
    path = jsonl([{"text": f"text {number} " * 50} for number in range(10_000)])
    code = (f"from lit_llm.data.tokens.prepare import prepare; from lit_llm.data.records.sources import Source; "
            f"from lit_llm.text.tokenizer import Tokenizer; prepare(Source({path!r}), Tokenizer.load({str(tokenizer_folder)!r}), "
            f"num_proc=2, cache_dir={str(tmp_path / 'cut')!r})")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, start_new_session=True)
    end = time.monotonic() + 60
    while len(members(process.pid)) < 3 and time.monotonic() < end:
        time.sleep(0.02)
    assert len(members(process.pid)) >= 3
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    while members(process.pid) and time.monotonic() < end:
        time.sleep(0.05)
    assert not members(process.pid)
    again = prepare(Source(path), tokenizer, num_proc=2, cache_dir=str(tmp_path / "cut"))
    assert bytes_of(again) == bytes_of(prepare(Source(path), tokenizer, num_proc=1, cache_dir=str(tmp_path / "whole")))


def under_way(child, here):
    return list(here.glob("*.tmp-*/tokens.bin")) and len(members(child)) > 2


def just_forked(child, here):
    """All the processes are there, and the one that forked them may be still about it."""
    lists = [Path(task, "children") for task in Path(f"/proc/{child}/task").glob("*")]
    return sum(len(file.read_text().split()) for file in lists) > 1


@pytest.mark.parametrize("moment", [under_way] + 4 * [just_forked] * (sys.platform == "linux"))
def test_ctrl_c_ends_them_all_and_leaves_nothing(moment, tokenizer, jsonl, tmp_path):
    """On a terminal every process of the group gets the signal, at any moment; none may print a traceback."""
    path, here, output = jsonl([{"text": f"text {number} " * 50} for number in range(20_000)]), tmp_path / "cut", tmp_path / "said"
    child = os.fork()
    if not child:
        os.setsid()
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), 2)
        try:
            prepare(Source(path), tokenizer, num_proc=2, cache_dir=str(here))
        except KeyboardInterrupt:
            os._exit(130)
        os._exit(0)
    end = time.monotonic() + 60
    while not moment(child, here):
        assert time.monotonic() < end
    os.killpg(child, signal.SIGINT)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130
    assert not members(child)
    assert output.read_text() == ""
    assert [entry.suffix for entry in here.iterdir()] == [".lock"]


def test_how_much_is_done_over_several_files(tmp_path, capsys, monkeypatch):
    """A packed file counts when it is through; of the others the place in them does."""
    for name, size in (("a.jsonl", 100), ("b.jsonl.gz", 300), ("c.jsonl", 600)):
        (tmp_path / name).write_bytes(b"x" * size)
    progress = Progress(str(tmp_path), Source(str(tmp_path)).sizes())
    shares = [progress.share(Place(str(tmp_path / name), 1, share=share))
              for name, share in (("a.jsonl", 0.5), ("b.jsonl.gz", 1.0), ("c.jsonl", 0.0), ("c.jsonl", 0.5), ("c.jsonl", 1))]
    assert shares == [0.05, 0.1, 0.4, 0.7, 1.0]
    progress.line.began -= 100
    progress.line.shown -= 100
    progress.show(Report("x", read=10, tokens=5000), Place(str(tmp_path / "c.jsonl"), 1, share=0.5))
    assert re.search(r"10 records, 5,000 tokens, 50 tokens/s, 70% done, 43 s left", capsys.readouterr().err)


def test_a_long_document_says_how_much_of_it_is_done(tokenizer, tmp_path, small):
    file = tmp_path / "book.txt"
    file.write_text("a line of a book\n" * 2000)
    shares = [place.share for _, place in SourceEncoder(Source(str(file)), tokenizer).items()]
    assert len(shares) > 5
    assert shares == sorted(shares)
    assert shares[len(shares) // 2] == pytest.approx(0.5, abs=0.15)
    assert shares[-1] == 1


def members(group):
    """Living processes of a process group."""
    out = subprocess.run(["ps", "-eo", "pgid,pid,stat"], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in out.splitlines()[1:]]
    return [int(pid) for pgid, pid, stat in rows if int(pgid) == group and not stat.startswith("Z")]


def test_a_killed_process_is_reported(tokenizer, jsonl, small):
    """The kernel kills one when memory runs out; the run must not hang."""
    path = jsonl([{"text": "x"}] * 500)
    parent = os.getpid()

    def work(batch):
        if os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)

    batches = preparing._batches(SourceEncoder(Source(path), tokenizer).items())
    with pytest.raises(InputError, match="killed"):
        list(preparing._blocks(batches, work, 2))


def test_a_json_array_is_read_without_holding_it(tmp_path, small):
    rows = [{"text": f"\n{number} ]}}" * 40, "more": [{"deep": [1, 2]}, "\\u4e2d"]} for number in range(50)]
    file = tmp_path / "rows.json"
    for indent in (None, 2):
        file.write_text(json.dumps(rows, indent=indent))
        records = list(readers.scan_file(file))
        assert [record for record, _ in records] == rows
        text = file.read_text().split("\n")
        assert all(text[place.number - 1].lstrip(" [,").startswith("{") for _, place in records)
