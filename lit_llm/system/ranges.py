"""The numbers that each key accepts: one table for the parser, for classes used in Python, and for the help.

Types, and whether a key may be null, are in the signatures; the table adds the limits. Keys of classes given by
class_path are listed under the class name.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from lit_llm.errors import InputError, did_you_mean

SHOWN = 60                                          # characters of a value in a message
STEPS = 1_000_000_000                               # limit on steps, sequences and batches


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers from `low` to `high`.

    Args:
        low: Lower limit.
        high: Upper limit.
        whole: Whether only whole numbers are allowed.
        above: Whether `low` itself is excluded.
        below: Whether `high` itself is excluded.
    """

    low: float
    high: float
    whole: bool = True
    above: bool = False
    below: bool = False

    def holds(self, value: float) -> bool:
        """Whether a number (not a bool) is in the range."""
        if self.whole and not isinstance(value, int):
            return False
        if not self.whole and isinstance(value, float) and not math.isfinite(value):
            return False
        fits = self.low < value if self.above else self.low <= value
        return fits and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        """A description.

        >>> print(Range(1, 4096), Range(0, 1, whole=False, below=True), Range(-1, -1), sep="; ")
        a whole number from 1 to 4,096; a number from 0 to below 1; -1
        """
        if self.low == self.high:
            return _number(self.low)
        what = "a whole number" if self.whole else "a number"
        if self.above:
            return f"{what} above {_number(self.low)}, {'below' if self.below else 'at most'} {_number(self.high)}"
        return f"{what} from {_number(self.low)} to {'below ' if self.below else ''}{_number(self.high)}"


@dataclass(frozen=True, slots=True)
class Numbers:
    """The numbers that a key accepts.

    Args:
        example: An example value.
        ranges: A number must be in one of them.
        flag: Whether true and false are allowed as well.
    """

    example: str
    ranges: tuple[Range, ...]
    flag: bool = False

    def __str__(self) -> str:
        return " or ".join(map(str, self.ranges))


def _number(value: float) -> str:
    """Format a limit: 1,000,000 and 0.5."""
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def whole(low: int, high: int, example: int, *also: int) -> Numbers:
    """Whole numbers, with additional single values such as -1."""
    return Numbers(str(example), (Range(low, high), *(Range(one, one) for one in also)))


def number(low: float, high: float, example: str, *, above: bool = False, below: bool = False) -> Numbers:
    """Any finite numbers."""
    return Numbers(example, (Range(low, high, whole=False, above=above, below=below),))


def batches(least: int, example: str) -> Numbers:
    """A number of batches as a whole number, or a share of them as a fraction."""
    share = Range(0.0, 1.0, whole=False, above=least > 0)
    return Numbers(example, (Range(least, STEPS), share))


