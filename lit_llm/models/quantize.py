"""Linear layers in 4 bits, as QLoRA has them (arXiv:2305.14314): how they are loaded, trained through and compared.

The only file that imports bitsandbytes for weights.
"""

from typing import Any, Literal

import torch
from torch import nn

from lit_llm.errors import InputError
from lit_llm.models.anatomy import causal_lm

Quantize = Literal["nf4", "fp4"]


def quantization(quantize: Quantize, half: bool) -> Any:
    """What transformers is told to load linear layers in 4 bits.

    Args:
        quantize: The type of the 4-bit numbers.
        half: Whether the layers multiply in bfloat16.

    Raises:
        InputError: bitsandbytes is not installed.
    """
    from transformers import BitsAndBytesConfig

    bitsandbytes()
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=quantize, bnb_4bit_use_double_quant=True,
                              bnb_4bit_compute_dtype=torch.bfloat16 if half else torch.float32)


def answer_in_half(model: nn.Module) -> None:
    """Let layers in 4 bits give what other linear layers give under autocast.

    They multiply in half precision, but give what they were given: behind a norm, which keeps float32, all that is left
    for the backward pass is twice as large.
    """
    def cast(layer: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        device = given[0].device.type
        if not torch.is_autocast_enabled(device):
            return given
        return given[0].to(torch.get_autocast_dtype(device)), *given[1:]

    for layer in _layers_in_4_bits(model):
        layer.register_forward_pre_hook(cast)


def keep_differentiable(model: nn.Module) -> None:
    """Keep 4-bit weights in the layout that has a backward pass.

    On CPUs with AVX512-BF16, bitsandbytes converts a layer's weights at its first evaluation, for good, and the
    product with converted weights passes no gradient to its input: every validation would break the training after it.
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
        raise InputError("4-bit weights need bitsandbytes, which is not installed", where="model.quantize",
                         fix="pip install bitsandbytes") from None


def quantization_drift(model: nn.Module, quantize: Quantize) -> float:
    """Share of a model's linear weights that 4 bits lose: the norm of the error over the norm of the weights.

    Adapters trained on a quantized base have learned to mend that error; merged into the exact base they meet another.
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
