"""If this breaks: a client's mistake comes back as a 500, in a shape its library cannot read, or not at all; or one bad
request takes the server from everybody. Every error here must be OpenAI's `{"error": {message, type, param, code}}`.
"""

import random

import openai
import pytest

USER = [{"role": "user", "content": "Hi"}]
SECRET = "do-not-repeat-me-" * 40


def shape(reply, status):
    assert reply.status_code == status, reply.text[:300]
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert len(reply.content) < 600
    assert SECRET not in reply.text
    return error


@pytest.mark.parametrize(("body", "param"), [
    ({}, "messages"), ({"messages": []}, "messages"), ({"messages": None}, "messages"), ({"messages": "x"}, "messages"),
    ({"messages": [SECRET]}, "messages"), ({"messages": [[]]}, "messages"), ({"messages": [{}]}, "messages"),
    ({"messages": [{"role": SECRET, "content": "x"}]}, "messages"), ({"messages": [{"role": "user"}]}, "messages"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages"), ({"messages": [{"role": "user", "content": [1]}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
    ({"messages": USER, "chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs"),
    ({"messages": USER, "chat_template_kwargs": {SECRET: 1}}, "chat_template_kwargs"),
    ({"messages": USER, "chat_template_kwargs": []}, "chat_template_kwargs"),
    ({"messages": USER, "temperature": "hot"}, "temperature"), ({"messages": USER, "temperature": 2.1}, "temperature"),
    ({"messages": USER, "temperature": -1}, "temperature"), ({"messages": USER, "temperature": True}, "temperature"),
    ({"messages": USER, "top_p": 0}, "top_p"), ({"messages": USER, "top_p": 1.1}, "top_p"),
    ({"messages": USER, "max_tokens": 0}, "max_tokens"), ({"messages": USER, "max_tokens": -1}, "max_tokens"),
    ({"messages": USER, "max_tokens": "9"}, "max_tokens"), ({"messages": USER, "max_tokens": 1.5}, "max_tokens"),
    ({"messages": USER, "stop": ["a"] * 5}, "stop"), ({"messages": USER, "stop": [""]}, "stop"),
    ({"messages": USER, "stop": ["x" * 1000]}, "stop"), ({"messages": USER, "stop": 5}, "stop"),
    ({"messages": USER, "seed": 2**70}, "seed"), ({"messages": USER, "stream": "yes"}, "stream"),
    ({"messages": USER, "stream_options": {"include_usage": True}}, "stream_options"),
    ({"messages": USER, "max_tokenz": 5}, "max_tokenz"), ({"messages": USER, SECRET: 5}, SECRET[:40]),
    ({"messages": USER, "n": 2}, "n"), ({"messages": USER, "logprobs": True}, "logprobs"),
    ({"messages": USER, "tools": [{"type": "function"}]}, "tools"), ({"messages": USER, "logit_bias": {"5": 1}}, "logit_bias"),
    ({"messages": USER, "response_format": {"type": "json_object"}}, "response_format"),
    ({"messages": USER, "presence_penalty": 0.5}, "presence_penalty"),
    ({"messages": USER, "max_tokens": 30_000}, "messages"),
    ({"messages": [{"role": "user", "content": "word " * 25_000}]}, "messages"),
    ({"messages": [{"role": "user", "content": "word " * 25_000}], "stream": True}, "messages"),
])
def test_a_wrong_body_is_a_400_that_names_the_field(body, param, server):
    assert shape(server.http.post("/v1/chat/completions", json=body), 400)["param"] == param


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"5", b"null", b'"x"', b"\xff\xfe", b"[" * 90_000,
                                 b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
                                 b'{"messages": [{"role": "user", "content": "x"}], "model": "\\ud800"}',
                                 b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
                                 b'{"messages": [{"role": "user", "content": "x"}], "metadata": ' + b'{"a":' * 3000 + b"1" + b"}" * 3001,
                                 b'{"messages": [{"role": "user", "content": "x"}], "seed": 1' + b"0" * 5000 + b"}"])
