"""Config files: those that ship with the package, found by name; whether a file is YAML; the `config.yaml` of a run.

A run's own file loads with every verb that reads a run config, from any directory. Paths in it are therefore absolute,
and keys that only one verb has (`ckpt_path`) are left out.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from lit_llm import names
from lit_llm.cli import settings
from lit_llm.data.records import sources
from lit_llm.errors import InputError
from lit_llm.system import ranges

KEPT = ("seed_everything", "model", "data", "trainer")
OPTIONS = ("-c", "--config")
PLACES = ("save_dir", "dirpath", "root_dir", "log_dir")     # keys of loggers, callbacks and profilers that name folders


# ---- files that ship with the package --------------------------------------------------------------------------------

def shipped() -> dict[str, Path]:
    """The configs that ship with the package: `configs/NAME.yaml` -> file; overlays, `configs/with/NAME.yaml`, last.

    An installed package holds them; in a checkout they are in the folder beside it.
    """
    package = Path(__file__).resolve().parents[1]
    folder = package / "configs" if (package / "configs").is_dir() else package.parent / "configs"
    files = [*sorted(folder.glob("*.yaml")), *sorted(folder.glob("with/*.yaml"))]
    return {f"configs/{file.relative_to(folder).as_posix()}": file for file in files}


def listing(verb: str) -> str:
    """The configs that ship with the package, a line each, and what to type."""
    lines = []
    for name, file in shipped().items():
        first = file.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
        first = first.partition("   ")[0].partition("python -m")[0].strip(" :")
        lines.append((name, first.removeprefix(f"with {file.stem}: ")))
    runs = [f"    {name:<28} {what}" for name, what in lines if "/with/" not in name]
    overlays = [f"    {name:<28} {what}" for name, what in lines if "/with/" in name]
    return "\n".join([f"{verb} needs a run config, and none is given. These ship with the package:", *runs,
                      "  to be added after one of them:", *overlays,
                      f"  type, for example: python -m lit_llm {verb} --config configs/sft.yaml"])


def with_shipped(words: Sequence[str]) -> list[str]:
    """The words of a command in which names of shipped configs are their paths.

    A `--config` that is a file here is that file. Otherwise `configs/sft.yaml`, or `sft.yaml`, is the one that ships
    with the package, and a line says so.

    Args:
        words: Options of a verb.
    """
    known, out = shipped(), list(words)
    for place, prefix, value in given_files(words):
        name = value if value.startswith("configs/") else f"configs/{value}"
        if name in known and not Path(value).expanduser().exists():
            out[place] = f"{prefix}{known[name]}"
            if os.environ.get("LOCAL_RANK", "0") == "0":
                print(f"--config {value}: {known[name]}, which ships with the package", file=sys.stderr)
    return out


def given_files(words: Sequence[str]) -> Iterator[tuple[int, str, str]]:
    """Of each `--config FILE` and `--config=FILE`: the place of the file in the words, what is before it, the file."""
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        if equals and name in OPTIONS:
            yield place, f"{name}=", value
        elif place and words[place - 1] in OPTIONS:
            yield place, "", word


# ---- whether a file is YAML ------------------------------------------------------------------------------------------

def check_configs(args: Sequence[str]) -> None:
    """Read each config file once, because what the parser says about bad YAML names no file.

    Raises:
        InputError: A file that is not YAML, with its line, or no mapping of keys, or a key twice in one mapping.
    """
    for _, _, value in given_files(args):
        file = Path(value)
        if not file.is_file():
            continue                                # the parser says so
        try:
            text = file.read_text(encoding="utf-8")
            content = yaml.safe_load(text)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = f"{file}:{mark.line + 1}" if mark else str(file)
            reason = getattr(error, "problem", None) or "it cannot be read"
            raise InputError(f"not YAML: {reason}", where=where) from None
        except UnicodeDecodeError:
            raise InputError("not text in UTF-8", where=str(file)) from None
        except ValueError as error:                 # a date that is none, a number of thousands of digits
            raise InputError(f"a value cannot be read: {ranges.shown(error)}", where=str(file),
                             fix="quote what is a text") from None
        except RecursionError:
            raise InputError("lists and mappings are nested too deeply", where=str(file)) from None
        if not isinstance(content, dict):
            raise InputError("a config is a mapping such as `model: {base: gpt2}`", where=str(file))
        _check_twice(yaml.compose(text, Loader=yaml.SafeLoader), file)
        settings.check_plain(content)


def _check_twice(root: yaml.Node | None, file: Path) -> None:
    """YAML takes the last of two equal keys and drops the first in silence, a whole block at times."""
    left, seen = [root], set()                      # an alias may lead back to where it stands
    while left:
        node = left.pop()
        if not isinstance(node, yaml.CollectionNode) or id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            left += node.value
            continue
        first: dict[str, Any] = {}
        for key, value in node.value:
            left.append(value)
            earlier = first.setdefault(str(key.value), key)
            if earlier is not key:
                raise InputError(f"'{key.value}' stands here and in line {earlier.start_mark.line + 1}, which would be "
                                 "dropped", where=f"{file}:{key.start_mark.line + 1}", fix="put both under one of them")


# ---- the config of a run ---------------------------------------------------------------------------------------------

def kept(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a verb's settings that describes the run, with local paths made absolute.

    Args:
        config: All keys of one verb, as plain values.

    Returns:
        A new mapping; hub ids and `sample:` names stay as they are.
    """
    run = {key: config[key] for key in KEPT if key in config}
    model, data, trainer = (dict(run.get(part) or {}) for part in ("model", "data", "trainer"))
    if data.get("tokenizer") == model.get("base"):      # filled in: another base that is typed later brings its own
        data["tokenizer"] = None
    for part in (model, data):
        if part.get("class_path") is None:          # ours
            part.pop("class_path", None)
    for part, key in ((model, "base"), (model, "adapter"), (data, "tokenizer"), (data, "chat_template")):
        if isinstance(part.get(key), str):
            part[key] = existing(part[key])
    for key in ("sources", "val_sources", "test_sources"):
        if isinstance(data.get(key), list):
            data[key] = [item | {"path": _source(str(item["path"]))} for item in data[key]]
    if data.get("cache_dir"):
        data["cache_dir"] = names.absolute(str(data["cache_dir"]))
    trainer = {key: _folders(value) for key, value in trainer.items()}
    trainer["default_root_dir"] = names.absolute(str(trainer["default_root_dir"]))
    return run | {"model": model, "data": data, "trainer": trainer}


