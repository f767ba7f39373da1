"""Lightning's Trainer with this project's defaults: run folder, metrics.csv, atomic checkpoints, DeepSpeed."""

import logging
import os
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import ProgressBar as AnyProgressBar
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.strategies import Strategy

from lit_llm import disk
from lit_llm.errors import InputError
from lit_llm.kernels import switch
from lit_llm.system import ranges
from lit_llm.system.private import lightning as private
from lit_llm.system.redaction import redact, redacted_argv
from lit_llm.training.checks import compatible, duration, idle
from lit_llm.training.parallel import named, safe_load
from lit_llm.training.parallel.saved import SavedModule
from lit_llm.training.planning.threadcount import ThreadCount
from lit_llm.training.record.forgetting import Forgetting
from lit_llm.training.record.run_record import RunRecord
from lit_llm.training.record.samples import Samples
from lit_llm.training.record.speed import Speed
from lit_llm.training.run import manifest
from lit_llm.training.run.checkpoint import StepCheckpoint
from lit_llm.training.run.finite import FiniteGuard
from lit_llm.training.run.preemption import Preemption, is_requeued
from lit_llm.training.run.progress import Progress
from lit_llm.training.run.report import MetricsCSV, write_json
from lit_llm.training.run.rng import RngState
from lit_llm.training.run.run_folder import RunFolder
from lit_llm.training.run.writing import of_writing, unwritable
from lit_llm.training.step.monitors import MonitorCheck

log = logging.getLogger(__name__)
NOTHING = ("max_steps", "max_epochs", "limit_train_batches", "val_check_interval")     # limits that must not be 0
RENDEZVOUS = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "RANK", "LOCAL_RANK", "WORLD_SIZE")


