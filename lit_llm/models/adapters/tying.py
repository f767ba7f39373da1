"""Adapters on an embedding and an output head that are one matrix: kept one where that is asked for, explained always.

Knows PEFT's layers by their attributes, and nothing of its classes.
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
    """A matrix of a head's adapter that is another's of the embedding, turned; it has no weight of its own."""

    def __init__(self, source: Any, key: str) -> None:
        super().__init__()
        self.source = (source, key)                 # in a tuple: the weight belongs to the embedding

    @property
    def weight(self) -> Tensor:
        """As a linear layer would have it."""
        owner, key = self.source
        return owner[key].t()

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states times the matrix."""
        return F.linear(hidden, self.weight)


def tie(model: Any) -> None:
    """Make `ensure_weight_tying` hold in training: one weight, which both layers use.

    peft gives the head a second parameter on the same storage. Each gets its own moments in the optimizer, and they
    part at the first `.to(device)`, cast or shard.
    """
    embedding = getattr(model.get_base_model(), "get_input_embeddings", lambda: None)()
    turned = getattr(embedding, "lora_embedding_B", {}), getattr(embedding, "lora_embedding_A", {})
    for name, config in model.peft_config.items():
        for layer in getattr(config, "target_modules_to_tie", None) or ():
            head = model.get_base_model().get_submodule(layer)
            if name in turned[0] and hasattr(head, "lora_A"):
                head.lora_A[name], head.lora_B[name] = (Transposed(source, name) for source in turned)


def matrices(model: nn.Module) -> list[tuple[str, Transposed]]:
    """Matrices of heads' adapters that are the embedding's, by the name of the module that would own them."""
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, Transposed)]


@contextmanager
def explained(model: "PreTrainedModel", config: Any, *, say: bool = True) -> Iterator[None]:
    """Say what an adapter on a tied matrix means here, in place of peft's warning that merging it may go wrong."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True` and a tied layer is part")
        yield
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    adapted = [hasattr(layer, "base_layer") and not hasattr(layer, "token_adapter")
               and not hasattr(layer, "trainable_tokens_delta") for layer in (embedding, head)]    # rows stay tied
    first = not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0
    if say and first and any(adapted) and getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        which = "both" if all(adapted) else "the embedding" if adapted[0] else "the output head"
        tied = getattr(config, "ensure_weight_tying", False) and not getattr(config, "use_dora", False)
        log.info("embedding and output head are one matrix in this base; adapters are on %s: %s", which,
                 "they are one adapter too, and the export stays tied" if tied and all(adapted) else
                 "the export will hold two matrices, and tie_word_embeddings: false")
