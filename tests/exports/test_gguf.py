"""If this breaks: a GGUF file computes another model than the one that was trained, or reads text in other tokens.

Oracles: transformers' own reader of GGUF files, and llama.cpp where a Python that has it is named by LIT_LLM_LLAMA_CPP.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_llm.errors import InputError
from lit_llm.exports import difference, rows
from lit_llm.exports.command import export
from lit_llm.exports.gguf import file, folder, modelfile, probe, proof
from lit_llm.exports.gguf.vocabulary import byte_level, metadata, sentencepiece
from lit_llm.names import resolve
from lit_llm.text import check
from lit_llm.text.tokenizer import Tokenizer
from tests import gguf_models
from tests.gguf_models import MODELS

gguf = pytest.importorskip("gguf", reason="the optional package gguf is not installed")
IDS = torch.arange(5, 45)[None]
NOT_READ = {"smollm3", "llama, biases", "llama 3", "gemma3", "qwen2", "phi3, long"}  # transformers' reader lacks the family or its scaling


def needs_llama_cpp():
    if not os.environ.get(proof.VARIABLE):
        pytest.skip(f"{proof.VARIABLE} names no Python that has llama_cpp")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Model folders by name, built when they are asked for."""
    made = {}

    def built(name):
        if name not in made:
            made[name] = gguf_models.build(tmp_path_factory.mktemp("model"), name, resolve("sample:tokenizer"))
        return made[name]

    return built


def rules_of(tokenizer):
    return json.loads(Path(tokenizer, "tokenizer.json").read_text())


def fields(path):
    return file.read(path)[0]


# ---- weights and metadata --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", [name for name in MODELS if name not in NOT_READ])
def test_transformers_reads_the_same_model(name, model, tmp_path):
    folder.write(model(name), tmp_path / "out", "tiny", "f32", prove=False)
    own = AutoModelForCausalLM.from_pretrained(model(name))
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="tiny-F32.gguf", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(read(IDS).logits, own(IDS).logits, rtol=0, atol=1e-5)
    text = "Hello wörld, 你好！ 12\n\n  <|im_end|>"
    tokens = [AutoTokenizer.from_pretrained(model(name))(text)["input_ids"],
              AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="tiny-F32.gguf")(text)["input_ids"]]
    assert tokens[0] == tokens[1]


def test_rotary_factors_are_those_of_transformers(model, tmp_path):
    """Llama 3's factors divide the frequencies; the expected ones are what transformers computes for the config."""
    folder.write(model("llama 3"), tmp_path / "out", "tiny", prove=False)
    rotary = AutoModelForCausalLM.from_pretrained(model("llama 3")).model.rotary_emb.inv_freq.double().numpy()
    factors = file.read(tmp_path / "out" / "tiny-F32.gguf")[1]["rope_freqs.weight"][2].view(np.float32)[0]
    base = 500000.0 ** (-np.arange(0, 32, 2) / 32)
    np.testing.assert_allclose(base / factors, rotary, rtol=1e-6)
    assert factors.max() == 8
    assert factors.min() == 1


def test_metadata_states_what_the_config_has(model, tmp_path):
    for name in ("gemma3", "qwen2", "mistral", "phi3, long"):
        folder.write(model(name), tmp_path / name, "tiny", "f16", prove=False)
    gemma, qwen, mistral, phi = (fields(tmp_path / name / "tiny-F16.gguf") for name in ("gemma3", "qwen2", "mistral", "phi3, long"))
    assert gemma["gemma3.attention.sliding_window"] == 16
    assert gemma["gemma3.attention.sliding_window_pattern"] == [True, False, True, False]
    assert (gemma["gemma3.rope.freq_base"], gemma["gemma3.rope.freq_base_swa"]) == (1e6, 5000)
    assert (gemma["gemma3.rope.scaling.type"], gemma["gemma3.rope.scaling.factor"]) == ("linear", 8)
    assert gemma["gemma3.final_logit_softcapping"] == 30
    assert (qwen["qwen2.rope.scaling.type"], qwen["qwen2.rope.scaling.factor"]) == ("yarn", 4)
    assert qwen["qwen2.rope.scaling.original_context_length"] == 128
    assert qwen["qwen2.rope.scaling.attn_factor"] == pytest.approx(1)   # beside 0.1 ln 4 + 1, which llama.cpp multiplies by itself
    assert qwen["tokenizer.ggml.pre"] == "qwen2"
    assert mistral["llama.context_length"] == 256                       # the window, which llama.cpp does not compute
    assert mistral["llama.attention.key_length"] == 32
    assert phi["phi3.rope.scaling.attn_factor"] == pytest.approx((1 + np.log(2) / np.log(256)) ** 0.5)
    assert all(each["general.file_type"] == 1 for each in (gemma, qwen, mistral, phi))


