"""A model's folder and what it was when it was written: a few fixed rows, their token ids, and the nll of each.

`check.json` travels in an export. Whoever loads the folder renders the rows again with its tokenizer and template and
scores them with its model; a folder that no longer gives what is written there is refused. The rows are fixed texts and
numbers, never training data, since exports are published. A folder without the file is loaded as it is.
"""

import hashlib
import json
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lit_llm import disk
from lit_llm.errors import InputError
from lit_llm.text.conversation import Conversation, Document, Message

log = logging.getLogger(__name__)
NAME, VERSION = "check.json", 1
LIMIT = 1 << 18                                     # bytes of the file; ours have some 5,000
MOST_ROWS, MOST_IDS = 16, 4096
SCORED = 48                                         # tokens of a row that are scored, so that it takes milliseconds
Kind = Literal["text", "conversation", "ids"]
TEXT = ("The quick brown fox, in 1,234.50 leaps,\n  doesn't jump over\tthe lazy dog's bed: naïve café 👍🏽\r\n"
        "你好，世界！今天是2024年5月6日。 def f(x):\n    return [x ** 2 for x in range(10)]\n\n")
CONVERSATION = Conversation((
    Message("user", "What is 17 + 25? 请用一句话回答。"), Message("assistant", "17 + 25 = 42。"),
    Message("user", "Thank you!  谢谢"), Message("assistant", "You're welcome. 不客气！")))
# What the nll of a row may differ by, relative above 1 nat. Float32 differs by the order of sums alone. Half precision
# rounds each weight and activation to 8 or 11 bits; rows of random ids, with an nll far above 1, bear that well.
TOLERANCE = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 2e-2}
QUANTIZED = 0.3                                     # 4 bits lose about a tenth of a weight's norm
# What the mean of all rows may differ by between the model in memory when a checkpoint is written, in the precision of
# training, and the one reloaded in float32. On a CPU the toy differs by 5e-4 in bfloat16 and by 2e-4 with 4 bits, too.
SAVED = {"32": 2e-5, "64": 2e-5, "16": 5e-3, "bf": 1e-2}
IN_4_BITS = 1e-2
ELSEWHERE = 1e-3                                    # float32 on a GPU, whose products may be rounded


@dataclass(frozen=True, slots=True)
class Row:
    """A fixed row.

    Args:
        kind: A document, a conversation in the chat template, or ids that stand for nothing.
        ids: Its tokens; the first `SCORED` are scored.
        nll: Mean nats per scored token but the first.
    """

    kind: Kind
    ids: tuple[int, ...]
    nll: float = math.nan


# ---- rows ------------------------------------------------------------------------------------------------------------

def rows_of(tokenizer: Any, vocabulary: int) -> list[Row]:
    """The rows as this tokenizer and its chat template render them.

    Args:
        tokenizer: Of the run or of the folder.
        vocabulary: The model's, as `vocabulary` gives it; the random ids lie below.
    """
    rendered: list[tuple[Kind, Sequence[int] | None]] = [
        (kind, render(tokenizer, kind)) for kind in ("text", "conversation")]
    random = [(place * 2654435761 + 97531) % (1 << 32) % vocabulary for place in range(1, 17)]
    return [Row(kind, tuple(ids)) for kind, ids in [*rendered, ("ids", random)] if ids]


def vocabulary(model: Any) -> int:
    """Tokens of a model by its config, which says it of weights that are cut over processes or adapted as well."""
    return int(model.config.get_text_config().vocab_size)


def render(tokenizer: Any, kind: str) -> list[int] | None:
    """Ids of the text or of the conversation; none where the chat template takes no such conversation."""
    if kind == "text":
        return [int(id_) for id_ in tokenizer.encode_document(Document(TEXT)).input_ids]
    try:
        return [int(id_) for id_ in tokenizer.encode_conversation(CONVERSATION)[-1].input_ids]
    except InputError:
        return None


def scores(model: Any, rows: Sequence[Row]) -> list[float]:
    """Mean nats per token of each row, by the model's own forward pass; its mode and its gradients stay as they are."""
    import torch
    from torch.nn import functional as F

    most = room(model)
    training, found = model.training, []
    model.eval()
    try:
        with torch.no_grad(), _eager(model):
            for row in rows:
                ids = torch.tensor([row.ids[:most]], device=model.get_input_embeddings().weight.device)
                logits = model(input_ids=ids, use_cache=False).logits[0, -ids.shape[1]:]     # behind virtual tokens
                found.append(float(F.cross_entropy(logits[:-1].double(), ids[0, 1:])))
    finally:
        model.train(training)
    return found


