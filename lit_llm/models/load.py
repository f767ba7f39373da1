"""Load a causal language model from a folder or the hub, build one from a config, and save it.

This is the only file that imports `AutoModelForCausalLM`. `anatomy.py` finds the parts of a model, and `quantize.py`
prepares 4-bit weights.
"""

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_llm import disk, hub, names
from lit_llm.errors import InputError, did_you_mean
from lit_llm.kernels import attention as packed_attention
from lit_llm.models.anatomy import causal_lm
from lit_llm.models.quantize import (
    Quantize,
    Served,
    keep_differentiable,
    quantization,
    require_quantization,
    return_autocast_dtype,
    stored_quantization,
)
from lit_llm.system import config_limits, integrity
from lit_llm.system.private import transformers as transformers_private

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel


# ---- build and load --------------------------------------------------------------------------------------------------

def load_causal_lm(path: str, *, dtype: torch.dtype = torch.float32, attention: str | None = None,
                   quantize: Quantize | Served | None = None, half: bool = False,
                   device: torch.device | None = None) -> "PreTrainedModel":
    """Load a pretrained model from a folder or hub id, in evaluation mode.

    Args:
        path: Folder in Hugging Face's layout, or a hub id. Only safetensors are read and no remote code is run.
        dtype: Dtype of the weights; never "auto", which would train bf16 weights without float32 master weights.
        attention: `lit_varlen` for packed sequences; null is the default of transformers (sdpa if supported).
        quantize: Load linear layers except the head in 4 bits, blockwise with quantized scales, or in 8 bits. Null also
            loads a folder whose weights are stored so.
        half: Whether quantized layers multiply in bfloat16.
        device: Device of a quantized model, which must be quantized in place.

    Raises:
        InputError: No such folder, the hub cannot be reached, weights are missing, the architecture cannot be packed,
            or the files differ from their checkpoint's manifest.
    """
    from transformers import AutoModelForCausalLM

    _set_progress_bars()
    names.check_folder(path, "model.base")
    folder = names.path_of(path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise InputError(f"{path} has no config.json, so it is not a model folder", where="model.base")
    integrity.check_beside(folder, "model.base")
    config_limits.check_folder(path, "model.base")
    if attention == packed_attention.NAME:
        packed_attention.register()
    stored = stored_quantization(path)
    if stored and quantize:
        raise InputError(f"the weights in {path} are stored in {stored} already", where="quantize",
                         fix="leave quantize out; the folder is loaded as it is")
    more: dict[str, Any] = {"quantization_config": quantization(quantize, half)} if quantize else {}
    if quantize or stored:
        require_quantization(quantize or stored)
        more["device_map"] = {"": device or torch.device("cpu")}
    try:
        with config_limits.building("model.base", most=config_limits.most_parameters(path), whole=False):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(folder), dtype=dtype, attn_implementation=attention,
                use_safetensors=True, trust_remote_code=False, output_loading_info=True,
                local_files_only=names.is_local_only(path), **more)
    except InputError:
        raise
    except Exception as error:                      # untrusted files: transformers raises errors of many types
        _check_interface(error, path)
        if folder.is_dir():
            raise InputError(f"cannot load the model in {path}: {_reason(error)}", where="model.base") from None
        raise hub.unreachable(path, where="model.base") from None
    model, report = loaded
    if report["missing_keys"]:
        raise InputError(f"the weights in {path} lack {len(report['missing_keys'])} tensors, "
                         f"e.g. {sorted(report['missing_keys'])[0]}", where="model.base")
    if quantize or stored:                          # unquantized weights would keep the whole mapped file in memory
        for weight in model.parameters():
            weight.data = weight.data.clone()
        return_autocast_dtype(model)
        keep_differentiable(model)
    _check_causal(model)
    if attention == packed_attention.NAME:
        check_packable(model)
    return model


def stored_dtype(path: str) -> torch.dtype:
    """Dtype of a pretrained model's weights according to its config; float32 by default.

    Raises:
        InputError: There is no config, or transformers cannot read it.
    """
    dtype = getattr(config_of(path), "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def config_of(path: str) -> Any:
    """The config of a pretrained model.

    Raises:
        InputError: There is none, or transformers cannot read it.
    """
    from transformers import AutoConfig

    folder = names.path_of(path)
    config_limits.check_folder(path, "model")
    try:
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=False,
                                          local_files_only=names.is_local_only(path))
    except Exception as error:                      # untrusted files
        if folder.is_dir():
            raise InputError(f"cannot read the config.json in {path}: {_reason(error)}", where="model") from None
        raise hub.unreachable(path, where="model") from None


