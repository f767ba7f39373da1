"""If this breaks: a client that names an adapter is answered by another one, or adapters that cannot be told apart are served.

Oracle: the engine in this process, with the same adapters.
"""

import pytest

from lit_llm.errors import InputError
from lit_llm.inference.completion import Detokenizer
from lit_llm.inference.engine import Engine
from lit_llm.inference.sampling import SamplingParams
from lit_llm.text.tokenizer import Tokenizer
from serve.__main__ import _adapters
from tests.inference.test_adapters import make
from tests.serve.conftest import ServerProcess


@pytest.fixture(scope="module")
def adapters(tiny_model, tmp_path_factory):
    home = tmp_path_factory.mktemp("served")
    rows = {"red": {"trainable_token_indices": {"embed_tokens": list(range(5, 90)), "lm_head": list(range(5, 90))}}, "blue": {}}
    return {name: make(str(tiny_model("llama")), home / name, seed, **keys) for seed, (name, keys) in enumerate(rows.items())}


def test_each_adapter_is_a_model_of_its_own(tiny_model, adapters):
    base, prompt = str(tiny_model("llama")), [5, 6, 7, 8]
    engine, want = Engine.load(base, adapters=adapters), {}
    for name in (None, *adapters):
        engine.add(str(name), prompt, SamplingParams(max_tokens=8, temperature=0, ignore_eos=True), name)
        want[name] = [event.token_id for _ in range(8) for event in engine.step()]
    tokenizer = Tokenizer.load(base)
    assert want["red"] != want["blue"] != want[None]
    server = ServerProcess("--model", base, "--name", "base", *(
        word for name, folder in adapters.items() for word in ("--adapter", f"{name}={folder}")))
    try:
        assert [card["id"] for card in server.http.get("/v1/models").json()["data"]] == ["base", "red", "blue"]
        for name in (None, "base", *adapters):
            body = {"model": name, "prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
            reply = server.http.post("/v1/completions", json={key: value for key, value in body.items() if value is not None})
            assert reply.status_code == 200, reply.text
            assert reply.json()["model"] == (name or "base")
            detokenizer, ids = Detokenizer(tokenizer, len(prompt)), want[name if name in adapters else None]
            assert reply.json()["choices"][0]["text"] == "".join(
                detokenizer.push(id_, None if at < 7 else "length").text for at, id_ in enumerate(ids))
        refused = server.http.post("/v1/completions", json={"model": "green", "prompt": prompt})
        assert refused.status_code == 404
        assert "'red', 'blue'" in refused.json()["error"]["message"]
    finally:
        server.kill()


def test_options_tell_a_merged_adapter_from_named_ones(adapters):
    red, blue = adapters.values()
    assert _adapters([]) == (None, {})
    assert _adapters([red]) == (red, {})
    assert _adapters([f"red={red}", f"blue={blue}"]) == (None, {"red": red, "blue": blue})
    for folders in ([red, blue], [red, f"blue={blue}"], [f"red={red}", f"red={blue}"]):
        with pytest.raises(InputError, match="different names"):
            _adapters(folders)
    with pytest.raises(InputError, match="not an adapter"):
        _adapters(["red=/nowhere"])