def digest(rows: Sequence[Row]) -> str:
    """Of the rows' ids: the same where a tokenizer and a vocabulary make the same rows."""
    return hashlib.sha256(json.dumps([row.ids for row in rows]).encode()).hexdigest()


def room(model: Any) -> int:
    """Tokens of a row that are scored: as many as the model has positions for, at most `SCORED`."""
    return min(SCORED, int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or SCORED))


@contextmanager
def _eager(model: Any) -> Iterator[None]:
    """Let layers attend as transformers defines it: attention for packed rows wants to know their documents."""
    found: list[Any] = [getattr(layer, "config", None) for layer in model.modules()]
    configs = {id(config): config for config in found if getattr(config, "_attn_implementation", None) is not None}
    before = {key: config._attn_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation = "eager"
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]


def apart(one: float, other: float) -> float:
    """Difference of two nll: relative, but absolute below 1 nat."""
    return abs(one - other) / max(1.0, abs(one)) if math.isfinite(one) and math.isfinite(other) else math.inf


# ---- writing ---------------------------------------------------------------------------------------------------------

def gate(folder: Path, tokenizer: Any, rows: Sequence[Row], trained: Sequence[float], model: Any, *,
         quantize: str | None = None, base_dtype: str = "float32") -> None:
    """Compare what was trained with the folder as it was reloaded, and write `check.json` into it.

    A tokenizer here is a `tokenizer.Tokenizer`, which itself calls `check_tokenizer`.

    Args:
        folder: With weights, config and tokenizer.
        tokenizer: The folder's, reloaded.
        rows: As the run's tokenizer renders them.
        trained: The nll of each by the model as trained: adapters beside the base, nothing merged.
        model: The folder's, reloaded in the dtype that it was written in.
        quantize: How the base was quantized in training.
        base_dtype: In which `trained` was computed.

    Raises:
        InputError: The reloaded folder reads or scores a row otherwise.
    """
    dtype = str(model.dtype).removeprefix("torch.")
    tolerance = max(TOLERANCE.get(dtype, 1e-4), TOLERANCE.get(base_dtype, 1e-4))
    for row in rows:
        if row.kind != "ids" and render(tokenizer, row.kind) != list(row.ids):
            raise InputError(f"the tokenizer, reloaded from the export, reads the fixed {row.kind} otherwise than in "
                             "training", where=str(folder), fix=_short(tokenizer, row))
    if sorted(_stops(model)) != sorted(tokenizer.stop_ids):
        raise InputError(f"the export would stop at {sorted(_stops(model))}, and training taught it to stop at "
                         f"{sorted(tokenizer.stop_ids)}", where=str(folder))
    written = scores(model, rows)
    worst = max(range(len(rows)), key=lambda place: apart(trained[place], written[place]))
    if not apart(trained[worst], written[worst]) <= tolerance:
        raise InputError(f"the exported folder computes another model than was trained: the fixed {rows[worst].kind} "
                         f"has nll {trained[worst]:.6g} before merging and {written[worst]:.6g} in the folder "
                         f"(tolerance {tolerance:.0e} in {dtype}); nothing was exported", where=str(folder),
                         fix="the checkpoint is whole; its adapter folder loads with peft.PeftModel.from_pretrained")
    log.info("export checked: nll of %d fixed rows %.6g as trained, %.6g reloaded in %s (tolerance %.0e)", len(rows),
             _mean(trained), _mean(written), dtype, tolerance)
    _write(folder, tokenizer, [Row(row.kind, row.ids, nll) for row, nll in zip(rows, written, strict=True)], dtype,
           tolerance, quantize)