def init_causal_lm(init: dict[str, Any], *, dtype: torch.dtype = torch.float32, attention: str | None = None,
                   **defaults: Any) -> "PreTrainedModel":
    """Build a model with random weights, to train from scratch.

    Args:
        init: `model_type` (llama, qwen3, gpt2 ...) and any keys of that architecture's transformers config.
        dtype: Dtype of the weights.
        attention: As in `load_causal_lm`.
        defaults: Defaults for keys that `init` lacks: vocabulary size and control tokens of the tokenizer.

    Raises:
        InputError: An unknown architecture, or a key that its config does not have.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.integrations import is_deepspeed_zero3_enabled
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config_limits.check(init, "model.init")
    keys = dict(init)
    kind = str(keys.pop("model_type", None))
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise InputError(f"unknown model_type '{kind}'; it is the architecture's name in transformers, such as llama."
                         f"{did_you_mean(kind, list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))}", where="model.init")
    plain = AutoConfig.for_model(kind)
    allowed = {*plain.to_dict(), *plain.attribute_map}            # aliases of the same keys
    allowed |= {"rope_theta", "rope_scaling"} if "rope_parameters" in allowed else set()    # older names
    if "num_key_value_heads" in allowed:
        allowed.add("head_dim")                     # Qwen3-MoE reads it but does not declare it
    if unknown := sorted(set(keys) - allowed):
        raise InputError(f"{kind} has no key '{unknown[0]}'.{did_you_mean(unknown[0], sorted(allowed))}",
                         where="model.init")
    if attention == packed_attention.NAME:
        packed_attention.register()
    try:
        config: Any = AutoConfig.for_model(kind, **{**defaults, **keys})
        facts = config.to_dict()                    # attributes that differ between layers cannot be read from it
        heads, shared = (facts.get(f"num_{name}_heads") for name in ("attention", "key_value"))
        if isinstance(heads, int) and isinstance(shared, int) and shared and heads % shared:
            raise ValueError(f"{heads} attention heads are not divisible by {shared} key-value heads")
        with config_limits.building("model.init", whole=not is_deepspeed_zero3_enabled()):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    except InputError:
        raise
    except Exception as error:                      # architectures raise errors of many types
        _check_interface(error, kind)
        raise InputError(f"a {kind} cannot be built with these keys: {_reason(error)}", where="model.init") from None
    _check_causal(model)
    if attention == packed_attention.NAME:
        check_packable(model)
    return model


def skeleton(base: str | None, init: dict[str, Any] | None, *, dtype: torch.dtype = torch.float32,
             attention: str | None = None, **defaults: Any) -> "PreTrainedModel":
    """The same model without weights, on the meta device: names, shapes and counts at the cost of a config.

    Args:
        base: As in `load_causal_lm`; only its config is read.
        init: As in `init_causal_lm`.
        dtype: Dtype that the weights would have.
        attention: As in `load_causal_lm`.
        defaults: As in `init_causal_lm`.

    Raises:
        InputError: No such base, or no such architecture.
    """
    with torch.device("meta"):
        if init is not None:
            return init_causal_lm(init, dtype=dtype, attention=attention, **defaults)
        from transformers import AutoConfig, AutoModelForCausalLM

        path = str(names.path_of(str(base)))
        config_limits.check_folder(path, "model.base")
        try:
            config = AutoConfig.from_pretrained(path, trust_remote_code=False,
                                                local_files_only=names.is_local_only(path))
            if attention == packed_attention.NAME:
                packed_attention.register()
            with config_limits.building("model.base", most=config_limits.most_parameters(path)):
                return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
        except InputError:
            raise
        except Exception as error:                  # untrusted file
            _check_interface(error, str(base))
            raise InputError(f"cannot read the architecture of {base}: {_reason(error)}", where="model.base") from None


def like(model: "PreTrainedModel", config: object, attention: str | None) -> Any:
    """A model of the same class with random float32 weights and this config; errors of transformers propagate."""
    if attention == packed_attention.NAME:
        packed_attention.register()
    return transformers_private.of_config(type(model), copy.deepcopy(config), dtype=torch.float32,
                                          attn_implementation=attention)


def tokenizer_facts(tokenizer: Any) -> dict[str, Any]:
    """Config values of a new model that come from the tokenizer."""
    return {"vocab_size": tokenizer.vocab_size, "bos_token_id": tokenizer.bos_id,
            "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}


def _set_progress_bars() -> None:
    """Show progress bars of loading and saving in a terminal only, not in logs."""
    import sys

    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def _reason(error: Exception) -> str:
    """The message of transformers in one line."""
    if "ignore_mismatched_sizes" in str(error):
        return "the shapes of its weights do not match its config.json"
    return " ".join(str(error).split())[:240] or type(error).__name__


def _check_interface(error: Exception, what: str) -> None:
    """Explain the error of old architectures, which have a separate table of attention implementations."""
    if isinstance(error, KeyError) and error.args == (packed_attention.NAME,):
        raise packed_attention.PackingError(f"{what} has its own attention implementation, so documents in a packed "
                                            "sequence could not be isolated", where="model") from None


def _check_causal(model: "PreTrainedModel") -> None:
    """Refuse encoders: they also have a language-modeling head, but see the tokens that they should predict."""
    causal = {part.is_causal for part in model.modules() if isinstance(getattr(part, "is_causal", None), bool)}
    if causal == {False} and not getattr(model.config, "is_decoder", False):
        raise InputError(f"{type(model).__name__} is an encoder: each token attends to those that follow it",
                         where="model", fix="use a causal model, such as Llama or Qwen, or a BERT-like model with "
                         "is_decoder: true")


def check_packable(model: "PreTrainedModel") -> None:
    """Refuse architectures that are known, without computing, not to support packed attention.

    Raises:
        PackingError: The error gives the reason.
    """
    kinds = set(getattr(model.config, "layer_types", None) or ["full_attention"])
    if not transformers_private.takes_other_attention(model) or not kinds <= {"full_attention", "sliding_attention"}:
        raise packed_attention.PackingError(f"{type(model).__name__} mixes tokens by more than plain attention, so "
                                            "documents in a packed sequence could not be isolated", where="model.base")


# ---- save ------------------------------------------------------------------------------------------------------------

def save_causal_lm(model: "PreTrainedModel", folder: str | Path, *, stop_ids: tuple[int, ...], pad_id: int | None,
                   dtype: torch.dtype | None = None) -> None:
    """Write a folder that `AutoModelForCausalLM.from_pretrained` loads without changes.

    Args:
        model: A merged model, on CPU or GPU.
        folder: Created if it does not exist.
        stop_ids: Written to the generation config, so that every library stops at the tokens of the training.
        pad_id: Padding token, written there as well.
        dtype: Dtype of the written weights; null keeps the model's.
    """
    if dtype is not None:
        nn.Module.to(model, dtype)
    transformers_private.set_attention(model.config, None)      # packed attention is used in training only
    model.config.use_cache = True
    model.generation_config = generation_config(model, stop_ids, pad_id)
    model.save_pretrained(str(folder), safe_serialization=True)
    disk.share(Path(folder))


def generation_config(model: nn.Module, stop_ids: tuple[int, ...], pad_id: int | None) -> "GenerationConfig":
    """The model's own generation settings, but greedy, and with the stop tokens of the training."""
    own = causal_lm(model).generation_config
    assert own is not None
    settings = copy.deepcopy(own)
    settings.eos_token_id, settings.pad_token_id = list(stop_ids), pad_id
    settings.do_sample = False
    settings.temperature = settings.top_p = settings.top_k = None
    return settings


def save_weights(model: "PreTrainedModel", folder: str | Path, state: dict[str, Tensor]) -> None:
    """Write gathered weights (from ZeRO's shards, for example) as a model folder: config and safetensors.

    Args:
        model: Provides config and names; its weights are not read.
        folder: Created if it does not exist.
        state: All weights by name, on CPU; tied weights may be given once.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {"architectures": [type(model).__name__], "use_cache": True}
    config["dtype"] = str(next(iter(state.values())).dtype).removeprefix("torch.")
    config = transformers_private.without_attention(config)
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n", encoding="utf-8")
    disk.share(folder)
