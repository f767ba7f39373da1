"""Word-level perplexity against lm-evaluation-harness: `evaluate --rolling wikitext` and its `wikitext` task, offline.

    python tests/benchmarks/word_perplexity.py --model FOLDER --text wiki.test.raw --lm-eval PYTHON

PYTHON is an interpreter with lm_eval, which may have an environment of its own. Its own `hf` model gets the articles of the
text in a local file, with the task's own preparation and results (`preprocess_wikitext.py` of lm_eval). Both compute in float32
on the CPU. The exit code is 1 if a figure differs by more than 1e-6 relatively.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MOST = 1e-6
FIGURES = ("word_perplexity", "byte_perplexity", "bits_per_byte")


def lm_eval_figures(model, file, context):
    """The figures of lm_eval's `hf` model on its `wikitext` task with local articles; run by its interpreter."""
    from importlib.util import module_from_spec, spec_from_file_location

    import lm_eval
    from lm_eval import simple_evaluate

    source = Path(lm_eval.__file__).parent / "tasks" / "wikitext" / "preprocess_wikitext.py"
    spec = spec_from_file_location("preprocess_wikitext", source)
    own = module_from_spec(spec)
    spec.loader.exec_module(own)
    task = {"task": "wikitext_local", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": file}},
            "test_split": "test", "output_type": "loglikelihood_rolling", "doc_to_text": "",
            "doc_to_target": own.wikitext_detokenizer, "process_results": own.process_results,
            "metric_list": [{"metric": name} for name in FIGURES]}
    arguments = {"pretrained": model, "dtype": "float32", "device": "cpu", "max_length": context}
    evaluation = simple_evaluate(model="hf", model_args=arguments, tasks=[task], batch_size=1, bootstrap_iters=0)
    return {name: evaluation["results"]["wikitext_local"][f"{name},none"] for name in FIGURES}


def own_figures(model, text, context, folder):
    """The figures of `evaluate`."""
    from lit_llm.evaluation.command import evaluate

    evaluate([model], [text], rolling="wikitext", seq_len=context, dtype="float32", format="text", out=str(folder / "ours.json"))
    return json.loads((folder / "ours.json").read_text(encoding="utf-8"))["models"][0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True, help="a file of WikiText")
    parser.add_argument("--lm-eval", required=True, help="python with lm_eval; - in the process that it starts")
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 100])
    options = parser.parse_args()
    if options.lm_eval == "-":
        print(json.dumps(lm_eval_figures(options.model, options.text, options.contexts[0])))
        return 0
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from lit_llm.evaluation.rolling import articles

    different = False
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pages = [{"page": page} for page in articles(Path(options.text).read_text(encoding="utf-8")) if page.strip()]
        (folder / "pages.jsonl").write_text("\n".join(json.dumps(page) for page in pages) + "\n", encoding="utf-8")
        for context in options.contexts:
            began = time.perf_counter()
            figures = own_figures(options.model, options.text, context, folder)
            between = time.perf_counter()
            words = [options.lm_eval, "-P", __file__, "--model", options.model, "--text", str(folder / "pages.jsonl"), "--lm-eval", "-",
                     "--contexts", str(context)]
            answer = subprocess.run(words, capture_output=True, text=True, check=False)
            assert answer.returncode == 0, answer.stderr[-3000:]
            expected = json.loads(answer.stdout.strip().splitlines()[-1])
            print(f"context {context}, {figures['documents']} articles, {figures['nll']['tokens']:,} tokens, {between - began:.0f} s "
                  f"and {time.perf_counter() - between:.0f} s with its start")
            for name in FIGURES:
                value, other = figures[name]["value"], expected[name]
                different |= abs(value - other) > MOST * other
                print(f"  {name:16} {value:.9g}  lm_eval {other:.9g}  relative difference {abs(value - other) / other:.1e}", flush=True)
    return int(different)


if __name__ == "__main__":
    sys.exit(main())
