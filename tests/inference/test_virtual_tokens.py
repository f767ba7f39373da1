"""If this breaks: a model trained by prompt tuning, prefix tuning or P-tuning cannot be used, or answers as its base does.

Oracle: PEFT's own greedy `generate` and forward pass on the exported adapter.
"""

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM

from lit_llm import names
from lit_llm.errors import InputError
from lit_llm.inference.completion import TextEngine
from lit_llm.inference.engine import Engine
from lit_llm.inference.loading import sizes
from lit_llm.inference.sampling import SamplingParams

BASE = names.resolve("sample:base")
METHODS = {"PromptTuningConfig": {"num_virtual_tokens": 5}, "PrefixTuningConfig": {"num_virtual_tokens": 4},
           "PromptEncoderConfig": {"num_virtual_tokens": 3, "encoder_hidden_size": 16}}
QUESTION = "Who is it?"


@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_exported_answers_like_peft_and_its_commands_work(method, tmp_path, lit_llm):
    data, run = tmp_path / "chats.jsonl", tmp_path / "run"
    data.write_text("\n".join(json.dumps({"messages": [
        {"role": "user", "content": QUESTION}, {"role": "assistant", "content": "It is the red fox."}]}) for _ in range(16)))
    peft = {"class_path": method, "init_args": METHODS[method]}
    done = lit_llm("fit", "--model.base", "sample:base", "--model.lora", "null", "--model.peft", json.dumps(peft),
                   "--model.lr", 0.05, "--data.sources", f"[{{path: {data}}}]", "--data.val_sources", f"[{{path: {data}}}]",
                   "--data.seq_len", 64, "--trainer.accelerator", "cpu", "--trainer.max_steps", 4, "--trainer.default_root_dir", run)
    assert done.code == 0, done.err
    count = METHODS[method]["num_virtual_tokens"]
    assert f"exported to {run / 'export'}: the adapter alone, because its {count} virtual tokens cannot be merged" in done.out
    assert "  tuned " in done.out                   # its answers
    text = TextEngine.load(run / "export", device="cpu")
    answers_are_those_of_peft(text, run / "export")
    assert text.engine.context_length == sizes(BASE)[0] - count == sizes(str(run / "export"))[0] == sizes(BASE, run / "export")[0]
    with pytest.raises(InputError, match="virtual tokens"):
        Engine.load(BASE, device="cpu", adapters={"one": run / "export"})
    lines = done.out.split("next:\n")[1].splitlines()
    assert any(" serve " in line or "-m serve" in line for line in lines)
    for verb, stdin in (("chat", f"{QUESTION}\n"), ("validate", "")):
        (words,) = [line.split(" -m lit_llm ")[1].split() for line in lines if f" {verb} " in line]
        after = lit_llm(*words, stdin=stdin)
        assert after.code == 0, after.err
    out = tmp_path / "answers.jsonl"
    for words in (("evaluate", run / "export", "--data", data), ("generate", run / "export", "--data", data, "--out", out)):
        after = lit_llm(*words)
        assert after.code == 0, after.err
    assert len(out.read_text().splitlines()) >= 16
    (words,) = [line.split(" -m lit_llm ")[1].split() for line in lines if " chat " in line]
    assert text.generate(prompts_of(text)[0]).text.strip()[:10] in lit_llm(*words, stdin=f"{QUESTION}\n").out


def prompts_of(text):
    return [text.tokenizer.hf.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True,
                                                  tokenize=True, return_dict=False) for question in (QUESTION, "Why?", "你好")]


def answers_are_those_of_peft(text, folder):
    """Greedy, several requests at once, with log-probabilities of the prompt."""
    oracle = AutoPeftModelForCausalLM.from_pretrained(folder).eval()
    params = SamplingParams(temperature=0, max_tokens=12, prompt_logprobs=0)
    prompts, got, read = prompts_of(text), {}, {}
    for at, prompt in enumerate(prompts):
        text.engine.add(str(at), prompt, params)
    while text.engine.has_work:
        for event in text.engine.step():
            assert event.error is None
            got.setdefault(int(event.request_id), []).append(event.token_id)
            read.setdefault(int(event.request_id), event.prompt_logprobs)
    assert text.engine.obstacle is not None
    for at, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        want = oracle.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False,
                               eos_token_id=list(text.engine.stop_ids))[0].tolist()
        assert got[at] == want[len(prompt):]
        with torch.no_grad():
            logp = oracle(input_ids=ids).logits[0, -len(prompt):].log_softmax(-1)
        want = logp[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist()
        assert [entry.logprob for entry in read[at][1:]] == pytest.approx(want, abs=1e-4)
