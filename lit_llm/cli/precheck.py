"""Refuse unknown keys, wrong values and missing files before torch is imported, which takes seconds.

Every error found here is also found by the parser, with the same message: keys and types come from `keys.json`, which
is derived from the signatures, and jsonargparse reads the values. Anything that is not certainly wrong is left to the
parser, as are keys whose values are classes.
"""

import glob
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from lit_llm import names
from lit_llm.cli import configs, pages, parser, settings
from lit_llm.data.records import beginning, sources
from lit_llm.errors import DISTRIBUTIONS, InputError, did_you_mean, did_you_mean_path
from lit_llm.system import class_paths, ranges

ALLOW = class_paths.OPTION.lstrip("-")
CLASSES = {f"{part}.class_path": part for part in class_paths.WHOLE}
SOURCES = ("data.sources", "data.val_sources", "data.test_sources", "data.guard_sources")
NAMED = ("trainer.callbacks", "trainer.logger", "trainer.strategy", "trainer.plugins", "trainer.profiler",
         "model.optimizer", "model.quantize")
# Packages that classes, strategies and other values need, by the beginning of their names.
PACKAGES = {"TensorBoardLogger": "tensorboard", "MLFlowLogger": "mlflow", "CometLogger": "comet_ml",
            "WandbLogger": "wandb", "Rich": "rich", "DeviceStatsMonitor": "psutil", "deepspeed": "deepspeed",
            "DeepSpeed": "deepspeed", "ZeroStrategy": "deepspeed", "adamw_8bit": "bitsandbytes", "nf4": "bitsandbytes",
            "fp4": "bitsandbytes"}
NESTED = "model.lora"                               # the only key whose mapping has known keys


def check(verb: str, options: Sequence[str]) -> None:
    """Refuse unknown keys, values of a wrong type, and config files and sources that do not exist.

    Args:
        verb: The verb, which may have its own options.
        options: Arguments after the verb.

    Raises:
        InputError: The same message as from the parser or the data module.
    """
    values: dict[str, Any] = {}
    own_prefixes = tuple(f"{part}." for part in own_classes(options))
    for key, value, typed in _given(configs.with_run_folder(options)):
        key = key.removesuffix("+")
        if key == ALLOW:
            raise InputError("a config file cannot allow a package", where=ALLOW, fix="type it on the command line: "
                             f"{class_paths.OPTION} {value if isinstance(value, str) else 'PACKAGE'}")
        if key.startswith(own_prefixes):                     # the parser knows the arguments of a class of the user
            values[key] = value
            continue
        if re.fullmatch(r"[\w.]+", key) and (not _is_key(key) or _is_of_other_verbs(verb, key)):
            raise InputError(_unknown(key))
        if key.startswith(tuple(f"{name}." for name in SOURCES)):
            return                                  # a part of a source that is set elsewhere
        _check_value(verb, key, value, typed=typed)
        values[key] = value
    prints = any(word.startswith("--print_") for word in options)
    if "data.sources" not in values and "data" not in values and not prints:
        raise InputError(parser.explain("arguments are required: data.sources", pages.all_keys()))
    for key in SOURCES:
        _check_sources(key, values.get(key))
    _check_paths({key: value for key, value in values.items() if not (own_prefixes and key.startswith(own_prefixes))})
    for key in NAMED:
        _check_named(key, values.get(key))
    if "data" not in own_classes(options) and not prints and os.environ.get("LOCAL_RANK", "0") == "0":
        _check_records(values)


def own_classes(options: Sequence[str]) -> dict[str, str]:
    """`model` and `data` -> the class that a command names for it, typed or in a config file.

    Raises:
        InputError: Its package was not opened.
    """
    named = {CLASSES[key]: value for key, value, _ in _given(options) if key in CLASSES}
    classes = {part: path for part, path in named.items() if isinstance(path, str) and path != "null"}
    for part, path in classes.items():
        if not (class_paths.is_open(path) or path.startswith("lit_llm.")):
            raise InputError(f"'{path[:200]}' is not allowed", where=f"{part}.class_path",
                             fix=class_paths.how_to_open(path) or "give a class in a package of your own")
    return classes


