"""Write the files of an export into a folder: merged weights, quantized weights, or an adapter alone."""

import json
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from lit_llm import disk, names
from lit_llm.errors import InputError
from lit_llm.exports.metadata import base_id
from lit_llm.exports.trained import Checkpoint, Trained

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Quantized = Literal["int8", "nf4"]
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "generation_config.json")


@contextmanager
def replacing(target: Path) -> Generator[Path, None, None]:
    """A new folder that replaces `target` at the end; after an error nothing of it is left.

    Raises:
        InputError: It cannot be written.
    """
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        disk.replace_folder(partial, target)
    except BaseException as error:
        free = disk.free(partial.parent)
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) or disk.is_full(error):
            raise InputError(f"the export could not be written: {disk.reason(error)}; {free}", where=str(target),
                             fix=f"{disk.remedy(error, target.parent)}, or name another folder: --out") from error
        raise


def write_model(trained: Trained, folder: Path, dtype: Dtype, quantize: Quantized | None) -> None:
    """Merge the adapter and write a model folder; `trained.model` is released.

    Args:
        trained: The model.
        folder: An existing folder.
        dtype: Dtype of the weights that are not quantized; `auto` is that of the base, or of training.
        quantize: How linear layers except the head are quantized.
    """
    import torch

    from lit_llm.models import load as model
    from lit_llm.models.adapters.merging import merge

    if quantize:
        from lit_llm.models.quantize import require_quantization

        require_quantization(quantize)              # before minutes of merging
    tokenizer = trained.tokenizer
    merged = merge(trained.model)
    trained.model = None
    wanted = trained.stored if dtype == "auto" else getattr(torch, dtype)
    model.save_causal_lm(merged, folder, stop_ids=tokenizer.stop_ids, pad_id=tokenizer.pad_id, dtype=wanted)
    kind = merged.dtype
    del merged                                      # only one model in memory at a time
    if quantize:
        few_bits = model.load_causal_lm(str(folder), dtype=kind, quantize=quantize, half=kind != torch.float32)
        for file in folder.glob("model*.safetensors*"):
            file.unlink()
        model.save_causal_lm(few_bits, folder, stop_ids=tokenizer.stop_ids, pad_id=tokenizer.pad_id)


def read_model(folder: Path) -> Any:
    """The model in an exported folder, in the dtype of its weights, as transformers loads it."""
    from lit_llm.models import load as model

    return model.load_causal_lm(str(folder), dtype=model.stored_dtype(str(folder)))


def write_adapter(checkpoint: Checkpoint, trained: Trained, folder: Path) -> None:
    """Write the adapter alone in PEFT's layout; `trained.model` is released.

    Raises:
        InputError: The run has no adapter, or PEFT could not load it without this package.
    """
    from lit_llm.models.adapters import starting
    from lit_llm.models.adapters.adapter import ROWS

    source = checkpoint.adapter
    if source is None:
        raise InputError("this run trained all weights, so it has no adapter", where="adapter",
                         fix="leave --adapter out")
    if (source / starting.FIRST).is_dir() or (source / ROWS).is_file():
        raise InputError("this adapter was trained on a base that another adapter or new tokens had changed, and PEFT "
                         "would load it on the base itself", where="adapter",
                         fix="leave --adapter out, which merges all of it into the exported model")
    trained.model = None
    for name in ADAPTER:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    config = json.loads((source / ADAPTER[0]).read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = published_base(checkpoint)
    disk.replace_text(folder / ADAPTER[0], json.dumps(config, indent=2, sort_keys=True) + "\n")


def published_base(checkpoint: Checkpoint) -> str:
    """The base as another library finds it: a hub id, or the path of its folder."""
    base = str(checkpoint.base)
    return base_id(base) or (str(names.path_of(base).absolute()) if names.path_of(base).is_dir() else base)


def read_adapter(checkpoint: Checkpoint, folder: Path) -> Any:
    """The base with the adapter in an exported folder, in float32, as PEFT loads it."""
    from lit_llm.models import load as model
    from lit_llm.models.adapters.adapter import load_adapter

    loaded = load_adapter(model.load_causal_lm(names.resolve(str(checkpoint.base))), folder)
    base = loaded.get_base_model()
    if (folder / ADAPTER[2]).is_file():
        base.generation_config = type(base.generation_config).from_pretrained(str(folder))
    return loaded
