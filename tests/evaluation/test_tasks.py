"""If this breaks: figures of lm-evaluation-harness that are computed here cannot be compared with published ones, or a task file
from the internet runs a program. Oracle: lm_eval's own `hf` model, which computes with plain transformers.
"""

import json
import os
import random
from importlib.util import find_spec
from pathlib import Path

import pytest

from lit_llm.errors import InputError
from lit_llm.evaluation.command import evaluate
from lit_llm.evaluation.tasks import code
from lit_llm.evaluation.tasks.command import _found, table

needs_lm_eval = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm_eval is not installed (the extra `tasks`)")
MOST = 1e-4                                         # difference of the log-probability of a choice
QUESTIONS = [{"question": f"What follows {number}? " * (1 + number % 3), "choices": [" a kite", " 什么颜色", f" {number + 1}", "\nno"],
              "label": number % 4, "answer": str(number + 1),
              "text": " ".join(random.Random(number).choices(["kite", "什么", "one", "Why?", "x"], k=200))} for number in range(8)]
DATA = {"dataset_path": "json", "test_split": "test"}
TASKS = {
    "choices_local": {"output_type": "multiple_choice", "doc_to_text": "{{question}}\nAnswer:", "doc_to_choice": "choices", "doc_to_target": "label",
                      "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]},
    "texts_local": {"output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}",
                    "generation_kwargs": {"until": ["e", "\n\n"], "do_sample": False, "max_gen_toks": 12},
                    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]},
    "rolling_local": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
                      "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}]},
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(question, ensure_ascii=False) + "\n" for question in QUESTIONS), encoding="utf-8")
    for name, task in TASKS.items():
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **DATA, "dataset_kwargs": {"data_files": {"test": str(file)}}, **task}))
    return folder


def own(folder, tasks, **options):
    from lit_llm.evaluation.scoring.subject import find
    from lit_llm.evaluation.tasks import harness

    model = harness.HarnessModel(find(folder), dtype="float32", quantize=None, device="cpu")
    names, folders, _ = _found([str(tasks)])
    return harness.run(model, names, folders, own=False, **{"chat": False, "num_fewshot": None, "limit": None, **options})


