"""Read the usage of a model from its model card: example questions, and whether it was trained on single questions."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

LONGEST_HEAD = 65_536                               # characters of a card's YAML that are read
QUESTIONS, CHARACTERS = 6, 200                      # example questions that are read, and characters of each


@dataclass(frozen=True, slots=True)
class Usage:
    """Usage of a model according to its model card.

    Args:
        questions: Example questions.
        turns: Questions of the longest conversations in the training data; null if the card does not say it.
    """

    questions: tuple[str, ...] = ()
    turns: int | None = None

    @property
    def single_turn(self) -> bool:
        """Whether the model was trained on single questions only."""
        return self.turns == 1


def read_usage(folder: str | Path) -> Usage:
    """Read the usage from the card in a model's folder; a card of any origin is accepted.

    Args:
        folder: A folder with a README.md; without one, or with a damaged one, nothing is known.
    """
    try:
        with open(Path(folder, "README.md"), encoding="utf-8", errors="replace") as file:
            text = file.read(LONGEST_HEAD)
        head = yaml.safe_load(text.split("\n---", 1)[0].removeprefix("---")) if text.startswith("---\n") else {}
    except (OSError, yaml.YAMLError, ValueError, RecursionError):
        return Usage()
    if not isinstance(head, Mapping):
        return Usage()
    turns, widget = head.get("turns"), head.get("widget")
    entries = widget[:50] if isinstance(widget, list) else []
    questions = [question for entry in entries if (question := _question(entry))]
    return Usage(tuple(dict.fromkeys(questions))[:QUESTIONS], turns if type(turns) is int and turns > 0 else None)


def _question(entry: Any) -> str | None:
    """The question of a widget's entry: its `text`, or its only message."""
    if not isinstance(entry, Mapping):
        return None
    messages = entry.get("messages")
    if isinstance(messages, list) and len(messages) == 1 and isinstance(messages[0], Mapping):
        entry = {"text": messages[0].get("content")}
    text = entry.get("text")
    return text.strip() if isinstance(text, str) and 0 < len(text.strip()) <= CHARACTERS else None
