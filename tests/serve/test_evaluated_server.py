"""If this breaks: `evaluate --url` reports other figures for a served model than the model itself has."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest

from lit_llm import InputError
from lit_llm.evaluation.command import evaluate

RECORDS = [{"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"风筝 {n} " * (n + 1)}]}
           for n in range(5)] + [{"text": "Tom has a red kite. " * 12}]


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    return [str(tmp_path / "texts.jsonl")]


def test_a_server_is_measured_as_its_model_is(server, endless_model, texts, tmp_path):
    text = evaluate([endless_model], texts, url=server.url, seq_len=64, out=str(tmp_path / "r.json"))
    facts = json.loads((tmp_path / "r.json").read_text())
    local, remote = facts["models"]
    tokens = np.array(local["sums"]["tokens"])
    assert np.abs(np.array(local["sums"]["nll"]) - remote["sums"]["nll"]).max() <= 1e-5 * tokens.min()
    assert remote["sums"]["correct"] == local["sums"]["correct"]
    assert remote["measured"]["model"]["kind"] == "server"
    assert abs(facts["differences"][0]["nll"]["value"]) < 1e-5
    assert facts["differences"][0]["worse"] == 0
    assert f"{server.url} against {endless_model}" in text
    evaluate([], texts, url=server.url, tokenizer=endless_model, seq_len=64, out=str(tmp_path / "alone.json"))
    assert json.loads((tmp_path / "alone.json").read_text())["models"][0]["nll"] == remote["nll"]


def test_word_perplexity_of_a_server(server, endless_model, tmp_path):
    (tmp_path / "texts.jsonl").write_text(json.dumps(RECORDS[-1]))
    evaluate([endless_model], [str(tmp_path / "texts.jsonl")], url=server.url, rolling="text", seq_len=32, out=str(tmp_path / "r.json"))
    local, remote = json.loads((tmp_path / "r.json").read_text())["models"]
    assert remote["word_perplexity"]["value"] == pytest.approx(local["word_perplexity"]["value"], rel=1e-4)


class WithoutEcho(BaseHTTPRequestHandler):
    """A server of the same interface that ignores `echo`, as some do."""

    def do_GET(self):
        self.answer({"data": [{"id": "other"}]})

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer({"choices": [{"text": "!", "logprobs": {"token_logprobs": [-0.5], "top_logprobs": None}}]})

    def answer(self, body):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *words):
        """Nothing."""


def test_a_server_without_log_probabilities_of_prompts_is_refused(endless_model, texts):
    with HTTPServer(("127.0.0.1", 0), WithoutEcho) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        with pytest.raises(InputError, match="log-probabilities"):
            evaluate([], texts, url=f"http://127.0.0.1:{other.server_port}", tokenizer=endless_model, seq_len=64)
        other.shutdown()
