"""Build the token store of a source and a tokenizer, or open an existing one.

Records are read in one process, and parsed and tokenized in several, in order. `store.py` defines what is stored,
`cache.py` where.
"""

import contextlib
import shutil
import uuid
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path

from lit_llm import disk
from lit_llm.data.records.sources import Source
from lit_llm.data.tokens.cache import folder_of, opened, sole_writer, waited_for
from lit_llm.data.tokens.encode import (
    Block,
    Item,
    OnBadRecord,
    Part,
    SourceEncoder,
    begins_record,
    size_of,
    token_dtype,
)
from lit_llm.data.tokens.progress import Progress
from lit_llm.data.tokens.store import TokenStore, Writer
from lit_llm.data.tokens.workers import Workers, process_count
from lit_llm.errors import InputError
from lit_llm.text.tokenizer import Tokenizer, TrainOn

BATCH_RECORDS, BATCH_SIZE = 512, 1 << 20                # limits of a batch: records, approximate characters
UNDER_WAY = 64 << 20                                    # characters of batches in progress in other processes
ENOUGH = 10_000                                         # records after which the share of bad ones is checked


def prepare(source: Source, tokenizer: Tokenizer, *, train_on: TrainOn = "assistant",
            on_bad_record: OnBadRecord = "error", cache_dir: str | None = None,
            num_proc: int | None = None, bad_record_limit: float = 1.0) -> TokenStore:
    """Open the store of a source, or write it. A second process waits for the first.

    Args:
        source: The source.
        tokenizer: Its fingerprint is part of the key.
        train_on: Which tokens of a conversation are supervised.
        on_bad_record: `error` stops at the first, `quarantine` sets it aside with the reason and continues.
        cache_dir: Folder of the cache; null is `$LIT_LLM_CACHE`, else `~/.cache/lit_llm`.
        num_proc: Number of tokenizing processes; null uses all cores, or only this process for a small source.
        bad_record_limit: Maximum share of records set aside, checked after `ENOUGH` records.

    Raises:
        InputError: A bad record with its place, no usable record, or a cache that cannot be written.
    """
    folder = folder_of(source, tokenizer, _settings(train_on, on_bad_record), cache_dir)
    if store := opened(folder):
        return store
    with sole_writer(folder):
        if store := opened(folder, say=True):
            return store
        _write(folder, SourceEncoder(source, tokenizer, train_on), on_bad_record, num_proc, bad_record_limit)
    return TokenStore(folder)


def wait_for(source: Source, tokenizer: Tokenizer, *, train_on: TrainOn = "assistant",
             on_bad_record: OnBadRecord = "error", cache_dir: str | None = None,
             patience: float = 60) -> TokenStore:
    """Wait for the store that another process prepares, by polling, so that no collective times out.

    Raises:
        InputError: The other process failed, or no process has been working for `patience` seconds.
    """
    return waited_for(folder_of(source, tokenizer, _settings(train_on, on_bad_record), cache_dir), patience)


def _settings(train_on: TrainOn, on_bad_record: OnBadRecord) -> dict[str, str]:
    """The arguments that determine the content of a store, for its key."""
    return {"train_on": train_on, "on_bad_record": on_bad_record}


# ---- batches ---------------------------------------------------------------------------------------------------------

def _batches(items: Iterable[Item]) -> Iterator[list[Item]]:
    batch: list[Item] = []
    size = 0
    for item in items:
        batch.append(item)
        size += size_of(item[0])
        broken = isinstance(item[0], Part) and item[0].is_broken
        if len(batch) >= BATCH_RECORDS or size >= BATCH_SIZE or broken:     # `Writer.add` requires them to be last
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# ---- processes -------------------------------------------------------------------------------------------------------

def _blocks(batches: Iterable[list[Item]], work: Callable[[list[Item]], Block],
            num_proc: int) -> Generator[tuple[list[Item], Block], None, None]:
    """Yield each batch with its block, in order; a few batches are in progress in other processes."""
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


def _write(folder: Path, encoder: SourceEncoder, on_bad_record: OnBadRecord, num_proc: int | None,
           bad_record_limit: float) -> None:
    temporary = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        name, sizes = encoder.source.path, encoder.source.sizes()
        writer, progress = Writer(temporary, name, token_dtype(encoder.tokenizer)), Progress(name, sizes or {})
        processes = process_count(num_proc, None if sizes is None else sum(sizes.values()))
        with contextlib.closing(_blocks(_batches(encoder.items()), encoder.block, processes)) as done:
            for items, new in done:
                error = next((reason for _, reason in new.faults if isinstance(reason, InputError)), None)
                if error and on_bad_record == "error":
                    raise error
                writer.add(new, items, [begins_record(record) for record, _ in items])
                if writer.report.read >= ENOUGH:
                    writer.report.refuse_flood(bad_record_limit, "Fix them, set the source's `format` or `columns`, "
                                               "or raise data.bad_record_limit.")
                progress.show(writer.report, items[-1][1])
        writer.report.refuse_nothing()
        writer.close()
        disk.replace_folder(temporary, folder)          # exists only if it was damaged
        progress.end(writer.report, folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
