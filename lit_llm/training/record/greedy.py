"""Greedy answers of the model in training, with the weights as the strategy has distributed them.

Packed attention has no cache of keys and values, so the model temporarily uses torch's attention. Prompts are padded on
the left and answered together, with the backbone and the head that the loss uses; each token is one pass, as in a
validation. Models that do not isolate packed documents answer one prompt at a time with transformers' `generate`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lit_llm.kernels import attention
from lit_llm.models import anatomy
from lit_llm.models.adapters import adapter
from lit_llm.system.private import lightning as private
from lit_llm.system.private import transformers as transformers_private
from lit_llm.training.loss import head_logits
from lit_llm.training.parallel import distribution

UNCACHED_ATTENTION = "sdpa"                         # of transformers; it accepts a cache and a mask of padding


def answer(trainer: L.Trainer, prompts: Sequence[Sequence[int]], *, max_tokens: int, stop_ids: Sequence[int]
           ) -> list[list[int]]:
    """Greedy answers to prompts. Collective where layers are gathered from all ranks; otherwise one rank suffices.

    Random generators and the mode of each layer are restored.

    Args:
        trainer: The trainer within a fit of a `CausalLMModule`.
        prompts: Token ids.
        max_tokens: Most tokens of an answer.
        stop_ids: Tokens that end an answer.

    Returns:
        Token ids of each answer, with the stop token if there is one.

    Raises:
        NotImplementedError: The model does not share passes between documents, and its layers are gathered.
    """
    module: Any = trainer.lightning_module
    outer: Any = trainer.model                      # DeepSpeed's engine has its own train mode
    stance = torch.compiler.set_stance("force_eager") if module.compile_layers else nullcontext()
    with private.modes_restored(outer), torch.no_grad(), stance, isolate_rng():
        outer.eval()
        way = module.way                            # null with prompt tuning
        if way is not None and way.packed and not way.own_logits and not adapter.has_virtual_tokens(module.model):
            with _attention_with_cache(module.model):
                return _together(trainer, module, prompts, max_tokens, stop_ids)
        if distribution.of(trainer.strategy).gathers_layers:
            raise NotImplementedError("this model answers prompts one by one, which strategies that shard weights do "
                                      "not support")
        with _plain_generation(module.model), trainer.precision_plugin.val_step_context():
            return [_alone(module, prompt, max_tokens, stop_ids) for prompt in prompts]


def _together(trainer: L.Trainer, module: Any, prompts: Sequence[Sequence[int]], max_tokens: int,
              stop_ids: Sequence[int]) -> list[list[int]]:
    from transformers import DynamicCache

    gathers = distribution.of(trainer.strategy).gathers_layers
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=module.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=module.device)
    answers: list[list[int]] = [[] for _ in prompts]
    running, cache = set(range(len(prompts))), DynamicCache(config=anatomy.causal_lm(module.model).config)
    for _ in range(max_tokens):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1]:]
        drawn = _pass(trainer, module, ids, mask, positions, cache).argmax(-1).tolist()
        if gathers:                                 # a rank that stopped earlier would let the others wait
            drawn = trainer.strategy.broadcast(drawn)
        for number in sorted(running):
            answers[number].append(drawn[number])
            if drawn[number] in stop_ids:
                running.remove(number)
        if not running:
            break
        ids = torch.tensor(drawn, device=module.device)[:, None]
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
    return answers


def _pass(trainer: L.Trainer, module: Any, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any
          ) -> Tensor:
    """(B, V) logits after the last of (B, T) ids, whose keys and values are in the cache then."""
    def compute() -> Any:
        hidden = anatomy.backbone(module.model)(input_ids=ids, attention_mask=mask, position_ids=positions,
                                                past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
        return head_logits(hidden, anatomy.head(module.model), factor=module.way.factor, cap=module.way.cap)

    strategy, batch = trainer.strategy, {"input_ids": ids}
    with trainer.precision_plugin.val_step_context():
        if distribution.of(strategy).gathers_layers and strategy.model is not module:
            logits: Tensor = private.call_as_step(strategy, module, "_surrounded", batch, compute)
        else:
            logits = module._surrounded(batch, compute)
    return logits


def _alone(module: Any, prompt: Sequence[int], max_tokens: int, stop_ids: Sequence[int]) -> list[int]:
    from transformers import GenerationConfig

    ids = torch.tensor([list(prompt)], device=module.device)
    config = GenerationConfig(do_sample=False, max_new_tokens=max_tokens, eos_token_id=list(stop_ids), pad_token_id=0)
    answered = module._surrounded({"input_ids": ids}, lambda: module.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config))
    return [int(id_) for id_ in answered[0, len(prompt):]]


@contextmanager
def _attention_with_cache(model: Any) -> Iterator[None]:
    """Let layers with packed attention use torch's attention."""
    configs = {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}
    switched = [config for config in configs.values()
                if transformers_private.attention_of(config) == attention.NAME]
    for config in switched:
        transformers_private.set_attention(config, UNCACHED_ATTENTION)
    try:
        yield
    finally:
        for config in switched:
            transformers_private.set_attention(config, attention.NAME)


@contextmanager
def _plain_generation(model: Any) -> Iterator[None]:
    """Let `generate` ignore the penalties and limits in the model's own generation config."""
    from transformers import GenerationConfig

    owners = {id(part): part for part in (model, anatomy.causal_lm(model)) if hasattr(part, "generation_config")}
    configs = {key: part.generation_config for key, part in owners.items()}
    for part in owners.values():
        part.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for key, part in owners.items():
            part.generation_config = configs[key]