@pytest.mark.parametrize(("name", "more", "says"), [
    ("llama", {"hidden_act": "gelu"}, "the activation is gelu, and llama.cpp computes silu"),
    ("gemma3", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar is 64, and llama.cpp computes with 32"),
    ("smollm3", {"no_rope_layers": [1, 0, 1, 0]}, "no_rope_layers differs"),
    ("qwen3", {"rope_parameters": MODELS["llama 3"]["rope_parameters"]}, "rotary scaling is llama3"),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
     "partial_rotary_factor 0.5"),
])
def test_what_llama_cpp_computes_differently_is_refused(name, more, says, tmp_path):
    gguf_models.build(tmp_path / "model", name, resolve("sample:tokenizer"), **more)
    with pytest.raises(InputError, match=says):
        folder.write(tmp_path / "model", tmp_path / "out", "tiny", prove=False)
    assert not (tmp_path / "out").exists()


def test_another_architecture_is_refused_with_the_list(tiny_model, tmp_path):
    with pytest.raises(InputError, match=r"GGUF files are written for gemma3_text, llama, .* this model is a gpt2"):
        folder.write(tiny_model("gpt2"), tmp_path / "out", "tiny", prove=False)


# ---- formats ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", file.TYPES)
def test_each_format_reads_back_within_its_bound(kind):
    """The bounds hold for random blocks and are not loose: the largest error reaches a third of them."""
    draw = np.random.default_rng(0)
    values = (draw.standard_normal((64, 256)) * np.exp(draw.normal(-3, 2, (64, 1)))).astype(np.float32)
    error = np.abs(file.decoded(file.encoded(values, kind), kind) - values)
    bound = file.bound(values, kind)
    assert (error <= bound).all()
    assert kind == "f32" or (error / bound).max() > 1 / 3


def test_a_changed_file_is_noticed(model, tmp_path, monkeypatch):
    """One bit of one weight, changed between writing and reading back: nothing is exported, an earlier export stays."""
    folder.write(model("qwen3"), tmp_path / "out", "tiny", "q8_0", prove=False)
    before = (tmp_path / "out" / "tiny-Q8_0.gguf").read_bytes()
    write = file.write

    def damaged(path, *args, **options):
        size = write(path, *args, **options)
        data = bytearray(path.read_bytes())
        data[-5] ^= 0x40
        path.write_bytes(data)
        return size

    monkeypatch.setattr(file, "write", damaged)
    with pytest.raises(InputError, match="differs from the model's weight by"):
        folder.write(model("qwen3"), tmp_path / "out", "tiny", "q8_0", prove=False)
    assert (tmp_path / "out" / "tiny-Q8_0.gguf").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_weights_beyond_float16_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    built = gguf_models.build(tmp_path / "model", "llama", resolve("sample:tokenizer"))
    weights = load_file(built / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = 70000
    save_file(weights, built / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="exceed float16's range"):
        folder.write(built, tmp_path / "out", "tiny", "f16", prove=False)
    folder.write(built, tmp_path / "out", "tiny", "bf16", prove=False)


def test_a_disk_that_is_too_small_is_named_before_writing(model, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 30, 1 << 30, 1000))
    with pytest.raises(InputError, match=r"the file needs 0\.03 GiB, and 0\.00 GiB are free"):
        folder.write(model("llama"), tmp_path / "out", "tiny", prove=False)
    assert list(tmp_path.iterdir()) == []


def test_check_json_describes_the_file(model, tmp_path):
    import hashlib

    out = folder.write(model("phi3"), tmp_path / "out", "tiny", "q4_0", prove=False)
    facts = json.loads((out / check.NAME).read_text())
    data = (out / "tiny-Q4_0.gguf").read_bytes()
    assert facts["format"] == "gguf"
    assert facts["files"] == {"tiny-Q4_0.gguf": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}}
    assert facts["tensors"]["count"] == len(file.read(out / "tiny-Q4_0.gguf")[1])
    assert facts["tensors"]["largest_error"]["f32"] == 0


