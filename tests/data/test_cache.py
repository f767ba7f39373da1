"""If this breaks: a rank waits forever for tokens, a damaged or stale store is trained on, or the cache is never cleaned up."""

import contextlib
import fcntl
import os
import re
import resource
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lit_llm.data.records.sources import Source
from lit_llm.data.tokens import cache
from lit_llm.data.tokens.prepare import prepare, wait_for
from lit_llm.errors import InputError


def rank(tmp_path, call, path, tokenizer, here, **more):
    """`prepare` or `wait_for` in a process of its own, and a function that gives what came of it."""
    out = tmp_path / f"{call.__name__}.said"
    child = os.fork()
    if not child:
        try:
            words = call(Source(path), tokenizer, cache_dir=str(here), **more).key
        except InputError as error:
            words = str(error)
        out.write_text(words)
        os._exit(0)

    def outcome():
        os.waitpid(child, 0)
        return out.read_text()
    return child, outcome


def until(true):
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_rank_waits_as_long_as_another_is_at_work(tokenizer, jsonl, tmp_path):
    path, here = jsonl([{"text": f"text {number} " * 50} for number in range(5000)]), tmp_path / "cache"
    _, outcome = rank(tmp_path, prepare, path, tokenizer, here)
    until(lambda: list(here.glob("*.tmp-*")))
    store = wait_for(Source(path), tokenizer, cache_dir=str(here), patience=0.1)
    assert store.key == outcome()
    assert store.report.kept == 5000


def test_a_waiting_rank_reports_why_the_other_failed(tokenizer, jsonl, tmp_path):
    path, here = jsonl([*[{"text": f"text {number} " * 50} for number in range(2000)], {"text": 3}]), tmp_path / "cache"
    _, heard = rank(tmp_path, wait_for, path, tokenizer, here, patience=50)
    time.sleep(0.2)
    _, outcome = rank(tmp_path, prepare, path, tokenizer, here)
    began = time.monotonic()
    words = heard()
    assert words == outcome()
    assert "data.jsonl:2001: text must be a string" in words
    assert time.monotonic() - began < 50


def test_a_killed_writer_is_not_waited_for(tokenizer, jsonl, tmp_path):
    path, here = jsonl([{"text": f"text {number} " * 50} for number in range(5000)]), tmp_path / "cache"
    child, _ = rank(tmp_path, prepare, path, tokenizer, here)
    until(lambda: list(here.glob("*.tmp-*")))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with pytest.raises(InputError, match="no process has been preparing"):
        wait_for(Source(path), tokenizer, cache_dir=str(here), patience=0.3)


def test_a_failure_of_long_ago_is_no_answer(tokenizer, jsonl, tmp_path):
    """Rank 0 may be about to try again."""
    path, here = jsonl([{"text": 3}]), str(tmp_path / "cache")
    with pytest.raises(InputError, match="text must be a string"):
        prepare(Source(path), tokenizer, cache_dir=here)
    (lock,) = Path(here).glob("*.lock")
    os.utime(lock, (time.time() - 100,) * 2)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(wait_for, Source(path), tokenizer, cache_dir=here, patience=1.5)
        time.sleep(0.5)
        assert not waiting.done()
        with pytest.raises(InputError, match="text must be a string"):
            waiting.result()


@pytest.mark.parametrize("harm", ["tokens.bin", "marks.bin", "sequences.bin", "meta.json", "gone"])
def test_a_damaged_store_is_named_and_made_again(harm, tokenizer, jsonl, capfd):
    source = Source(jsonl([{"text": f"text {number}"} for number in range(30)]))
    folder = prepare(source, tokenizer).folder
    whole = bytes_of(folder)
    file = folder / ("marks.bin" if harm == "gone" else harm)
    if harm == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-3])
    assert cache.opened(folder) is None
    assert bytes_of(prepare(source, tokenizer).folder) == whole
    assert re.search(rf"{folder} is damaged \({re.escape(file.name)}.*rebuilt", capfd.readouterr().err)


