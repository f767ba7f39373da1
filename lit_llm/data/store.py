"""A source and a tokenizer in, a memory-mapped folder of tokens out, written once and reused while nothing changed.

The folder appears under its final name by one rename, so it is complete or not there: safe against kill -9 and against
a second process. Knows nothing of rows, batches or Lightning.

    tokens.bin      uint16 or uint32, all sequences end to end
    supervised.bin  uint8, 1 where the token is learned
    sequences.bin   one SEQUENCE for each: where it lies, what it is, which record it came from
    meta.json       files, counts; with quarantine.jsonl the records that were set aside
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from lit_llm import disk
from lit_llm.conversation import Conversation, Document
from lit_llm.data import formats, sources
from lit_llm.data.readers import Place, Record
from lit_llm.data.sources import Source
from lit_llm.errors import InputError
from lit_llm.tokenizer import IGNORE_INDEX, Tokenizer, TokenSequence, TrainOn

OnBadRecord = Literal["error", "quarantine"]
CONVERSATION, DOCUMENT = 0, 1
SEQUENCE = np.dtype([
    ("offset", "<i8"), ("length", "<i4"), ("supervised", "<i4"),    # supervised: beyond the first token
    ("kind", "u1"), ("ended", "u1"),                                # ended: its last token is the end-of-text token
    ("file", "<i4"), ("number", "<i8"), ("content", "<u8")])        # content: a hash, equal for equal records


@dataclass
class Report:
    """What became of a source's records. `read` = `kept` + the dropped; tokens are those of kept records."""

    source: str
    read: int = 0
    kept: int = 0
    sequences: int = 0
    tokens: int = 0
    supervised: int = 0
    dropped: dict[str, tuple[int, str]] = field(default_factory=dict)       # reason -> count, first place
    quarantined: int = 0

    def drop(self, reason: str, place: str) -> None:
        """Count one more."""
        count, first = self.dropped.get(reason, (0, place))
        self.dropped[reason] = (count + 1, first)


class TokenStore:
    """A finished store, opened: arrays on disk that are read where they are touched.

    Args:
        folder: What `prepare` wrote.
    """

    def __init__(self, folder: Path) -> None:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.folder, self.key = folder, folder.name
        self.files: list[str] = meta["files"]
        self.unit: str = meta["unit"]
        self.report = Report(**meta["report"])
        self.tokens = _mapped(folder / "tokens.bin", np.dtype(meta["dtype"]))
        self.supervised = _mapped(folder / "supervised.bin", np.dtype("u1"))
        self.sequences = _mapped(folder / "sequences.bin", SEQUENCE)

    def __len__(self) -> int:
        return len(self.sequences)

    def place(self, sequence: int) -> str:
        """Where the record of a sequence stands."""
        row = self.sequences[sequence]
        return str(Place(self.files[row["file"]], int(row["number"]), self.unit))


def prepare(source: Source, tokenizer: Tokenizer, *, train_on: TrainOn = "assistant",
            on_bad_record: OnBadRecord = "error", cache_dir: str | None = None) -> TokenStore:
    """The store of a source: opened if it is there, else written. A second process waits for the first.

    Args:
        source: What to read.
        tokenizer: Its fingerprint is part of the key.
        train_on: Which tokens of a conversation are learned.
        on_bad_record: `error` stops at the first, `quarantine` writes it aside with the reason and goes on.
        cache_dir: Where stores live; null is `$LIT_LLM_CACHE`, else `~/.cache/lit_llm`.

    Raises:
        InputError: A bad record with its place; nothing kept; a cache that cannot be written.
    """
    folder = _folder(source, tokenizer, train_on, on_bad_record, cache_dir)
    if _complete(folder):
        return TokenStore(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_suffix(".lock")):
            if not _complete(folder):
                for debris in folder.parent.glob(f"{folder.name}.tmp-*"):   # whoever wrote it held this lock
                    shutil.rmtree(debris, ignore_errors=True)
                _write(folder, source, tokenizer, train_on, on_bad_record)
    except OSError as error:
        raise InputError(f"the token cache cannot be written: {error}", where=str(folder.parent),
                         fix="Make room, or set data.cache_dir (or LIT_LLM_CACHE) to another folder.") from None
    return TokenStore(folder)


