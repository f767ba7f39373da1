"""If this breaks: a typing mistake in a record is ignored silently, a tool call is lost, or a bad record ends a run."""

import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_llm.errors import InputError, did_you_mean
from lit_llm.text.conversation import Conversation, Message

CALL = {"type": "function", "id": "c1", "function": {"name": "add", "arguments": {"a": 1}}}


def read(*messages, **more):
    return Conversation.from_openai(list(messages), **more)


def test_messages_come_back_as_they_were():
    raw = [{"role": "system", "content": "Be short."}, {"role": "user", "content": " hi\n", "name": "Ann"},
           {"role": "assistant", "content": "", "tool_calls": [CALL]},
           {"role": "tool", "content": "2", "tool_call_id": "c1"},
           {"role": "assistant", "content": "two", "reasoning_content": "1+1"}]
    assert read(*raw).to_openai() == raw


def test_other_spellings_of_the_same_thing():
    got = read({"role": "developer", "content": None}, {"role": "human", "content": [{"type": "text", "text": "a"},
               {"type": "text", "text": "b"}]}, {"role": "gpt", "content": "c", "weight": 0},
               {"role": "user", "content": "d"},
               {"role": "assistant", "function_call": {"name": "f", "arguments": '{"x": [1]}'}},
               {"role": "function", "content": "e", "name": "f"}, tools='[{"type": "function"}]')
    assert [m.role for m in got.messages] == ["system", "user", "assistant", "user", "assistant", "tool"]
    assert [m.content for m in got.messages] == ["", "ab", "c", "d", "", "e"]
    assert [m.train for m in got.messages] == [None, None, False, None, None, None]
    assert got.messages[4].tool_calls[0]["function"] == {"name": "f", "arguments": '{"x": [1]}'}
    assert got.tools == ({"type": "function"},)


