"""Command lines for messages."""

import os
import shlex
import shutil
import sys
from pathlib import Path


def python() -> str:
    """The command of this Python in the user's shell: its name if the shell finds it, or its full path."""
    name = Path(sys.executable).name or "python"
    for word in ("python", name):
        program = shutil.which(word)
        if program and os.path.abspath(program) == os.path.abspath(sys.executable):
            return word
    return shlex.quote(sys.executable) if sys.executable else "python"


def line(*words: object) -> str:
    """A command that can be pasted into a shell: `python -m lit_llm ...` with these arguments."""
    return f"{python()} -m {shlex.join(map(str, words))}"
