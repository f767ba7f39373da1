"""If this breaks: a folder is served or trained on although its model differs from the exported one."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_llm.errors import InputError
from lit_llm.exports.command import export
from lit_llm.inference.completion import TextEngine
from lit_llm.models.adapters import merging
from lit_llm.models.adapters.adapter import save_adapter, wrap_peft
from lit_llm.models.adapters.peft_method import LoRA
from lit_llm.models.load import load_causal_lm
from lit_llm.system import integrity
from lit_llm.text import check
from lit_llm.text.tokenizer import Tokenizer
from tests.tiny_models import disturb


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    """A run folder as fit leaves it: one checkpoint of adapters on a tied base."""
    folder = tmp_path_factory.mktemp("run")
    base = tiny_model("qwen3")
    model = wrap_peft(load_causal_lm(base), LoRA(r=4, target_modules=["q_proj", "embed_tokens"]).as_peft())
    disturb(model)
    place = folder / "checkpoints" / "step_3"
    state = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
    save_adapter(model, place / "adapter", state, base)
    files = {str(file.relative_to(place)): {"bytes": file.stat().st_size, "sha256": integrity.sha256(file)}
             for file in place.rglob("*") if file.is_file()}
    (place / "manifest.json").write_text(json.dumps({"step": 3, "base": base, "files": files}))
    (folder / "checkpoints" / "LATEST").write_text("step_3\n")
    Tokenizer.load(base).save(folder / "tokenizer")
    return folder


@pytest.fixture
def folder(run, tmp_path):
    """Its export."""
    return export(str(run), out=str(tmp_path / "export"))


def edit(file, **keys):
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def refused(folder, *words):
    with pytest.raises(InputError) as caught:
        TextEngine.load(folder, device="cpu")
    assert all(word in str(caught.value) for word in (*words, "delete", "check.json")), caught.value
    assert len(str(caught.value).splitlines()) <= 3


def test_the_rows_are_what_plain_transformers_gives(folder):
    """Their ids by the library's tokenizer, their nll by its model, and the stop ids of training."""
    facts = json.loads((folder / "check.json").read_text())
    assert [row["kind"] for row in facts["rows"]] == ["text", "conversation", "ids"]
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for row in facts["rows"]:
        ids = torch.tensor([row["ids"][: facts["scored"]]])
        with torch.no_grad():
            assert float(model(ids, labels=ids).loss) == pytest.approx(row["nll"], rel=1e-5)
    tokenizer = Tokenizer.load(str(folder))
    assert tokenizer.hf(facts["text"])["input_ids"] == facts["rows"][0]["ids"][:-1]
    assert tokenizer.hf.apply_chat_template(facts["conversation"], tokenize=True, return_dict=False)[:40] == \
        facts["rows"][1]["ids"][:40]
    assert sorted(model.generation_config.eos_token_id) == sorted(tokenizer.stop_ids)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_export_passes_its_own_check_in_every_dtype(run, tmp_path, dtype):
    folder = export(str(run), out=str(tmp_path / "out"), dtype=dtype)
    for loaded in ("auto", "float32", "bfloat16"):
        TextEngine.load(folder, device="cpu", dtype=loaded)


def test_a_merge_that_computes_something_else_leaves_nothing(run, tmp_path, monkeypatch):
    """The earlier export is unchanged, and the message has both numbers."""
    out = tmp_path / "export"
    export(str(run), out=str(out))
    before = (out / "model.safetensors").read_bytes()
    merge = merging.merge

    def wrong(model):
        merged = merge(model)
        with torch.no_grad():
            merged.get_input_embeddings().weight[:, ::2] *= 1.5
        return merged

    monkeypatch.setattr(merging, "merge", wrong)
    with pytest.raises(InputError, match=r"nll [\d.]+ before merging and [\d.]+ in the export \(tolerance 1e-04"):
        export(str(run), out=str(out))
    assert (out / "model.safetensors").read_bytes() == before
    with pytest.raises(InputError, match="differs from the trained one"):
        export(str(run), out=str(tmp_path / "new"))
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == ["export"]


def test_a_base_in_4_bits_is_compared_and_both_values_are_logged(run, tmp_path, caplog, monkeypatch):
    pytest.importorskip("bitsandbytes")
    own = shutil.copytree(run, tmp_path / "own")
    (own / "config.yaml").write_text("model: {quantize: nf4}\n")
    with caplog.at_level("INFO", "lit_llm"):
        export(str(own))
    message = next(line for line in caplog.messages if "on the base in nf4" in line)
    assert "as trained" in message
    assert "tolerance 0.3" in message
    monkeypatch.setattr(check, "QUANTIZED", 1e-9)
    before = (own / "export" / "check.json").read_bytes()
    with pytest.raises(InputError, match="nothing was exported"):
        export(str(own))
    assert (own / "export" / "check.json").read_bytes() == before


