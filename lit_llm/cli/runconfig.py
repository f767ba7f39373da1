"""The `config.yaml` of a run: what is kept of a run's settings, and where a run's own file says that the run lies.

The file loads with every verb that reads a run config, from any directory. Paths in it are therefore absolute, and keys
that only one verb has (`ckpt_path`) are left out.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_llm import names
from lit_llm.data.records import sources

KEPT = ("seed_everything", "model", "data", "trainer")
PLACES = ("save_dir", "dirpath", "root_dir", "log_dir")     # keys of loggers, callbacks and profilers that name folders


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
    out: list[str] = []
    for place, word in enumerate(words):
        out.append(word)
        name, equals, value = word.partition("=")
        if equals and name in ("-c", "--config"):
            out += _place(value)
        elif place and words[place - 1] in ("-c", "--config"):
            out += _place(word)
    return out


def _place(file: str) -> list[str]:
    folder = Path(names.absolute(file)).parent
    own = Path(file).name == "config.yaml" and all((folder / part).is_dir() for part in ("checkpoints", "tokenizer"))
    return ["--trainer.default_root_dir", str(folder)] if own else []
