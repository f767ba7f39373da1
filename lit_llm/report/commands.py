"""The commands that continue from a run.

They work from any directory: paths are absolute, and settings are in the run's config.
"""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_llm.system import class_paths, command

ENDED_EARLY = ("stopped", "failed", "killed")


def of(run: Path, state: str, config: dict[str, Any], allowed: Sequence[Any] = ()) -> list[dict[str, str]]:
    """The commands that are possible now: for each `what` (chat, validate, serve, ...) and `command`.

    Args:
        run: The run folder.
        state: State of the run, see `facts.state_of`.
        config: Content of its `config.yaml`.
        allowed: Packages of the user whose classes the config names.
    """
    run = run.absolute()
    options = [f"{class_paths.OPTION}={name}" for name in allowed if re.fullmatch(r"[A-Za-z_][\w.]*", str(name))]
    with_config = ["--config", run / "config.yaml"]
    saved, exported = any((run / "checkpoints").glob("step_*/manifest.json")), (run / "export").is_dir()
    named_commands: list[tuple[str, list[object]]] = []
    if exported:
        named_commands.append(("chat", ["lit_llm", "chat", "--model", run / "export"]))
    if saved and (run / "checkpoints" / "BEST").is_file():          # otherwise there is no validation data
        named_commands.append(("validate", ["lit_llm", "validate", *with_config, "--ckpt_path", "best", *options]))
    if exported:
        named_commands.append(("serve", ["serve", "--model", run / "export"]))
    if saved:
        named_commands.append(("export", ["lit_llm", "export", "--run", run]))
    if saved and state in ENDED_EARLY:
        named_commands.append(("resume", ["lit_llm", "fit", *with_config, "--ckpt_path", "last", *options]))
    if saved and state == "finished" and (longer := _longer(config.get("trainer") or {})):
        named_commands.append(("further", ["lit_llm", "fit", *with_config, "--ckpt_path", "last", *longer, *options]))
    named_commands.append(("report", ["lit_llm", "report", run]))
    return [{"what": what, "command": command.line(*words)} for what, words in named_commands]


def for_many_users(folder: Path) -> str:
    """The line that names a faster engine for an export; vLLM is not part of this project, and no test runs it.

    It is empty for an adapter alone, which vLLM serves beside its base only.
    """
    if not (folder / "config.json").is_file():
        return ""
    return f"for many users, where vLLM is installed: vllm serve {shlex.quote(str(folder.absolute()))}"


def _longer(trainer: dict[str, Any]) -> list[object]:
    """Options for twice as long a run; none where more than one limit ends it."""
    epochs, steps = trainer.get("max_epochs"), trainer.get("max_steps")
    if trainer.get("max_time") is not None:
        return []
    if isinstance(epochs, int) and epochs > 0 and steps == -1:
        return ["--trainer.max_epochs", 2 * epochs]
    if isinstance(steps, int) and steps > 0 and epochs in (None, -1):
        return ["--trainer.max_steps", 2 * steps]
    return []