def test_touched_is_not_changed(tokenizer, jsonl, monkeypatch, tmp_path):
    """The hash of a large file is cached until the file changes; an edit that preserves size and time is detected."""
    monkeypatch.setattr(cache, "LARGE", 10)
    monkeypatch.setattr(cache, "SETTLED", -1)
    file = Path(jsonl([{"text": "red kite"}]))
    source, here = Source(str(file)), str(tmp_path / "cache")
    first = prepare(source, tokenizer, cache_dir=here)
    hashed = []
    monkeypatch.setattr(cache.hashlib, "file_digest", lambda stream, name, real=cache.hashlib.file_digest: (
        hashed.append(stream.name), real(stream, name))[1])
    assert prepare(source, tokenizer, cache_dir=here).key == first.key
    assert not hashed
    seen = file.stat()
    os.utime(file)
    assert prepare(source, tokenizer, cache_dir=here).key == first.key
    assert hashed == [str(file)]
    file.write_text(file.read_text().replace("red", "RED"))
    os.utime(file, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    assert file.stat().st_size == seen.st_size
    assert prepare(source, tokenizer, cache_dir=here).key != first.key


def test_the_key_follows_tokenizer_and_template(tokenizer, jsonl, load):
    from copy import copy

    from lit_llm.text.tokenizer import Tokenizer

    path = jsonl([{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}])
    other = copy(tokenizer.hf)
    other.chat_template = tokenizer.hf.chat_template.replace("<|im_end|>' + ", "<|im_end|>' + ' ' + ")
    keys = {prepare(Source(path), one).key for one in (tokenizer, Tokenizer(other), load("tiny"))}
    assert len(keys) == 3


KNOWN = (1, "7f551160ff42c8e1")                                      # RULES, and what the records of TOKENS become under them
TOKENS = [
    {"text": "A kite.\r\nIt flies\thigh, 风筝飞得很高。 <|im_end|>"},
    {"prompt": "say one", "completion": "one"}, {"instruction": "add", "input": "1 2", "output": "3"},
    {"conversations": [{"from": "system", "value": "be kind"}, {"from": "human", "value": "hi"},
                       {"from": "gpt", "value": "hello"}, {"from": "human", "value": "bye"}, {"from": "gpt", "value": "再见"}]},
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0},
                  {"role": "user", "content": "r"}, {"role": "assistant", "content": "b"}]}]


def test_what_tokens_are_made_of_is_a_version(tokenizer, jsonl, tmp_path):
    """Stores of other rules are not read. If this fails on purpose, raise `cache.RULES` and write the digest here."""
    import hashlib

    made = hashlib.sha256()
    for number, record in enumerate(TOKENS):
        store = prepare(Source(jsonl([record], f"{number}.jsonl")), tokenizer, cache_dir=str(tmp_path / "cache"))
        for file in sorted(store.folder.glob("*.bin")):
            made.update(file.name.encode() + file.read_bytes())
    assert (cache.RULES, made.hexdigest()[:16]) == KNOWN


def test_a_cache_that_is_read_only_is_read(tokenizer, jsonl, tmp_path, monkeypatch):
    path, here = jsonl([{"text": "a kite"}]), tmp_path / "cache"
    first = prepare(Source(path), tokenizer, cache_dir=str(here))

    def refused(*words, **more):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refused)             # tests may run as root, who ignores file modes
    monkeypatch.setattr(cache.disk, "replace_text", refused)
    monkeypatch.setattr(cache, "LARGE", 10)
    assert prepare(Source(path), tokenizer, cache_dir=str(here)).key == first.key
    with pytest.raises(InputError, match=r"cache cannot be written: .*Permission denied"):
        prepare(Source(path, format="text"), tokenizer, cache_dir=str(here))


def test_a_full_disk_is_reported_and_leaves_no_files(tokenizer, jsonl, tmp_path):
    path, here = jsonl([{"text": f"text {number} " * 50} for number in range(3000)]), tmp_path / "cache"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
        with pytest.raises(InputError, match=r"cache cannot be written: .*(too large|No space)"):
            prepare(Source(path), tokenizer, cache_dir=str(here))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [entry.suffix for entry in here.iterdir()] == [".lock"]
    assert prepare(Source(path), tokenizer, cache_dir=str(here)).report.kept == 3000


def test_what_others_left_half_written_goes_unless_they_are_at_work(tokenizer, jsonl, tmp_path):
    here = tmp_path / "cache"
    for name in ("dead", "busy"):
        (here / f"{name}.tmp-1").mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        fcntl.flock(stack.enter_context((here / "busy.lock").open("w")), fcntl.LOCK_EX)
        prepare(Source(jsonl([{"text": "a kite"}])), tokenizer, cache_dir=str(here))
    assert [entry.name for entry in here.glob("*.tmp-*")] == ["busy.tmp-1"]
