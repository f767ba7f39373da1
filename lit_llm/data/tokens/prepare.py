"""Make the token store of a source and a tokenizer, once, or open the one that exists.

Records are read in one process, parsed and tokenized in several, in their order. What is kept of them is `store.py`'s,
where it is kept is `cache.py`'s.
"""

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lit_llm import disk
from lit_llm.data.records import formats, sources
from lit_llm.data.records.cleaning import clean_blocks, cleaned
from lit_llm.data.records.jsonfile import parse_line
from lit_llm.data.records.record import LongText, Place, Record, size_of_value
from lit_llm.data.records.sources import Source
from lit_llm.data.tokens.cache import folder_of, opened, sole_writer, waited_for
from lit_llm.data.tokens.progress import Progress
from lit_llm.data.tokens.store import (
    CONVERSATION,
    DOCUMENT,
    Block,
    Encoded,
    Report,
    TokenStore,
    Writer,
    block,
    token_dtype,
)
from lit_llm.data.tokens.workers import Workers
from lit_llm.disk import cache_root
from lit_llm.errors import GivenUpError, InputError
from lit_llm.text.conversation import Conversation, Document
from lit_llm.text.cutting import Piece, UncutError
from lit_llm.text.tokenizer import IGNORE_INDEX, Tokenizer, TokenSequence, TrainOn

