"""Store the metrics of a validation or a test, with the evaluated run or separately.

`metrics.json` of a run describes one checkpoint, which it names, on the run's own data. Results of other models or on
other data are appended to `evaluations.jsonl` and change nothing else.
"""

import json
import logging
import time
from pathlib import Path
from typing import Any

import lightning as L

from lit_llm import disk
from lit_llm.data.rows.identity import differences
from lit_llm.report.facts import config_of
from lit_llm.system.redaction import redact_text
from lit_llm.training.record import breakdowns
from lit_llm.training.run import manifest
from lit_llm.training.run.report import write_json

log = logging.getLogger(__name__)
METRICS, RECORD, ROWS = "metrics.json", "evaluations.jsonl", "validation_rows.jsonl"
ROW_TOKENS, LONGEST_ROW = 3072, 512                 # of all rows, and of one
OF_DATA = ("sources", "val_sources", "val_fraction", "test_sources", "test_fraction", "train_on", "seq_len", "packing",
           "overlong", "seed", "dedup", "stride")   # keys that determine the evaluated data


def figures_of(trainer: L.Trainer, *prefix: str) -> dict[str, float]:
    """The logged metrics whose names begin with a prefix such as `val/`, or one of several."""
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(prefix)}


def write_metrics(run: Path, step: int, figures: dict[str, float], before: dict[str, float],
                  more: dict[str, Any] | None = None) -> None:
    """Write `metrics.json`.

    Args:
        run: The run folder.
        step: Optimizer step of the evaluated checkpoint.
        figures: Its metrics.
        before: Metrics before training.
        more: Other entries.
    """
    facts = {"checkpoint": f"step_{step}" if step else None, "step": step, **figures,
             **{f"before/{name}": value for name, value in before.items()}, **(more or {})}
    write_json(run / METRICS, facts)


def read_metrics(run: Path) -> dict[str, Any]:
    """The content of `metrics.json`; empty if it is missing or unreadable."""
    try:
        facts = json.loads((run / METRICS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def write_rows(run: Path, corpus: Any) -> None:
    """Write `validation_rows.jsonl`: sequences of the validation data on which `export` measures what it wrote.

    Args:
        run: The run folder.
        corpus: The validation data; sequences from all of its parts are taken.
    """
    lines, room = [], ROW_TOKENS
    mean = max(1, int(corpus.lengths.mean())) if len(corpus) else 1
    step = max(1, len(corpus) * min(mean, LONGEST_ROW) // ROW_TOKENS)
    for sequence in range(0, len(corpus), step):
        ids, supervised = corpus.read(sequence, 0, min(int(corpus.lengths[sequence]), LONGEST_ROW, room))
        lines.append(json.dumps({"ids": ids.tolist(), "supervised": supervised.astype(int).tolist()}))
        room -= len(ids)
        if room <= 0:
            break
    if lines:
        disk.replace_text(run / ROWS, "".join(f"{line}\n" for line in lines))


def record(trainer: L.Trainer, split: str, config: dict[str, Any] | None) -> dict[str, float]:
    """Record the results of `validate` or `test`, on rank 0.

    Args:
        trainer: The trainer after the evaluation.
        split: `val` or `test`.
        config: Config of this command.

    Returns:
        The metrics.
    """
    figures = figures_of(trainer, f"{split}/")
    run, module = Path(trainer.default_root_dir), trainer.lightning_module
    checkpoint: Path | None = getattr(module, "checkpoint", None)
    if not trainer.is_global_zero:
        return figures
    step = int(manifest.read(checkpoint)["step"]) if checkpoint is not None else 0
    own = checkpoint is not None and checkpoint.resolve().parent.parent == run.resolve()
    other = _other_data(trainer, split, checkpoint, config)
    listed = (config or {}).get("data") or {}
    line: dict[str, Any] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S"), "verb": "validate" if split == "val" else "test",
        "checkpoint": checkpoint.name if own and checkpoint is not None else checkpoint and str(checkpoint.absolute()),
        "base": getattr(module, "base", None), "step": step, "other_data": other,
        "data": {key: listed[key] for key in OF_DATA if key in listed}, **figures}
    if breakdown := breakdowns.breakdown_of(trainer, split):
        line["breakdown"] = breakdowns.finite(breakdown.details())
    run.mkdir(parents=True, exist_ok=True)
    breakdowns.write_documents(trainer, split)
    with open(run / RECORD, "a", encoding="utf-8") as stream:
        stream.write(redact_text(json.dumps(line, ensure_ascii=False, default=str)) + "\n")
    if own and not other:
        metrics = read_metrics(run)
        same = metrics.get("step") == step          # then metrics of the other split belong to this checkpoint as well
        kept = ("val/", "test/", "guard/", "last/")
        others = {key: value for key, value in metrics.items() if key.startswith(kept) and same}
        before = {key.removeprefix("before/"): value for key, value in metrics.items() if key.startswith("before/")}
        write_metrics(run, step, others | figures, before)
    elif not (run / "checkpoints").is_dir():        # no run is here that the record could be attributed to
        write_json(run / METRICS, {"checkpoint": line["checkpoint"], "base": line["base"], "step": step, **figures})
    else:
        why = f"the data differ from the run's ({other})" if own else "the weights are not a checkpoint of the run"
        log.warning("%s: the results are in %s, and metrics.json is unchanged", why, run / RECORD)
    return figures


def _other_data(trainer: L.Trainer, split: str, checkpoint: Path | None, config: dict[str, Any] | None) -> str:
    """A description of how the data differ from those of the checkpoint's run; empty if they are the same."""
    if checkpoint is None:
        return ""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    plan = getattr(data, "plans", {}).get(split)
    then = manifest.read(checkpoint).get("data")
    fingerprint = then.get(split) if isinstance(then, dict) else None
    changes = []
    if fingerprint is not None and plan is not None:
        changes = differences(fingerprint, plan.fingerprint)
    elif config is not None and (old := config_of(checkpoint.parent.parent).get("data")):
        new = config.get("data") or {}
        changes = [f"data.{key} {old.get(key)}, not {new.get(key)}" for key in OF_DATA if old.get(key) != new.get(key)]
    limit = getattr(trainer, f"limit_{split}_batches")
    usual = (config_of(checkpoint.parent.parent).get("trainer") or {}).get(f"limit_{split}_batches")
    usual = 1.0 if usual is None else usual
    if (type(usual), usual) != (type(limit), limit):                # 1 is a batch, 1.0 is all of them
        changes.append(f"trainer.limit_{split}_batches {usual}, not {limit}")
    return "; ".join(changes)