def answers(results):
    return {task: [sample["filtered_resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
            for task, samples in results["samples"].items()}


@needs_lm_eval
@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
@pytest.mark.parametrize("shots", [0, 2])
def test_results_are_those_of_lm_evals_own_model(kind, shots, tiny_model, tasks):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    folder = tiny_model(kind)
    have = own(folder, tasks, num_fewshot=shots, limit=8)
    want = simple_evaluate(model="hf", model_args={"pretrained": folder, "dtype": "float32", "device": "cpu"}, tasks=list(TASKS), batch_size=4,
                           num_fewshot=shots, limit=8, bootstrap_iters=0, log_samples=True, task_manager=TaskManager(include_path=str(tasks), include_defaults=False))
    ours, theirs = answers(have), answers(want)
    for one, other in zip(ours["choices_local"], theirs["choices_local"], strict=True):
        for (logprob, greedy), (expected, flag) in zip(one, other, strict=True):
            assert abs(float(logprob) - float(expected)) < MOST
            assert str(greedy) == str(flag)
    for one, other in zip(ours["texts_local"], theirs["texts_local"], strict=True):
        assert one[0].rstrip("\ufffd") == other[0].rstrip("\ufffd")   # a character that max_gen_toks cut is left out here
    for one, other in zip(ours["rolling_local"], theirs["rolling_local"], strict=True):     # several windows of the context
        assert float(one[0]) == pytest.approx(float(other[0]), rel=1e-6)
    for task in TASKS:
        for key, value in want["results"][task].items():
            if isinstance(value, float) and "stderr" not in key:
                assert have["results"][task][key] == pytest.approx(value, rel=1e-5), key


@needs_lm_eval
def test_a_chat_is_asked_with_the_tokens_of_the_training(tiny_model, tasks):
    """Oracle: transformers on the ids of its own chat template, followed by those of the choice."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny_model("qwen3")
    results = own(folder, tasks, chat=True, limit=3)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    samples = sorted(results["samples"]["choices_local"], key=lambda sample: sample["doc_id"])
    assert len(samples) == 3
    for sample, question in zip(samples, QUESTIONS, strict=False):
        ids = tokenizer.apply_chat_template([{"role": "user", "content": question["question"] + "\nAnswer:"}], add_generation_prompt=True)["input_ids"]
        for (logprob, _), choice in zip(sample["filtered_resps"], question["choices"], strict=True):
            answer = tokenizer.encode(choice)
            with torch.no_grad():
                logprobs = model(torch.tensor([[*ids, *answer]])).logits[0].log_softmax(-1)
            want = sum(float(logprobs[len(ids) - 1 + at, token]) for at, token in enumerate(answer))
            assert float(logprob) == pytest.approx(want, abs=MOST)


@needs_lm_eval
def test_the_command_prints_intervals_and_differences(lit_llm, tiny_model, tasks, tmp_path):
    done = lit_llm("evaluate", tiny_model("llama"), tiny_model("gpt2"), "--tasks", tasks / "choices_local.yaml", "--limit", 6, "--out", "t.json")
    assert done.code == 0, done.err
    rows = [line.split() for line in done.out.splitlines()]
    assert [row[1:3] for row in rows[1:5]] == [["choices_local", metric] for metric in ("acc", "acc_norm")] * 2
    assert rows[5][1] == "-"
    written = json.loads((tmp_path / "t.json").read_text())
    assert len(written["models"][tiny_model("gpt2")]["samples"]["choices_local"]) == 6
    with pytest.raises(InputError, match="lm_eval knows no task 'no_such_task'"):
        evaluate([tiny_model("llama")], tasks=[str(tasks), "no_such_task"])


@needs_lm_eval
def test_a_template_runs_no_program(tiny_model, tmp_path):
    marker, file = tmp_path / "ran", tmp_path / "q.jsonl"
    file.write_text('{"question": "a", "answer": "b"}\n' * 2)
    attack = "{{ cycler.__init__.__globals__.os.system('touch " + str(marker) + "') }}"
    (tmp_path / "bad.yaml").write_text(json.dumps({"task": "bad", **DATA, "dataset_kwargs": {"data_files": {"test": str(file)}},
                                                   **TASKS["texts_local"], "doc_to_text": attack}))
    with pytest.raises(Exception, match=r"unsafe|not safe|access"):
        own(tiny_model("llama"), tmp_path)
    assert not marker.exists()


@pytest.mark.parametrize("text", [
    "task: bad\nprocess_docs: !function helper.run\n", "task: bad\nmetric_list:\n  - metric: !function helper.run\n",
    "class: !function helper.Task\ntask: bad\n", "task: bad\nx: !!python/object/apply:os.system [touch ran]\n",
    "task: bad\ninclude: parts/common\n",
])
def test_a_task_with_code_of_its_own_is_refused(text, tmp_path, monkeypatch):
    monkeypatch.delenv(code.TRUST, raising=False)
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "common").write_text("doc_to_text: !function helper.run\n")
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(InputError, match="runs code of its own") as caught:
        _found([str(tmp_path)])
    assert "--trust-task-code" in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    (tmp_path / "fine.yaml").write_text("task: fine\n")
    with pytest.raises(InputError, match="runs code of its own"):       # lm_eval reads the whole folder
        _found([str(tmp_path / "fine.yaml")])
    assert code.typed(["--limit", "3", code.OPTION]) == ["--limit", "3"]
    assert os.environ[code.TRUST]
    _found([str(tmp_path)])
    code.typed([])
    assert code.TRUST not in os.environ


def test_names_of_tasks_are_read(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "one.yaml").write_text("task: one\n")
    (tmp_path / "group.yml").write_text("group: both\ntask:\n  - one\n")
    (tmp_path / "_common.yaml").write_text("dataset_path: json\n")
    assert sorted(_found([str(tmp_path)])[0]) == ["both", "one"]
    assert _found([str(tmp_path), "one"]) == (["one"], [tmp_path], False)
    assert _found(["piqa"]) == (["piqa"], [], True)
    with pytest.raises(InputError, match="0 task files"):
        _found([str(Path(tmp_path / "empty")) if (tmp_path / "empty").mkdir() is None else ""])


def test_a_table_has_differences_on_the_same_questions():
    rows = [("a", "t", "acc", 0.5, {0: 1.0, 1: 0.0, 2: 1.0, 3: 0.0, 4: 1.0, 5: 0.0}),
            ("b", "t", "acc", 1.0, {0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0, 4: 1.0, 5: 1.0})]
    lines = table(rows).splitlines()
    assert lines[3].startswith("b - a  t     acc     +0.5000  [")
    assert len(lines) == 4


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm_eval is installed")
def test_a_missing_package_is_named(tiny_model):
    with pytest.raises(InputError) as caught:
        evaluate([tiny_model("llama")], tasks=["piqa"])
    assert str(caught.value) == "tasks: the package 'lm_eval' is not installed\n  pip install 'lit_llm[tasks]'"


@pytest.mark.parametrize("option", [{"data": ["a.jsonl"]}, {"base": "x"}, {"url": "http://127.0.0.1:9"}])
def test_what_has_no_effect_with_tasks_is_refused(option, tiny_model):
    with pytest.raises(InputError, match="has no effect with tasks"):
        evaluate([tiny_model("llama")], tasks=["piqa"], **option)
