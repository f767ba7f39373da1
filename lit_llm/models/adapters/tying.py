"""Adapters on a tied embedding and output head: keep them tied on request, and explain the consequences.

PEFT's layers are recognised by their attributes, not by its classes.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


class Transposed(nn.Module):
    """A matrix of the head's adapter that is the transpose of one of the embedding's adapter, without an own weight."""

    def __init__(self, source: Any, key: str) -> None:
        super().__init__()
        self.source = (source, key)  # in a tuple, so that the weight is registered with the embedding only

    @property
    def weight(self) -> Tensor:
        """The transposed weight, in a linear layer's layout."""
        owner, key = self.source
        return owner[key].t()

    def forward(self, hidden: Tensor) -> Tensor:
        """Multiply hidden states by the matrix."""
        return F.linear(hidden, self.weight)


def tie(model: Any) -> None:
    """Make `ensure_weight_tying` effective in training: one weight that both layers use.

    PEFT gives the head a second parameter on the same storage. Each gets its own moments in the optimizer, and they
    diverge at the first `.to(device)`, cast or shard.
    """
    embedding = getattr(model.get_base_model(), "get_input_embeddings", lambda: None)()
    turned = getattr(embedding, "lora_embedding_B", {}), getattr(embedding, "lora_embedding_A", {})
    for name, config in model.peft_config.items():
        for layer in getattr(config, "target_modules_to_tie", None) or ():
            head = model.get_base_model().get_submodule(layer)
            if name in turned[0] and hasattr(head, "lora_A"):
                head.lora_A[name], head.lora_B[name] = (Transposed(source, name) for source in turned)


def matrices(model: nn.Module) -> list[tuple[str, Transposed]]:
    """Matrices that heads' adapters share with the embedding's, with the names of their modules."""
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, Transposed)]


@contextmanager
def explaining(model: "PreTrainedModel", config: Any, *, say: bool = True) -> Iterator[None]:
    """Explain what an adapter on a tied matrix means here, instead of PEFT's warning about merging it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True` and a tied layer is part")
        yield
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    adapted = [hasattr(layer, "base_layer") and not hasattr(layer, "token_adapter")
               and not hasattr(layer, "trainable_tokens_delta") for layer in (embedding, head)]  # rows stay tied
    first = not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0
    if say and first and any(adapted) and getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        which = "both" if all(adapted) else "the embedding" if adapted[0] else "the output head"
        tied = getattr(config, "ensure_weight_tying", False) and not getattr(config, "use_dora", False)
        log.info("embedding and output head share one matrix in this base; adapters are on %s: %s", which,
                 "they share one adapter as well, and the export stays tied" if tied and all(adapted) else
                 "the export will have two matrices and tie_word_embeddings: false")
