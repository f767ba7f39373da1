"""If this breaks: published perplexities are wrong, or a model that got worse is reported as better."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_llm import InputError
from lit_llm.evaluation.command import evaluate
from lit_llm.text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
LONG = "Tom has a red kite. 小明有一只红色的风筝。 " * 6


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Conversations and documents, one of them longer than the window of 64 tokens."""
    folder = tmp_path_factory.mktemp("texts")
    chats = [{"messages": [{"role": "user", "content": f"say {n} times ok"},
                           {"role": "assistant", "content": "ok " * (n % 5) + "风筝" * (n % 3) + str(n)}]} for n in range(9)]
    documents = [{"text": LONG}, *({"text": f"The kite number {n} flies. 风筝{n}"} for n in range(5))]
    for name, records in (("chats", chats), ("documents", documents)):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    return folder


@pytest.fixture(scope="module")
def tuned(tiny_model, tmp_path_factory):
    """A LoRA adapter with random weights on the tiny Llama, in PEFT's format."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("adapter") / "tuned"
    torch.manual_seed(3)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model("llama")),
                           LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    model.save_pretrained(folder)
    return str(folder)


def oracle(folder, texts, adapter=None):
    """(nll, tokens, correct, bytes, characters) of each record by transformers in float64, each computed alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").double()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).double()
    hf = AutoTokenizer.from_pretrained(folder)
    for file in ("chats", "documents"):
        for line in (texts / f"{file}.jsonl").read_text().splitlines():
            record, nll, tokens, correct, spelled = json.loads(line), 0.0, 0, 0, b""
            if file == "chats":
                question, answer = record["messages"]
                prompt = f"<|im_start|>user\n{question['content']}<|im_end|>\n<|im_start|>assistant\n"
                before = hf.encode(prompt)
                ids = before + hf.encode(f"{answer['content']}<|im_end|>")
                windows, text = [(0, len(ids), len(before))], answer["content"].encode()
            else:
                ids = hf.encode(record["text"])
                windows = [(at, min(at + 64, len(ids)), at + 1) for at in range(0, max(1, len(ids) - 1), 63)]
                text = record["text"].encode()[len(hf.decode(ids[:1]).encode()):]
            for start, stop, scored in windows:
                with torch.no_grad():
                    logp = model(torch.tensor([ids[start:stop]])).logits[0, start - stop:].log_softmax(-1)
                for place in range(scored, stop):
                    row = logp[place - start - 1]
                    nll, tokens, correct = nll - float(row[ids[place]]), tokens + 1, correct + int(row.argmax() == ids[place])
            spelled = text.decode("utf-8", "ignore")
            yield nll, tokens, correct, len(text), len(spelled)


def measured(out, *models, **options):
    evaluate([*map(str, models)], **options, out=str(out))
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def of_both(texts, tuned, tmp_path_factory):
    """The adapter and its base in float64, in one pass."""
    files = [str(texts / "chats.jsonl"), str(texts / "documents.jsonl")]
    return measured(tmp_path_factory.mktemp("out") / "r.json", tuned, data=files, seq_len=64, dtype="float64")


def test_figures_are_those_of_transformers_in_float64(of_both, tiny_model, texts, tuned):
    for found, adapter in zip(of_both["models"], (tuned, None), strict=True):
        expected = np.array(list(oracle(tiny_model("llama"), texts, adapter)))
        nll, tokens, correct, size, characters = expected.sum(0)
        assert found["nll"]["value"] == pytest.approx(nll / tokens, abs=1e-6)
        assert found["nll"]["tokens"] == tokens
        assert found["perplexity"]["value"] == pytest.approx(math.exp(nll / tokens), rel=1e-6)
        assert found["token_accuracy"]["value"] == pytest.approx(correct / tokens)
        assert found["bits_per_byte"]["value"] == pytest.approx(nll / math.log(2) / size, abs=1e-6)
        assert found["bits_per_character"]["value"] == pytest.approx(nll / math.log(2) / characters, abs=1e-6)
        assert found["sums"]["nll"] == pytest.approx(expected[:, 0], abs=1e-5)
        assert found["nll"]["low"] < found["nll"]["value"] < found["nll"]["high"]
        chats = found["by_source"][str(texts / "chats.jsonl")]
        assert chats["nll"]["value"] == pytest.approx(expected[:9, 0].sum() / expected[:9, 1].sum(), abs=1e-6)


