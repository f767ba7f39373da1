"""The LightningDataModule of a run: it prepares sources and creates loaders of packed batches.

`__init__` only stores settings; `prepare_data` tokenizes (with a single process), `setup` opens, splits and packs.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import lightning as L
import numpy as np

from lit_llm.data import facts, guard, idle, streaming
from lit_llm.data.records.sources import Source
from lit_llm.data.rows import identity, packing
from lit_llm.data.rows.corpus import Corpus, Occurrences
from lit_llm.data.rows.loader import Batch, RowLoader
from lit_llm.data.rows.mixture import Mixture, Stage, repeats, side
from lit_llm.data.rows.packing import CONCAT, Overlong, Packing
from lit_llm.data.rows.plan import Plan
from lit_llm.data.stream.loader import StreamLoader
from lit_llm.data.tokens.encode import OnBadRecord
from lit_llm.data.tokens.prepare import prepare, wait_for
from lit_llm.data.tokens.store import Report, TokenStore
from lit_llm.errors import InputError
from lit_llm.system import ranges
from lit_llm.text.tokenizer import Tokenizer, TrainOn


class TextDataModule(L.LightningDataModule):
    """Documents and conversations as packed batches.

    Args:
        sources: Training data: a list of `{path: ...}`.
        val_sources: Validation data, each record once, so without weights; null takes `val_fraction` of the training
            records.
        val_fraction: Share of the records of `sources` used for validation only, chosen by a hash of their content: a
            record stays in its split when others are added, and exact duplicates stay together. Not used with
            `val_sources`.
        test_sources: Test data; null takes `test_fraction`, or without that the validation data.
        tokenizer: Folder or hub id of the tokenizer; null uses the model's.
        chat_template: A .jinja file, or the name of one of the tokenizer's templates; null uses its default.
        template_args: Values of the chat template's variables, such as `{enable_thinking: false}`. They become defaults
            within the run's and the export's template, so chat, the server and other programs use them as well. A
            record's own `chat_template_kwargs` (or `template_args`) take precedence.
        train_on: Supervised tokens of a conversation: every answer (assistant), the last answer (last), or every token
            (all). All tokens of documents are supervised.
        seq_len: Tokens per packed sequence, at least 2. Memory grows with `seq_len * batch_size`.
        batch_size: Packed sequences per device and micro-batch.
        packing: `best_fit` packs whole documents and conversations, isolated in attention; `concat` cuts them at any
            token and needs no padding (pretraining); `none` does not pack, and pads to the longest of the batch.
        overlong: What to do with a conversation longer than `seq_len`: keep its beginning (cut), leave it out (drop),
            or stop (error). Documents become windows that overlap by one token, so nothing is lost.
        on_bad_record: Stop at the first bad record (error), or set it aside with the reason (quarantine).
        seed: Seed of the order, and of the records drawn with a fractional weight.
        cache_dir: Folder of the token cache; null is `$LIT_LLM_CACHE`, else `~/.cache/lit_llm`.
        num_proc: Number of tokenizing processes; null uses all cores, or one for little data.
        dedup: Leave out training records that are exact duplicates of earlier ones, of any source.
        bad_record_limit: Maximum share of a source's records that may be set aside.
        test_fraction: As `val_fraction`, for `test`. Changing one of the two shares does not change the records of the
            other.
        streaming: Read the training sources repeatedly while training and store no tokens, for a corpus larger than
            memory or disk. It needs `trainer.max_steps`, and `val_sources` for validation. A weight is then the share
            of the next records that come from its source.
        stream_buffer: Characters of text that a stream packs and shuffles together, besides a random order of files in
            each pass; at least the text of a step is recommended. A resumed run rebuilds at most this much.
        stride: Tokens by which the windows of a document longer than `seq_len` advance in evaluation. Each token is
            still scored once, with at least `seq_len - stride` tokens before it, so the nll is lower and closer to
            that of a longer context, and evaluation takes `seq_len / stride` times as long. Null is `seq_len - 1`: each
            window begins with the last token of the one before.
        guard_sources: Text that the model should not forget, such as a sample of its pretraining data: a list of
            `{path: ...}`; `sample:documents_val.jsonl` ships with the package. `fit` scores it before training, at
            each validation and at the end (`guard/nll`), and reports a rise beyond its 95 % interval over documents.
        guard_tokens: Supervised tokens of it, at most. Each source gets an equal part; at most a thirtieth of that is
            taken of each document.
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
        bad_record_limit: float = idle.LIMIT,
        test_fraction: float = 0.0,
        streaming: bool = False,
        stream_buffer: int = idle.BUFFER,
        template_args: dict[str, bool | int | float | str | list[str] | None] | None = None,
        stride: int | None = None,
        guard_sources: list[Source] | None = None,
        guard_tokens: int = guard.TOKENS,
    ) -> None:
        super().__init__()
        self.sources, self.val_sources, self.test_sources = sources, val_sources, test_sources
        self.val_fraction, self.tokenizer_path, self.chat_template = val_fraction, tokenizer, chat_template
        self.train_on, self.seq_len, self.batch_size = train_on, seq_len, batch_size
        self.packing, self.overlong, self.on_bad_record = packing, overlong, on_bad_record
        self.seed, self.cache_dir, self.num_proc = seed, cache_dir, num_proc
        self.dedup, self.bad_record_limit, self.test_fraction = dedup, bad_record_limit, test_fraction
        self.streaming, self.stream_buffer = streaming, stream_buffer
        self.template_args, self.stride = template_args, stride
        self.guard_sources, self.guard_tokens = guard_sources, guard_tokens
        self.stream: StreamLoader | None = None
        self.plans: dict[Stage, Plan] = {}
        self.quiet = False                              # whether `setup` prints no summary
        self._tokenizer: Tokenizer | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, loaded at first use; where none is named, that of the module's base model.

        Raises:
            InputError: No tokenizer is configured.
        """
        if self._tokenizer is None:
            path = self.tokenizer_path or getattr(getattr(self.trainer, "lightning_module", None), "base", None)
            if not path:
                raise InputError("no tokenizer is set", where="data.tokenizer",
                                 fix="Set data.tokenizer to a folder or hub id; the default is that of model.base.")
            self._tokenizer = Tokenizer.load(path, chat_template=self.chat_template,
                                             template_args=self.template_args)
        return self._tokenizer

    # ---- Lightning's hooks -------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Tokenize sources that are not in the cache; Lightning calls it on one process per machine.

        With several processes, `setup` does it while the others poll the disk: here they would wait in a collective.
        """
        self._check()
        if self.trainer and self.trainer.world_size > 1:
            return
        stored = [] if self.streaming else self.sources
        for sources in (stored, self.val_sources, self.test_sources, self.guard_sources):
            for source in sources or ():
                self._open(source, write=True)

    def setup(self, stage: str | None = None) -> None:
        """Open the stores and pack the data that `stage` needs; a second call does nothing."""
        self._check()
        if self.streaming:
            streaming.check(self)
        wanted: dict[str | None, tuple[Stage, ...]] = {
            "fit": ("train", "val", "guard"), "validate": ("val",), "test": ("test",), "predict": ()}
        for name in wanted.get(stage, ("train", "val", "test")):
            if name in self.plans or not (name == "train" or self._held_out(name)):
                continue
            if name == "train" and self.streaming:
                self._open_stream()
            else:
                self.plans[name] = self._plan(name)
                self._note_leaks(name)
        if self._rank == 0 and stage in ("fit", None) and not self.quiet:
            print(self.summary(), file=sys.stderr, flush=True)

    def train_dataloader(self) -> RowLoader | StreamLoader:
        """Training batches: shuffled, in complete accumulation windows, resumable."""
        if self.streaming:
            self.stream = streaming.open_loader(self)
            return self.stream
        trainer = self.trainer
        return self._loader("train", shuffle=True, accumulate=trainer.accumulate_grad_batches if trainer else 1)

    def val_dataloader(self) -> RowLoader | list[Any]:
        """Validation batches in order; every token is counted once over all ranks."""
        return self._loader("val") if "val" in self.plans else []

    def test_dataloader(self) -> RowLoader | list[Any]:
        """As `val_dataloader`, for `test_sources`."""
        return self._loader("test") if "test" in self.plans else []

    def guard_batches(self) -> Iterator[tuple[np.ndarray, Batch]]:
        """This rank's share of the guard documents, for `training/record/forgetting.py`; see `guard.batches`."""
        return guard.batches(self.plans["guard"], self.batch_size, self.tokenizer.token_bytes, rank=self._rank,
                             world=self.trainer.world_size if self.trainer else 1)

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> dict[str, Any]:
        """Pin memory for a GPU, which can then copy asynchronously."""
        if self.trainer is None or self.trainer.strategy.root_device.type != "cuda":
            return {**batch}
        return {name: value.pin_memory() if hasattr(value, "pin_memory") else value for name, value in batch.items()}

    def teardown(self, stage: str) -> None:
        """Log what a stream contained."""
        if self.stream is not None and stage == "fit" and self._rank == 0 and (lines := self.stream.summary_lines()):
            print("\n".join(lines), file=sys.stderr, flush=True)

    # ---- from sources to packed sequences ----------------------------------------------------------------------------

    def _check(self) -> None:
        if not self.sources:
            raise InputError("no source is set", where="data.sources", fix="Add `- path: FILE`.")
        ranges.check_all("data", vars(self))
        if self.val_fraction + self.test_fraction >= 1:
            raise InputError(f"{self.val_fraction} for validation and {self.test_fraction} for test leave no training "
                             "data",
                             where="data.test_fraction")
        packing.check(self.packing)
        idle.check(self)

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    def _held_out(self, stage: Stage) -> bool:
        own = {"test": self.test_sources or self.test_fraction, "guard": self.guard_sources}.get(stage)
        return bool(own or (stage != "guard" and (self.val_sources or self.val_fraction)))

    def _open(self, source: Source, *, write: bool) -> TokenStore:
        how: dict[str, Any] = {
            "train_on": self.train_on, "on_bad_record": self.on_bad_record, "cache_dir": self.cache_dir}
        if not write:
            return wait_for(source, self.tokenizer, **how)
        store = prepare(source, self.tokenizer, num_proc=self.num_proc, bad_record_limit=self.bad_record_limit, **how)
        store.report.refuse_flood(self.bad_record_limit, f"They are in {store.folder / 'quarantine.jsonl'}, each with "
                                  "its reason; fix them, or raise data.bad_record_limit.")
        return store

    def _listed(self, stage: Stage) -> tuple[list[Source], Stage | None]:
        """The sources of a stage, and the split of their records; null is all records."""
        if stage == "test" and not (self.test_sources or self.test_fraction):
            stage = "val"
        own = {"train": None, "val": self.val_sources, "test": self.test_sources, "guard": self.guard_sources}[stage]
        return (own, None) if own else (self.sources, stage)

    def _plan(self, stage: Stage) -> Plan:
        listed, wanted = self._listed(stage)
        shares = {"val_fraction": 0.0 if self.val_sources else self.val_fraction,
                  "test_fraction": 0.0 if self.test_sources else self.test_fraction}
        local_rank = self.trainer.local_rank if self.trainer else 0
        stores = [self._open(source, write=local_rank == 0) for source in listed]
        draws = [(store, np.flatnonzero(side(store.sequences["content"], wanted, **shares)) if wanted
                  else np.arange(len(store))) for store in stores]
        names = [source.path for source in listed]
        if stage == "guard":
            return guard.plan(draws, names, seq_len=self.seq_len, tokens=self.guard_tokens, packing=self.packing,
                              stores=stores, made_of=self._identity(stores, names, ("train_on", "seq_len")))
        overlap = 1 if stage == "train" or self.stride is None else self.seq_len - self.stride
        corpus, notes = Corpus(draws, end=stage == "train", names=names, overlap=overlap), {}
        if stage == "train":
            again = repeats(corpus)
            notes["duplicates_left_out" if self.dedup else "duplicates"] = int(again.sum())
            idle.note_documents(corpus, self.train_on, rank=self._rank)
            if self.dedup:
                draws = [(store, which[~again[corpus.store_of == number]])
                         for number, (store, which) in enumerate(draws)]
                corpus = Corpus(draws, names=names)
        if not len(corpus):
            raise InputError(f"no record is left for {stage}", where=f"data.{wanted}_fraction"
                             if wanted in ("val", "test") else "data.sources",
                             fix=f"Set data.{'val' if stage == 'train' else stage}_sources, or split text files into "
                                 "more documents (document: paragraph).")
        mixture = self._mixture(corpus, stage, [source.weight for source in listed])
        row_settings = ("train_on", "seq_len", "packing", "overlong", "seed", "dedup")
        made_of = self._identity(stores, names, row_settings) | {"weights": [source.weight for source in listed]} | {
            f"data.{name}": share for name, share in shares.items() if wanted} | (
            {"data.stride": self.stride} if self.stride and stage != "train" else {})
        return Plan(corpus, mixture.first, notes | mixture.notes, made_of, stores,
                    mixture.rows if mixture.moves else None)

    def _identity(self, stores: list[TokenStore], names: list[str], keys: tuple[str, ...]) -> dict[str, Any]:
        """Identity of the data of a stage by named parts."""
        return {"data.sources": [identity.of_store(store, name) for store, name in zip(stores, names, strict=True)],
                "tokenizer": self.tokenizer.fingerprint[:16], **{f"data.{name}": getattr(self, name) for name in keys}}

    def _note_leaks(self, stage: Stage) -> None:
        """Count evaluation records that are exact duplicates of training records."""
        if stage != "train" and "train" in self.plans:
            plan, trained = self.plans[stage], self.plans["train"].corpus.column("content")
            plan.notes["also_in_train"] = int(np.isin(plan.corpus.column("content"), trained).sum())

    def _mixture(self, corpus: Corpus, stage: Stage, weights: list[float]) -> Mixture:
        """The packed sequences of a stage; `concat` is not used in evaluation, whose metrics must not depend on it."""
        training = stage == "train"
        packing = self.packing if training or self.packing == "none" else "best_fit"
        if packing == "concat" and self.train_on != "all" and not corpus.is_document.all():
            place = corpus.place(int(np.flatnonzero(~corpus.is_document)[0]))
            raise CONCAT.error(where=place)
        mixture = Mixture(corpus, weights if training else [1.0] * len(weights), seq_len=self.seq_len, packing=packing,
                          overlong=self.overlong, seed=self.seed)
        if not mixture.first.supervised.sum():
            raise InputError(f"no token of the {stage} data is supervised", where="data.train_on",
                             fix="Inspect the data: python -m lit_llm inspect --config ...")
        if training and corpus.endless(mixture.first.segments, self.tokenizer.stop_ids):
            conversations = int((~corpus.is_document).sum())
            raise InputError(f"none of {conversations:,} conversations has a supervised stop token: all are longer "
                             f"than {self.seq_len} tokens and cut within an answer, so the model would never stop",
                             where="data.seq_len", fix=f"Raise it: the shortest has {corpus.lengths.min():,} tokens, "
                             f"the longest {corpus.lengths.max():,}.")
        return mixture

    def _loader(self, stage: Stage, *, shuffle: bool = False, accumulate: int = 1) -> RowLoader:
        plan, trainer, tokenizer = self.plans[stage], self.trainer, self.tokenizer
        pad_id = tokenizer.pad_id if tokenizer.pad_id is not None else tokenizer.eos_id
        return RowLoader(plan.corpus, plan.rows, batch_size=self.batch_size, seq_len=self.seq_len, pad_id=pad_id,
                         token_bytes=tokenizer.token_bytes, seed=self.seed, rank=self._rank,
                         world=trainer.world_size if trainer else 1, accumulate=accumulate, shuffle=shuffle,
                         trim=self.packing == "none", fingerprint=plan.fingerprint, draw=plan.draw,
                         token_sizes=None if stage == "train" else tokenizer.token_sizes)

    def _open_stream(self) -> None:
        """Open the stream; where data are only inspected, its first chunk represents it."""
        if not streaming.trains(self):
            stream, chunk = streaming.first_chunk(self)
            self.plans["train"] = Plan(chunk.corpus, chunk.rows, stream.notes, {"stream": stream.fingerprint})

    def occurrences(self) -> Occurrences | None:
        """Counts of each token in the training data, or in the beginning of a stream; null without training data.

        They are equal on all processes, and no collective is needed.
        """
        if "train" in self.plans:
            counts = self.plans["train"].corpus.occurrences(self.tokenizer.vocab_size)
            return replace(counts, whole=counts.whole and not self.streaming)
        if not self.streaming or not streaming.trains(self):
            return None
        _, chunk = streaming.first_chunk(self)
        return replace(chunk.corpus.occurrences(self.tokenizer.vocab_size), whole=False)

    # ---- reports -----------------------------------------------------------------------------------------------------

    @property
    def reports(self) -> list[Report]:
        """The report of each opened source."""
        out: list[Report] = []
        for plan in self.plans.values():
            out += [store.report for store in plan.stores if store.report not in out]
        return out

    def summary(self) -> str:
        """A few lines: records read, kept and dropped; tokens, supervised share and packing per stage; steps."""
        return facts.summary_of(self)

    def facts(self) -> dict[str, Any]:
        """The summary as values, for a run's files; `ledger` is what training has drawn so far of each source."""
        return facts.facts_of(self)