def test_weights_of_another_merge_are_refused(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight += 0.05
    model.save_pretrained(folder / "new")
    shutil.copy(folder / "new" / "model.safetensors", folder / "model.safetensors")
    refused(folder, "weights were replaced", "nll", "tolerance")
    (folder / "check.json").unlink()
    TextEngine.load(folder, device="cpu")


def test_another_config_is_refused(folder):
    edit(folder / "config.json", rms_norm_eps=0.5)
    refused(folder, "config.json was changed")


def test_another_template_is_refused(folder):
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text().replace("user", "human") if "user" in file.read_text() else "{{ '<|im_start|>' }}"
                    + file.read_text())
    refused(folder, "chat template")
    Tokenizer.load(str(folder), chat_template=str(file))            # named by the user, it is no accident


def test_another_tokenizer_is_refused(folder):
    rules = json.loads((folder / "tokenizer.json").read_text())
    rules["model"]["merges"] = rules["model"]["merges"][:20]
    (folder / "tokenizer.json").write_text(json.dumps(rules))
    refused(folder, "tokenizer was changed since", "the ids are [")


@pytest.mark.parametrize("attention", ["lit_varlen", "eager", None])
def test_training_and_validation_check_their_base_too(folder, attention):
    """As `fit` and `validate` load it, with packed attention, which is unchanged afterwards."""
    model = load_causal_lm(str(folder), attention=attention)
    before = model.config._attn_implementation
    check.check_weights(folder, model)
    assert model.config._attn_implementation == before
    with torch.no_grad():
        model.lm_head.weight[:50] += 0.02
    with pytest.raises(InputError, match="weights were replaced"):
        check.check_weights(folder, model)


def test_the_verbs_take_an_export_as_their_base_and_refuse_a_changed_one(folder, tmp_path, lit_llm):
    data = tmp_path / "talk.jsonl"
    data.write_text("\n".join(json.dumps({"messages": [{"role": "user", "content": f"say {number}"},
                                                       {"role": "assistant", "content": f"{number}!"}]})
                              for number in range(8)))
    words = ("--model.base", folder, "--data.sources", f"[{{path: {data}}}]", "--data.val_sources",
             f"[{{path: {data}}}]", "--data.seq_len", 64, "--trainer.accelerator", "cpu", "--trainer.max_steps", 1,
             "--trainer.default_root_dir", tmp_path / "run", "--model.lora", "null")
    done = lit_llm("fit", *words)
    assert done.code == 0, done.err
    edit(folder / "config.json", rms_norm_eps=0.5)
    done = lit_llm("validate", *words)
    assert done.code == 2
    assert "config.json was changed since it was exported" in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize("text", [
    "", "{", "[]", "null", "[" * 100_000, '{"version": 1}', '{"version": 2}', "x" * (1 << 19), '{"version": 1, "rows": 3}',
    '{"version": 1, "rows": [{"kind": "ids", "ids": [1, 2, 999999], "nll": 1.0}], "dtype": "float32", "template": "", '
    '"config": ""}',
    '{"version": 1, "rows": [{"kind": "ids", "ids": [1, -2], "nll": 1.0}], "dtype": "float32", "template": 1, "config": 1}',
    '{"version": 1, "rows": [{"kind": "ids", "ids": "12", "nll": 1.0}], "dtype": [], "template": 1, "config": 1}',
    '{"version": 1, "rows": [{"kind": {}, "ids": [1, 2], "nll": "x"}], "dtype": "", "template": 1, "config": 1}',
    '{"version": 1, "rows": [{"kind": "ids", "ids": [1, 2], "nll": NaN}], "dtype": "x", "template": 1, "config": 1}'])
def test_a_damaged_check_is_refused_in_a_line(folder, text):
    (folder / "check.json").write_text(text)
    refused(folder)


def test_folders_of_others_are_loaded_as_they_are(tiny_model):
    model = load_causal_lm(tiny_model("llama"))
    check.check_weights(tiny_model("llama"), model)
    check.check_tokenizer(tiny_model("llama"), Tokenizer.load(tiny_model("llama")))
