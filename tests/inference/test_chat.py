"""If this breaks: nobody can talk to a model in a terminal, a script that pipes questions gets something beside the answers,
Ctrl-C throws the conversation away, or a long conversation ends in an error.
"""

import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lit_llm.errors import InputError
from lit_llm.inference.chat import Session
from lit_llm.inference.completion import TextEngine
from lit_llm.inference.sampling import SamplingParams
from lit_llm.text.conversation import Conversation

ROOT = Path(__file__).resolve().parents[2]
GREEDY = SamplingParams(max_tokens=12, temperature=0)


def answer_alone(engine, *messages):
    roles = ("user", "assistant")
    asked = Conversation.from_openai([{"role": roles[n % 2], "content": text} for n, text in enumerate(messages)])
    return engine.generate(asked, GREEDY).text


def test_piped_lines_get_their_answers_and_nothing_else(lit_llm, tiny_model):
    engine = TextEngine.load(tiny_model("llama"))
    first = answer_alone(engine, "A kite?")
    second = answer_alone(engine, "A kite?", first, "什么颜色")
    done = lit_llm("chat", "--model", tiny_model("llama"), "--max_tokens", 12, "--temperature", 0,
                   stdin="A kite?\n\n什么颜色\n/reset\nA kite?\n退出\nnever asked\n")
    assert done.code == 0, done.err
    assert done.out == f"{first}\n{second}\n{first}\n"


def test_one_shot(lit_llm, tiny_model):
    expected = TextEngine.load(tiny_model("gpt2")).generate(
        Conversation.from_openai([{"role": "system", "content": "Short."}, {"role": "user", "content": "Hi"}]), GREEDY).text
    done = lit_llm("chat", "--model", tiny_model("gpt2"), "--max_tokens", 12, "--temperature", 0, "--prompt", "Hi", "--system", "Short.")
    assert (done.code, done.out) == (0, f"{expected}\n"), done.err


@pytest.mark.parametrize(("words", "said"), [
    (("--model", "no/such/folder"), "no folder"), (("--model", "MODEL", "--temperature", "3"), "temperature"),
    (("--model", "MODEL", "--prompt", "x" * 900), "context of 256"),
])
def test_mistakes_take_a_few_lines(words, said, lit_llm, tiny_model):
    done = lit_llm("chat", *[tiny_model("llama") if word == "MODEL" else word for word in words])
    assert (done.code, done.out) == (2, "")
    assert said in done.err
    assert len(done.err.strip().splitlines()) <= 6


def test_values_of_the_templates_variables(lit_llm, endless_model):
    """`--template_args` reach the prompt; one that the template lacks is refused."""
    refused = lit_llm("chat", "--model", endless_model, "--prompt", "hi", "--template_args", "{stile: x}")
    assert refused.code == 2
    assert "template_args: the chat template has no variable 'stile'; it reads style. Did you mean 'style'?" in refused.err
    done = lit_llm("chat", "--model", endless_model, "--prompt", "hi", "--template_args", "{style: Be brief.}", "--max_tokens", 3,
                   "--temperature", 0)
    engine = TextEngine.load(endless_model)
    plain = AutoTokenizer.from_pretrained(endless_model)
    ids = plain.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True, style="Be brief.",
                                    return_dict=True)["input_ids"]
    greedy = SamplingParams(max_tokens=3, temperature=0)
    assert done.out == engine.generate(ids, greedy).text + "\n" != engine.generate(engine.encode(
        Conversation.from_openai([{"role": "user", "content": "hi"}])), greedy).text + "\n"


def test_a_full_context_forgets_the_oldest_and_says_so(tiny_model, capsys):
    engine = TextEngine.load(tiny_model("llama"))
    session = Session(engine, SamplingParams(max_tokens=20, temperature=0), system="Stay.")
    for turn in range(9):
        asked = f"Question {turn}, with some words to fill the context up."
        answer = "".join(session.ask(asked))
        kept = session.messages
        assert kept[-2].content == asked
        assert kept[-1].content == answer
        assert kept[0].role == "user"
        assert len(engine.encode(Conversation((*session._head, *kept[:-1])))) + 20 <= 256
    assert "dropped" in capsys.readouterr().err
    assert len(session.messages) < 18


def test_a_message_longer_than_the_context_leaves_the_conversation_as_it_was(tiny_model):
    session = Session(TextEngine.load(tiny_model("llama")), GREEDY)
    "".join(session.ask("Hi"))
    before = session.messages
    with pytest.raises(InputError, match="context"):
        list(session.ask("x" * 900))
    assert session.messages in (before, ())         # trimming may have come first; never a question without its answer
    assert "".join(session.ask("Hi"))


class Terminal:
    """The chat verb behind a real terminal."""

    def __init__(self, *words):
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            os.chdir("/")
            os.environ["PYTHONPATH"] = str(ROOT)
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


def test_ctrl_c_stops_the_answer_and_ctrl_d_leaves(endless_model):
    terminal = Terminal("--model", endless_model, "--max_tokens", "3000", "--temperature", "0")
    try:
        terminal.until("you> ")
        terminal.type("Tell me all\n")
        time.sleep(0.5)
        terminal.type("\x03")
        assert "(stopped)" in terminal.until("you> ", 20)
        time.sleep(0.5)                             # CPython's input() misses a signal while it draws the prompt
        terminal.type("\x03")
        terminal.until("you> ", 20)                 # at the prompt it ends nothing either
        terminal.type("/reset\n")
        terminal.until("you> ", 20)
        terminal.type("\x04")
        _, status = os.waitpid(terminal.pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0
    except BaseException:
        os.kill(terminal.pid, signal.SIGKILL)
        raise


def test_a_reader_that_goes_away_is_no_crash(endless_model):
    command = [sys.executable, "-m", "lit_llm", "chat", "--model", endless_model, "--prompt", "Hi", "--max_tokens", "3000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)},
                          cwd="/") as process:
        process.stdout.read(4)
        process.stdout.close()
        error = process.stderr.read().decode()
    assert "Traceback" not in error
