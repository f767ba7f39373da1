"""Read the virtual tokens of prompt tuning, prefix tuning and P-tuning before the tokens of a request.

They are not merged into weights: prompt tuning and P-tuning put embeddings before the embedded tokens, prefix tuning
puts keys and values into the cache of each layer. A cache that has read them continues with the base model alone.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_llm.errors import InputError
from lit_llm.models.adapters.adapter import has_virtual_tokens
from lit_llm.models.adapters.peft_method import stored_keys

METHODS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")    # as `adapter_config.json` names them


def count(model: Any) -> int:
    """Virtual tokens that a model reads before each request; 0 without such an adapter."""
    return int(model.active_peft_config.num_virtual_tokens) if has_virtual_tokens(model) else 0


def count_in(adapter: str | Path) -> int:
    """Virtual tokens of the adapter in a folder in PEFT's format; 0 with another method or without an adapter."""
    try:
        keys = stored_keys(Path(adapter))
    except InputError:                              # loading reports it
        return 0
    tokens = keys.get("num_virtual_tokens")
    return tokens if keys.get("peft_type") in METHODS and isinstance(tokens, int) else 0


def first_pass(model: Any, ids: Tensor, cache: Any, **more: Any) -> tuple[Any, Any]:
    """Read virtual tokens and a prompt.

    Args:
        model: A PEFT model with virtual tokens, without gradients.
        ids: (1, T) the prompt.
        cache: An empty cache of transformers.
        more: Further arguments of the forward pass.

    Returns:
        The output, of which the last T logits are those of the prompt, and the cache that has read all of it.
    """
    base = model.get_base_model()
    if model.active_peft_config.peft_type.value == "PREFIX_TUNING":
        cache = model.get_prompt(1)
        return base(input_ids=ids, past_key_values=cache, use_cache=True, **more), cache
    embedded = model.word_embeddings(ids)
    prompt = model.get_prompt(1).to(embedded.dtype)
    return base(inputs_embeds=torch.cat((prompt, embedded), 1), past_key_values=cache, use_cache=True, **more), cache
