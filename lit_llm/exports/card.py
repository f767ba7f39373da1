"""Write the model card of an export: base model, data, metrics, usage and example questions."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lit_llm.system.redaction import redact_text


def card(run: Path, facts: dict[str, Any], name: str, picture: str = "") -> str:
    """The model card of one checkpoint's model.

    Args:
        run: The run folder.
        facts: The checkpoint's manifest, with its metrics.
        name: The checkpoint's folder.
        picture: File beside the card with the curves of the run; empty if there is none.
    """
    config = read_values(run / "config.yaml")
    base = facts.get("base")
    method = (facts.get("peft") or {}).get("class_path") or "all weights"
    sources = [_plain(_public(source.get("path"))) for source in (config.get("data") or {}).get("sources") or []]
    head: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if base and "/" in str(base) and not Path(str(base)).exists():
        head["base_model"] = str(base)
    talks = read_values(run / "data.json").get("conversations") or {}
    if questions := talks.get("questions"):         # `widget` is the Hugging Face hub's key for them
        head["widget"] = [{"messages": [{"role": "user", "content": redact_text(text)}]} for text in questions]
    if turns := talks.get("turns"):
        head["turns"] = turns
    figures = [f"| {_plain(key)} | {value:.6g} |" for key, value in measured(run, facts).items()]
    return redact_text("\n".join([
        "---", yaml.safe_dump(head, allow_unicode=True).strip(), "---", "", f"# {_plain(run.name)}", "",
        f"Trained from {_plain(_public(base)) if base else 'random weights'} ({_plain(method)}), checkpoint {name}, "
        f"step {facts['step']}.", "",
        "## Data", "", *(f"- {source}" for source in sources), "",
        *_table(figures, name),
        *([f"![Loss over optimizer steps]({picture})", ""] if picture else []),
        *_examples(talks),
        "## Use", "", "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
        'tokenizer = AutoTokenizer.from_pretrained("this folder")',
        'model = AutoModelForCausalLM.from_pretrained("this folder")',
        "```", ""]))


def measured(run: Path, facts: dict[str, Any]) -> dict[str, float]:
    """Metrics of a checkpoint on its run's data and of the model before training; empty if not measured.

    Args:
        run: The run folder.
        facts: The checkpoint's manifest.
    """
    record = read_values(run / "metrics.json")
    same = record.get("checkpoint") == f"step_{facts['step']}"
    tested = {key: value for key, value in record.items() if key.startswith("test/") and same}
    before = {key: value for key, value in record.items() if key.startswith("before/")}
    figures = {**(facts.get("figures") or {}), **tested, **before}
    return {key: float(value) for key, value in figures.items() if isinstance(value, int | float)}


def _table(figures: list[str], name: str) -> list[str]:
    if not figures:
        return ["No metrics were measured for this checkpoint.", ""]
    return [f"## Metrics of {name}", "", "| metric | value |", "|---|---|", *figures, ""]


def _examples(talks: Mapping[str, Any]) -> list[str]:
    """The section with example questions of the data."""
    if not talks.get("turns"):
        return []
    kinds = "single questions" if talks["turns"] == 1 else f"conversations of up to {talks['turns']} questions"
    return ["## Examples", "", f"Trained on {kinds}, for instance:", "",
            *(f"- {_plain(redact_text(text))}" for text in talks["questions"]), ""]


def _public(path: Any) -> str:
    """A path for publication: only the last name of local folders."""
    return Path(str(path)).name if Path(str(path)).is_absolute() else str(path)


def read_values(file: Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file; empty if the file does not exist."""
    if not file.is_file():
        return {}
    return yaml.safe_load(file.read_text(encoding="utf-8")) or {}     # JSON is YAML


def _plain(text: Any) -> str:
    """Config text with Markdown escaped."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", str(text)).replace("\n", " ")
