"""Start training from an adapter's folder: continue the adapter, or merge it into the base.

An adapter that was trained on a base with another one merged carries that one with it, in the subfolder `first`, so
that whoever loads it gets the model that was trained.
"""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_llm.errors import InputError
from lit_llm.models.adapters import adapter, peft_method
from lit_llm.models.adapters.merging import merge
from lit_llm.system import integrity, origin

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FIRST = "first"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
COPIED = (CONFIG, WEIGHTS, adapter.ROWS)


def find(path: str) -> Path:
    """The folder in PEFT's format: the path itself, the one in a checkpoint, or in a run's best checkpoint.

    Raises:
        InputError: There is none, its weights are no safetensors, or they are not as their checkpoint says.
    """
    given = Path(path).expanduser()
    pointers = [given / "checkpoints" / name for name in ("BEST", "LATEST")]
    runs = [file.parent / file.read_text(encoding="utf-8").strip() for file in pointers if file.is_file()]
    for folder in (given, *(place / "adapter" for place in (given, *runs[:1]))):
        if (folder / CONFIG).is_file():
            if not (folder / WEIGHTS).is_file():
                raise InputError(f"{folder} holds no {WEIGHTS}, and other files of weights are not read",
                                 where="model.adapter")
            integrity.check_beside(folder, "model.adapter")
            return folder
    raise InputError(f"{path} holds no {CONFIG}, so it is no adapter", where="model.adapter",
                     fix="give a folder in PEFT's format, a checkpoint of a run, or a run: runs/sft")


def check_base(folder: Path, base: str) -> None:
    """Refuse another base than the adapter was trained on, as far as its files tell.

    Raises:
        InputError: They name another one.
    """
    manifest, fits = folder.parent / "manifest.json", True
    named = str(peft_method.stored_keys(folder).get("base_model_name_or_path") or "")
    if manifest.is_file():
        before = json.loads(manifest.read_text(encoding="utf-8")).get("base_hash")
        now = origin.content_hash(base)
        fits = not before or not now or before == now
    elif named and (theirs := origin.content_hash(named)) and (ours := origin.content_hash(base)):
        fits = theirs == ours
    elif named:
        fits = Path(named).name == Path(base).name
    if not fits:
        raise InputError(f"the adapter in {folder} was trained on {named}, not on {base}", where="model.adapter",
                         fix=f"--model.base {named}")


def load(model: "PreTrainedModel", folder: Path, *, trainable: bool = False) -> Any:
    """The model with an adapter, and below it, merged, the one that it was trained upon.

    Raises:
        InputError: It cannot be loaded, or is not as the checkpoint says that it lies in.
    """
    integrity.check_beside(folder, "adapter")
    if (folder / FIRST / CONFIG).is_file():
        model = merge(load(model, folder / FIRST))
    return adapter.load_adapter(model, folder, trainable=trainable)


def merged(model: "PreTrainedModel", folder: Path) -> "PreTrainedModel":
    """The model with an adapter merged into it, ready for others."""
    out = merge(load(model, folder))
    for weight in out.parameters():                 # adapters froze them
        weight.requires_grad_(weight.is_floating_point())
    return out


def carry(first: Path, folder: Path) -> None:
    """Put an adapter that was merged beside the one trained upon it."""
    target = folder / FIRST
    target.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        if (first / name).is_file():
            shutil.copyfile(first / name, target / name)
    if (first / FIRST).is_dir():
        carry(first / FIRST, target)
