"""Detect changes to a model folder by scoring a few fixed reference sequences.

An export contains `check.json`: reference sequences, their token ids and the NLL of each. A loader renders and scores
them again with the folder's tokenizer, template and model, and refuses a folder that gives other ids or another NLL.
They are constants, never training data, because exports are published. A folder without the file is not checked.
"""

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lit_llm import disk
from lit_llm.errors import InputError
from lit_llm.system.private import transformers as transformers_private
from lit_llm.text.conversation import Conversation, Document, Message

log = logging.getLogger(__name__)
NAME, VERSION = "check.json", 1
LIMIT = 1 << 18                                     # bytes of the file; exports write about 5,000
MOST_SEQUENCES, MOST_IDS = 16, 4096
SCORED = 48                                         # scored tokens of a sequence; keeps scoring within milliseconds
Kind = Literal["text", "conversation", "ids"]
TEXT = ("The quick brown fox, in 1,234.50 leaps,\n  doesn't jump over\tthe lazy dog's bed: naïve café 👍🏽\r\n"
        "你好，世界！今天是2024年5月6日。 def f(x):\n    return [x ** 2 for x in range(10)]\n\n")
CONVERSATION = Conversation((
    Message("user", "What is 17 + 25? 请用一句话回答。"), Message("assistant", "17 + 25 = 42。"),
    Message("user", "Thank you!  谢谢"), Message("assistant", "You're welcome. 不客气！")))
# Accepted difference of a sequence's NLL, relative above 1 nat. In float32 only the order of sums differs. Half
# precision rounds each weight and activation to 8 or 11 bits, which changes the NLL of random ids (far above 1) little.
TOLERANCE = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 2e-2}
QUANTIZED = 0.3                                     # 4-bit rounding removes about a tenth of a weight's norm
# Accepted difference of the mean NLL between the model in memory, in the precision of training, and the one reloaded
# in float32. On a CPU the toy model differs by 5e-4 in bfloat16 and by 2e-4 in 4 bits.
SAVED = {"32": 2e-5, "64": 2e-5, "16": 5e-3, "bf": 1e-2}
IN_4_BITS = 1e-2
IN_FEW_BITS = 5e-2                                  # of weights that are stored in 4 or 8 bits, by another kernel
ELSEWHERE = 1e-3                                    # float32 on a GPU, whose products may be rounded


@dataclass(frozen=True, slots=True)
class Reference:
    """A fixed reference sequence.

    Args:
        kind: `text`, `conversation` (rendered with the chat template), or random `ids`.
        ids: Token ids; the first `SCORED` are scored.
        nll: Mean nats per scored token, without the first token.
    """

    kind: Kind
    ids: tuple[int, ...]
    nll: float = math.nan


# ---- reference sequences ---------------------------------------------------------------------------------------------

def reference_sequences(tokenizer: Any, vocabulary: int) -> list[Reference]:
    """The reference sequences as this tokenizer and its chat template render them.

    Args:
        tokenizer: The tokenizer of the run or of the exported folder.
        vocabulary: Vocabulary size of the model, see `vocabulary`; the random ids are below it.
    """
    rendered: list[tuple[Kind, Sequence[int] | None]] = [
        (kind, render(tokenizer, kind)) for kind in ("text", "conversation")]
    random = [(place * 2654435761 + 97531) % (1 << 32) % vocabulary for place in range(1, 17)]
    return [Reference(kind, tuple(ids)) for kind, ids in [*rendered, ("ids", random)] if ids]


def vocabulary(model: Any) -> int:
    """Vocabulary size from the config, which also holds for weights that are sharded or adapted."""
    return int(model.config.get_text_config().vocab_size)


def render(tokenizer: Any, kind: str) -> list[int] | None:
    """Ids of the text or of the conversation; None where the chat template refuses the conversation."""
    if kind == "text":
        return [int(id_) for id_ in tokenizer.encode_document(Document(TEXT)).input_ids]
    try:
        return [int(id_) for id_ in tokenizer.encode_conversation(CONVERSATION)[-1].input_ids]
    except InputError:
        return None


def scores(model: Any, references: Sequence[Reference]) -> list[float]:
    """Mean nats per token of each sequence by the model's own forward pass; train mode and gradients are restored."""
    import torch
    from torch.nn import functional as F

    most = scored_length(model)
    training, nll = model.training, []
    model.eval()
    try:
        with torch.no_grad(), transformers_private.eager_attention(model):
            for reference in references:
                ids = torch.tensor([reference.ids[:most]], device=model.get_input_embeddings().weight.device)
                logits = model(input_ids=ids, use_cache=False).logits[0, -ids.shape[1]:]     # skip virtual tokens
                nll.append(float(F.cross_entropy(logits[:-1].double(), ids[0, 1:])))
    finally:
        model.train(training)
    return nll