def test_the_difference_to_the_base_is_that_of_two_evaluations(of_both, tiny_model, texts, tuned, tmp_path):
    one, other = (np.array(list(oracle(tiny_model("llama"), texts, adapter))) for adapter in (tuned, None))
    (difference,) = of_both["differences"]
    assert difference["nll"]["value"] == pytest.approx((one[:, 0] - other[:, 0]).sum() / one[:, 1].sum(), abs=1e-6)
    risen = (one[:, 0] - other[:, 0]) / one[:, 1]
    assert (difference["worse"], difference["documents"]) == (int((risen > 1e-5).sum()), 15)
    expected = [unit for unit in np.argsort(-risen) if risen[unit] > 1e-5][:10]
    assert [each["unit"] for each in difference["worst"]] == expected
    worst = difference["worst"][0]
    place = f"{texts / ('chats' if worst['unit'] < 9 else 'documents')}.jsonl:{worst['unit'] % 9 + 1}"
    assert worst["place"] == place
    assert worst["excerpt"].isprintable()
    alone = measured(tmp_path / "base.json", tiny_model("llama"), seq_len=64, dtype="float64",
                     data=[str(texts / "chats.jsonl"), str(texts / "documents.jsonl")])
    assert alone["models"][0]["sums"]["nll"] == pytest.approx(of_both["models"][1]["sums"]["nll"], abs=1e-6)


def test_batches_and_packing_change_nothing(of_both, texts, tuned, tmp_path):
    files = [str(texts / "chats.jsonl"), str(texts / "documents.jsonl")]
    other = measured(tmp_path / "r.json", tuned, data=files, seq_len=64, dtype="float64", batch_size=1)
    assert other["models"][0]["sums"]["nll"] == pytest.approx(of_both["models"][0]["sums"]["nll"], abs=1e-6)


