"""Score the reference sequences of `text/check.py` with the weights in memory at each checkpoint.

The result is stored in the checkpoint's manifest. `export` scores the same sequences with the model reloaded from the
checkpoint, which detects faults in writing or reading weights.
"""

import logging
import math
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng

from lit_llm.data.rows.loader import batch_of
from lit_llm.system.private import lightning as private
from lit_llm.text import check

log = logging.getLogger(__name__)


class ReferenceScores:
    """The reference sequences of a run, built once and scored at each checkpoint."""

    def __init__(self) -> None:
        self._references: list[check.Reference] | None = None

    def measured(self, trainer: L.Trainer) -> dict[str, Any]:
        """Entries for the manifest. Collective: ZeRO-3 and FSDP2 gather each layer from all ranks.

        Random generators, gradients and the mode of each layer are restored. A failure never prevents a checkpoint: it
        is logged, and the entries contain the reason.

        Args:
            trainer: The trainer within a fit.

        Returns:
            A digest of the sequences' ids, their NLL by the forward pass of training without dropout and noise, and the
            precision and kind of device; or `skipped`, the reason.
        """
        module: Any = trainer.lightning_module
        tokenizer: Any = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
        if not hasattr(tokenizer, "encode_document"):
            return {"skipped": "the data have no tokenizer for the reference sequences"}
        try:
            if self._references is None:
                self._references = check.reference_sequences(tokenizer, check.vocabulary(module.model))
            with undisturbed(trainer):
                nll = _nll(trainer, [row.ids[: check.scored_length(module.model)] for row in self._references])
        except Exception as error:                  # another kind of model in a subclass, or too little memory
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            if trainer.is_global_zero:
                log.warning("the reference sequences could not be scored in memory, so an export cannot be compared "
                            "with the model in training: %s", why)
            return {"skipped": why}
        if not math.isfinite(nll):
            return {"skipped": "their nll in memory is not finite"}
        return {"rows": check.digest(self._references), "nll": nll,
                "precision": str(trainer.precision), "device": trainer.strategy.root_device.type}


def _nll(trainer: L.Trainer, documents: list[tuple[int, ...]]) -> float:
    """Mean nats per token, without the first of each document, of documents in one packed sequence."""
    length, most = sum(map(len, documents)), max(map(max, documents))
    segments = [(np.array(ids), np.ones(len(ids), bool)) for ids in documents]
    batch: Any = trainer.strategy.batch_to_device(
        batch_of([segments], seq_len=length, pad_id=0, token_bytes=np.zeros((2, most + 1), np.int64)))
    with trainer.precision_plugin.val_step_context():
        return float(scored(trainer, batch).total) / (length - len(documents))


def scored(trainer: L.Trainer, batch: Any) -> Any:
    """Sums of a batch by the model in memory, within `undisturbed` and the context of the precision. Collective.

    Args:
        trainer: The trainer within a fit.
        batch: On the device.

    Returns:
        `forward.Sums`, with the loss of each supervised token.
    """
    strategy, module = trainer.strategy, trainer.lightning_module
    if strategy.model is module:
        return module.plain_sums(batch)  # type: ignore[operator]
    assert strategy.model is not None               # as Lightning calls `validation_step`, for DeepSpeed's engine
    return private.call_as_step(strategy, module, "plain_sums", batch)


@contextmanager
def undisturbed(trainer: L.Trainer) -> Generator[None, None, None]:
    """Context for an evaluation in the middle of training."""
    outer: Any = trainer.model                      # DeepSpeed's engine has its own train mode
    compiled = getattr(trainer.lightning_module, "compile_layers", False)
    stance = torch.compiler.set_stance("force_eager") if compiled else nullcontext()  # do not compile for these shapes
    with private.modes_restored(outer), torch.no_grad(), stance, isolate_rng():
        outer.eval()
        yield