def test_what_is_no_json_or_no_text_is_a_400(raw, server):
    for path in ("/v1/chat/completions", "/v1/completions", "/chat"):
        shape(server.http.post(path, content=raw, headers={"Content-Type": "application/json"}), 400)


def test_a_form_is_told_what_to_send(server):
    assert "application/json" in shape(server.http.post("/chat", data={"message": "Hi"}), 400)["message"]


@pytest.mark.parametrize(("body", "param"), [
    ({}, "prompt"), ({"prompt": ""}, "prompt"), ({"prompt": []}, "prompt"), ({"prompt": [10**9]}, "prompt"),
    ({"prompt": [-1]}, "prompt"), ({"prompt": [1, "x"]}, "prompt"), ({"prompt": ["a", "b"]}, "prompt"), ({"prompt": [True]}, "prompt"),
    ({"prompt": "x", "echo": True}, "echo"), ({"prompt": "x", "logprobs": 1}, "logprobs"), ({"prompt": [[]]}, "prompt"),
    ({"prompt": [5] * 20_000, "max_tokens": 1}, "prompt"),
])
def test_a_wrong_completion_is_a_400(body, param, server):
    assert shape(server.http.post("/v1/completions", json=body), 400)["param"] == param


@pytest.mark.parametrize(("body", "param"), [
    ({}, "message"), ({"message": ""}, "message"), ({"message": 5}, "message"), ({"message": "x", "max_length": 0}, "max_length"),
    ({"message": "x", "temperature": 3}, "temperature"), ({"message": "x", "other": 1}, "other"),
    ({"message": "word " * 25_000}, "message"),
])
def test_a_wrong_chat_is_a_400(body, param, server):
    assert shape(server.http.post("/chat", json=body), 400)["param"] == param


def test_an_overlong_prompt_names_both_numbers(server):
    used = server.http.post("/v1/chat/completions", json={"messages": USER, "max_tokens": 1}).json()["usage"]["prompt_tokens"]
    error = shape(server.http.post("/v1/chat/completions", json={"messages": USER, "max_tokens": 20_000 - used + 1}), 400)
    assert error["code"] == "context_length_exceeded"
    assert "20001" in error["message"]
    assert "context is 20000" in error["message"]


def test_openais_client_raises_its_own_errors(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="endless", messages=USER, max_tokens=30_000, stream=True)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4", messages=USER)
    assert caught.value.code == "model_not_found"


def test_what_is_not_here(server):
    for method, path, status in (("GET", "/nowhere", 404), ("GET", "/v1/chat/completions", 405), ("POST", "/v1/models", 405),
                                 ("GET", "/docs", 404), ("GET", "/info", 404)):
        shape(server.http.request(method, path), status)


def test_a_huge_body_is_a_413(server):
    shape(server.http.post("/chat", json={"message": "x" * 2_000_000}), 413)


def test_the_server_lives_through_nonsense(server):
    """Three hundred random bodies: never a 500, and an honest request is answered after all of them."""
    draw = random.Random(0)
    values = [None, True, -1, 0, 1, 3.5, 1e308, "", "x", "\x00", "😀", [], [1], {}, {"a": 1}, USER, [{"role": "user", "content": None}]]
    names = ["messages", "max_tokens", "temperature", "top_p", "top_k", "stop", "seed", "stream", "n", "model", "prompt",
             "stream_options", "tools", "message", "max_length", "logit_bias"]
    for _ in range(300):
        body = {draw.choice(names): draw.choice(values) for _ in range(draw.randrange(1, 6))}
        if draw.random() < 0.5:
            body |= {"messages": USER}
        if body.get("max_tokens") is None or body.get("max_tokens") == 0:
            body["max_tokens"] = 2
        path = draw.choice(["/v1/chat/completions", "/v1/completions", "/chat"])
        reply = server.http.post(path, json=body)
        assert reply.status_code in (200, 400, 404), (body, reply.text)
    assert server.http.post("/chat", json={"message": "Hi", "max_length": 2}).status_code == 200
    server.until(lambda: server.health() == (200, 0))