def compare_saved(facts: Any, model: Any, rows: Sequence[Row], found: Sequence[float], quantize: str | None) -> None:
    """Compare the model in memory, when a checkpoint was written, with the one that is reloaded from the checkpoint.

    Args:
        facts: `check` of the checkpoint's manifest; null in those of earlier versions, which are not compared.
        model: Reloaded.
        rows: As the run's tokenizer renders them.
        found: The nll of each by the reloaded model, on a base in 4 bits where it was trained on one.
        quantize: How the base was quantized.

    Raises:
        InputError: They differ by more than the precision of training explains.
    """
    if not isinstance(facts, dict) or not isinstance(facts.get("nll"), float):
        why = facts.get("skipped") if isinstance(facts, dict) else "the checkpoint is of an earlier version"
        log.info("the export is not compared with the model in memory: %s", why)
        return
    if facts.get("rows") != digest(rows):
        raise InputError("the run's tokenizer reads the fixed rows otherwise than in training", where="tokenizer",
                         fix="put the run folder's tokenizer back as fit wrote it")
    then, precision = facts["nll"], str(facts.get("precision"))
    lengths = [len(row.ids[: room(model)]) - 1 for row in rows]
    now = sum(nll * length for nll, length in zip(found, lengths, strict=True)) / sum(lengths)
    tolerance = max(SAVED.get(precision[:2], SAVED["bf"]), IN_4_BITS if quantize else 0,
                    ELSEWHERE if facts.get("device") != "cpu" else 0)
    if not apart(then, now) <= tolerance:
        raise InputError(f"the checkpoint's files hold another model than was trained: fixed rows had nll {then:.6g} "
                         f"in memory when it was written, and have {now:.6g} reloaded (tolerance {tolerance:.0e} after "
                         f"training in {precision}); nothing was exported", where="checkpoint",
                         fix="export another checkpoint (--checkpoint step_N), or train on from this one with "
                             "--ckpt_path: the state that a run resumes from is a file of its own")
    log.info("checkpoint checked: nll of %d fixed rows %.6g in memory when it was written, %.6g reloaded (tolerance "
             "%.0e after training in %s)", len(rows), then, now, tolerance, precision)


def compare_quantized(rows: Sequence[Row], trained: Sequence[float], exact: Sequence[float], quantize: str) -> None:
    """Compare adapters on the quantized base, as trained, with the same ones on the exact base, as exported.

    Args:
        rows: Fixed rows.
        trained: The nll of each on the quantized base.
        exact: On the exact one.
        quantize: How it was quantized.

    Raises:
        InputError: They differ by more than 4 bits explain.
    """
    worst = max(range(len(rows)), key=lambda place: apart(trained[place], exact[place]))
    if not apart(trained[worst], exact[worst]) <= QUANTIZED:
        raise InputError(f"on the base in {quantize}, as trained, the fixed {rows[worst].kind} has nll "
                         f"{trained[worst]:.6g}, and {exact[worst]:.6g} on the exact base, which would be exported "
                         f"(tolerance {QUANTIZED}); nothing was exported", where="model.quantize",
                         fix="train with a smaller learning rate, or with --model.quantize null")
    log.info("fixed rows have nll %.6g on the base in %s, as trained, and %.6g on the exact one, which is exported "
             "(tolerance %g)", _mean(trained), quantize, _mean(exact), QUANTIZED)


def _write(folder: Path, tokenizer: Any, rows: Sequence[Row], dtype: str, tolerance: float,
           quantize: str | None) -> None:
    import torch
    import transformers

    facts = {
        "version": VERSION, "text": TEXT,
        "conversation": [{"role": message.role, "content": message.content} for message in CONVERSATION.messages],
        "rows": [asdict(row) for row in rows], "nll": _mean([row.nll for row in rows]), "scored": SCORED,
        "dtype": dtype, "trained_on_base_in": quantize, "tolerance": tolerance, "template": _template(tokenizer),
        "config": _digest(folder / "config.json"),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__}}
    disk.replace_text(folder / NAME, json.dumps(facts, ensure_ascii=False, indent=1) + "\n")


# ---- reading ---------------------------------------------------------------------------------------------------------

def check_tokenizer(folder: str | Path, tokenizer: Any, *, own_template: bool = True) -> None:
    """Refuse a folder whose tokenizer or chat template was changed since it was exported.

    Args:
        folder: A model's; one without `check.json` passes.
        tokenizer: Loaded from it.
        own_template: Whether the chat template is the folder's too.

    Raises:
        InputError: A row is read otherwise, or the file is damaged.
    """
    if not Path(folder, NAME).is_file():
        return
    facts = _read(Path(folder))
    for row in facts["rows"]:
        if row.kind == "ids" or (row.kind == "conversation" and not own_template):
            continue
        if render(tokenizer, row.kind) != list(row.ids):
            template = row.kind == "conversation" and facts["template"] != _template(tokenizer)
            what = "chat template" if template else "tokenizer"
            raise InputError(f"its {what} is not the one that it was exported with: the fixed {row.kind} in {NAME} "
                             f"gives other tokens; {_short(tokenizer, row)}", where=str(folder), fix=_advice(folder))


