"""If this breaks: answers in a file are not those of the model, a killed run loses answers or begins anew, a wrong record
is found out after hours, or two models are compared on different prompts.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lit_llm.errors import InputError
from lit_llm.evaluation.answers.command import generate
from lit_llm.evaluation.answers.prompts import interpret

ROOT = Path(__file__).resolve().parents[2]
QUESTIONS = ["A kite?", "什么颜色", "One two three four", "Is it?", "Why " * 20, "A kite?"]


def write(file, records):
    file.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return str(file)


def read(file):
    return [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def prompts(tmp_path):
    return write(tmp_path / "prompts.jsonl", [{"prompt": text} for text in QUESTIONS])


def test_greedy_answers_are_those_of_transformers(tiny_model, prompts, tmp_path):
    """Oracle: the prompt as transformers' own tokenizer renders it, and `generate` for each prompt alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny_model("qwen3")
    generate([folder], prompts, str(tmp_path / "a.jsonl"), max_tokens=12, threads=1)
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ends = [tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id]
    lines = read(tmp_path / "a.jsonl")
    assert [line["prompt"] for line in lines] == QUESTIONS
    for line in lines:
        ids = tokenizer.apply_chat_template([{"role": "user", "content": line["prompt"]}], add_generation_prompt=True,
                                            return_tensors="pt", return_dict=True)
        out = plain.generate(**ids, max_new_tokens=12, do_sample=False, eos_token_id=ends, pad_token_id=ends[0])[0]
        new = out[ids["input_ids"].shape[1]:].tolist()
        assert (line["prompt_tokens"], line["completion_tokens"]) == (ids["input_ids"].shape[1], len(new))
        assert line["finish_reason"] == ("stop" if new[-1] in ends else "length")
        text = tokenizer.decode(new, skip_special_tokens=True)
        assert line["answer"].rstrip("�") == text.rstrip("�")


def test_a_seed_gives_the_same_bytes_in_any_batching_and_another_seed_others(tiny_model, prompts, tmp_path):
    options = {"max_tokens": 10, "temperature": 1.0, "top_p": 0.9, "n": 2, "threads": 1}
    folder = tiny_model("llama")
    for running in (1, 3, 32):
        generate([folder], prompts, str(tmp_path / f"{running}.jsonl"), max_running=running, **options)
    files = [(tmp_path / f"{running}.jsonl").read_bytes() for running in (1, 3, 32)]
    assert files[0] == files[1] == files[2]
    lines = read(tmp_path / "1.jsonl")
    assert [(line["index"], line["sample"]) for line in lines] == [(at, n) for at in range(6) for n in (0, 1)]
    assert len({line["answer"] for line in lines}) == len(lines)        # also of samples, and of a prompt that occurs twice
    generate([folder], prompts, str(tmp_path / "other.jsonl"), seed=1, **options)
    assert all(one["answer"] != two["answer"] for one, two in zip(lines, read(tmp_path / "other.jsonl"), strict=True))


def test_an_answer_does_not_depend_on_its_place_in_the_file(tiny_model, tmp_path):
    options = {"max_tokens": 10, "temperature": 1.0, "threads": 1}
    unique = [{"prompt": text, "id": number} for number, text in enumerate(QUESTIONS[:5])]
    shuffled = random.Random(0).sample(unique, 5)
    generate([tiny_model("llama")], write(tmp_path / "p.jsonl", unique), str(tmp_path / "a.jsonl"), **options)
    before = {line["id"]: line["answer"] for line in read(tmp_path / "a.jsonl")}
    write(tmp_path / "p.jsonl", shuffled)
    (tmp_path / "b.jsonl").write_bytes((tmp_path / "a.jsonl").read_bytes())
    for out in ("b.jsonl", "c.jsonl"):              # with all answers there already, and anew
        generate([tiny_model("llama")], str(tmp_path / "p.jsonl"), str(tmp_path / out), **options)
    assert (tmp_path / "b.jsonl").read_bytes() == (tmp_path / "c.jsonl").read_bytes()
    assert {line["id"]: line["answer"] for line in read(tmp_path / "b.jsonl")} == before
    assert [line["index"] for line in read(tmp_path / "b.jsonl")] == list(range(5))


