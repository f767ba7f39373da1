"""If this breaks: one line of an untrusted file takes all memory or never ends; or a long text is trained on with other tokens
than the tokenizer gives.
"""

import gzip
import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lit_llm.data.records import formats, readers, textfile
from lit_llm.data.records.sources import Source
from lit_llm.data.rows.mixture import Mixture
from lit_llm.data.stream.chunks import Stream
from lit_llm.data.tokens.encode import SourceEncoder
from lit_llm.data.tokens.prepare import prepare
from lit_llm.errors import InputError
from lit_llm.text import cutting, encoder
from lit_llm.text.conversation import Conversation, Message
from tests.conversations import QWEN3, QWEN25

ROOT = Path(__file__).resolve().parents[2]
KINDS = ["tiny", "stories", "qwen2"]


@pytest.fixture
def short(monkeypatch):
    """A text of a thousand characters is long here, and one of some thousands without a place to cut is refused."""
    for module, name, value in ((encoder, "WHOLE", 1000), (cutting, "PIECE", 300), (cutting, "WINDOW", 1500),
                                (cutting, "UNCUT", 6000), (cutting, "SLICE", 700)):
        monkeypatch.setattr(module, name, value)


# ---- the same tokens -------------------------------------------------------------------------------------------------

def texts(shared_data):
    draw = random.Random(1)
    english, chinese = ((shared_data / "pretrain" / name).read_text(encoding="utf-8-sig")[:7_000]
                        for name in ("war_and_peace.txt", "hongloumeng.txt"))
    yield "english", english
    yield "english in one line", " ".join(english.split())
    yield "chinese", chinese
    yield "chinese without line ends", "".join(chinese.split())
    yield "runs of spaces", "".join(word + " " * draw.choice([1, 1, 2, 200]) + "\n" * draw.choice([0, 0, 1, 150])
                                    for word in english.split())
    yield "no spaces", "".join(english.split())
    yield "long words", " ".join(word * draw.choice([1, 1, 60]) for word in english.split())[:7_000]
    yield "digits and marks", "".join(draw.choice("0123456789 .,-+(") for _ in range(5000))
    yield "marks that combine", "".join(char + draw.choice(["", "\u0301"]) for char in english[:4000])
    yield "any characters", "".join(chr(draw.choice([*range(32, 0x2FF), *range(0x3000, 0x9FFF)])) for _ in range(4000))
    yield "control tokens", english[:3000] + "<|im_end|>".join(english[3000:7000].split("the"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_text_is_the_tokens_of_the_whole(kind, load, shared_data, short):
    """The oracle is the library on the whole text."""
    reader = load(kind)._encoder
    for name, text in texts(shared_data):
        spelled = bool(reader._added.search(text))
        whole = (reader._bare if spelled else reader._backend).encode(text, add_special_tokens=False).ids
        ids = reader.texts([cutting.Piece("", text)])[0]
        if isinstance(ids, InputError):                 # no certain place to split, and never within words
            assert "without a place where the boundary" in ids.what
            assert name in ("runs of spaces", "digits and marks", "any characters"), name
        else:
            assert ids.tolist() == whole, name
            assert len(list(reader.pieces([text]))) > 4, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["a" * 20_000, " " * 20_000, "\n" * 20_000, "\U0001f44d" * 20_000, "1" * 20_000])
def test_where_no_cut_is_sure_a_long_text_is_refused_and_a_short_one_read(kind, text, load, short):
    reader = load(kind)._encoder
    assert "without a place where the boundary" in reader.texts([cutting.Piece("", text)])[0].what
    assert reader.texts([cutting.Piece("", text[:5000])])[0].tolist() == reader._backend.encode(
        text[:5000], add_special_tokens=False).ids


@pytest.mark.parametrize(("model", "expected"), [("of the", [False, True]), ("the cat", [True, False])])
def test_no_cut_where_a_token_of_the_vocabulary_reaches_over(model, expected):
    """Of two places that look alike, only the one may be cut over which no token reaches."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    words = ["of", " the", " cat", model]
    vocabulary = dict.fromkeys([*"".join(words), "of", " t", "th", " th", " the", "the", " c", "ca", " ca", " cat", model])
    backend = Tokenizer(BPE({token: place for place, token in enumerate(vocabulary)},
                            [("o", "f"), (" ", "t"), (" t", "h"), (" th", "e"), (" ", "c"), (" c", "a"), (" ca", "t"),
                             *([("of", " the")] if model == "of the" else [])]))
    cutter = cutting.Cutter(backend)
    may_cut = [cutter._clean(backend, left, right, parted=False) is not None
               for left, right in (("cat of", " the cat"), ("of the", " cat of"))]
    assert may_cut == expected


SAID = ["kite <|im_end|> 的，风筝。" * 200, "hi", "one two three.\n" * 300, "x" * 900, "yes  <think> no" * 150]


@pytest.mark.parametrize("kind", [*KINDS, QWEN25, QWEN3])
@pytest.mark.parametrize("train_on", ["assistant", "all"])
def test_a_long_conversation_is_read_as_a_short_one(kind, train_on, load, monkeypatch):
    tokenizer = load(kind)
    talks = []
    for turn in range(len(SAID)):
        texts = [SAID[(turn + place) % len(SAID)] for place in range(4)]
        if kind == QWEN3:
            texts = [text.replace("<think>", "") for text in texts]
        talks.append(Conversation(tuple(Message(("user", "assistant")[place % 2], text) for place, text in enumerate(texts))))

    def read():
        out = []
        for talk in talks:
            try:
                sequences = tokenizer.encode_conversation(talk, train_on=train_on)
                out.append([[part.tolist() for part in (one.input_ids, one.labels, one.speakers)] for one in sequences])
                out.append(tokenizer.encode_prompt(talk.upto(3)))
            except InputError as error:
                out.append(error.what)
        return out

    whole = read()
    assert sum(not isinstance(one, str) for one in whole) >= 4
    for name, value in (("WHOLE", 500), ("PIECE", 200), ("WINDOW", 500)):
        monkeypatch.setattr(encoder if name == "WHOLE" else cutting, name, value)
    assert read() == whole


# ---- memory ----------------------------------------------------------------------------------------------------------

CHILD = """
import json, resource, sys
import datasets
from lit_llm.data.tokens.prepare import prepare
from lit_llm.data.records.sources import Source
from lit_llm.errors import InputError
from lit_llm.text.tokenizer import Tokenizer

tokenizer = Tokenizer.load(sys.argv[1])
held = [int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")][0] * 1024
resource.setrlimit(resource.RLIMIT_DATA, (held + int(sys.argv[2]),) * 2)
for path in sys.argv[3:]:
    try:
        print(json.dumps(prepare(Source(path), tokenizer, num_proc=1, on_bad_record="quarantine").report.kept))
    except InputError as error:
        print(json.dumps(str(error)))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the process's memory from /proc")
def test_a_long_record_takes_some_tens_of_bytes_for_each_of_its_bytes(tmp_path, tiny_tokenizer, shared_data):
    """Read whole, each of these took 200 bytes for a byte. Of the 120 here, some are for what libraries import late."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = " ".join((shared_data / "pretrain/war_and_peace.txt").read_text(encoding="utf-8-sig").split())[:1_000_000]
    talk = {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}]}
    answer = {"prompt": "hi", "completion": text}
    files = {"a.jsonl": json.dumps({"text": text}), "b.json": json.dumps([{"text": text}]), "c.jsonl": json.dumps(talk),
             "d.jsonl": json.dumps(answer), "e.txt": text, "f.csv": '"text"\n"' + text.replace('"', "'") + '"\n'}
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    pq.write_table(pa.table({"text": [text]}), tmp_path / "g.parquet")
    paths = [str(tmp_path / name) for name in [*files, "g.parquet"]]
    child = subprocess.run([sys.executable, "-c", CHILD, tiny_tokenizer, str(120 << 20), *paths], capture_output=True, text=True,
                           cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=300)
    assert [json.loads(line) for line in child.stdout.splitlines()] == [1] * len(paths), child.stderr[-2000:]


SCAN = """
import resource, sys
from lit_llm.data.records.sources import Source

next(iter(Source(sys.argv[2]).scan()))
held = [int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")][0] * 1024
resource.setrlimit(resource.RLIMIT_DATA, (held + int(sys.argv[3]),) * 2)
print(sum(len(record["text"]) for record, _ in Source(sys.argv[1]).scan()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the process's memory from /proc")
def test_a_cell_that_a_table_repeats_is_unpacked_a_few_rows_at_a_time(tmp_path):
    """Parquet stores equal cells once, so half a megabyte can unpack to a gigabyte."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["word " * 1_000_000] * 100}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "b.parquet")
    assert (tmp_path / "a.parquet").stat().st_size < 1 << 20
    words = [sys.executable, "-c", SCAN, str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet"), str(200 << 20)]
    child = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=120)
    assert child.stdout.strip() == str(5_000_000 * 100), child.stderr[-2000:]


# ---- what is too large, by name --------------------------------------------------------------------------------------

@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(textfile, "LONGEST", 4000)
    monkeypatch.setattr(readers, "LONGEST", 4000)
    monkeypatch.setattr(textfile, "BLOCK", 1000)


GOOD = '{"text": "good"}\n'


def test_a_line_that_is_too_long_is_a_bad_record_among_good_ones(tokenizer, tmp_path, small):
    path = tmp_path / "a.jsonl"
    path.write_text(GOOD + '{"text": "' + "x " * 5000 + '"}\n\n' + GOOD)
    with pytest.raises(InputError, match=r"a\.jsonl:2: a line has .* more than"):
        prepare(Source(str(path)), tokenizer, num_proc=1)
    store = prepare(Source(str(path)), tokenizer, num_proc=1, on_bad_record="quarantine")
    assert (store.report.read, store.report.kept, store.report.quarantined) == (3, 2, 1)
    assert store.place(1).endswith(":4")
    entry = json.loads((store.folder / "quarantine.jsonl").read_text())
    assert entry["where"].endswith("a.jsonl:2")
    assert "data.on_bad_record" in entry["fix"]


@pytest.mark.parametrize(("document", "row", "what"), [("line", "x y " * 2000, "line"), ("paragraph", "x y\n" * 2000, "paragraph")])
def test_so_is_a_line_or_a_paragraph_of_a_text_file(document, row, what, tokenizer, tmp_path, small):
    path = tmp_path / "a.txt"
    path.write_text(f"good\n\n{row}\n\nalso\n")
    records = list(Source(str(path), document=document).scan())
    assert [record for record, _ in records if isinstance(record, str)] == ["good", "also"]
    wrong, place = records[1]
    assert f"a {what} has" in wrong.what
    assert str(place).endswith("a.txt:3")


def test_so_is_a_record_of_a_table(tmp_path, tokenizer, small):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["good", "x y " * 2000, "also"]}), tmp_path / "a.parquet")
    report = prepare(Source(str(tmp_path / "a.parquet")), tokenizer, num_proc=1, on_bad_record="quarantine").report
    assert (report.kept, report.quarantined) == (2, 1)


def test_a_packed_table_that_unpacks_to_far_more_is_refused(tmp_path, small):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["a" * 3000] * 1000}), tmp_path / "a.parquet", use_dictionary=False, compression="zstd")
    with pytest.raises(InputError, match=r"a\.parquet: .* unpack to"):
        list(Source(str(tmp_path / "a.parquet")).scan())


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.csv", 'text\ngood\n"x\n' + "y\n" * 5000, r"a\.csv:3: a row is larger than .*\n.*quote not closed"),
    ("a.csv", "text\ngood\n" + "x " * 9000 + "\n", r"a\.csv:3: a line has .* more than"),
    ("a.json", '[{"text": "good"}, {"text": "' + "x " * 9000, r"a\.json:1:20: a value is larger than|not closed"),
    ("a.txt", "\n" * 9000 + "x", r"a\.txt:\d+: .*more than .* white space"),
])
def test_the_next_record_cannot_be_found(name, content, message, tmp_path, small, monkeypatch):
    from lit_llm.data.records import jsonfile

    monkeypatch.setattr(jsonfile, "LONGEST", 4000)
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError) as caught:
        list(Source(str(tmp_path / name)).scan())
    assert re.search(message, str(caught.value)), caught.value


@pytest.mark.parametrize(("ending", "document"), [("jsonl", "auto"), ("json", "auto"), ("csv", "auto"), ("txt", "line"), ("txt", "paragraph"),
                                                  ("txt", "auto")])
def test_a_small_packed_file_of_very_many_line_ends(ending, document, tmp_path, monkeypatch):
    """100 KB that unpack to 80 million line ends."""
    if ending == "csv":                                 # its reader looks at each line
        monkeypatch.setattr(textfile, "BLANK", 300_000)
    path = tmp_path / f"a.{ending}.gz"
    path.write_bytes(gzip.compress(b"\n" * 8_000_000) * 10)
    began = time.process_time()
    with pytest.raises(InputError, match=rf"a\.{ending}\.gz:\d+: .*more than .* (consecutive blank lines|white space)"):
        list(Source(str(path), document=document).scan())
    assert time.process_time() - began < 20


def test_rows_of_empty_cells_are_not_gathered_by_the_hundred(tmp_path):
    """Each takes some megabytes of memory although it is empty."""
    from lit_llm.data.tokens.prepare import BATCH_SIZE, _batches

    (tmp_path / "a.csv").write_text("text" + ",c".join(map(str, range(30_000))) + "\n" + ("," * 29_999 + "\n") * 40)
    batches = list(_batches(Source(str(tmp_path / "a.csv")).scan()))
    assert max(len(batch) for batch in batches) <= BATCH_SIZE // (8 * 30_000) + 1


def test_a_text_that_cannot_be_read_on_is_taken_back(tokenizer, tmp_path, monkeypatch):
    """The beginning of the document was written already."""
    for module, name, value in ((textfile, "BLOCK", 700), (readers, "LONG", 3000), (cutting, "PIECE", 300), (cutting, "WINDOW", 500),
                                (cutting, "UNCUT", 2000)):
        monkeypatch.setattr(module, name, value)
    good, bad = "one two " * 600, "one two\n" * 400 + "\U0001f44d" * 9000 + "\n"
    (tmp_path / "a.txt").write_text(f"{good}\n<|endoftext|>\n{bad}<|endoftext|>\n{good}")
    (tmp_path / "b.txt").write_text(f"{good}\n<|endoftext|>\n{good}")
    with pytest.raises(InputError, match=r"a\.txt:3: .*without a place where the boundary"):
        prepare(Source(str(tmp_path / "a.txt")), tokenizer, num_proc=1)
    stores = [prepare(Source(str(tmp_path / name)), tokenizer, num_proc=1, on_bad_record="quarantine") for name in ("a.txt", "b.txt")]
    report, expected = (store.report for store in stores)
    assert (report.read, report.kept, report.quarantined) == (3, 2, 1)
    assert np.array(stores[0].tokens).tolist() == np.array(stores[1].tokens).tolist()
    assert (report.tokens, report.supervised, report.marks) == (expected.tokens, expected.supervised, expected.marks)
    streamed = Stream([SourceEncoder(Source(str(tmp_path / "a.txt")), tokenizer)], seq_len=64, packing="best_fit",
                      overlong="cut", seed=1, buffer=3000, on_bad_record="quarantine", bad_record_limit=1.0)
    chunks = streamed.chunks(streamed.beginning)
    assert any(sum(next(chunks).begin.bad) for _ in range(12))


# ---- what grows with the square --------------------------------------------------------------------------------------

MANY = 100_000


@pytest.mark.parametrize(("name", "content", "columns"), [
    ("a.csv", ",".join(f"c{number}" for number in range(MANY)) + "\n" + "1," * MANY + "\n" + "1" + ",1" * (MANY - 1) + "\n", {}),
    ("a.csv", ",".join(f"c{number}" for number in range(MANY)) + ",c7\n", {}),
    ("a.jsonl", json.dumps({f"question{number}": 1 for number in range(MANY)}), {"text": "questionx"}),
    ("a.jsonl", "{" + ",".join(f'"k{number}": 1' for number in range(MANY)) + ', "k7": 1}', {}),
    ("a.jsonl", json.dumps({"messages": [{"role": "user", "content": "x", "contemt": 1}] * 5000}), {}),
    ("a.jsonl", json.dumps({"messages": [{"role": "user", "content": "x"}] * MANY}), {}),
    ("a.jsonl", json.dumps({"messages": [{"role": "user", "content": "x"} | {f"k{number}": 1 for number in range(MANY)}]}), {}),
    ("a.jsonl", json.dumps({"messages": [{"role": "x" * 1_000_000, "content": "x"}]}), {}),
], ids=["rows", "header", "columns", "twice", "typo", "messages", "keys of a message", "role"])
def test_a_hundred_thousand_of_anything_take_a_moment(name, content, columns, tmp_path, tokenizer):
    (tmp_path / name).write_text(content)
    began = time.process_time()
    with pytest.raises(InputError):
        prepare(Source(str(tmp_path / name), columns=columns), tokenizer, num_proc=1)
    assert time.process_time() - began < 5


def test_a_conversation_that_would_be_rendered_for_minutes_is_named(monkeypatch):
    def talk(count, size=1):
        return {"messages": [{"role": ("user", "assistant")[place % 2], "content": "x" * size} for place in range(count)]}

    assert len(formats.convert(talk(4000)).messages) == 4000
    with pytest.raises(InputError, match="4,002 messages; at most 4,000"):
        formats.convert(talk(4002))
    with pytest.raises(InputError, match="at most 2,000,000 characters are allowed"):
        formats.convert(talk(2000, 1100))


def test_weights_that_fill_the_memory_are_named(tokenizer, jsonl, monkeypatch):
    from lit_llm.data.rows import mixture
    from lit_llm.data.rows.corpus import Corpus

    stores = [prepare(Source(jsonl([{"text": f"{name} {number}"} for number in range(50)], f"{name}.jsonl")), tokenizer, num_proc=1)
              for name in "ab"]
    corpus = Corpus([(store, np.arange(50)) for store in stores], names=["a", "b"])
    monkeypatch.setattr(mixture, "COPIES", 500)
    assert len(Mixture(corpus, [1, 9], seq_len=16).first.segments.lengths) == 500
    with pytest.raises(InputError, match=r"b: with a weight of 1000, an epoch has 50,000 sequences of it"):
        Mixture(corpus, [1, 1000], seq_len=16)
