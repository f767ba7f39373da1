"""Help pages of the verbs that read a run config, made from `keys.json` without importing torch.

`fit --help` shows the keys that most runs set, `--help all` every key, `--help KEY` one key and those below it, and
`--help CLASS` the arguments of a class that a config may name.
"""

import json
import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from lit_llm.errors import InputError, did_you_mean

FILE = Path(__file__).with_name("keys.json")
COMMON = {
    "model": ("base", "init", "lora", "quantize", "lr", "warmup", "schedule", "gradient_checkpointing"),
    "data": ("sources", "val_sources", "val_fraction", "tokenizer", "train_on", "seq_len", "batch_size", "packing"),
    "trainer": ("default_root_dir", "max_epochs", "max_steps", "accumulate_grad_batches", "gradient_clip_val",
                "precision", "strategy", "devices"),
}
PARTS = {"model": "the model and its optimization", "data": "the training data", "trainer": "devices and duration"}
FLAGS = {
    "config": "A run config in YAML; may be given several times, later ones take precedence. A name that is not a file "
              "here is looked up among the configs that ship with the package.",
    "print_config": "Print the merged config instead of running.",
    "allow": "A package of your own whose callbacks, loggers, modules and data modules a config may name by "
             "class_path; given once or more, and only typed.",
    "trust-checkpoint": "Also load checkpoints with pickled objects, which can run any program.",
}
KEY_WIDTH = 35


@cache
def table() -> dict[str, Any]:
    """The table that `runs.described` derives from the signatures."""
    return dict(json.loads(FILE.read_text(encoding="utf-8")))


@cache
def all_keys() -> list[str]:
    """All keys of a run config, and the options of all verbs that read one."""
    options = {option for entries in table()["verbs"].values() for option in entries}
    return sorted({*table()["keys"], *options, *PARTS, "config"})


def requested(options: Sequence[str]) -> str | None:
    """The requested help page: empty for the short one; null if none was requested.

    >>> requested(["--config", "a.yaml", "--help", "model.lora"]), requested(["--model.lora.help"]), requested(["-h"])
    ('model.lora', 'model.lora', '')
    """
    for place, word in enumerate(options):
        name, equals, value = word.partition("=")
        follows = value if equals else "".join(options[place + 1:place + 2])
        follows = "" if follows.startswith("-") else follows
        if name in ("-h", "--help"):
            return follows.removeprefix("--")
        if name.startswith("--") and name.endswith(".help"):
            return follows or name[2:].removesuffix(".help")
    return None


def page(verb: str, subject: str, what: str, configs: Sequence[str]) -> str | None:
    """Format a help page.

    Args:
        verb: `fit`, `inspect`, ...
        subject: Empty, `all`, a key, a prefix of keys, or a class.
        what: Description of the verb.
        configs: Names of the configs that ship with the package.

    Returns:
        The text; null for a class of another package, whose help comes from its docstring.

    Raises:
        InputError: There is no such key or class.
    """
    if not subject or subject == "all":
        return "\n".join(_whole(verb, what, configs) if subject else _short(verb, what, configs))
    if (entries := _matching(verb, subject)):
        named = re.findall(r"\w+", str(entries.get(subject, {}).get("type")))
        kinds = [table()["classes"][path]["help"] for name in named if (path := _class(name))]
        return "\n".join([*_section(entries), *(line for kind in kinds for line in ("", *_wrapped(kind, 0)))])
    if (path := _class(subject)) is not None:
        kind = table()["classes"][path]
        head = [f"{path}: {kind['help']}", "", "arguments, below init_args:"]
        return "\n".join([*head, *(line for name, entry in kind["arguments"].items() for line in _entry(name, entry))])
    if "." in subject and subject.rpartition(".")[2][:1].isupper():
        return None
    names = [*all_keys(), *table()["nested"], *(path.rpartition(".")[2] for path in table()["classes"])]
    raise InputError(f"there is no key or class '{subject}'.{did_you_mean(subject, names)}",
                     fix=f"python -m lit_llm {verb} --help all lists every key")


def _short(verb: str, what: str, configs: Sequence[str]) -> Iterator[str]:
    """The verb's own options and the most common keys, in a sentence each."""
    yield from _head(verb, what, configs)
    yield from _line("--config", {"help": FLAGS["config"], "default": None, "type": ""}, most=1)
    yield from _section({option: entry for option, entry in table()["verbs"][verb].items()
                         if option not in table()["hidden"]})
    for part, names in COMMON.items():
        yield f"{part}: {PARTS[part]}"
        for name in names:
            yield from _line(f"--{part}.{name}", table()["keys"][f"{part}.{name}"], most=2 if verb == "fit" else 1)
    yield from _wrapped(f"More: {verb} --help all; --help KEY (model.lora, ...); --help CLASS (StepCheckpoint, ...)", 0)


