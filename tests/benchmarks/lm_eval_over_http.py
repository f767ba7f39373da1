"""lm-eval over HTTP against lm-eval in process: the served model is the model.

    python -m serve --model MODEL
    python -m tests.benchmarks.lm_eval_over_http --url http://127.0.0.1:8000 --model MODEL --data ../shared/data/eval

The second command runs in an environment of its own (`pip install torch==2.13.0 "lm_eval[api]==0.4.13" accelerate`). It evaluates the
same questions (PIQA, CMMLU) twice and prints accuracies and the largest difference of a choice's log-probability, of the whole choice
and a token; the exit code is 1 if accuracies differ, or log-probabilities by more than 1e-5 a token (float32).
"""

import argparse
import csv
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
MOST = 1e-5                                         # difference of log-probabilities a token; those of a choice are sums
BYTES = 400                                         # longer questions would be cut to a small model's context, each in its own way


def piqa(folder):
    labels = (folder / "piqa_valid-labels.lst").read_text().split()
    lines = (folder / "piqa_valid.jsonl").read_text(encoding="utf-8").splitlines()
    for line, label in zip(lines, labels, strict=True):
        record = json.loads(line)
        yield f"Question: {record['goal']}\nAnswer:", [record["sol1"], record["sol2"]], int(label)


def cmmlu(file):
    with file.open(encoding="utf-8", newline="") as lines:
        for record in csv.DictReader(lines):
            yield f"{record['Question']}\n答案：", [record[letter] for letter in "ABCD"], "ABCD".index(record["Answer"])


def written(name, questions, folder, limit):
    """Write a task of multiple choice for lm-eval, and return its choices."""
    short = [{"question": text, "choices": choices, "label": label} for text, choices, label in questions
             if len((text + max(choices, key=len)).encode()) < BYTES][:limit]
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(question, ensure_ascii=False) + "\n" for question in short), encoding="utf-8")
    task = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"validation": str(file)}},
            "validation_split": "validation", "output_type": "multiple_choice", "doc_to_text": "{{question}}",
            "doc_to_choice": "choices", "doc_to_target": "label",
            "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")]}
    (folder / f"{name}.yaml").write_text(json.dumps(task, ensure_ascii=False), encoding="utf-8")     # JSON is YAML
    return [choice for question in short for choice in question["choices"]]


def evaluated(model, arguments, tasks, folder):
    """(accuracies, log-probabilities and greedy flags of all choices) of each task."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    evaluation = simple_evaluate(model=model, model_args=arguments, tasks=tasks, batch_size=8, log_samples=True, bootstrap_iters=0,
                            task_manager=TaskManager(include_path=str(folder), include_defaults=False))
    for task in tasks:
        scores = {metric: evaluation["results"][task][f"{metric},none"] for metric in ("acc", "acc_norm")}
        samples = sorted(evaluation["samples"][task], key=lambda sample: sample["doc_id"])
        yield task, scores, [choice for sample in samples for choice in sample["filtered_resps"]]


def tokens_of(model):
    """Counts the tokens of a text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", required=True, help="folder of the model that the server has loaded")
    parser.add_argument("--data", required=True, type=Path, help="folder with PIQA and CMMLU")
    parser.add_argument("--limit", type=int, default=60, help="questions of each task, default: %(default)s")
    options = parser.parse_args()
    different = False
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sets = {"piqa_local": piqa(options.data), **{f"cmmlu_{file.stem}": cmmlu(file) for file in sorted((options.data / "cmmlu").glob("*.csv"))}}
        choices = {name: written(name, questions, folder, options.limit) for name, questions in sets.items()}
        served = {"base_url": f"{options.url}/v1/completions", "tokenizer": options.model, "model": options.model, "max_length": 511,
                  "tokenized_requests": True, "num_concurrent": 1, "add_bos_token": True}
        over_http = list(evaluated("local-completions", served, list(sets), folder))
        in_process = evaluated("hf", {"pretrained": options.model, "dtype": "float32", "device": "cpu", "max_length": 511,
                                   "add_bos_token": True}, list(sets), folder)
        count = tokens_of(options.model)
        print(f"{'task':28} choices  acc http / process  acc_norm http / process  difference  a token  greedy flags")
        for (name, scores, logprobs), (_, expected, wanted) in zip(over_http, in_process, strict=True):
            differences = [abs(float(one[0]) - float(other[0])) for one, other in zip(logprobs, wanted, strict=True)]
            largest = max(difference / count(choice) for difference, choice in zip(differences, choices[name], strict=True))
            greedy = sum(str(one[1]) == str(other[1]) for one, other in zip(logprobs, wanted, strict=True))
            different |= scores != expected or largest > MOST or greedy < len(wanted)
            print(f"{name:28} {len(wanted):7}  {scores['acc']:.4f} / {expected['acc']:.4f}     {scores['acc_norm']:.4f} / "
                  f"{expected['acc_norm']:.4f}          {max(differences):.1e}  {largest:.1e}  {greedy} of {len(wanted)} equal")
    return int(different)


if __name__ == "__main__":
    sys.exit(main())
