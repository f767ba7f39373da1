"""Find what a name stands for: a model folder, a hub id, an adapter, a checkpoint or a run.

Nothing is loaded here, and nothing is downloaded.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lit_llm import names
from lit_llm.errors import InputError
from lit_llm.inference.loading import model_folder, tokenizer_folder
from lit_llm.models.adapters import peft_method
from lit_llm.system import integrity, origin
from lit_llm.training.run import manifest


@dataclass(frozen=True, slots=True)
class Subject:
    """A model on this machine.

    Args:
        name: As the user typed it.
        weights: Folder or hub id of complete weights; for an adapter, of its base.
        adapter: Folder of the adapter, in PEFT's format; null without one.
        tokenizer: Folder or hub id of its tokenizer.
        place: The folder that is measured; a hub id for a model of the hub.
        run: Folder of the run that trained it; null if it is not in one.
        quantize: Type of the numbers of the base in the run that trained it.
    """

    name: str
    weights: str
    adapter: Path | None
    tokenizer: str
    place: str
    run: Path | None = None
    quantize: str | None = None

    @property
    def kind(self) -> str:
        """`adapter` or `model`."""
        return "model" if self.adapter is None else "adapter"

    @property
    def base_fingerprint(self) -> str | None:
        """Identity of the complete weights by content; null for a model of the hub that is not cached."""
        digest = origin.content_hash(self.weights)
        return digest and digest[:16]

    @property
    def fingerprint(self) -> str | None:
        """Identity of the weights by content, with those of the adapter."""
        if self.adapter is None or self.base_fingerprint is None:
            return self.base_fingerprint
        adapter = integrity.sha256(self.adapter / "adapter_model.safetensors")
        return hashlib.sha256(f"{self.base_fingerprint} {adapter}".encode()).hexdigest()[:16]


def find(name: str) -> Subject:
    """Find a model.

    A run stands for its best checkpoint, or its newest one where none was measured; a run without checkpoints for its
    export. The files of a checkpoint are compared with its manifest.

    Args:
        name: Folder of a model, an adapter, a checkpoint or a run, or a hub id.

    Raises:
        InputError: There is no such folder or nothing loadable in it, or the hub cannot be reached.
    """
    folder = names.path_of(name)
    if (folder / "checkpoints").is_dir() and any((folder / "checkpoints").glob(f"step_*/{integrity.NAME}")):
        best = (folder / "checkpoints" / "BEST").is_file()
        return _in_checkpoint(name, manifest.find(folder, "best" if best else "last"))
    if (folder / integrity.NAME).is_file() and ((folder / "adapter").is_dir() or (folder / "model").is_dir()):
        return _in_checkpoint(name, folder)
    place = model_folder(name)
    if not (Path(place) / "adapter_config.json").is_file() or (Path(place) / "config.json").is_file():
        run = folder if place != str(folder) and (folder / "config.yaml").is_file() else None
        return Subject(name, place, None, place, place, run)
    return _adapter(name, Path(place), {}, None)


def _in_checkpoint(name: str, folder: Path) -> Subject:
    facts = integrity.read(folder)
    above = folder.absolute().parent.parent
    run = above if (above / "config.yaml").is_file() else None
    if (folder / "adapter").is_dir():
        return _adapter(name, folder / "adapter", facts, run)
    integrity.check_beside(folder / "model", "model")
    weights = str(folder / "model")
    tokenizer = above / "tokenizer"
    return Subject(name, weights, None, str(tokenizer) if tokenizer.is_dir() else weights, str(folder), run)


def _adapter(name: str, folder: Path, facts: dict[str, Any], run: Path | None) -> Subject:
    """An adapter with its base, which is searched beside the run if it was moved."""
    if not (folder / "adapter_model.safetensors").is_file():
        raise InputError("adapter_model.safetensors is missing; other weight formats are not loaded", where=str(folder))
    base = facts.get("base") or peft_method.stored_keys(folder).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise InputError("it does not name a base", where=str(folder / "adapter_config.json"),
                         fix="set base_model_name_or_path to the folder or hub id of its base")
    located = origin.locate(base, facts.get("base_hash"), folder)
    names.check_available(located, "model", fix="its adapter_config.json names it as the base; move it there")
    weights = names.resolve(located)
    home = tokenizer_folder(str(folder))
    quantize = facts.get("quantize")
    return Subject(name, weights, folder, names.resolve(home) if home != base else weights,
                   str(folder.parent if facts else folder), run, str(quantize) if quantize else None)


def config_of(run: Path) -> dict[str, Any]:
    """The config that a run wrote.

    Raises:
        InputError: It cannot be read.
    """
    try:
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"it cannot be read: {str(error).splitlines()[0][:160]}",
                         where=str(run / "config.yaml")) from None
    if not isinstance(config, dict):
        raise InputError("it is not a mapping of keys to values", where=str(run / "config.yaml"))
    return config
