"""Measure the training speed of a GPU relative to its peak rate: the part of `train.py` behind `--device cuda`.

Models of real shapes with random weights train on packed sequences of random tokens, with this project's attention, loss,
optimizer, module and Trainer, each case in a process of its own. The same steps in a plain loop show the cost of Lightning
and the callbacks. Needs a GPU, torch, transformers, peft and lightning; reads no file and uses no network. A case takes about
a minute, more if layers are compiled; `--smoke` runs the same code with tiny shapes on a CPU.

FLOPs per token are those of the model, without recomputation: 6 N + 6 d T for all weights, 4 N + 6 N_adapters + 6 d T for
adapters; attention is causal and limited to documents; N excludes the embedding and includes the head.
"""

import os
import time

from tests.benchmarks.contest import alone

SPECIFIED = 989.5e12                                    # dense bf16 of an H100 SXM or H200, NVIDIA's data sheet
WARM_UP = 5                                             # steps that no time is taken of
SEQ_LEN, MEAN = 4096, 1500                              # tokens per packed sequence; mean tokens of its documents
ROWS = (4, 2, 1)                                        # to a micro-batch: the most that fit
FULL, ADAPTERS = {"lr": 1e-5}, {"lr": 1e-4, "lora": {"r": 16}}
# name: shape, options of the module, precision, share of the measured matrix rate to reach
CASES = {
    "Qwen3-0.6B, all weights": ("QWEN3_06B", FULL, "bf16-mixed", 0.50),
    "Qwen3-0.6B, all weights, compiled": ("QWEN3_06B", FULL | {"compile": True}, "bf16-mixed", 0.50),
    "Qwen3-0.6B, all weights, loss by cut_cross_entropy": (
        "QWEN3_06B", FULL | {"cross_entropy": "cut_cross_entropy"}, "bf16-mixed", None),
    "Qwen3-0.6B, all weights, loss by liger": ("QWEN3_06B", FULL | {"cross_entropy": "liger"}, "bf16-mixed", None),
    "Qwen3-0.6B, LoRA": ("QWEN3_06B", ADAPTERS, "bf16-true", None),
    "Llama-3-8B, LoRA": ("LLAMA3_8B", ADAPTERS, "bf16-true", 0.60),
    "Llama-3-8B, LoRA, compiled": ("LLAMA3_8B", ADAPTERS | {"compile": True}, "bf16-true", 0.60),
    "Llama-3-8B, LoRA, loss by cut_cross_entropy": (
        "LLAMA3_8B", ADAPTERS | {"cross_entropy": "cut_cross_entropy"}, "bf16-true", None),
    "Llama-3-8B, LoRA, loss by liger": ("LLAMA3_8B", ADAPTERS | {"cross_entropy": "liger"}, "bf16-true", None),
    "Llama-3-8B, all weights": ("LLAMA3_8B", FULL | {"gradient_checkpointing": True}, "bf16-mixed", None),
    "Llama-3-8B, all weights, 8-bit AdamW": (
        "LLAMA3_8B", FULL | {"gradient_checkpointing": True, "optimizer": "adamw_8bit"}, "bf16-mixed", None),
}


def device():
    import torch

    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def wait():
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def matmul(size):
    """FLOP/s of a product of bf16 matrices of random numbers (zeros would be quicker), the median of five times ten."""
    import statistics

    import torch

    left, right = (torch.randn(size, size, device=device(), dtype=torch.bfloat16) for _ in range(2))
    took = []
    for _ in range(6):
        wait()
        began = time.perf_counter()
        for _ in range(10):
            left @ right
        wait()
        took.append((time.perf_counter() - began) / 10)
    return 2 * size ** 3 / statistics.median(took[1:])


def card(size):
    """What this machine is."""
    import torch

    name, free = "CPU", 0
    if torch.cuda.is_available():
        name, free = torch.cuda.get_device_name(0), torch.cuda.mem_get_info(0)[0]
    return {"name": name, "free": free, "torch": torch.__version__, "matmul": matmul(size)}