__all__ = ["Item", "OnBadRecord", "Part", "Settings", "cache_root", "encode", "prepare", "size_of", "wait_for"]
OnBadRecord = Literal["error", "quarantine"]


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a long document: its beginning, its end, or neither; or why it cannot be read on."""

    piece: Piece | InputError
    first: bool
    last: bool


Item = tuple[Record | Part | InputError, Place]
BATCH_RECORDS, BATCH_SIZE = 512, 1 << 20                # of a batch, records or about characters, what comes first
LEFT = 1 << 30                                          # characters of a document that are passed over
UNDER_WAY = 64 << 20                                    # characters of batches that other processes work on
ENOUGH = 10_000                                         # records after which a share of bad ones says something
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
            num_proc: int | None = None, bad_record_limit: float = 1.0) -> TokenStore:
    """The store of a source: opened if it is there, else written. A second process waits for the first.

    Args:
        source: What to read.
        tokenizer: Its fingerprint is part of the key.
        train_on: Which tokens of a conversation are learned.
        on_bad_record: `error` stops at the first, `quarantine` writes it aside with the reason and goes on.
        cache_dir: Where stores live; null is `$LIT_LLM_CACHE`, else `~/.cache/lit_llm`.
        num_proc: Processes that tokenize; null takes the machine's cores, and this process alone for a small source.
        bad_record_limit: Share of records set aside above which it stops, once it has read `ENOUGH`.

    Raises:
        InputError: A bad record with its place; nothing kept; a cache that cannot be written.
    """
    settings = Settings(train_on, on_bad_record)
    folder = folder_of(source, tokenizer, asdict(settings), cache_dir)
    if store := opened(folder):
        return store
    with sole_writer(folder):
        if store := opened(folder, say=True):
            return store
        _write(folder, source, tokenizer, settings, num_proc, bad_record_limit)
    return TokenStore(folder)


def wait_for(source: Source, tokenizer: Tokenizer, *, train_on: TrainOn = "assistant",
             on_bad_record: OnBadRecord = "error", cache_dir: str | None = None,
             patience: float = 60) -> TokenStore:
    """The store that another process prepares: polls the disk, so no collective can time out meanwhile.

    Raises:
        InputError: What stopped that process; or nobody has been at work for `patience` seconds.
    """
    return waited_for(folder_of(source, tokenizer, asdict(Settings(train_on, on_bad_record)), cache_dir), patience)


# ---- records to batches ----------------------------------------------------------------------------------------------

def _items(source: Source, tokenizer: Tokenizer) -> Iterator[Item]:
    """Records with their places, JSON lines as they stand; a long document in parts, each to be read on its own."""
    for record, place in sources.scan(source, parse=False):
        if isinstance(record, LongText):
            size, done = max(Path(place.path).stat().st_size, 1), 0
            try:
                for part in parts_of(record, source, tokenizer):
                    if isinstance(part.piece, Piece):
                        done += len(part.piece.text.encode("utf-8", "surrogatepass"))
                    yield part, replace(place, share=min(place.share + done / size, 1))
            except InputError as error:
                raise error.at(str(place)) from None
        else:
            yield record, place


def parts_of(record: LongText, source: Source, tokenizer: Tokenizer) -> Iterator[Part]:
    """A long document in parts, each to be read on its own; where it cannot be read on, the last one says why."""
    first = True
    try:
        for piece, _, last in tokenizer.pieces(clean_blocks(record.blocks, source.clean)):
            yield Part(piece, first, last)
            first = False
    except UncutError as error:
        yield Part(error, first, True)
        left = LEFT                                     # what of it is passed over, for the record behind it
        for block in record.blocks:
            left -= len(block)
            if left < 0:
                raise InputError(f"{error.what}; and {LEFT:,} characters behind it belong to the same document",
                                 fix=error.fix) from None


def _batches(items: Iterable[Item]) -> Iterator[list[Item]]:
    batch: list[Item] = []
    size = 0
    for item in items:
        batch.append(item)
        size += size_of(item[0])
        broken = isinstance(item[0], Part) and isinstance(item[0].piece, InputError)
        if len(batch) >= BATCH_RECORDS or size >= BATCH_SIZE or broken:     # `Writer.add` wants those to come last
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def size_of(record: Any) -> int:
    """About how many characters a record has."""
    if isinstance(record, Part):
        return len(record.piece.text) if isinstance(record.piece, Piece) else 0
    return size_of_value(record)


# ---- batches to tokens -----------------------------------------------------------------------------------------------

def encode(items: list[Item], source: Source, tokenizer: Tokenizer,
           train_on: TrainOn) -> tuple[list[Encoded | InputError], int, dict[str, int]]:
    """Records to tokens, each on its own: what is wrong with one is a value. Also how many were cleaned, and notes."""
    changed, noted = 0, Counter[str]()
    out: list[Encoded | InputError | None] = []
    texts: list[Piece] = []                             # documents go through the tokenizer together
    for record, place in items:
        try:
            if isinstance(record, InputError):
                raise record
            if isinstance(record, Part):
                if isinstance(record.piece, InputError):
                    raise record.piece
                said: Part | Document | Conversation = record
                texts.append(record.piece)
            else:
                record = parse_line(record, Path(place.path), place.number) if isinstance(record, bytes) else record
                if isinstance(record, InputError):
                    raise record
                notes: set[str] = set()
                read = formats.convert(record, format=source.format, columns=source.columns,  # type: ignore[arg-type]
                                       notes=notes)
                noted.update(notes)
                said = cleaned(read, source.clean)
                changed += said is not read
            if isinstance(said, Document):
                texts.append(Piece("", said.text))
            left_out: set[str] = set()
            out.append(_conversation(said, tokenizer, train_on, left_out) if isinstance(said, Conversation) else None)
            noted.update(left_out)
        except GivenUpError:
            raise
        except InputError as error:
            out.append(error.at(str(place)))
    ids = iter(zip(texts, tokenizer.encode_pieces(texts), strict=True))
    done = [_document(*next(ids), record, tokenizer) if encoded is None else encoded
            for encoded, (record, _) in zip(out, items, strict=True)]
    return [one.at(str(place)) if isinstance(one, InputError) else one
            for one, (_, place) in zip(done, items, strict=True)], changed, noted


def _document(piece: Piece, ids: Any, record: Any, tokenizer: Tokenizer) -> Encoded | InputError:
    first, last = (record.first, record.last) if isinstance(record, Part) else (True, True)
    content = _hash(piece.text)
    if isinstance(ids, InputError):
        return ids
    if first and last and not piece.text.strip():
        return Encoded(DOCUMENT, content, (), "the text is empty")
    array = tokenizer.framed(ids, first=first, last=last)
    return Encoded(DOCUMENT, content, (TokenSequence(array, array),), first=first, last=last)


def _conversation(said: Conversation, tokenizer: Tokenizer, train_on: TrainOn, left_out: set[str]) -> Encoded:
    try:
        whole = [said.to_openai(), list(said.tools), *([said.template_args] if said.template_args else [])]
        text = json.dumps(whole, sort_keys=True, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:        # of a table, whose values may be dates or bytes
        raise InputError(f"tools or calls of tools hold what JSON has no word for: {error}") from None
    content = _hash(text)
    encoded = tokenizer.encode_conversation(said, train_on=train_on, notes=left_out)
    if not all((sequence.labels[1:] != IGNORE_INDEX).any() for sequence in encoded):
        raise InputError("nothing to learn from: no token of this conversation is supervised")
    return Encoded(CONVERSATION, content, tuple(encoded))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


# ---- processes -------------------------------------------------------------------------------------------------------

def _blocks(batches: Iterable[list[Item]], work: Callable[[list[Item]], Block],
            num_proc: int) -> Generator[tuple[list[Item], Block], None, None]:
    """Each batch with its block, in order; a few batches are under way in other processes."""
    waiting: deque[tuple[list[Item], Callable[[], Block]]] = deque()
    with contextlib.closing(Workers(work, num_proc)) as workers:
        sizes: deque[int] = deque()
        for batch in batches:
            waiting.append((batch, workers.submit(batch)))
            sizes.append(sum(size_of(record) for record, _ in batch))
            while waiting and (num_proc == 1 or len(waiting) > 2 * num_proc or sum(sizes) > UNDER_WAY):
                first, later = waiting.popleft()
                sizes.popleft()
                yield first, later()
        for first, later in waiting:
            yield first, later()


def _to_block(items: list[Item], *, source: Source, tokenizer: Tokenizer, train_on: TrainOn) -> Block:
    encoded, changed, notes = encode(items, source, tokenizer, train_on)
    return block(encoded, tokenizer, cleaned=changed, notes=notes)


def _processes(source: Source, num_proc: int | None) -> int:
    if num_proc is not None:
        return max(1, num_proc)
    local = not sources.is_hub(source.path)
    if local and sum(path.stat().st_size for path in sources.files(source)) < ALONE:
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _write(folder: Path, source: Source, tokenizer: Tokenizer, settings: Settings, num_proc: int | None,
           bad_record_limit: float) -> None:
    temporary = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        writer, progress = Writer(temporary, source.path, token_dtype(tokenizer)), Progress(source)
        work = partial(_to_block, source=source, tokenizer=tokenizer, train_on=settings.train_on)
        done = _blocks(_batches(_items(source, tokenizer)), work, _processes(source, num_proc))
        with contextlib.closing(done):
            for items, new in done:
                error = next((reason for _, reason in new.faults if isinstance(reason, InputError)), None)
                if error and settings.on_bad_record == "error":
                    raise error
                writer.add(new, items, [not isinstance(record, Part) or record.first for record, _ in items])
                if writer.report.read >= ENOUGH:
                    writer.report.refuse_flood(bad_record_limit, "Mend them, name the source's `format` or `columns`, "
                                               "or raise data.bad_record_limit.")
                progress.show(writer.report, items[-1][1])
        _refuse_nothing(writer.report, source)
        writer.close()
        disk.replace_folder(temporary, folder)          # there only if it was damaged
        progress.end(writer.report, folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _refuse_nothing(report: Report, source: Source) -> None:
    if not report.read:
        raise InputError("no record here: nothing, or only blank lines", where=source.path)
    if not report.kept:
        reason, (count, first) = next(iter(report.dropped.items()))
        raise InputError(f"no record of {report.read} could be kept: {reason} ({count} times)",
                         where=first or source.path, fix=report.fixes.get(reason, ""))
