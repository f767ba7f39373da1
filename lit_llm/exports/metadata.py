"""The front matter of a model card by the hub's conventions, which huggingface_hub writes and reads."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lit_llm import names
from lit_llm.errors import InputError
from lit_llm.inference.usage import LONGEST_HEAD

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
SNAPSHOT = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/")      # in the path of the hub's cache
LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{1,60}")  # as the hub spells them: apache-2.0
INHERITED = ("license", "license_name", "license_link", "language")     # from the base's card
METRICS = {"perplexity": "perplexity", "token_accuracy": "accuracy", "nll": "nll", "bits_per_byte": "bits_per_byte",
           "bits_per_character": "bits_per_character"}     # ours -> the hub's type
SPLITS = {"val": "validation", "test": "test"}
WORD = re.compile(r"[A-Za-z]+")
ENGLISH = frozenset(["a", "and", "are", "in", "is", "of", "the", "to", "what", "you"])


def base_id(base: str | None) -> str | None:
    """The hub id of a base: its name, or that of the hub's cache in which its folder lies; null if it has none."""
    if base is None:
        return None
    if snapshot := SNAPSHOT.search(str(names.path_of(base).absolute())):
        return f"{snapshot[1]}/{snapshot[2]}"
    return base if HUB_ID.fullmatch(base) and not names.path_of(base).exists() else None


def base_card(base: str | None) -> dict[str, Any]:
    """What the base's own card says about license and language; empty without one."""
    folder = names.folder_of(base) if base is not None else None
    try:
        text = (folder / "README.md").read_text(encoding="utf-8", errors="replace")[:LONGEST_HEAD] if folder else ""
        head = yaml.safe_load(text.split("\n---", 1)[0].removeprefix("---")) if text.startswith("---\n") else {}
    except (OSError, yaml.YAMLError, ValueError, RecursionError):
        return {}
    if not isinstance(head, Mapping):
        return {}
    facts = {key: head[key] for key in INHERITED if isinstance(head.get(key), str)}
    listed = head.get("language")
    if isinstance(listed, list) and all(isinstance(code, str) for code in listed):
        facts["language"] = listed[:20]
    return facts


def languages(texts: Sequence[str]) -> list[str]:
    """Codes of the languages of texts, as far as script and the commonest words show them: zh, en.

    >>> languages(["What is the colour of it?", "天空是什么颜色？"])
    ['en', 'zh']
    >>> languages(["Wo ist der Hund?", "これは犬です"])
    []
    """
    text = " ".join(texts)[:100_000]
    words = [word.lower() for word in WORD.findall(text)]
    han, kana = (len(re.findall(pattern, text)) for pattern in ("[\u4e00-\u9fff]", "[\u3040-\u30ff]"))
    english = len(words) >= 3 and sum(word in ENGLISH for word in words) >= 0.08 * len(words)
    chinese = han >= 0.03 * max(1, len(text)) and 10 * kana < han
    return [code for code, spoken in (("en", english), ("zh", chinese)) if spoken]


def check_license(license: str | None) -> None:
    """Refuse a license that the hub would not read.

    Raises:
        InputError: It is not an identifier.
    """
    if license is not None and not LICENSE.fullmatch(license):
        raise InputError(f"{license[:60]!r} is not a license identifier", where="license",
                         fix="give it as the hub spells it, such as apache-2.0, mit, cc-by-4.0 or other")


def results(figures: Mapping[str, float], datasets: Sequence[str]) -> list[Any]:
    """Measured metrics as entries of `model-index`, with their 95 % interval where there is one.

    Args:
        figures: Metrics, such as `val/perplexity`; `val/nll_low` and `val/nll_high` are an interval.
        datasets: Names of the training data.
    """
    from huggingface_hub import EvalResult

    entries = []
    for key, value in figures.items():
        split, _, name = key.partition("/")
        if split not in SPLITS or name not in METRICS or not math.isfinite(value):
            continue
        args: dict[str, Any] = {}
        if (interval := interval_of(figures, split, name)) is not None:
            args["interval_95"] = interval
        if (tokens := figures.get(f"{split}/tokens")) is not None:
            args["tokens"] = int(tokens)
        hub_names = [name for name in datasets if HUB_ID.fullmatch(name)]
        entries.append(EvalResult(
            task_type="text-generation", dataset_type=hub_names[0] if hub_names else "custom",
            dataset_name=", ".join(datasets) or "custom", dataset_split=SPLITS[split], metric_type=METRICS[name],
            metric_name=name, metric_value=float(f"{value:.6g}"), metric_args=args or None))
    return entries


def interval_of(figures: Mapping[str, float], split: str, name: str) -> list[float] | None:
    """The 95 % interval of a metric; that of perplexity follows from that of nll."""
    ends = [figures.get(f"{split}/{name}_{end}") for end in ("low", "high")]
    if None in ends and name == "perplexity":
        ends = [math.exp(end) if (end := figures.get(f"{split}/nll_{edge}")) is not None and end < 700 else None
                for edge in ("low", "high")]
    return [float(f"{end:.6g}") for end in ends if end is not None] if None not in ends else None


def front_matter(name: str, keys: Mapping[str, Any], entries: Sequence[Any]) -> str:
    """The YAML between a card's `---` lines.

    Args:
        name: The model's name.
        keys: The hub's keys; null and empty ones are left out.
        entries: Of `results`.
    """
    from huggingface_hub import ModelCardData

    data = ModelCardData(model_name=name, eval_results=list(entries) or None,
                         **{key: value for key, value in keys.items() if value})
    return str(data.to_yaml()).strip()


def check_card(text: str) -> None:
    """Refuse a card that huggingface_hub cannot read back with all its results; this would be an error of ours."""
    from huggingface_hub import ModelCard

    card: Any = ModelCard(text)
    index = yaml.safe_load(text.split("\n---", 1)[0].removeprefix("---")).get("model-index") or []
    count = sum(len(result["metrics"]) for model in index for result in model["results"])
    assert len(card.data.eval_results or []) == count, "huggingface_hub reads other results from the card"


def cut_path(path: object) -> str:
    """A path for publication: only the last name of local folders."""
    return Path(str(path)).name if Path(str(path)).is_absolute() else str(path)
