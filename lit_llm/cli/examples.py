"""Print answers of the base and the trained model to held-out prompts and training prompts of a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_llm.errors import InputError
from lit_llm.inference.completion import Detokenizer, TextEngine
from lit_llm.inference.sampling import SamplingParams
from lit_llm.training.record import prompts
from lit_llm.training.record.prompts import ANSWER_TOKENS, Example

HELD_OUT, TRAINED = 3, 2                            # examples of each kind


def choose(datamodule: Any) -> list[Example]:
    """Select some held-out and some training examples; none from a stream, which is not stored."""
    return [*prompts.choose(datamodule, "val", HELD_OUT), *prompts.choose(datamodule, "train", TRAINED)]


def compare(base: str | None, folder: Path, examples: list[Example]) -> list[dict[str, Any]]:
    """Print greedy answers of the base and the tuned model to the same prompts, and the expected answers.

    Args:
        base: Base model of the training; null if it started from random weights.
        folder: Folder of the export.
        examples: Examples from `choose`; those that leave no room for an answer are skipped.

    Returns:
        For each example `kind`, `prompt`, `expected`, and the answers `base` (if there is one) and `tuned`.
    """
    import torch

    count = torch.get_num_threads()
    tuned = TextEngine.load(folder, threads=count)
    room = tuned.engine.context_length - ANSWER_TOKENS
    examples = [example for example in examples if len(example.prompt) <= room]
    texts = {name: [tuned.tokenizer.decode(getattr(example, name), skip_special_tokens=True).strip()
                    for example in examples] for name in ("prompt", "expected")}
    answers = {"tuned": _answers(tuned, [example.prompt for example in examples])}
    del tuned
    if base is not None:
        answers = {"base": _answers(TextEngine.load(base, threads=count), [example.prompt for example in examples])
                   } | answers
    for place, example in enumerate(examples):
        print(f"\n  prompt   {_short(texts['prompt'][place], 200)}" + ("  (trained)" * (example.kind == "trained")))
        print(f"  expected {_short(texts['expected'][place], 200)}")
        for name, texts_of_model in answers.items():
            print(f"  {name:<8} {_short(texts_of_model[place], 200)}")
    return [{"kind": example.kind, **{name: column[place] for name, column in (texts | answers).items()}}
            for place, example in enumerate(examples)]


def _answers(model: TextEngine, prompt_ids: Sequence[Sequence[int]]) -> list[str]:
    """Greedy answers, generated together; or why there is none: the run has ended well, and its model is exported."""
    engine, params = model.engine, SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0.0)
    answers = [Detokenizer(model.tokenizer, len(prompt)) for prompt in prompt_ids]
    failed: dict[int, str] = {}
    for number, prompt in enumerate(prompt_ids):
        if max(prompt) >= engine.vocab_size:        # the base lacks tokens that were added in training
            failed[number] = "(its vocabulary lacks a token of this prompt)"
            continue
        try:
            engine.add(str(number), prompt, params)
        except InputError as error:
            failed[number] = f"(no answer: {error.what})"
    while engine.has_work:
        for event in engine.step():
            if event.token_id is None:
                failed[int(event.request_id)] = f"(no answer: {event.error})"
            else:
                answers[int(event.request_id)].push(event.token_id, event.finish_reason)
    return [failed.get(number, answer.text) for number, answer in enumerate(answers)]


def _short(text: str, most: int) -> str:
    line = " / ".join(part for part in (line.strip() for line in text.splitlines()) if part)
    line = "".join(char for char in line if char.isprintable())     # keep escape codes out of the terminal
    return line if len(line) <= most else line[: most - 3] + "..."
