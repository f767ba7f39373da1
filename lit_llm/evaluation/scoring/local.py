"""Score windows of tokens with a model on this machine, by the module that trains and validates.

A model with an adapter scores with the adapter and with the base alone, which is the same model with the adapter
switched off.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from lit_llm import names
from lit_llm.data.rows.loader import Batch, batch_of
from lit_llm.errors import InputError
from lit_llm.evaluation.material import Window
from lit_llm.evaluation.scoring.subject import Subject
from lit_llm.inference.loading import config_sizes, device_of
from lit_llm.kernels import rmsnorm
from lit_llm.models.adapters import adapter, peft_method, starting
from lit_llm.models.load import config_of, load_causal_lm, stored_dtype
from lit_llm.text import check
from lit_llm.text.tokenizer import Tokenizer
from lit_llm.training import forward
from lit_llm.training.module import CausalLMModule

DTYPES = ("float32", "bfloat16", "float16", "float64")


class Positions(Protocol):
    """What scoring reads of a text (`Material`)."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer."""

    @property
    def last_position(self) -> int | None:
        """The highest position that the model may see; null for no limit."""


class Scores(NamedTuple):
    """The N scored tokens of a batch of windows, in their order.

    Args:
        nll: (N,) float64, nats.
        correct: (N,) int64, 1 where the token was the most likely one; -1 where a server does not tell.
    """

    nll: np.ndarray
    correct: np.ndarray


def context_length(subject: Subject) -> int:
    """Positions of a model, by its config."""
    return config_sizes(config_of(subject.weights))[0]


class LocalModel:
    """A loaded model.

    Args:
        subject: The model.
        dtype: `auto` for that of the stored weights, or float32, bfloat16, float16, float64.
        quantize: Type of the numbers of linear layers; null for those of the training.
        device: `auto` for a GPU if there is one, or cpu, cuda, mps.

    Raises:
        InputError: It cannot be loaded, or there is no such device or dtype.
    """

    def __init__(self, subject: Subject, *, dtype: str = "auto", quantize: str | None = None,
                 device: str = "auto") -> None:
        if dtype == "auto":
            dtype = str(stored_dtype(subject.weights)).removeprefix("torch.")
        if dtype not in DTYPES:
            raise InputError(f"unknown dtype '{dtype}'; use auto, {', '.join(DTYPES)}", where="dtype")
        self.subject, self.dtype, self.quantize = subject, dtype, quantize or subject.quantize
        self.device = device_of(device)
        self.module = CausalLMModule(base=subject.weights)
        self.module.model = self._loaded()
        self.module.half_adapters = dtype == "bfloat16" and subject.adapter is not None

    def _loaded(self) -> Any:
        """The model with its adapter, on its device, in eval mode, as the module would build it for a validation."""
        folder, weights = self.subject.adapter, self.subject.weights
        virtual = folder is not None and peft_method.adds_virtual_tokens(peft_method.spec_in(folder))
        kind = None if virtual else self.module.choose_attention({})
        numbers: Any = self.quantize
        inner = load_causal_lm(weights, dtype=getattr(torch, self.dtype), attention=kind, quantize=numbers,
                               half=self.dtype == "bfloat16", device=self.device)
        if numbers is None:
            check.check_weights(names.resolve(weights), inner)
        inner.config.use_cache = False
        model: Any = inner if folder is None else starting.load(inner, folder)
        if self.module.way is None or self.module.way.fast_norms:
            rmsnorm.use_fast_norms(model)
        return (model if numbers is not None else model.to(self.device)).eval()

    @property
    def has_base(self) -> bool:
        """Whether the base can be scored as well: the model has an adapter."""
        return adapter.is_peft(self.module.model)

    def score(self, rows: Sequence[Sequence[Window]], material: Positions, *, base: bool = False) -> Scores:
        """Score the tokens of a batch, in their order.

        Args:
            rows: Packed sequences of windows.
            material: The texts that they belong to.
            base: With the adapter switched off.
        """
        off = self.module.model.disable_adapter() if base else nullcontext()
        batch = self._batch(rows, material)
        way = forward.Choices(self.module.way or forward.Way())
        with torch.inference_mode(), off:
            sums = self.module._surrounded(batch, lambda: forward.nll(self.module.model, batch, way))
        assert sums.tokens is not None
        return Scores(sums.tokens.nll.double().cpu().numpy(), sums.tokens.correct.long().cpu().numpy())

    def _batch(self, rows: Sequence[Sequence[Window]], material: Positions) -> Batch:
        tokenizer, width = material.tokenizer, max(sum(len(window.ids) for window in row) for row in rows)
        batch: Any = batch_of([[(window.ids, window.supervised) for window in row] for row in rows],
                              seq_len=max(2, width), pad_id=tokenizer.pad_id, token_bytes=tokenizer.token_bytes)
        if material.last_position is not None:
            batch["position_ids"].clamp_(max=material.last_position)
        return {name: value.to(self.device) if isinstance(value, torch.Tensor) else value
                for name, value in batch.items()}  # type: ignore[return-value]
