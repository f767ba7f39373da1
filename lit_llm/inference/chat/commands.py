"""The commands of a chat, which begin with a slash."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from lit_llm.errors import InputError, did_you_mean
from lit_llm.inference.chat.session import Session
from lit_llm.text.conversation import Conversation, Message

EXIT_WORDS = ("exit", "quit", "退出", "/bye", "/exit", "/quit")
COMMAND = re.compile(r"/([a-zA-Z?]+)(?:\s+(.*))?", re.S)       # `/etc/hosts` is none
SETTINGS = {"temperature": float, "top_p": float, "top_k": int, "max_tokens": int, "seed": int}
LONGEST = 10_000_000                                # characters of a file to load
HELP = """/system TEXT   set the system message; without TEXT show it, with - remove it
/retry         ask the last question again
/undo          remove the last question and its answer
/reset         begin a new conversation
/save FILE     append the conversation to a file as a training record, one line of JSON
/load FILE     go on with the last conversation in such a file
/set NAME X    change a setting; without NAME show them
/stats         tokens and speed of the last answer, and of all
/bye           quit, like exit, quit, 退出 and Ctrl-D
A message of several lines begins and ends with \"\"\"; pasted lines are one message.
// sends a message that begins with /."""


def leaves(line: str) -> bool:
    """Whether a line ends the chat, in any case."""
    return line.strip().casefold() in EXIT_WORDS


class Commands:
    """Runs the commands of a session.

    Args:
        session: The conversation.
        say: Shows a text to the user.
    """

    def __init__(self, session: Session, say: Callable[[str], None]) -> None:
        self.session, self._say = session, say
        self._all: dict[str, Callable[[str], Iterator[str] | None]] = {
            "help": self._help, "system": self._system, "retry": self._retry, "undo": self._undo, "reset": self._reset,
            "save": self._save, "load": self._load, "set": self._set, "stats": self._stats}

    def answer(self, line: str) -> Iterator[str] | None:
        """Run a command, or ask the model; returns the answer, or None if there is none to expect.

        Raises:
            InputError: The command is unknown or its argument wrong; nothing is sent then.
        """
        if line.startswith("//"):
            return self.session.ask(line[1:])
        match = COMMAND.fullmatch(line)
        if not match:
            return self.session.ask(line)
        name = match[1].lower()
        if name not in self._all:
            raise InputError(f"there is no command /{name}, and nothing was sent."
                             f"{did_you_mean(name, [*self._all, 'bye'])}",
                             fix=f"/help lists the commands; //{name} sends a message that begins with /")
        return self._all[name]((match[2] or "").strip())

    def _help(self, argument: str) -> None:
        self._say(HELP)

    def _system(self, argument: str) -> None:
        if argument:
            self.session.system = None if argument == "-" else argument
        self._say(f"system message: {self.session.system or '(none)'}")

    def _retry(self, argument: str) -> Iterator[str] | None:
        before, first = self.session.messages, self.session.first
        question = self.session.undo()
        if question is None:
            raise InputError("there is no question to ask again", where="/retry")
        return self._again(question, before, first)

    def _again(self, question: str, before: tuple[Message, ...], first: int) -> Iterator[str]:
        """The new answer; the old one stays if there is none."""
        answered = False
        try:
            for piece in self.session.ask(question):
                answered = answered or bool(piece)
                yield piece
        finally:
            if not answered:
                self.session.messages, self.session.first = before, first

    def _undo(self, argument: str) -> None:
        question = self.session.undo()
        self._say("there is nothing to remove" if question is None else f"removed: {_short(question)}")

    def _reset(self, argument: str) -> None:
        self.session.reset()
        self._say("a new conversation begins")

    def _save(self, argument: str) -> None:
        if not self.session.messages:
            raise InputError("there is no answered question yet", where="/save")
        system = [{"role": "system", "content": self.session.system}] if self.session.system else []
        record = {"messages": [*system, *Conversation(self.session.messages).to_openai()]}
        file = _path(argument, "/save")
        try:
            with open(file, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(record, ensure_ascii=False) + "\n")
        except OSError as error:
            raise InputError(f"{file} cannot be written: {error.strerror}", where="/save") from None
        self._say(f"appended to {file}")

    def _load(self, argument: str) -> None:
        file = _path(argument, "/load")
        try:
            with open(file, encoding="utf-8") as stream:
                text = stream.read(LONGEST + 1)
            if len(text) > LONGEST:
                raise InputError(f"{file} has more than {LONGEST:,} characters", where="/load")
            record = json.loads([line for line in text.splitlines() if line.strip()][-1])
            messages = Conversation.from_openai(record["messages"]).messages
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{file} cannot be read: {reason}", where="/load") from None
        except (ValueError, RecursionError, KeyError, TypeError, IndexError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"the last line of {file} is not a conversation: " '{"messages": [...]}', where="/load",
                             fix="/save writes such files") from None
        system = [message.content for message in messages if message.role == "system"]
        turns = tuple(message for message in messages if message.role != "system")
        if not turns or turns[0].role != "user" or turns[-1].role != "assistant":
            raise InputError(f"the last conversation of {file} is not made of questions and answers", where="/load")
        self.session.reset()
        self.session.system, self.session.messages = "\n".join(system) or None, turns
        self._say(f"{len(turns)} messages; the last question was: "
                  f"{_short(next(message.content for message in reversed(turns) if message.role == 'user'))}")

    def _set(self, argument: str) -> None:
        name, _, value = argument.partition(" ")
        session, value = self.session, value.strip()
        if name == "multi_turn" and value in ("true", "false"):
            session.multi_turn = value == "true"
        elif name in SETTINGS:
            try:
                number = None if value in ("null", "none") and name in ("max_tokens", "seed") else SETTINGS[name](value)
            except ValueError:
                raise InputError(f"'{value[:40]}' is not a number", where=f"/set {name}") from None
            changed: dict[str, Any] = {name: number}
            session.params = replace(session.params, **changed)
        elif name:
            names = [*SETTINGS, "multi_turn"]
            raise InputError(f"/set takes {', '.join(names)} and a value, for multi_turn true or false."
                             f"{did_you_mean(name, names)}", where="/set")
        shown = {name: getattr(session.params, name) for name in SETTINGS} | {"multi_turn": session.multi_turn}
        self._say(", ".join(f"{name} {json.dumps(value)}" for name, value in shown.items()))

    def _stats(self, argument: str) -> None:
        if not self.session.total.answers:
            self._say("there is no answer yet")
            return
        self._say(f"last answer: {self.session.last}")
        if self.session.total.answers > 1:
            self._say(f"{self.session.total.answers} answers: {self.session.total.tokens:,} tokens in "
                      f"{self.session.total.seconds:.1f} s")


def _path(argument: str, where: str) -> Path:
    if not argument:
        raise InputError("the name of a file is missing", where=where, fix=f"{where} chats.jsonl")
    return Path(argument).expanduser()


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else f"{line[:57]}..."
