"""Every causal LM of transformers that can be built small: the engine's greedy answers against `model.generate`.

Linear layers are packed as in `Engine.load`. Eight requests of different lengths join one after another, some are cancelled,
and the cache is so small that requests wait and give their slots to others. Prints whether the requests of a model share a
pass, and how many answers differ. An answer that differs is compared again in float64 logits: where the two likeliest tokens
are closer than 1e-4 it is a tie.

    python -m tests.benchmarks.engine_sweep                     # all, some minutes
    python -m tests.benchmarks.engine_sweep --only llama gemma2
"""

import argparse
import random
import sys
import warnings

import torch

from lit_llm.inference.engine import Engine
from lit_llm.inference.sampling import SamplingParams
from lit_llm.kernels import packed_linear
from tests.benchmarks.architectures import SPECIAL, VARIANTS, tiny

warnings.filterwarnings("ignore")
CONTEXT, REQUESTS = 300, 8


def answers(engine, prompts, news):
    """Tokens of each request; two more join and are cancelled."""
    token_ids, waiting, turns = {name: [] for name in prompts}, list(prompts), 0
    while waiting or engine.has_work:
        if waiting and turns % 3 == 0:
            name = waiting.pop(0)
            engine.add(name, prompts[name], SamplingParams(max_tokens=news[name], temperature=0))
        if turns in (4, 9):
            engine.add(f"gone{turns}", list(prompts["r0"]) * 2, SamplingParams(max_tokens=50, temperature=0))
        if turns in (7, 20):
            engine.cancel("gone4")
            engine.cancel("gone9")
        for event in engine.step():
            if event.error:
                raise event.error
            if event.request_id in token_ids:
                token_ids[event.request_id].append(event.token_id)
        turns += 1
    return token_ids


def main():
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KINDS

    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--only", nargs="*", default=[])
    options = arguments.parse_args()
    cases = {kind: {"model_type": kind, **SPECIAL.get(kind, {})} for kind in KINDS} | VARIANTS
    count = {"together": 0, "alone": 0, "different": 0, "failed": 0, "not built": 0}
    for name, keys in cases.items():
        if options.only and name not in options.only:
            continue
        try:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(tiny(keys), dtype=torch.float32).eval()
        except Exception as error:
            count["not built"] += 1
            print(f"{name:<34} not built: {type(error).__name__}", flush=True)
            continue
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim > 1:
                    weight.normal_(0, 0.15)
        draw, words = random.Random(0), model.config.get_text_config().vocab_size
        prompts = {f"r{at}": [draw.randrange(4, words) for _ in range(draw.choice([1, 2, 5, 20, 60]))]
                   for at in range(REQUESTS)}
        news = {name: draw.randrange(1, 30) for name in prompts}
        model.generation_config = GenerationConfig()    # no beams or forced tokens, and no end
        try:
            want = {}
            for request_id, prompt in prompts.items():
                out = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                                     max_new_tokens=news[request_id], do_sample=False, pad_token_id=0, use_cache=True)
                want[request_id] = out[0, len(prompt):].tolist()
            text = model.config.get_text_config()
            text.max_position_embeddings = min(getattr(text, "max_position_embeddings", None) or CONTEXT, CONTEXT)
            packed_linear.pack(model)
            engine = Engine(model, max_running=6, cache_tokens=2)
            got = answers(engine, prompts, news)
        except Exception as error:
            count["failed"] += 1
            print(f"{name:<34} failed: {type(error).__name__}: {str(error)[:100]}", flush=True)
            continue
        wrong = [request_id for request_id in prompts if got[request_id] != want[request_id]]
        ties = [request_id for request_id in wrong if is_tie(model, prompts[request_id], got[request_id], want[request_id])]
        way = "alone" if engine.obstacle else "together"
        count[way] += 1
        count["different"] += len(wrong) > len(ties)
        print(f"{name:<34} {way:<9} {len(wrong)} differ, {len(ties)} of them ties  {engine.obstacle or ''}", flush=True)
    print(count)
    sys.exit(count["different"] > 0)


def is_tie(model, prompt, got, want):
    """Whether two answers part where the likeliest tokens are as likely."""
    at = next(at for at, (one, other) in enumerate(zip(got, want, strict=False)) if one != other)
    with torch.no_grad():
        model.set_attn_implementation("eager")
        logits = model(input_ids=torch.tensor([prompt + want[:at]]), use_cache=False).logits[0, -1].double()
    return abs(float(logits[got[at]] - logits[want[at]])) < 1e-4


if __name__ == "__main__":
    main()
