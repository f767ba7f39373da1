"""If this breaks: chat does not work in a terminal. Ctrl-C throws the conversation away, pasted lines become several
questions, a mistyped command is sent to the model, or what was typed is lost or open to others. A real terminal (pty), typed into.
"""

import json
import os
import pty
import select
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from lit_llm.data.records.formats import convert

ROOT = Path(__file__).resolve().parents[2]


class Terminal:
    """The chat verb behind a real terminal."""

    def __init__(self, *words, state):
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            os.chdir("/")
            os.environ |= {"PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(state), "TERM": "xterm"}
            os.execv(sys.executable, [sys.executable, "-m", "lit_llm", "chat", *words])
        self.seen = ""

    def until(self, text, seconds=90):
        start, end = len(self.seen), time.monotonic() + seconds
        while text not in self.seen[start:]:
            assert time.monotonic() < end, self.seen
            if select.select([self.terminal], [], [], 0.2)[0]:
                self.seen += os.read(self.terminal, 65536).decode("utf-8", "replace")
        return self.seen[start:]

    def type(self, text):
        os.write(self.terminal, text.encode())

    def say(self, text, until="you> "):
        """Type a line, and return what comes up to the next prompt."""
        self.type(text + "\n")
        return self.until(until).partition("\n")[2]

    def ended(self):
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status)


@pytest.fixture
def terminal(tmp_path):
    """`terminal(*words)`: a chat that has come to its prompt."""
    opened = []

    def open_(*words):
        opened.append(Terminal(*words, state=tmp_path / "state"))
        opened[-1].until("you> ")
        return opened[-1]

    yield open_
    for opened_terminal in opened:
        try:
            os.kill(opened_terminal.pid, signal.SIGKILL)
            os.waitpid(opened_terminal.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


def test_ctrl_c_stops_the_answer_and_ctrl_d_leaves(endless_model, terminal):
    chat = terminal("--model", endless_model, "--max_tokens", "3000", "--temperature", "0")
    chat.type("Tell me all\n")
    time.sleep(0.5)
    chat.type("\x03")
    assert "(stopped)" in chat.until("you> ", 20)
    time.sleep(0.5)                                 # CPython's input() misses a signal while it draws the prompt
    chat.type("\x03")
    chat.until("you> ", 20)                         # at the prompt it ends nothing either
    assert "a new conversation" in chat.say("/reset")
    chat.type("\x04")
    assert chat.ended() == 0


def test_commands_pasted_lines_and_history(endless_model, terminal, tmp_path):
    folder = tmp_path / "single"
    shutil.copytree(endless_model, folder)
    (folder / "README.md").write_text("---\nturns: 1\n---\n")
    chat = terminal(str(folder), "--max_tokens", "6", "--temperature", "0")
    assert "trained on single questions" in chat.seen
    assert all(name in chat.say("/HELP") for name in ("/system", "/retry", "/undo", "/save", "/load", "/set", "/stats", "/bye"))
    assert "there is no command /rety, and nothing was sent. Did you mean 'retry'?" in chat.say("/rety")
    assert "no answer yet" in chat.say("/stats")
    assert "no question to ask again" in chat.say("/retry")
    assert "'hot' is not a number" in chat.say("/set temperature hot")
    assert "temperature" in chat.say("/set temperature 9")
    assert "Did you mean 'top_p'?" in chat.say("/set topp 1")
    assert '"multi_turn true' not in chat.say("/set multi_turn true")
    assert "system message: Be brief." in chat.say("/system Be brief.")
    chat.say("one line\nand another")               # at once, as by the mouse
    assert "6 tokens in " in chat.say("/stats")
    chat.say("\x1b[200~pasted\nby a terminal\x1b[201~")
    chat.say('"""', until="...> ")
    chat.say("typed", until="...> ")
    first = chat.say('by hand"""')
    assert chat.say("/retry") == first
    chat.say("//slash")
    assert "removed: /slash" in chat.say("/undo")
    file = tmp_path / "chats.jsonl"
    assert f"appended to {file}" in chat.say(f"/save {file}")
    record = json.loads(file.read_text(encoding="utf-8"))
    questions = ["one line\nand another", "pasted\nby a terminal", "typed\nby hand"]
    assert [message["content"] for message in record["messages"] if message["role"] == "user"] == questions
    assert convert(record).messages[0].content == "Be brief."
    assert "nothing to remove" in (chat.say("/reset"), chat.say("/undo"))[1]
    assert "6 messages; the last question was: typed by hand" in chat.say(f"/load {file}")
    assert "removed: typed by hand" in chat.say("/undo")
    assert "not a conversation" in chat.say(f"/load {folder / 'config.json'}")
    chat.type("ExIt\n")
    assert chat.ended() == 0
    history = tmp_path / "state" / "lit_llm" / "chat_history"
    assert (history.stat().st_mode & 0o777, history.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert "/system Be brief." in history.read_text(encoding="utf-8").splitlines()
    size = history.stat().st_size
    again = terminal("--model", endless_model, "--max_tokens", "6", "--history", "false")
    again.say("a secret")
    again.type("/bye\n")
    assert (again.ended(), history.stat().st_size) == (0, size)
