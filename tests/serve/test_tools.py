"""If this breaks: agents get calls as text, calls of other functions, arguments that their schema refuses, or half a call in a
stream; a JSON answer does not parse; one client's schema stops the answers of the others.

The model is real and was trained on a conversation with calls, so that it calls by itself. Clients: the `openai` package, and
plain HTTP. Oracle of schemas: the `jsonschema` package.
"""

import copy
import json
import threading
import time
from pathlib import Path

import jsonschema
import openai
import pydantic
import pytest
from calling import ASKED, BOTH, CALLS, NOTE, QUICK, RESULTS, SCHEMAS, TOOLS, WEATHER

PERSON = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
          "required": ["name", "age"], "additionalProperties": False}


@pytest.fixture(scope="module")
def client(calling):
    return openai.OpenAI(base_url=f"{calling.url}/v1", api_key="none", max_retries=0)


def chat(client, messages=(ASKED,), **options):
    return client.chat.completions.create(model="calling", messages=list(messages), **({"temperature": 0, "max_tokens": 300} | options))


def assembled(stream):
    """The message of a stream, as a client joins its chunks, and the finish reason."""
    content = reasoning = ""
    calls, reason = [], None
    for chunk in stream:
        (choice,) = chunk.choices
        content += choice.delta.content or ""
        reasoning += getattr(choice.delta, "reasoning_content", None) or ""
        for part in choice.delta.tool_calls or ():
            if part.id:
                assert part.index == len(calls)
                calls.append([part.id, part.function.name, ""])
            calls[part.index][2] += part.function.arguments
        reason = reason or choice.finish_reason
    return content, reasoning, calls, reason


def read(calls):
    return [(call.function.name, json.loads(call.function.arguments)) for call in calls or ()]


def valid(calls):
    """Every call has arguments that its schema allows."""
    for name, arguments in calls:
        jsonschema.validate(arguments, SCHEMAS[name])
    return [name for name, _ in calls]


def test_trained_calls_are_answered_and_their_results_are_read(client):
    answer = chat(client, tools=TOOLS).choices[0]
    assert answer.finish_reason == "tool_calls"
    message = answer.message
    assert (message.content, message.reasoning_content, read(message.tool_calls)) == ("I look.", "Two places.", CALLS)
    ids = [call.id for call in message.tool_calls]
    assert len(set(ids)) == 2
    back = message.model_dump(exclude_none=True)
    results = [result | {"tool_call_id": id_} for result, id_ in zip(RESULTS, ids, strict=True)]
    last = chat(client, [ASKED, back, *results], tools=TOOLS).choices[0]
    assert (last.message.content, last.message.tool_calls, last.finish_reason) == ("Wet.", None, "stop")


def test_calls_come_in_pieces(client):
    chunks = list(chat(client, tools=TOOLS, stream=True))
    content, reasoning, calls, reason = assembled(chunks)
    assert (content, reasoning, reason) == ("I look.", "Two places.", "tool_calls")
    assert [(name, json.loads(arguments)) for _, name, arguments in calls] == CALLS
    pieces = [part for chunk in chunks for part in chunk.choices[0].delta.tool_calls or () if not part.id]
    assert len(pieces) > 2 * len(CALLS)                 # not each in one piece


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_required_and_named_functions_are_called_with_valid_arguments(seed, stream, client):
    """The prompt is unknown to the model, and it draws at random: only the grammar makes it call."""
    messages = [{"role": "user", "content": "Tom has a kite."}]

    def calls(**options):
        answer = chat(client, messages, tools=TOOLS, temperature=1.5, seed=seed, stream=stream, extra_body=QUICK, **options)
        if stream:
            _, _, tool_calls, reason = assembled(answer)
            return [(name, json.loads(arguments)) for _, name, arguments in tool_calls], reason
        return read(answer.choices[0].message.tool_calls), answer.choices[0].finish_reason

    tool_calls, reason = calls(tool_choice="required", parallel_tool_calls=False)
    assert len(valid(tool_calls)) == 1
    assert reason == "tool_calls"
    for name in SCHEMAS:
        tool_calls, reason = calls(tool_choice={"type": "function", "function": {"name": name}})
        assert (valid(tool_calls), reason) == ([name], "tool_calls")


def test_required_allows_several_calls(client):
    message = chat(client, [BOTH], tools=TOOLS, tool_choice="required").choices[0].message
    assert read(message.tool_calls) == CALLS
    assert message.content is None


