"""If this breaks: a script that pipes questions gets something beside the answers, or answers that depend on other lines; a long
conversation ends in an error, or silently loses what was said first. `test_terminal.py` types.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lit_llm.errors import InputError
from lit_llm.inference.chat.session import LocalModel, Session
from lit_llm.inference.completion import TextEngine
from lit_llm.inference.sampling import SamplingParams
from lit_llm.text.conversation import Conversation, Message

ROOT = Path(__file__).resolve().parents[2]
GREEDY = SamplingParams(max_tokens=12, temperature=0)


def answer_alone(engine, *messages):
    roles = ("user", "assistant")
    conversation = Conversation.from_openai([{"role": roles[n % 2], "content": text} for n, text in enumerate(messages)])
    return engine.generate(conversation, GREEDY).text


def test_piped_lines_get_their_answers_and_nothing_else(lit_llm, tiny_model):
    """As one conversation where that is said; otherwise each line is a question of its own."""
    engine = TextEngine.load(tiny_model("llama"))
    first = answer_alone(engine, "A kite?")
    second = answer_alone(engine, "A kite?", first, "什么颜色")
    words = ("chat", tiny_model("llama"), "--max_tokens", 12, "--temperature", 0)
    done = lit_llm(*words, "--multi_turn", "true", stdin="A kite?\n\n什么颜色\n/reset\nA kite?\n退出\nnever asked\n")
    assert done.code == 0, done.err
    assert done.out == f"{first}\n{second}\n{first}\n"
    done = lit_llm(*words, stdin='A kite?\n什么颜色\n/nonsense\n"""\nA kite?\n"""\nQuit\nnever asked\n')
    assert done.out == f"{first}\n{answer_alone(engine, '什么颜色')}\n{first}\n"
    assert "there is no command /nonsense" in done.err


@pytest.mark.parametrize(("words", "message"), [
    (("--url", "http://127.0.0.1:9"), "no server answers"), (("--url", "file:///etc/passwd"), "is not the address of an API"),
    (("--url", "http://127.0.0.1:9", "--adapter", "x"), "has no effect with url"), ((), "no model was given"),
])
def test_a_wrong_address_takes_a_few_lines(words, message, lit_llm):
    done = lit_llm("chat", *words, stdin="Hi\n")
    assert (done.code, done.out) == (2, "")
    assert message in done.err
    assert len(done.err.strip().splitlines()) <= 3


def test_one_shot(lit_llm, tiny_model):
    expected = TextEngine.load(tiny_model("gpt2")).generate(
        Conversation.from_openai([{"role": "system", "content": "Short."}, {"role": "user", "content": "Hi"}]), GREEDY).text
    done = lit_llm("chat", "--model", tiny_model("gpt2"), "--max_tokens", 12, "--temperature", 0, "--prompt", "Hi", "--system", "Short.")
    assert (done.code, done.out) == (0, f"{expected}\n"), done.err


@pytest.mark.parametrize(("words", "message"), [
    (("--model", "no/such/folder"), "no folder"), (("--model", "MODEL", "--temperature", "3"), "temperature"),
    (("--model", "MODEL", "--prompt", "x" * 900), "context of 256"),
])
def test_mistakes_take_a_few_lines(words, message, lit_llm, tiny_model):
    done = lit_llm("chat", *[tiny_model("llama") if word == "MODEL" else word for word in words])
    assert (done.code, done.out) == (2, "")
    assert message in done.err
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


def test_a_full_context_leaves_out_the_oldest_and_says_so(tiny_model):
    engine, notes = TextEngine.load(tiny_model("llama")), []
    session = Session(LocalModel(engine), SamplingParams(max_tokens=20, temperature=0), system="Stay.", note=notes.append)
    for turn in range(9):
        question = f"Question {turn}, with some words to fill the context up."
        answer = "".join(session.ask(question))
        sent = session.sent
        assert sent[-2].content == question
        assert sent[-1].content == answer
        assert sent[0].role == "user"
        assert len(engine.encode(Conversation((Message("system", "Stay."), *sent[:-1])))) + 20 <= 256
        assert bool(notes) == (len(sent) < 2 * turn + 2)         # said when turns are left out, and only then
    assert "no longer sent" in notes[0]
    assert len(session.sent) < 18 == len(session.messages)      # what is not sent is not lost


def test_a_message_longer_than_the_context_leaves_the_conversation_as_it_was(tiny_model):
    notes = []
    session = Session(LocalModel(TextEngine.load(tiny_model("llama"))), GREEDY, note=notes.append)
    "".join(session.ask("Hi"))
    before = session.messages
    with pytest.raises(InputError, match="context"):
        list(session.ask("x" * 900))
    assert (session.messages, session.first, notes) == (before, 0, [])
    assert "".join(session.ask("Hi"))


def test_a_reader_that_goes_away_is_no_crash(endless_model):
    command = [sys.executable, "-m", "lit_llm", "chat", "--model", endless_model, "--prompt", "Hi", "--max_tokens", "3000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)},
                          cwd="/") as process:
        process.stdout.read(4)
        process.stdout.close()
        error = process.stderr.read().decode()
    assert "Traceback" not in error
