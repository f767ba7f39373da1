"""If this breaks: a folder in 8 or 4 bits, or an adapter alone, is handed over although its model is not the one that was trained, or
other libraries cannot load it.
"""

import json
import math
import os
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import lit_llm as lit_llm_package
from lit_llm import names
from lit_llm.errors import InputError
from lit_llm.exports import difference
from lit_llm.exports.command import export
from lit_llm.inference.completion import TextEngine
from lit_llm.inference.sampling import SamplingParams
from lit_llm.models.load import load_causal_lm
from lit_llm.system import integrity
from lit_llm.text.tokenizer import Tokenizer

BASE = names.resolve("sample:base")


def rows_of(run):
    return [json.loads(line) for line in (run / "validation_rows.jsonl").read_text().splitlines()]


def plain(model, run):
    """NLL per supervised token of the run's rows, and all logits, by brute force in float64."""
    total, count, logits = 0.0, 0, []
    for row in rows_of(run):
        ids = torch.tensor([row["ids"]])
        with torch.no_grad():
            out = model(ids).logits[0]
        logits.append(out)
        losses = F.cross_entropy(out[:-1].double(), ids[0, 1:], reduction="none")
        where = torch.tensor(row["supervised"][1:], dtype=torch.bool)
        total, count = total + float(losses[where].sum()), count + int(where.sum())
    return total / count, torch.cat(logits), count


def trained_model(run):
    """The checkpoint's model by plain PEFT."""
    from peft import PeftModel

    name = (run / "checkpoints" / "BEST").read_text().strip()
    base = AutoModelForCausalLM.from_pretrained(BASE)
    return PeftModel.from_pretrained(base, run / "checkpoints" / name / "adapter").eval()


def library_model(folder):
    """The folder as transformers or PEFT loads it."""
    from peft import AutoPeftModelForCausalLM

    kind = AutoPeftModelForCausalLM if (folder / "adapter_config.json").is_file() else AutoModelForCausalLM
    return kind.from_pretrained(folder).eval()


@pytest.mark.parametrize(("options", "kind"), [
    ({}, "float32"), ({"dtype": "bfloat16"}, "bfloat16"), ({"dtype": "float16"}, "float16"), ({"quantize": "int8"}, "int8"),
    ({"quantize": "nf4"}, "nf4"), ({"adapter": True}, "float32")], ids=str)
def test_check_json_has_what_plain_libraries_measure(run, tmp_path, options, kind, caplog):
    """The checkpoint by PEFT, the folder by transformers: nll per token and the largest difference of logits."""
    if "quantize" in options:
        pytest.importorskip("bitsandbytes")
    with caplog.at_level("INFO", "lit_llm"):
        folder = export(str(run), out=str(tmp_path / "out"), **options)
    facts = json.loads((folder / "check.json").read_text())
    values = facts["measured"]
    assert (values["rows"], values["format"]) == ("validation", kind)
    nll, logits, count = plain(trained_model(run), run)
    assert values["tokens"] == count
    assert values["nll_before"] == pytest.approx(nll, rel=1e-5)
    nll, others, _ = plain(library_model(folder), run)
    rounding = 1e-5 if kind in ("float32", "float16") else 0.02     # other kernels of few bits, other attention
    assert values["nll_after"] == pytest.approx(nll, rel=rounding)
    assert values["difference"] <= values["bound"] == difference.BOUNDS[kind]
    if kind == "float32":
        assert float((logits - others).abs().max()) <= values["logits"]["bound"]
    else:
        assert values["logits"]["largest_difference"] == pytest.approx(float((logits - others.float()).abs().max()), rel=0.5)
    for name, file in facts["files"].items():
        assert file == {"bytes": (folder / name).stat().st_size, "sha256": integrity.sha256(folder / name)}
    assert set(facts["files"]) == {file.name for file in folder.glob("*.safetensors")}
    (message,) = [line for line in caplog.messages if line.startswith("check passed")]
    assert f"{values['nll_before']:.5f}" in message
    assert f"{values['nll_after']:.5f}" in message


@pytest.mark.parametrize("options", [{}, {"quantize": "int8"}, {"quantize": "nf4"}, {"adapter": True}], ids=str)
def test_every_format_answers_in_the_engine_like_the_library_and_can_be_read_by_all(run, tmp_path, options):
    folder = export(str(run), out=str(tmp_path / "out"), **options)
    assert AutoTokenizer.from_pretrained(folder).chat_template == Tokenizer.load(str(folder)).hf.chat_template
    prompt = rows_of(run)[0]["ids"][:8]
    answer = TextEngine.load(folder, device="cpu").generate(prompt, SamplingParams(temperature=0, max_tokens=8))
    text = torch.tensor([[*prompt, *answer.token_ids]])
    with torch.no_grad():
        logits = library_model(folder)(text).logits[0, len(prompt) - 1:-1].float()
    chosen = logits.gather(1, text[0, len(prompt):, None])[:, 0]
    assert (logits.max(-1).values - chosen).max() < (0.1 if "quantize" in options else 1e-4)     # greedy, but for rounding
    usual = (folder / "README.md").stat().st_mode
    assert {file.stat().st_mode for file in folder.iterdir()} == {usual}
    replace_weights(folder)
    with pytest.raises(InputError, match="weights were replaced"):
        TextEngine.load(folder, device="cpu")


