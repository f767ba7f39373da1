"""If this breaks: a damaged, mislabelled or changing file causes a traceback, a hang, or wrong text."""

import codecs
import csv
import gzip
import io
import json
import os

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lit_llm.data.records import textfile
from lit_llm.data.records.readers import scan_file
from lit_llm.data.records.record import LongText
from lit_llm.data.records.sources import Source
from lit_llm.data.tokens.prepare import prepare
from lit_llm.errors import InputError
from tests.data.test_sources import faults, records, write

QUICK = {"suppress_health_check": [HealthCheck.function_scoped_fixture], "deadline": None}
CELLS = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=20)
ROWS = st.lists(st.fixed_dictionaries({"text": CELLS, "n": st.integers(-9, 9)}), min_size=1, max_size=8)


def zstd(content):
    return pyarrow.compress(content, codec="zstd", asbytes=True)


# ---- what is valid comes out as it went in -------------------------------------------------------------------------

@settings(max_examples=60, **QUICK)
@given(ROWS, st.sampled_from(["lines", "line", "indented"]), st.booleans(), st.sampled_from([bytes, gzip.compress, zstd]))
def test_json_comes_out_as_it_went_in(tmp_path, monkeypatch, rows, form, ascii_only, pack):
    """Also where a block ends within a record or a character."""
    monkeypatch.setattr(textfile, "BLOCK", 7)
    if form == "lines":
        content = "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
    else:
        content = json.dumps(rows, ensure_ascii=ascii_only, indent=1 if form == "indented" else None)
    assert records(write(tmp_path, "a.json", pack(content.encode()))) == rows


@settings(max_examples=60, **QUICK)
@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=6), st.sampled_from([",", ";", "\t"]), st.booleans())
def test_csv_comes_out_as_it_went_in(tmp_path, rows, delimiter, bom):
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=delimiter, quoting=csv.QUOTE_ALL).writerows([("prompt", "completion"), *rows])
    content = codecs.BOM_UTF8 * bom + out.getvalue().encode()
    assert [tuple(row.values()) for row in records(write(tmp_path, "a.csv", content))] == rows


def test_csv_of_long_and_broken_fields(tmp_path):
    assert records(write(tmp_path, "a.csv", "text\n" + "x" * 200_000 + "\n"))[0]["text"] == "x" * 200_000
    with pytest.raises(InputError, match=r"b\.csv:2: not CSV: unexpected end of data"):
        records(write(tmp_path, "b.csv", 'text\n"never closed\nmore\n'))
    with pytest.raises(InputError, match=r"c\.csv:1: the header contains 'a' twice"):
        records(write(tmp_path, "c.csv", "a,b,a\n1,2,3\n"))


