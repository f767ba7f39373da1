"""Start training from an adapter folder: continue the adapter, or merge it into the base first.

An adapter that was trained on a base with a merged adapter contains the merged one in its subfolder `first`, so
loading it always gives the model that was trained.
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
    """Find the adapter folder: the path itself, or the adapter of a checkpoint or of a run's best checkpoint.

    Raises:
        InputError: There is none, its weights are not safetensors, or its files differ from the checkpoint's manifest.
    """
    root = Path(path).expanduser()
    pointers = [root / "checkpoints" / name for name in ("BEST", "LATEST")]
    runs = [file.parent / file.read_text(encoding="utf-8").strip() for file in pointers if file.is_file()]
    for folder in (root, *(place / "adapter" for place in (root, *runs[:1]))):
        if (folder / CONFIG).is_file():
            if not (folder / WEIGHTS).is_file():
                raise InputError(f"{folder} has no {WEIGHTS}; other weight formats are not loaded",
                                 where="model.adapter")
            integrity.check_beside(folder, "model.adapter")
            return folder
    raise InputError(f"{path} has no {CONFIG}, so it is not an adapter", where="model.adapter",
                     fix="give a folder in PEFT's format, a checkpoint of a run, or a run: runs/sft")


def check_base(folder: Path, base: str) -> None:
    """Refuse a base other than the one that the adapter was trained on, if its files name that one.

    Raises:
        InputError: The files name another base.
    """
    manifest, fits = folder.parent / "manifest.json", True
    named = str(peft_method.stored_keys(folder).get("base_model_name_or_path") or "")
    if manifest.is_file():
        before = json.loads(manifest.read_text(encoding="utf-8")).get("base_hash")
        now = origin.content_hash(base)
        fits = not before or not now or before == now
    elif named and (trained_hash := origin.content_hash(named)) and (base_hash := origin.content_hash(base)):
        fits = trained_hash == base_hash
    elif named:
        fits = Path(named).name == Path(base).name
    if not fits:
        raise InputError(f"the adapter in {folder} was trained on {named}, not on {base}", where="model.adapter",
                         fix=f"--model.base {named}")


def load(model: "PreTrainedModel", folder: Path, *, trainable: bool = False) -> Any:
    """Load an adapter, after merging the adapter that it was trained on top of.

    Raises:
        InputError: It cannot be loaded, or it differs from its checkpoint's manifest.
    """
    integrity.check_beside(folder, "adapter")
    if (folder / FIRST / CONFIG).is_file():
        model = merge(load(model, folder / FIRST))
    return adapter.load_adapter(model, folder, trainable=trainable)


def merged(model: "PreTrainedModel", folder: Path) -> "PreTrainedModel":
    """The model with an adapter merged into it, ready for another one."""
    out = merge(load(model, folder))
    for weight in out.parameters():                 # adding adapters froze them
        weight.requires_grad_(weight.is_floating_point())
    return out


def copy_merged_adapter(first: Path, folder: Path) -> None:
    """Copy a merged adapter into the folder of the adapter trained on top of it."""
    target = folder / FIRST
    target.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        if (first / name).is_file():
            shutil.copyfile(first / name, target / name)
    if (first / FIRST).is_dir():
        copy_merged_adapter(first / FIRST, target)