def replace_weights(folder):
    """Other weights of the same shapes."""
    from safetensors.torch import load_file, save_file

    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)
    save_file({name: weight + 1 if weight.is_floating_point() and "quant" not in name and "absmax" not in name else weight
               for name, weight in weights.items()}, file, metadata={"format": "pt"})


def test_the_umask_decides_the_modes(run, tmp_path):
    before = os.umask(0o027)
    try:
        folder = export(str(run), out=str(tmp_path / "out"))
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o640}
    assert {file.stat().st_mode & 0o777 for file in run.rglob("*") if file.is_file()} == {0o666 & ~before}


@pytest.mark.parametrize("options", [{}, {"quantize": "nf4"}, {"adapter": True}], ids=str)
def test_a_difference_beyond_the_bound_leaves_nothing(run, tmp_path, monkeypatch, options):
    monkeypatch.setattr(difference, "BOUNDS", dict.fromkeys(difference.BOUNDS, -1.0))
    with pytest.raises(InputError, match="nothing was exported"):
        export(str(run), out=str(tmp_path / "out"), **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == []


def test_an_adapter_names_its_base_and_its_stop_tokens(run, tmp_path):
    folder = export(str(run), adapter=True)
    assert folder.name == "export-adapter"
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == BASE
    stops = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert sorted(stops) == sorted(Tokenizer.load(str(folder)).stop_ids)
    assert {file.name for file in folder.iterdir()} >= {"adapter_model.safetensors", "tokenizer.json", "chat_template.jinja",
                                                        "README.md", "check.json"}


def test_what_cannot_be_combined_is_refused(run, tmp_path):
    with pytest.raises(InputError, match="leave --quantize and --dtype out"):
        export(str(run), adapter=True, quantize="int8")
    folder = export(str(run), out=str(tmp_path / "out"), quantize="int8")
    with pytest.raises(InputError, match="stored in int8 already"):
        load_causal_lm(str(folder), quantize="nf4")
    stacked = shutil.copytree(run, tmp_path / "stacked")
    name = (stacked / "checkpoints" / "BEST").read_text().strip()
    (stacked / "checkpoints" / name / "adapter" / "first").mkdir()
    with pytest.raises(InputError, match="another adapter or new tokens"):
        export(str(stacked), adapter=True)


def test_a_run_without_recorded_rows_is_measured_on_embedded_documents(run, tmp_path):
    own = shutil.copytree(run, tmp_path / "own")
    (own / "validation_rows.jsonl").unlink()
    values = json.loads((export(str(own), out=str(tmp_path / "out")) / "check.json").read_text())["measured"]
    assert values["rows"] == "embedded"
    assert 1000 < values["tokens"] <= 3072
    assert math.isfinite(values["nll_before"])


def test_a_quantized_folder_is_evaluated_but_not_trained(run, tmp_path, lit_llm):
    """`validate` gives the same nll as transformers; training needs the exact base."""
    pytest.importorskip("bitsandbytes")
    folder = export(str(run), out=str(tmp_path / "out"), quantize="int8")
    words = ("--model.base", folder, "--data.sources", f"[{{path: {run.parent / 'chats.jsonl'}}}]", "--data.val_sources",
             f"[{{path: {run.parent / 'chats.jsonl'}}}]", "--data.seq_len", 64, "--trainer.accelerator", "cpu",
             "--trainer.max_steps", 1, "--trainer.default_root_dir", tmp_path / "run")
    done = lit_llm("validate", *words)
    assert done.code == 0, done.err
    measured = json.loads((tmp_path / "run" / "metrics.json").read_text())["val/nll"]
    assert measured == pytest.approx(plain(library_model(folder), run)[0], abs=0.01)
    done = lit_llm("evaluate", folder, "--data", run.parent / "chats.jsonl")
    assert done.code == 0, done.err
    done = lit_llm("fit", *words)
    assert done.code == 2
    assert "stored in int8" in done.err
    assert "--model.quantize" in done.err


def test_the_commands_of_the_readme_write_what_they_say(run, tmp_path, lit_llm):
    """Also flags without a value; each prints its check in one line."""
    text = (Path(lit_llm_package.__file__).parent / "exports" / "README.md").read_text(encoding="utf-8")
    (block,) = [part.split("```")[0] for part in text.split("```sh\n")[1:] if "--adapter" in part.split("```")[0]]
    shutil.copytree(run, tmp_path / "runs" / "sft")
    for line in block.splitlines():
        done = lit_llm(*shlex.split(line, comments=True)[3:])
        assert done.code == 0, done.err
        assert len([said for said in (done.out + done.err).splitlines() if "check passed in" in said]) == 1
    made = {path.name for path in (tmp_path / "runs" / "sft").glob("export*")}
    assert made == {"export", "export-nf4", "export-adapter"}