def wait_for(source: Source, tokenizer: Tokenizer, *, train_on: TrainOn = "assistant",
             on_bad_record: OnBadRecord = "error", cache_dir: str | None = None,
             timeout: float = 3600) -> TokenStore:
    """The store that another process prepares: polls the disk, so no collective can time out meanwhile.

    Raises:
        InputError: Still not there after `timeout` seconds.
    """
    folder = _folder(source, tokenizer, train_on, on_bad_record, cache_dir)
    end = time.monotonic() + timeout
    while not _complete(folder):
        if time.monotonic() > end:
            raise InputError(f"the tokens of this source were not prepared within {timeout:.0f} seconds",
                             where=source.path, fix="Run `python -m lit_llm prepare` first; is data.cache_dir shared?")
        time.sleep(0.5)
    return TokenStore(folder)


# ---- the key ---------------------------------------------------------------------------------------------------------

def cache_root(cache_dir: str | None) -> Path:
    """The folder of all stores."""
    return Path(cache_dir or os.environ.get("LIT_LLM_CACHE") or "~/.cache/lit_llm").expanduser()


def _folder(source: Source, tokenizer: Tokenizer, train_on: str, on_bad_record: str, cache_dir: str | None) -> Path:
    settings = {key: value for key, value in asdict(source).items() if key != "weight"}
    if sources.is_hub(source.path):
        data = [[source.path, str(sources.hub_dataset(source)._fingerprint)]]
    else:
        data = [[str(path), _digest(path)] for path in sources.files(source)]
    parts = [settings, data, tokenizer.fingerprint, train_on, on_bad_record, _code()]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return cache_root(cache_dir) / key[:32]


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from None


