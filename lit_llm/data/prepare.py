"""A source and a tokenizer in, its token store out: opened if it is there, else written, once.

Records are read in one process and tokenized in several, in their order; what is kept of them is `store.py`'s. Knows
nothing of rows, batches or Lightning.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal

from lit_llm import disk
from lit_llm.conversation import Conversation, Document
from lit_llm.data import formats, sources
from lit_llm.data.cleaning import clean_blocks, cleaned
from lit_llm.data.readers import LongText, Place, Record
from lit_llm.data.sources import Source
from lit_llm.data.store import CONVERSATION, DOCUMENT, Block, Encoded, Report, TokenStore, Writer, block, token_dtype
from lit_llm.encoder import Piece
from lit_llm.errors import InputError
from lit_llm.tokenizer import IGNORE_INDEX, Tokenizer, TokenSequence, TrainOn

OnBadRecord = Literal["error", "quarantine"]
@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a long document: its beginning, its end, or neither."""

    piece: Piece
    first: bool
    last: bool


Item = tuple[Record | Part | InputError, Place]
BATCH_RECORDS, BATCH_CHARACTERS = 512, 1 << 20          # of a batch, whichever comes first
ALONE = 4 << 20                                         # bytes of a source that one process does sooner


@dataclass(frozen=True, slots=True)
class Settings:
    """How a source becomes tokens: everything but where it is read and kept.

    Args:
        train_on: Which tokens of a conversation are learned.
        on_bad_record: `error` stops at the first, `quarantine` writes it aside with the reason and goes on.
    """

    train_on: TrainOn = "assistant"
    on_bad_record: OnBadRecord = "error"


def prepare(source: Source, tokenizer: Tokenizer, *, train_on: TrainOn = "assistant",
            on_bad_record: OnBadRecord = "error", cache_dir: str | None = None,
            num_proc: int | None = None) -> TokenStore:
    """The store of a source: opened if it is there, else written. A second process waits for the first.

    Args:
        source: What to read.
        tokenizer: Its fingerprint is part of the key.
        train_on: Which tokens of a conversation are learned.
        on_bad_record: `error` stops at the first, `quarantine` writes it aside with the reason and goes on.
        cache_dir: Where stores live; null is `$LIT_LLM_CACHE`, else `~/.cache/lit_llm`.
        num_proc: Processes that tokenize; null takes the machine's cores, and this process alone for a small source.

    Raises:
        InputError: A bad record with its place; nothing kept; a cache that cannot be written.
    """
    settings = Settings(train_on, on_bad_record)
    folder = _folder(source, tokenizer, settings, cache_dir)
    if _complete(folder):
        return TokenStore(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_suffix(".lock")):
            if not _complete(folder):
                for debris in folder.parent.glob(f"{folder.name}.tmp-*"):   # whoever wrote it held this lock
                    shutil.rmtree(debris, ignore_errors=True)
                _write(folder, source, tokenizer, settings, num_proc)
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
    folder = _folder(source, tokenizer, Settings(train_on, on_bad_record), cache_dir)
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


def _folder(source: Source, tokenizer: Tokenizer, settings: Settings, cache_dir: str | None) -> Path:
    read = {key: value for key, value in asdict(source).items() if key != "weight"}
    if sources.is_hub(source.path):
        data = [[source.path, str(sources.hub_dataset(source)._fingerprint)]]
    else:
        data = [[str(path), _digest(path)] for path in sources.files(source)]
    parts = [read, data, tokenizer.fingerprint, asdict(settings), _code()]
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
    names = ("sources", "cleaning", "textfile", "readers", "formats", "prepare", "store")
    nouns = ("conversation", "jinja", "rendering", "template", "encoder", "tokenizer")
    parts = [*(wing / f"{name}.py" for name in names), *(package / f"{name}.py" for name in nouns)]
    return hashlib.sha256(b"".join(path.read_bytes() for path in parts)).hexdigest()


# ---- records to batches ----------------------------------------------------------------------------------------------

def _items(source: Source, tokenizer: Tokenizer) -> Iterator[Item]:
    """Records with their places; a long document in parts, cut where no token and no rule of the tokenizer reaches."""
    for record, place in sources.scan(source):
        if isinstance(record, LongText):
            for piece, first, last in tokenizer.pieces(clean_blocks(record.blocks, source.clean)):
                yield Part(piece, first, last), place
        else:
            yield record, place


def _batches(items: Iterable[Item]) -> Iterator[list[Item]]:
    batch: list[Item] = []
    characters = 0
    for item in items:
        batch.append(item)
        characters += _characters(item[0])
        if len(batch) >= BATCH_RECORDS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _characters(record: Record | Part | InputError) -> int:
    if isinstance(record, str):
        return len(record)
    return len(record.piece.text) if isinstance(record, Part) else 1000


# ---- batches to tokens -----------------------------------------------------------------------------------------------