def test_a_killed_run_goes_on_where_it_ended(endless_model, tmp_path, capsys):
    data = write(tmp_path / "p.jsonl", [{"prompt": f"Number {number}?"} for number in range(30)])
    options = {"max_tokens": 60, "max_running": 4, "threads": 1}
    generate([endless_model], data, str(tmp_path / "whole.jsonl"), **options)
    out = tmp_path / "killed.jsonl"
    command = [sys.executable, "-m", "lit_llm", "generate", endless_model, "--data", data, "--out", str(out),
               *(str(word) for name, value in options.items() for word in (f"--{name}", value))]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not (out.exists() and out.read_bytes().count(b"\n") >= 5):
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    there = out.read_bytes().count(b"\n")
    assert 5 <= there < 30
    with out.open("ab") as stream:                  # the line that was being written
        stream.write('{"index": 29, "prompt": "数'.encode()[:-1])
    capsys.readouterr()
    generate([endless_model], data, str(out), **options)
    err = capsys.readouterr().err
    assert f"{there} of 30 answers are there already" in err
    assert f"{30 - there} answers, {60 * (30 - there):,} tokens in" in err
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_answers_of_another_kind_are_not_lost(tiny_model, prompts, tmp_path):
    out = tmp_path / "a.jsonl"
    generate([tiny_model("llama")], prompts, str(out), max_tokens=4, threads=1)
    before = out.read_bytes()
    for options in ({"max_tokens": 5}, {"max_tokens": 4, "temperature": 0.5}, {"max_tokens": 4, "stop": ["x"]}):
        with pytest.raises(InputError, match="6 of its 6 answers are for other prompts, of another model or with other settings"):
            generate([tiny_model("llama")], prompts, str(out), threads=1, **options)
    with pytest.raises(InputError, match="of another model"):
        generate([tiny_model("gpt2")], prompts, str(out), threads=1, max_tokens=4)
    assert out.read_bytes() == before
    generate([tiny_model("llama")], prompts, str(out), max_tokens=5, threads=1, overwrite=True)
    assert all(line["completion_tokens"] <= 5 for line in read(out))
    mine = tmp_path / "notes.jsonl"
    mine.write_text('{"my": "notes"}\n')
    with pytest.raises(InputError, match=r"notes.jsonl:1: this line was not written by generate"):
        generate([tiny_model("llama")], prompts, str(mine), threads=1, overwrite=True)
    assert mine.read_text() == '{"my": "notes"}\n'


