"""The data of a run, as Lightning asks for it: sources in, loaders of packed batches out.

`__init__` only stores; `prepare_data` tokenizes (one process a machine), `setup` opens, splits and packs. Knows the
trainer's number of processes and accumulation, and nothing of models.
"""

import hashlib
import json
import sys
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any, Literal

import lightning as L
import numpy as np

from lit_llm.data import packing as pack
from lit_llm.data import stream_loader
from lit_llm.data.loader import Corpus, RowLoader
from lit_llm.data.packing import Overlong, Packing, Rows
from lit_llm.data.prepare import OnBadRecord, prepare, wait_for
from lit_llm.data.sources import Source
from lit_llm.data.store import Report, TokenStore
from lit_llm.data.stream_loader import StreamLoader
from lit_llm.errors import InputError
from lit_llm.tokenizer import Tokenizer, TrainOn

Stage = Literal["train", "val", "test"]


@dataclass(frozen=True, slots=True)
class Plan:
    """One stage's data: what tokens there are and how they lie in rows; `notes` counts what was cut, dropped, drawn."""

    corpus: Corpus
    rows: Rows
    notes: dict[str, int]
    fingerprint: str


class TextDataModule(L.LightningDataModule):
    """Documents and conversations as packed batches.

    Args:
        sources: What to train on: a list of `{path: ...}`.
        val_sources: What to validate on; null takes `val_fraction` of the training records.
        val_fraction: Share of the training records that is held out, 0 to 1, by a hash of each record's content: a
            record stays on its side when others are added, and its exact duplicates go with it.
        test_sources: What `test` reads; null takes the validation data.
        tokenizer: Folder or hub id; null takes the model's.
        chat_template: A .jinja file, or the name of one of the tokenizer's; null takes the tokenizer's own.
        train_on: Of a conversation, learn every answer (assistant), the last one (last), or every token (all).
            Documents are learned whole.
        seq_len: Tokens of a row, at least 2. Memory grows with `seq_len * batch_size`.
        batch_size: Rows per device and micro-step.
        packing: `best_fit` puts whole sequences side by side, never attending across; `concat` cuts anywhere and
            wastes nothing (pretraining); `none` puts one in a row and pads to the longest of the batch.
        overlong: A conversation longer than `seq_len`: keep its head (cut), leave it out (drop), or stop (error).
            Documents become windows that overlap by one token, so nothing is lost.
        on_bad_record: Stop at the first bad record (error), or write it aside with the reason (quarantine).
        seed: Of the order, and of the records drawn by a fractional weight.
        cache_dir: Where tokens are kept; null is `$LIT_LLM_CACHE`, else `~/.cache/lit_llm`.
        num_proc: Processes that tokenize; null takes the machine's cores, and one where there is little to do.
        dedup: Leave out training records that say exactly what an earlier one says, of any source.
        bad_record_limit: Share of a source's records that may be set aside; above it something else is wrong.
        streaming: Read the training sources while training, again and again, and keep no tokens: for a corpus that is
            larger than memory or disk. It wants `trainer.max_steps`, and `val_sources` to validate on. A weight is then
            the share of the next records that come from its source.
        stream_buffer: Characters of text that a stream packs and shuffles together, beside an order of files for each
            pass; at least a step's worth is good. A resumed run makes at most this much again.
    """

    def __init__(
        self,
        sources: list[Source],
        val_sources: list[Source] | None = None,
        val_fraction: float = 0.0,
        test_sources: list[Source] | None = None,
        tokenizer: str | None = None,
        chat_template: str | None = None,
        train_on: TrainOn = "assistant",
        seq_len: int = 1024,
        batch_size: int = 4,
        packing: Packing = "best_fit",
        overlong: Overlong = "cut",
        on_bad_record: OnBadRecord = "error",
        seed: int = 0,
        cache_dir: str | None = None,
        num_proc: int | None = None,
        dedup: bool = False,
        bad_record_limit: float = 0.1,
        streaming: bool = False,
        stream_buffer: int = 4_000_000,
    ) -> None:
        super().__init__()
        self.sources, self.val_sources, self.test_sources = sources, val_sources, test_sources
        self.val_fraction, self.tokenizer_path, self.chat_template = val_fraction, tokenizer, chat_template
        self.train_on, self.seq_len, self.batch_size = train_on, seq_len, batch_size
        self.packing, self.overlong, self.on_bad_record = packing, overlong, on_bad_record
        self.seed, self.cache_dir, self.num_proc = seed, cache_dir, num_proc
        self.dedup, self.bad_record_limit = dedup, bad_record_limit
        self.streaming, self.stream_buffer = streaming, stream_buffer
        self.stream: StreamLoader | None = None
        self.plans: dict[Stage, Plan] = {}
        self.reports: list[Report] = []
        self._tokenizer: Tokenizer | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, loaded at first use.

        Raises:
            InputError: None is named.
        """
        if self._tokenizer is None:
            if not self.tokenizer_path:
                raise InputError("no tokenizer is named", where="data.tokenizer",
                                 fix="Set data.tokenizer to a folder or hub id; with model.base it is the model's.")
            self._tokenizer = Tokenizer.load(self.tokenizer_path, chat_template=self.chat_template)
        return self._tokenizer

    # ---- Lightning's hooks -------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Tokenize what is not in the cache; Lightning calls it on one process of each machine."""
        self._check()
        kept = [] if self.streaming else self.sources
        for source in [*kept, *(self.val_sources or ()), *(self.test_sources or ())]:
            self._open(source, write=True)

    def setup(self, stage: str | None = None) -> None:
        """Open the stores and plan the rows of what `stage` needs; a second call does nothing."""
        self._check()
        if self.streaming:
            stream_loader.check(self)
        wanted: dict[str | None, tuple[Stage, ...]] = {
            "fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ()}
        for name in wanted.get(stage, ("train", "val", "test")):
            if name in self.plans or not (name == "train" or self._held_out(name)):
                continue
            if name == "train" and self.streaming:
                self._open_stream()
            else:
                self.plans[name] = self._plan(name)
        if self._rank == 0 and stage in ("fit", None):
            print(self.summary(), file=sys.stderr, flush=True)

    def train_dataloader(self) -> RowLoader | StreamLoader:
        """Shuffled, in whole accumulation windows, resumable."""
        if self.streaming:
            self.stream = stream_loader.open_loader(self)
            return self.stream
        trainer = self.trainer
        return self._loader("train", shuffle=True, accumulate=trainer.accumulate_grad_batches if trainer else 1)

    def val_dataloader(self) -> RowLoader | list[Any]:
        """In order; every token is counted once over all ranks."""
        return self._loader("val") if "val" in self.plans else []

    def test_dataloader(self) -> RowLoader | list[Any]:
        """As `val_dataloader`, of `test_sources`."""
        return self._loader("test") if "test" in self.plans else []

    def teardown(self, stage: str) -> None:
        """Say what a stream really held."""
        if self.stream is not None and stage == "fit" and self._rank == 0:
            print("\n".join(self.stream.told()), file=sys.stderr, flush=True)

    # ---- from sources to rows ----------------------------------------------------------------------------------------

    def _check(self) -> None:
        if not self.sources:
            raise InputError("there is nothing to read", where="data.sources", fix="Add `- path: FILE`.")
        if not 0 <= self.val_fraction < 1:
            raise InputError(f"{self.val_fraction} is not a share from 0 to below 1", where="data.val_fraction")
        if self.seq_len < 2:
            raise InputError(f"{self.seq_len} leaves nothing to predict; use 2 or more", where="data.seq_len")
        if self.batch_size < 1:
            raise InputError(f"{self.batch_size} is no number of rows", where="data.batch_size")
        for source in self.sources:
            if not source.weight > 0:
                raise InputError(f"weight {source.weight} draws nothing; use a number above 0", where=source.path)

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    def _held_out(self, stage: Stage) -> bool:
        return bool(self.val_sources or self.val_fraction or (stage == "test" and self.test_sources))

    def _open(self, source: Source, *, write: bool) -> TokenStore:
        how: dict[str, Any] = {
            "train_on": self.train_on, "on_bad_record": self.on_bad_record, "cache_dir": self.cache_dir}
        if not write:
            return wait_for(source, self.tokenizer, **how)
        store = prepare(source, self.tokenizer, num_proc=self.num_proc, **how)
        bad, read = store.report.quarantined, store.report.read
        if bad > self.bad_record_limit * read:
            raise InputError(f"{bad:,} of {read:,} records are bad, more than data.bad_record_limit allows",
                             where=source.path, fix=f"They are in {store.folder / 'quarantine.jsonl'}, each with its "
                             "reason; mend them, or raise the limit.")
        return store

    def _plan(self, stage: Stage) -> Plan:
        own = self.test_sources if stage == "test" and self.test_sources else self.val_sources
        listed = self.sources if stage == "train" or not own else own
        side = None if (own and stage != "train") or self.val_sources or not self.val_fraction else stage
        draws: list[tuple[TokenStore, np.ndarray]] = []
        notes: dict[str, int] = {}
        local_rank = self.trainer.local_rank if self.trainer else 0
        for source in listed:
            store = self._open(source, write=local_rank == 0)
            if stage == "train" and store.report not in self.reports:
                self.reports.append(store.report)
            draws.append((store, _one_side(store, self.val_fraction, side)))
        if stage == "train":
            repeats = _repeats(draws)
            if count := sum(int(again.sum()) for again in repeats):
                notes["duplicates_left_out" if self.dedup else "duplicates"] = count
            if self.dedup:
                draws = [(store, which[~again]) for (store, which), again in zip(draws, repeats, strict=True)]
            draws = [(store, _weighted(which, source.weight, [self.seed, number]))
                     for number, ((store, which), source) in enumerate(zip(draws, listed, strict=True))]
        corpus = Corpus(draws, end=stage == "train")
        if not len(corpus):
            raise InputError(f"no record is left for {stage}", where="data.val_fraction" if side else "data.sources",
                             fix="Name data.val_sources, or cut text files into more documents (document: paragraph).")
        rows = self._rows(corpus, stage, notes)
        if not rows.supervised.sum():
            raise InputError(f"no token of the {stage} data is supervised", where="data.train_on",
                             fix="Look at the rows: python -m lit_llm inspect --config ...")
        keys = [[store.key for store, _ in draws], stage, side, self.val_fraction, [source.weight for source in listed],
                self.seq_len, self.packing, self.overlong, self.seed, self.dedup]
        return Plan(corpus, rows, notes, hashlib.sha256(json.dumps(keys).encode()).hexdigest()[:16])

    def _rows(self, corpus: Corpus, stage: Stage, notes: dict[str, int]) -> Rows:
        """Segments, then rows. Evaluation goes document by document whatever the packing: its numbers must not move."""
        lengths = corpus.lengths
        if stage == "train" and self.packing == "concat":
            if self.train_on != "all" and not corpus.is_document.all():
                place = corpus.place(int(np.flatnonzero(~corpus.is_document)[0]))
                raise InputError("concat would cut conversations apart, answers from their questions", where=place,
                                 fix="Set data.packing to best_fit; concat is for documents.")
            segments = pack.whole(lengths)[np.random.default_rng(self.seed).permutation(len(lengths))]
        else:
            try:
                split = pack.split(lengths, corpus.is_document, seq_len=self.seq_len, overlong=self.overlong)
            except InputError as error:
                raise InputError(error.what, where=corpus.place(int(error.where)), fix=error.fix) from None
            segments, counts = split.segments, corpus.count(split.segments)
            unlearnable = (counts == 0)
            notes.update(cut=len(split.cut), dropped_overlong=len(split.dropped),
                         dropped_nothing_left=int(unlearnable.sum()))
            segments = segments[~unlearnable]
        packing = self.packing if stage == "train" or self.packing == "none" else "best_fit"
        rows = pack.pack(segments, seq_len=self.seq_len, packing=packing)
        return rows.counted(corpus.count(rows.segments))

    def _loader(self, stage: Stage, *, shuffle: bool = False, accumulate: int = 1) -> RowLoader:
        plan, trainer, tokenizer = self.plans[stage], self.trainer, self.tokenizer
        pad_id = tokenizer.pad_id if tokenizer.pad_id is not None else tokenizer.eos_id
        return RowLoader(plan.corpus, plan.rows, batch_size=self.batch_size, seq_len=self.seq_len, pad_id=pad_id,
                         token_bytes=tokenizer.token_bytes, seed=self.seed, rank=self._rank,
                         world=trainer.world_size if trainer else 1, accumulate=accumulate, shuffle=shuffle,
                         trim=self.packing == "none", fingerprint=plan.fingerprint)

    def _open_stream(self) -> None:
        """Where the data are only looked at, the stream's first chunk stands for all of it."""
        if not stream_loader.trains(self):
            stream = stream_loader.open_loader(self).stream
            with closing(stream.chunks(stream.beginning)) as chunks:
                chunk = next(chunks)
            self.plans["train"] = Plan(chunk.corpus, chunk.rows, stream.notes, stream.fingerprint)

    # ---- what the user sees ------------------------------------------------------------------------------------------

    def summary(self) -> str:
        """Some lines: records read, kept, dropped and why; then tokens, supervised share, rows and fill per stage."""
        from lit_llm.data.inspection import describe

        lines = [line for report in self.reports for line in describe(report)]
        if self.streaming:
            lines.append(f"train: streamed from {', '.join(source.path for source in self.sources)}"
                         + (f"; below, its first {self.stream_buffer:,} characters" if "train" in self.plans else ""))
        for stage, plan in self.plans.items():
            tokens, rows = int(plan.rows.lengths.sum()), plan.rows
            share, fill = rows.supervised.sum() / tokens, tokens / (len(rows) * self.seq_len)
            notes = "".join(f", {count:,} {name.replace('_', ' ')}" for name, count in plan.notes.items() if count)
            lines.append(f"{stage}: {len(plan.corpus):,} sequences{notes}; {tokens:,} tokens, {share:.1%} supervised; "
                         f"{len(rows):,} rows of {self.seq_len}, {fill:.1%} full")
        return "\n".join(lines)

    def facts(self) -> dict[str, Any]:
        """The summary as values, for a run's report."""
        return {"sources": [asdict(report) for report in self.reports],
                **({"ledger": self.stream.ledger} if self.stream else {}),
                **{stage: {"sequences": len(plan.corpus), "rows": len(plan.rows), **plan.notes,
                           "tokens": int(plan.rows.lengths.sum()), "supervised": int(plan.rows.supervised.sum())}
                   for stage, plan in self.plans.items()}}


def _one_side(store: TokenStore, val_fraction: float, side: Stage | None) -> np.ndarray:
    """Indices of a store's sequences for train or for the held-out side; all of them where nothing is split."""
    if side is None:
        return np.arange(len(store))
    held_out = store.sequences["content"] < np.uint64(val_fraction * 2.0**64)
    return np.flatnonzero(~held_out if side == "train" else held_out)


def _repeats(draws: list[tuple[TokenStore, np.ndarray]]) -> list[np.ndarray]:
    """Of each draw, whether a sequence belongs to a record that says exactly what an earlier one says.

    A record may be several sequences, which say the same and stay together.
    """
    rows = [store.sequences[which] for store, which in draws]
    content = np.concatenate([part["content"] for part in rows])
    keys = np.stack([np.repeat(np.arange(len(rows)), [len(part) for part in rows]),
                     *(np.concatenate([part[name] for part in rows]) for name in ("file", "number"))])
    record = np.cumsum((np.diff(keys, axis=1, prepend=-1) != 0).any(axis=0))
    _, first, said = np.unique(content, return_index=True, return_inverse=True)
    again = record != record[first][said]
    return np.split(again, np.cumsum([len(part) for part in rows])[:-1])


def _weighted(which: np.ndarray, weight: float, seed: list[int]) -> np.ndarray:
    """`floor(weight)` copies, and a seeded sample for the rest."""
    copies, rest = divmod(weight, 1)
    extra = np.random.default_rng(seed).choice(which, size=round(rest * len(which)), replace=False)
    return np.concatenate([*[which] * int(copies), np.sort(extra)])