def test_arrow_in_both_its_forms_and_without_what_arrow_fills_up(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "q", "tool_calls": None},
                          {"role": "assistant", "content": "", "tool_calls": [{"f": {"a": 1, "b": None}}]}]}]
    table = pyarrow.Table.from_pylist(rows)
    for name, new in (("file.arrow", pyarrow.ipc.new_file), ("stream.arrow", pyarrow.ipc.new_stream)):
        with new(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table)
        assert records(str(tmp_path / name)) == [{"messages": [
            {"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [{"f": {"a": 1}}]}]}]


# ---- what is not ---------------------------------------------------------------------------------------------------

WRONG = [
    ("a.jsonl", b'{"a": 1}\n{"text": "x\\q"}\n', r"a\.jsonl:2:12: not JSON: Invalid \\escape"),
    ("a.jsonl", '{"a": 1}\n{"text": "你\udcff"}\n'.encode(errors="surrogateescape"), r"a\.jsonl:2:12: not UTF-8: byte 0xff"),
    ("a.jsonl", b'{"a": 1, "a": 2}\n', r"a\.jsonl:1: .*the key 'a' occurs twice"),
    ("a.json", b'[{"a": 1}, {"a": 2}, {"b": }]', r"a\.json:1:28: not JSON"),
    ("a.json", b'[{"a": 1},\n {"a": 2}] junk', r"a\.json:2:10: there is content after"),
    ("a.txt", "一二\n三\0".encode(), r"a\.txt:2:2: a NUL byte"),
    ("a.txt", "第一行\n第二行\n".encode("gbk"), r"a\.txt:1:1: not UTF-8.*GBK\n.*iconv -f GB18030"),
    ("a.txt", "caf\xe9 au lait\n".encode("cp1252"), r"a\.txt:1:4: not UTF-8: byte 0xe9\n.*CP1252"),
    ("a.jsonl", ('{"text": "' + "中文" * 40 + '"}').encode("utf-16-le"), "this is UTF-16LE.*\n.*iconv -f UTF-16LE"),
    ("a.txt", ("一个人，二\n" * 9).encode("utf-16-be"), "this is UTF-16BE"),
    ("a.csv", "text\n你好\n".encode("utf-16"), "this is UTF-16,.*\n.*iconv -f UTF-16 "),
    ("a.txt", "text".encode("utf-32"), "this is UTF-32"),
    ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:1d\nsize 9\n", "Git LFS pointer"),
    ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:1d\nsize 9\n", "Git LFS pointer"),
    ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 9)[:-9], r"a\.jsonl\.gz:?\d*: .*(is truncated|cannot be read)"),
    ("a.jsonl.zst", zstd(b'{"a": 1}\n' * 9)[:-9], r"a\.jsonl\.zst:?\d*: .*(is truncated|cannot be read)")]


@pytest.mark.parametrize(("name", "content", "message"), WRONG, ids=[message for *_, message in WRONG])
def test_what_is_wrong_is_named_with_line_and_column(tmp_path, name, content, message):
    with pytest.raises(InputError, match=f"(?s){message}"):
        records(write(tmp_path, name, content))


def test_a_record_that_shares_its_line_has_a_column(tmp_path):
    path = write(tmp_path, "a.json", '[{"a": 1}, {"a": 2},\n{"a": 3}]')
    assert [where for _, where in Source(path).read()] == [f"{path}:1", f"{path}:1:12", f"{path}:2"]


def test_pipes_and_dead_links_are_named(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    with pytest.raises(InputError, match=r"pipe\.jsonl: not a regular file"):
        records(str(tmp_path / "pipe.jsonl"))
    with pytest.raises(InputError, match="no readable file here"):
        Source(f"{tmp_path}/*.jsonl").files()
    with pytest.raises(InputError, match=r"loop\.jsonl: a broken symbolic link"):
        Source(str(tmp_path / "loop.jsonl")).files()
    with pytest.raises(InputError, match="no readable file here"):
        Source(str(tmp_path)).files()


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt"])
def test_a_file_that_changes_meanwhile_is_named(tmp_path, name):
    path = write(tmp_path, name, '{"text": "a"}\n{"text": "b"}\n')
    records = scan_file(tmp_path / name, document="line")
    next(records)
    with open(path, "a", encoding="utf-8") as stream:
        stream.write('{"text": "c"}\n')
    with pytest.raises(InputError, match=f"{name}: the file changed while it was read"):
        list(records)


def test_a_line_without_end_is_no_line(tmp_path, monkeypatch):
    monkeypatch.setattr(textfile, "LONGEST", 1000)
    with pytest.raises(InputError, match=r"a\.jsonl:2: a line has .* more than"):
        records(write(tmp_path, "a.jsonl", '{"a": 1}\n{"a": "' + "x" * 2000))


PACK = {"": bytes, ".gz": gzip.compress, ".zst": zstd}


@settings(max_examples=250, **QUICK)
@given(st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt", "a.parquet", "a.arrow"]), st.sampled_from(sorted(PACK)),
       st.one_of(st.binary(max_size=80), st.text('[]{}",:\\ud8\n\r 01a\x00;\ufeff', max_size=60).map(str.encode)),
       st.integers(0, 9), st.sampled_from(["auto", "line", "paragraph"]))
def test_any_bytes_are_records_or_an_error_with_a_place(tmp_path, name, ending, content, lost, document):
    table = name.endswith((".parquet", ".arrow"))
    packed = PACK["" if table else ending](content)
    path = write(tmp_path, name if table else name + ending, packed[:len(packed) - lost])
    if table and lost:
        return                                          # a library opens these; a few examples do
    try:
        for record, place in Source(path, document=document).scan():
            assert path in str(place)
            if isinstance(record, LongText):
                assert all(isinstance(block, str) for block in record.blocks)
            else:
                assert isinstance(record, dict | str | InputError)
                assert not isinstance(record, InputError) or not record.where or record.where.startswith(path)
    except InputError as error:
        assert path in str(error)


# ---- folders -------------------------------------------------------------------------------------------------------

def test_a_folder_is_read_for_its_data(tmp_path):
    for name in ("README.md", "LICENSE.txt", "dataset_info.json", "notes.md", "a.jsonl", ".cache/b.jsonl", "in/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path, name, '{"text": "x"}\n')
    assert [str(path.relative_to(tmp_path)) for path in Source(str(tmp_path)).files()] == ["a.jsonl", "in/c.txt", "notes.md"]


def test_a_folder_of_splits_gives_the_one_asked_for(tmp_path):
    for name in ("train-00000.jsonl", "test.jsonl", "valid.jsonl", "other.jsonl"):
        write(tmp_path, name, '{"text": "x"}\n')
    assert [path.name for path in Source(str(tmp_path)).files()] == ["train-00000.jsonl"]
    assert [path.name for path in Source(str(tmp_path), split="validation").files()] == ["valid.jsonl"]
    with pytest.raises(InputError, match="have the splits test, train, validation, but not 'dve'"):
        Source(str(tmp_path), split="dve").files()
    (tmp_path / "valid.jsonl").unlink()
    (tmp_path / "test.jsonl").unlink()
    assert len(Source(str(tmp_path)).files()) == 2       # the name of a single split distinguishes nothing


# ---- what was mended is counted ------------------------------------------------------------------------------------

@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_reported(tmp_path, tokenizer, content):
    with pytest.raises(InputError, match=r"a\.jsonl: no record found"):
        prepare(Source(write(tmp_path, "a.jsonl", content)), tokenizer)


def test_what_was_mended_and_what_was_not_read_is_counted(tmp_path, tokenizer):
    write(tmp_path, "a.txt", codecs.BOM_UTF8 + b"one\r\ntwo\r\n")
    write(tmp_path, "b.txt", b"one\r\n")
    report = prepare(Source(str(tmp_path), document="line"), tokenizer).report
    assert (report.kept, report.mended) == (3, {"CRLF line ends converted to LF": 2, "byte order mark removed": 1})
    turns = [{"role": "user", "content": "q", "id": 1}, {"role": "assistant", "content": "I am {{name}}."}]
    path = write(tmp_path, "c.jsonl", json.dumps({"messages": turns, "source": "web"}) + "\n")
    assert prepare(Source(path), tokenizer).report.notes == {
        "the key 'source' is not used": 1, "the key 'id' of a message is not used": 1, "a {{placeholder}} is not filled in": 1}
    assert faults(path) == []