def existing(name: str) -> str:
    """The absolute path of a file or folder that is there; any other name (a hub id, `sample:NAME`) as it is."""
    if names.is_sample(name):
        return name
    try:
        return names.absolute(name) if Path(name).expanduser().exists() else name
    except (OSError, RuntimeError, ValueError):
        return name


def _source(path: str) -> str:
    return path if names.is_sample(path) or sources.is_hub(path) else names.absolute(path)


def _folders(value: Any) -> Any:
    """Paths below loggers, callbacks and the strategy made absolute."""
    if isinstance(value, list):
        return [_folders(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {key: names.absolute(item) if key in PLACES and isinstance(item, str) and item
            else existing(item) if key == "config" and isinstance(item, str) else _folders(item)
            for key, item in value.items()}


# ---- where the run lies ----------------------------------------------------------------------------------------------

def located(words: Sequence[str]) -> list[str]:
    """The words of a command in which a run's own `config.yaml` also says where that run lies.

    A run may have been moved since: by its user, or aside by a newer run of the same name. Its file would otherwise
    name the folder of another run. What is typed after the file still wins.

    Args:
        words: Verb and options.
    """
    out = list(words)
    for place, _, value in reversed(list(given_files(words))):
        out[place + 1:place + 1] = _place(value)
    return out


def _place(file: str) -> list[str]:
    folder = Path(names.absolute(file)).parent
    own = Path(file).name == "config.yaml" and all((folder / part).is_dir() for part in ("checkpoints", "tokenizer"))
    return ["--trainer.default_root_dir", str(folder)] if own else []
