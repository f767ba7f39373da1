"""If this breaks: the commands that serve/README.md tells people to type do not work as written."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parents[2] / "serve" / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.S)
CURLS = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines() if line.startswith("curl")]


def test_there_is_something_to_test():
    assert len(CURLS) == 7


@pytest.mark.parametrize("command", CURLS)
def test_curl(command, server):
    done = subprocess.run(["bash", "-c", command.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}") + " -f -m 60"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '"error"' not in done.stdout
    assert done.stdout.strip().endswith("[DONE]") or done.stdout.startswith(("{", "# HELP lit_llm_"))


def test_python(server):
    (code,) = [text for kind, text in BLOCKS if kind == "python"]
    done = subprocess.run([sys.executable, "-c", code.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}")],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout
