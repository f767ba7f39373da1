"""A finished fit in, out what its user sees last: the export, perplexity before and after, answers, the next commands.

Runs on rank 0, from what the run left on disk.
"""

import json
from pathlib import Path
from typing import Any

from lit_llm import command
from lit_llm.data.terminal import ledger
from lit_llm.inference.completion import TextEngine
from lit_llm.inference.export import export
from lit_llm.inference.sampling import SamplingParams
from lit_llm.merging import UnmergeableError
from lit_llm.samples import resolve

PROMPTS, ANSWER_TOKENS = 3, 48


def finish(run: Path, *, base: str | None, before: dict[str, float], after: dict[str, float],
           prompts: list[list[int]]) -> None:
    """Export the best checkpoint and print the summary of the run on stdout.

    Args:
        run: The run folder.
        base: What training started from; null if from random weights.
        before: Validation figures before the first step; empty if there was no validation.
        after: The last ones.
        prompts: Token ids of held-out prompts.
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
    if folder is None:
        return
    if prompts:
        _compare(resolve(base) if base else None, folder, prompts)
    _next(run, folder)


def _compare(base: str | None, folder: Path, prompts: list[list[int]]) -> None:
    """Greedy answers to the same prompts, base beside tuned."""
    params = SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0.0)
    rows: list[tuple[str, list[str]]] = [("tuned", [])]
    tuned = TextEngine.load(folder)
    room = tuned.engine.context_length - ANSWER_TOKENS
    prompts = [ids for ids in prompts if len(ids) <= room]
    rows[0] = ("tuned", [tuned.generate(ids, params).text for ids in prompts])
    texts = [tuned.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in prompts]
    del tuned
    if base is not None:
        engine = TextEngine.load(base)
        rows.insert(0, ("base", [engine.generate(ids, params).text for ids in prompts]))
    for place, text in enumerate(texts):
        print(f"\n  prompt   {_short(text, 200)}")
        for name, answers in rows:
            print(f"  {name:<8} {_short(answers[place], 200)}")


def _short(text: str, most: int) -> str:
    line = " / ".join(part for part in (line.strip() for line in text.splitlines()) if part)
    line = "".join(char for char in line if char.isprintable())     # a model's escape codes stay out of the terminal
    return line if len(line) <= most else line[: most - 3] + "..."


def _next(run: Path, folder: Path) -> None:
    """Commands that work from any directory: paths are absolute, and the run's own config holds what was typed."""
    place, config = folder.absolute(), run.absolute() / "config.yaml"
    print("\nnext:")
    print(f"  {command.line('lit_llm', 'chat', '--model', place)}")
    print(f"  {command.line('lit_llm', 'validate', '--config', config, '--ckpt_path', 'best')}")
    print(f"  {command.line('serve', '--model', place)}", flush=True)


def held_out_prompts(datamodule: Any) -> list[list[int]]:
    """Prompts of the first held-out sequences: what stands before an answer, or a document's beginning."""
    try:
        corpus = datamodule.plans["val"].corpus
    except KeyError:
        return []
    prompts: list[list[int]] = []
    step = max(1, len(corpus) // PROMPTS)
    for sequence in range(0, min(len(corpus), step * PROMPTS), step):
        ids, supervised = corpus.read(sequence, 0, int(corpus.lengths[sequence]))
        learned = supervised.nonzero()[0]
        cut = int(learned[0]) if len(learned) and learned[0] > 1 else min(16, max(1, len(ids) // 2))
        prompts.append([int(id_) for id_ in ids[:cut]])
    return prompts


