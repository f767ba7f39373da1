"""One pass of a model over texts: batches in, a result with the sums of each document out.

A model with an adapter can score the base in the same pass: each batch is computed twice, with the adapter and without.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from lit_llm.evaluation.material import Material, Window
from lit_llm.evaluation.progress import Progress
from lit_llm.evaluation.result import Result, versions
from lit_llm.evaluation.scoring.local import LocalModel, Scores
from lit_llm.evaluation.scoring.remote import ServedModel
from lit_llm.system.redaction import redact_text


class Scorer(Protocol):
    """What can score windows."""

    @property
    def has_base(self) -> bool:
        """Whether the base can be scored as well."""

    def score(self, rows: Sequence[Sequence[Window]], material: Material, *, base: bool = False) -> Scores:
        """Score the windows of a batch, in their order."""


def measure(model: LocalModel | ServedModel, name: str, material: Material, *, batch_size: int,
            with_base: bool = False) -> list[Result]:
    """Score texts.

    Args:
        model: The model.
        name: Its name, for progress and results.
        material: The texts.
        batch_size: Packed sequences per batch; the figures do not depend on it.
        with_base: Also score the base of an adapter.

    Returns:
        The result of the model; with `with_base` also that of the base.
    """
    passes = [False, True] if with_base and model.has_base else [False]
    count = len(material.units)
    nll, correct = np.zeros((len(passes), count)), np.zeros((len(passes), count), np.int64)
    unknown = False
    progress = Progress(f"evaluating {name}", material.read * len(passes))
    for rows in material.batches(batch_size):
        units = np.array([window.unit for row in rows for window in row])
        for place, base in enumerate(passes):
            scores = model.score(rows, material, base=base)
            np.add.at(nll[place], units, scores.nll)
            np.add.at(correct[place], units, scores.correct)
            unknown = unknown or bool((scores.correct < 0).any())
            progress.add(sum(len(window.ids) for row in rows for window in row))
    seconds = progress.end()
    if unknown:                                     # a server that gives no alternatives
        correct[:] = -1
    names = [name, f"{name} (base)"]
    return [Result(names[place], measured(model, material, base=base, seconds=seconds), material.units, nll[place],
                   correct[place], material, base, material.notes) for place, base in enumerate(passes)]


def measured(model: LocalModel | ServedModel, material: Material, *, base: bool, seconds: float) -> dict[str, Any]:
    """What a result was measured with, so that a second measurement is comparable."""
    tokenizer = material.tokenizer
    return {
        "model": _model(model, base),
        "fingerprints": {"data": material.fingerprint, "tokens": material.tokens_fingerprint,
                         "tokenizer": tokenizer.fingerprint[:16],
                         "template": hashlib.sha256(str(tokenizer.hf.chat_template).encode()).hexdigest()[:16]},
        "sources": material.units.sources, "windows": material.settings, "seconds": round(seconds, 2),
        "versions": versions()}


def _model(model: LocalModel | ServedModel, base: bool) -> dict[str, Any]:
    if isinstance(model, ServedModel):
        return {"kind": "server", "url": redact_text(model.url), "name": model.name}
    subject = model.subject
    facts: dict[str, Any] = {
        "kind": subject.kind, "path": subject.place, "base": None, "fingerprint": subject.fingerprint,
        "dtype": model.dtype, "quantize": model.quantize, "device": str(model.device)}
    if subject.adapter is not None:
        facts["base"] = subject.weights
        if base:
            facts |= {"kind": "base", "path": subject.weights, "fingerprint": subject.base_fingerprint}
    return facts
