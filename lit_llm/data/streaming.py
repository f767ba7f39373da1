"""Open the stream of a data module, and refuse settings that a stream does not support.

The streams themselves are in `stream/`.
"""

import hashlib
import json
from contextlib import closing
from dataclasses import asdict
from typing import Any

from lit_llm.data.interface import Data
from lit_llm.data.stream.chunks import Chunk, Stream
from lit_llm.data.stream.feed import identity
from lit_llm.data.stream.loader import StreamLoader
from lit_llm.data.tokens.encode import SourceEncoder
from lit_llm.data.tokens.workers import Exchange, process_count
from lit_llm.disk import cache_root
from lit_llm.errors import InputError


def trains(data: Data) -> bool:
    """Whether a fit is running; otherwise the data are only inspected."""
    return data.trainer is not None and data.trainer.state.fn == "fit"


def check(data: Data) -> None:
    """Refuse settings that a stream does not support.

    Raises:
        InputError: The error names the key and what to set instead.
    """
    for name in ("val", "test"):
        if getattr(data, f"{name}_fraction"):
            raise InputError("a share of a stream cannot be used for evaluation, because it is never read completely",
                             where=f"data.{name}_fraction",
                             fix=f"Set it to 0, and set data.{name}_sources to separate files.")
    if data.dedup:
        raise InputError("a stream cannot detect duplicates", where="data.dedup",
                         fix="Remove duplicates beforehand, or set data.streaming to false.")
    if data.trainer is not None and trains(data) and data.trainer.max_steps < 1:
        raise InputError("a stream has no end, so a number of steps is needed", where="trainer.max_steps",
                         fix="Set --trainer.max_steps N; a run of N steps reads N * accumulate_grad_batches * "
                         "batch_size * processes packed sequences.")


def open_loader(data: Data) -> StreamLoader:
    """The training loader of a data module that streams."""
    trainer, tokenizer = data.trainer, data.tokenizer
    rank, world, accumulate, local = (
        (trainer.global_rank, trainer.world_size, trainer.accumulate_grad_batches, trainer.num_devices)
        if trainer else (0, 1, 1, 1))
    identity_of_data = _identity(data)
    fingerprint = hashlib.sha256(json.dumps(identity_of_data).encode()).hexdigest()[:16]
    encoders = [SourceEncoder(source, tokenizer, data.train_on) for source in data.sources]
    sizes = [source.sizes() for source in data.sources]
    total = None if None in sizes else sum(sum(files.values()) for files in sizes if files)
    stream = Stream(
        encoders, seq_len=data.seq_len, packing=data.packing, overlong=data.overlong, seed=data.seed,
        buffer=data.stream_buffer, on_bad_record=data.on_bad_record, bad_record_limit=data.bad_record_limit,
        rank=rank, world=world, share=Exchange() if world > 1 else None,
        quarantine=cache_root(data.cache_dir) / f"stream-{fingerprint}" / "quarantine.jsonl",
        num_proc=process_count(data.num_proc, total, shared_by=local), fingerprint=fingerprint)
    pad_id = tokenizer.pad_id if tokenizer.pad_id is not None else tokenizer.eos_id
    return StreamLoader(stream, steps=trainer.max_steps if trainer else 1, batch_size=data.batch_size, pad_id=pad_id,
                        token_bytes=tokenizer.token_bytes, rank=rank, world=world, accumulate=accumulate,
                        trim=data.packing == "none", identity=identity_of_data)


def first_chunk(data: Data) -> tuple[Stream, Chunk]:
    """The first chunk of the stream, read independently by each process."""
    stream = open_loader(data).stream
    stream.share, stream.rank, stream.world, stream.is_first = None, 0, 1, False
    with closing(stream.chunks(stream.beginning)) as chunks:
        return stream, next(chunks)


def _identity(data: Data) -> dict[str, Any]:
    """Everything that determines the order of packed sequences, by names that users know."""
    names = ("train_on", "seq_len", "packing", "overlong", "seed", "stream_buffer")
    parts = {name: getattr(data, name) for name in names} | {"tokenizer": data.tokenizer.fingerprint[:16]}
    for number, source in enumerate(data.sources):
        settings = {key: value for key, value in asdict(source).items() if key != "path"}
        parts |= {f"the data of sources[{number}]": identity(source),
                  f"the settings of sources[{number}]": json.dumps(settings, sort_keys=True)}
    return parts