def test_a_run_is_merged_first(run, tmp_path):
    """The file has the merged weights of the adapter, and nothing else is left beside it."""
    merged = AutoModelForCausalLM.from_pretrained(export(str(run), out=str(tmp_path / "plain")))
    out = export(str(run), format="gguf", gguf_type="f32", prove=False)
    assert out == run / "export-gguf-f32"
    assert sorted(path.name for path in out.iterdir()) == ["Modelfile", "check.json", "run-F32.gguf"]
    assert not [path for path in run.iterdir() if "merged" in path.name or "partial" in path.name]
    read = AutoModelForCausalLM.from_pretrained(out, gguf_file="run-F32.gguf", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(read(IDS).logits, merged(IDS).logits, rtol=0, atol=1e-5)
    assert export(str(run), format="gguf", gguf_type="f32", prove=False) == out     # replaces it


def test_llama_cpp_confirms_a_run(run):
    """Scored on the run's own validation rows; the figures are printed and kept."""
    needs_llama_cpp()
    facts = json.loads((export(str(run), format="gguf", gguf_type="q8_0") / check.NAME).read_text())
    assert facts["measured"]["rows"] == "validation"
    assert facts["measured"]["difference"] < facts["measured"]["bound"] == proof.BOUNDS["q8_0"]
    assert facts["llama_cpp"]["conversation_equal"]


@pytest.mark.parametrize(("options", "says"), [
    ({"gguf_type": "q8_0"}, "gguf_type: it is an option of GGUF files"), ({"prove": True}, "prove: it is an option of GGUF files"),
    ({"format": "gguf", "quantize": "nf4"}, "its own formats of few bits"), ({"format": "gguf", "adapter": True}, "no adapter alone"),
])
def test_options_of_the_other_format_are_refused(options, says, run):
    with pytest.raises(InputError, match=says):
        export(str(run), **options)


def test_a_model_folder_is_converted_by_the_command(tmp_path):
    words = [sys.executable, "-m", "lit_llm", "export", "sample:base", "--format", "gguf", "--gguf_type", "q4_0", "--out", str(tmp_path / "out")]
    env = {name: value for name, value in os.environ.items() if name != proof.VARIABLE}
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(tmp_path / "out")]
    assert (tmp_path / "out" / "base-Q4_0.gguf").is_file()
    assert "vllm" not in done.stderr


# ---- tokenizers ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("change", "says"), [
    ({"normalizer": {"type": "Lowercase"}}, r"its normalizer \(Lowercase\) changes the text"),
    ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "splits text by rules"),
    ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "[aeiou]+"}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]}}, r"no rule that splits text by \[aeiou\]\+"),
])
def test_rules_without_a_name_are_refused(change, says, tmp_path):
    rules = rules_of(resolve("sample:tokenizer")) | change
    name, reason = byte_level.name_of(rules)
    assert not name
    assert re.search(says, reason)


def test_isolated_chinese_characters_need_no_rule_where_no_merge_crosses_them():
    rules = rules_of(resolve("sample:tokenizer"))
    assert byte_level.name_of(rules) == ("gpt-2", "")
    spaces = rules["model"] | {"vocab": rules["model"]["vocab"] | {"ĠĠ": 1536}}
    crossing = rules["model"] | {"merges": [*rules["model"]["merges"], ["a", "ä"]]}
    assert not byte_level.splits_without_effect(spaces)
    assert not byte_level.splits_without_effect(crossing)


def test_scores_express_merges_or_the_tokenizer_is_refused(stories):
    model = rules_of(stories)["model"]
    scores, reason = sentencepiece.scores(model)
    assert not reason
    merged = ["".join(pair) for pair in byte_level.pairs(model)]
    assert sorted(scores, key=scores.get, reverse=True) == list(dict.fromkeys(merged))
    runs = {"vocab": {"▁": 0, "▁▁": 1, "▁▁▁": 2, "a": 3}, "merges": [["▁", "▁▁"], ["▁", "▁"], ["▁▁", "▁"]]}
    assert sentencepiece.scores(runs) == ({"▁▁": 0.0, "▁▁▁": 0.0}, "")       # as in Llama 2
    words = {"vocab": {"a": 0, "b": 1, "ab": 2, "abb": 3, "bb": 4}, "merges": [["ab", "b"], ["a", "b"], ["a", "bb"], ["b", "b"]]}
    assert "'abb' do not stand together" in sentencepiece.scores(words)[1]
    without = model | {"merges": model["merges"][:-1]}      # its token stays in the vocabulary, and llama.cpp would form it
    assert "which llama.cpp would join" in sentencepiece.scores(without)[1]


