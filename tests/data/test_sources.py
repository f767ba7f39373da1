"""If this breaks: a published file is misread, or its error is a traceback or names the wrong line."""

import codecs
import gzip
import json
from pathlib import Path

import pytest

from lit_llm.data.records.sources import Source, is_hub
from lit_llm.errors import InputError


def write(folder, name, content):
    path = Path(folder) / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def records(path, **settings):
    return [record for record, _ in Source(path, **settings).read()]


def faults(path):
    return [(record.what, str(place)) for record, place in Source(path).scan() if isinstance(record, InputError)]


# ---- JSON ------------------------------------------------------------------------------------------------------------

ROWS = [{"text": "one"}, {"text": "二\n"}, {"text": "three"}]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)


@pytest.mark.parametrize(("name", "content"), [
    ("a.jsonl", LINES), ("a.jsonl", LINES.replace("\n", "\r\n\r\n") + "\r\n"),
    ("a.jsonl", codecs.BOM_UTF8 + LINES.encode()),
    ("a.jsonl.gz", LINES), ("a.json", json.dumps(ROWS)), ("a.json", json.dumps(ROWS, indent=2)),
    ("a.json", LINES), ("a.json", "\n".join(json.dumps(row, indent=1) for row in ROWS)), ("a.jsonl", json.dumps(ROWS)),
    ("a.json", codecs.BOM_UTF8 + json.dumps(ROWS).encode()), ("a.json.gz", json.dumps(ROWS))])
def test_json_in_all_its_forms(tmp_path, name, content):
    packed = gzip.compress(content.encode()) if name.endswith(".gz") else content
    assert records(write(tmp_path, name, packed)) == ROWS


def test_each_record_has_its_line(tmp_path):
    assert [where for _, where in Source(write(tmp_path, "a.jsonl", '{"a": 1}\n\n{"a": 2}\n')).read()] == [
        f"{tmp_path}/a.jsonl:1", f"{tmp_path}/a.jsonl:3"]
    assert [where for _, where in Source(write(tmp_path, "b.json", '[\n{"a":\n 1},\n\n{"a": 2}]')).read()] == [
        f"{tmp_path}/b.json:2", f"{tmp_path}/b.json:5"]


