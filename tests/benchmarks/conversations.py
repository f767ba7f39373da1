"""Measure how fast conversations are converted to tokens and labels, compared with TRL's dataset preparation.

    python -m tests.benchmarks.conversations --data FOLDER --trl PYTHON

PYTHON is the interpreter of an environment with trl, which does not need this package. Single answers are Alpaca's, in
English and Chinese; in `turns` four of them follow each other. TRL gets the loaded file and uses its defaults
(`SFTTrainer`, `assistant_only_loss`, its training template for Qwen2.5, two processes); lit_llm's time is that of `prepare`,
including reading and writing. Both must give the same tokens. TRL supervises more of them: those that its template writes
after `<|im_end|>`.
"""

import argparse
import itertools
import json
import os
import tempfile
from functools import partial
from pathlib import Path

from tests.benchmarks.contest import alone, medians, watch


def tokenizer_with_template(data, folder):
    """Qwen2's tokenizer with Qwen2.5's template."""
    from transformers import AutoTokenizer

    hf = AutoTokenizer.from_pretrained(data / "tokenizers/qwen2")
    hf.chat_template = (data / "templates/llamacpp/Qwen-Qwen2.5-7B-Instruct.jinja").read_text(encoding="utf-8")
    hf.save_pretrained(f"{folder}/tokenizer")
    return f"{folder}/tokenizer"


def written(data, folder, count, turns):
    """`count` conversations of so many questions, each with a prefix of its own, as JSON lines of `messages`."""
    pairs = [one for name in ("en", "zh") for one in json.loads(
        (data / f"sft/llamafactory/alpaca_{name}_demo.json").read_text(encoding="utf-8")) if one["output"].strip()]
    endless, path = itertools.cycle(pairs), f"{folder}/chats{turns}.jsonl"
    with open(path, "w", encoding="utf-8") as stream:
        for number in range(count):
            messages = []
            for pair in itertools.islice(endless, turns):
                question = "\n".join(part for part in (pair["instruction"], pair.get("input")) if part)
                messages += [{"role": "user", "content": f"{number}. {question}"},
                             {"role": "assistant", "content": pair["output"]}]
            stream.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return path


def lit_llm_prepare(tokenizer, path, num_proc):
    from lit_llm.data.records.sources import Source
    from lit_llm.data.tokens.prepare import prepare
    from lit_llm.text.tokenizer import Tokenizer

    loaded = Tokenizer.load(tokenizer)
    with tempfile.TemporaryDirectory(dir=Path(path).parent) as cache, watch() as took:
        report = prepare(Source(path), loaded, cache_dir=cache, num_proc=num_proc).report
    return {"tokens": report.tokens, "supervised": report.supervised, **took}


def trl(tokenizer, path, num_proc):
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    import datasets
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
    from trl import SFTConfig, SFTTrainer

    datasets.disable_caching()
    datasets.disable_progress_bars()
    hf = AutoTokenizer.from_pretrained(tokenizer)
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(hf), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                         num_attention_heads=1, num_key_value_heads=1))
    took = {}

    class Timed(SFTTrainer):
        def _prepare_dataset(self, *words, **more):
            with watch() as figures:
                done = super()._prepare_dataset(*words, **more)
            took.update(figures)
            return done

    with tempfile.TemporaryDirectory(dir=Path(path).parent) as folder:
        data = datasets.load_dataset("json", data_files=path, split="train", cache_dir=folder)
        args = SFTConfig(folder, assistant_only_loss=True, dataset_num_proc=num_proc, max_length=None, use_cpu=True,
                         bf16=False, report_to="none")
        made = Timed(model, args, train_dataset=data, processing_class=hf).train_dataset
        tokens = supervised = 0
        for batch in made.iter(1000):
            tokens += sum(map(len, batch["input_ids"]))
            supervised += sum(len(one) - one.count(-100) for one in batch["labels"])
    return {"tokens": tokens, "supervised": supervised, **took}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--trl", required=True, metavar="PYTHON")
    parser.add_argument("--count", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num-proc", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = tokenizer_with_template(args.data, folder)
        for name, turns in (("single answers", 1), ("four turns", 4)):
            path = written(args.data, folder, args.count // turns, turns)
            of = medians(args.rounds, {
                "trl": partial(alone, trl, tokenizer, path, args.num_proc, python=args.trl),
                "ours": partial(alone, lit_llm_prepare, tokenizer, path, args.num_proc)})
            more = (of["trl"]["supervised"] - of["ours"]["supervised"]) / args.count
            comparison = f"TRL learns {more:g} more tokens an answer" if of["trl"]["tokens"] == of["ours"]["tokens"] else \
                f"NOT THE SAME TOKENS: {of}"
            print(f"{name}: {args.count // turns:,} conversations, {of['ours']['tokens']:,.0f} tokens; "
                  f"{of['ours']['tokens'] / of['ours']['seconds']:,.0f} tokens/s, {of['trl']['seconds'] / of['ours']['seconds']:.1f} "
                  f"times TRL's (cpu: {of['trl']['cpu'] / of['ours']['cpu']:.1f} times less); {comparison}", flush=True)


if __name__ == "__main__":
    main()
