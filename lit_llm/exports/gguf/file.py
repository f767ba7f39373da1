"""Write and read GGUF files: names of tensors, number formats, metadata. This is the only file that imports `gguf`.

A file is written tensor by tensor beside its final name, flushed, and renamed, so that it is complete or absent.
"""

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from lit_llm import disk
from lit_llm.errors import InputError, missing_package

Type = Literal["auto", "f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]
TYPES: tuple[str, ...] = get_args(Type)[1:]
FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "bf16": 32}
QUANTIZATION_VERSION = 2                            # of llama.cpp's block formats
BLOCK = 32                                          # values that share a scale in the block formats
MARGIN = 32 << 20                                   # bytes for the metadata of the largest vocabularies
ROWS = 1 << 22                                      # values that are quantized at once: about 100 MB of intermediates

# Largest error of a stored value. Halves: rounding to 11 or 8 bits. Blocks: in units of the block's scale (half a
# step, or a whole step where the largest code is missing), with the scale itself rounded to 11 bits.
RELATIVE = {"f32": 0.0, "f16": 2.0**-11, "bf16": 2.0**-8}
SMALLEST = {"f32": 0.0, "f16": 2.0**-25, "bf16": 2.0**-133}
STEPS = {"q8_0": 127, "q5_1": 31, "q5_0": 16, "q4_1": 15, "q4_0": 8}
STEP_ERROR = {"q8_0": 0.5, "q5_1": 0.5, "q5_0": 1.0, "q4_1": 0.5, "q4_0": 1.0}


def library() -> Any:
    """The package `gguf`.

    Raises:
        InputError: It is not installed.
    """
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise missing_package(error) or error from None
    return gguf


def tensor_name(arch: str, layers: int, name: str) -> str | None:
    """A tensor's name in the file, for its name in transformers; null if llama.cpp has no such tensor."""
    gguf = library()
    number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch)
    return gguf.get_tensor_name_map(number, layers).get_name(name, try_suffixes=(".weight", ".bias"))


def byte_shape(shape: tuple[int, ...], kind: str) -> tuple[int, ...]:
    """Shape in bytes of a tensor that is stored in a format."""
    gguf = library()
    if kind in ("f32", "f16"):
        return (*shape[:-1], shape[-1] * (4 if kind == "f32" else 2))
    return tuple(gguf.quant_shape_to_byte_shape(shape, _number(kind)))


def encoded(values: np.ndarray, kind: str) -> np.ndarray:
    """The bytes of float32 values in a format, as uint8 with the same number of rows."""
    with np.errstate(over="ignore"):                # a value beyond float16 becomes infinite, which `compare` refuses
        packed = library().quants.quantize(np.ascontiguousarray(values, np.float32), _number(kind))
    return np.ascontiguousarray(packed).view(np.uint8)


def decoded(stored: np.ndarray, kind: str) -> np.ndarray:
    """float32 values of rows of bytes."""
    return library().quants.dequantize(np.ascontiguousarray(stored).view(np.uint8), _number(kind))


def _number(kind: str) -> Any:
    return library().GGMLQuantizationType[kind.upper()]


def bound(values: np.ndarray, kind: str) -> np.ndarray:
    """Largest error of each value (rows, columns) that storing it in a format explains."""
    if kind in RELATIVE:
        return np.abs(values) * RELATIVE[kind] + SMALLEST[kind]
    blocks = values.reshape(len(values), -1, BLOCK)
    width = np.ptp(blocks, axis=-1) if kind.endswith("_1") else np.abs(blocks).max(axis=-1)
    step = width / STEPS[kind]
    rounding = np.abs(blocks).max(axis=-1) * 2.0**-10 + 2.0**-24     # of the scale and of the smallest value, float16
    return np.repeat(STEP_ERROR[kind] * step * 1.001 + rounding * (1 + STEPS[kind] * 2.0**-11), BLOCK, axis=-1)


# ---- writing ---------------------------------------------------------------------------------------------------------