def _whole(verb: str, what: str, configs: Sequence[str]) -> Iterator[str]:
    """Every key with its type, default and full description."""
    yield from _head(verb, what, configs)
    for flag, text in FLAGS.items():
        if flag != "trust-checkpoint" or verb == "fit":
            yield from (f"  --{flag}", *_wrapped(text, 8))
    hidden = table()["hidden"]
    yield from _section({option: entry for option, entry in table()["verbs"][verb].items() if option not in hidden})
    yield from _section({key: entry for key, entry in table()["keys"].items() if "." not in key})
    for part, purpose in PARTS.items():
        yield from ("", f"{part}: {purpose}")
        yield from _section({key: entry for key, entry in _matching(verb, part).items() if key not in hidden})
    yield from ("", *_wrapped("Keys of Lightning's Trainer that have no effect here are refused and left out: "
                              f"{', '.join(key.rpartition('.')[2] for key in hidden)}.", 0))


def _head(verb: str, what: str, configs: Sequence[str]) -> Iterator[str]:
    yield from (f"usage: python -m lit_llm {verb} --config FILE [--KEY VALUE ...]", "", *_wrapped(what, 0), "")
    runs = [name for name in configs if "/with/" not in name]
    yield from _wrapped(f"Configs that ship with the package: {', '.join(runs)}; and, to be added, those in "
                        "configs/with.", 0)
    yield ""


def _section(entries: Mapping[str, Any]) -> Iterator[str]:
    for key, entry in entries.items():
        yield from _entry(f"--{key}", entry)


def _matching(verb: str, subject: str) -> dict[str, Any]:
    """The entries of a key and of keys below it."""
    every = table()["verbs"][verb] | table()["keys"] | table()["nested"]
    place = re.sub(r"^data\.(val|test|guard)_sources", "data.sources", subject)
    entries = {key: entry for key, entry in every.items() if key in (subject, place) or key.startswith(f"{place}.")}
    below = {key: {other: entry for other, entry in entries.items() if other.startswith(f"{key}.")} for key in entries}
    return {key: entry for top in entries if not any(top in other for other in below.values())
            for key, entry in ({top: entries[top]} | below[top]).items()}


def _class(subject: str) -> str | None:
    """The export path of an allowed class, by that path, its definition path, or its name."""
    package, name = subject.partition(".")[0], subject.rpartition(".")[2]
    return next((path for path in table()["classes"] if path.rpartition(".")[2] == name
                 and (subject == name or path.startswith(f"{package}."))), None)


def _line(option: str, entry: Mapping[str, Any], *, most: int) -> list[str]:
    """An option with its choices, the first clause of its description and its default, in at most `most` lines."""
    choices = _choices(entry["type"])
    clause = re.split("[.;] ", entry["help"], maxsplit=1)[0].rstrip(".")
    text = clause if entry["default"] is None or choices else f"{clause} ({_value(entry['default'])})"
    if choices:
        named = [f"{choice} (default)" if choice == entry["default"] else str(choice) for choice in choices]
        text = f"{', '.join(named)}: {clause}"
    lines = textwrap.wrap(text, _width() - KEY_WIDTH - 2, break_on_hyphens=False, max_lines=most, placeholder=" ...")
    return [f"  {option:<{KEY_WIDTH}}{lines[0]}", *(f"{'':{KEY_WIDTH + 2}}{line}" for line in lines[1:])]


def _choices(spec: Any) -> list[Any]:
    """The values of a key that takes a few texts, and perhaps others or null beside them."""
    parts = [part for part in (spec[1:] if spec[:1] == ["Union"] else [spec]) if part not in ("None", "str")]
    return list(parts[0][1:]) if len(parts) == 1 and parts[0][:1] == ["Literal"] else []


def _entry(option: str, entry: Mapping[str, Any]) -> Iterator[str]:
    """An option with its type and default, followed by the full description."""
    default = entry["default"]
    shown = "required" if entry["required"] else f"default: {_value(default)}"
    yield from textwrap.wrap(f"{option}  {words(entry['type'])} ({shown})", _width(), initial_indent="  ",
                             subsequent_indent="      ", break_on_hyphens=False, break_long_words=False)
    yield from _wrapped(entry["help"], 8)


def _value(default: object) -> str:
    return default if isinstance(default, str) else json.dumps(default)


def words(spec: Any) -> str:
    """Describe a type.

    >>> words(["Union", "float", ["Literal", "auto", "none"], "None"])
    'number | auto | none | null'
    """
    plain = {"int": "whole number", "float": "number", "str": "text", "bool": "true | false", "None": "null",
             "dict": "mapping", "Any": "any value"}
    if isinstance(spec, str):
        return plain.get(spec, spec)
    name, *parts = spec
    if name == "Literal":
        return " | ".join(map(str, parts))
    inner = [words(part) for part in parts]
    if name == "Union":
        return " | ".join(dict.fromkeys(inner))
    return "mapping" if name == "dict" else f"[{', '.join(inner)}{', ...' * (name == 'list')}]"


def _wrapped(text: str, indent: int) -> list[str]:
    blank = " " * indent
    return textwrap.wrap(text, _width(), initial_indent=blank, subsequent_indent=blank, break_on_hyphens=False,
                         break_long_words=False)


def _width() -> int:
    return min(max(shutil.get_terminal_size().columns, 60), 110)
