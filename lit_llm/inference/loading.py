"""Load the model of an engine: a run's export, a folder of transformers, or an adapter with its base."""

import json
from pathlib import Path
from typing import Any

from lit_llm import names
from lit_llm.errors import InputError, did_you_mean_path
from lit_llm.system import config_limits, origin
from lit_llm.text import check


def model_folder(model: str) -> str:
    """The folder of the weights: a run's export, or a folder or hub id unchanged.

    Raises:
        InputError: No such folder, or nothing loadable in it.
    """
    folder = names.path_of(model)
    if not folder.is_dir():
        if folder.exists() or names.is_path(model) or "/" not in model:
            near = did_you_mean_path(model, folders=True)
            raise InputError(f"there is no folder {model}{near and '.' + near}", where="model",
                             fix="give a run's folder or its export/, or any folder that transformers loads; "
                             "`python -m lit_llm fit` makes one")
        names.check_available(model, "model")
        return model
    for place in (folder, folder / "export"):
        if (place / "config.json").is_file() or (place / "adapter_config.json").is_file():
            return str(place)
    raise InputError(f"{model} holds no model: neither config.json nor export/", where="model",
                     fix="a run has its export/ when its fit has finished" if (folder / "checkpoints").is_dir() else "")


def _adapter_base(folder: str) -> str | None:
    """The base that a PEFT adapter folder names; None if the folder is not an adapter."""
    file = Path(folder, "adapter_config.json")
    if not file.is_file() or Path(folder, "config.json").is_file():
        return None
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"it is not valid JSON: {str(error)[:120]}", where=str(file)) from None
    base = facts.get("base_model_name_or_path") if isinstance(facts, dict) else None
    if not base or not isinstance(base, str):
        raise InputError("it does not name a base", where=str(file), fix="set base_model_name_or_path, or give the "
                         "base as --model and this folder as --adapter")
    return base


def _trained_on(adapter: str | Path) -> dict[str, Any]:
    """The manifest of the checkpoint that an adapter belongs to; empty if there is none."""
    try:
        facts = json.loads((Path(adapter).absolute().parent / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def check_base(folder: str, adapter: str | Path) -> None:
    """Refuse an adapter of another base, if the manifest of its checkpoint names that one.

    Raises:
        InputError: It was trained on another base.
    """
    facts = _trained_on(adapter)
    if (wanted := facts.get("base_hash")) and origin.content_hash(folder) not in (None, wanted):
        raise InputError(f"the adapter {adapter} was trained on another base, {facts.get('base')}", where="adapter",
                         fix=f"give --model {facts.get('base')}, or the present folder of that base")


def tokenizer_folder(folder: str, adapter: str | Path | None = None) -> str:
    """The folder of a model's tokenizer: of the adapter, of its run, of the model, or of its base."""
    for place in [Path(name).resolve() for name in (adapter, folder) if name]:
        run = place.parent.parent.parent            # of RUN/checkpoints/step_N/adapter
        trained = [run / "tokenizer"] if (place / "adapter_config.json").is_file() else []
        if tokenizer_home := next((home for home in [place, *trained] if (home / "tokenizer.json").is_file()), None):
            return str(tokenizer_home)
    return _adapter_base(folder) or folder


def sizes(folder: str, adapter: str | Path | None = None) -> tuple[int, int]:
    """Context length and vocabulary size in tokens of a folder for `load`; its weights are not read.

    Args:
        folder: As in `load`.
        adapter: As in `load`; its virtual tokens take room of the context.

    Raises:
        InputError: No config that transformers reads.
    """
    from lit_llm.models.adapters import virtual_tokens
    from lit_llm.models.load import config_of

    virtual = virtual_tokens.count_in(adapter or folder)
    if base := _adapter_base(folder):
        folder = names.resolve(origin.locate(base, _trained_on(folder).get("base_hash"), Path(folder)))
    context, vocabulary = config_sizes(config_of(folder))
    return context - virtual, vocabulary


def model_sizes(model: Any) -> tuple[int, int]:
    """Context length of a model without its virtual tokens, and vocabulary size, in tokens."""
    from lit_llm.models.adapters import virtual_tokens

    context, vocabulary = config_sizes(model.config)
    return context - virtual_tokens.count(model), vocabulary


def config_sizes(config: Any) -> tuple[int, int]:
    """Context length and vocabulary size in tokens of a model's config."""
    config = config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or 2048), int(config.vocab_size)


def load(folder: str, device: str, dtype: str, adapter: str | Path | None, quantize: str | None = None) -> Any:
    """Load a model with its adapter merged or its linear layers quantized, on its device, in eval mode."""
    import torch
    from safetensors import SafetensorError

    from lit_llm.models.adapters import starting, virtual_tokens
    from lit_llm.models.load import load_causal_lm, stored_dtype
    from lit_llm.models.quantize import stored_quantization

    if quantize not in (None, "nf4", "int8"):
        raise InputError(f"unknown quantization '{quantize}'; use nf4 or int8", where="quantize")
    base_folder = _adapter_base(folder) or folder
    if (quantize or stored_quantization(base_folder)) and (adapter or _adapter_base(folder)):
        raise InputError("an adapter cannot be merged into quantized weights", where="quantize",
                         fix="give the base as --model and the adapter as --adapter NAME=FOLDER")
    facts = _trained_on(adapter or folder) if adapter or _adapter_base(folder) else {}
    if base := _adapter_base(folder):
        folder, adapter = names.resolve(origin.locate(base, facts.get("base_hash"), Path(folder))), folder
    elif adapter:
        check_base(folder, adapter)
    place = device_of(device)
    kind = stored_dtype(folder) if dtype == "auto" else getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype):
        raise InputError(f"unknown dtype '{dtype}'; use auto, float32 or bfloat16", where="dtype")
    try:
        served: Any = quantize
        model: Any = load_causal_lm(folder, dtype=kind, quantize=served, half=kind is torch.bfloat16,
                                    device=place)
        if adapter:
            check.check_weights(folder, model)
            virtual = virtual_tokens.count_in(adapter)
            model = starting.load(model, Path(adapter)).eval() if virtual else starting.merged(model, Path(adapter))
            check.check_weights(adapter, model)
            if Path(adapter, "generation_config.json").is_file():       # where its training taught it to stop
                model.generation_config = model.generation_config.from_pretrained(str(adapter))
    except InputError:
        raise
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
        raise InputError(f"cannot load {adapter or folder}: {(str(error).splitlines() or ['?'])[0][:200]}",
                         where="model") from None
    if quantize:                                    # it is on its device, and its answers are not those of check.json
        return model.eval()
    if stored_quantization(folder):                 # it is on its device
        check.check_weights(folder, model.eval())
        return model
    model = model.to(place).eval()
    if not adapter:
        check.check_weights(folder, model)
    return model


def device_of(name: str) -> Any:
    """The device of a name, such as cuda:1; auto is a GPU if there is one.

    Raises:
        InputError: It cannot be used.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"{name} cannot be used: {str(error).splitlines()[0][:160]}", where="device",
                         fix="leave it out: auto selects an available device") from None


def cache_memory(device: Any) -> int:
    """Bytes that keys and values of requests may take: a quarter of a machine's memory, most of a GPU's free memory."""
    import torch

    if device.type == "cuda":
        return int(0.8 * torch.cuda.mem_get_info(device)[0])
    return config_limits.installed_memory() // 4
