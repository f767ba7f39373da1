"""Export a finished run and print its summary: perplexity before and after, answers, and the next commands.

It runs on rank 0 and uses only the files of the run.
"""

import json
import logging
import math
from pathlib import Path
from typing import Any

from lit_llm import disk, names
from lit_llm.cli import examples
from lit_llm.data.inspect.terminal import ledger
from lit_llm.errors import InputError
from lit_llm.exports.command import export
from lit_llm.exports.trained import checkpoint_folder
from lit_llm.models.adapters import virtual_tokens
from lit_llm.models.adapters.merging import UnmergeableError
from lit_llm.report import commands, facts, verdict, writing
from lit_llm.report.rows import last_logged
from lit_llm.system import class_paths, command
from lit_llm.system.redaction import redact_text
from lit_llm.training.checks import divergence
from lit_llm.training.run import evaluation, manifest

log = logging.getLogger(__name__)
NEXT = ("chat", "validate", "serve")                # commands that are printed; the report has all


def finish(run: Path, *, base: str | None, before: dict[str, float], shown: list[examples.Example]) -> None:
    """Export the best checkpoint and print the summary of the run on stdout.

    Args:
        run: The run folder.
        base: Base model of the training; null if it started from random weights.
        before: Validation metrics before the first step; empty if there was no validation.
        shown: Held-out and training prompts to answer.
    """
    folder = None
    for wanted in ("best", "last"):
        saved = manifest.read(checkpoint_folder(run, wanted))
        if not divergence.are_finite(saved.get("figures") or {}):
            raise InputError("perplexity of this checkpoint is inf or nan: training diverged, and nothing was exported",
                             where=f"step {saved['step']}", fix="lower model.lr and train again; or export an earlier "
                             "checkpoint: python -m lit_llm export --checkpoint step_N")
    try:
        folder = export(str(run))
        print(f"\nexported to {folder}\n{commands.for_many_users(folder)}")
    except UnmergeableError as error:                    # the checkpoints still have the trained weights
        if tokens := virtual_tokens.count_in(checkpoint_folder(run, "best") / "adapter"):
            folder = export(str(run), out=str(run / "export"), adapter=True)
            print(f"\nexported to {folder}: the adapter alone, because its {tokens} virtual tokens cannot be merged")
        else:
            print(f"\nnot exported: {error.what}\n  {error.fix}")
    if logged := last_logged(run, "train/loss"):
        number = f"{logged[1]:.3f}" if math.isfinite(logged[1]) else "not finite, so this step was skipped"
        print(f"training loss at step {logged[0]:,}: {number}")
    _say_figures(run, before)
    if (file := run / "data.json").exists() and (drawn := json.loads(file.read_text(encoding="utf-8"))["ledger"]):
        print("\n".join(ledger(drawn, "drawn in training")))
    for words in verdict.warnings(verdict.course_of(run, before.get("val/nll"))):
        print(f"warning: {words}")
    if folder is not None and shown:
        answered = examples.compare(names.resolve(base) if base else None, folder, shown)
        _write_answers(run, answered)
    writing.try_to_write(run)                       # with the export, the answers and the commands
    if folder is not None:
        _next(run)


def _write_answers(run: Path, answered: list[dict[str, Any]]) -> None:
    """Write the answers to `answers.jsonl`, with the step of the exported checkpoint."""
    step = manifest.read(checkpoint_folder(run, "best"))["step"]
    lines = [redact_text(json.dumps({"step": step, **answer}, ensure_ascii=False)) for answer in answered]
    try:
        disk.replace_text(run / facts.ANSWERS, "".join(f"{line}\n" for line in lines))
    except OSError as error:
        log.warning("%s could not be written: %s", run / facts.ANSWERS, disk.reason(error))


def _say_figures(run: Path, before: dict[str, float]) -> None:
    """Print the metrics of the exported checkpoint, and of the last one if that differs.

    `metrics.json` then has the metrics of the exported checkpoint as well.
    """
    best, last = (manifest.read(checkpoint_folder(run, wanted)) for wanted in ("best", "last"))
    after, newest = best.get("figures") or {}, last.get("figures") or {}
    if not after:
        return
    apart = best["step"] != last["step"]
    tokens = f"{after['val/tokens']:,.0f} held-out tokens"
    which = f" (the best checkpoint, step {best['step']:,}, which is exported)" if apart else ""
    if "val/perplexity" in before:
        factor = before["val/perplexity"] / after["val/perplexity"]
        print(f"validation perplexity on {tokens}: {before['val/perplexity']:.3f} before, "
              f"{after['val/perplexity']:.3f} after ({factor:.1f} times lower){which}")
    else:
        print(f"validation perplexity on {tokens}: {after['val/perplexity']:.3f}{which}")
    print(f"bits per byte {after['val/bits_per_byte']:.3f}, token accuracy {after['val/token_accuracy']:.1%}")
    if apart and newest:
        print(f"the last checkpoint, step {last['step']:,}, has perplexity {newest['val/perplexity']:.3f}; to export "
              f"it: {command.line('lit_llm', 'export', '--run', run.absolute(), '--checkpoint', 'last')}")
    more = {"last/step": last["step"], **{f"last/{name}": value for name, value in newest.items()}} if apart else {}
    evaluation.write_metrics(run, best["step"], after, before, more)


def _next(run: Path) -> None:
    """Print the next commands."""
    possible = commands.of(run, "finished", {}, class_paths.opened)
    print("\nnext:")
    print("\n".join(f"  {entry['command']}" for entry in possible if entry["what"] in NEXT), flush=True)
