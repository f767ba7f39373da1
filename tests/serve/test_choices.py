"""If this breaks: several answers or prompts of one request get mixed up, log-probabilities belong to other tokens, or options
do not reach the engine. Oracle: plain transformers, in float64 for log-probabilities.
"""

import json

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

USER = [{"role": "user", "content": "什么颜色 is the kite?"}]


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def tokenizer(endless_model):
    return AutoTokenizer.from_pretrained(endless_model)


@pytest.fixture(scope="module")
def model(endless_model):
    return AutoModelForCausalLM.from_pretrained(endless_model).eval()


def chat(client, **options):
    return client.chat.completions.create(model="endless", messages=USER, **({"temperature": 0, "max_tokens": 8} | options))


def complete(client, prompt, **options):
    return client.completions.create(model="endless", prompt=prompt, **({"temperature": 0, "max_tokens": 8} | options))


def log_softmax(model, ids):
    """(T, V) before each token but the first."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)


def chunks_by_index(stream):
    """Chunks of each choice, and the others."""
    parts, others = {}, []
    for chunk in stream:
        if not chunk.choices:
            others.append(chunk)
        for choice in chunk.choices:
            parts.setdefault(choice.index, []).append(choice)
    return parts, others


def test_n_answers_are_those_of_the_seeds_that_follow(client):
    options = {"temperature": 1.0, "max_tokens": 12}
    alone = [chat(client, seed=5 + at, **options) for at in range(3)]
    together = chat(client, seed=5, n=3, **options)
    assert [choice.index for choice in together.choices] == [0, 1, 2]
    for choice, one in zip(together.choices, alone, strict=True):
        assert choice.message == one.choices[0].message
        assert choice.finish_reason == one.choices[0].finish_reason
    assert len({choice.message.content for choice in together.choices}) > 1
    assert together.usage.prompt_tokens == alone[0].usage.prompt_tokens
    assert together.usage.completion_tokens == sum(one.usage.completion_tokens for one in alone)
    parts, (accounts,) = chunks_by_index(chat(client, seed=5, n=3, stream=True, stream_options={"include_usage": True}, **options))
    assert accounts.usage == together.usage
    for choice in together.choices:
        mine = parts[choice.index]
        assert "".join(part.delta.content or "" for part in mine) == choice.message.content
        assert [part.delta.role for part in mine if part.delta.role] == ["assistant"]
        assert [part.finish_reason for part in mine if part.finish_reason] == [choice.finish_reason]


def test_prompts_of_a_list_are_answered_in_order(client, tokenizer):
    texts = ["The kite", "风筝 is", "A", "The kite"]
    alone = [complete(client, text) for text in texts]
    for prompts in (texts, [tokenizer(text)["input_ids"] for text in texts]):
        got = complete(client, prompts, n=2, seed=1)
        assert [choice.index for choice in got.choices] == list(range(8))
        assert [choice.text for choice in got.choices] == [one.choices[0].text for one in alone for _ in range(2)]
        assert got.usage.prompt_tokens == sum(one.usage.prompt_tokens for one in alone)
        parts, _ = chunks_by_index(complete(client, prompts, stream=True))
        assert ["".join(part.text for part in parts[at]) for at in range(4)] == [one.choices[0].text for one in alone]


def test_chat_logprobs_are_the_models(client, tokenizer, model):
    prompt = tokenizer.apply_chat_template(USER, add_generation_prompt=True, return_dict=True)["input_ids"]
    answer = chat(client, logprobs=True, top_logprobs=4, max_tokens=24)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    ids = list(prompt)
    for token in content:
        (expected,) = log_softmax(model, [*ids, 0])[-1:]
        best = expected.topk(4)
        assert token.logprob == pytest.approx(float(best.values[0]), abs=1e-5)      # greedy
        assert [alternative.logprob for alternative in token.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-5)
        assert token.token == token.top_logprobs[0].token
        assert token.token.startswith("bytes:") or token.token.encode() == bytes(token.bytes)
        ids.append(int(best.indices[0]))
    text = b"".join(bytes(token.bytes) for token in content).decode(errors="replace")
    assert text.rstrip("\ufffd") == answer.choices[0].message.content.rstrip("\ufffd")
    parts, _ = chunks_by_index(chat(client, logprobs=True, top_logprobs=4, max_tokens=24, stream=True))
    streamed = [token for part in parts[0] if part.logprobs for token in part.logprobs.content]
    assert streamed == content
    assert chat(client, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []
    assert chat(client).choices[0].logprobs is None


def test_echo_scores_the_prompt(client, tokenizer, model):
    """What lm-eval asks for: log-probabilities of the tokens of a prompt, and whether each is the most likely one."""
    prompt = "The kite 风筝 is é red"
    ids = tokenizer(prompt)["input_ids"]
    got = complete(client, ids, echo=True, logprobs=3, max_tokens=1)
    table = got.choices[0].logprobs
    expected = log_softmax(model, ids)
    assert len(table.tokens) == len(table.token_logprobs) == len(table.top_logprobs) == len(table.text_offset) == len(ids) + 1
    assert (table.token_logprobs[0], table.top_logprobs[0]) == (None, None)
    for at, id_ in enumerate(ids[1:], 1):
        assert table.token_logprobs[at] == pytest.approx(float(expected[at - 1, id_]), abs=1e-5)
        assert max(table.top_logprobs[at].values()) == pytest.approx(float(expected[at - 1].max()), abs=1e-5)
        assert (table.token_logprobs[at] == max(table.top_logprobs[at].values())) == (int(expected[at - 1].argmax()) == id_)
        assert 3 <= len(table.top_logprobs[at]) <= 4
        assert table.top_logprobs[at][table.tokens[at]] == table.token_logprobs[at]
    text = got.choices[0].text
    assert text.startswith(prompt)
    for token, offset in zip(table.tokens, table.text_offset, strict=True):
        assert token.startswith("bytes:") or text[offset:offset + len(token)] == token
    spelled = complete(client, prompt, echo=True, max_tokens=1)
    assert (spelled.choices[0].text, spelled.choices[0].logprobs) == (text, None)
    only = complete(client, ids, echo=True, logprobs=3, max_tokens=0)
    assert (only.choices[0].text, only.choices[0].finish_reason, only.usage.completion_tokens) == (prompt, "length", 0)
    assert only.choices[0].logprobs.token_logprobs == table.token_logprobs[:-1]
    parts, _ = chunks_by_index(complete(client, [ids, ids[:3]], echo=True, logprobs=3, max_tokens=1, stream=True))
    assert "".join(part.text for part in parts[0]) == text
    streamed = [value for part in parts[0] if part.logprobs for value in part.logprobs.token_logprobs]
    assert streamed == table.token_logprobs
    assert [at for part in parts[0] if part.logprobs for at in part.logprobs.text_offset] == table.text_offset


def test_options_reach_the_engine(client, tokenizer, model):
    """Each against `generate` with the same option; a bias that only one token survives; a stop token; least and most tokens."""
    ids = tokenizer("The kite")["input_ids"]

    def generated(**options):
        out = model.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False, eos_token_id=[], pad_token_id=0, **options)
        return tokenizer.decode(out[0, len(ids):], skip_special_tokens=True)

    def completed(**options):
        return complete(client, ids, max_tokens=16, extra_body={"ignore_eos": True} | options.pop("extra_body", {}), **options).choices[0]

    assert completed(extra_body={"repetition_penalty": 1.5}).text.rstrip("\ufffd") == generated(repetition_penalty=1.5).rstrip("\ufffd")
    assert completed(logit_bias={"70": 5, "71": -7.5}).text.rstrip("\ufffd") == (
        generated(sequence_bias={(70,): 5.0, (71,): -7.5}).rstrip("\ufffd"))
    (only,) = tokenizer("z")["input_ids"]
    assert completed(logit_bias={str(only): 100}).text == "z" * 16
    answer = []
    for _ in range(16):                             # OpenAI's formula, token by token
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + answer])).logits[0, -1].double()
        for id_ in set(answer):
            logits[id_] -= 1.5 + 0.5 * answer.count(id_)
        answer.append(int(logits.argmax()))
    text = completed(presence_penalty=1.5, frequency_penalty=0.5).text
    assert text.rstrip("\ufffd") == tokenizer.decode(answer, skip_special_tokens=True).rstrip("\ufffd") != completed().text.rstrip("\ufffd")
    once = completed(logit_bias={str(only): 100}, extra_body={"stop_token_ids": [only]})
    assert (once.text, once.finish_reason) == ("", "stop")
    for least, text, reason in ((0, "", "stop"), (2, "z", "stop"), (20, "z" * 16, "length")):
        body = {"min_tokens": min(least, 16)}
        got = complete(client, ids, max_tokens=16, stop=["zz"], logit_bias={str(only): 100}, extra_body=body).choices[0]
        assert (got.text, got.finish_reason) == (text, reason)
    top = complete(client, ids, temperature=1.5, seed=3, extra_body={"top_k": 1}).choices[0].text
    assert top == complete(client, ids).choices[0].text
    unlimited = [complete(client, ids, temperature=1.5, seed=seed, extra_body={"top_k": k}).choices[0].text for seed, k in ((3, -1), (3.0, 0))]
    assert unlimited[0] == unlimited[1] != top


def test_a_client_that_leaves_frees_all_its_answers(server):
    body = {"messages": USER, "max_tokens": 15_000, "n": 6, "stream": True, "ignore_eos": True}
    with server.http.stream("POST", "/v1/chat/completions", json=body) as reply:
        lines = reply.iter_lines()
        seen = set()
        while len(seen) < 6:
            if (line := next(lines)).startswith("data: {"):
                seen |= {choice["index"] for choice in json.loads(line[6:])["choices"] if choice["delta"].get("content")}
        assert server.health()[1] == 6
    server.until(lambda: server.health() == (200, 0))
