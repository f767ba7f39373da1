"""Find a run's checkpoint, and load its model, tokenizer and reference sequences for an export."""

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_llm import names
from lit_llm.errors import InputError
from lit_llm.exports import rows
from lit_llm.exports.card import read_values
from lit_llm.exports.rows import Rows
from lit_llm.system import integrity, origin, ranges
from lit_llm.text import check
from lit_llm.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint of a run.

    Args:
        run: The run folder.
        folder: The checkpoint's folder.
        facts: Its manifest.
        base: The folder or hub id of the base of its adapter; null if all weights were trained.
    """

    run: Path
    folder: Path
    facts: dict[str, Any]
    base: str | None

    @property
    def adapter(self) -> Path | None:
        """Folder of its adapter; null if all weights were trained."""
        return self.folder / "adapter" if self.base is not None else None


@dataclass(slots=True)
class Trained:
    """The model of a checkpoint, in float32.

    Args:
        model: With its adapter, which is not merged.
        tokenizer: That of the run.
        stored: The dtype of the base's weights; null if all weights were trained.
        quantize: How the base was quantized in training.
        references: Reference sequences of `check.json`.
        nll: NLL of each.
        rows: The rows on which the export is measured.
    """

    model: Any
    tokenizer: Tokenizer
    stored: Any
    quantize: str | None
    references: list[check.Reference]
    nll: list[float]
    rows: Rows


def find(run: Path, checkpoint: str, base: str | None) -> Checkpoint:
    """A complete checkpoint whose files are those of its manifest.

    Args:
        run: The run folder.
        checkpoint: `best`, `last`, or the folder's name.
        base: The present folder of the adapters' base; null looks for the recorded one.

    Raises:
        InputError: There is none, its files were changed, or the base is another one.
    """
    folder = checkpoint_folder(run, checkpoint)
    facts = integrity.read(folder)
    adapted = (folder / "adapter").is_dir()
    integrity.check_beside(folder / ("adapter" if adapted else "model"), "checkpoint")
    if not adapted and base is not None:
        raise InputError(f"{ranges.shown(base)} has no effect: this run trained all weights and needs no base",
                         where="base", fix="leave --base out")
    base_folder = origin.locate(str(facts["base"]), facts.get("base_hash"), run, base) if adapted else None
    return Checkpoint(run, folder, facts, base_folder)


def load(checkpoint: Checkpoint) -> Trained:
    """Load the model of a checkpoint, and compare it with the model that was in memory when it was written.

    Raises:
        InputError: It cannot be loaded, its loss is not finite, or it is not the model of training.
    """
    from lit_llm.models import load as model
    from lit_llm.models.adapters import starting
    from lit_llm.models.quantize import quantization_drift

    run, adapter = checkpoint.run, checkpoint.adapter
    tokenizer, stored, quantize = Tokenizer.load(str(run / "tokenizer")), None, None
    base = names.resolve(checkpoint.base) if checkpoint.base is not None else ""
    if adapter is not None:
        stored = model.stored_dtype(base)
        exact: Any = model.load_causal_lm(base)
        if quantize := (read_values(run / "config.yaml").get("model") or {}).get("quantize"):
            drift = quantization_drift(exact, quantize)
            log.warning("trained on a base in 4 bits, merged into the exact base: linear weights differ by %.1f %% of "
                        "their norm; evaluate the export", 100 * drift)
        trained: Any = starting.load(exact, adapter)
        del exact
    else:
        trained = model.load_causal_lm(str(checkpoint.folder / "model"))
    references = check.reference_sequences(tokenizer, check.vocabulary(trained))
    nll = reloaded = check.scores(trained, references)
    if not all(map(math.isfinite, nll)):
        raise InputError("the model's loss is not finite, so the training diverged; nothing was exported",
                         where=str(checkpoint.folder), fix="export an earlier checkpoint (--checkpoint step_N), or "
                         "train again with a lower model.lr")
    if quantize and adapter is not None:
        few_bits = starting.load(model.load_causal_lm(base, quantize=quantize), adapter)
        reloaded = check.scores(few_bits, references)
        del few_bits
    check.compare_saved(checkpoint.facts.get("check"), trained, references, reloaded, quantize)
    if quantize:
        check.compare_quantized(references, reloaded, nll, quantize)
    fixed = rows.of(run, tokenizer, check.vocabulary(trained), check.positions(trained))
    return Trained(trained, tokenizer, stored, quantize, references, nll, fixed)


def checkpoint_folder(run: Path, checkpoint: str) -> Path:
    """A complete checkpoint folder of the run.

    Args:
        run: The run folder.
        checkpoint: `best`, `last`, or the folder's name.

    Raises:
        InputError: There is none; the error lists the existing ones.
    """
    folders = run / "checkpoints"
    if not folders.is_dir():
        raise InputError(f"{run} has no checkpoints folder, so it is not a run", where="run",
                         fix="give a folder that fit wrote, such as runs/sft")
    name = checkpoint
    if checkpoint in ("best", "last"):
        pointers = [folders / file for file in (("BEST", "LATEST") if checkpoint == "best" else ("LATEST",))]
        pointer = next((file for file in pointers if file.is_file()), None)
        if pointer is None:
            raise InputError(f"{run} has no complete checkpoint", where="run")
        name = pointer.read_text(encoding="utf-8").strip()
    if not (folders / name / integrity.NAME).is_file():
        has = ", ".join(sorted(path.name for path in folders.glob("step_*"))) or "none"
        raise InputError(f"{run} has no complete checkpoint '{name}' (it has: {has})", where="checkpoint")
    return folders / name