def _is_key(key: str) -> bool:
    """Whether this is a key, part of a mapping, or a group of keys; the parser's own options are accepted."""
    return (key in pages.all_keys() or key in pages.table()["nested"] or key.startswith(("print_", "trust-checkpoint"))
            or any(above in pages.all_keys() and above not in _groups() for above in _above(key)))


def _above(key: str) -> list[str]:
    """The groups that a key is in: `a` and `a.b` for `a.b.c`."""
    parts = key.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


@cache
def _groups() -> frozenset[str]:
    """The keys that have others below them."""
    return frozenset(group for key in pages.all_keys() for group in _above(key)) | {NESTED}


def _is_of_other_verbs(verb: str, key: str) -> bool:
    """Whether this is an option of other verbs alone."""
    options = pages.table()["verbs"]
    return (key not in options[verb] and key not in pages.table()["keys"]
            and any(key in own for own in options.values()))


def _unknown(key: str) -> str:
    if key.startswith(f"{NESTED}."):
        return parser.unknown(key.removeprefix(f"{NESTED}."), f"{NESTED}: ", list(pages.table()["nested"]))
    return parser.unknown(key, "", pages.all_keys())


def _check_value(verb: str, key: str, value: object, *, typed: bool) -> None:
    """Parse a value like the parser, for keys of numbers, texts, choices, and lists and mappings of them."""
    own = pages.table()["verbs"][verb]
    entry = own.get(key) or pages.table()["keys"].get(key) or pages.table()["nested"].get(key)
    hint = settings.hint_of(_closed(entry["type"])) if entry else None
    if hint is None or (typed and value is None):
        return
    reader = parser.ToolParser(allow_abbrev=False)
    reader.add_argument(f"--{key}", type=hint)
    if typed:
        read = reader.parse_args([f"--{key}={value}"])
    else:
        for part in reversed(key.split(".")):
            value = {part: value}
        read = reader.parse_object(value)
    ranges.check(f"{verb}.{key}" if key in own else key, settings.plain(read.get(key)), where=key)


def _closed(spec: Any) -> Any:
    """The type of a key without the texts that only an allowed package can add to its choices."""
    choices = spec[1] if spec[0] == "Union" and len(spec) == 3 and spec[2] == "str" else spec
    return choices if choices[0] == "Literal" and not class_paths.opened else spec


def _check_sources(key: str, items: object) -> None:
    """Refuse unknown keys of a source, and paths that do not exist."""
    fields = [name.rpartition(".")[2] for name in pages.table()["nested"] if name.startswith("data.sources.")]
    if isinstance(items, str | int | float):
        raise InputError(parser.explain(f'Parser key "{key}": Expected a <class \'list\'>. Got value: {items}', []))
    for item in items if isinstance(items, list) else ():
        if not isinstance(item, dict):
            continue
        for name in item:
            if item[name] is None and re.fullmatch(r"\w+:.+", str(name)):
                raise InputError(parser.explain(f'Parser key "{key}": Option \'{name}\' is not accepted', []))
            if name not in fields and re.fullmatch(r"\w+", str(name)):
                raise InputError(f"unknown key '{name}'.{did_you_mean(str(name), fields)}", where=key)
        path = item.get("path")
        if isinstance(path, str) and path and not sources.is_hub(path) and not glob.has_magic(path):
            sources.check_exists(path)


def _check_records(values: Mapping[str, Any]) -> None:
    """Refuse sources whose first records are bad, unless bad records are set aside."""
    if values.get("data.on_bad_record", "error") != "error":
        return
    for key in SOURCES:
        items = values.get(key)
        for item in items if isinstance(items, list) else ():
            try:
                source = sources.Source(**item)
                valid = isinstance(source.path, str) and isinstance(source.columns, dict) and source.path
            except TypeError:
                continue                            # the parser reports it
            if valid and not source.is_hub:
                beginning.check(source.files(), document=source.document, format=source.format, columns=source.columns)


