"""The table of incompatible features of a run, which are checked before anything is loaded.

Each of these pairs would otherwise hang, fail deep inside a library, or silently train something else.
`FEATURES` tells which features a run has, `RULES` lists the incompatible pairs. Another rule is one entry of `RULES`
and, for a feature that is not there yet, one of `FEATURES`; `matrix.py` prints both, and a test triggers every rule
from the command line.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lit_llm import rules
from lit_llm.data import idle
from lit_llm.kernels import switch
from lit_llm.models.adapters import peft_method
from lit_llm.rules import Rule
from lit_llm.system.private import lightning as private
from lit_llm.training.checks import idle as idle_options
from lit_llm.training.checks.interface import Module
from lit_llm.training.parallel import deepspeed_setup, distribution
from lit_llm.training.parallel.distribution import Distribution


@dataclass(frozen=True)
class Setup:
    """The settings of a run that the rules check: a module, later also its trainer's settings.

    Attributes:
        module: The module; properties of the architecture are known only after `build.ask`.
        strategy: Strategy of the trainer; null without a trainer.
        processes: Number of processes.
        precision: `trainer.precision`.
        training: Whether it trains, rather than validates or tests.
        device: Kind of the device, such as `cuda`; empty if unknown.
        deterministic: Whether `trainer.deterministic` refuses operations with a varying order of sums.
    """

    module: Module
    strategy: Distribution | None = None
    processes: int = 1
    precision: str = ""
    training: bool = False
    device: str = ""
    deterministic: bool = False

    @property
    def trains_all(self) -> bool:
        """Whether every weight is trained, and not only adapters."""
        return self.module.peft_spec is None and (self.module.start is None or self.module.merge_start)


def _trains_prompts(s: Setup) -> bool:
    return peft_method.adds_virtual_tokens(s.module.peft_spec)


def _uses_external_loss(s: Setup) -> bool:
    return s.training and s.module.cross_entropy != "fused"


_MODEL: dict[str, Callable[[Setup], bool]] = {
    "`model.base`": lambda s: s.module.base is not None,
    "`model.init`": lambda s: s.module.init is not None,
    "`model.lora`, `model.peft`": lambda s: s.module.peft_spec is not None,
    "an adapter shared by embedding and head (`ensure_weight_tying`)":
        lambda s: peft_method.ties_adapters(s.module.peft_spec),
    "prompt and prefix tuning": _trains_prompts,
    "`model.lora.train_tokens` with a list": lambda s: (
        s.module.peft_spec is not None and s.module.train_tokens not in (None, "auto")),
    "`model.adapter`": lambda s: s.module.start is not None,
    "no `model.adapter`": lambda s: s.module.start is None,
    # only before the strategy is known: when the adapter is found, its method becomes the module's
    "`model.adapter`, continued": lambda s: (
        s.module.start is not None and not s.module.merge_start and s.strategy is None),
    "`model.merge_adapter`": lambda s: s.module.merge_start,
    "training of all weights": lambda s: s.trains_all,
    "`model.quantize`": lambda s: s.module.quantize is not None,
    "`model.compile`": lambda s: s.module.compile_layers,
    "`model.gradient_checkpointing: selective` or `auto`":
        lambda s: s.module.gradient_checkpointing in ("selective", "auto"),
    "`model.neftune_alpha`": lambda s: bool(s.module.neftune_alpha),
    "`model.cooldown`": lambda s: s.module.cooldown != 0.2,
    "a schedule without cooldown": lambda s: s.module.schedule != "wsd",
    "`model.min_lr_share`": lambda s: s.module.min_lr_share != 0.1,
    "`model.schedule: constant`": lambda s: s.module.schedule == "constant",
    "`model.optimizer: muon`": lambda s: s.module.optimizer == "muon",
    "`model.optimizer: adamw_8bit`": lambda s: s.module.optimizer == "adamw_8bit",
    "external `model.cross_entropy` kernels": _uses_external_loss,
    "`model.cross_entropy: cut_cross_entropy`": lambda s: (
        _uses_external_loss(s) and s.module.cross_entropy == "cut_cross_entropy"),
    "a model that computes its own logits": lambda s: s.module.way is not None and s.module.way.own_logits,
    "a model that processes documents one by one": lambda s: bool(s.module.why_unpacked),
    "gradient checkpointing with a load-balancing loss":
        lambda s: bool(s.module.balance_coefficient) and s.module.recompute != "none",
}
_TRAINER: dict[str, Callable[[Setup], bool]] = {
    "`trainer.precision: 16-true`": lambda s: s.training and s.precision == "16-true",
    "`trainer.precision: bf16-true`, training of all weights":
        lambda s: s.training and s.precision == "bf16-true" and s.trains_all,
    "`trainer.precision: 64-true`": lambda s: "64" in s.precision,
    "`trainer.kernels: plain`": lambda s: switch.is_plain(),
    "`trainer.deterministic: true`": lambda s: s.deterministic,
    # Triton interprets kernels on a CPU for tests
    "a CPU": lambda s: s.device != "cuda" and bool(s.device) and os.environ.get("TRITON_INTERPRET") != "1",
}
STRATEGIES: dict[str, Callable[[Distribution, int], bool]] = {   # feature -> whether a strategy of n processes has it
    "sharded weights gathered by layer": lambda strategy, processes: strategy.gathers_layers,
    "sharded weights gathered by layer, several processes":
        lambda strategy, processes: strategy.gathers_layers and processes > 1,
    "weights sharded while loading": lambda strategy, processes: strategy.partitions_on_load,
    "weights sharded while loading, several processes":
        lambda strategy, processes: strategy.partitions_on_load and processes > 1,
    "sharded optimizer states": lambda strategy, processes: strategy.split_stage > 0,
    "flattened weights in the optimizer": lambda strategy, processes: strategy.flattens_weights,
    "no float32 masters": lambda strategy, processes: not strategy.keeps_masters,
}


def _of_strategy(has: Callable[[Distribution, int], bool]) -> Callable[[Setup], bool]:
    return lambda s: s.strategy is not None and has(s.strategy, s.processes)


FEATURES: Mapping[str, Callable[[Setup], bool]] = {
    **_MODEL, **_TRAINER, **{name: _of_strategy(has) for name, has in STRATEGIES.items()}}
NO_ROWS = "stage 3 shards the embedding (stage 2 does not)"
_STAGE_2 = "set --trainer.strategy deepspeed_stage_2"
_WHOLE = "set --trainer.strategy ddp (or auto), or --model.optimizer adamw"
_FUSED = "set --model.cross_entropy fused"

ONE_MODEL = Rule("`model.base`", "`model.init`", "give model.base (a folder or hub id) or model.init (an "
                 "architecture), one of the two", "model")
RULES: tuple[Rule, ...] = (
    # ---- the model and what is trained of it
    ONE_MODEL,
    Rule("`model.cooldown`", "a schedule without cooldown", "a {s.module.schedule} schedule has no cool-down, so "
         "this has no effect", "model.cooldown", "set --model.schedule wsd, or leave it out"),
    Rule("`model.min_lr_share`", "`model.schedule: constant`", "it has no effect with a constant learning "
         "rate", "model.min_lr_share", refused=False),
    Rule("`model.init`", "`model.lora`, `model.peft`", "adapters need a base model; with random weights they could "
         "not be loaded again", "model.init", "set --model.lora null to train every weight, or give model.base"),
    Rule("`model.merge_adapter`", "no `model.adapter`", "no adapter to merge is set", "model.merge_adapter",
         "give model.adapter"),
    Rule("`model.adapter`", "`model.init`", "an adapter needs a base model", "model.adapter",
         "give model.base"),
    Rule("`model.adapter`, continued", "`model.lora`, `model.peft`", "an adapter is continued with its own method, but "
         "another one is given", "model.adapter", "--model.lora null (and --model.peft null) continues it; "
         "--model.merge_adapter true merges it into the base first and trains the given one on top"),
    Rule("`model.merge_adapter`", "`model.quantize`", "an adapter cannot be merged into a base in 4 bits without loss",
         "model.merge_adapter", "export the adapter's run first, and give that folder as model.base"),
    Rule("`model.quantize`", "training of all weights", "4-bit weights cannot be trained; adapters on them can",
         "model.quantize", "set model.lora (see configs/with/qlora.yaml), or --model.quantize null"),
    Rule("prompt and prefix tuning", "`model.neftune_alpha`", "prompt and prefix tuning use their own embeddings, "
         "to which noise is not added", "model.neftune_alpha", "set --model.neftune_alpha null"),
    Rule("`model.compile`", "`model.gradient_checkpointing: selective` or `auto`", "a compiled layer is one operation, "
         "whose results cannot be saved selectively", "model.gradient_checkpointing", "set it to true or false"),
    # ---- external kernels
    Rule("external `model.cross_entropy` kernels", "a model that computes its own logits",
         "the model computes its logits itself: {s.module.way.why_own_logits}", "model.cross_entropy", _FUSED),
    Rule("external `model.cross_entropy` kernels", "prompt and prefix tuning", "prompt and prefix tuning compute "
         "logits, so external kernels cannot use the head", "model.cross_entropy", _FUSED),
    Rule("external `model.cross_entropy` kernels", "`trainer.kernels: plain`", "plain kernels are selected, but "
         "{s.module.cross_entropy} is an external kernel", "model.cross_entropy",
         _FUSED + ", or --trainer.kernels own"),
    Rule("external `model.cross_entropy` kernels", "a CPU", "{s.module.cross_entropy} needs a CUDA device, but this "
         "run is on {s.device}", "model.cross_entropy", _FUSED),
    Rule("external `model.cross_entropy` kernels", "`trainer.precision: 64-true`", "{s.module.cross_entropy} computes "
         "in float32 at most", "trainer.precision", _FUSED),
    Rule("`model.cross_entropy: cut_cross_entropy`", "`trainer.deterministic: true`", "cut_cross_entropy sums "
         "gradients in a varying order", "trainer.deterministic",
         "set it to false, or --model.cross_entropy fused"),
    # ---- strategies
    Rule("prompt and prefix tuning", "sharded weights gathered by layer, several processes", "prompt and prefix tuning "
         "cannot be trained by processes that share each layer's weights", "trainer.strategy", _STAGE_2),
    Rule("`model.optimizer: muon`", "flattened weights in the optimizer", "muon updates whole matrices, but ZeRO "
         "gives the optimizer flat shards", "model.optimizer", _WHOLE),
    Rule("`model.optimizer: adamw_8bit`", "sharded optimizer states", "8-bit states cannot be sharded, saved and "
         "loaded by ZeRO and FSDP2", "model.optimizer", _WHOLE),
    Rule("`trainer.precision: 16-true`", "no float32 masters", "small gradients would vanish in float16 without a loss "
         "scale", "trainer.precision", "set it to 16-mixed or bf16-true; or --trainer.strategy deepspeed_stage_2, "
         "which has one"),
    Rule("`trainer.precision: bf16-true`, training of all weights", "no float32 masters", "bf16-true would train "
         "half-precision weights without a float32 copy, so small updates would be lost", "trainer.precision",
         "set bf16-mixed, or a deepspeed strategy, which keeps float32 masters"),
    Rule("a model that processes documents one by one", "sharded weights gathered by layer, several processes",
         "{s.module.why_unpacked}; ranks have different numbers of documents, and processes that share each layer's "
         "weights would wait for each other forever", "trainer.strategy", _STAGE_2),
    Rule("an adapter shared by embedding and head (`ensure_weight_tying`)", "weights sharded while loading",
         "ensure_weight_tying shares the embedding's adapter with the head, but stage 3 gathers one layer's weights",
         "trainer.strategy", _STAGE_2),
    Rule("`model.lora.train_tokens` with a list", "weights sharded while loading", "token rows cannot be trained: "
         + NO_ROWS, "model.lora.train_tokens", "set it to null"),
    Rule("`model.quantize`", "sharded weights gathered by layer", "4-bit weights cannot be sharded by layer",
         "model.quantize", "set --trainer.strategy deepspeed_stage_2 (or auto, ddp), or --model.quantize null"),
    Rule("`model.compile`", "sharded weights gathered by layer", "layers whose weights are gathered one by one cannot "
         "be compiled", "model.compile", "set --model.compile false, or --trainer.strategy deepspeed_stage_2"),
    # Ranks would reduce gradients in different orders and wait for each other (measured with DeepSpeed 0.19.8).
    Rule("gradient checkpointing with a load-balancing loss", "weights sharded while loading, several processes", "the "
         "load-balancing loss of routers hangs with recomputed layers under ZeRO-3", "model.gradient_checkpointing",
         "set --trainer.strategy fsdp2 or deepspeed_stage_2, --model.gradient_checkpointing false, or "
         "--model.router_aux_loss 0"),
)

# ---- options of Lightning's Trainer ----------------------------------------------------------------------------------

_AVERAGES = "evaluates averaged weights, but checkpoints and the export would have the others"
_CALLBACKS = {                                      # callbacks that do not work as expected here, and why
    "WeightAveraging": _AVERAGES,
    "StochasticWeightAveraging": _AVERAGES,
    "GradientAccumulationScheduler": "uses other accumulation windows than the loader, so gradients would be too "
                                     "large; set trainer.accumulate_grad_batches",
    "OnExceptionCheckpoint": "makes the next run resume from its file; --ckpt_path last resumes from the newest "
                             "checkpoint",
}


def _has_callback(kind: str) -> Callable[[Any], bool]:
    return lambda trainer: any(
        base.__name__ == kind for callback in trainer.callbacks for base in type(callback).__mro__)


def _in_config(key: str) -> Callable[[Distribution], bool]:
    return lambda strategy: key in (strategy.library_config or {})


def _of_trainers_strategy(has: Callable[[Distribution], bool]) -> Callable[[Any], bool]:
    return lambda trainer: has(distribution.of(trainer.strategy))


def _changes_scale(name: str) -> Callable[[Distribution], bool]:
    default = idle_options.SCALE[name]
    return lambda strategy: strategy.loss_scale_arguments.get(name, default) != default


_OF_LIBRARY: dict[str, Callable[[Distribution], bool]] = {
    "a DeepSpeed config without a stage": lambda strategy: (
        strategy.library_config is not None and strategy.configured_stage not in (1, 2, 3)),
    **{f"`{key}` in a DeepSpeed config": _in_config(key) for key in ("optimizer", "scheduler", "gradient_clipping")},
    "`offload_parameters` of a DeepSpeed strategy": lambda strategy: strategy.offloads[1],
    **{f"`{name}` of a DeepSpeed strategy": _changes_scale(name) for name in idle_options.SCALE},
    "`deepspeed_stage_1` or `_2`": lambda strategy: strategy.configured_stage in (1, 2),
}
TRAINER_FEATURES: dict[str, Callable[[Any], bool]] = {
    "every run": lambda trainer: True,
    **{f"`{kind}`": _has_callback(kind) for kind in _CALLBACKS},
    **{name: _of_trainers_strategy(has) for name, has in _OF_LIBRARY.items()},
    "`trainer.gradient_clip_val`": lambda trainer: bool(trainer.gradient_clip_val),
    "float16 under DeepSpeed": lambda trainer: (
        distribution.of(trainer.strategy).library_config is not None and str(trainer.precision).startswith("16")),
    "a processor without DeepSpeed's float16":
        lambda trainer: not deepspeed_setup.computes_float16(trainer.strategy.root_device.type),
    "a precision without a loss scale": lambda trainer: not str(trainer.precision).startswith("16"),
    "processes started by `spawn`": lambda trainer: private.spawns(trainer.strategy.launcher),
    "`trainer.overfit_batches`": lambda trainer: bool(trainer.overfit_batches),
    "`trainer.reload_dataloaders_every_n_epochs`": lambda trainer: bool(trainer.reload_dataloaders_every_n_epochs),
}
OF_DEEPSPEED: tuple[Rule, ...] = (                  # also checked when processes start under Lightning's own Trainer
    # DeepSpeed ignores a misspelt key, and the run could not be resumed.
    Rule("a DeepSpeed config without a stage", "every run", "the DeepSpeed config has stage "
         "{s.strategy.configured_stage}, which must be 1, 2 or 3", "trainer.strategy",
         "add zero_optimization: {{stage: 2}} to it"),
    *(Rule(f"`{key}` in a DeepSpeed config", "every run", f"'{key}' of the DeepSpeed config would replace what "
           "model.optimizer, model.lr and model.schedule say", "trainer.strategy", "remove it")
      for key in ("optimizer", "scheduler")),
    Rule("`gradient_clipping` in a DeepSpeed config", "`trainer.gradient_clip_val`", "gradient clipping is set twice: "
         "here and as gradient_clipping in the DeepSpeed config", "trainer.gradient_clip_val", "remove one of them"),
    Rule("`offload_parameters` of a DeepSpeed strategy", "`deepspeed_stage_1` or `_2`", "only stage 3 shards "
         "the weights and can keep them in CPU memory", "trainer.strategy.init_args.offload_parameters",
         "leave it out, or set stage to 3"),
    Rule("float16 under DeepSpeed", "a processor without DeepSpeed's float16", "DeepSpeed does not support float16 on "
         "this processor", "trainer.precision", "set it to bf16-mixed or 32-true"),
    *(Rule(f"`{name}` of a DeepSpeed strategy", "a precision without a loss scale", "{s.precision} has no loss scale, "
           "so this has no effect", f"trainer.strategy.init_args.{name}", "leave it out")
      for name in idle_options.SCALE),
)
OF_TRAINER: tuple[Rule, ...] = (
    *OF_DEEPSPEED,
    Rule("processes started by `spawn`", "every run", "processes that are spawned cannot be stopped together",
         "trainer.strategy", "set it to ddp, which starts the command once for each"),
    *(Rule(f"`{kind}`", "every run", f"{kind} {why}", "trainer.callbacks", "leave it out")
      for kind, why in _CALLBACKS.items()),
    Rule("`trainer.overfit_batches`", "every run", "this project's epochs do not repeat a fixed set of batches",
         "trainer.overfit_batches", "give a file of a few records as data.sources, and set trainer.max_epochs"),
    Rule("`trainer.reload_dataloaders_every_n_epochs`", "every run", "a reloaded loader would repeat the first "
         "epoch", "trainer.reload_dataloaders_every_n_epochs", "leave it out"),
)

# ---- a checkpoint that is resumed ------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Resume:
    """A checkpoint, and the run that resumes from it.

    Attributes:
        written_with: Class of the strategy that wrote it.
        read_with: Class of this run's strategy.
        strategy: This run's strategy.
        has_folder: Whether the state in the checkpoint is a folder.
        old_precision: `trainer.precision` of the run that wrote it.
        precision: `trainer.precision` of this run.
    """

    written_with: str
    read_with: str
    strategy: Distribution
    has_folder: bool
    old_precision: str
    precision: str


def _half(precision: str) -> str:
    """The 16-bit dtype of a precision; empty for float32."""
    return next((kind for kind in ("bf16", "16") if precision.startswith(kind)), "")


RESUME_FEATURES: dict[str, Callable[[Resume], bool]] = {
    "a checkpoint of one device or `ddp`": lambda s: not s.has_folder,
    "a checkpoint of `deepspeed` or `fsdp2`": lambda s: s.has_folder,
    "a checkpoint of another 16-bit precision": lambda s: _half(s.old_precision) != _half(s.precision),
    "resuming with one device or `ddp`": lambda s: not s.strategy.writes_folders,
    "resuming with `deepspeed` or `fsdp2`": lambda s: s.strategy.writes_folders,
    "resuming with `deepspeed`": lambda s: s.strategy.keeps_masters,
}
_OTHER_STRATEGY = ("the checkpoint was written with {s.written_with}, which {s.read_with} cannot read",
                   "trainer.strategy", "resume with the strategy that wrote it; for another strategy, export the run "
                   "and start a new one with that folder as model.base")
OF_RESUME: tuple[Rule, ...] = (
    Rule("a checkpoint of one device or `ddp`", "resuming with `deepspeed` or `fsdp2`", *_OTHER_STRATEGY),
    Rule("a checkpoint of `deepspeed` or `fsdp2`", "resuming with one device or `ddp`", *_OTHER_STRATEGY),
    Rule("a checkpoint of another 16-bit precision", "resuming with `deepspeed`", "the checkpoint was written with "
         "{s.old_precision}, and DeepSpeed cannot resume from it with {s.precision}", "trainer.precision",
         "set it to its previous value"),
)
ALL = (*RULES, *OF_TRAINER, *OF_RESUME, *idle_options.RULES, *idle.RULES)      # the last where data are read


def check(setup: Setup) -> None:
    """Refuse incompatible features, as far as they are known.

    Raises:
        InputError: The error names the key and what to set instead.
    """
    rules.check(RULES, FEATURES, setup)
