"""If this breaks: samples during training are not what the model answers at that step, change the run, or repeat steps on resume.

Oracle: greedy `generate` of plain transformers and peft on the files of each checkpoint, one prompt at a time.
"""

import json

import pytest
import short_runs
import torch
from peft import PeftModel
from run_processes import assert_same_end, config_of, write_config, write_data
from test_checkpoint import PowerFailure, StopAt, fit, same, weights_of  # noqa: F401
from transformers import AutoModelForCausalLM, GenerationConfig

from lit_llm import CausalLMModule, Source, TextDataModule, Trainer, names
from lit_llm.text.tokenizer import Tokenizer
from lit_llm.training.record import greedy
from lit_llm.training.record.prompts import ANSWER_TOKENS
from lit_llm.training.run.checkpoint import StepCheckpoint

EVERY = dict(rows=6, max_steps=4, val_check_interval=4, check_val_every_n_epoch=None)       # every two steps


def samples_of(run):
    return [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


def generated(model, ids, stop_ids):
    model.generation_config = GenerationConfig()
    with torch.no_grad():
        out = model.eval().generate(input_ids=torch.tensor([ids]), do_sample=False, max_new_tokens=ANSWER_TOKENS, pad_token_id=0,
                                    eos_token_id=list(stop_ids))
    return out[0, len(ids):].tolist()


@pytest.fixture
def calls_of_answer(monkeypatch):
    """Prompts and answers as token ids, of every call; the texts in the file may look alike for different ids."""
    answered, real = [], greedy.answer

    def answer(trainer, prompts, **keys):
        answers = real(trainer, prompts, **keys)
        answered.append((trainer.global_step, prompts, answers))
        return answers

    monkeypatch.setattr(greedy, "answer", answer)
    return answered


@pytest.mark.parametrize(("strategy", "kind", "lora"), [
    ("auto", "llama", True), ("auto", "qwen3", False), ("auto", "gpt2", False), ("deepspeed_stage_2", "llama", True),
    ("deepspeed_stage_3", "llama", True), ("deepspeed_stage_3", "llama", False), ("fsdp2", "qwen3", False)])
def test_answers_are_those_of_each_checkpoint(strategy, kind, lora, fit, tiny_model, calls_of_answer):  # noqa: F811
    run = fit("run", strategy=strategy, kind=kind, lora=lora, dropout=0.2, callbacks=[StepCheckpoint(keep_last=9)], **EVERY)
    base = tiny_model(kind)
    tokenizer = Tokenizer.load(str(base))
    assert [step for step, _, _ in calls_of_answer] == [0, 2, 4]
    for step, prompts, answers in calls_of_answer:
        folder = run / "checkpoints" / f"step_{step}"
        model = AutoModelForCausalLM.from_pretrained(folder / "model" if step and not lora else base)
        model = PeftModel.from_pretrained(model, folder / "adapter") if step and lora else model
        assert answers == [generated(model, prompt, tokenizer.stop_ids) for prompt in prompts]
    lines = samples_of(run)
    assert [line["step"] for line in lines] == [0] * 3 + [2] * 3 + [4] * 3
    assert [line["prompt"] for line in lines[:3]] == [line["prompt"] for line in lines[-3:]]
    assert all("say" in line["prompt"] for line in lines)
    assert lines[0].keys() == {"step", "prompt", "answer", "finish_reason", "expected"}
    _, prompts, answers = calls_of_answer[-1]
    for line, prompt, answer in zip(lines[-3:], prompts, answers, strict=True):
        assert line["finish_reason"] == ("stop" if answer[-1] in tokenizer.stop_ids else "length")
        whole = tokenizer.decode([*prompt, *answer], skip_special_tokens=True)
        assert whole.rstrip().endswith(line["answer"])


def test_models_that_answer_one_prompt_at_a_time(tmp_path, calls_of_answer):
    """Prompt tuning; its virtual tokens are in front of each prompt."""
    chats = [{"prompt": f"Where is kite {number}?", "completion": "In the red box."} for number in range(6)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    spec = {"class_path": "peft.PromptTuningConfig", "init_args": {"num_virtual_tokens": 4}}
    _, _, data = short_runs.fit(tmp_path, tokenizer="sample:base", passes=8, peft=spec, steps=3)
    step, prompts, answers = calls_of_answer[-1]
    assert (step, len(samples_of(tmp_path / "run"))) == (3, 6)
    model = AutoModelForCausalLM.from_pretrained(names.resolve("sample:base"))
    model = PeftModel.from_pretrained(model, tmp_path / "run" / "checkpoints" / "step_3" / "adapter")
    assert answers == [generated(model, prompt, data.tokenizer.stop_ids) for prompt in prompts]
    assert any(answers)


def test_documents_are_continued_from_their_beginning(tmp_path, tiny_model, calls_of_answer):
    texts = [{"text": f"Tom has a red kite and flies it over the hill {number}. " * 4} for number in range(9)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    source = Source(str(tmp_path / "text.jsonl"))
    data = TextDataModule(sources=[source], val_sources=[source], tokenizer=tiny_model("llama"), seq_len=64, batch_size=2)
    trainer = Trainer(default_root_dir=str(tmp_path / "run"), max_steps=1, accelerator="cpu", devices=1, samples=2)
    trainer.fit(CausalLMModule(base=tiny_model("llama")), datamodule=data)
    assert [(step, [len(prompt) for prompt in prompts]) for step, prompts, _ in calls_of_answer] == [(0, [16, 16]), (1, [16, 16])]
    sample = samples_of(tmp_path / "run")[0]
    assert (sample["prompt"] + sample["expected"]).replace(" ", "").startswith("Tomhasaredkiteandfliesit")


@pytest.mark.parametrize("lora", [True, False])
def test_training_is_bit_identical_without_samples(lora, fit):  # noqa: F811
    """With dropout, which draws random numbers in every step."""
    with_samples = fit("with", lora=lora, kind="llama", dropout=0.3, **EVERY)
    without = fit("without", lora=lora, kind="llama", dropout=0.3, samples=0, **EVERY)
    assert same(weights_of(with_samples, "step_4"), weights_of(without, "step_4")) == 0
    assert not (without / "samples.jsonl").exists()


def test_a_resumed_run_has_each_step_once(fit):  # noqa: F811
    """The answers after the checkpoint are replaced by those of the resumed run, which are the same."""
    straight = fit("straight", **EVERY)
    with pytest.raises(PowerFailure):
        fit("resumed", callbacks=[StopAt(2)], **EVERY)
    with open(straight.parent / "resumed" / "samples.jsonl", "a") as stream:
        stream.write(json.dumps({"step": 4, "prompt": "of a lost step"}) + "\n" + '{"step": 4, "pro')
    resumed = fit("resumed", resume="last", **EVERY)
    assert samples_of(resumed) == samples_of(straight)


def test_a_model_that_cannot_answer_ends_no_run(fit, monkeypatch, caplog):  # noqa: F811
    def broken(*_, **__):
        raise RuntimeError("too little memory")

    monkeypatch.setattr(greedy, "_together", broken)
    run = fit("run", **EVERY)
    assert (run / "checkpoints" / "step_4").is_dir()
    assert not (run / "samples.jsonl").exists()
    assert sum("too little memory" in line for line in caplog.messages) == 1


@pytest.fixture(scope="module")
def sampled_run(run_processes, tiny_model):
    """`sampled_run(name, ...)`: a run of real processes with an answer before training and after each of two epochs."""
    data = write_data(run_processes.folder)

    def start(name, **trainer):
        config = config_of(str(tiny_model("llama")), data, **trainer) | {"seed_everything": 1}
        config["trainer"]["num_sanity_val_steps"] = -1
        ranks = trainer.get("ranks", 1)
        done = run_processes.run(*write_config(run_processes.folder, config), name, ranks=ranks)
        assert done["codes"] == [0] * ranks, done["outputs"]
        return run_processes.folder / name

    return start


@pytest.fixture(scope="module")
def answers_of_one_process(sampled_run):
    return samples_of(sampled_run("one", max_epochs=1))


@pytest.mark.parametrize("strategy", ["ddp", "deepspeed_stage_3", "fsdp2"])
def test_two_processes_answer_as_one(strategy, sampled_run, answers_of_one_process):
    """All processes take part where layers are gathered; the run ends bit-identically without samples."""
    run = sampled_run(f"{strategy}-with", ranks=2, strategy=strategy, max_epochs=1)
    lines = samples_of(run)
    assert [line["step"] for line in lines] == [0] * 3 + [5] * 3
    assert lines[:3] == answers_of_one_process[:3]
    assert any(line["answer"] for line in lines[:3])
    if strategy != "ddp":                               # where the first process answers alone
        assert_same_end(run, sampled_run(f"{strategy}-without", ranks=2, strategy=strategy, max_epochs=1, samples=0), 5)
