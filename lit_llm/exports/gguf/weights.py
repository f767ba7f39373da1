"""Turn the weights of a model folder into llama.cpp's tensors, read and converted a few rows at a time."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lit_llm.errors import InputError
from lit_llm.exports.gguf import file
from lit_llm.exports.gguf.families import Description, Family

HEAD = "lm_head.weight"
PROJECTION = re.compile(r"\.(\w+_proj|lm_head)\.bias$")


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of the file.

    Args:
        name: Its name in the file.
        shape: Its shape, rows first, as in transformers.
        kind: Its format, such as q8_0.
        source: Tensor of the safetensors file, or computed values.
        heads: Number of heads whose rows are stored in pairs; 0 for all other tensors.
        shift: Added to each value.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    source: tuple[Path, str] | np.ndarray
    heads: int = 0
    shift: float = 0.0

    def chunks(self) -> Iterator[np.ndarray]:
        """float32 pieces (rows, columns) in order; a vector is one row."""
        if isinstance(self.source, np.ndarray):
            yield self.source.reshape(-1, self.shape[-1]).astype(np.float32)
            return
        from safetensors import safe_open

        path, name = self.source
        with safe_open(str(path), "pt") as opened:
            if len(self.shape) == 1 or self.heads:
                values = opened.get_tensor(name).float().numpy() + np.float32(self.shift)
                yield _paired(values, self.heads).reshape(-1, self.shape[-1])
                return
            part = opened.get_slice(name)
            step = max(1, file.ROWS // self.shape[-1])
            for start in range(0, self.shape[0], step):
                yield part[start:min(self.shape[0], start + step)].float().numpy() + np.float32(self.shift)


def _paired(values: np.ndarray, heads: int) -> np.ndarray:
    """Order rows for a rotation of neighbours: transformers rotates row i of a head with row i + half."""
    if not heads:
        return values
    half = values.shape[0] // heads // 2
    return values.reshape(heads, 2, half, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def tensors(folder: Path, config: Any, description: Description, kind: str) -> list[Stored]:
    """The tensors of the file in order of the layers.

    Args:
        folder: Model folder with safetensors.
        config: Its config.
        description: The model in llama.cpp's terms.
        kind: Format of the matrices; norms and biases are float32, and a matrix whose rows cannot be cut into blocks of
            32 is float16.

    Raises:
        InputError: A tensor that llama.cpp does not have.
    """
    stored: list[Stored] = []
    tied = bool(config.tie_word_embeddings)
    computed = description.tensors.items()
    for name, (path, shape) in sorted(_names(folder).items(), key=lambda item: _order(item[0])):
        if (name == HEAD and tied) or name.endswith("rotary_emb.inv_freq"):
            continue
        target = file.tensor_name(description.family.arch, config.num_hidden_layers, name)
        if target is None or not _has(description.family, name):
            raise InputError(f"llama.cpp's {description.family.arch} has no tensor for {name}", where=str(folder),
                             fix="export it with --format transformers")
        stored.append(Stored(target, shape, kind_of(target, shape, kind, tied), (path, name),
                            heads=_heads(description.family, config, name),
                            shift=float(description.family.shifted_norms and name.endswith("norm.weight"))))
    return [*stored[:1], *(Stored(name, values.shape, "f32", values) for name, values in computed), *stored[1:]]


def kind_of(name: str, shape: Sequence[int], kind: str, tied: bool) -> str:
    """Format of one tensor: llama.cpp computes with float32 vectors, and the output layer deserves 8 bits."""
    if len(shape) == 1 or name.endswith("_norm.weight"):
        return "f32"
    if kind in ("f32", "f16", "bf16"):
        return kind
    if shape[-1] % file.BLOCK:
        return "f16"
    return "q8_0" if name == "output.weight" or (tied and name == "token_embd.weight") else kind


def _has(family: Family, name: str) -> bool:
    bias = PROJECTION.search(name)
    return bias is None or bias[1] in family.biases


def _heads(family: Family, config: Any, name: str) -> int:
    if not family.permuted:
        return 0
    if ".q_proj." in name:
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads or config.num_attention_heads) if ".k_proj." in name else 0


def _order(name: str) -> tuple[int, int, str]:
    """Embeddings, layers by number, then what follows them."""
    layer = re.search(r"\.layers\.(\d+)\.", name)
    return (1, int(layer[1]), name) if layer else (0 if "embed" in name else 2, 0, name)


def _names(folder: Path) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """File and shape of each tensor of a folder, from the headers of its safetensors files.

    Raises:
        InputError: There is none, or a file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    try:
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())) if index.is_file() \
            else ["model.safetensors"]
        names: dict[str, tuple[Path, tuple[int, ...]]] = {}
        for file_name in files:
            path = folder / Path(file_name).name
            with safe_open(str(path), "pt") as opened:
                names |= {name: (path, tuple(opened.get_slice(name).get_shape())) for name in list(opened.keys())}
    except (OSError, ValueError, KeyError, AttributeError, TypeError, SafetensorError) as error:
        raise InputError(f"the weights cannot be read: {' '.join(str(error).split())[:160]}", where=str(folder),
                         fix="it needs model.safetensors, as export writes it") from None
    return names


# ---- comparison ------------------------------------------------------------------------------------------------------

def compare(path: Path, wanted: Sequence[Stored]) -> dict[str, float]:
    """Read a file back and compare each tensor with the weights it was made from.

    Args:
        path: The GGUF file.
        wanted: The tensors as `tensors` gives them.

    Returns:
        Largest absolute error by format, e.g. {"f32": 0.0, "q8_0": 0.0012}.

    Raises:
        InputError: A tensor is missing, has another shape, or differs by more than its format explains.
    """
    _, stored = file.read(path)
    if set(stored) != {tensor.name for tensor in wanted}:
        different = sorted(set(stored) ^ {tensor.name for tensor in wanted})
        raise InputError(f"the file written has other tensors than the model, e.g. {different[0]}", where=str(path))
    worst: dict[str, float] = {}
    for tensor in wanted:
        kind, shape, rows = stored[tensor.name]
        if (kind, shape) != (tensor.kind, tensor.shape):
            raise InputError(f"{tensor.name} is {shape} in {kind} in the file, and {tensor.shape} in {tensor.kind} in "
                             "the model", where=str(path))
        at = 0
        for values in tensor.chunks():
            back = file.decoded(rows[at:at + len(values)], kind).reshape(values.shape)
            error = np.abs(back - values)
            if not bool((error <= file.bound(values, kind)).all()):
                raise InputError(f"{tensor.name} differs from the model's weight by {np.nanmax(error):.3g} in the "
                                 f"file, more than {kind} explains", where=str(path),
                                 fix="use --gguf_type f32 or bf16 if the weights exceed float16's range (65,504)")
            worst[kind] = max(worst.get(kind, 0.0), float(error.max(initial=0.0)))
            at += len(values)
    return worst
