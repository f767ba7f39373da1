"""If this breaks, a known record format is read wrong: words under the wrong role, or a fault without its remedy."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_llm.conversation import Conversation, Document
from lit_llm.data.formats import FORMATS, convert
from lit_llm.errors import InputError

TOOL = {"name": "add", "description": "adds", "parameters": {}}
CALL = {"name": "add", "arguments": {"a": 1}}


def said(record, **settings):
    return [(message.role, message.content) for message in convert(record, **settings).messages]


def test_text():
    assert convert({"text": " a\n", "url": "x"}) == Document(" a\n")
    assert convert("from a file") == Document("from a file")
    assert convert({"title": "t", "paragraphs": ["a", "b"]}, columns={"text": "paragraphs"}) == Document("a\nb")


def test_alpaca():
    assert said({"instruction": "Add.", "input": "1 1", "output": "2"}) == [("user", "Add.\n1 1"), ("assistant", "2")]
    assert said({"instruction": "Hi", "input": None, "output": "Ho", "system": "Short.", "history": [["a", "b"]]}) == [
        ("system", "Short."), ("user", "a"), ("assistant", "b"), ("user", "Hi"), ("assistant", "Ho")]


def test_messages_and_the_chapters_conversations():
    turns = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！"}]
    assert said({"messages": turns}) == said({"conversations": turns}) == [("user", "你好"), ("assistant", "你好！")]
    assert convert({"messages": turns, "tools": [TOOL]}).tools == ({"type": "function", "function": TOOL},)
    assert said({"messages": turns, "system": "s"})[0] == ("system", "s")


def test_sharegpt_with_calls():
    conversation = convert({"tools": json.dumps([TOOL]), "conversations": [
        {"from": "human", "value": "1+1?"}, {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "observation", "value": "2"}, {"from": "gpt", "value": "Two."}]})
    assert [message.role for message in conversation.messages] == ["user", "assistant", "tool", "assistant"]
    assert conversation.messages[1].tool_calls == ({"type": "function", "function": CALL},)
    assert conversation.tools == ({"type": "function", "function": TOOL},)


def test_prompt_and_completion():
    columns = {"prompt": "q", "completion": "a"}
    assert said({"q": "1+1?", "a": "2"}, columns=columns) == [("user", "1+1?"), ("assistant", "2")]
    conversation = convert({"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                                       {"role": "user", "content": "c"}],
                            "completion": [{"role": "assistant", "content": "d"}]})
    assert [message.train for message in conversation.messages] == [None, False, None, None]


@pytest.mark.parametrize(("record", "named"), [
    ({"q": "a", "a": "b"}, "keys q, a"), ({}, "keys none"),
    ({"instruction": "a", "output": " "}, "output is empty: nothing to learn from"),
    ({"instruction": "a", "output": 5}, "output must be a string, not int: 5"),
    ({"instruction": "a", "output": "b", "history": ["x"]}, "history 1 must be a pair"),
    ({"text": None}, "text must be a string, not null"),
    ({"conversations": [{"from": "humam", "value": "a"}]}, "unknown speaker 'humam'.*Did you mean 'human'"),
    ({"conversations": [{"from": "human", "text": "a"}]}, "needs the keys from and value; it has from, text"),
    ({"conversations": [{"from": "function_call", "value": "{oops"}]}, "message 1: a function_call's value must be"),
    ({"messages": [{"role": "asistant", "content": "a"}]}, "message 1: unknown role 'asistant'.*you mean 'assistant'"),
    ({"messages": []}, "at least one message"),
    ({"prompt": "a", "completion": "b", "chosen": "c", "rejected": "d"}, "preference record"),
    ({"prompt": "a", "completion": ""}, "completion is empty")])
def test_a_fault_names_what_came_and_what_is_right(record, named):
    with pytest.raises(InputError, match=f"(?s){named}"):
        convert(record)


def test_settings_are_checked():
    with pytest.raises(InputError, match="Did you mean 'alpaca'"):
        convert({}, format="alpacca")
    with pytest.raises(InputError, match="the key 'output' is missing; the record has instruction, outptu"):
        convert({"instruction": "a", "outptu": "b"}, format="alpaca")
    with pytest.raises(InputError, match=r"columns names 'qestion'.*Did you mean 'question'"):
        convert({"question": "a"}, columns={"prompt": "qestion"})
    with pytest.raises(InputError, match="needs objects"):
        convert("plain", format="messages")


KEYS = st.sampled_from(["text", "messages", "conversations", "role", "content", "from", "value", "instruction", "input",
                        "output", "history", "system", "tools", "prompt", "completion", "tool_calls", "train"])
WORDS = st.sampled_from(["user", "assistant", "human", "gpt", "function_call", "[]", "{}", "x", ""])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12)


@given(st.dictionaries(KEYS, VALUES, max_size=5), st.sampled_from(["auto", *FORMATS]))
def test_any_record_is_read_or_refused(record, format):
    with contextlib.suppress(InputError):
        assert isinstance(convert(record, format=format), Document | Conversation)