def needs(shape, options, precision, rows, seq_len):
    """(the model's counts, bytes at the height of a step), by the arithmetic of `plan`."""
    import torch

    from lit_llm.kernels import attention
    from lit_llm.models.adapters.adapter import wrap_peft
    from lit_llm.models.adapters.peft_method import LoRA
    from lit_llm.models.load import skeleton
    from lit_llm.training.planning import estimate, footprint, trace

    def build():
        with torch.device("meta"):
            inner = skeleton(None, shape, attention=attention.NAME)
            return wrap_peft(inner, LoRA(**options["lora"]).as_peft()) if "lora" in options else inner

    whole, tokens, half = build(), rows * seq_len, precision.startswith("bf16")
    counts = footprint.count(whole, whole.get_base_model() if "lora" in options else whole)
    way = "full" if options.get("gradient_checkpointing") else "none"
    setting = estimate.Setting(0, 1, tokens, tokens, way, options.get("optimizer", "adamw"), precision, cpu=False)
    step = trace.step(build, list(range(0, tokens + 1, seq_len)), supervised=tokens, recompute_=way,
                      half=half and precision.endswith("true"), autocast=half, cuda=True)
    return counts, estimate.memory(counts, setting, step).total


def measure(name, smoke, seconds, rows):
    """One case: tokens/s through the Trainer and by hand, FLOPs of a token, peak bytes. Runs in a process of its own."""
    import tempfile

    import torch

    import tests.random_models as shapes
    from lit_llm.models.adapters.peft_method import LoRA
    from lit_llm.training.planning import estimate
    from lit_llm.training.trainer import Trainer

    shape, options, precision, _ = case(name, smoke)
    seq_len = shapes.SMALL["max_position_embeddings"] if smoke else SEQ_LEN
    counts, _ = needs(shape, options, precision, rows, seq_len)
    made = shapes.batches(shape["vocab_size"], rows=rows, seq_len=seq_len, count=4, mean=seq_len * MEAN / SEQ_LEN)
    options = options | ({"lora": LoRA(**options["lora"])} if "lora" in options else {})
    torch.manual_seed(0)
    clock = stopwatch(made, seconds)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(accelerator="gpu" if torch.cuda.is_available() else "cpu", devices=1, precision=precision,
                          max_steps=100_000, default_root_dir=f"{folder}/run", callbacks=[clock],
                          enable_checkpointing=False, enable_progress_bar=False, gradient_clip_val=1.0)
        trainer.exports = False
        with shapes.adapters_on_random_weights():
            trainer.fit(shapes.Shaped(shape, schedule="constant", warmup=0, **options), shapes.Rounds(made, 100_000))
    reach = sum(map(shapes.reach, made)) / len(made)
    return clock.seen | {"flops": estimate.flops_per_token(counts, reach), "rows": rows, "seq_len": seq_len,
                         "trained": counts.trained, "total": counts.total}


def stopwatch(made, seconds):
    """A callback that times steps after the warm-up for some seconds, then the same number in a plain loop."""
    import lightning as L
    import torch

    class Stopwatch(L.Callback):
        def __init__(self):
            self.seen, self.steps, self.tokens, self.began, self.losses = {}, 0, 0, 0.0, []

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            self.steps += 1
            if self.steps <= WARM_UP:
                wait()
                self.began = time.perf_counter()
                if self.steps == WARM_UP and torch.cuda.is_available():
                    torch.cuda.reset_peak_memory_stats()
            else:
                self.tokens += batch["num_tokens"]
                trainer.should_stop = time.perf_counter() - self.began > seconds
            if self.steps == 1:
                self.seen["first_loss"] = float(outputs["loss"])

        def on_train_end(self, trainer, module):
            wait()
            took = time.perf_counter() - self.began
            self.seen["rate"] = self.tokens / took
            self.seen["ms_per_step"] = 1000 * took / (self.steps - WARM_UP)
            if torch.cuda.is_available():
                self.seen["allocated"] = torch.cuda.max_memory_allocated()
                self.seen["reserved"] = torch.cuda.max_memory_reserved()
            self.seen["rate_by_hand"] = by_hand(trainer, module, made, self.steps - WARM_UP)

    return Stopwatch()


