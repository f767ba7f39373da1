"""If this breaks: a client's mistake comes back as a 500, in a shape its library cannot read, or not at all; or one bad
request takes the server from everybody. Every error here must be OpenAI's `{"error": {message, type, param, code}}`.
"""

import random
import socket

import openai
import pytest

USER = [{"role": "user", "content": "Hi"}]
SECRET = "do-not-repeat-me-" * 40


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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
    ({"messages": USER, "stop": ["a"] * 17}, "stop"), ({"messages": USER, "stop": [""]}, "stop"),
    ({"messages": USER, "stop": ["x" * 1000]}, "stop"), ({"messages": USER, "stop": 5}, "stop"),
    ({"messages": USER, "seed": 2**70}, "seed"), ({"messages": USER, "stream": "yes"}, "stream"),
    ({"messages": USER, "stream_options": {"include_usage": True}}, "stream_options"),
    ({"messages": USER, "n": 0}, "n"), ({"messages": USER, "n": 129}, "n"), ({"messages": USER, "n": 100}, "n"),
    ({"messages": USER, "n": 2, "best_of": 3}, "best_of"), ({"messages": USER, "logprobs": 5}, "logprobs"),
    ({"messages": USER, "logprobs": True, "top_logprobs": 21}, "top_logprobs"), ({"messages": USER, "top_logprobs": 2}, "top_logprobs"),
    ({"messages": USER, "tools": [{"type": "function"}]}, "tools"), ({"messages": USER, "logit_bias": {"5": 101}}, "logit_bias"),
    ({"messages": USER, "logit_bias": {"x": 1}}, "logit_bias"), ({"messages": USER, "logit_bias": {"1" * 5000: 1}}, "logit_bias"),
    ({"messages": USER, "logit_bias": {"-1": 1}, "stream": True}, "logit_bias"), ({"messages": USER, "logit_bias": [5]}, "logit_bias"),
    ({"messages": USER, "stop_token_ids": [10**9], "stream": True}, "stop_token_ids"), ({"messages": USER, "stop_token_ids": 5}, "stop_token_ids"),
    ({"messages": USER, "min_tokens": 9, "max_tokens": 8}, "min_tokens"), ({"messages": USER, "min_p": 1.5}, "min_p"),
    ({"messages": USER, "repetition_penalty": 0}, "repetition_penalty"), ({"messages": USER, "top_k": -2}, "top_k"),
    ({"messages": USER, "seed": 1.5}, "seed"), ({"messages": USER, "seed": True}, "seed"), ({"messages": USER, "ignore_eos": 1}, "ignore_eos"),
    ({"messages": USER, "continue_final_message": True}, "continue_final_message"),
    ({"messages": [*USER, {"role": "assistant", "content": "x"}], "continue_final_message": True, "add_generation_prompt": True},
     "continue_final_message"),
    ({"messages": [{"role": "assistant", "content": "x"}], "continue_final_message": True}, "messages"),
    ({"messages": USER, "response_format": {"type": "xml"}}, "response_format"),
    ({"messages": USER, "presence_penalty": 2.5}, "presence_penalty"), ({"messages": USER, "frequency_penalty": "x"}, "frequency_penalty"),
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
    ({"prompt": [-1]}, "prompt"), ({"prompt": [1, "x"]}, "prompt"), ({"prompt": ["a", [5]]}, "prompt"), ({"prompt": ["a", ""]}, "prompt"), ({"prompt": [True]}, "prompt"),
    ({"prompt": "x", "echo": 1}, "echo"), ({"prompt": "x", "logprobs": 21}, "logprobs"), ({"prompt": [[]]}, "prompt"),
    ({"prompt": "x", "max_tokens": 0}, "max_tokens"), ({"prompt": ["x"] * 3000}, "prompt"), ({"prompt": ["x"] * 97}, "n"),
    ({"prompt": "x", "suffix": "y"}, "suffix"), ({"prompt": [[5], [10**9]]}, "prompt"),
    ({"prompt": [5] * 20_000, "max_tokens": 1}, "prompt"),
])
def test_a_wrong_completion_is_a_400(body, param, server):
    assert shape(server.http.post("/v1/completions", json=body), 400)["param"] == param


@pytest.mark.parametrize(("body", "param"), [
    ({}, "message"), ({"message": ""}, "message"), ({"message": 5}, "message"), ({"message": "x", "max_length": 0}, "max_length"),
    ({"message": "x", "temperature": 3}, "temperature"),
    ({"message": "word " * 25_000}, "message"),
])
def test_a_wrong_chat_is_a_400(body, param, server):
    assert shape(server.http.post("/chat", json=body), 400)["param"] == param


