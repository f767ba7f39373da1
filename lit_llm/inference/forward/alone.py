"""Compute requests one by one, each with a cache of transformers: for models whose requests cannot share a pass."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from lit_llm.errors import InputError
from lit_llm.inference.forward import proof
from lit_llm.inference.forward.adapters import Adapters, Span
from lit_llm.inference.forward.request import Answer, Request
from lit_llm.models.adapters import virtual_tokens
from lit_llm.models.adapters.adapter import has_virtual_tokens


class Alone:
    """Reads the new tokens of each request in a pass of its own.

    Args:
        model: A causal LM in eval mode, also a PEFT model with virtual tokens.
        adapters: Those that requests may name.

    Raises:
        InputError: The model is not causal.
    """

    def __init__(self, model: Any, adapters: Adapters) -> None:
        if not proof.is_causal(model):
            raise InputError("its logits after a token change with the tokens behind it, so it cannot generate text",
                             where="model", fix="use a causal language model")
        self.model, self.adapters = model, adapters
        self.has_virtual_tokens = has_virtual_tokens(model)
        self.base = model.get_base_model() if self.has_virtual_tokens else model
        self.cached_tokens = 0                          # that requests could share
        self.reused_tokens = 0                          # of prompts; nothing is kept after a request
        self._reads_cache: bool | None = None           # tried with the first request

    def begin(self, request: Request) -> bool:
        """Admit a request; there is always room."""
        return True

    def is_read(self, request: Request, running: Iterable[Request]) -> bool:
        """False: caches are not shared."""
        return False

    def end(self, request: Request, *, broken: bool = False) -> None:
        """Forget what was read of a request."""
        request.state = None

    def preempted(self) -> list[Request]:
        """None ever is."""
        return []

    def advance(self, running: Sequence[Request]) -> list[Answer]:
        """Read what is new of every request."""
        answers = []
        for request in running:
            try:
                with self.adapters.applied([Span(request.adapter, 1, 1)], self.model.device):   # of the whole row
                    answers.append(self._read(request))
            except Exception as error:                  # out of memory, for one: this request's alone
                answers.append(Answer(request, None, error))
        return answers

    def _read(self, request: Request) -> Answer:
        from transformers import DynamicCache

        # no_grad, not inference_mode: a model in training may keep tensors that this forward makes (rotary tables).
        with torch.no_grad():
            if self._reads_cache is None:
                self._reads_cache = _reads_cache(self.base, request.ids)
            if not self._reads_cache:
                ids = torch.tensor([request.ids], device=self.model.device)
                return _answer(request, self.model(input_ids=ids).logits[0, -ids.shape[1]:])    # skip virtual tokens
            first = request.state is None
            if first:
                request.state = DynamicCache(config=self.base.config)
            ids = torch.tensor([request.ids if first else request.ids[-1:]], device=self.model.device)
            wanted = {"logits_to_keep": ids.shape[1] if request.needs_all_logits else 1}
            if first and self.has_virtual_tokens:
                output, request.state = virtual_tokens.first_pass(self.model, ids, request.state, **wanted)
            else:
                output = self.base(input_ids=ids, past_key_values=request.state, use_cache=True, **wanted)
            return _answer(request, output.logits[0])


def _answer(request: Request, logits_TV: torch.Tensor) -> Answer:
    if request.needs_all_logits:
        request.take(0, logits_TV.float())
    return Answer(request, logits_TV[-1].float())


def _reads_cache(model: Any, prompt: list[int]) -> bool:
    """Whether a token has the same logits after a cache as after the tokens themselves.

    Architectures with another state (Mamba, RWKV) accept the argument and ignore it, so each token would be computed
    as if it were the first. For these, all tokens are read again for each new one, which is slow but correct.
    """
    from transformers import DynamicCache

    ids = torch.tensor([(prompt * 3)[:6] if len(prompt) < 3 else prompt[:6]], device=model.device)
    want = model(input_ids=ids).logits[:, -1].float()
    try:
        cache = DynamicCache(config=model.config)
        model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
        have = model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
    except Exception:                                   # an argument that it does not know
        return False
    return bool((have.float() - want).norm() <= 0.1 * want.norm())
