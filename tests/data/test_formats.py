"""If this breaks: a supported record format is misread, for example with texts under the wrong role, or an error gives no advice."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_llm.data.records.formats import FORMATS, convert
from lit_llm.data.records.sources import Source
from lit_llm.errors import InputError
from lit_llm.text.conversation import Conversation, Document

TOOL = {"name": "add", "description": "adds", "parameters": {}}
CALL = {"name": "add", "arguments": {"a": 1}}


def turns_of(record, **settings):
    return [(message.role, message.content) for message in convert(record, **settings).messages]


def test_text():
    assert convert({"text": " a\n", "url": "x"}) == Document(" a\n")
    assert convert("from a file") == Document("from a file")
    assert convert({"title": "t", "paragraphs": ["a", "b"]}, columns={"text": "paragraphs"}) == Document("a\nb")


def test_alpaca():
    assert turns_of({"instruction": "Add.", "input": "1 1", "output": "2"}) == [("user", "Add.\n1 1"), ("assistant", "2")]
    assert turns_of({"instruction": "Hi", "input": None, "output": "Ho", "system": "Short.", "history": [["a", "b"]]}) == [
        ("system", "Short."), ("user", "a"), ("assistant", "b"), ("user", "Hi"), ("assistant", "Ho")]


def test_messages_and_the_chapters_conversations():
    turns = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！"}]
    assert turns_of({"messages": turns}) == turns_of({"conversations": turns}) == [("user", "你好"), ("assistant", "你好！")]
    assert convert({"messages": turns, "tools": [TOOL]}).tools == ({"type": "function", "function": TOOL},)
    assert turns_of({"messages": turns, "system": "s"})[0] == ("system", "s")


def test_sharegpt_with_calls():
    conversation = convert({"tools": json.dumps([TOOL]), "conversations": [
        {"from": "human", "value": "1+1?"}, {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "observation", "value": "2"}, {"from": "gpt", "value": "Two."}]})
    assert [message.role for message in conversation.messages] == ["user", "assistant", "tool", "assistant"]
    assert conversation.messages[1].tool_calls == ({"type": "function", "function": CALL},)
    assert conversation.tools == ({"type": "function", "function": TOOL},)


def test_prompt_and_completion():
    columns = {"prompt": "q", "completion": "a"}
    assert turns_of({"q": "1+1?", "a": "2"}, columns=columns) == [("user", "1+1?"), ("assistant", "2")]
    conversation = convert({"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                                       {"role": "user", "content": "c"}],
                            "completion": [{"role": "assistant", "content": "d"}]})
    assert [message.train for message in conversation.messages] == [None, False, None, None]


@pytest.mark.parametrize(("record", "expected"), [
    ({"instruction": "q", "context": "c", "response": "a", "category": "x"}, "user: q\nc | assistant: a"),      # dolly
    ({"system_prompt": "s", "question": "q", "response": "a", "id": 1}, "system: s | user: q | assistant: a"),  # OpenOrca
    ({"query": "q", "response": "a", "history": [["b", "c"]]}, "user: b | assistant: c | user: q | assistant: a"),
    ({"instruction": "q", "instances": [{"input": "i", "output": "a"}]}, "user: q\ni | assistant: a"),          # seed tasks
    ({"kind": "k", "input": "q", "target": "a"}, "user: q | assistant: a"),                             # Firefly, at first
    ({"prompt": [{"role": "user", "content": "q"}], "answer": "a"}, "user: q | assistant: a"),
    ({"system": "s", "prompt": "q", "completion": "a"}, "system: s | user: q | assistant: a"),
    ({"conversations": ["q", "a", "r", "b"], "source": "x"}, "user: q | assistant: a | user: r | assistant: b"),   # LIMA
    ({"id": "0", "data": ["q", "a"]}, "user: q | assistant: a"),                                        # UltraChat
    ({"system": "s", "conversation": [{"human": "q", "assistant": "a"}]}, "system: s | user: q | assistant: a"),
    ({"conversation": [{"system": "s", "input": "q", "output": "a"}]}, "system: s | user: q | assistant: a"),     # XTuner
    ({"conversations": [{"from": "Human", "value": "q"}, {"from": "bing", "value": "a"}]}, "user: q | assistant: a"),
    ({"messages": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]'}, "user: q | assistant: a"),
    ({"messages": [{"role": "user", "content": "q"}, {"role": "tool_call", "content": json.dumps(CALL)},
                   {"role": "tool_response", "content": "2"}]}, "user: q | assistant:  | tool: 2")])
def test_the_fields_other_spellings(record, expected):
    assert " | ".join(": ".join(turn) for turn in turns_of(record)) == expected


@pytest.mark.parametrize(("record", "columns"), [
    ({"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"},
      "rejected": {"from": "gpt", "value": "b"}}, "{prompt: conversations, completion: chosen}"),
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, "{prompt: prompt, completion: chosen}"),
    ({"prompt": "q", "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
      "rejected": []}, "{messages: chosen}"),
    ({"Question": "q", "Answer": "a"}, "{prompt: Question, completion: Answer}"),
    ({"question": "q", "answer": "a", "output": "b"}, "{prompt: question, completion: output}"),
    ({"question": "q", "answer": "a", "choices": ["a", "b"]}, "{prompt: question, completion: answer}"),
    ({"title": "a long title indeed", "paragraphs": ["a", "b"]}, "{text: paragraphs}")])
def test_what_could_mean_several_things_is_refused_with_columns_that_work(record, columns):
    with pytest.raises(InputError) as caught:
        convert(record)
    assert columns in str(caught.value)
    mapped = dict(pair.split(": ") for pair in columns[1:-1].split(", "))
    read = convert(record, columns=mapped)
    assert read == Document("a\nb") or turns_of(record, columns=mapped)[-1][1] in ("a", "b")


def test_what_is_not_read_is_named():
    notes = set()
    turns = [{"role": "user", "content": "q", "id": 1}, {"role": "assistant", "content": "I am {{ name }}."}]
    convert({"messages": turns, "system": None, "url": "x"}, notes=notes)
    assert notes == {"the key 'url' is not used", "the key 'id' of a message is not used", "a {{placeholder}} is not filled in"}


@pytest.mark.parametrize(("record", "named"), [
    ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "label": False},
     "label is false, .*quarantine"),
    ({"prompt": "q", "completion": "a", "image": "x.png"}, "'image'; images and audio are not supported"),
    ({"message_tree_id": "x", "text": "a", "role": "prompter"}, "tree of messages"),
    ({"id": "x", "question": [[{"role": "user", "content": "q"}]], "function": []}, "'question' is a question without an answer"),
    ({"a": {"file_name": "a.json"}, "b": {"file_name": "b.json"}}, "an object of objects, not a record"),
    ({"version": 1, "data": [{"text": "a"}]}, r"""may be within 'data'.*jq -c '.\["data"\]\[\]' FILE"""),
    ({"input_ids": [1], "labels": [1]}, "already tokenized"),
    ({"instruction": "q", "input": float("nan"), "output": "a"}, "NaN is how pandas writes"),
    ({"text": "a\0"}, "a NUL character"),
    ({"messages": {"role": "user"}}, "messages must be a list, not {"),
    ({"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "q"}], "system": "b"}, "two system"),
    ({"q": "a", "a": "b"}, "keys q, a"), ({}, "keys none"),
    ({"instruction": "a", "output": " "}, "output is empty, so there is no answer"),
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
    with pytest.raises(InputError, match=r"columns maps 'promt'.*Did you mean 'prompt'"):
        convert({"question": "a"}, columns={"promt": "question"})
    with pytest.raises(InputError, match="needs objects"):
        convert("plain", format="messages")


READ_AND_REFUSED = {                                    # of the files as published; all others are read whole
    "sft/alpaca_en_shards/alpaca_data-0-3252.json": (3248, "output is empty"),
    "sft/alpaca_zh_shards/alpaca_data-0-3252.zh.json": (3243, "output is empty"),
    "sft/llamafactory/kto_en_demo.json": (150, "label is false"),
    "sft/llamafactory/dpo_en_demo.json": (0, "preference record"),
    "sft/llamafactory/dataset_info.json": (0, "an object of objects"),
    "sft/oasst_en_100_tree.jsonl": (0, "tree of messages"),
    "sft/bfcl/BFCL_v4_simple_python.json": (0, "without an answer"),
    "sft/fastchat/mt_bench_question.jsonl": (0, "no known format has the keys question_id, category, turns"),
    "sft/openai/drone_training.jsonl": (103, ""), "sft/openai/toy_chat_fine_tuning.jsonl": (5, ""),
    "sft/litgpt/dolly.json": (12, ""), "sft/llamafactory/v1_sft_demo.jsonl": (500, ""),
    "sft/llamafactory/glaive_toolcall_en_demo.json": (300, ""), "sft/firefly_dummy_data.jsonl": (33, ""),
}


@pytest.mark.parametrize("name", READ_AND_REFUSED)
def test_published_files_are_read_or_refused_as_what_they_are(shared_data, name):
    accepted, reasons = 0, set()
    for record, _ in Source(str(shared_data / name)).read():
        try:
            convert(record)
            accepted += 1
        except InputError as error:
            reasons.add(error.what)
    expected, reason = READ_AND_REFUSED[name]
    assert accepted == expected
    assert all(reason in what for what in reasons) if reason else not reasons


KEYS = st.sampled_from(["question", "answer", "label", "data", "instances", "text", "messages", "conversations", "role", "content", "from", "value", "instruction", "input",
                        "output", "history", "system", "tools", "prompt", "completion", "tool_calls", "train"])
WORDS = st.sampled_from(["user", "assistant", "human", "gpt", "function_call", "[]", "{}", "x", ""])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12)


@given(st.dictionaries(KEYS, VALUES, max_size=5), st.sampled_from(["auto", *FORMATS]))
def test_any_record_is_read_or_refused(record, format):
    with contextlib.suppress(InputError):
        assert isinstance(convert(record, format=format), Document | Conversation)
