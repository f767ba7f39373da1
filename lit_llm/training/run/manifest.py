"""Write and read the manifests of checkpoints, and find the folder that `last` or `best` refers to.

`manifest.json` contains the size and sha256 of each file, and what the checkpoint depends on. It is written last: a
folder without a valid manifest is not a checkpoint.
"""

import hashlib
import json
import logging
import math
import os
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.utilities import rank_zero_only

from lit_llm import disk, rules
from lit_llm.errors import InputError
from lit_llm.system import integrity, origin
from lit_llm.system.integrity import NAME, faults, read
from lit_llm.system.redaction import redact_text
from lit_llm.training.parallel import distribution
from lit_llm.training.parallel.saved import SavedModule
from lit_llm.training.rules import table

log = logging.getLogger(__name__)
Change = Literal["base", "peft", "tokenizer", "template", "quantize"]
NOUNS: dict[str, str] = {"base": "base_hash", "peft": "peft", "tokenizer": "tokenizer", "template": "template",
                         "quantize": "quantize"}
VERIFIED = "LIT_LLM_VERIFIED_CHECKPOINT"            # in the environment of ranks: who has hashed which checkpoint
FIXED = ("init", "optimizer")                       # what a resumed run can never change


# ---- writing ---------------------------------------------------------------------------------------------------------

def write(folder: Path, trainer: L.Trainer, score: float | None, figures: dict[str, float] | None = None,
          check: dict[str, Any] | None = None) -> None:
    """Flush every file of the folder to disk, then write its manifest.

    Args:
        folder: The folder, complete except for the manifest.
        trainer: The trainer within a fit.
        score: The monitored metric, if measured.
        figures: All metrics of the checkpoint.
        check: NLL of the reference sequences by the model in memory, see `in_memory.py`.
    """
    import torch
    import transformers

    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor() as pool:              # ZeRO writes a file per rank; hashing releases Python's lock
        hashes = list(pool.map(integrity.sha256, files))
    for path in (*files, *(path for path in folder.rglob("*") if path.is_dir())):
        disk.sync(path)
    facts = {
        "step": trainer.global_step, "epoch": trainer.current_epoch, "score": finite(score),
        "figures": _finite_only(figures), "check": check,
        **identity(trainer), "world_size": trainer.world_size, "strategy": type(trainer.strategy).__name__,
        "stage": distribution.of(trainer.strategy).split_stage,
        "precision": str(trainer.precision),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "lightning": L.__version__},
        "files": {str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256}
                  for path, sha256 in zip(files, hashes, strict=True)},
    }
    _replace(folder, facts)
    disk.sync(folder)


def set_score(folder: Path, score: float | None, figures: dict[str, float]) -> None:
    """Add the metrics of a checkpoint that was saved before its validation."""
    _replace(folder, read(folder) | {"score": finite(score), "figures": _finite_only(figures)})


def _finite_only(figures: dict[str, float] | None) -> dict[str, float | None]:
    return {name: finite(value) for name, value in (figures or {}).items()}


def finite(score: float | None) -> float | None:
    """The score, or null if it is not finite."""
    return score if score is not None and math.isfinite(score) else None


def _replace(folder: Path, facts: dict[str, Any]) -> None:
    disk.replace_text(folder / NAME, redact_text(json.dumps(facts, indent=1, default=str)) + "\n")


# ---- what a checkpoint depends on ------------------------------------------------------------------------------------

def identity(trainer: L.Trainer) -> dict[str, Any]:
    """What a checkpoint and the run that resumes from it must have in common; null if unknown."""
    module: Any = trainer.lightning_module
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    tokenizer, plans = getattr(data, "tokenizer", None), getattr(data, "plans", {})
    template = getattr(getattr(tokenizer, "hf", None), "chat_template", None)
    facts = {
        "base": None, "base_hash": None, "init": None, "peft": None, "quantize": None, "optimizer": None,
        "tokenizer": getattr(tokenizer, "fingerprint", None),
        "template": template and hashlib.sha256(json.dumps(template).encode()).hexdigest(),
        "data": {stage: plan.fingerprint for stage, plan in plans.items()},
    }
    if isinstance(module, SavedModule):
        facts |= {"base": origin.recorded(module.base), "base_hash": origin.content_hash(module.base),
                  "init": module.init, "peft": _method(module), "quantize": module.quantize,
                  "optimizer": module.optimizer}
    plain: dict[str, Any] = json.loads(json.dumps(facts, default=str))
    return plain


def _method(module: Any) -> Any:
    """The PEFT spec, and the merged adapter below it."""
    if module.peft_spec is None or getattr(module, "start", None) is None or not module.merge_start:
        return module.peft_spec
    return module.peft_spec | {"upon": integrity.sha256(Path(module.start) / "adapter_model.safetensors")}