def _check_paths(values: Mapping[str, object]) -> None:
    """Refuse names of models that are neither a folder nor a possible download, and paths that do not exist."""
    texts = {key: value for key, value in values.items() if isinstance(value, str) and value not in ("", "null")}
    for key in ("model.base", "data.tokenizer"):
        if key in texts:
            names.check_available(texts[key], key, fix="give a folder in the layout of Hugging Face, or the id of one "
                                  "on the hub")
    adapter = texts.get("model.adapter", "")
    if adapter and not Path(adapter).expanduser().exists():
        raise InputError(f"there is no folder {adapter}.{did_you_mean_path(adapter, folders=True)}",
                         where="model.adapter", fix="give the folder of an adapter, or of a run")
    template = texts.get("data.chat_template", "")
    if template.endswith(".jinja") and not Path(template).expanduser().exists():
        raise InputError(f"there is no template file {template}", where="data.chat_template",
                         fix="give a .jinja file, or null")
    checkpoint, run = texts.get("ckpt_path", "auto"), Path(texts.get("trainer.default_root_dir", "runs/run"))
    if checkpoint in ("last", "best") and not (run.expanduser() / "checkpoints").is_dir():
        raise InputError(f"{run} has no {checkpoint} checkpoint", where="ckpt_path",
                         fix="start a fit without --ckpt_path")
    if checkpoint not in ("last", "best", "auto") and not Path(checkpoint).expanduser().exists():
        raise InputError(f"there is no checkpoint folder {checkpoint}", where="ckpt_path",
                         fix="give `last`, `best`, or a folder like runs/sft/checkpoints/step_40")


def _check_named(key: str, value: object) -> None:
    """Refuse names of strategies and classes that do not exist, and what needs a package that is not installed."""
    value = _read(value) if isinstance(value, str) else value
    exported = [name for group in class_paths.EXPORTS.values() for name in group]
    for item in value if isinstance(value, list) else [value]:
        path = item.get("class_path") if isinstance(item, dict) else item
        if not isinstance(path, str):
            continue
        name = path.rpartition(".")[2]
        named = name == path and isinstance(item, str)      # of a strategy or profiler, or a class by its short name
        if named and key == "trainer.strategy" and name not in (*pages.table()["strategies"], *exported):
            near = did_you_mean(name, pages.table()["strategies"])
            raise InputError(f"no strategy is named '{name}'.{near}", where=key,
                             fix="auto, ddp, fsdp2 and deepspeed_stage_1, _2 and _3 are the usual ones")
        is_known = named or name in exported or path.startswith("lit_llm.")
        if not is_known and re.fullmatch(r"[\w.]+", path) and not class_paths.opened:
            raise InputError(parser.explain(f'Parser key "{key}": Importing \'{path}\' is not allowed', []))
        module = next((package for kind, package in PACKAGES.items() if name.startswith(kind)), "")
        if module and find_spec(module) is None:
            raise InputError(f"{name} needs the package '{module}', which is not installed", where=key,
                             fix=f"pip install {DISTRIBUTIONS.get(module, module)}")


def _given(options: Sequence[str]) -> Iterator[tuple[str, Any, bool]]:
    """Keys with their values and whether they were typed; later ones take precedence."""
    words = list(options)
    for at, word in enumerate(words):
        name, equals, text = word.partition("=")
        value = text if equals else words[at + 1] if at + 1 < len(words) else None
        if name in ("-c", "--config"):
            yield from ((key, part, False) for key, part in _written(value or ""))
        elif name.startswith("--") and name != "--":
            is_list = name[2:].removesuffix("+") in SOURCES
            read = _read(value or "") if is_list else value
            yield name[2:], value if isinstance(read, dict) else read, not is_list


def _written(file: str) -> Iterator[tuple[str, Any]]:
    """Keys of a config file."""
    if not Path(file).expanduser().exists() and not file.lstrip().startswith(("{", "[")):
        raise InputError(parser.explain(f"File does not exist: '{file}'", []))
    content = _read(Path(file).read_text(encoding="utf-8")) if Path(file).is_file() else None
    yield from _flat(content, "")


def _flat(value: object, prefix: str) -> Iterator[tuple[str, Any]]:
    """Keys of a nested mapping, down to the values."""
    for name, part in value.items() if isinstance(value, Mapping) else ():
        key = f"{prefix}{name}"
        holds = key in _groups() and key not in SOURCES
        if isinstance(part, Mapping) and part and (holds or not _is_key(key)):
            yield from _flat(part, f"{key}.")
        else:
            yield key, part


def _read(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError):
        return None                                 # the parser reports it