def test_names_that_llama_cpp_gives_a_meaning_are_avoided(tiny_tokenizer):
    tokenizer = Tokenizer.load(tiny_tokenizer)
    assert metadata.name_for("sft", tokenizer) == "sft"
    assert "phi-3" not in metadata.name_for("my-Phi-3-run", tokenizer).lower()
    assert "phi3" not in metadata.name_for("phi3-run", tokenizer).lower()


# ---- Ollama ----------------------------------------------------------------------------------------------------------

def test_a_template_of_texts_around_messages_is_stated(model, tmp_path):
    out = folder.write(model("llama"), tmp_path / "out", "tiny", prove=False)
    lines = (out / "Modelfile").read_text().splitlines()
    assert lines[1] == "FROM ./tiny-F32.gguf"
    assert 'PARAMETER num_ctx 512' in lines
    assert 'PARAMETER stop "<|im_end|>"' in lines or 'PARAMETER stop "<|endoftext|>"' in lines


@pytest.mark.parametrize(("source", "stated"), [
    ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}"
     "<|im_start|>assistant\n{% endif %}", "<|im_start|>user\n{{ .Content }}<|im_end|>\n"),
    ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}"
     "<|im_start|>assistant\n{% endif %}", None),
    ("{% if messages[0].role != 'system' %}<|im_start|>system\nHelp.<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>"
     "{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}", None),
])
def test_a_template_is_stated_only_where_it_renders_the_same(source, stated, tiny_tokenizer, tmp_path):
    file = tmp_path / "own.jinja"
    file.write_text(source)
    template = modelfile.go_template(Tokenizer.load(tiny_tokenizer, chat_template=str(file)).template)
    assert (template is None) == (stated is None)
    assert stated is None or stated in template


# ---- llama.cpp -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_the_same_model(name, model, tmp_path):
    needs_llama_cpp()
    facts = {}
    for kind in ("f32", "q8_0"):
        out = folder.write(model(name), tmp_path / kind, "tiny", kind, prove=True)
        facts[kind] = json.loads((out / check.NAME).read_text())
    assert facts["f32"]["measured"]["difference"] < 1e-4
    assert facts["f32"]["llama_cpp"]["greedy_equal"]
    assert all(each["llama_cpp"]["conversation_equal"] and each["llama_cpp"]["text_equal"] for each in facts.values())


def test_a_file_of_another_model_is_refused(model, tmp_path):
    """llama.cpp is asked about one model and compared with another, as if a tensor had been mapped wrongly."""
    needs_llama_cpp()
    other = gguf_models.build(tmp_path / "other", "llama", resolve("sample:tokenizer"), seed=1)
    out = folder.write(other, tmp_path / "out", "tiny", "f32", prove=True)
    tokenizer, own = Tokenizer.load(str(other)), folder.load.load_causal_lm(str(model("llama")))
    references = check.reference_sequences(tokenizer, own.config.vocab_size)
    scored = rows.of(other, tokenizer, own.config.vocab_size, 64)
    result = proof.run(proof.python(), out / "tiny-F32.gguf", tokenizer, references, scored, own)
    with pytest.raises(InputError, match=r"llama\.cpp gives rows the nll"):
        proof.judge(result, "f32", difference.scores(own, scored).nll, check.scores(own, references), str(out))


def test_llama_2_is_read_as_llama_cpp_publishes_it(shared_data, tmp_path):
    """The published texts and tokens of llama.cpp's own vocabulary of Llama 2."""
    needs_llama_cpp()
    (tmp_path / "tokenizer").mkdir()
    built = gguf_models.build(tmp_path / "model", "llama", gguf_models.llama2_tokenizer(shared_data, tmp_path / "tokenizer"))
    out = folder.write(built, tmp_path / "out", "tiny", "q8_0", prove=False)
    published = shared_data / "tokenizers" / "gguf" / "ggml-vocab-llama-spm.gguf"
    texts = published.with_suffix(".gguf.inp").read_text().split("\n__ggml_vocab_test__\n")[:-1]
    wanted = [[int(token) for token in line.split()] for line in published.with_suffix(".gguf.out").read_text().splitlines()]
    request = {"model": str(out / "tiny-Q8_0.gguf"), "rows": [], "texts": texts, "prompt": [1], "new_tokens": 0, "context": 32}
    done = subprocess.run([proof.python(), probe.__file__], input=json.dumps(request), capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1])["tokens"] == wanted


def test_a_named_python_without_llama_cpp_is_refused(monkeypatch):
    monkeypatch.setenv(proof.VARIABLE, "/nowhere/python")
    with pytest.raises(InputError, match="/nowhere/python cannot be run"):
        proof.python()