def test_other_trainers_messages():
    """Unknown keys are ignored; names that other libraries use for known keys are accepted."""
    got = read({"role": "user", "content": [{"type": "text", "value": "q"}], "loss_weight": 0.0, "id": 7, "loss": 2.3},
               {"role": "assistant", "thinking": "hm", "content": "a", "loss_mask": 1, "timestamp": "now", "context": "c"},
               {"role": "user", "content": "r"},
               {"role": "assistant", "loss": False, "content": [
                   {"type": "reasoning", "value": "so"}, {"type": "text", "text": "b"},
                   {"type": "tool_call", "value": '{"name": "f", "arguments": {"x": 1}}'}]},
               {"role": "tool", "content": ""}, {"role": "model", "tool_calls": [{"name": "g", "arguments": ""}]})
    assert [m.content for m in got.messages] == ["q", "a", "r", "b", "", ""]
    assert [m.reasoning_content for m in got.messages] == [None, "hm", None, "so", None, None]
    assert [m.train for m in got.messages] == [False, True, None, False, None, None]
    assert [call["function"] for m in got.messages for call in m.tool_calls] == [
        {"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {}}]


@pytest.mark.parametrize(("message", "expected"), [
    ({"role": "user", "text": "x"}, "message 2: no content; the message's keys are role, text"),
    ({"role": "assistant", "tool_call": []}, "unknown key 'tool_call' in a message. Did you mean 'tool_calls'?"),
    ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": [1]}]}, "arguments of 'f' must be an object"),
    ("hi", "message 2: a message must be an object with role and content, not a string"),
    ({"content": "x"}, "message 2: unknown role None"),
    ({"role": "asistant", "content": "x"}, "Did you mean 'assistant'?"),
    ({"role": ["user"], "content": "x"}, "unknown role"),
    ({"role": "user", "contnet": "x"}, "unknown key 'contnet' in a message. Did you mean 'content'?"),
    ({"role": "user", "content": 3}, "content must be a string, not a int"),
    ({"role": "user", "content": {"text": "x"}}, "content must be a string, not an object"),
    ({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, "images and audio are not supported"),
    ({"role": "user", "content": "x", "tool_calls": [CALL]}, "tool_calls are allowed on assistant messages only"),
    ({"role": "assistant", "content": "x", "tool_calls": "f()"}, "tool_calls must be a list"),
    ({"role": "assistant", "tool_calls": [{"name": "f"}]}, "a tool call must be"),
    ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{x"}}]}, "of 'f' are not JSON"),
    ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[" * 100_000}}]}, "are not JSON"),
    ({"role": "assistant", "content": "x", "weight": 0.5}, "weight must be 0, 1, true or false"),
    ({"role": "assistant", "content": "x", "reasoning_content": ["y"]}, "reasoning_content must be a string"),
    ({"role": "assistant", "content": "x", "audio": {"id": "a1"}}, "images and audio are not supported"),
])
def test_a_bad_message_is_named_with_what_would_be_right(message, expected):
    with pytest.raises(InputError) as caught:
        read({"role": "user", "content": "q"}, message)
    assert expected in str(caught.value)


def test_which_turns_there_may_be_is_for_the_template_to_say():
    got = read({"role": "assistant", "content": "hi"}, {"role": "system", "content": "s"}, {"role": "user", "content": ""},
               {"role": "assistant", "content": " \n"}, {"role": "system", "content": ""},
               template_args={"enable_thinking": False})
    assert [m.role for m in got.messages] == ["assistant", "system", "user", "assistant", "system"]
    assert [m.is_empty for m in got.messages] == [False, False, True, True, True]
    assert got.upto(2).template_args == {"enable_thinking": False}
    assert read({"role": "user", "content": "q"}, template_args='{"x": 1}').template_args == {"x": 1}
    for bad in ([1], "x", 3):
        with pytest.raises(InputError, match="template's arguments"):
            read({"role": "user", "content": "q"}, template_args=bad)


@pytest.mark.parametrize(("tools", "expected"), [
    ("{x", "not JSON"), ("[" * 100_000, "not JSON"), ({"a": 1}, "must be a list"), (["f"], "a tool must be an object")])
def test_bad_tools_are_refused(tools, expected):
    with pytest.raises(InputError, match=expected):
        read({"role": "user", "content": "q"}, tools=tools)


def test_no_message_and_no_list():
    for raw in ([], None, "hi", {"role": "user"}):
        with pytest.raises(InputError):
            Conversation.from_openai(raw)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3), max_leaves=8)
KEYS = st.sampled_from(["role", "content", "weight", "train", "tool_calls", "name", "function_call", "refusal"])


@settings(deadline=None, max_examples=200, derandomize=True, database=None)
@given(st.lists(JSON | st.dictionaries(KEYS, JSON | st.sampled_from(["user", "assistant"]), max_size=5), max_size=3),
       JSON)
def test_any_json_is_read_or_refused(messages, tools):
    """A record of an untrusted file never causes a traceback."""
    try:
        conversation = Conversation.from_openai(messages, tools)
    except InputError:
        return
    again = Conversation.from_openai(conversation.to_openai(), list(conversation.tools))
    assert repr(again.to_openai()) == repr(conversation.to_openai())        # nan is not nan


def test_upto_and_append_make_new_values():
    first = read({"role": "user", "content": "q"})
    second = first.append(Message("assistant", "a"))
    assert len(first.messages) == 1
    assert second.upto(1) == first


def test_an_error_keeps_its_place_through_a_worker_process():
    error = pickle.loads(pickle.dumps(InputError("bad", where="a.jsonl:3", fix="mend it")))
    assert str(error) == "a.jsonl:3: bad\n  mend it"
    assert str(error.at("elsewhere")) == str(error)
    assert str(InputError("bad").at("a.jsonl:3")) == "a.jsonl:3: bad"
    assert did_you_mean("sytem", ["system", "user"]) == " Did you mean 'system'?"
    assert did_you_mean("zzz", ["system"]) == ""