def _code() -> str:
    """Any change to what turns bytes into tokens makes old stores stale."""
    wing, package = Path(__file__).parent, Path(__file__).parents[1]
    parts = [*(wing / name for name in ("sources.py", "readers.py", "formats.py", "store.py")),
             *(package / name for name in ("conversation.py", "template.py", "encoder.py", "tokenizer.py"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in parts if path.exists())).hexdigest()


# ---- writing ---------------------------------------------------------------------------------------------------------

@dataclass(frozen=True, slots=True)
class Encoded:
    """A record's sequences; none, with the reason in `dropped`, where it holds nothing."""

    kind: int
    content: int
    sequences: tuple[TokenSequence, ...]
    dropped: str = ""


def encode(items: list[tuple[Record | InputError, Place]], source: Source, tokenizer: Tokenizer,
           train_on: TrainOn) -> list[Encoded | InputError]:
    """A batch of records to tokens, each on its own: what is wrong with one is a value. The seam for processes."""
    out: list[Encoded | InputError] = []
    for record, place in items:
        try:
            if isinstance(record, InputError):
                raise record
            out.append(_encode(formats.convert(record, format=source.format, columns=source.columns),
                               tokenizer, train_on))
        except InputError as error:
            out.append(error.at(str(place)))
    return out


def _encode(said: Document | Conversation, tokenizer: Tokenizer, train_on: TrainOn) -> Encoded:
    if isinstance(said, Document):
        content = _hash(said.text)
        if not said.text.strip():
            return Encoded(DOCUMENT, content, (), "the text is empty")
        return Encoded(DOCUMENT, content, (tokenizer.encode_document(said, end=True),))
    content = _hash(json.dumps([said.to_openai(), list(said.tools)], sort_keys=True, ensure_ascii=False))
    encoded = tokenizer.encode_conversation(said, train_on=train_on)
    if not all((sequence.labels[1:] != IGNORE_INDEX).any() for sequence in encoded):
        raise InputError("nothing to learn from: no token of this conversation is supervised")
    return Encoded(CONVERSATION, content, tuple(encoded))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


class _Writer:
    """Appends to the four files of a store."""

    def __init__(self, folder: Path, source: Source, tokenizer: Tokenizer) -> None:
        self.folder, self.eos_id = folder, tokenizer.eos_id
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
        self.files: dict[str, int] = {}
        self.report, self.unit = Report(source.path), "line"
        self.tokens, self.supervised, self.sequences = (
            (folder / name).open("wb") for name in ("tokens.bin", "supervised.bin", "sequences.bin"))

    def add(self, encoded: Encoded | InputError, record: Record | InputError, place: Place) -> None:
        self.report.read += 1
        self.unit = place.unit
        if isinstance(encoded, InputError):
            self._quarantine(encoded, record)
        elif encoded.dropped:
            self.report.drop(encoded.dropped, str(place))
        else:
            self.report.kept += 1
            file = self.files.setdefault(place.path, len(self.files))
            for sequence in encoded.sequences:
                self._append(sequence, encoded, file, place.number)

    def _append(self, sequence: TokenSequence, encoded: Encoded, file: int, number: int) -> None:
        mask = sequence.labels != IGNORE_INDEX
        assert encoded.kind == CONVERSATION or mask[1:].all()       # packing counts on it
        ids, learned = sequence.input_ids, int(mask[1:].sum())
        ended = encoded.kind == DOCUMENT and ids[-1] == self.eos_id
        self.sequences.write(np.array(
            [(self.report.tokens, len(ids), learned, encoded.kind, ended, file, number, encoded.content)],
            dtype=SEQUENCE).tobytes())
        self.tokens.write(ids.astype(self.dtype).tobytes())
        self.supervised.write(mask.astype(np.uint8).tobytes())
        self.report.sequences += 1
        self.report.tokens += len(ids)
        self.report.supervised += learned

    def _quarantine(self, error: InputError, record: Record | InputError) -> None:
        self.report.drop(error.what[:120], error.where)
        self.report.quarantined += 1
        line = {"where": error.where, "reason": error.what}
        if not isinstance(record, InputError):
            line["record"] = record  # type: ignore[assignment]
        with (self.folder / "quarantine.jsonl").open("a", encoding="utf-8", errors="backslashreplace") as stream:
            stream.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")

    def close(self) -> None:
        meta = {"dtype": self.dtype.str, "files": list(self.files), "unit": self.unit, "report": asdict(self.report)}
        (self.folder / "meta.json").write_text(json.dumps(meta, indent=1, ensure_ascii=False), encoding="utf-8")
        for stream in (self.tokens, self.supervised, self.sequences):
            stream.close()
        for path in self.folder.iterdir():
            disk.sync(path)
        disk.sync(self.folder)


def _write(folder: Path, source: Source, tokenizer: Tokenizer, train_on: TrainOn, on_bad_record: OnBadRecord) -> None:
    temporary = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        writer, progress = _Writer(temporary, source, tokenizer), _Progress(source)
        for batch in _batched(sources.scan(source), 256):
            for encoded, (record, place) in zip(encode(batch, source, tokenizer, train_on), batch, strict=True):
                if isinstance(encoded, InputError) and on_bad_record == "error":
                    raise encoded
                writer.add(encoded, record, place)
            progress.show(writer.report, batch[-1][1])
        progress.end(writer.report)
        writer.close()
        _refuse_nothing(writer.report, source)
        disk.replace_folder(temporary, folder)          # there only if someone emptied it by hand
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _refuse_nothing(report: Report, source: Source) -> None:
    if not report.kept:
        reason, (count, first) = next(iter(report.dropped.items()), ("there are none", (0, "")))
        raise InputError(f"no record of {report.read} could be kept: {reason}" + (f" ({count} times)" if count else ""),
                         where=first or source.path)


def _batched(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    batch: list[Any] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


class _Progress:
    """A line on stderr with tokens/s and time left, once it has taken 2 seconds."""

    def __init__(self, source: Source) -> None:
        self.began = self.shown = time.monotonic()
        self.before: dict[str, int] = {}                # bytes of the files before each file
        self.total = 0
        if not sources.is_hub(source.path):
            for path in sources.files(source):
                self.before[str(path)] = self.total
                self.total += path.stat().st_size

    def show(self, report: Report, place: Place) -> None:
        now = time.monotonic()
        every = 0.5 if sys.stderr.isatty() else 10
        if now - self.began < 2 or now - self.shown < every:
            return
        self.shown, spent = now, now - self.began
        share = 0.0
        if self.total and place.path in self.before:
            size = Path(place.path).stat().st_size
            share = (self.before[place.path] + size * place.share) / self.total
        left = f", {spent / share - spent:.0f} s left" if share > 0 else ""
        print(f"  preparing {report.source}: {report.read:,} records, {report.tokens:,} tokens, "
              f"{report.tokens / spent:,.0f} tokens/s{left}   ",
              end="\r" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)

    def end(self, report: Report) -> None:
        if self.shown > self.began:
            spent = time.monotonic() - self.began
            print(f"  prepared {report.source}: {report.read:,} records, {report.tokens:,} tokens in {spent:.0f} s"
                  + " " * 30, file=sys.stderr, flush=True)


# ---- the disk --------------------------------------------------------------------------------------------------------

def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype=dtype)


def _complete(folder: Path) -> bool:
    return (folder / "meta.json").exists()              # the folder came by rename, so all of it is there


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[IO[str]]:
    """Held by one process; the system frees it when that process dies, however it dies."""
    import fcntl

    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield stream
