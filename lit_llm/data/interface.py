"""The interface of a data module for checks, streams and inspection; see `datamodule.TextDataModule`."""

from typing import Any, Protocol

from lit_llm.data.records.sources import Source
from lit_llm.data.rows.loader import RowLoader
from lit_llm.data.rows.mixture import Stage
from lit_llm.data.rows.packing import Overlong, Packing
from lit_llm.data.rows.plan import Plan
from lit_llm.data.stream.loader import StreamLoader
from lit_llm.data.tokens.encode import OnBadRecord
from lit_llm.data.tokens.store import Report
from lit_llm.text.tokenizer import Tokenizer, TrainOn


class Data(Protocol):
    """The settings of a data module, its trainer, and its plans."""

    sources: list[Source]
    val_sources: list[Source] | None
    test_sources: list[Source] | None
    guard_sources: list[Source] | None
    guard_tokens: int
    val_fraction: float
    test_fraction: float
    train_on: TrainOn
    seq_len: int
    batch_size: int
    packing: Packing
    overlong: Overlong
    on_bad_record: OnBadRecord
    bad_record_limit: float
    stride: int | None
    dedup: bool
    seed: int
    cache_dir: str | None
    num_proc: int | None
    streaming: bool
    stream_buffer: int
    plans: dict[Stage, Plan]
    trainer: Any

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer."""

    @property
    def reports(self) -> list[Report]:
        """The report of each source."""

    def train_dataloader(self) -> RowLoader | StreamLoader:
        """The training batches."""
