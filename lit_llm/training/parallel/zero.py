"""DeepSpeed's ZeRO stages 1, 2 and 3 as a strategy of Lightning, on CUDA and on CPU with gloo.

It joins the process group, shards weights while they are loaded, ends optimizer steps, and saves and loads shards. The
optimizer gets exactly the gradient of the loss that the module returned: Lightning divides the loss by the number of
accumulated micro-batches, ZeRO averages gradients over processes, and nothing is divided twice.
`deepspeed_setup.py` imports DeepSpeed and selects its device; `reshard.py` checks and converts shards on disk.
"""

import atexit
import os
from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from lightning.pytorch.plugins.precision import DeepSpeedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, StrategyRegistry
from torch import Tensor, nn

from lit_llm import rules
from lit_llm.errors import InputError, did_you_mean
from lit_llm.system.private import deepspeed as deepspeed_private
from lit_llm.system.private import lightning as private
from lit_llm.training.checks import idle
from lit_llm.training.parallel import deepspeed_setup, reshard, safe_load, shards
from lit_llm.training.parallel.distribution import Distribution
from lit_llm.training.rules import table

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

_RENDEZVOUS = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK")


class ZeroStrategy(Distribution, DeepSpeedStrategy):
    """DeepSpeed's ZeRO as a Lightning strategy (arXiv:1910.02054, section 5).

    It differs from Lightning's own in five ways: it also runs on CPUs; Lightning determines the end of an optimizer
    step, also in a shorter last accumulation window; gradients are not divided by the accumulation a second time and
    are summed in float32; transformers models are sharded while they load, and adapters start at zero; checkpoints
    leave out frozen weights.

    Args:
        stage: What is sharded over processes. 1: optimizer states; 2: gradients as well; 3: weights as well, gathered
            by layer. 2 costs nothing over 1; 3 is for a model whose weights do not fit on one device.
        offload_optimizer: Keep optimizer states in CPU memory; saves 12 bytes of device memory per trained weight.
        offload_parameters: Keep the weights in CPU memory, stage 3 only. Slow; for models that do not fit otherwise.
        config: A DeepSpeed config, as a dict or the path of a JSON file, which replaces all other arguments. It must
            not set `gradient_accumulation_steps`, nor `gradient_clipping` if `trainer.gradient_clip_val` is set.
        kwargs: Other arguments of `lightning.pytorch.strategies.DeepSpeedStrategy`.

    Raises:
        InputError: `stage` is not 1, 2 or 3.
    """

    keeps_masters = casts_weights = flattens_weights = owns_gradients = writes_folders = True

    def __init__(
        self,
        *,
        stage: int = 2,
        offload_optimizer: bool = False,
        offload_parameters: bool = False,
        config: str | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if stage not in (1, 2, 3):
            raise InputError(f"stage must be 1, 2 or 3, not {stage!r}", where="trainer.strategy")
        deepspeed_setup.load()
        super().__init__(
            stage=stage,
            offload_optimizer=offload_optimizer,
            offload_parameters=offload_parameters,
            config=config,
            **kwargs,
        )
        if isinstance(self.config, dict):
            self.config.setdefault("train_micro_batch_size_per_gpu", 1)     # for a log of DeepSpeed's; else Lightning
            self.library_config = dict(self.config)
        self.loss_scale_arguments = {name: vars(self)[name] for name in idle.SCALE}
        self._given = {"stage": stage, "offload_optimizer": offload_optimizer, "offload_parameters": offload_parameters,
                       "config": config, **kwargs}
        self._environ: dict[str, str | None] = {}
        self._hf_config: object | None = None       # transformers keeps only a weak reference to it
        self._skipped = False                       # whether the current micro-batch has no forward pass

    def check_arguments(self) -> None:
        """Refuse arguments without effect; not in the constructor, whose reasons the command line does not show."""
        idle.check_zero(self._given, DeepSpeedStrategy)

    @classmethod
    def from_name(cls, name: str) -> Self:
        """The strategy for a name such as `deepspeed`, `deepspeed_stage_3` or `deepspeed_stage_2_offload`.

        Raises:
            InputError: Lightning registers no DeepSpeed strategy of that name.
        """
        names = [word for word in StrategyRegistry.available_strategies() if word.startswith("deepspeed")]
        if name not in names:
            raise InputError(
                f"no strategy is named {name!r}.{did_you_mean(name, names)}",
                where="trainer.strategy",
                fix=f"one of {', '.join(names)}",
            )
        arguments = StrategyRegistry[name]["init_params"]
        return cls(**{key: value for key, value in arguments.items() if key not in idle.ZERO})

    # ---- devices and processes

    @property
    def root_device(self) -> torch.device:
        """This process's device; a CPU also gets an index, which DeepSpeed uses as the rank."""
        device = super().root_device
        return torch.device("cpu", self.local_rank) if device.type == "cpu" else device

    def setup_environment(self) -> None:
        """Refuse what DeepSpeed does not support, then join the other processes."""
        assert self.lightning_module is not None
        # `lit_llm.Trainer` has checked them before
        rules.check(table.OF_DEEPSPEED, table.TRAINER_FEATURES, self.lightning_module.trainer)
        deepspeed_setup.select_device(self.root_device.type)
        DDPStrategy.setup_environment(self)         # the parent class's method refuses all devices except CUDA

    def setup_distributed(self) -> None:
        """Join the process group: NCCL on CUDA, gloo on CPU."""
        self._environ = {key: os.environ.get(key) for key in _RENDEZVOUS}
        if self.root_device.type == "cpu":
            from lightning.fabric.utilities.seed import reset_seed

            reset_seed()
            self.set_world_ranks()
            self._init_deepspeed_distributed()
        else:
            super().setup_distributed()
        # The group is not closed in teardown, because `fit` and then `validate` of one trainer share it.
        atexit.unregister(deepspeed_setup.leave_process_group)
        atexit.register(deepspeed_setup.leave_process_group)

    def teardown(self) -> None:
        """Release the model; restore the environment of a single process."""
        super().teardown()
        self._hf_config = None
        if self.world_size > 1:
            return                                  # the started processes continue; Lightning must not start more
        for key, value in self._environ.items():
            os.environ.pop(key, None)
            if value is not None:
                os.environ[key] = value

    # ---- model and precision

    @property
    def precision_plugin(self) -> Precision:
        """DeepSpeed's precision plugin, which leaves casting to the engine."""
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        if isinstance(plugin, DeepSpeedPrecision) and not isinstance(plugin, _EnginePrecision):
            plugin = _EnginePrecision(plugin.precision)  # type: ignore[arg-type]
        self._precision_plugin = plugin

    @contextmanager
    def model_sharded_context(self) -> Generator[None, None, None]:
        """Context for `configure_model`: transformers shards what it builds or loads under stage 3.

        Lightning's own context shards every new module immediately, so weights would be loaded into empty tensors and
        LoRA's zeros would be lost. transformers does it correctly if it knows the config. All other weights (adapters)
        stay whole until the engine starts, which broadcasts rank 0's values and shards them.
        """
        self._init_config_if_needed()
        if self.zero_stage_3:
            from transformers.integrations.deepspeed import HfDeepSpeedConfig

            self._hf_config = HfDeepSpeedConfig(self.config)
        yield

    def setup(self, trainer: "Trainer") -> None:
        """Start the engine on the configured module."""
        self._init_config_if_needed()
        self._halve_adapters()
        self._fit_buckets()
        super().setup(trainer)
        if self.float16_scale is not None:          # FiniteGuard ends such a run with a message
            self.deepspeed_engine.optimizer.loss_scaler.raise_error_at_min_scale = False

    def _format_config(self) -> None:
        super()._format_config()
        config = self.config
        assert isinstance(config, dict)
        config.setdefault("zero_allow_untested_optimizer", True)
        config.setdefault("zero_force_ds_cpu_optimizer", False)     # offloading uses our AdamW, so nothing is compiled
        config.setdefault("communication_data_type", "fp32")
        if any(config.get(kind, {}).get("enabled") for kind in ("bf16", "fp16")):
            config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")

    def _halve_adapters(self) -> None:
        """Convert adapters to 16 bits under stage 3, as the engine does under 1 and 2; masters are float32 anyway.

        The engine derives the model's dtype from the trained weights; with float32 it would not scale the loss in
        float16.
        """
        assert isinstance(self.config, dict)
        assert self.model is not None
        for kind, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
            if self.zero_stage_3 and self.config.get(kind, {}).get("enabled"):
                for weight in self.model.parameters():
                    if weight.requires_grad and not shards.is_partitioned(weight):
                        weight.data = weight.data.to(dtype)

    def _fit_buckets(self) -> None:
        """Shrink the reduce bucket to the trained weights; it is allocated at once, 800 MB even for a small adapter."""
        assert isinstance(self.config, dict)
        assert self.model is not None
        zero = self.config.get("zero_optimization", {})
        if isinstance(zero.get("reduce_bucket_size"), int):
            trained = sum(shards.elements_of(weight) for weight in self.model.parameters() if weight.requires_grad)
            zero["reduce_bucket_size"] = max(1024, min(zero["reduce_bucket_size"], trained))

    # ---- steps

    @property
    def handles_gradient_accumulation(self) -> bool:
        """False: Lightning determines the end of a step, so that its counters, the schedule and the engine agree."""
        return False

    def block_backward_sync(self) -> AbstractContextManager[None]:  # type: ignore[override]
        """Does nothing: the engine reduces gradients at the end of a step only."""
        return nullcontext()

    def training_step(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Run a micro-batch in the engine, unless the module skips it on all ranks."""
        module: Any = self.lightning_module
        self._skipped = hasattr(module, "is_skipped") and module.is_skipped(batch)
        return module.training_step(batch, *args) if self._skipped else super().training_step(batch, *args, **kwargs)

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Backward pass of one micro-batch; the last one of a step reduces the gradients."""
        if self._skipped:
            return closure_loss
        assert self.lightning_module is not None
        last = not private.accumulates(self.lightning_module.trainer)
        self.deepspeed_engine.set_gradient_accumulation_boundary(last)
        # Lightning has divided by accumulate_grad_batches; the engine would do it again
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def optimizer_step(self, optimizer: Any, closure: Any, model: Any = None, **kwargs: Any) -> Any:
        """Step, or skip the step on all ranks if the gradient is not finite, which the schedule must know."""
        done = super().optimizer_step(optimizer, closure, model, **kwargs)
        module: Any = self.lightning_module
        module.step_skipped = bool(getattr(self.deepspeed_engine.optimizer, "overflow", False))
        module.gradient_norm = self.deepspeed_engine.get_global_grad_norm()     # before clipping
        return done

    # ---- properties

    @property
    def split_stage(self) -> int:
        """The ZeRO stage."""
        stage = self._zero_config.get("stage")
        return stage if stage in (1, 2, 3) else 0   # other values are refused before training

    @property
    def partitions_on_load(self) -> bool:  # type: ignore[override]
        """True under stage 3, where transformers shards weights while loading them."""
        return self.split_stage == 3

    @property
    def offloads(self) -> tuple[bool, bool]:
        """Whether optimizer states, and whether weights, are kept in CPU memory."""
        return bool(self._zero_config.get("offload_optimizer")), bool(self._zero_config.get("offload_param"))

    @property
    def float16_scale(self) -> float | None:
        """The loss scale of float16, which is lowered when a gradient overflows; None without one."""
        optimizer: Any = getattr(self.model, "optimizer", None)
        return float(optimizer.loss_scale) if getattr(optimizer, "dynamic_loss_scale", False) else None

    @property
    def _zero_config(self) -> dict[str, Any]:
        assert isinstance(self.config, dict)
        return self.config.get("zero_optimization", {})

    def checkpoint_bytes(self, elements: int, itemsize: int) -> int:
        """Bytes in safetensors, and in the state: the weight, its float32 master and AdamW's two averages."""
        return elements * (itemsize + 16)

    def writers(self) -> list[tuple[Any, str]]:
        """Also methods that the engine calls between two barriers, some of them in the first process only."""
        engine = self.deepspeed_engine
        return [*super().writers(), deepspeed_private.recovery_script(engine), (engine.checkpoint_engine, "makedirs"),
                (engine.checkpoint_engine, "save")]

    # ---- checkpoints

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: object = None) -> None:
        """Write a folder with the shards of each process, without frozen weights."""
        self.exclude_frozen_parameters = self._has_frozen_weights()
        whole = self.deepspeed_engine.save_checkpoint
        # DeepSpeed writes `latest` in the first process before a barrier: an error there would block the others.
        self.deepspeed_engine.save_checkpoint = partial(whole, save_latest=False)
        try:
            super().save_checkpoint(checkpoint, filepath, storage_options)
        finally:
            del self.deepspeed_engine.save_checkpoint
        if self.is_global_zero:
            (Path(filepath) / "latest").write_text("checkpoint", encoding="utf-8")   # Lightning's tag

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Restore weights and, when fitting, the optimizer; Lightning restores loops and schedule from the rest.

        Shards of stages 1 and 2 may come from another number of processes, and are converted first.

        Raises:
            InputError: The folder was written by another stage, by stage 3 with another number of processes, or by
                stage 3 and the run only evaluates.
        """
        module = self.lightning_module
        assert module is not None
        fitting = module.trainer.state.fn == "fit"
        writers = reshard.check_shards(Path(checkpoint_path), stage_3=self.zero_stage_3, world=self.world_size,
                                       fitting=fitting)
        strict, module.strict_loading = module.strict_loading, not self._has_frozen_weights()
        try:
            with safe_load.data_only():             # DeepSpeed itself asks for pickle
                if fitting and writers != self.world_size:
                    state = self._load_resharded(Path(checkpoint_path))
                else:
                    state = super().load_checkpoint(checkpoint_path, weights_only)
        finally:
            module.strict_loading = strict
        if fitting:
            assert self.deepspeed_engine.global_steps == state["global_step"], "engine and trainer count steps apart"
        return state

    def _load_resharded(self, path: Path) -> dict[str, Any]:
        with (reshard.universal(path, first=self.is_global_zero, barrier=self.barrier) as folder,
              deepspeed_private.loads_universal(self.deepspeed_engine)):
            return super().load_checkpoint(folder)

    def load_model_state_dict(self, checkpoint: Mapping[str, object], strict: bool = True) -> None:
        """Does nothing: the engine has loaded the weights."""

    def _has_frozen_weights(self) -> bool:
        assert self.lightning_module is not None
        return not all(weight.requires_grad for weight in self.lightning_module.parameters())


class _EnginePrecision(DeepSpeedPrecision):
    """DeepSpeed's precision without Lightning's cast of buffers; rotary frequencies in bf16 give wrong positions."""

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module                               # the engine casts the parameters only