def check_same(folder: Path, trainer: L.Trainer, accepted: Sequence[Change]) -> None:
    """Refuse to resume from or evaluate a checkpoint of another model, method, tokenizer or template.

    Data, batches and processes are checked by the loader and the strategy.

    Raises:
        InputError: The error names all differences.
    """
    before, now = read(folder), identity(trainer)
    fitting = trainer.state.fn == "fit"
    differs = [noun for noun, key in NOUNS.items() if noun != "base" and before.get(key, now[key]) != now[key]]
    if not origin.same(before.get("base"), before.get("base_hash"), now["base"], now["base_hash"]):
        differs.insert(0, "base")
    fixed = [noun for noun in (FIXED if fitting else ("init",)) if before.get(noun, now[noun]) != now[noun]]
    differs = [noun for noun in differs if noun not in accepted]
    if "tokenizer" in differs and "template" in differs:
        differs.remove("tokenizer")                 # whose fingerprint includes the template's
    if differs or fixed:
        facts = {"base": f" ({before.get('base')}, not {now['base']})",
                 "peft": f" ({_apart(before.get('peft'), now['peft'])})",
                 "quantize": f" ({before.get('quantize')}, not {now['quantize']})"}
        changes = [f"another {noun}{facts.get(noun, '')}" for noun in differs]
        changes += [f"another model.{noun} ({_apart(before[noun], now[noun])})" for noun in fixed]
        accept = f"; or, if these changes are intended, --trainer.accept_changes '[{', '.join(differs)}]'"
        raise InputError(f"the checkpoint was written with {'; '.join(changes)}", where=str(folder),
                         fix="use the settings that it was trained with" + ("" if fixed else accept))
    if fitting:
        strategy = distribution.of(trainer.strategy)
        rules.check(table.OF_RESUME, table.RESUME_FEATURES, table.Resume(
            str(before.get("strategy")), type(trainer.strategy).__name__, strategy, (folder / "state").is_dir(),
            str(before.get("precision")), str(trainer.precision)))


def _apart(one: object, other: object) -> str:
    """Describe how two config values differ: the keys of a mapping, or the whole value."""
    if not isinstance(one, dict) or not isinstance(other, dict):
        return f"{_named(one)}, not {_named(other)}"
    if one.get("class_path") != other.get("class_path"):
        return f"{_named(one)}, not {_named(other)}"
    first, second = one.get("init_args", one) or {}, other.get("init_args", other) or {}
    keys = [key for key in first | second if first.get(key) != second.get(key)]
    return ", ".join(f"{key} {first.get(key)}, not {second.get(key)}" for key in keys)


def _named(value: object) -> str:
    return str(value.get("class_path", value)) if isinstance(value, dict) else str(value)


# ---- reading ---------------------------------------------------------------------------------------------------------

def step_of(name: str) -> int:
    """The step of a folder name: 40 for `step_40`, -1 for any other name."""
    digits = name.removeprefix("step_")
    return int(digits) if name.startswith("step_") and digits.isdigit() else -1


def folders(run: Path) -> list[Path]:
    """Checkpoint folders of a run, the newest first; some may be incomplete."""
    candidates = [path for path in (run / "checkpoints").glob("step_*") if path.is_dir() and step_of(path.name) >= 0]
    return sorted(candidates, key=lambda path: -step_of(path.name))


@contextmanager
def verified(folder: Path | None) -> Generator[None, None, None]:
    """Within the block, ranks that this process starts take the checkpoint from it, and compare sizes alone.

    Hashing a checkpoint of an 8B model on each of eight ranks of a machine would take minutes.
    """
    before = os.environ.get(VERIFIED)
    if folder is not None and before is None:
        os.environ[VERIFIED] = f"{os.getpid()}:{folder.absolute()}"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(VERIFIED, None)


def _from_parent() -> Path | None:
    """The checkpoint that the process which started this rank has hashed; null in that process itself."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        return None
    pid, _, folder = os.environ.get(VERIFIED, "").partition(":")
    return Path(folder) if pid == str(os.getppid()) and folder else None


def find(run: Path, wanted: str) -> Path:
    """Find a complete checkpoint folder: `last`, `best`, or a path.

    Every file is read and hashed, except in ranks that were started by a process which has done so. `last` is the
    newest complete folder; incomplete ones are skipped with a warning.

    Raises:
        InputError: There is none; the error names the missing or changed file.
    """
    verified_folder = _from_parent()
    folder = Path(wanted).expanduser()
    if wanted == "last":
        if verified_folder is None:
            return _newest(run)
        folder = verified_folder
    if wanted == "best":
        pointer = run / "checkpoints" / "BEST"
        if not pointer.is_file():
            raise InputError(f"{run} has no best checkpoint", where="ckpt_path", fix="--ckpt_path last")
        folder = pointer.parent / pointer.read_text(encoding="utf-8").strip()
    if not folder.is_dir():
        raise InputError(f"there is no checkpoint folder {wanted}", where="ckpt_path",
                         fix="give `last`, `best`, or a folder like runs/sft/checkpoints/step_40")
    for fault in faults(folder, hashes=verified_folder is None or verified_folder != folder.absolute()):
        raise InputError(fault, where="ckpt_path", fix="use another checkpoint of the run: --ckpt_path last")
    return folder


def _newest(run: Path) -> Path:
    torn: list[str] = []
    for folder in folders(run):
        fault = next(faults(folder), None)
        if fault is None:
            for words in torn:
                _warn(f"{words}; resuming from {folder.name}")
            return folder
        torn.append(fault)
    if torn:
        raise InputError(torn[0], where="ckpt_path",
                         fix="no older checkpoint is intact either; start a fit without --ckpt_path")
    raise InputError(f"{run} has no last checkpoint", where="ckpt_path", fix="start a fit without --ckpt_path")


@rank_zero_only
def _warn(words: str) -> None:
    log.warning(words)
