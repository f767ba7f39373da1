"""The command lines that messages tell the user to type."""

import os
import shlex
import shutil
import sys
from pathlib import Path


def python() -> str:
    """What starts this very Python in the user's shell: its name where the shell finds it, else its whole path."""
    name = Path(sys.executable).name or "python"
    for word in ("python", name):
        found = shutil.which(word)
        if found and os.path.abspath(found) == os.path.abspath(sys.executable):
            return word
    return shlex.quote(sys.executable) if sys.executable else "python"


def line(*words: object) -> str:
    """A command as it can be pasted into a shell: `python -m lit_llm ...` of these words."""
    return f"{python()} -m {shlex.join(map(str, words))}"