def test_one_call_at_most_and_none(client):
    message = chat(client, tools=TOOLS, parallel_tool_calls=False).choices[0].message
    assert (message.content, read(message.tool_calls)) == ("I look.", CALLS[:1])
    message = chat(client, tools=TOOLS, tool_choice="none", max_tokens=40).choices[0].message
    assert message.tool_calls is None


def test_strict_tools_keep_to_their_schema(client):
    """The trained answer has a city that this schema refuses."""
    strict = copy.deepcopy(WEATHER)
    strict["function"]["strict"] = True
    strict["function"]["parameters"]["properties"]["city"] = {"enum": ["Oslo", "Rome"]}
    message = chat(client, tools=[strict, NOTE]).choices[0].message
    assert message.content == "I look."
    assert {arguments["city"] for _, arguments in read(message.tool_calls)} <= {"Oslo", "Rome"}
    assert message.tool_calls


def test_json_answers(client):
    for seed in range(4):
        for response_format in ({"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON, "strict": True}}):
            answer = chat(client, [{"role": "user", "content": "Tom?"}], response_format=response_format, temperature=1.0, seed=seed, max_tokens=2000,
                          extra_body=QUICK)
            parsed = json.loads(answer.choices[0].message.content)
            assert isinstance(parsed, dict)
            if response_format["type"] == "json_schema":
                jsonschema.validate(parsed, PERSON)


def test_pydantic_models_are_parsed(client):
    class Person(pydantic.BaseModel):
        name: str = pydantic.Field(max_length=6)
        kind: list[str] = pydantic.Field(max_length=0)

    parsed = client.chat.completions.parse(model="calling", messages=[ASKED], response_format=Person, temperature=1, seed=1, max_tokens=400,
                                           extra_body=QUICK)
    assert isinstance(parsed.choices[0].message.parsed, Person)
    tool = openai.pydantic_function_tool(Person)
    parsed = client.chat.completions.parse(model="calling", messages=[ASKED], tools=[tool], tool_choice="required", temperature=1, seed=1,
                                           parallel_tool_calls=False, max_tokens=400, extra_body=QUICK)
    assert isinstance(parsed.choices[0].message.tool_calls[0].function.parsed_arguments, Person)


def test_max_tokens_ends_a_call(client):
    for size in (12, 25, 40):
        answer = chat(client, tools=TOOLS, tool_choice={"type": "function", "function": {"name": "note"}}, max_tokens=size).choices[0]
        assert answer.finish_reason in ("length", "tool_calls")
        assert "tool_call" not in (answer.message.content or "")


SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "strict": True}}


def json_answer(schema):
    return {"response_format": {**SCHEMA, "json_schema": SCHEMA["json_schema"] | {"schema": schema}}}


def deep(levels):
    schema = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