def test_windows_advance_by_the_stride(tiny_model, texts, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = measured(tmp_path / "r.json", tiny_model("llama"), data=[str(texts / "documents.jsonl")], seq_len=64, stride=16,
                     dtype="float64")["models"][0]
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama")).double()
    ids = AutoTokenizer.from_pretrained(tiny_model("llama")).encode(LONG)
    expected, scored, start = 0.0, 1, 0
    while scored < len(ids):
        stop = min(start + 64, len(ids))
        with torch.no_grad():
            logp = model(torch.tensor([ids[start:stop]])).logits[0].log_softmax(-1)
        expected -= sum(float(logp[place - start - 1, ids[place]]) for place in range(scored, stop))
        scored, start = stop, start + 16
    assert found["sums"]["nll"][0] == pytest.approx(expected, abs=1e-5)
    assert found["sums"]["tokens"][0] == len(ids) - 1
    assert found["measured"]["windows"]["stride"] == 16


def test_figures_by_answer_and_by_position(tiny_model, tmp_path):
    """The parts add up to the whole, and each is that of the answers and tokens that it names."""
    turns = [{"role": role, "content": f"{role} {n} of them"} for n in range(3) for role in ("user", "assistant")]
    (tmp_path / "turns.jsonl").write_text("\n".join(json.dumps({"messages": turns[:2 * (1 + n % 3)]}) for n in range(6)))
    data = [str(tmp_path / "turns.jsonl")]
    found = measured(tmp_path / "r.json", tiny_model("llama"), data=data, dtype="float64")["models"][0]
    assert [found["by_answer"][name]["documents"] for name in "123"] == [6, 4, 2]
    for groups in (found["by_answer"], found["by_position"]):
        assert sum(part["tokens"] for part in groups.values()) == found["nll"]["tokens"]
        assert sum(part["nll"] * part["tokens"] for part in groups.values()) == pytest.approx(sum(found["sums"]["nll"]))
    (tmp_path / "one.jsonl").write_text("\n".join([json.dumps({"messages": turns[:2]})] * 6))
    alone = measured(tmp_path / "o.json", tiny_model("llama"), data=[str(tmp_path / "one.jsonl")], dtype="float64")["models"][0]
    assert found["by_answer"]["1"]["nll"] == pytest.approx(alone["nll"]["value"])
    assert "by position" in evaluate([tiny_model("llama")], data)


def test_a_full_fine_tune_is_compared_with_the_base_that_is_given(tiny_model, texts, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "full"
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    with torch.no_grad():
        model.lm_head.weight *= 1.5
    model.save_pretrained(folder)
    Tokenizer.load(tiny_model("llama")).save(folder)
    data = [str(texts / "documents.jsonl")]
    found = measured(tmp_path / "r.json", folder, base=tiny_model("llama"), data=data)
    ours, base = (np.array(model["sums"]["nll"]) for model in found["models"])
    assert found["models"][1]["is_base"]
    tokens = sum(found["models"][0]["sums"]["tokens"])
    assert found["differences"][0]["nll"]["value"] == pytest.approx((ours - base).sum() / tokens)
    text = evaluate([tiny_model("llama"), str(folder)], data)
    assert f"{folder} against {tiny_model('llama')}" in text


@pytest.mark.slow
def test_a_run_is_measured_as_its_own_validation_did_and_the_readme_runs(lit_llm, tmp_path):
    done = lit_llm("fit", "--config", "sft.yaml", "--trainer.max_steps", 2, "--trainer.strategy", "auto", "--trainer.accelerator", "cpu")
    assert done.code == 0, done.err
    values = json.loads((tmp_path / "runs" / "sft" / "metrics.json").read_text())
    for name, record in (("my_chats", {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}),
                         ("my_texts", {"text": "The kite of Tom is red."})):
        (tmp_path / f"{name}.jsonl").write_text(f"{json.dumps(record)}\n" * 3)
    readme = (ROOT / "lit_llm" / "evaluation" / "README.md").read_text()
    commands = readme.split("```sh\n")[1].split("```")[0].strip().splitlines()
    for command in commands:
        done = lit_llm(*command.split()[3:], *(("--out", "run.json") if command.endswith("runs/sft") else ()))
        assert done.code == 0, done.err
    assert "runs/sft/export against" not in done.out
    assert "sample:base against runs/sft/export" in done.out
    run, base = json.loads((tmp_path / "run.json").read_text())["models"]
    for name in ("nll", "perplexity", "bits_per_byte", "token_accuracy"):
        assert run[name]["value"] == pytest.approx(values[f"val/{name}"], rel=1e-6), name
        assert base[name]["value"] == pytest.approx(values[f"before/val/{name}"], rel=1e-6), name
    assert run["nll"]["tokens"] == values["val/tokens"]


def test_a_prompt_is_measured_with_its_virtual_tokens_and_without(tiny_model, texts, tmp_path):
    from peft import PromptTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(5)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model("llama")),
                           PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    model.save_pretrained(tmp_path / "prompt")
    data = [str(texts / "chats.jsonl"), str(texts / "documents.jsonl")]
    found = measured(tmp_path / "r.json", tmp_path / "prompt", data=data, seq_len=64, dtype="float64")["models"]
    for each, adapter in zip(found, (tmp_path / "prompt", None), strict=True):
        expected = [values[0] for values in oracle(tiny_model("llama"), texts, adapter)]
        assert each["sums"]["nll"] == pytest.approx(expected, abs=1e-5)
    assert found[0]["nll"]["value"] != pytest.approx(found[1]["nll"]["value"], abs=1e-3)


@pytest.mark.parametrize("numbers", ["nf4", "int8"])
def test_quantized_weights_are_measured_as_transformers_loads_them(texts, tmp_path, numbers):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lit_llm.models.quantize import quantization
    from lit_llm.names import resolve

    base = resolve("sample:base")
    found = measured(tmp_path / "r.json", base, data=[str(texts / "documents.jsonl")], seq_len=256,
                     quantize=numbers, dtype="float32")["models"][0]
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization(numbers, half=False))
    hf, expected = AutoTokenizer.from_pretrained(base), []
    for line in (texts / "documents.jsonl").read_text().splitlines():
        ids = torch.tensor([hf.encode(json.loads(line)["text"])])
        with torch.no_grad():
            logp = model(ids).logits[0, :-1].float().log_softmax(-1)
        expected.append(-float(logp.gather(1, ids[0, 1:, None]).sum()))
    assert found["sums"]["nll"] == pytest.approx(expected, rel=2e-3)
    assert found["measured"]["model"]["quantize"] == numbers


