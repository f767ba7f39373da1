"""Config files: lookup of those that ship with the package, YAML checks, and the `config.yaml` of a run.

A run's own file loads with every verb that reads a run config, from any directory. Therefore its paths are absolute,
and keys of single verbs (`ckpt_path`) are left out.
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
PLACES = ("save_dir", "dirpath", "root_dir", "log_dir")     # keys of loggers, callbacks and profilers for folders


# ---- files that ship with the package --------------------------------------------------------------------------------

def shipped() -> dict[str, Path]:
    """The configs that ship with the package: `configs/NAME.yaml` -> file; overlays (`configs/with/NAME.yaml`) last.

    An installed package contains them; in a checkout they are in the folder beside it.
    """
    package = Path(__file__).resolve().parents[1]
    folder = package / "configs" if (package / "configs").is_dir() else package.parent / "configs"
    files = [*sorted(folder.glob("*.yaml")), *sorted(folder.glob("with/*.yaml"))]
    return {f"configs/{file.relative_to(folder).as_posix()}": file for file in files}


def listing(verb: str) -> str:
    """A list of the configs that ship with the package, and an example command."""
    lines = []
    for name, file in shipped().items():
        first = file.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
        first = first.partition("   ")[0].partition("python -m")[0].strip(" :")
        lines.append((name, first.removeprefix(f"with {file.stem}: ")))
    runs = [f"    {name:<28} {what}" for name, what in lines if "/with/" not in name]
    overlays = [f"    {name:<28} {what}" for name, what in lines if "/with/" in name]
    return "\n".join([f"{verb} needs a run config, but none was given. These ship with the package:", *runs,
                      "  can be added to one of them:", *overlays,
                      f"  type, for example: python -m lit_llm {verb} --config configs/sft.yaml"])


def with_shipped(words: Sequence[str]) -> list[str]:
    """Replace names of shipped configs in a command by their paths.

    A `--config` that exists as a file is used. Otherwise `configs/sft.yaml`, or `sft.yaml`, is looked up among the
    configs of the package, and a note is printed.

    Args:
        words: Options of a verb.
    """
    configs_by_name, out = shipped(), list(words)
    for place, prefix, value in given_files(words):
        name = value if value.startswith("configs/") else f"configs/{value}"
        if name in configs_by_name and not Path(value).expanduser().exists():
            out[place] = f"{prefix}{configs_by_name[name]}"
            if os.environ.get("LOCAL_RANK", "0") == "0":
                print(f"--config {value}: {configs_by_name[name]}, which ships with the package", file=sys.stderr)
    return out


def given_files(words: Sequence[str]) -> Iterator[tuple[int, str, str]]:
    """For each `--config FILE` and `--config=FILE`: index of the file in the arguments, its prefix, the file."""
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        if equals and name in OPTIONS:
            yield place, f"{name}=", value
        elif place and words[place - 1] in OPTIONS:
            yield place, "", word


# ---- whether a file is YAML ------------------------------------------------------------------------------------------

def check_configs(args: Sequence[str]) -> None:
    """Check each config file before parsing, because the parser's messages about bad YAML name no file.

    Raises:
        InputError: A file is not YAML (with the line), not a mapping, or has a duplicate key.
    """
    for _, _, value in given_files(args):
        file = Path(value)
        if not file.is_file():
            continue                                # the parser reports it
        try:
            text = file.read_text(encoding="utf-8")
            content = yaml.safe_load(text)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = f"{file}:{mark.line + 1}" if mark else str(file)
            reason = getattr(error, "problem", None) or "it cannot be parsed"
            raise InputError(f"not YAML: {reason}", where=where) from None
        except UnicodeDecodeError:
            raise InputError("not text in UTF-8", where=str(file)) from None
        except ValueError as error:                 # an invalid date, a number of thousands of digits
            raise InputError(f"a value cannot be read: {ranges.shown(error)}", where=str(file),
                             fix="put texts in quotes") from None
        except RecursionError:
            raise InputError("lists and mappings are nested too deeply", where=str(file)) from None
        if not isinstance(content, dict):
            raise InputError("a config must be a mapping such as `model: {base: gpt2}`", where=str(file))
        _check_twice(yaml.compose(text, Loader=yaml.SafeLoader), file)
        settings.check_plain(content)


def _check_twice(root: yaml.Node | None, file: Path) -> None:
    """Refuse duplicate keys, of which YAML silently drops the first, which may be a whole block."""
    left, seen = [root], set()                      # an alias may refer to its own parent
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
                raise InputError(f"'{key.value}' also occurs in line {earlier.start_mark.line + 1}, which would be "
                                 "ignored", where=f"{file}:{key.start_mark.line + 1}", fix="merge both under one key")


# ---- the config of a run ---------------------------------------------------------------------------------------------

def run_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that describe a run, with absolute local paths.

    Args:
        config: All settings of a verb, as plain values.

    Returns:
        A new mapping; hub ids and `sample:` names are unchanged.
    """
    run = {key: config[key] for key in KEPT if key in config}
    model, data, trainer = (dict(run.get(part) or {}) for part in ("model", "data", "trainer"))
    if data.get("tokenizer") == model.get("base"):      # a default, so that a base typed later brings its own tokenizer
        data["tokenizer"] = None
    for part in (model, data):
        if part.get("class_path") is None:          # ours
            part.pop("class_path", None)
    for part, key in ((model, "base"), (model, "adapter"), (data, "tokenizer"), (data, "chat_template")):
        if isinstance(part.get(key), str):
            part[key] = existing(part[key])
    for key in ("sources", "val_sources", "test_sources", "guard_sources"):
        if isinstance(data.get(key), list):
            data[key] = [item | {"path": _source(str(item["path"]))} for item in data[key]]
    if data.get("cache_dir"):
        data["cache_dir"] = names.absolute(str(data["cache_dir"]))
    trainer = {key: _folders(value) for key, value in trainer.items()}
    trainer["default_root_dir"] = names.absolute(str(trainer["default_root_dir"]))
    return run | {"model": model, "data": data, "trainer": trainer}


def existing(name: str) -> str:
    """The absolute path of an existing file or folder; other names (hub ids, `sample:NAME`) are unchanged."""
    if names.is_sample(name):
        return name
    try:
        return names.absolute(name) if Path(name).expanduser().exists() else name
    except (OSError, RuntimeError, ValueError):
        return name


def _source(path: str) -> str:
    return path if names.is_sample(path) or sources.is_hub(path) else names.absolute(path)


def _folders(value: object) -> Any:
    """Make paths of loggers, callbacks and the strategy absolute."""
    if isinstance(value, list):
        return [_folders(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {key: names.absolute(item) if key in PLACES and isinstance(item, str) and item
            else existing(item) if key == "config" and isinstance(item, str) else _folders(item)
            for key, item in value.items()}


# ---- the folder of a run ---------------------------------------------------------------------------------------------

def with_run_folder(words: Sequence[str]) -> list[str]:
    """Add the run folder to a command whose config is a run's own `config.yaml`.

    The run may have been moved: by its user, or aside by a newer run of the same name. Its config would otherwise name
    the folder of another run. Options after the file still take precedence.

    Args:
        words: The verb and its options.
    """
    out = list(words)
    for place, _, value in reversed(list(given_files(words))):
        out[place + 1:place + 1] = _place(value)
    return out


def _place(file: str) -> list[str]:
    folder = Path(names.absolute(file)).parent
    own = Path(file).name == "config.yaml" and all((folder / part).is_dir() for part in ("checkpoints", "tokenizer"))
    return ["--trainer.default_root_dir", str(folder)] if own else []