def test_one_bad_line_does_not_kill_the_file(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"a": 1}\n{"a": \n{"a": 3}\n[4]\n')
    good = [record for record, _ in Source(path).scan() if not isinstance(record, InputError)]
    assert good == [{"a": 1}, {"a": 3}]
    assert [place for _, place in faults(path)] == [f"{path}:2", f"{path}:4"]
    with pytest.raises(InputError, match=r"""a\.jsonl:2:7: not JSON: Expecting value\n  It is near '{"a": '"""):
        records(path)


def test_a_broken_array_is_reported_with_its_line(tmp_path):
    with pytest.raises(InputError, match=r"(?s)a\.json:3:7: not JSON: Expecting value.*near .*oops"):
        faults(write(tmp_path, "a.json", '[\n{"a": 1},\n{"a": oops}\n]'))
    with pytest.raises(InputError, match=r"b\.json:2:1: the array is not closed"):
        faults(write(tmp_path, "b.json", '[{"a": 1},\n'))


@pytest.mark.parametrize(("content", "named"), [
    ('{"text": "你好，世界"}'.encode("gbk"), "GBK"), ('{"text": "hi"}'.encode("utf-16"), "UTF-16"),
    ('{"text": "hi"}'.encode("utf-16-le"), "UTF-16LE"), (b'{"text": "h\0i there, all"}', "NUL"),
    (b'{"text": "\\ud800"}', "surrogate"), (b'{"text": "\xff\xff"}', "not UTF-8"),
    (b"[" * 100_000, "nested"), (b'{"a": ' + b"1" * 5000 + b"}", "cannot be parsed")])
def test_what_is_not_text_is_named(tmp_path, content, named):
    with pytest.raises(InputError, match=named):
        records(write(tmp_path, "a.jsonl", content))


# ---- the rest --------------------------------------------------------------------------------------------------------

def test_csv_stays_verbatim(tmp_path):
    path = write(tmp_path, "a.csv", 'prompt,completion\n007,"NA\nline, two"\n"a ""b""",\n')
    assert records(path) == [{"prompt": "007", "completion": "NA\nline, two"}, {"prompt": 'a "b"', "completion": ""}]
    assert faults(write(tmp_path, "b.csv", "a,b\n1,2\n3\n")) == [
        ("the row has 1 fields, but the header has 2", f"{tmp_path}/b.csv:3")]


def test_tables(tmp_path):
    from datasets import Dataset

    rows = [{"text": "a", "n": 1}, {"text": "b", "n": 2}]
    Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    assert records(str(tmp_path / "a.parquet")) == records(str(tmp_path / "saved")) == rows
    with pytest.raises(InputError, match=r"bad\.parquet: .*parquet"):
        records(write(tmp_path, "bad.parquet", b"PAR1 no"))


@pytest.mark.parametrize(("document", "content", "expected"), [
    ("auto", "a\n\nb\r\nc", ["a\n\nb\nc"]),
    ("auto", "a\n\n  b \n<|endoftext|>\n\nc<|endoftext|>d\n<|endoftext|>\n", ["a\n\n  b \n", "\n\nc<|endoftext|>d\n"]),
    ("file", "a\n<|endoftext|>\nb", ["a\n<|endoftext|>\nb"]),
    ("paragraph", "\na\nb\n\n \n c\n", ["a\nb", " c"]),
    ("line", "a\n\n b\r\nc", ["a", " b", "c"])])
def test_documents_of_a_text_file(tmp_path, document, content, expected):
    assert records(write(tmp_path, "a.txt", codecs.BOM_UTF8 + content.encode()), document=document) == expected


def test_a_text_records_place_is_its_first_line(tmp_path):
    path = write(tmp_path, "a.txt", "a\nb\n<|endoftext|>\nc\n")
    assert [where for _, where in Source(path).read()] == [f"{path}:1", f"{path}:4"]


def test_folders_globs_and_samples(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("b.jsonl", "in/a.jsonl", "picture.png", ".hidden.jsonl"):
        write(tmp_path, name, '{"text": "x"}\n')
    assert [path.name for path in Source(str(tmp_path)).files()] == ["b.jsonl", "a.jsonl"]
    assert [path.name for path in Source(f"{tmp_path}/**/a*.jsonl").files()] == ["a.jsonl"]
    assert len(records("sample:conversations_val.jsonl")) > 0


def test_a_missing_path_is_reported_with_similar_names(tmp_path):
    write(tmp_path, "train.jsonl", "{}")
    write(tmp_path, "data.bin", "x")
    with pytest.raises(InputError, match=r"Did you mean 'train\.jsonl'\?"):
        Source(f"{tmp_path}/trian.jsonl").files()
    with pytest.raises(InputError, match="exists as far as"):
        Source(f"{tmp_path}/no/where/a.jsonl").files()
    with pytest.raises(InputError, match=r"unknown extension '\.bin'"):
        Source(f"{tmp_path}/data.bin").files()
    assert records(f"{tmp_path}/data.bin", format="text") == ["x"]
    with pytest.raises(InputError, match="Did you mean 'line'"):
        Source(f"{tmp_path}/train.jsonl", document="lines").files()
    with pytest.raises(InputError, match="no readable file here"):
        Source(f"{tmp_path}/*.csv").files()


def test_hub_ids_are_distinguished_from_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub("Salesforce/wikitext")
    (tmp_path / "data").mkdir()
    assert not any(map(is_hub, ["data/trian", "a/b.jsonl", "./a/b", "a/b/c", "wikitext", "sample:x.jsonl"]))


def test_without_the_hub_the_ways_around_are_named(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"(?s)nobody/nothing-there: .*HF_HOME.*HF_HUB_OFFLINE=1.*HF_ENDPOINT"):
        records("nobody/nothing-there")
