"""A finished fit in, out what its user sees last: the export, perplexity before and after, answers, the next commands.

Runs on rank 0, from what the run left on disk.
"""

import json
from pathlib import Path

from lit_llm import command, examples
from lit_llm.data.terminal import ledger
from lit_llm.inference.export import export
from lit_llm.merging import UnmergeableError
from lit_llm.samples import resolve
from lit_llm.training import verdict


def finish(run: Path, *, base: str | None, before: dict[str, float], after: dict[str, float],
           shown: list[examples.Example]) -> None:
    """Export the best checkpoint and print the summary of the run on stdout.

    Args:
        run: The run folder.
        base: What training started from; null if from random weights.
        before: Validation figures before the first step; empty if there was no validation.
        after: The last ones.
        shown: Prompts to answer, held out and trained on.
    """
    folder = None
    try:
        folder = export(str(run))
        print(f"\nexported to {folder}")
    except UnmergeableError as error:                    # what was trained is in the checkpoints all the same
        print(f"\nnot exported: {error.what}\n  {error.fix}")
    if after:
        tokens = f"{after['val/tokens']:,.0f} held-out tokens"
        if before:
            factor = before["val/perplexity"] / after["val/perplexity"]
            print(f"validation perplexity on {tokens}: {before['val/perplexity']:.3f} before, "
                  f"{after['val/perplexity']:.3f} after ({factor:.1f} times lower)")
        else:
            print(f"validation perplexity on {tokens}: {after['val/perplexity']:.3f}")
        print(f"bits per byte {after['val/bits_per_byte']:.3f}, token accuracy {after['val/token_accuracy']:.1%}")
    if (file := run / "data.json").exists() and (drawn := json.loads(file.read_text(encoding="utf-8"))["ledger"]):
        print("\n".join(ledger(drawn, "drawn in training")))
    for words in verdict.warnings(verdict.course_of(run, before.get("val/nll"))):
        print(f"warning: {words}")
    if folder is None:
        return
    if shown:
        examples.compare(resolve(base) if base else None, folder, shown)
    _next(run, folder)


def _next(run: Path, folder: Path) -> None:
    """Commands that work from any directory: paths are absolute, and the run's own config holds what was typed."""
    place, config = folder.absolute(), run.absolute() / "config.yaml"
    print("\nnext:")
    print(f"  {command.line('lit_llm', 'chat', '--model', place)}")
    print(f"  {command.line('lit_llm', 'validate', '--config', config, '--ckpt_path', 'best')}")
    print(f"  {command.line('serve', '--model', place)}", flush=True)
