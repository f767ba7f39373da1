"""Score windows of tokens with a model on this machine, by the module that trains and validates.

A model with an adapter scores with the adapter and with the base alone, which is the same model with the adapter
switched off.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from lightning.fabric.plugins.environments import LightningEnvironment

from lit_llm.data.rows.loader import Batch, batch_of
from lit_llm.errors import InputError
from lit_llm.evaluation.material import Material, Window
from lit_llm.evaluation.scoring.subject import Subject
from lit_llm.inference.loading import config_sizes
from lit_llm.models.adapters import adapter
from lit_llm.models.load import config_of, stored_dtype
from lit_llm.training import forward
from lit_llm.training.module import CausalLMModule

PRECISIONS = {"float32": "32-true", "bfloat16": "bf16-true", "float16": "16-true", "float64": "64-true"}


class Scores(NamedTuple):
    """Sums over the scored tokens of each of W windows.

    Args:
        nll: (W,) float64, nats.
        correct: (W,) int64, tokens that were the most likely ones.
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
        if dtype not in PRECISIONS:
            raise InputError(f"unknown dtype '{dtype}'; use auto, {', '.join(PRECISIONS)}", where="dtype")
        self.subject, self.dtype = subject, dtype
        self.quantize = quantize or subject.quantize
        numbers: Any = self.quantize
        self.module = CausalLMModule(base=subject.weights, quantize=numbers,
                                     adapter=str(subject.adapter) if subject.adapter else None)
        self.module.trainer = _trainer(device, PRECISIONS[dtype])
        self.device = self.module.trainer.strategy.root_device
        self.module.configure_model()
        if self.quantize is None:
            self.module.model.to(self.device)
        self.module.model.eval()

    @property
    def has_base(self) -> bool:
        """Whether the base can be scored as well: the model has an adapter."""
        return adapter.is_peft(self.module.model)

    def score(self, rows: Sequence[Sequence[Window]], material: Material, *, base: bool = False) -> Scores:
        """Score the windows of a batch, in their order.

        Args:
            rows: Packed sequences of windows.
            material: The texts that they belong to.
            base: With the adapter switched off.
        """
        off = self.module.model.disable_adapter() if base else nullcontext()
        found = []
        with torch.inference_mode(), off:
            for window in (window for row in rows for window in row):
                sums = self._sums(self._batch([[window]], len(window.ids), material))
                found.append((float(sums.total), int(sums.correct)))
        nll, correct = zip(*found, strict=True)
        return Scores(np.array(nll), np.array(correct, np.int64))

    def _sums(self, batch: Batch) -> forward.Sums:
        way = forward.Choices(self.module.way or forward.Way())
        return self.module._surrounded(batch, lambda: forward.nll(self.module.model, batch, way))

    def _batch(self, rows: Sequence[Sequence[Window]], width: int, material: Material) -> Batch:
        tokenizer = material.tokenizer
        batch: Any = batch_of([[(window.ids, window.supervised) for window in row] for row in rows],
                              seq_len=max(2, width), pad_id=tokenizer.pad_id, token_bytes=tokenizer.token_bytes)
        if material.last_position is not None:
            batch["position_ids"].clamp_(max=material.last_position)
        return {name: value.to(self.device) if isinstance(value, torch.Tensor) else value
                for name, value in batch.items()}  # type: ignore[return-value]


def _trainer(device: str, precision: str) -> L.Trainer:
    """A trainer of one device, which the module asks for precision and device; it runs nothing."""
    import logging

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"{device} cannot be used: {str(error).splitlines()[0][:160]}", where="device",
                         fix="leave it out: auto selects an available device") from None
    speaker = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = speaker.level
    speaker.setLevel(logging.WARNING)               # silences the list of devices
    try:
        return L.Trainer(accelerator=device.partition(":")[0], devices=1, precision=precision,  # type: ignore[arg-type]
                         logger=False, enable_checkpointing=False, enable_progress_bar=False,
                         enable_model_summary=False, plugins=[LightningEnvironment()])
    finally:
        speaker.setLevel(level)