def test_a_prompt_that_does_not_fit_is_refused_in_the_words_that_clients_look_for(server):
    for path, body, field in (("/v1/chat/completions", {"messages": [{"role": "user", "content": "word " * 25_000}]}, "messages"),
                              ("/v1/completions", {"prompt": [5] * 20_000}, "prompt")):
        error = shape(server.http.post(path, json=body), 400)
        assert error["code"] == "context_length_exceeded"
        assert error["message"].startswith("This model's maximum context length is 20000 tokens. However, ")
        assert field in error["message"]


def test_max_tokens_beyond_the_room_is_reduced_to_it(server):
    from lit_llm.inference.sampling import SamplingParams
    from serve.openai.choices import fitted

    fit = fitted([5] * 19_995, SamplingParams(max_tokens=30_000, min_tokens=20_000), 20_000, "prompt")
    assert (fit.max_tokens, fit.min_tokens) == (5, 5)
    assert fitted([5], SamplingParams(max_tokens=7), 20_000, "prompt").max_tokens == 7
    body = {"prompt": "x", "max_tokens": 30_000, "logit_bias": {"70": 100}, "stop_token_ids": [70]}
    assert server.http.post("/v1/completions", json=body).json()["choices"][0]["finish_reason"] == "stop"


def test_unknown_fields_are_ignored_and_named(server, endless_model):
    """In a header, escaped and bounded; `--strict` refuses them. Fields of OpenAI's own service are not named."""
    fields = {"max_tokenz": 5, "bad\r\nname é": 1, "user": "u", "store": True, "cache_prompt": True, SECRET: 5}
    body = {"messages": USER, "max_tokens": 1, "temperature": 0, "reasoning_effort": "low"}
    plain = server.http.post("/v1/chat/completions", json=body | {"reasoning_effort": None})
    assert "x-ignored-fields" not in plain.headers
    for more in ({}, {"stream": True, "stream_options": {"include_usage": True, "chunk": 1}}):
        reply = server.http.post("/v1/chat/completions", json=body | fields | more)
        assert reply.status_code == 200
        assert reply.headers["x-ignored-fields"].split(", ")[:3] == ["max_tokenz", "bad%0D%0Aname%20%C3%A9", "cache_prompt"]
        assert "reasoning_effort" in reply.headers["x-ignored-fields"]
        assert ("stream_options.chunk" in reply.headers["x-ignored-fields"]) == bool(more)
        assert SECRET not in reply.headers["x-ignored-fields"]
    nameless = server.http.post("/chat", json={"message": "x", "max_length": 1, "z": 1, "": 1})    # a header ends with no space
    assert (nameless.status_code, nameless.headers["x-ignored-fields"]) == (200, 'z, ""')
    many = server.http.post("/chat", json={"message": "x", "max_length": 1} | {f"f{at}": 1 for at in range(500)})
    assert many.status_code == 200
    assert len(many.headers["x-ignored-fields"]) < 1000


def test_strict_refuses_unknown_fields(endless_model, caplog):
    """The app that `--strict` builds, without its engine: a refusal needs none, and any other request gets a 503."""
    from fastapi.testclient import TestClient

    from serve.__main__ import _build, parse

    body = {"messages": USER, "max_tokens": 1}
    for words, status in ((["--strict"], 400), ([], 503)):
        server, _ = _build(parse(["--model", endless_model, "--port", str(free_port()), *words]))
        http = TestClient(server.app, base_url="http://127.0.0.1")
        for path, request in (("/v1/completions", {"prompt": "x"}), ("/chat", {"message": "x"}), ("/v1/chat/completions", body)):
            error = shape(http.post(path, json=request | {"other\n": 1}), status)
            assert (error["param"], error["code"]) == (("other\n", "unknown_parameter") if words else (None, "engine_not_ready"))
        assert shape(http.post("/v1/chat/completions", json=body | {"user": "u", "store": True}), 503)
    assert [record.message for record in caplog.records if record.name == "serve"] == ["requests have fields without an effect: other%0A"]


def test_openais_client_raises_its_own_errors(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="endless", prompt=[5] * 20_000, stream=True)
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
             "stream_options", "tools", "message", "max_length", "logit_bias", "logprobs", "echo", "min_tokens", "stop_token_ids",
             "repetition_penalty", "ignore_eos", "continue_final_message"]
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


@pytest.mark.parametrize(("words", "message"), [
    (["--model", "runs/x", "--prot", "80"], "unrecognized arguments: --prot 80. Did you mean '--port'?"),
    (["--model", "runs/rum"], "model: 'runs/rum' is not a local folder and could not be downloaded from the Hugging Face hub. "
                              "Did you mean 'runs/run'?"),
    (["--model", "./rum"], "model: there is no folder ./rum"), (["--port", "80"], "required: --model")])
def test_a_mistake_on_the_command_line_is_one_message(words, message, tmp_path, monkeypatch, capsys):
    from serve.__main__ import main

    (tmp_path / "runs" / "run").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit, match="2"):
        main(words)
    errors = capsys.readouterr().err
    assert message in errors
    assert "usage:" not in errors
    assert "tokenizer" not in errors
