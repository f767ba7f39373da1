"""The model card of an export: where the model comes from, what it was trained on, what was measured, how to use it."""

import re
from pathlib import Path
from typing import Any

import yaml


def card(run: Path, facts: dict[str, Any], name: str) -> str:
    """The model card: where it comes from, what it was trained on, what was measured, how to use it."""
    config, metrics = read_values(run / "config.yaml"), read_values(run / "metrics.json")
    base = facts.get("base")
    method = (facts.get("peft") or {}).get("class_path") or "all weights"
    sources = [_plain(source.get("path")) for source in (config.get("data") or {}).get("sources") or []]
    head = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if base and "/" in str(base) and not Path(str(base)).exists():
        head["base_model"] = str(base)
    figures = [f"| {_plain(key)} | {value:.6g} |" for key, value in metrics.items() if isinstance(value, int | float)]
    return "\n".join([
        "---", yaml.safe_dump(head).strip(), "---", "", f"# {_plain(run.name)}", "",
        f"Trained from {_plain(base) if base else 'random weights'} ({_plain(method)}), checkpoint {name}, "
        f"step {facts['step']}.", "",
        "## Data", "", *(f"- {source}" for source in sources), "",
        "## Measured on its validation data", "", "| metric | value |", "|---|---|", *figures, "",
        "## Use", "", "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
        'tokenizer = AutoTokenizer.from_pretrained("this folder")',
        'model = AutoModelForCausalLM.from_pretrained("this folder")',
        "```", ""])


def read_values(file: Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file; empty where there is no such file."""
    if not file.is_file():
        return {}
    return yaml.safe_load(file.read_text(encoding="utf-8")) or {}     # JSON is YAML


def _plain(text: Any) -> str:
    """Config text in Markdown: no markup of its own."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", str(text)).replace("\n", " ")
