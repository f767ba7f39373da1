"""The embedded default: small documents, conversations, a tokenizer and a base model, found by `sample:NAME` paths."""

from pathlib import Path

PREFIX = "sample:"


def resolve(path: str) -> str:
    """The path itself, or for `sample:NAME` the place of that file or folder inside the installed package."""
    if not path.startswith(PREFIX):
        return path
    return str(Path(__file__).parent / path.removeprefix(PREFIX))