def check_weights(folder: str | Path, model: Any, *, quantize: str | None = None) -> None:
    """Refuse a folder whose weights or config were changed since it was exported.

    Args:
        folder: A model's; one without `check.json` passes.
        model: Loaded from it, before anything is put on it; whole, since it computes here.
        quantize: How its weights were quantized when they were loaded.

    Raises:
        InputError: A row has another nll, or the file is damaged.
    """
    if not Path(folder, NAME).is_file():
        return
    facts = _read(Path(folder))
    rows: list[Row] = facts["rows"]
    count = model.get_input_embeddings().weight.shape[0]
    if most := max((id_ for row in rows for id_ in row.ids if id_ >= count), default=0):
        raise _damaged(Path(folder), f"id {most} lies outside the model's vocabulary of {count}")
    dtype = str(model.dtype).removeprefix("torch.")
    tolerance = max(TOLERANCE.get(dtype, 1e-4), TOLERANCE.get(facts["dtype"], 1e-4))
    tolerance = max(tolerance, QUANTIZED if quantize else 0, ELSEWHERE if model.device.type != "cpu" else 0)
    for row, now in zip(rows, scores(model, rows), strict=True):
        if not apart(row.nll, now) <= tolerance:
            changed = facts["config"] != _digest(Path(folder, "config.json"))
            what = "config.json was changed" if changed else "weights were replaced"
            raise InputError(f"its {what} since it was exported: the fixed {row.kind} in {NAME} has nll {now:.6g}, not "
                             f"{row.nll:.6g} (tolerance {tolerance:.0e} in {quantize or dtype})", where=str(folder),
                             fix=_advice(folder))


def _read(folder: Path) -> dict[str, Any]:
    """The file's facts, with `rows` as `Row`s; each type and size is checked, since folders come from anywhere."""
    try:
        with open(folder / NAME, "rb") as stream:
            data = stream.read(LIMIT + 1)
        if len(data) > LIMIT:
            raise ValueError(f"it has more than {LIMIT:,} bytes")
        facts: dict[str, Any] = json.loads(data)
        if facts["version"] != VERSION:
            raise _damaged(folder, f"it has version {str(facts['version'])[:20]}, and {VERSION} is read here")
        rows = [Row(row["kind"], tuple(row["ids"]), float(row["nll"])) for row in facts["rows"][:MOST_ROWS]]
        for row in rows:
            whole = all(type(id_) is int and 0 <= id_ < 1 << 31 for id_ in row.ids)
            if not (whole and 2 <= len(row.ids) <= MOST_IDS and row.kind in ("text", "conversation", "ids")):
                raise ValueError("a row is no list of token ids")
        if not rows or not isinstance(facts["dtype"], str):
            raise ValueError("it holds no rows or no dtype")
        return facts | {"rows": rows, "template": facts["template"], "config": facts["config"]}
    except (OSError, ValueError, KeyError, TypeError, OverflowError, AttributeError, RecursionError) as error:
        raise _damaged(folder, f"{type(error).__name__}: {' '.join(str(error).split())[:100]}") from None


def _damaged(folder: Path, why: str) -> InputError:
    return InputError(f"it cannot be used: {why}", where=str(folder / NAME), fix=_advice(folder))


def _advice(folder: str | Path) -> str:
    return f"export the run again; or, to take the folder as it is, delete {Path(folder, NAME)}"


def _short(tokenizer: Any, row: Row) -> str:
    """The two readings from where they part."""
    now = render(tokenizer, row.kind) or []
    at = next((place for place, (one, other) in enumerate(zip(now, row.ids, strict=False)) if one != other),
              min(len(now), len(row.ids)))
    return f"from token {at + 1} on it reads {now[at:at + 6]}, not {list(row.ids[at:at + 6])}"


def _template(tokenizer: Any) -> str:
    return hashlib.sha256(json.dumps(tokenizer.hf.chat_template).encode()).hexdigest()


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


def _stops(model: Any) -> list[int]:
    own = model.generation_config.eos_token_id
    return [own] if isinstance(own, int) else list(own or ())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