class Trainer(L.Trainer):
    """Trains, validates and tests; everything that a run writes is in `default_root_dir`.

    Args:
        strategy: `auto`, `ddp`, `deepspeed_stage_1`, `_2` or `_3` or `fsdp2` (on CUDA, and on CPU with gloo), any other
            strategy of Lightning's, or a class_path.
        default_root_dir: The run folder, runs/<name>.
        logger: Loggers in addition to `metrics.csv`, which is always written.
        callbacks: Callbacks in addition to checkpoints, progress bar and run folder, which are always active; a
            `StepCheckpoint` given here replaces the default one.
        num_sanity_val_steps: Validation batches before the first step. -1 uses all, so that the run can report
            perplexity before and after.
        log_every_n_steps: Steps between two rows of `metrics.csv`. A run with fewer steps has a row for each.
        max_epochs: Passes over the data; without any limit it is 1; -1 means unlimited.
        max_steps: Maximum number of optimizer steps; -1 means unlimited.
        max_time: Maximum duration, as "DD:HH:MM:SS" (in quotes) or a mapping such as {hours: 12}.
        enable_model_summary: Whether to print Lightning's table of layers; parameters are always counted.
        max_skipped_steps: Steps whose loss or gradient is not finite are skipped and counted, and their records are
            named; after this many in a row the run stops.
        samples: Number of validation prompts that are answered at each validation, greedily with at most 48 tokens, to
            follow what the model learns; the answers are in `samples.jsonl` and in the report. 0 writes none.
        accept_changes: What may differ from the checkpoint that is resumed or evaluated: base, peft, tokenizer,
            template, quantize.
        threads: CPU threads of each process. auto measures 1, 2, 4 ... up to its share of the cores at start and uses
            the fastest, which on busy cores is often 1; $OMP_NUM_THREADS overrides auto. A resumed run keeps its
            number, because another number changes the order of sums and so the last bits.
        stop_on_forgetting: End the run when the loss of the guard documents (`data.guard_sources`) has risen by more
            than this number of nats per token, with a 95 % interval above 0; null does not end it.
        kernels: plain computes with torch's and transformers' own operations in place of the kernels written here, to
            check a result without them; null takes $LIT_LLM_KERNELS, else own.
        kwargs: Other arguments of Lightning's Trainer.
    """

    def __init__(
        self,
        *,
        strategy: str | Strategy = "auto",
        default_root_dir: str = "runs/run",
        logger: Logger | list[Logger] | bool | None = None,
        callbacks: list[L.Callback] | L.Callback | None = None,
        num_sanity_val_steps: int = -1,
        log_every_n_steps: int = 10,
        max_epochs: int | None = None,
        max_steps: int = -1,
        max_time: duration.Duration | None = None,
        enable_model_summary: bool = False,
        max_skipped_steps: int = 5,
        samples: int = 3,
        accept_changes: list[manifest.Change] | None = None,
        threads: int | Literal["auto"] = "auto",
        kernels: switch.Kernels | None = None,
        stop_on_forgetting: float | None = None,
        **kwargs: Any,
    ) -> None:
        _check_numbers(locals() | kwargs)
        idle.check_trainer(locals() | kwargs)
        self.run = RunFolder(accept_changes or [])
        self.preemption = Preemption()
        self.thread_count = ThreadCount(threads)
        self.kernels = kernels
        self.exports = True                         # whether a finished fit writes export/
        callbacks = [] if callbacks is None else callbacks if isinstance(callbacks, list) else [callbacks]
        has_guard = any(isinstance(callback, FiniteGuard) for callback in callbacks)
        guard = [] if has_guard else [FiniteGuard(max_skipped_steps)]
        speed, forgetting = Speed(), Forgetting(stop_on_forgetting)
        callbacks = [MonitorCheck(), *callbacks, *guard, speed, RngState(), self.thread_count, self.run, forgetting,
                     self.preemption, Samples(samples), RunRecord(speed, forgetting)]
        for enabled, kind, default in (("enable_progress_bar", AnyProgressBar, Progress),
                                      ("enable_checkpointing", StepCheckpoint, StepCheckpoint)):
            if kwargs.get(enabled) is not False and not any(isinstance(callback, kind) for callback in callbacks):
                callbacks.append(default())
        loggers = [] if logger in (None, True, False) else logger if isinstance(logger, list) else [logger]
        for one_logger in loggers:
            if isinstance(one_logger, WandbLogger):     # it logs its arguments, also to its server
                private.change_wandb_arguments(one_logger, redact)
        super().__init__(
            strategy=named.strategy(strategy),
            default_root_dir=default_root_dir,
            logger=[MetricsCSV(default_root_dir), *loggers],
            callbacks=callbacks,
            num_sanity_val_steps=num_sanity_val_steps,
            log_every_n_steps=log_every_n_steps,
            max_epochs=1 if max_epochs is None and max_steps == -1 and max_time is None else max_epochs,
            max_steps=max_steps,
            max_time=max_time,
            enable_model_summary=enable_model_summary,
            **kwargs,
        )
        compatible.check_trainer(self)
        if str(kwargs.get("precision")) in ("16", "16-mixed") and self.precision == "bf16-mixed":
            log.warning("trainer.precision: CPUs do not support float16 with a loss scale; using bf16-mixed instead")

    def fit(  # type: ignore[override]
            self, model: L.LightningModule, train_dataloaders: object = None, val_dataloaders: object = None,
            datamodule: L.LightningDataModule | None = None, ckpt_path: str | Path | None = None,
            **kwargs: Any) -> None:
        """Train; with `ckpt_path` (last, best, auto, or a checkpoint folder) resume from that checkpoint.

        Args:
            model: The module.
            train_dataloaders: Dataloaders, instead of a data module.
            val_dataloaders: Dataloaders, instead of a data module.
            datamodule: The data.
            ckpt_path: `last`, `best`, or a folder like runs/sft/checkpoints/step_40; null starts a new run; `auto` is
                last if there is one and a new run otherwise, for jobs that restart themselves.
            kwargs: Other arguments of Lightning's fit.
        """
        if kwargs.get("weights_only") is False and not safe_load.is_trusted():
            raise InputError("a config file must not enable loading checkpoints with pickle", where="weights_only",
                             fix="leave it out; if you trust the checkpoint, type --trust-checkpoint")
        if automatic := ckpt_path == "auto" or (ckpt_path is None and is_requeued()):
            ckpt_path = "last" if manifest.folders(Path(self.default_root_dir)) else None
        if ckpt_path is not None:
            self.run.restarted = automatic
            self.run.resumed_from = manifest.find(Path(self.default_root_dir), str(ckpt_path))
            kwargs |= safe_load.arguments(self.run.resumed_from / "state")
        elif self.run.accept_changes and not automatic:
            log.warning("trainer.accept_changes: no checkpoint is resumed (--ckpt_path), so it has no effect")
        with switch.using(self.kernels):
            self._check_rules(model)
        with self.preemption.listening(self), self._own_environment(), manifest.verified(self.run.resumed_from):
            try:
                super().fit(model, train_dataloaders, val_dataloaders, datamodule, **kwargs)
            except OSError as error:                # metrics; checkpoints report it themselves
                if not of_writing(Path(self.default_root_dir), error):
                    raise
                raise unwritable(Path(self.default_root_dir), error) from error
            finally:
                self.run.lock.release()

    def validate(  # type: ignore[override]
            self, model: Any = None, dataloaders: Any = None, ckpt_path: str | Path | None = None,
            verbose: bool = False, datamodule: L.LightningDataModule | None = None, **kwargs: Any) -> Any:
        """Measure perplexity on the validation data, for the base or a checkpoint.

        Args:
            model: The module.
            dataloaders: Dataloaders, instead of a data module.
            ckpt_path: `last`, `best`, or a checkpoint folder; null uses the model as configured.
            verbose: Whether to print Lightning's table of metrics; this project's are always printed.
            datamodule: The data.
            kwargs: Other arguments of Lightning's validate.
        """
        return self._measured(super().validate, "val_sources", model, ckpt_path, dataloaders=dataloaders,
                              verbose=verbose, datamodule=datamodule, **kwargs)

    def test(  # type: ignore[override]
            self, model: Any = None, dataloaders: Any = None, ckpt_path: str | Path | None = None,
            verbose: bool = False, datamodule: L.LightningDataModule | None = None, **kwargs: Any) -> Any:
        """Measure perplexity on the test data, for the base or a checkpoint.

        Args:
            model: The module.
            dataloaders: Dataloaders, instead of a data module.
            ckpt_path: `last`, `best`, or a checkpoint folder; null uses the model as configured.
            verbose: Whether to print Lightning's table of metrics; this project's are always printed.
            datamodule: The data.
            kwargs: Other arguments of Lightning's test.
        """
        return self._measured(super().test, "test_sources", model, ckpt_path, dataloaders=dataloaders,
                              verbose=verbose, datamodule=datamodule, **kwargs)

    def prepare(self, model: L.LightningModule, datamodule: L.LightningDataModule) -> None:
        """Tokenize the data of a run into the cache, and print statistics; no model is built.

        Args:
            model: The module, which is not built.
            datamodule: The data.
        """
        datamodule.trainer = self                       # for the number of steps in the summary
        self.strategy.connect(model)                    # the data use the model's tokenizer
        datamodule.prepare_data()
        datamodule.setup("fit")

    def inspect(self, model: L.LightningModule, datamodule: L.LightningDataModule, rows: int = 3,
                characters: int = 400, html: str | None = None) -> None:
        """Show tokens and loss mask of a run's data, with statistics; no model is built.

        Args:
            model: The module, which is not built.
            datamodule: The data.
            rows: Number of packed training sequences to show.
            characters: Maximum number of characters per text in the terminal; 0 shows all.
            html: Also write an HTML page to this file.
        """
        from lit_llm.data.inspect.inspection import examine
        from lit_llm.data.inspect.page import as_page
        from lit_llm.data.inspect.terminal import as_text

        for name, value in (("rows", rows), ("characters", characters)):
            ranges.check(f"inspect.{name}", value, where=name)
        datamodule.quiet = True  # type: ignore[attr-defined]      # the full report follows
        self.prepare(model, datamodule)
        seen = examine(datamodule, rows)  # type: ignore[arg-type]
        print(as_text(seen, colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ, characters=characters))
        if html:
            disk.replace_text(Path(html), as_page(seen, f"Data of {Path(self.default_root_dir).name}"))

    def plan(self, model: L.LightningModule, datamodule: L.LightningDataModule, memory: float | None = None,
             device: str | None = None, probe: bool = False, json: str | None = None) -> None:
        """Estimate the cost of a run and whether it fits into memory; no weights are loaded.

        Args:
            model: The module, of which only the settings are read.
            datamodule: The data, which are tokenized into the cache as by `prepare`.
            memory: Memory in GiB of the device to plan for, a GPU unless `device` is cpu; null uses the device's own.
            device: Device to plan for: t4, v100-32, rtx3090, rtx4080, rtx4090, rtx5090, l4, l40s, a10, a6000, a100-40,
                a100-80, h100, h200, b200, mi300x or cpu; null uses the devices of this machine. `trainer.devices` sets
                the number.
            probe: Also train four steps in a separate process, and measure time and memory.
            json: Also write all values to this file.
        """
        from lit_llm.training.planning import devices, plan

        devices.named(device, memory)                   # first, because reading the data takes longer
        datamodule.quiet = True  # type: ignore[attr-defined]
        self.prepare(model, datamodule)
        with switch.using(self.kernels):
            made = plan.make(self, model, datamodule, memory, device)
        made = plan.probed(made, self.run.config) if probe else made
        print(plan.as_text(made))
        if json:
            write_json(Path(json), plan.as_values(made))

    def verify_resume(self, model: L.LightningModule, datamodule: L.LightningDataModule, steps: int = 4) -> None:
        """Verify that a run that is stopped in the middle and resumed ends bit-identically.

        Args:
            model: The module, trained twice for some steps in a temporary folder; the run's folder is not changed.
            datamodule: The data.
            steps: Optimizer steps of each run.
        """
        from lit_llm.training.planning.doctor import verify_resume

        if not verify_resume(self.run.config, steps):
            raise SystemExit(1)

    def selftest(self, model: L.LightningModule, datamodule: L.LightningDataModule, processes: int | None = None
                 ) -> None:
        """Verify that the first step's gradient is independent of micro-batches, packing and processes.

        Args:
            model: The module, without dropout and noise; its gradient is computed for each division.
            datamodule: The data, of which one step is used.
            processes: Number of processes to compare with one; null uses `trainer.devices`.
        """
        from lit_llm.training.planning.doctor import selftest

        ranges.check("selftest.processes", processes, where="processes")
        processes = self.world_size if processes is None else processes
        if not selftest(self.run.config, datamodule, devices=self.world_size, processes=processes):
            raise SystemExit(1)

    def _check_rules(self, model: L.LightningModule) -> None:
        """Refuse incompatible settings before data are read; properties of the model are checked when it is built."""
        from lit_llm.training.module import CausalLMModule

        if isinstance(model, CausalLMModule):
            compatible.check(model, self.strategy, self.num_nodes * self.num_devices, precision=str(self.precision),
                             training=True)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        self.preemption.begin_watch(self)
        with redacted_argv():                       # wandb records the command line
            for logger in self.loggers if self.is_global_zero else ():
                _ = logger.experiment if isinstance(logger, WandbLogger) else None
        with switch.using(self.kernels):
            return super()._run(*args, **kwargs)

    def _run_stage(self) -> Any:
        if self.state.fn == "fit":
            self.run.check_left(self)
        self.thread_count.settle(self)
        result = super()._run_stage()
        if self.state.fn == "fit":
            self.run.complete(self)
        return result

    @contextmanager
    def _own_environment(self) -> Generator[None, None, None]:
        """Restore rendezvous variables of a single process, which later commands of a notebook would inherit."""
        before = {name: os.environ.get(name) for name in RENDEZVOUS}
        try:
            yield
        finally:
            for name, value in before.items() if self.world_size == 1 else ():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value

    def _measured(self, evaluate: Callable[..., object], key: str, model: Any, ckpt_path: str | Path | None,
                  **kwargs: Any) -> Any:
        """Evaluate a model, or the weights of a checkpoint, which are stored beside its state."""
        if ckpt_path is not None:
            model.checkpoint = manifest.find(Path(self.default_root_dir), str(ckpt_path))
            if not isinstance(model, SavedModule):  # which does not take its weights from there itself
                kwargs |= safe_load.arguments(model.checkpoint / "state")
        with self._own_environment(), manifest.verified(model.checkpoint if ckpt_path is not None else None):
            figures = evaluate(model, **kwargs)
        if not figures:
            raise InputError("there are no data to evaluate on", where=f"data.{key}",
                             fix=f"set data.{key}, or data.val_fraction for a share of data.sources")
        return figures


def _check_numbers(options: dict[str, Any]) -> None:
    """Refuse values that Lightning accepts but cannot use."""
    for name in NOTHING:
        if options.get(name) == 0:
            raise InputError("must not be 0: nothing would be trained or measured", where=f"trainer.{name}",
                             fix="leave it out, or set it to 1 or more; validate and export do not train")
    ranges.check_all("trainer", options)
    for name in ("max_time", "val_check_interval"):
        duration.check(f"trainer.{name}", options.get(name))
