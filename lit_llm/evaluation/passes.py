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
    cells: list[list[np.ndarray]] = [[] for _ in passes]
    progress = Progress(f"evaluating {name}", material.read * len(passes))
    for rows in material.batches(batch_size):
        windows = [window for row in rows for window in row]
        units = np.repeat([window.unit for window in windows], [int(window.supervised.sum()) for window in windows])
        groups = material.cells(windows) if material.cells is not None else None
        for place, base in enumerate(passes):
            scores = model.score(rows, material, base=base)
            nll[place] += np.bincount(units, scores.nll, count)
            correct[place] += np.bincount(units, scores.correct, count).astype(np.int64)
            unknown = unknown or bool((scores.correct < 0).any())
            if groups is not None:
                cells[place].append(np.column_stack([groups.table, *(
                    np.bincount(groups.of_token, values, len(groups.table)) for values in scores)]))
            progress.add(sum(len(window.ids) for window in windows))
    seconds = progress.end()
    if unknown:                                     # a server that gives no alternatives
        correct[:] = -1
    names = [name, f"{name} (base)"]
    return [Result(names[place], measured(model, material, base=base, seconds=seconds), material.units, nll[place],
                   correct[place], material, base, material.notes,
                   np.concatenate(cells[place]) if cells[place] and not unknown else None)
            for place, base in enumerate(passes)]


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