RANGES: dict[str, Numbers] = {
    "seed_everything": Numbers("42", (Range(0, 2**32 - 1),), flag=True),

    "model.lr": number(0, 10, "2e-4", above=True),
    "model.warmup": number(0, STEPS, "0.03"),
    "model.cooldown": number(0, 1, "0.2"),
    "model.min_lr_share": number(0, 1, "0.1"),
    "model.weight_decay": number(0, 10, "0.1"),
    "model.betas": number(0, 1, "[0.9, 0.95]", below=True),
    "model.eps": number(0, 1, "1e-8", above=True),
    "model.router_aux_loss": number(0, 100, "0.01"),
    "model.neftune_alpha": number(0, 1000, "5"),
    "model.lora.r": whole(1, 65_536, 16),
    "model.lora.alpha": number(0, 1_000_000, "32", above=True),
    "model.lora.dropout": number(0, 1, "0.1", below=True),

    "data.val_fraction": number(0, 1, "0.05", below=True),
    "data.test_fraction": number(0, 1, "0.05", below=True),
    "data.bad_record_limit": number(0, 1, "0.1"),
    "data.seq_len": whole(2, 2**24, 1024),
    "data.stride": whole(1, 2**24, 512),
    "data.batch_size": whole(1, 2**30, 4),
    "data.seed": whole(0, 2**32 - 1, 0),
    "data.num_proc": whole(1, 1024, 2),
    "data.stream_buffer": whole(1, 10**10, 4_000_000),
    "data.guard_tokens": whole(1000, 10**9, 20_000),
    "data.sources.weight": number(0, 1000, "1", above=True),

    "trainer.num_sanity_val_steps": whole(0, STEPS, -1, -1),
    "trainer.log_every_n_steps": whole(0, STEPS, 10),
    "trainer.max_epochs": whole(1, STEPS, 3, -1),
    "trainer.max_steps": whole(1, STEPS, 1000, -1),
    "trainer.min_epochs": whole(0, STEPS, 1),
    "trainer.min_steps": whole(0, STEPS, 100),
    "trainer.max_skipped_steps": whole(1, STEPS, 5),
    "trainer.samples": whole(0, 64, 3),
    "trainer.threads": whole(1, 4096, 4),
    "trainer.devices": whole(1, 4096, 1, -1),
    "trainer.num_nodes": whole(1, 65_536, 1),
    "trainer.fast_dev_run": Numbers("1", (Range(0, STEPS),), flag=True),
    "trainer.limit_train_batches": batches(1, "100"),
    "trainer.limit_val_batches": batches(0, "100"),
    "trainer.limit_test_batches": batches(0, "100"),
    "trainer.limit_predict_batches": batches(0, "1.0"),
    "trainer.overfit_batches": batches(0, "0"),
    "trainer.val_check_interval": batches(1, "1.0"),
    "trainer.check_val_every_n_epoch": whole(1, STEPS, 1),
    "trainer.accumulate_grad_batches": whole(1, 1_000_000, 4),
    "trainer.stop_on_forgetting": number(0, 100, "0.1", above=True),
    "trainer.gradient_clip_val": number(0, 1_000_000, "1.0"),
    "trainer.reload_dataloaders_every_n_epochs": whole(0, STEPS, 0),

    "StepCheckpoint.every_n_steps": whole(1, STEPS, 100),
    "StepCheckpoint.keep_best": whole(0, 1_000_000, 1),
    "StepCheckpoint.keep_last": whole(1, 1_000_000, 1),
    "StepCheckpoint.keep_every_n_steps": whole(1, STEPS, 1000),
    "Progress.every_seconds": number(0, 1_000_000, "10"),

    "DeepSpeedStrategy.stage": whole(1, 3, 1),
    **{f"DeepSpeedStrategy.{name}": whole(1, 2**40, example) for name, example in {
        "params_buffer_size": 100_000_000, "max_in_cpu": 1_000_000_000, "block_size": 1_048_576,
        "sub_group_size": 1_000_000_000_000, "allgather_bucket_size": 200_000_000,
        "reduce_bucket_size": 200_000_000}.items()},
    **{f"DeepSpeedStrategy.{name}": whole(1, most, example) for name, most, example in (
        ("params_buffer_count", 1024, 5), ("optimizer_buffer_count", 1024, 4), ("queue_depth", 1024, 8),
        ("thread_count", 1024, 1), ("logging_batch_size_per_gpu", 2**30, 1), ("loss_scale_window", STEPS, 1000),
        ("hysteresis", STEPS, 2))},
    "DeepSpeedStrategy.loss_scale": number(0, 2**32, "0"),
    "DeepSpeedStrategy.initial_scale_power": whole(0, 32, 16),
    "DeepSpeedStrategy.min_loss_scale": whole(0, 2**32, 1),
    "DeepSpeedStrategy.logging_level": whole(0, 100, 30),
    "EarlyStopping.patience": whole(1, STEPS, 3),
    "EarlyStopping.min_delta": number(0, 1_000_000, "0.0"),

    "inspect.rows": whole(0, 10_000, 3),
    "inspect.characters": whole(0, 10**9, 400),
    "plan.memory": number(0, 1_000_000, "80", above=True),
    "verify_resume.steps": whole(2, STEPS, 4),
    "selftest.processes": whole(1, 64, 2),
    "evaluate.seq_len": whole(2, 2**24, 1024),
    "evaluate.stride": whole(1, 2**24, 512),
    "evaluate.batch_size": whole(1, 2**30, 4),
    "evaluate.limit": whole(1, STEPS, 100),
    "chat.max_tokens": whole(1, 2**31 - 1, 256),
    "chat.temperature": number(0, 2, "0.7"),
    "chat.top_p": number(0, 1, "0.9", above=True),
    "chat.top_k": whole(0, 2**31 - 1, 40),
    "chat.min_p": number(0, 1, "0.05"),
    "chat.repetition_penalty": number(0, 100, "1.1", above=True),
    "chat.presence_penalty": number(-2, 2, "0.5"),
    "chat.frequency_penalty": number(-2, 2, "0.5"),
    "chat.logit_bias": number(-100, 100, "-100"),
    "chat.min_tokens": whole(0, 2**31 - 1, 16),
    "chat.logprobs": whole(0, 20, 5),
    "chat.prompt_logprobs": whole(0, 20, 5),
    "chat.seed": whole(-(2**63), 2**63 - 1, 1),
    "chat.threads": whole(1, 4096, 4),
    "generate.max_tokens": whole(1, 2**31 - 1, 256),
    "generate.temperature": number(0, 2, "0.7"),
    "generate.top_p": number(0, 1, "0.9", above=True),
    "generate.top_k": whole(0, 2**31 - 1, 40),
    "generate.min_p": number(0, 1, "0.05"),
    "generate.seed": whole(0, 2**63 - 1, 1),
    "generate.n": whole(1, 10_000, 4),
    "generate.limit": whole(1, STEPS, 100),
    "generate.threads": whole(1, 4096, 4),
    "generate.max_running": whole(1, 4096, 32),
    "serve.port": whole(1024, 65_535, 8000),
    "serve.max_running": whole(1, 4096, 32),
    "serve.max_waiting": whole(0, 1_000_000, 64),
    "serve.max_body_bytes": whole(1, 2**30, 1_000_000),
    "serve.max_wait_seconds": whole(1, 86_400, 300),
    "serve.max_seconds": whole(1, 86_400, 3600),
    "serve.request_seconds": whole(1, 3600, 30),
    "serve.write_seconds": whole(1, 3600, 60),
    "serve.keep_alive_seconds": whole(1, 3600, 75),
    "serve.max_connections": whole(1, 100_000, 512),
    "serve.drain_seconds": whole(1, 86_400, 30),
}
TEXTS: dict[str, tuple[str, ...]] = {               # keys annotated as str with few valid values
    "trainer.gradient_clip_algorithm": ("norm",),
    "DeepSpeedStrategy.offload_params_device": ("cpu", "nvme"),
    "DeepSpeedStrategy.offload_optimizer_device": ("cpu", "nvme"),
    "DeepSpeedStrategy.logging_batch_size_per_gpu": ("auto",),
    **{f"{name}.process_group_backend": ("gloo", "nccl", "mpi", "ucc", "xccl") for name in (
        "DDPStrategy", "DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy")},
}
PATTERNS: dict[str, tuple[str, str]] = {            # key -> a pattern that its texts match, and what they are
    "trainer.devices": (r"auto|-1|\d+( *, *\d+)*,?",
                        "a number of devices, their indices such as 0,1, -1 for all, or auto")}
