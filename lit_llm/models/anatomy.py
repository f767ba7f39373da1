"""Find the parts of a causal language model, with or without adapters, and count its parameters.

Architectures name their backbone, head, embeddings and decoder layers differently; this module hides the differences.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from lit_llm.models.adapters.adapter import is_peft
from lit_llm.system.private import transformers as transformers_private

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def causal_lm(model: Any) -> "PreTrainedModel":
    """The transformers model, without the PEFT wrapper."""
    return model.get_base_model() if is_peft(model) else model


def backbone(model: Any) -> nn.Module:
    """The part that maps token ids to hidden states: the model without its head."""
    inner = causal_lm(model)
    named = [getattr(inner, name, None) for name in (inner.base_model_prefix, "model", "transformer")]
    return next(part for part in (*named, inner.get_decoder()) if isinstance(part, nn.Module))


def head(model: Any) -> nn.Module:
    """The part that maps hidden states to logits."""
    return causal_lm(model).get_output_embeddings()


def embeddings(model: Any) -> list[nn.Parameter]:
    """Embedding tables of tokens and positions, and the output head."""
    tables = [layer for layer in causal_lm(model).modules() if isinstance(layer, nn.Embedding)]
    out = head(model)
    return [weight for layer in (*tables, *([out] if out is not None else [])) for weight in layer.parameters()]


def decoder_layers(model: Any) -> list[nn.Module]:
    """The decoder layers of the backbone in order: the units of sharding, recomputation and compilation."""
    kinds = transformers_private.layer_classes(causal_lm(model))
    return [layer for layer in causal_lm(model).modules() if type(layer).__name__ in kinds]


def logit_adjustment(model: Any) -> tuple[float, float | None]:
    """(factor, cap): scaling and soft capping that some architectures apply to the head's output.

    Cohere multiplies by `logit_scale`, Granite divides by `logits_scaling`, Gemma-2 caps at `final_logit_softcapping`.
    """
    config = causal_lm(model).config
    factor = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return factor, float(cap) if cap else None


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """Number of parameters of a model, and of trained ones."""

    total: int
    trainable: int

    def __str__(self) -> str:
        share = 100 * self.trainable / max(1, self.total)
        return f"{self.trainable:,} of {self.total:,} parameters are trained ({share:.2f} %)"


def count_parameters(model: nn.Module, elements: Callable[[nn.Parameter], int] = nn.Parameter.numel) -> ParameterCount:
    """Counts tied weights once, and 4-bit weights at their full size.

    Args:
        model: Any part of a model.
        elements: Gives the size of a weight that a strategy may have split.
    """
    sizes = [(_full_size(weight, elements), weight.requires_grad) for weight in model.parameters()]
    return ParameterCount(sum(size for size, _ in sizes), sum(size for size, is_trained in sizes if is_trained))


def _full_size(weight: nn.Parameter, elements: Callable[[nn.Parameter], int]) -> int:
    packed: Any = getattr(weight, "quant_state", None)      # two values per byte
    return int(packed.shape.numel()) if packed is not None else elements(weight)