def digest(references: Sequence[Reference]) -> str:
    """Hash of the sequences' ids: equal where tokenizer and vocabulary give the same sequences."""
    return hashlib.sha256(json.dumps([reference.ids for reference in references]).encode()).hexdigest()


def scored_length(model: Any) -> int:
    """Number of scored tokens of a sequence: at most `SCORED`, and at most the model's positions."""
    return min(SCORED, positions(model))


def positions(model: Any) -> int:
    """Number of positions of the model according to its config; 2,048 if it does not say."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048)


def nll_difference(one: float, other: float) -> float:
    """Difference of two NLLs: relative above 1 nat, absolute below."""
    return abs(one - other) / max(1.0, abs(one)) if math.isfinite(one) and math.isfinite(other) else math.inf


# ---- writing ---------------------------------------------------------------------------------------------------------

def check_export(folder: Path, tokenizer: Any, references: Sequence[Reference], trained: Sequence[float], model: Any, *,
                 quantize: str | None = None, weights: str | None = None, more: dict[str, Any] | None = None) -> None:
    """Compare the trained model with the exported folder as reloaded, and write `check.json` into the folder.

    Args:
        folder: The export, with weights, config and tokenizer.
        tokenizer: The tokenizer reloaded from the folder.
        references: Reference sequences as the run's tokenizer renders them.
        trained: NLL of each by the model as trained, with adapters that are not merged.
        model: The model reloaded from the folder in the dtype of its weights.
        quantize: How the base was quantized in training.
        weights: How the written weights are quantized.
        more: Further entries of the file.

    Raises:
        InputError: The reloaded folder gives other ids or another NLL for a sequence.
    """
    dtype = str(model.dtype).removeprefix("torch.")
    tolerance = QUANTIZED if weights else TOLERANCE.get(dtype, 1e-4)
    for reference in references:
        if reference.kind != "ids" and render(tokenizer, reference.kind) != list(reference.ids):
            raise InputError(f"the tokenizer reloaded from the export gives other tokens for the reference "
                             f"{reference.kind} than in training", where=str(folder), fix=_short(tokenizer, reference))
    if sorted(_stops(model)) != sorted(tokenizer.stop_ids):
        raise InputError(f"generation_config.json of the export has the stop tokens {sorted(_stops(model))}, but "
                         f"the model was trained with {sorted(tokenizer.stop_ids)}", where=str(folder))
    written = scores(model, references)
    worst = max(range(len(references)), key=lambda place: nll_difference(trained[place], written[place]))
    if not nll_difference(trained[worst], written[worst]) <= tolerance:
        raise InputError(f"the exported model differs from the trained one: the reference {references[worst].kind} has "
                         f"nll {trained[worst]:.6g} before merging and {written[worst]:.6g} in the export (tolerance "
                         f"{tolerance:.0e} in {dtype}); nothing was exported", where=str(folder),
                         fix="the checkpoint is intact; its adapter folder loads with peft.PeftModel.from_pretrained")
    log.info("export verified: nll of %d reference sequences is %.6g as trained, %.6g reloaded in %s (tolerance %.0e)",
             len(references), _mean(trained), _mean(written), dtype, tolerance)
    measured = [Reference(reference.kind, reference.ids, nll)
                for reference, nll in zip(references, written, strict=True)]
    _write(folder, tokenizer, measured, dtype, tolerance, quantize, {"weights": weights, **(more or {})})


def compare_saved(facts: object, model: Any, references: Sequence[Reference], reloaded: Sequence[float],
                  quantize: str | None) -> None:
    """Compare the model in memory when a checkpoint was written with the model reloaded from it.

    Args:
        facts: `check` of the checkpoint's manifest; null in checkpoints of earlier versions, which are not compared.
        model: The reloaded model.
        references: Reference sequences as the run's tokenizer renders them.
        reloaded: NLL of each by the reloaded model; on the base in 4 bits if it was trained so.
        quantize: How the base was quantized.

    Raises:
        InputError: They differ by more than the precision of training explains.
    """
    if not isinstance(facts, dict) or not isinstance(facts.get("nll"), float):
        why = facts.get("skipped") if isinstance(facts, dict) else "the checkpoint is of an earlier version"
        log.info("the export is not compared with the model in memory: %s", why)
        return
    if facts.get("rows") != digest(references):
        raise InputError("the run's tokenizer gives other tokens for the reference sequences than in training",
                         where="tokenizer", fix="restore the run folder's tokenizer as fit wrote it")
    then, precision = facts["nll"], str(facts.get("precision"))
    lengths = [len(reference.ids[: scored_length(model)]) - 1 for reference in references]
    now = sum(nll * length for nll, length in zip(reloaded, lengths, strict=True)) / sum(lengths)
    tolerance = max(SAVED.get(precision[:2], SAVED["bf"]), IN_4_BITS if quantize else 0,
                    ELSEWHERE if facts.get("device") != "cpu" else 0)
    if not nll_difference(then, now) <= tolerance:
        raise InputError(f"the checkpoint's files differ from the trained model: the reference sequences had nll "
                         f"{then:.6g} in memory when it was written, and have {now:.6g} reloaded (tolerance "
                         f"{tolerance:.0e} after training in {precision}); nothing was exported", where="checkpoint",
                         fix="export another checkpoint (--checkpoint step_N), or resume training from this one with "
                             "--ckpt_path: a run resumes from a separate file")
    log.info("checkpoint verified: nll of %d reference sequences was %.6g in memory and is %.6g reloaded (tolerance "
             "%.0e after training in %s)", len(references), then, now, tolerance, precision)


def compare_quantized(references: Sequence[Reference], trained: Sequence[float], exact: Sequence[float],
                      quantize: str) -> None:
    """Compare the adapters on the quantized base (as trained) with those on the exact base (as exported).

    Args:
        references: Reference sequences.
        trained: NLL of each on the quantized base.
        exact: NLL of each on the exact base.
        quantize: How the base was quantized in training.

    Raises:
        InputError: They differ by more than 4-bit rounding explains.
    """
    worst = max(range(len(references)), key=lambda place: nll_difference(trained[place], exact[place]))
    if not nll_difference(trained[worst], exact[worst]) <= QUANTIZED:
        raise InputError(f"the reference {references[worst].kind} has nll {trained[worst]:.6g} on the base in "
                         f"{quantize}, as trained, but {exact[worst]:.6g} on the exact base, which would be exported "
                         f"(tolerance {QUANTIZED}); nothing was exported", where="model.quantize",
                         fix="train with a smaller learning rate, or with --model.quantize null")
    log.info("reference sequences have nll %.6g on the base in %s, as trained, and %.6g on the exact base, which is "
             "exported (tolerance %g)", _mean(trained), quantize, _mean(exact), QUANTIZED)


def _write(folder: Path, tokenizer: Any, references: Sequence[Reference], dtype: str, tolerance: float,
           quantize: str | None, more: dict[str, Any]) -> None:
    import torch
    import transformers

    facts = {
        "version": VERSION, "text": TEXT,
        "conversation": [{"role": message.role, "content": message.content} for message in CONVERSATION.messages],
        "rows": [asdict(reference) for reference in references],
        "nll": _mean([reference.nll for reference in references]), "scored": SCORED,
        "dtype": dtype, "trained_on_base_in": quantize, "tolerance": tolerance, "template": _template(tokenizer),
        "config": _digest(folder / "config.json"),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__}, **more}
    disk.replace_text(folder / NAME, json.dumps(facts, ensure_ascii=False, indent=1) + "\n")


# ---- reading ---------------------------------------------------------------------------------------------------------

def check_tokenizer(folder: str | Path, tokenizer: Any, *, own_template: bool = True) -> None:
    """Refuse a folder whose tokenizer or chat template was changed since it was exported.

    Args:
        folder: A model folder; one without `check.json` is accepted.
        tokenizer: The tokenizer loaded from it.
        own_template: Whether the chat template was loaded from the folder as well.

    Raises:
        InputError: A sequence gets other ids, or the file is damaged.
    """
    if not Path(folder, NAME).is_file():
        return
    facts = _read(Path(folder))
    for reference in facts["rows"]:
        if reference.kind == "ids" or (reference.kind == "conversation" and not own_template):
            continue
        if render(tokenizer, reference.kind) != list(reference.ids):
            template = reference.kind == "conversation" and facts["template"] != _template(tokenizer)
            what = "chat template" if template else "tokenizer"
            raise InputError(f"its {what} was changed since it was exported: the reference {reference.kind} in {NAME} "
                             f"gives other tokens; {_short(tokenizer, reference)}", where=str(folder),
                             fix=_advice(folder))


def check_weights(folder: str | Path, model: Any, *, quantize: str | None = None) -> None:
    """Refuse a folder whose weights or config were changed since it was exported.

    Args:
        folder: A model folder; one without `check.json` is accepted.
        model: The model loaded from it, before adapters are added; not sharded, because it computes here.
        quantize: How its weights were quantized on loading.

    Raises:
        InputError: A sequence has another NLL, or the file is damaged.
    """
    if not Path(folder, NAME).is_file():
        return
    facts = _read(Path(folder))
    references: list[Reference] = facts["rows"]
    count = model.get_input_embeddings().weight.shape[0]
    if most := max((id_ for reference in references for id_ in reference.ids if id_ >= count), default=0):
        raise _damaged(Path(folder), f"id {most} is outside the model's vocabulary of {count} tokens")
    dtype = str(model.dtype).removeprefix("torch.")
    tolerance = max(TOLERANCE.get(dtype, 1e-4), TOLERANCE.get(facts["dtype"], 1e-4))
    few_bits = QUANTIZED if quantize else IN_FEW_BITS if facts.get("weights") else 0
    tolerance = max(tolerance, few_bits, ELSEWHERE if model.device.type != "cpu" else 0)
    for reference, now in zip(references, scores(model, references), strict=True):
        if not nll_difference(reference.nll, now) <= tolerance:
            changed = facts["config"] != _digest(Path(folder, "config.json"))
            what = "config.json was changed" if changed else "weights were replaced"
            raise InputError(f"its {what} since it was exported: the reference {reference.kind} in {NAME} has nll "
                             f"{now:.6g}, not {reference.nll:.6g} (tolerance {tolerance:.0e} in {quantize or dtype})",
                             where=str(folder),
                             fix=_advice(folder))


def _read(folder: Path) -> dict[str, Any]:
    """The content of the file, with the reference sequences as values; it is untrusted, so types are checked."""
    try:
        with open(folder / NAME, "rb") as stream:
            data = stream.read(LIMIT + 1)
        if len(data) > LIMIT:
            raise ValueError(f"it is larger than {LIMIT:,} bytes")
        facts: dict[str, Any] = json.loads(data)
        if facts["version"] != VERSION:
            raise _damaged(folder, f"it has version {str(facts['version'])[:20]}; this release reads version {VERSION}")
        references = [Reference(entry["kind"], tuple(entry["ids"]), float(entry["nll"]))
                      for entry in facts["rows"][:MOST_SEQUENCES]]
        for reference in references:
            whole = all(type(id_) is int and 0 <= id_ < 1 << 31 for id_ in reference.ids)
            known_kind = reference.kind in ("text", "conversation", "ids")
            if not (whole and 2 <= len(reference.ids) <= MOST_IDS and known_kind):
                raise ValueError("a reference sequence is not a list of token ids")
        if not references or not isinstance(facts["dtype"], str):
            raise ValueError("rows or dtype are missing")
        return facts | {"rows": references, "template": facts["template"], "config": facts["config"]}
    except (OSError, ValueError, KeyError, TypeError, OverflowError, AttributeError, RecursionError) as error:
        raise _damaged(folder, f"{type(error).__name__}: {' '.join(str(error).split())[:100]}") from None


def _damaged(folder: Path, why: str) -> InputError:
    return InputError(f"the file cannot be used: {why}", where=str(folder / NAME), fix=_advice(folder))


def _advice(folder: str | Path) -> str:
    return f"export the run again, or delete this file to use the folder as it is: {Path(folder, NAME)}"


def _short(tokenizer: Any, reference: Reference) -> str:
    """The two tokenizations from the first difference on."""
    now = render(tokenizer, reference.kind) or []
    at = next((place for place, (one, other) in enumerate(zip(now, reference.ids, strict=False)) if one != other),
              min(len(now), len(reference.ids)))
    return f"from token {at + 1} on the ids are {now[at:at + 6]}, not {list(reference.ids[at:at + 6])}"


def _template(tokenizer: Any) -> str:
    return hashlib.sha256(json.dumps(tokenizer.hf.chat_template).encode()).hexdigest()


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


def _stops(model: Any) -> list[int]:
    own = model.generation_config.eos_token_id
    return [own] if isinstance(own, int) else list(own or ())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