def by_hand(trainer, module, made, steps):
    """Tokens/s of the same steps in a bare loop: no Lightning, no callbacks, no check that gradients are finite."""
    import torch

    ready = [trainer.strategy.batch_to_device(batch) for batch in made]
    optimizer, weights = trainer.optimizers[0], [weight for weight in module.parameters() if weight.requires_grad]
    tokens = 0
    optimizer.zero_grad()
    for step in range(-2, steps):
        if step == 0:
            wait()
            began = time.perf_counter()
        batch = ready[step % len(ready)]
        with trainer.precision_plugin.forward_context():
            loss = module._nll(batch).total / batch["num_supervised"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        tokens += batch["num_tokens"] if step >= 0 else 0
    wait()
    return tokens / (time.perf_counter() - began)


def case(name, smoke):
    """Of `CASES`, or with a tiny model of the same kind in its place."""
    import tests.random_models as shapes

    key, *rest = CASES[name]
    shape = getattr(shapes, key)
    return (shape | shapes.SMALL | ({"head_dim": 16} if "head_dim" in shape else {}) if smoke else shape, *rest)


def fitting(name, smoke, free):
    """Rows of a micro-batch: the most whose estimate leaves a twentieth of the device free, and that estimate."""
    shape, options, precision, _ = case(name, smoke)
    for rows in (2,) if smoke else ROWS:
        _, need = needs(shape, options, precision, rows, SEQ_LEN)
        if smoke or need < 0.95 * free:
            return rows, need
    return 0, need


def obstacle(name, smoke):
    """Why a case cannot run here, but for its size."""
    from importlib.util import find_spec

    from tests.benchmarks import cross_entropy

    if CASES[name][1].get("optimizer") == "adamw_8bit" and find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed"
    if why := cross_entropy.obstacle(CASES[name][1].get("cross_entropy", "fused"), smoke):
        return why
    return "tiny layers are not worth compiling" if smoke and CASES[name][1].get("compile") else None


def run(only, *, smoke, seconds):
    """Print a table, line by line as cases end."""
    import torch

    if not smoke and not torch.cuda.is_available():
        raise SystemExit("no CUDA device is here; --smoke runs tiny shapes on the CPU")
    if smoke:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    here = alone(card, 256 if smoke else 8192)
    rate = here["matmul"]
    print(f"{here['name']}, {here['free'] / 2**30:.0f} GiB free, torch {here['torch']}: a product of bf16 matrices runs at "
          f"{rate / 1e12:.3g} TFLOP/s\n")
    print("| case | tokens at once | tokens/s | by hand | ms/step | GFLOP/token | of the matrix rate | to reach | "
          "of 989.5 TFLOP/s | peak GiB (reserved) | estimated GiB | first loss |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for name in CASES:
        if only and only not in name:
            continue
        rows, need = fitting(name, smoke, here["free"])
        why = obstacle(name, smoke) or (None if rows else f"needs {need / 2**30:.0f} GiB")
        if why:
            print(f"| {name} | skipped: {why} |", flush=True)
            continue
        try:
            seen = alone(measure, name, smoke, seconds, rows)
        except SystemExit as error:                     # such as out of memory; the other cases continue
            print(f"| {name} | failed: {error} |", flush=True)
            continue
        print(line(name, seen, rate, need), flush=True)


def line(name, seen, rate, need):
    """A row of the table."""
    goal = CASES[name][3]
    worth = seen["rate"] * seen["flops"]
    aim = f"{100 * goal:.0f} % = {goal * rate / seen['flops']:,.0f} tokens/s" if goal else ""
    peak = f"{seen['allocated'] / 2**30:.1f} ({seen['reserved'] / 2**30:.1f})" if "allocated" in seen else ""
    return (f"| {name} | {seen['rows']} x {seen['seq_len']} | {seen['rate']:,.0f} | {seen['rate_by_hand']:,.0f} | "
            f"{seen['ms_per_step']:.1f} | {seen['flops'] / 1e9:.3g} | {100 * worth / rate:.1f} % | {aim} | "
            f"{100 * worth / SPECIFIED:.1f} % | {peak} | {need / 2**30:.1f} | {seen['first_loss']:.2f} |")