@pytest.mark.parametrize(("record", "roles", "reference"), [
    ({"prompt": "1+1?"}, "u", None),
    ({"prompt": "1+1?", "reference": "2"}, "u", "2"),
    ({"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "1+1?"}]}, "su", None),
    ({"prompt": "1+1?", "completion": "2"}, "u", "2"),
    ({"prompt": "1+1?", "completion": "?"}, "u", "?"),
    ({"instruction": "Add.", "input": "1+1", "output": "2", "system": "s"}, "su", "2"),
    ({"instruction": "Add.", "input": "1+1"}, "u", None),
    ({"question": "1+1?", "answer": "2 #### 2"}, "u", "2 #### 2"),
    ({"question": "1+1?"}, "u", None),
    ({"messages": [{"role": "user", "content": "1+1?"}]}, "u", None),
    ({"messages": [{"role": "user", "content": "0?"}, {"role": "assistant", "content": "0"},
                   {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]}, "uau", "2"),
    ({"conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]}, "u", "2"),
    ({"conversations": [{"from": "human", "value": "1+1?"}]}, "u", None),
    ({"conversation": [{"human": "1+1?", "assistant": "2"}]}, "u", "2"),
])
def test_the_last_answer_is_held_back(record, roles, reference):
    content, held_back = interpret(record)
    assert "".join(message.role[0] for message in content.messages) == roles
    assert "1+1" in content.messages[-1].content
    assert held_back == reference


def test_a_wrong_record_is_named_before_anything_is_computed(tiny_model, tmp_path):
    out, file = tmp_path / "a.jsonl", tmp_path / "p.jsonl"
    for wrong, says in [('{"prompt": 3}', "must be a string"), ("{", "not JSON"), ('{"pormpt": "x"}', "no known format"),
                        ('{"prompt": "%s"}' % ("long " * 300), "leaves no room for an answer"),
                        ('{"prompt": "x", "reference": "none"}', "matches nothing in the reference")]:
        file.write_text('{"prompt": "fine", "reference": "1"}\n' * 2 + wrong + "\n")
        with pytest.raises(InputError) as caught:
            generate([tiny_model("llama")], str(file), str(out), threads=1, max_tokens=3, extract=r"\d")
        assert f"{file}:3" in str(caught.value)
        assert says in str(caught.value)
        assert not out.exists()
    file.write_text('{"prompt": "%s"}\n{"prompt": "short"}\n' % ("long " * 300))
    generate([tiny_model("llama")], str(file), str(out), threads=1, max_tokens=3, overlong="skip")
    assert [(line["index"], line["prompt"]) for line in read(out)] == [(1, "short")]
    assert json.loads((tmp_path / "a.summary.json").read_text())["models"][0]["skipped_prompts"] == 1


def test_models_are_compared_on_the_same_prompts(tiny_model, tmp_path):
    """Oracle: means and differences from the lines of the files."""
    data = write(tmp_path / "p.jsonl", [{"prompt": f"Say {number}", "completion": f"say {number} " * (number % 3 + 1)} for number in range(12)])
    models = [tiny_model("llama"), tiny_model("gpt2")]
    text = generate(models, data, str(tmp_path / "a.jsonl"), max_tokens=30, temperature=0.7, n=2, threads=1)
    facts = json.loads((tmp_path / "a.summary.json").read_text())
    files = [read(model["file"]) for model in facts["models"]]
    assert all(len(lines) == 24 for lines in files)
    for model, lines in zip(facts["models"], files, strict=True):
        for name in ("exact", "contains", "rougeL", "chrf"):
            score = model["scores"][name]
            assert score["value"] == pytest.approx(np.mean([line["scores"][name] for line in lines]), abs=1e-12)
            assert score["prompts"] == 12
        assert model["scores"]["chrf"]["low"] < model["scores"]["chrf"]["value"] < model["scores"]["chrf"]["high"]
        assert model["tokens"]["value"] == np.mean([line["completion_tokens"] for line in lines])
        assert sum(model["finish_reasons"].values()) == pytest.approx(1)
    (difference,) = facts["differences"]
    one, two = (np.array([line["scores"]["chrf"] for line in lines]).reshape(12, 2).mean(1) for lines in files)
    chrf = difference["scores"]["chrf"]
    assert chrf["value"] == pytest.approx((two - one).mean())
    assert (chrf["better"], chrf["worse"]) == ((two > one).sum(), (two < one).sum())
    assert chrf["low"] < chrf["value"] < chrf["high"]
    assert text.count("\n") == 6
    assert all(model in text for model in models)


def test_the_command_reads_several_words_and_says_what_it_wrote(lit_llm, tiny_model, prompts, tmp_path):
    done = lit_llm("generate", tiny_model("llama"), "--data", prompts, "--out", "deep/a.jsonl", "--max_tokens", 20, "--threads", 1,
                   "--stop", "e", "k", "--scores", "exact", "--limit", 4)
    assert done.code == 0, done.err
    assert "wrote deep/a.jsonl, deep/a.summary.json" in done.err
    assert "tokens/s" in done.err
    lines = read(tmp_path / "deep/a.jsonl")
    assert len(lines) == 4
    assert not any(letter in line["answer"] for line in lines for letter in "ek")
    assert json.loads((tmp_path / "deep/a.summary.json").read_text())["settings"]["stop"] == ["e", "k"]
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["a.jsonl", "a.summary.json"]


@pytest.mark.parametrize(("options", "says"), [
    ({"models": []}, "no model was given"), ({"out": None}, "out: no file was given"), ({"data": None}, "data: no file was given"),
    ({"n": 2}, "n: at temperature 0"), ({"scores": ["rouge"]}, "scores: unknown score 'rouge'"), ({"extract": "("}, "extract: this is not"),
    ({"out": "a.txt"}, "out: the answers are JSON lines"), ({"models": ["nowhere/at/all"]}, "there is no folder"),
    ({"data": "nothing.jsonl"}, "nothing.jsonl: no such file"), ({"temperature": -1.0}, "temperature"),
    ({"scores": ["extract"]}, "needs a regular expression"), ({"url": "http://127.0.0.1:9", "adapter": "x"}, "no effect with url"),
])
def test_wrong_options_are_named(options, says, tiny_model, prompts, tmp_path):
    with pytest.raises(InputError) as caught:
        generate(**{"models": [tiny_model("llama")], "data": prompts, "out": str(tmp_path / "a.jsonl"), **options})
    assert says in str(caught.value)
