"""Measure the difference between a checkpoint's model and the files that were exported, on fixed rows."""

import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_llm.errors import InputError
from lit_llm.exports.rows import Rows
from lit_llm.system import integrity
from lit_llm.text.check import nll_difference

log = logging.getLogger(__name__)
# Accepted difference of the NLL per token: relative above 1 nat, absolute below. Half precision rounds each weight and
# activation to 8 or 11 bits; int8 rounds both to 8 bits, and nf4 each weight to 16 values.
BOUNDS = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 2e-2, "int8": 5e-2, "nf4": 0.3}
LOGITS = {"float32": 1e-3}                          # accepted difference of logits, relative to the largest of them
KEPT = 64 << 20                                     # bytes of logits that are compared


@dataclass(frozen=True, slots=True)
class Scores:
    """What a model gives for the rows.

    Args:
        nll: Nats per supervised token.
        logits: (N, V) float32, those of the first positions.
    """

    nll: float
    logits: Tensor


def scores(model: Any, rows: Rows) -> Scores:
    """Score the rows one by one by the model's own forward pass, in eval mode and without gradients."""
    total, first = 0.0, []
    room = KEPT // (4 * int(model.config.get_text_config().vocab_size))
    device = model.get_input_embeddings().weight.device
    model.eval()
    with torch.no_grad():
        for row in rows.rows:
            ids = torch.tensor([row.ids], device=device)
            logits = model(input_ids=ids, use_cache=False).logits[0, -len(row.ids):].float()    # skip virtual tokens
            nll = F.cross_entropy(logits[:-1], ids[0, 1:], reduction="none").double()
            total += float(nll[torch.tensor(row.supervised[1:], device=device)].sum())
            if room > 0:
                first.append(logits[:room].cpu())
                room -= len(first[-1])
    return Scores(total / max(1, rows.tokens), torch.cat(first) if first else torch.zeros(1, 1))


def before(model: Any, rows: Rows) -> tuple[Rows, Scores]:
    """Score the checkpoint's model, without the rows for which it gives numbers that are not finite.

    Some models have such tokens, and training skips steps with them; they cannot be compared.

    Returns:
        The rows that can be compared, and their scores.

    Raises:
        InputError: There are none.
    """
    scored = scores(model, rows)
    if _is_finite(scored):
        return rows, scored
    usable = replace(rows, rows=[row for row in rows.rows if _is_finite(scores(model, replace(rows, rows=[row])))])
    if not usable.rows:
        raise InputError("the model's loss is not finite on any of the rows that an export is checked with; nothing "
                         "was exported", fix="train with a lower model.lr, or export another --checkpoint")
    log.warning("%d of %d %s sequences are not part of the export's check, because the trained model's logits for them "
                "are not finite", len(rows.rows) - len(usable.rows), len(rows.rows), rows.kind)
    return usable, scores(model, usable)


def _is_finite(scored: Scores) -> bool:
    return math.isfinite(scored.nll) and bool(scored.logits.isfinite().all())


def compared(rows: Rows, before: Scores, after: Scores, kind: str, folder: Path) -> dict[str, Any]:
    """Entries of `check.json` about the difference.

    Args:
        rows: The rows.
        before: Scores of the checkpoint's model, in float32.
        after: Scores of the model read back from the folder.
        kind: Its format: int8, nf4, or the dtype of its weights.
        folder: The folder, whose weight files are hashed.

    Raises:
        InputError: The difference is beyond the bound of the format.
    """
    alike = before.logits.shape == after.logits.shape
    largest = float((before.logits - after.logits).abs().max()) if alike else math.inf
    scale = max(1.0, float(before.logits.abs().max()))
    bound, most = BOUNDS.get(kind, BOUNDS["float32"]), LOGITS.get(kind)
    apart = nll_difference(before.nll, after.nll)
    if not apart <= bound or not largest <= (math.inf if most is None else most * scale) or not alike:
        raise InputError(f"the exported model differs from the trained one: {rows.tokens:,} {rows.kind} tokens have "
                         f"nll {before.nll:.6g} before merging and {after.nll:.6g} in the export (tolerance "
                         f"{bound:.0e} in {kind}), and logits differ by up to {largest:.3g}; nothing was exported",
                         where=str(folder), fix="the checkpoint is intact; try another format (--dtype, --quantize), "
                         "or load its adapter folder with peft.PeftModel.from_pretrained")
    return {
        "measured": {
            "rows": rows.kind, "fingerprint": rows.fingerprint, "sequences": len(rows.rows), "tokens": rows.tokens,
            "format": kind, "nll_before": before.nll, "nll_after": after.nll, "difference": apart, "bound": bound,
            "logits": {"positions": len(before.logits), "largest_difference": largest,
                       "bound": None if most is None else most * scale}},
        "files": hashes(folder)}


def hashes(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of each weight file of a folder."""
    return {file.name: {"bytes": file.stat().st_size, "sha256": integrity.sha256(file)}
            for file in sorted(folder.glob("*.safetensors"))}


def line(facts: dict[str, Any]) -> str:
    """The entries in one line."""
    values = facts["measured"]
    return (f"check passed in {values['format']}: nll {values['nll_before']:.5f} before and {values['nll_after']:.5f} "
            f"after on {values['tokens']:,} {values['rows']} tokens (bound {values['bound']:g}); logits differ by at "
            f"most {values['logits']['largest_difference']:.2g}")
