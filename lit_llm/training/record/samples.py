"""Answer a few held-out prompts at each validation and append the answers to `samples.jsonl` in the run folder.

The answers before the first step are those of the base. Sampling does not change the run: it draws no random numbers,
and an error is a warning.
"""

import json
import logging
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from lit_llm import disk
from lit_llm.report import facts
from lit_llm.system.redaction import redact_text
from lit_llm.training.module import CausalLMModule
from lit_llm.training.parallel import distribution
from lit_llm.training.record import greedy, prompts
from lit_llm.training.record.prompts import ANSWER_TOKENS, Example

log = logging.getLogger(__name__)
LONGEST_PROMPT = 512                                # tokens; a longer one would make a validation slower


class Samples(Callback):
    """Writes greedy answers to the same held-out prompts at each validation.

    Args:
        count: Number of prompts; 0 disables it.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._examples: list[Example] | None = None     # null before the first validation
        self._written_step: int | None = None       # of the last line that this fit wrote

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Choose the prompts again: the data of another fit may differ."""
        self._examples = self._written_step = None

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Remove the answers of later steps, which a resumed run repeats."""
        if trainer.is_global_zero and trainer.global_step and self._written_step is None:
            self._write(trainer, [])

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Answer the prompts. Collective where layers are gathered from all ranks; otherwise rank 0 does it alone."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        resumed = trainer.sanity_checking and trainer.global_step > 0       # no validation of the run itself
        if (trainer.state.fn != "fit" or resumed or not isinstance(module, CausalLMModule)
                or trainer.fast_dev_run or not hasattr(data, "tokenizer")):  # type: ignore[attr-defined]
            return
        if self._examples is None:
            positions = getattr(module.model.config.get_text_config(), "max_position_embeddings", None)
            room = (positions or LONGEST_PROMPT + ANSWER_TOKENS) - ANSWER_TOKENS
            self._examples = prompts.choose(data, "val", self.count, longest=min(room, LONGEST_PROMPT))
        if not self._examples or not (trainer.is_global_zero or distribution.of(trainer.strategy).gathers_layers):
            return
        try:
            answers = greedy.answer(trainer, [example.prompt for example in self._examples], max_tokens=ANSWER_TOKENS,
                                    stop_ids=data.tokenizer.stop_ids)
        except Exception as error:                  # another kind of model, or too little memory
            self._examples = []
            if trainer.is_global_zero:
                log.warning("no samples are written to %s: %s", facts.SAMPLES, " ".join(str(error).split())[:200])
            return
        if trainer.is_global_zero:
            self._write(trainer, [_line(trainer.global_step, data.tokenizer, example, answer)
                                  for example, answer in zip(self._examples, answers, strict=True)])

    def _write(self, trainer: L.Trainer, lines: list[str]) -> None:
        """Append lines; the first time in a fit, and where a validation is repeated, keep earlier steps only."""
        file, step = Path(trainer.default_root_dir) / facts.SAMPLES, trainer.global_step
        try:
            if self._written_step is not None and step > self._written_step:
                with open(file, "a", encoding="utf-8") as stream:
                    stream.writelines(lines)
            elif lines or file.is_file():
                disk.replace_text(file, "".join([*_lines_before(file, step + (not lines)), *lines]))
            self._written_step = step if lines else None
        except OSError as error:
            log.warning("%s could not be written: %s", file, disk.reason(error))


def _line(step: int, tokenizer: Any, example: Example, answer: list[int]) -> str:
    """One line of the file."""
    prompt = tokenizer.decode(example.prompt, skip_special_tokens=True)
    whole = tokenizer.decode([*example.prompt, *answer], skip_special_tokens=True)
    stopped = bool(answer) and answer[-1] in tokenizer.stop_ids
    entry = {"step": step, "prompt": prompt.strip(), "answer": whole[len(prompt):].strip(),
             "finish_reason": "stop" if stopped else "length",
             "expected": tokenizer.decode(example.expected, skip_special_tokens=True).strip()}
    return redact_text(json.dumps(entry, ensure_ascii=False)) + "\n"


def _lines_before(file: Path, step: int) -> list[str]:
    """The complete lines of earlier steps."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            entry = json.loads(line)
        except ValueError:                          # the run was killed while it wrote this line
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int) and entry["step"] < step:
            lines.append(f"{line}\n")
    return lines