REFUSED = {
    "no function": ({"tools": [{"type": "function"}]}, "tools", "a tool must be"),
    "a bad name": ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools", "letters"),
    "two of a name": ({"tools": [NOTE, NOTE]}, "tools", "two functions 'note'"),
    "many tools": ({"tools": [NOTE] * 200}, "tools", "at most 128"),
    "required without tools": ({"tool_choice": "required"}, "tool_choice", "needs tools"),
    "an unknown function": ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "no function 'x'"),
    "an unknown choice": ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice", "must be none"),
    "an unknown format": ({"response_format": {"type": "xml"}}, "response_format", "json_object"),
    "no schema": ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema must be"),
    "a remote reference": (json_answer({"$ref": "http://127.0.0.1:9/a.json"}), "response_format", "the same schema"),
    "a file": (json_answer({"type": "object", "properties": {"a": {"$ref": "file:///etc/passwd"}}}), "response_format", "the same schema"),
    "a reference to itself": (json_answer({"$ref": "#"}), "response_format", "no text satisfies it"),
    "a circle": (json_answer({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}), "response_format", "no text"),
    "a missing reference": (json_answer({"$ref": "#/$defs/a"}), "response_format", "cannot be enforced"),
    "deep": (json_answer(deep(60)), "response_format", "levels deep"),
    "large": (json_answer({"enum": ["x" * 50] * 4000}), "response_format", "characters"),
    "many values": (json_answer({"enum": list(range(6000))}), "response_format", "values"),
    "long": (json_answer({"type": "string", "minLength": 10**9}), "response_format", "10,000"),
    "a long pattern": (json_answer({"type": "string", "pattern": "(a|b)*" * 200}), "response_format", "pattern"),
    "a pattern that looks ahead": (json_answer({"type": "string", "pattern": "(?=a)b"}), "response_format", "regex"),
    "combinations": (json_answer({"allOf": [{"anyOf": [{"properties": {f"{n}{m}": {"const": m}}} for m in range(8)]} for n in range(8)]}),
                     "response_format", "too large"),
    "an impossible one": (json_answer({"type": "object", "properties": {"a": False}, "required": ["a"]}), "response_format", "cannot be enforced"),
    "not enforceable": (json_answer({"type": "array", "uniqueItems": True}), "response_format", "uniqueItems"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_impossible_requirements_are_a_400_that_says_why(kind, calling):
    options, param, words = REFUSED[kind]
    for stream in (False, True):
        reply = calling.http.post("/v1/chat/completions", json={"messages": [ASKED], "max_tokens": 5, "stream": stream, **options})
        assert reply.status_code == 400, reply.text[:300]
        error = reply.json()["error"]
        assert error["param"] == param
        assert words in error["message"]
        assert len(error["message"]) < 400


HEAVY = {
    "nested repetition": {"type": "string", "pattern": "^(a+)+$"},
    "large repetition": {"type": "string", "pattern": "^(.*a.{20}){20}$"},
    "counted": {"type": "string", "pattern": "^(a{1,9999}){1,9999}$"},
    "long lists": {"type": "array", "minItems": 900, "items": {"type": "array", "minItems": 900, "items": {"type": "string"}}},
    "doubling": {"$defs": {f"d{n}": {"type": "object", "properties": {key: {"$ref": f"#/$defs/d{n + 1}"} for key in "ab"}} for n in range(40)}
                 | {"d40": {}}, "$ref": "#/$defs/d0"},
    "many properties": {"type": "object", "properties": {f"p{n}": {"type": "string", "pattern": "^(a|b)*c{0,100}$"} for n in range(900)}},
    "many choices": {"oneOf": [{"const": f"x{n}"} for n in range(1500)]},
}


def test_a_heavy_schema_stops_no_other_answer(calling, client):
    """Streams of others go on while heavy schemas are compiled and followed; each heavy request ends."""
    gaps, done = [], threading.Event()

    def stream():
        last = time.monotonic()
        while not done.is_set():
            for _ in chat(client, stream=True, max_tokens=200, temperature=1):
                gaps.append(time.monotonic() - last)
                last = time.monotonic()

    alone = chat(client, tools=TOOLS).choices[0].message
    other = threading.Thread(target=stream)
    other.start()
    try:
        for schema in HEAVY.values():
            reply = calling.http.post("/v1/chat/completions", json={"messages": [ASKED], "max_tokens": 60, "temperature": 1, **json_answer(schema)})
            assert reply.status_code in (200, 400, 500), reply.text[:300]
    finally:
        done.set()
        other.join()
    assert len(gaps) > 20
    assert max(gaps) < 10
    assert read(chat(client, tools=TOOLS).choices[0].message.tool_calls) == read(alone.tool_calls)
    calling.until(lambda: calling.health() == (200, 0))


def test_a_template_without_tools_is_refused_with_the_reason(server):
    reply = server.http.post("/v1/chat/completions", json={"messages": [ASKED], "tools": TOOLS, "max_tokens": 3})
    assert reply.status_code == 400
    assert "does not support tools" in reply.json()["error"]["message"]


def test_the_answers_of_a_backend_are_read_too(calling, start_front):
    """Marks of calls are special tokens, which a backend leaves out of its text unless it is asked for them."""
    words = Path(f"/proc/{calling.process.pid}/cmdline").read_text().split("\0")
    front = start_front(words[words.index("--model") + 1], f"{calling.url}/v1")
    whole, direct = (chat(openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0), tools=TOOLS)
                     for server in (front, calling))
    message = whole.choices[0].message
    assert (message.content, message.reasoning_content, read(message.tool_calls)) == ("I look.", "Two places.", CALLS)
    assert (whole.choices[0].finish_reason, whole.usage) == ("tool_calls", direct.usage)
    for fields, param in (({"tools": TOOLS, "tool_choice": "required"}, "tools"), ({"logprobs": True}, "logprobs"),
                        ({"response_format": {"type": "json_object"}}, "response_format")):
        reply = front.http.post("/v1/chat/completions", json={"messages": [ASKED], **fields})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
        assert "backend" in reply.json()["error"]["message"]
