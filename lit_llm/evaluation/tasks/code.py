"""Refuse task files that run code of their own, unless the user types that they may.

A YAML file of lm-evaluation-harness can name Python functions beside it (`!function utils.process_docs`).
"""

import os
from collections.abc import Iterator
from pathlib import Path

import yaml

from lit_llm.errors import InputError

OPTION = "--trust-task-code"                        # on the command line only
TRUST = "LIT_LLM_TRUST_TASK_CODE"
MOST_FILES, MOST_BYTES = 5000, 4 << 20              # of a folder; of a file
PLAIN = ("map", "seq", "str", "int", "float", "bool", "null", "timestamp", "merge")     # tags of values
ENDINGS = (".yaml", ".yml")


def typed(options: list[str]) -> list[str]:
    """The options without `--trust-task-code`, which is remembered for `check`."""
    os.environ.pop(TRUST, None)
    if OPTION in options:
        os.environ[TRUST] = "1"
    return [option for option in options if option != OPTION]


def files(folder: Path) -> list[Path]:
    """The task files of a folder and those below it.

    Raises:
        InputError: There is none, or more than 5,000.
    """
    paths = sorted(path for ending in ENDINGS for path in folder.rglob(f"*{ending}"))
    if not paths or len(paths) > MOST_FILES:
        raise InputError(f"the folder has {len(paths):,} task files (.yaml)", where=str(folder),
                         fix="name a folder with task files of lm-evaluation-harness")
    return paths


def names(file: Path) -> list[str]:
    """Names of the task or group that a file defines; none for a file that others include.

    Raises:
        InputError: The file is not YAML.
    """
    root = _parsed(file)
    keys = {key.value: value for key, value in root.value} if isinstance(root, yaml.MappingNode) else {}
    defined = keys.get("group") if isinstance(keys.get("group"), yaml.ScalarNode) else keys.get("task")
    return [defined.value] if isinstance(defined, yaml.ScalarNode) else []


def check(paths: list[Path]) -> None:
    """Refuse files that name Python functions, also in files that they include, unless `--trust-task-code` was typed.

    Raises:
        InputError: The error names the file, its line and the function.
    """
    if os.environ.get(TRUST):
        return
    seen: set[Path] = set()
    waiting = [path.resolve() for path in paths]
    while waiting:
        file = waiting.pop()
        if file in seen or not file.is_file():
            continue
        seen.add(file)
        root = _parsed(file)
        for node in _nodes(root):
            if node.tag.removeprefix("tag:yaml.org,2002:") not in PLAIN:
                what = node.value if isinstance(node, yaml.ScalarNode) else ""
                raise InputError(f"this task runs code of its own: {node.tag} {what}"[:200],
                                 where=f"{file}:{node.start_mark.line + 1}",
                                 fix=f"if you trust the folder, type {OPTION}; its code can do what you can do")
        waiting += [file.parent / name for name in _included(root)]


def _parsed(file: Path) -> yaml.Node | None:
    if file.stat().st_size > MOST_BYTES:
        raise InputError(f"a task file of more than {MOST_BYTES >> 20} MB", where=str(file))
    try:
        return yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"this is not YAML: {str(error).splitlines()[0][:160]}", where=str(file)) from None


def _nodes(root: yaml.Node | None) -> Iterator[yaml.Node]:
    waiting, seen = [root] if root is not None else [], set[int]()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:                        # an alias
            continue
        seen.add(id(node))
        yield node
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
        elif isinstance(node, yaml.MappingNode):
            waiting += [part for pair in node.value for part in pair]


def _included(root: yaml.Node | None) -> list[str]:
    """Files named under `include`, at any depth."""
    values = [value for node in _nodes(root) if isinstance(node, yaml.MappingNode)
              for key, value in node.value if key.value == "include"]
    nodes = [node for value in values for node in (value.value if isinstance(value, yaml.SequenceNode) else [value])]
    return [node.value for node in nodes if isinstance(node, yaml.ScalarNode)]
