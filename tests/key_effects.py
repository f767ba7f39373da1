"""For each key of a run config: a value other than the default, and the part of the run that it must change.

`tests/test_keys.py` writes the files that they name into the run's folder.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Entry:
    """The effect of a key.

    Args:
        value: Not the default.
        sees: The part of the run that differs: a name in `test_keys.Seen`.
        base: Settings of both runs, over the common ones.
        how: `look` builds the objects and lays out the data, `build` stops at the first step, `train` trains, `save` also
            writes checkpoints, `validate` measures.
        refused: Instead of `sees`: part of the error message for a value that cannot have an effect.
    """

    value: Any
    sees: str = ""
    base: dict[str, Any] = field(default_factory=dict)
    how: str = "train"
    refused: str = ""


def look(value: Any, sees: str = "batches", **more: Any) -> Entry:
    """An effect before the first step."""
    return Entry(value, sees, more.pop("base", {}), "look", **more)


def refuse(value: Any, words: str, **base: Any) -> Entry:
    """Refused, because it has no effect."""
    return Entry(value, base=base, refused=words)


def source(**keys: Any) -> list[dict[str, Any]]:
    """The common source with other settings."""
    return [{"path": "talks.jsonl"} | keys]


FULL = {"model.lora": None}
NEW = {"model.base": None, "model.lora": None, "data.tokenizer": "BASE", "model.init": {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2}}
VALIDATES = {"data.val_sources": source()}
STOPS = {"trainer.callbacks": [{"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {
    "monitor": "train/loss", "stopping_threshold": 1e9, "check_on_train_epoch_end": True}}], "trainer.max_epochs": 3,
    "trainer.max_steps": -1}
STREAM = {"data.streaming": True}
DOCUMENTS = {"data.sources": [{"path": "text.txt"}], "data.seq_len": 16}
NAN = {"model.base": "BROKEN", "trainer.max_steps": 4, "data.batch_size": 1}

KEYS: dict[str, Entry] = {
    "seed_everything": Entry(7, "weights"),
    "ckpt_path": Entry("RUN", "weights", {"trainer.max_steps": 3}),
    "weights_only": refuse(False, "--trust-checkpoint"),
    "model.class_path": refuse("somebody.Module", "not allowed"),
    "model.base": Entry("OTHER", "weights"),
    "model.init": Entry(NEW["model.init"] | {"hidden_size": 32}, "weights", NEW),
    "model.lora": Entry(None, "trained"),
    "model.peft": Entry({"class_path": "LoHaConfig", "init_args": {"r": 2, "target_modules": ["q_proj"]}}, "trained",
                        FULL),
    "model.quantize": Entry("nf4", "model"),
    "model.adapter": Entry("ADAPTER", "trained", FULL),
    "model.merge_adapter": Entry(True, "trained", {"model.adapter": "ADAPTER", **FULL}),
    "model.lr": Entry(1e-2, "optimizer"),
    "model.warmup": Entry(3, "rates"),
    "model.schedule": Entry("linear", "rates"),
    "model.cooldown": Entry(0.9, "rates", {"model.schedule": "wsd"}),
    "model.min_lr_share": Entry(0.9, "rates"),
    "model.optimizer": Entry("muon", "optimizer"),
    "model.weight_decay": Entry(0.1, "optimizer"),
    "model.betas": Entry([0.5, 0.6], "optimizer"),
    "model.eps": Entry(1e-3, "optimizer"),
    "model.router_aux_loss": refuse(0.5, "model.router_aux_loss"),
    "model.neftune_alpha": Entry(10.0, "weights"),
    "model.gradient_checkpointing": Entry(True, "calls"),
    "model.compile": Entry(True, "compiled", how="build"),
    "model.cross_entropy": refuse("liger", "model.cross_entropy"),
    "model.lora.r": Entry(3, "trained"),
    "model.lora.alpha": Entry(1.0, "weights"),
    "model.lora.dropout": Entry(0.5, "weights"),
    "model.lora.target_modules": Entry(["q_proj"], "trained"),
    "model.lora.dora": Entry(True, "trained"),
    "model.lora.rslora": Entry(True, "weights"),
    "model.lora.train_tokens": Entry(["a", "b"], "trained"),

    "data.sources": look([{"path": "text.txt"}]),
    "data.val_sources": look(source()),
    "data.val_fraction": look(0.4),
    "data.test_sources": look(source()),
    "data.test_fraction": look(0.4),
    "data.guard_sources": Entry(source(), "rows"),
    "data.guard_tokens": Entry(1000, "rows", {"data.guard_sources": source()}),
    "data.tokenizer": look("sample:tokenizer", base=NEW),
    "data.chat_template": look("greets.jinja"),
    "data.template_args": look({"style": "x"}, base={"data.chat_template": "style.jinja"}),
    "data.train_on": look("last"),
    "data.seq_len": look(32),
    "data.class_path": refuse("somebody.Data", "not allowed"),
    "data.batch_size": look(1),
    "data.packing": look("none"),
    "data.stride": look(8, base={**DOCUMENTS, "data.val_sources": [{"path": "text.txt"}]}),
    "data.overlong": look("drop", base={"data.seq_len": 60}),
    "data.on_bad_record": look("quarantine", "code", base={"data.sources": [{"path": "one_bad.jsonl"}]}),
    "data.bad_record_limit": look(0.9, "code", base={"data.sources": [{"path": "bad.jsonl"}],
                                                     "data.on_bad_record": "quarantine"}),
    "data.seed": look(5),
    "data.cache_dir": look("elsewhere", "files"),
    "data.num_proc": look(2, "children"),
    "data.dedup": look(True, base={"data.sources": [{"path": "twice.jsonl"}]}),
    "data.streaming": Entry(True, "code", {"data.stream_buffer": 60}),     # refused without a stream
    "data.stream_buffer": Entry(600, "ids", {**STREAM, "data.stream_buffer": 60, "trainer.max_steps": 4}),
    "data.sources.path": look("text.txt"),
    "data.sources.format": look("prompt", "code"),
    "data.sources.split": look("validation", base={"data.sources": [{"path": "splits"}]}),
    "data.sources.subset": refuse("small", "subset"),
    "data.sources.weight": look(2.0),
    "data.sources.columns": look({"prompt": "answer", "completion": "question"},
                                 base={"data.sources": [{"path": "columns.jsonl"}]}),
    "data.sources.document": look("line", base=DOCUMENTS),
    "data.sources.clean": look("collapse", base={"data.sources": [{"path": "text.txt"}]}),

    "trainer.accelerator": refuse("gpu", "gpu"),
    "trainer.accept_changes": Entry(["template", "tokenizer"], "error", {
        "ckpt_path": "RUN", "data.chat_template": "greets.jinja", "trainer.max_steps": 3}),
    "trainer.accumulate_grad_batches": Entry(2, "weights", {"data.batch_size": 1}),
    "trainer.barebones": refuse(True, "barebones"),
    "trainer.benchmark": Entry(True, "settings"),
    "trainer.callbacks": look([{"class_path": "lightning.pytorch.callbacks.DeviceStatsMonitor"}], "objects"),
    "trainer.check_val_every_n_epoch": Entry(2, "validations", {**VALIDATES, "trainer.max_epochs": 2, "trainer.max_steps": -1}),
    "trainer.default_root_dir": Entry("elsewhere", "files"),
    "trainer.detect_anomaly": Entry(True, "settings"),
    "trainer.deterministic": Entry(True, "settings"),
    "trainer.devices": look(2, "objects"),
    "trainer.enable_autolog_hparams": refuse(False, "trainer.enable_autolog_hparams"),
    "trainer.enable_checkpointing": Entry(True, "files"),
    "trainer.enable_model_summary": Entry(True, "output"),
    "trainer.enable_progress_bar": look(False, "objects"),
    "trainer.fast_dev_run": Entry(1, "ids", {"data.batch_size": 1}),
    "trainer.gradient_clip_algorithm": refuse("value", "trainer.gradient_clip_algorithm"),
    "trainer.gradient_clip_val": Entry(1e-6, "weights", {"model.eps": 1e-3}),
    "trainer.inference_mode": Entry(False, "validations", VALIDATES, "validate"),
    "trainer.kernels": Entry("plain", "weights"),
    "trainer.limit_predict_batches": refuse(1, "trainer.limit_predict_batches"),
    "trainer.limit_test_batches": look(0.5, "objects"),
    "trainer.limit_train_batches": Entry(1, "ids", {"trainer.max_steps": -1, "data.batch_size": 2}),
    "trainer.limit_val_batches": Entry(1, "validations", VALIDATES | {"data.batch_size": 1}),
    "trainer.log_every_n_steps": Entry(2, "rows"),
    "trainer.logger": Entry([{"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "csv"}}],
                            "files"),
    "trainer.max_epochs": Entry(2, "ids", {"trainer.max_steps": -1}),
    "trainer.max_skipped_steps": Entry(1, "output", NAN),
    "trainer.max_steps": Entry(1, "ids"),
    "trainer.max_time": Entry("00:00:00:00", "ids", {"trainer.max_epochs": 1}),
    "trainer.min_epochs": Entry(2, "ids", STOPS),
    "trainer.min_steps": Entry(6, "ids", STOPS),
    "trainer.model_registry": refuse("a/b", "trainer.model_registry"),
    "trainer.num_nodes": look(2, "objects"),
    "trainer.num_sanity_val_steps": Entry(0, "validations", VALIDATES),
    "trainer.overfit_batches": refuse(1, "trainer.overfit_batches"),
    "trainer.plugins": Entry([{"class_path": "lightning.pytorch.plugins.DoublePrecision"}], "weights", {
        "trainer.precision": None}),
    "trainer.precision": Entry("64-true", "weights"),
    "trainer.profiler": Entry({"class_path": "lightning.pytorch.profilers.SimpleProfiler", "init_args": {
        "dirpath": ".", "filename": "profile"}}, "files"),
    "trainer.reload_dataloaders_every_n_epochs": refuse(1, "trainer.reload_dataloaders_every_n_epochs"),
    "trainer.samples": Entry(0, "files", VALIDATES),
    "trainer.stop_on_forgetting": Entry(1e-6, "ids", {**VALIDATES, "data.guard_sources": source(), "model.lr": 1.0,
                                                     "trainer.val_check_interval": 1, "data.batch_size": 1}),
    "trainer.strategy": look("deepspeed_stage_2", "objects"),
    "trainer.sync_batchnorm": refuse(True, "trainer.sync_batchnorm"),
    "trainer.threads": Entry(2, "settings"),
    "trainer.use_distributed_sampler": refuse(False, "trainer.use_distributed_sampler"),
    "trainer.val_check_interval": Entry(1, "validations", VALIDATES | {"data.batch_size": 1}),

    **{f"trainer.callbacks.StepCheckpoint.{key}": Entry(value, "saved", {
        "trainer.max_steps": 4, "trainer.val_check_interval": 2, "data.batch_size": 1, "data.val_sources": source()},
        "save") for key, value in {
            "every_n_steps": 3, "monitor": "val/perplexity", "mode": "max", "keep_best": 3, "keep_last": 3,
            "keep_every_n_steps": 3}.items()},
    "trainer.callbacks.Progress.every_seconds": Entry(0.0, "output"),
}
# Keys without effect beside others: refused, or reported in a warning. Pairs of the table of rules
# are in training/test_rules.py.
IDLE: list[tuple[str, Any, dict[str, Any], str]] = [
    ("data.sources", source(split="test"), {}, "split: test"),
    ("data.sources", [{"path": "plain", "split": "test"}], {}, "split: test"),
    ("data.sources", source(document="line"), {}, "document: line"),
    ("data.train_on", "last", DOCUMENTS, "warning data.train_on"),
    ("trainer.min_steps", 3, {}, "trainer.min_steps"),
    ("trainer.min_epochs", 3, {}, "trainer.min_epochs"),
    ("trainer.logger", False, {}, "warning trainer.logger"),
    ("trainer.accept_changes", ["base"], {}, "warning trainer.accept_changes"),
    ("trainer.strategy", {"class_path": "lit_llm.training.parallel.zero.ZeroStrategy", "init_args": {"loss_scale": 8.0}}, {},
     "trainer.strategy.init_args.loss_scale"),
    ("trainer.strategy", {"class_path": "lit_llm.training.parallel.fsdp.Fsdp2Strategy", "init_args": {"data_parallel_size": 3}},
     {}, "data_parallel_size"),
    ("trainer.strategy", {"class_path": "lit_llm.training.parallel.fsdp.Fsdp2Strategy",
                          "init_args": {"save_distributed_checkpoint": False}}, {},
     "save_distributed_checkpoint"),
]
# What of another argument each argument of ZeRO belongs to.
NVME = {"stage": 3, "offload_parameters": True, "offload_optimizer": True}
ZERO: dict[str, tuple[Any, dict[str, Any]]] = {
    "stage": (3, {}), "offload_optimizer": (True, {}), "offload_parameters": (True, {"stage": 3}),
    "config": ({"zero_optimization": {"stage": 1}}, {}), "zero_optimization": (False, {}),
    "offload_params_device": ("nvme", NVME), "nvme_path": ("/tmp", NVME), "params_buffer_count": (6, NVME),
    "params_buffer_size": (10, NVME), "max_in_cpu": (10, NVME), "offload_optimizer_device": ("nvme", NVME),
    "optimizer_buffer_count": (5, NVME), "block_size": (1024, {}), "queue_depth": (9, {}),
    "single_submit": (True, {}), "overlap_events": (False, {}), "thread_count": (2, {}), "pin_memory": (True, NVME),
    "sub_group_size": (10, {}), "contiguous_gradients": (False, {}), "overlap_comm": (False, {}),
    "allgather_partitions": (False, {}), "reduce_scatter": (False, {}), "allgather_bucket_size": (10, {}),
    "reduce_bucket_size": (10, {}), "zero_allow_untested_optimizer": (False, {}),
    "logging_batch_size_per_gpu": (3, {}),
}
ZERO_REFUSED: dict[str, Any] = {
    "remote_device": "cpu", "load_full_weights": True, "exclude_frozen_parameters": True,
    "partition_activations": True, "cpu_checkpointing": True, "contiguous_memory_optimization": True,
    "synchronize_checkpoint_boundary": True, "nvme_path": "/tmp", "params_buffer_count": 6, "pin_memory": True,
}
# Objects of Lightning's and numbers that only float16 on a GPU reads; kept by the strategy under their own name.
ZERO_KEPT: dict[str, Any] = {
    "loss_scale": 8.0, "initial_scale_power": 3, "loss_scale_window": 7, "hysteresis": 3, "min_loss_scale": 2}
OF_THE_MACHINE = {
    "accelerator", "parallel_devices", "cluster_environment", "precision_plugin",      # given by the trainer
    "process_group_backend", "timeout", "logging_level"}                    # of the processes' connections and log
