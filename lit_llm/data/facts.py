"""Summarize a run's data after setup: as lines for the terminal, and as values for `data.json` and the run report."""

from dataclasses import asdict
from typing import Any

from lit_llm.data.interface import Data
from lit_llm.data.rows.dialogue import conversations
from lit_llm.data.tokens.store import Report


def summary_of(data: Data) -> str:
    """Records read, kept and dropped; tokens, supervised share and packing per stage; steps."""
    from lit_llm.data.inspect.inspection import examine
    from lit_llm.data.inspect.terminal import short

    streamed = [f"train: streamed from {', '.join(source.path for source in data.sources)}"
                + (f"; below, its first {data.stream_buffer:,} characters" if "train" in data.plans else "")]
    return "\n".join([*(streamed if data.streaming else []), short(examine(data))])


def facts_of(data: Data) -> dict[str, Any]:
    """The reports of all sources, the counts of each stage, and what training has drawn so far of each source."""
    loader = data.trainer.train_dataloader if data.trainer else None
    return {"sources": [_named(report) for report in data.reports],
            **{stage: {"sequences": len(plan.corpus), "rows": len(plan.rows), **plan.notes,
                       "tokens": int(plan.rows.lengths.sum()), "supervised": int(plan.rows.supervised.sum())}
               for stage, plan in data.plans.items()},
            "conversations": conversations(data.plans, data.tokenizer),
            "ledger": getattr(loader, "ledger", {})}


def _named(report: Report) -> dict[str, Any]:
    """A source's report as values, with the name of the speaker beside each count."""
    speakers = {name: {"tokens": tokens, "supervised": learned} for name, (tokens, learned) in report.speakers.items()}
    return {key: value for key, value in asdict(report).items() if key != "marks"} | {"speakers": speakers}
