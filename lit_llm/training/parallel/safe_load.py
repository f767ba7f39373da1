"""Load a checkpoint's state without running code that its files may contain.

DeepSpeed and torch's distributed checkpoints load their files with pickle, which can call any function that a file
names. A checkpoint folder may come from somebody else, and the hashes in its manifest can be rewritten. Therefore every
such load uses torch's `weights_only` reader, which accepts tensors, numbers, containers and the few classes listed
here.
"""

import os
import pickle
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lit_llm.errors import InputError

FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"             # overrides weights_only=False of a caller of torch.load
TRUST = "LIT_LLM_TRUST_CHECKPOINT"                  # set by the typed option --trust-checkpoint, inherited by all ranks
OPTION = "--trust-checkpoint"

# Classes of objects that DeepSpeed stores beside its tensors. None of them has effects when it is constructed.
DEEPSPEED = (
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
    ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
    ("deepspeed.utils.tensor_fragment", "fragment_address"),
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
)
# Classes of the index of a distributed checkpoint of torch.
INDEX = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"},
    "pathlib": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},     # Python 3.13 writes this module
}


def is_trusted() -> bool:
    """Whether the user typed `--trust-checkpoint`: then the libraries load files as usual, which can run code."""
    return os.environ.get(TRUST) == "1"


@contextmanager
def data_only() -> Generator[None, None, None]:
    """Within this context every call of `torch.load` loads data only, whatever its arguments."""
    if is_trusted():
        yield
        return
    from torch.serialization import safe_globals

    before = os.environ.get(FORCE)
    os.environ[FORCE] = "1"
    try:
        with safe_globals(_deepspeed_classes()):
            yield
    finally:
        os.environ.pop(FORCE) if before is None else os.environ.update({FORCE: before})


def _deepspeed_classes() -> list[Any]:
    import sys

    return [getattr(sys.modules[module], name) for module, name in DEEPSPEED if module in sys.modules]


def check(state: Path) -> None:
    """Refuse a checkpoint's state that cannot be loaded as data, equally on every rank.

    Args:
        state: A checkpoint's `state`: a file, or the folder that DeepSpeed or FSDP2 wrote.

    Raises:
        InputError: The error names the file and the forbidden content.
    """
    if is_trusted():
        return
    for file in sorted(state.rglob("*.pt")) if state.is_dir() else [state]:
        _check_file(file)
    for file in state.rglob(".metadata"):           # the shards beside it are read within `data_only`
        read_index(file)


def arguments(state: Path) -> dict[str, Any]:
    """Arguments with which Lightning loads a checkpoint's state safely.

    Args:
        state: As in `check`, which is called.
    """
    check(state)
    return {"ckpt_path": state, "weights_only": not is_trusted()}


def _check_file(file: Path) -> None:
    from torch.serialization import get_unsafe_globals_in_checkpoint

    allowed = {f"{module}.{name}" for module, name in DEEPSPEED}
    try:
        foreign = sorted(set(get_unsafe_globals_in_checkpoint(str(file))) - allowed)
    except Exception as error:                      # untrusted files: torch raises errors of many types
        raise InputError(f"torch cannot read this file: {_line(error)}", where=str(file),
                         fix="use another checkpoint of the run") from None
    if foreign:
        raise _refusal(file, foreign[0])


def read_index(file: Path) -> Any:
    """Read the index of a distributed checkpoint (`.metadata`), accepting only the classes that it consists of.

    Raises:
        InputError: It contains another class or a file outside the folder, or it is damaged.
    """
    try:
        with open(file, "rb") as handle:
            index = (pickle.Unpickler if is_trusted() else _IndexReader)(handle).load()
        names = {Path(info.relative_path) for info in index.storage_data.values()}
    except _ForeignError as error:
        raise _refusal(file, str(error)) from None
    except Exception as error:                      # damaged bytes raise errors of many types
        raise InputError(f"torch cannot read this index: {_line(error)}", where=str(file),
                         fix="use another checkpoint of the run") from None
    if outside := [name for name in names if len(name.parts) != 1 or name.is_absolute()]:
        raise InputError(f"it refers to {outside[0]}, which is outside of the checkpoint", where=str(file),
                         fix="use another checkpoint of the run")
    return index


class _ForeignError(Exception):
    """A pickle contains a class that no index consists of."""


class _IndexReader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in INDEX.get(module, ()):
            raise _ForeignError(f"{module}.{name}")
        return super().find_class(module, name)


def _refusal(file: Path, name: str) -> InputError:
    return InputError(f"it contains {name[:100]}, which is code and could run any program", where=str(file),
                      fix=f"use your own checkpoint; if you trust its author, {OPTION} loads it anyway")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