# ---- stored results --------------------------------------------------------------------------------------------------

def test_a_stored_result_is_compared_document_by_document(texts, tiny_model, tuned, tmp_path):
    data = [str(texts / "documents.jsonl")]
    evaluate([tiny_model("llama")], data, out=str(tmp_path / "base.json"))
    found = measured(tmp_path / "both.json", tmp_path / "base.json", tuned, data=data)
    both = [difference["nll"]["value"] for difference in found["differences"]]
    assert both[0] == pytest.approx(both[1], abs=1e-6)             # against its own base, and against the stored one
    assert found["differences"][1]["before"] == tiny_model("llama")
    evaluate([tiny_model("llama")], [str(texts / "chats.jsonl")], out=str(tmp_path / "other.json"))
    for changed in ({"data": data}, {"data": [str(texts / "chats.jsonl")], "train_on": "all"}):
        with pytest.raises(InputError, match="texts or their windows differ"):
            evaluate([str(tmp_path / "other.json"), tuned], **changed)
    (tmp_path / "other.json").write_text('{"format": 1, "models": [{"name": 3}]}')
    with pytest.raises(InputError, match="not a result of `evaluate --out`"):
        evaluate([str(tmp_path / "other.json")])


def test_the_result_says_what_was_measured(of_both, tuned, tiny_model):
    facts = of_both["models"][0]["measured"]
    assert facts["model"] == facts["model"] | {"kind": "adapter", "path": tuned, "base": tiny_model("llama"), "dtype": "float64"}
    assert set(facts["fingerprints"]) == {"data", "tokens", "tokenizer", "template"}
    assert facts["windows"]["seq_len"] == 64
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["model"]["fingerprint"] != of_both["models"][1]["measured"]["model"]["fingerprint"]


# ---- errors ----------------------------------------------------------------------------------------------------------

def test_bad_input_is_named(tiny_model, texts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"messages": [{"role": "user", "content": "x"}]}\n')
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "sft").mkdir()
    model, data = tiny_model("llama"), [str(texts / "chats.jsonl")]
    for words, options, message in (
            ([], {"data": data}, "no model was given"),
            ([model], {}, "no texts were given"),
            (["runs/sfd"], {"data": data}, "Did you mean 'runs/sft'"),
            (["runs/sft"], {"data": data}, "holds no model"),
            (["owner/model"], {"data": data}, "could not be downloaded"),
            ([model], {"data": ["nothing.jsonl"]}, "no such file"),
            ([model], {"data": ["bad.jsonl"]}, "bad.jsonl:1"),
            ([model], {"data": data, "device": "cuda"}, "cuda cannot be used"),
            ([model], {"data": data, "rolling": "text"}, "this is a conversation"),
            ([], {"data": data, "url": "http://127.0.0.1:1"}, "tokenizer of the server's model"),
            ([model], {"data": data, "url": "http://127.0.0.1:1"}, "no server answers")):
        with pytest.raises(InputError) as raised:
            evaluate(words, **options)
        assert message in str(raised.value), words


def test_the_command(lit_llm, tiny_model, texts, tmp_path):
    done = lit_llm("evaluate", tiny_model("llama"), "--data", texts / "chats.jsonl", texts / "documents.jsonl", "--limit", 3,
                   "--out", tmp_path / "r.json")
    assert done.code == 0, done.err
    assert "bits_per_character" in done.out
    assert "3 documents or conversations" in done.out
    assert json.loads((tmp_path / "r.json").read_text())["models"][0]["documents"] == 3
    wrong = lit_llm("evaluate", "nothing", "--data", texts / "chats.jsonl")
    assert wrong.code == 2
    assert "there is no folder nothing" in wrong.err