SAME = {                                            # keys with the same range as another one
    **{f"data.{stage}_sources.weight": "data.sources.weight" for stage in ("val", "test", "guard")},
    "model.peft.init_args.r": "model.lora.r", "model.peft.init_args.lora_alpha": "model.lora.alpha",
    "model.peft.init_args.lora_dropout": "model.lora.dropout"}


def of(key: str) -> Numbers | None:
    """The numbers that a key accepts; null for keys that are not in the table."""
    return RANGES.get(SAME.get(key, key))


def knows(key: str) -> bool:
    """Whether a key is in the table."""
    return of(key) is not None or key in TEXTS or key in PATTERNS


def check(key: str, value: object, *, where: str = "") -> None:
    """Refuse a number, list item or text that the key does not accept; types are checked elsewhere.

    Args:
        key: As in the table.
        value: The value.
        where: Name of the key in messages, if different.

    Raises:
        InputError: The error names the key, the value, what is allowed and an example.
    """
    numbers, texts = of(key), TEXTS.get(key, ())
    if texts and isinstance(value, str) and value not in texts:
        raise InputError(f"'{shown(value)}' is not one of {', '.join(texts)}.{did_you_mean(value, list(texts))}",
                         where=where or key)
    pattern, description = PATTERNS.get(key, ("", ""))
    if pattern and isinstance(value, str) and not re.fullmatch(pattern, value.strip()):
        raise InputError(f"'{shown(value)}' is not {description}", where=where or key)
    if numbers is None:
        return
    for one in value if isinstance(value, list | tuple) else [value]:
        if isinstance(one, bool):
            fits = numbers.flag
        else:
            fits = not isinstance(one, int | float) or any(interval.holds(one) for interval in numbers.ranges)
        if not fits:
            name = (where or key).lstrip("-")
            owner, _, argument = name.rpartition(".")  # an argument of a class given by class_path is not an option
            shown_as = f"{argument}: {numbers.example}" if owner[:1].isupper() else f"--{name} {numbers.example}"
            raise InputError(f"{shown(one)} is not {numbers}", where=where or key, fix=f"for example {shown_as}")


def check_all(prefix: str, values: Mapping[str, object]) -> None:
    """Check several numbers.

    Args:
        prefix: Prefix of the keys, `model` or a class name.
        values: Values by the rest of the key, such as a function's `locals()`; unknown keys are ignored.

    Raises:
        InputError: As in `check`.
    """
    for name, value in values.items():
        check(f"{prefix}.{name}", value)


def shown(value: object) -> str:
    """A value for a message, shortened, without control characters."""
    try:
        text = value if isinstance(value, str) else "null" if value is None else str(value)
    except ValueError:                              # Python does not format integers of thousands of digits
        text = "a whole number of thousands of digits"
    text = "".join(character if character.isprintable() else "?" for character in text)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text):,} characters)"
