"""Export a finished run as a folder for transformers: merged weights, tokenizer, template, stop ids and model card.

It reads only files of the run, so it works after any strategy and on another machine.
"""

import logging
import math
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from lit_llm import disk, names
from lit_llm.errors import InputError
from lit_llm.exports.card import card, read_values
from lit_llm.report import writing
from lit_llm.system import integrity, origin, ranges
from lit_llm.system.lock import HeldError, Lock
from lit_llm.text import check
from lit_llm.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def export(run: str, checkpoint: str = "best", out: str | None = None, dtype: Dtype = "auto",
           base: str | None = None) -> Path:
    """Write a run's model as a folder that transformers loads without changes.

    Args:
        run: Run folder, e.g. runs/sft.
        checkpoint: `best` by the monitored metric (the newest if none was measured), `last`, or a folder name such as
            step_40.
        out: Output folder; null is `export` in the run folder. An existing model folder is replaced.
        dtype: Dtype of the written weights; `auto` keeps that of the base for adapters, else that of training.
        base: Folder of the adapters' base model, if it was moved; a different model is refused.

    Returns:
        The folder. Its `check.json` is verified whenever the folder is loaded.

    Raises:
        InputError: No such run or checkpoint, the reloaded folder differs from the trained model, the folder cannot be
            written, or another process is writing it; an earlier export is kept.
    """
    folder = checkpoint_folder(Path(run), checkpoint)
    facts = integrity.read(folder)
    integrity.check_beside(folder / ("adapter" if (folder / "adapter").is_dir() else "model"), "checkpoint")
    if (folder / "adapter").is_dir():
        base = origin.locate(str(facts["base"]), facts.get("base_hash"), Path(run), base)
    elif base is not None:
        raise InputError(f"{ranges.shown(base)} has no effect: this run trained all weights and needs no base",
                         where="base", fix="leave --base out")
    target = _target(Path(run), out, base) if out else Path(run) / "export"
    lock = Lock()
    with suppress(OSError):                         # errors of writing are reported below, with the free space
        target.parent.mkdir(parents=True, exist_ok=True)
        refusal = lock.take(target.with_name(f".{target.name}.lock"), "out", target)
        if isinstance(refusal, HeldError):
            raise refusal
    try:
        return _exported(Path(run), folder, facts, target, dtype, base)
    finally:
        lock.release()


def _exported(run: Path, folder: Path, facts: dict[str, Any], target: Path, dtype: Dtype, base: str | None) -> Path:
    """Merge a checkpoint, write it, verify it, and replace an earlier export."""
    import torch

    from lit_llm.models import load as model
    from lit_llm.models.adapters import starting
    from lit_llm.models.adapters.merging import merge
    from lit_llm.models.quantize import quantization_drift

    tokenizer = Tokenizer.load(str(run / "tokenizer"))
    if (folder / "adapter").is_dir():
        assert base is not None
        base = names.resolve(base)
        stored = model.stored_dtype(base)
        exact: Any = model.load_causal_lm(base)
        if quantize := (read_values(run / "config.yaml").get("model") or {}).get("quantize"):
            drift = quantization_drift(exact, quantize)
            log.warning("trained on a base in 4 bits, merged into the exact base: linear weights differ by %.1f %% of "
                        "their norm; evaluate the export", 100 * drift)
        trained: Any = starting.load(exact, folder / "adapter")
        del exact
    else:
        stored, quantize = None, None
        trained = model.load_causal_lm(str(folder / "model"))
    wanted = stored if dtype == "auto" else getattr(torch, dtype)
    rows = check.reference_sequences(tokenizer, check.vocabulary(trained))
    before = reloaded = check.scores(trained, rows)
    if not all(map(math.isfinite, before)):
        raise InputError("the model's loss is not finite, so the training diverged; nothing was exported",
                         where=str(folder), fix="export an earlier checkpoint (--checkpoint step_N), or train again "
                         "with a lower model.lr")
    if quantize:
        four_bits = starting.load(model.load_causal_lm(str(base), quantize=quantize), folder / "adapter")
        reloaded = check.scores(four_bits, rows)
        del four_bits
    check.compare_saved(facts.get("check"), trained, rows, reloaded, quantize)
    if quantize:
        check.compare_quantized(rows, reloaded, before, quantize)
    merged = merge(trained)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        model.save_causal_lm(merged, partial, stop_ids=tokenizer.stop_ids, pad_id=tokenizer.pad_id, dtype=wanted)
        tokenizer.save(partial)
        drawn = writing.picture_of(run)
        if drawn:
            (partial / writing.PICTURE).write_text(drawn, encoding="utf-8")
        text = card(run, facts, folder.name, picture=writing.PICTURE if drawn else "")
        (partial / "README.md").write_text(text, encoding="utf-8")
        del trained, merged                         # only one model in memory at a time
        written = model.load_causal_lm(str(partial), dtype=wanted or torch.float32)
        check.check_export(partial, Tokenizer.load(str(partial)), rows, before, written, quantize=quantize)
        disk.replace_folder(partial, target)
    except BaseException as error:
        free = disk.free(partial.parent)
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) or disk.is_full(error):
            raise InputError(f"the export could not be written: {disk.reason(error)}; {free}", where=str(target),
                             fix=f"{disk.remedy(error, target.parent)}, or name another folder: --out") from error
        raise
    return target


def _target(run: Path, out: str, base: str | None) -> Path:
    """The user's output folder: new, empty, or an earlier export, but neither a run nor the base."""
    target = Path(out).expanduser().resolve()
    empty = not target.exists() or (target.is_dir() and not any(target.iterdir()))
    model = (target / "config.json").is_file() and not (target / "checkpoints").exists()
    needed = [run.resolve(), *run.resolve().parents]
    if base is not None:
        needed.append(names.path_of(base).resolve())
    if target in needed or not (empty or model):
        raise InputError(f"{target} is not an export and would be replaced", where="out",
                         fix="choose a new folder")
    return target


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
