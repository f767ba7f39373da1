"""Write the model card of an export: base model, data, metrics, usage and example questions."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lit_llm.exports import metadata
from lit_llm.system.redaction import redact_text


@dataclass(frozen=True, slots=True)
class Form:
    """How a model was exported.

    Args:
        model: What a reader types to load it: a hub id, or `.` within the folder.
        adapter: Whether the folder has the adapter alone.
        quantize: How its weights are quantized.
        license: The user's; null takes the one in the base's card.
        base: The base in its present place.
        check: The entries of `check.json` about the difference; empty if it was not measured.
        picture: File beside the card with the curves of the run; empty if there is none.
    """

    model: str = "."
    adapter: bool = False
    quantize: str | None = None
    license: str | None = None
    base: str | None = None
    check: Mapping[str, Any] = field(default_factory=dict)
    picture: str = ""


def card(run: Path, facts: dict[str, Any], name: str, form: Form | None = None) -> str:
    """The model card of one checkpoint's model.

    Args:
        run: The run folder.
        facts: The checkpoint's manifest, with its metrics.
        name: The checkpoint's folder.
        form: How it was exported.
    """
    form = form or Form()
    config = read_values(run / "config.yaml")
    base = facts.get("base")
    method = (facts.get("peft") or {}).get("class_path") or "all weights"
    sources = [metadata.cut_path(source.get("path")) for source in (config.get("data") or {}).get("sources") or []]
    talks = read_values(run / "data.json").get("conversations") or {}
    figures = measured(run, facts)
    keys = _keys(config, form, base, method, sources, talks)
    head = metadata.front_matter(run.name, keys, metadata.results(figures, sources))
    text = redact_text("\n".join([
        "---", head, "---", "", f"# {_plain(run.name)}", "",
        f"Trained from {_plain(metadata.cut_path(base)) if base else 'random weights'} ({_plain(method)}), checkpoint "
        f"{name}, step {facts['step']}.", *_checked(form.check), "",
        *_license(keys, base),
        "## Data", "", *(f"- {_plain(source)}" for source in sources), "",
        *_table(figures, name),
        *([f"![Loss over optimizer steps]({form.picture})", ""] if form.picture else []),
        *_examples(talks),
        *_usage(form)]))
    metadata.check_card(text)
    return text


def _keys(config: Mapping[str, Any], form: Form, base: Any, method: str, sources: Sequence[str],
          talks: Mapping[str, Any]) -> dict[str, Any]:
    """The hub's keys of the front matter."""
    inherited = metadata.base_card(form.base or base)
    questions = [redact_text(text) for text in talks.get("questions") or []]
    language = inherited.get("language") or []
    spoken = [language] if isinstance(language, str) else language
    lower = method.removeprefix("peft.").removesuffix("Config").lower()
    tags = ["lit_llm", "pytorch-lightning", "sft" if talks.get("turns") else "pretraining" if base is None else "",
            lower if method != "all weights" else "", *(["bitsandbytes", form.quantize] if form.quantize else [])]
    keys = {
        "library_name": "peft" if form.adapter else "transformers", "pipeline_tag": "text-generation",
        "base_model": metadata.base_id(form.base) or metadata.base_id(base and str(base)),
        "datasets": [source for source in sources if metadata.HUB_ID.fullmatch(source) and not Path(source).exists()],
        "language": spoken or metadata.languages(questions), "tags": [tag for tag in tags if tag],
        "metrics": ["perplexity", "accuracy"],
        "widget": [{"messages": [{"role": "user", "content": text}]} for text in questions],
        "turns": talks.get("turns")}
    if form.license:
        return keys | {"license": form.license}
    return keys | {key: inherited[key] for key in ("license", "license_name", "license_link") if key in inherited}


def _license(keys: Mapping[str, Any], base: object) -> list[str]:
    if keys.get("license"):
        return []
    return ["No license is stated." + (" That of the base model applies to its weights." if base else ""), ""]


def _checked(check: Mapping[str, Any]) -> list[str]:
    if not check:
        return []
    values = check["measured"]
    return [f"This folder, read back in {values['format']}, has nll {values['nll_after']:.5f} on {values['tokens']:,} "
            f"{values['rows']} tokens; the checkpoint has {values['nll_before']:.5f} (`check.json`)."]


def _usage(form: Form) -> list[str]:
    """How to load, chat with and serve the model."""
    auto, package = ("AutoPeftModelForCausalLM", "peft") if form.adapter else ("AutoModelForCausalLM", "transformers")
    imports = [f"from {package} import {auto}", "from transformers import AutoTokenizer"]
    if not form.adapter:
        imports = [f"from transformers import {auto}, AutoTokenizer"]
    needed = [*(["peft"] if form.adapter else []), *(["bitsandbytes"] if form.quantize else [])]
    where = "" if form.model != "." else ", in this folder"
    return ["## Use", "", f"With transformers{''.join(f' and {name}' for name in needed)}{where}:", "",
            "```python", *imports, "",
            f'tokenizer = AutoTokenizer.from_pretrained("{form.model}")',
            f'model = {auto}.from_pretrained("{form.model}")', "```", "",
            "With lit_llm, a chat and a server:", "", "```bash",
            f"python -m lit_llm chat --model {form.model}", f"python -m serve --model {form.model}", "```", ""]


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


def _table(figures: Mapping[str, float], name: str) -> list[str]:
    """The section with metrics, and their 95 % intervals where there are any."""
    if not figures:
        return ["No metrics were measured for this checkpoint.", ""]
    rows = []
    for key, value in figures.items():
        split, _, metric = key.rpartition("/")
        interval = metadata.interval_of(figures, split, metric)
        shown = f" (95 % interval {interval[0]:.6g} to {interval[1]:.6g})" if interval else ""
        if not metric.endswith(("_low", "_high")):
            rows.append(f"| {_plain(key)} | {value:.6g}{shown} |")
    return [f"## Metrics of {name}", "", "| metric | value |", "|---|---|", *rows, ""]


def _examples(talks: Mapping[str, Any]) -> list[str]:
    """The section with example questions of the data."""
    if not talks.get("turns"):
        return []
    kinds = "single questions" if talks["turns"] == 1 else f"conversations of up to {talks['turns']} questions"
    return ["## Examples", "", f"Trained on {kinds}, for instance:", "",
            *(f"- {_plain(redact_text(text))}" for text in talks["questions"]), ""]


def read_values(file: Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file; empty if the file does not exist."""
    if not file.is_file():
        return {}
    return yaml.safe_load(file.read_text(encoding="utf-8")) or {}     # JSON is YAML


def _plain(text: Any) -> str:
    """Config text with Markdown escaped."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", str(text)).replace("\n", " ")