def encode(items: list[Item], source: Source, tokenizer: Tokenizer,
           train_on: TrainOn) -> tuple[list[Encoded | InputError], int]:
    """Records to tokens, each on its own: what is wrong with one is a value. Also how many were cleaned."""
    changed = 0
    out: list[Encoded | InputError | None] = []
    texts: list[Piece] = []                             # documents go through the tokenizer together
    for record, place in items:
        try:
            if isinstance(record, InputError):
                raise record
            if isinstance(record, Part):
                said: Part | Document | Conversation = record
                texts.append(record.piece)
            else:
                read = formats.convert(record, format=source.format, columns=source.columns)  # type: ignore[arg-type]
                said = cleaned(read, source.clean)
                changed += said is not read
            if isinstance(said, Document):
                texts.append(Piece("", said.text))
            out.append(_conversation(said, tokenizer, train_on) if isinstance(said, Conversation) else None)
        except InputError as error:
            out.append(error.at(str(place)))
    ids = iter(zip(texts, tokenizer.encode_pieces(texts), strict=True))
    done = [_document(*next(ids), record, tokenizer) if encoded is None else encoded
            for encoded, (record, _) in zip(out, items, strict=True)]
    return done, changed


def _document(piece: Piece, ids: Any, record: Any, tokenizer: Tokenizer) -> Encoded | InputError:
    first, last = (record.first, record.last) if isinstance(record, Part) else (True, True)
    content = _hash(piece.text)
    if isinstance(ids, InputError):
        return ids
    if first and last and not piece.text.strip():
        return Encoded(DOCUMENT, content, (), "the text is empty")
    array = tokenizer.framed(ids, first=first, last=last)
    return Encoded(DOCUMENT, content, (TokenSequence(array, array),), first=first, last=last)


def _conversation(said: Conversation, tokenizer: Tokenizer, train_on: TrainOn) -> Encoded:
    content = _hash(json.dumps([said.to_openai(), list(said.tools)], sort_keys=True, ensure_ascii=False))
    encoded = tokenizer.encode_conversation(said, train_on=train_on)
    if not all((sequence.labels[1:] != IGNORE_INDEX).any() for sequence in encoded):
        raise InputError("nothing to learn from: no token of this conversation is supervised")
    return Encoded(CONVERSATION, content, tuple(encoded))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


# ---- processes -------------------------------------------------------------------------------------------------------

_work: Any = None                                       # in a tokenizing process: records to a block


def _blocks(batches: Iterable[list[Item]], work: Any,
            num_proc: int) -> Generator[tuple[list[Item], Block], None, None]:
    """Each batch with its block, in order; a few batches are under way in other processes."""
    if num_proc == 1:
        yield from ((batch, work(batch)) for batch in batches)
        return
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(num_proc, mp_context=context, initializer=_begin, initargs=(work, os.getpid()))
    waiting: deque[tuple[list[Item], Future[Block]]] = deque()
    try:
        for batch in batches:
            waiting.append((batch, pool.submit(_do, batch)))
            if len(waiting) > 2 * num_proc:
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()
    except BrokenProcessPool:
        raise InputError("a process that tokenizes was killed; memory may have run out", where="data.num_proc",
                         fix="Set --data.num_proc 1, or make memory free.") from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _begin(work: Any, parent: int) -> None:
    """In a new process: keep the work, and end when the parent has died, however it died."""
    global _work
    _work = work
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_outlive_nobody, args=(parent,), daemon=True).start()


def _outlive_nobody(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _do(batch: list[Item]) -> Block:
    return _work(batch)


def _to_block(items: list[Item], *, source: Source, tokenizer: Tokenizer, train_on: TrainOn) -> Block:
    encoded, changed = encode(items, source, tokenizer, train_on)
    return block(encoded, tokenizer, cleaned=changed)


def _processes(source: Source, num_proc: int | None) -> int:
    if num_proc is not None:
        return max(1, num_proc)
    local = not sources.is_hub(source.path)
    if local and sum(path.stat().st_size for path in sources.files(source)) < ALONE:
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _write(folder: Path, source: Source, tokenizer: Tokenizer, settings: Settings, num_proc: int | None) -> None:
    temporary = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        writer, progress = Writer(temporary, source.path, token_dtype(tokenizer)), _Progress(source)
        work = partial(_to_block, source=source, tokenizer=tokenizer, train_on=settings.train_on)
        done = _blocks(_batches(_items(source, tokenizer)), work, _processes(source, num_proc))
        with contextlib.closing(done):
            for items, new in done:
                error = next((reason for _, reason in new.faults if isinstance(reason, InputError)), None)
                if error and settings.on_bad_record == "error":
                    raise error
                writer.add(new, items, [not isinstance(record, Part) or record.first for record, _ in items])
                progress.show(writer.report, items[-1][1])
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

def _complete(folder: Path) -> bool:
    return (folder / "meta.json").exists()              # the folder came by rename, so all of it is there


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[IO[str]]:
    """Held by one process; the system frees it when that process dies, however it dies."""
    import fcntl

    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield stream