def write(path: Path, metadata: Mapping[str, tuple[str, Any]], tensors: Iterable[Any], *, progress: bool = True) -> int:
    """Write a file, one tensor in memory at a time.

    Args:
        path: The file; an existing one is replaced when the new one is complete.
        metadata: Key to type and value; keys of the architecture are written as given.
        tensors: Tensors with `name`, `shape`, `kind` and `chunks()`, see `weights.Stored`.
        progress: Whether a bar is shown for files that take a while, in a terminal.

    Returns:
        Bytes of the file.

    Raises:
        InputError: The disk has too little space for the file.
        OSError: It cannot be written; nothing is left behind.
    """
    gguf, tensors = library(), list(tensors)
    size = sum(int(np.prod(byte_shape(tensor.shape, tensor.kind))) for tensor in tensors)
    _check_space(path, size + MARGIN)
    partial = path.with_name(path.name + ".partial")
    writer = gguf.GGUFWriter(str(partial), str(metadata["general.architecture"][1]))
    try:
        for key, (kind, value) in metadata.items():
            if key == "general.architecture" or (kind == "ARRAY" and not len(value)):
                continue
            writer.add_key_value(key, value, gguf.GGUFValueType[kind])
        for tensor in tensors:
            stored = byte_shape(tensor.shape, tensor.kind)
            writer.add_tensor_info(tensor.name, stored, np.dtype(np.uint8), int(np.prod(stored)),
                                   raw_dtype=_number(tensor.kind))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in _shown(tensors, size) if progress else tensors:
            writer.write_tensor_data(_packed(tensor))
        writer.flush()
        os.fsync(writer.fout[0].fileno())
        writer.close()
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            writer.close()
        partial.unlink(missing_ok=True)
        raise
    return path.stat().st_size


def _check_space(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise InputError(f"the file needs {needed / disk.GIB:.2f} GiB, and {disk.free(path.parent)}", where=str(path),
                         fix="free some space, name another folder with --out, or use a smaller --gguf_type")


def _packed(tensor: Any) -> np.ndarray:
    """The bytes of a tensor, encoded in pieces of rows."""
    shape = byte_shape(tensor.shape, tensor.kind)
    out, at = np.empty((int(np.prod(shape[:-1])), shape[-1]), np.uint8), 0
    for rows in tensor.chunks():
        packed = encoded(rows, tensor.kind).reshape(len(rows), -1)
        out[at:at + len(rows)] = packed
        at += len(rows)
    return out.reshape(shape)


def _shown(tensors: list[Any], size: int) -> Iterator[Any]:
    """The tensors with a progress bar in bytes, where stderr is a terminal and writing takes longer than a second."""
    from tqdm import tqdm

    with tqdm(total=size, unit="B", unit_scale=True, desc="writing GGUF", disable=None, delay=1.0, leave=False) as bar:
        for tensor in tensors:
            yield tensor
            bar.update(int(np.prod(byte_shape(tensor.shape, tensor.kind))))


# ---- reading ---------------------------------------------------------------------------------------------------------

def read(path: Path) -> tuple[dict[str, Any], dict[str, tuple[str, tuple[int, ...], np.ndarray]]]:
    """Metadata, and (format, shape, rows of bytes) of each tensor, mapped from the file.

    Raises:
        InputError: Not a GGUF file, or a damaged one.
    """
    gguf = library()
    try:
        reader = gguf.GGUFReader(str(path))
    except (ValueError, KeyError, IndexError, OSError, UnicodeDecodeError) as error:
        raise InputError(f"this is not a readable GGUF file: {' '.join(str(error).split())[:160]}", where=str(path),
                         fix="write it again: python -m lit_llm export RUN --format gguf") from None
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    tensors = {}
    for tensor in reader.tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        kind = tensor.tensor_type.name.lower()
        rows = np.asarray(tensor.data).reshape(int(np.prod(shape[:-1], dtype=np.int64)), -1)
        tensors[tensor.name] = (kind, shape, rows)
    return fields, tensors
