"""Errors that a user can fix.

They are raised anywhere and caught once, in `cli/main.py` and `serve`, where they become a few lines and exit code 2
without a traceback. Bugs are `assert`s and keep their traceback.
"""

from collections.abc import Iterable
from pathlib import Path

# The distribution of a package where it has another name.
DISTRIBUTIONS = {"comet_ml": "comet-ml", "cut_cross_entropy": "cut-cross-entropy", "liger_kernel": "liger-kernel",
                 "yaml": "pyyaml"}


class InputError(ValueError):
    """Bad input: a file, a record, a config key, a template.

    Args:
        what: What is wrong, and what would be right, in one sentence.
        where: `file:line`, a config key or a flag; empty if there is no place.
        fix: What to type or change next; empty if `what` already says it.

    >>> print(InputError("unknown role 'bot'; use system, user, assistant or tool", where="a.jsonl:3"))
    a.jsonl:3: unknown role 'bot'; use system, user, assistant or tool
    """

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(what)

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}\n  {self.fix}" if self.fix else text

    def at(self, where: str) -> "InputError":
        """The same error with a place."""
        return self if self.where else InputError(self.what, where=where, fix=self.fix)

    def __reduce__(self) -> tuple:                  # worker processes pickle exceptions
        return (_rebuild, (type(self), self.what, self.where, self.fix))


class GivenUpError(InputError):
    """An error that ends the run even if bad records are skipped."""


def _rebuild(kind: type[InputError], what: str, where: str, fix: str) -> InputError:
    error = kind.__new__(kind)                      # a subclass may take other arguments
    InputError.__init__(error, what, where=where, fix=fix)
    return error


def missing_package(error: BaseException | None) -> InputError | None:
    """What to install, where an error or its cause is a package that cannot be imported; null for any other error.

    Args:
        error: As it was caught.
    """
    while error is not None and not isinstance(error, ModuleNotFoundError):
        error = error.__cause__ or error.__context__
    name = (error.name or "").partition(".")[0] if error is not None else ""
    if not name or name in ("lit_llm", "serve"):    # those of this project are no package to install
        return None
    return InputError(f"the package '{name}' is not installed", fix=f"pip install {DISTRIBUTIONS.get(name, name)}")


def did_you_mean_path(path: str, *, folders: bool = False, others: Iterable[str] = ()) -> str:
    """` Did you mean 'runs/sft'?`, or an empty text if no path has a similar name, whatever its ending.

    Args:
        path: Where nothing is. What is in the same folder may be meant.
        folders: Whether only folders are meant.
        others: Paths elsewhere that may be meant.
    """
    from difflib import get_close_matches

    try:
        beside = [entry for entry in Path(path).parent.expanduser().iterdir() if not folders or entry.is_dir()]
    except (OSError, RuntimeError, ValueError):
        beside = []
    candidates = {Path(other).stem: Path(other) for other in others}
    candidates |= {entry.stem: Path(path).parent / entry.name for entry in beside}
    close = get_close_matches(Path(path).stem, candidates, n=1, cutoff=0.6)
    return f" Did you mean '{candidates[close[0]]}'?" if close else ""


def did_you_mean(word: str, choices: list[str]) -> str:
    """` Did you mean 'x'?`, or an empty text if no known word is similar."""
    from difflib import get_close_matches

    close = get_close_matches(word, choices, n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""
