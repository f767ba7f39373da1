"""Refuse options of a data module that have no effect, by themselves or in combination.

Options whose effect depends on files (`split`, `subset`, `document` of a source) are checked in `sources.py`.
"""

import logging
from collections.abc import Callable

from lit_llm import rules
from lit_llm.data import guard
from lit_llm.data.interface import Data
from lit_llm.data.records.sources import Source
from lit_llm.data.rows.corpus import Corpus
from lit_llm.data.rows.packing import CONCAT
from lit_llm.rules import Rule
from lit_llm.system import ranges

log = logging.getLogger(__name__)
LIMIT, BUFFER = 0.1, 4_000_000                      # defaults of bad_record_limit and stream_buffer


FEATURES: dict[str, Callable[[Data], bool]] = {
    "`data.val_sources`": lambda data: bool(data.val_sources),
    "`data.val_fraction`": lambda data: bool(data.val_fraction),
    "`data.test_sources`": lambda data: bool(data.test_sources),
    "`data.test_fraction`": lambda data: bool(data.test_fraction),
    "a `weight` in `data.val_sources`": lambda data: _weighted(data.val_sources),
    "a `weight` in `data.test_sources`": lambda data: _weighted(data.test_sources),
    "a `weight` in `data.guard_sources`": lambda data: _weighted(data.guard_sources),
    "`data.guard_sources`": lambda data: bool(data.guard_sources),
    "no `data.guard_sources`": lambda data: not data.guard_sources,
    "`data.guard_tokens`": lambda data: data.guard_tokens != guard.TOKENS,
    "a `weight` of the only source": lambda data: len(data.sources) == 1 and _weighted(data.sources),
    "`data.streaming`": lambda data: data.streaming,
    "no `data.streaming`": lambda data: not data.streaming,
    "`data.stream_buffer`": lambda data: data.stream_buffer != BUFFER,
    "`data.bad_record_limit`": lambda data: data.bad_record_limit != LIMIT,
    "`data.on_bad_record: error`": lambda data: data.on_bad_record == "error",
    "`data.packing: concat`, no evaluation": lambda data: data.packing == "concat" and not (
        data.val_sources or data.val_fraction or data.test_sources or data.test_fraction),
    "`data.stride`": lambda data: data.stride is not None,
    "a `data.stride` of at least `data.seq_len`": lambda data: data.stride is not None and data.stride >= data.seq_len,
    "no evaluation": lambda data: not (data.val_sources or data.val_fraction or data.test_sources
                                       or data.test_fraction),
    "`data.overlong`": lambda data: data.overlong != "cut",
}
RULES = (
    *(Rule(f"`data.{stage}_sources`", f"`data.{stage}_fraction`", f"data.{stage}_sources is set, so no share of "
           "data.sources is used for it", f"data.{stage}_fraction", f"set --data.{stage}_fraction 0, or "
           f"--data.{stage}_sources null") for stage in ("val", "test")),
    *(Rule(f"a `weight` in `data.{stage}_sources`", f"`data.{stage}_sources`", "a weight has no effect: "
           "evaluation uses each record once", f"data.{stage}_sources", "leave `weight` out")
      for stage in ("val", "test", "guard")),
    Rule("`data.guard_tokens`", "no `data.guard_sources`", "there are no guard documents, so a limit has no effect",
         "data.guard_tokens", "leave it out, or set data.guard_sources"),
    Rule("`data.stream_buffer`", "no `data.streaming`", "only streams have a buffer", "data.stream_buffer",
         "leave it out, or set --data.streaming true"),
    Rule("a `weight` of the only source", "`data.streaming`", "weight {s.sources[0].weight} has no effect: in a "
         "stream it is a share of the records, and there is only one source", "data.sources", "leave `weight` out"),
    Rule("`data.bad_record_limit`", "`data.on_bad_record: error`", "the first bad record stops the run, so a limit on "
         "their share has no effect", "data.bad_record_limit", "leave it out, or set --data.on_bad_record quarantine"),
    Rule("`data.packing: concat`, no evaluation", "`data.overlong`", "concat cuts documents at any token, so none is "
         "too long for a packed sequence", "data.overlong", "leave it out, or set --data.packing best_fit"),
    Rule("`data.stride`", "no evaluation", "a stride is that of windows in evaluation, and there are no data for it",
         "data.stride", "leave it out, or set data.val_sources or data.val_fraction"),
    Rule("a `data.stride` of at least `data.seq_len`", "`data.stride`", "windows that advance by their "
         "length would leave tokens out", "data.stride", "set it to at most data.seq_len - 1, or leave it out"),
    CONCAT,                                         # raised where the records are known
)


def _weighted(sources: list[Source] | None) -> bool:
    return any(source.weight != 1 for source in sources or ())


def check(data: Data) -> None:
    """Refuse options that another option disables, and weights without effect.

    Raises:
        InputError: The error names the key, and the option that would have to change.
    """
    for source in data.sources:
        ranges.check("data.sources.weight", source.weight)
    rules.check(RULES, FEATURES, data)


def note_documents(corpus: Corpus, train_on: str, *, rank: int) -> None:
    """Warn that an option for conversations has no effect on documents."""
    if rank == 0 and train_on != "assistant" and corpus.is_document.all():
        log.warning("data.train_on: all data are documents, which are fully supervised, so %s has no effect", train_on)
