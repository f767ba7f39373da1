"""Linear layers in 4 bits as in QLoRA (arXiv:2305.14314): loading, training, measuring the error; 8 bits to serve.

This is the only file that imports bitsandbytes for weights.
"""

import json
import logging
from typing import Any, Literal

import torch
from torch import nn

from lit_llm import names
from lit_llm.errors import InputError
from lit_llm.models.anatomy import causal_lm

Quantize = Literal["nf4", "fp4"]
Served = Literal["nf4", "int8"]                     # arXiv:2208.07339 for int8


def quantization(quantize: Quantize | Served, half: bool) -> Any:
    """The quantization config with which transformers loads linear layers in 4 or 8 bits.

    Args:
        quantize: The type of the numbers.
        half: Whether the layers multiply in bfloat16.

    Raises:
        InputError: bitsandbytes is not installed.
    """
    from transformers import BitsAndBytesConfig

    require_quantization(quantize)
    if quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=quantize, bnb_4bit_use_double_quant=True,
                              bnb_4bit_compute_dtype=torch.bfloat16 if half else torch.float32)


def require_quantization(quantize: str | None) -> None:
    """Prepare bitsandbytes for layers in 4 or 8 bits.

    Raises:
        InputError: It is not installed.
    """
    bitsandbytes()
    if quantize == "int8":                          # on CPUs it would say in each product that it rounds its inputs
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def stored_quantization(path: str) -> str | None:
    """How bitsandbytes quantized the weights that are stored in a model folder: `nf4`, `fp4`, `int8`, or null.

    Args:
        path: Folder or hub id; of the latter, only the local cache is read.
    """
    folder = names.folder_of(path)
    try:
        facts = json.loads((folder / "config.json").read_text(encoding="utf-8")) if folder else {}
        how = facts.get("quantization_config") or {}
        if how.get("quant_method") != "bitsandbytes":
            return None
        return "int8" if how.get("load_in_8bit") else str(how.get("bnb_4bit_quant_type", "fp4"))[:8]
    except (OSError, ValueError, AttributeError, RecursionError):
        return None                                 # loading reports it


def return_autocast_dtype(model: nn.Module) -> None:
    """Let 4-bit layers return the same dtype as other linear layers under autocast.

    They multiply in half precision but return the dtype of their input: after a norm, which returns float32, all
    activations saved for the backward pass would be twice as large.
    """
    def cast(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        device = inputs[0].device.type
        if not torch.is_autocast_enabled(device):
            return inputs
        return inputs[0].to(torch.get_autocast_dtype(device)), *inputs[1:]

    for layer in _layers_in_4_bits(model):
        layer.register_forward_pre_hook(cast)


def keep_differentiable(model: nn.Module) -> None:
    """Keep 4-bit weights in the layout that has a backward pass.

    On CPUs with AVX512-BF16, bitsandbytes permanently converts a layer's weights at its first evaluation, and the
    product with converted weights has no gradient for its input: every validation would break later training.
    """
    for layer in _layers_in_4_bits(model):
        layer.support_avx512bf16_for_cpu = False    # type: ignore[assignment]


def _layers_in_4_bits(model: nn.Module) -> list[nn.Module]:
    return [layer for layer in model.modules() if isinstance(layer, bitsandbytes().nn.Linear4bit)]


def bitsandbytes() -> Any:
    """The package.

    Raises:
        InputError: It is not installed.
    """
    import importlib

    try:
        return importlib.import_module("bitsandbytes")
    except ImportError:
        raise InputError("quantized weights need bitsandbytes, which is not installed", where="model.quantize",
                         fix="pip install bitsandbytes") from None


def quantization_drift(model: nn.Module, quantize: Quantize) -> float:
    """Relative error of linear weights in 4 bits: the norm of the error over the norm of the weights.

    Adapters trained on a quantized base compensate for that error, which the exact base does not have.
    """
    functional = bitsandbytes().functional
    error = norm = 0.0
    out = causal_lm(model).get_output_embeddings()
    for layer in model.modules():
        if type(layer) is nn.Linear and layer is not out:
            weight = layer.weight.detach().float()
            rounded = functional.dequantize_4bit(*functional.quantize_4bit(weight, quant_type=quantize))
            error += float((rounded.reshape(weight.shape) - weight).square().sum())
            norm += float(weight.square().sum())
    return float(error / norm) ** 0.5 if norm else 0.0
