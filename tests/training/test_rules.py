"""If this breaks: a run with two incompatible features hangs, fails in a library, or trains something else.

Every rule of the table is triggered by the real command line, and the README shows the current table.
"""

import contextlib
import io

import pytest
import torch
import yaml
from run_processes import write_data

from lit_llm.cli.main import main
from lit_llm.training.rules import matrix
from lit_llm.training.rules.table import ALL, OF_TRAINER
from tests.key_effects import ZERO_KEPT
from tests.training.test_documents import KINDS, WIDTHS

FULL, CHATS = {"model.lora": None}, [{"path": "train.jsonl"}]
PROMPT = {"model.lora": None, "model.peft": {"class_path": "PromptTuningConfig", "init_args": {"num_virtual_tokens": 4}}}
INIT = {"model.base": None, "model.lora": None, "data.tokenizer": "BASE", "model.init": {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}}
MOE = INIT | {"model.init": WIDTHS | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
              "model.router_aux_loss": 0.1, "model.gradient_checkpointing": True}
CAPS = INIT | {"model.init": WIDTHS | KINDS["gemma2"] | {"model_type": "gemma2"}}
TRITON, TWO = {"environ": {"TRITON_INTERPRET": "1"}}, {"trainer.devices": 2, "trainer.strategy": "deepspeed_stage_3"}
CALLBACKS = {"WeightAveraging": {}, "StochasticWeightAveraging": {"swa_lrs": 1e-3},
             "GradientAccumulationScheduler": {"scheduling": {0: 2}}, "OnExceptionCheckpoint": {"dirpath": "here"}}
EVERY, MASTERS = "every run", {"trainer.precision": "bf16-mixed"}


def zero(**arguments):
    return {"trainer.strategy": {"class_path": "lit_llm.ZeroStrategy", "init_args": arguments}}


def configured(**more):
    """A run with a DeepSpeed config of its own."""
    return zero(config={"zero_optimization": {"stage": 2}} | more)


EXAMPLES = {                                        # (first, second) -> keys beside those of BASE
    ("`model.base`", "`model.init`"): INIT | {"model.base": "BASE"},
    ("`model.cooldown`", "a schedule without cooldown"): {"model.cooldown": 0.5},
    ("`model.min_lr_share`", "`model.schedule: constant`"): {"model.min_lr_share": 0.5, "model.schedule": "constant"},
    ("`model.init`", "`model.lora`, `model.peft`"): INIT | {"model.lora": {"r": 2}},
    ("`model.merge_adapter`", "no `model.adapter`"): {"model.merge_adapter": True},
    ("`model.adapter`", "`model.init`"): INIT | {"model.adapter": "adapter"},
    ("`model.adapter`, continued", "`model.lora`, `model.peft`"): {"model.adapter": "adapter"},
    ("`model.merge_adapter`", "`model.quantize`"): {"model.adapter": "adapter", "model.merge_adapter": True, "model.quantize": "nf4"},
    ("`model.quantize`", "training of all weights"): FULL | {"model.quantize": "nf4"},
    ("prompt and prefix tuning", "`model.neftune_alpha`"): PROMPT | {"model.neftune_alpha": 5.0},
    ("`model.compile`", "`model.gradient_checkpointing: selective` or `auto`"):
        {"model.compile": True, "model.gradient_checkpointing": "selective"},
    ("external `model.cross_entropy` kernels", "a model that computes its own logits"):
        INIT | TRITON | {"model.init": {"model_type": "modernbert-decoder", "bos_token_id": 1}, "model.cross_entropy": "liger"},
    ("external `model.cross_entropy` kernels", "prompt and prefix tuning"): PROMPT | {"model.cross_entropy": "liger"},
    ("external `model.cross_entropy` kernels", "`trainer.kernels: plain`"):
        {"model.cross_entropy": "liger", "trainer.kernels": "plain"},
    ("external `model.cross_entropy` kernels", "a CPU"): {"model.cross_entropy": "cut_cross_entropy"},
    ("external `model.cross_entropy` kernels", "`trainer.precision: 64-true`"):
        TRITON | {"model.cross_entropy": "liger", "trainer.precision": "64-true"},
    ("`model.cross_entropy: cut_cross_entropy`", "`trainer.deterministic: true`"):
        TRITON | {"model.cross_entropy": "cut_cross_entropy", "trainer.deterministic": True},
    ("prompt and prefix tuning", "sharded weights gathered by layer, several processes"): PROMPT | TWO,
    ("`model.optimizer: muon`", "flattened weights in the optimizer"):
        FULL | {"model.optimizer": "muon", "trainer.strategy": "deepspeed"},
    ("`model.optimizer: adamw_8bit`", "sharded optimizer states"): {"model.optimizer": "adamw_8bit", "trainer.strategy": "fsdp2"},
    ("`trainer.precision: 16-true`", "no float32 masters"): {"trainer.precision": "16-true"},
    ("`trainer.precision: bf16-true`, training of all weights", "no float32 masters"): FULL | {"trainer.precision": "bf16-true"},
    ("a model that processes documents one by one", "sharded weights gathered by layer, several processes"):
        CAPS | TWO | {"trainer.strategy": "fsdp2"},
    ("an adapter shared by embedding and head (`ensure_weight_tying`)", "weights sharded while loading"): {
        "model.lora": None, "trainer.strategy": "deepspeed_stage_3", "model.peft": {"class_path": "LoraConfig", "init_args": {
            "r": 2, "target_modules": ["embed_tokens"], "ensure_weight_tying": True}}},
    ("`model.lora.train_tokens` with a list", "weights sharded while loading"):
        {"model.lora": {"r": 2, "train_tokens": ["</s>"]}, "trainer.strategy": "deepspeed_stage_3"},
    ("`model.quantize`", "sharded weights gathered by layer"): {"model.quantize": "nf4", "trainer.strategy": "fsdp2"},
    ("`model.compile`", "sharded weights gathered by layer"): {"model.compile": True, "trainer.strategy": "fsdp2"},
    ("gradient checkpointing with a load-balancing loss", "weights sharded while loading, several processes"): MOE | TWO,
    **{(rule.first, rule.second): {"trainer.enable_checkpointing": True, "trainer.callbacks": [{
        "class_path": f"lightning.pytorch.callbacks.{name}", "init_args": CALLBACKS[name]}]}
       for rule in OF_TRAINER if (name := rule.first.strip("`")) in CALLBACKS},
    ("a DeepSpeed config without a stage", EVERY): zero(config={"zero_optimisation": {"stage": 2}}),
    ("`optimizer` in a DeepSpeed config", EVERY): configured(optimizer={"type": "Adam", "params": {"lr": 1e-3}}),
    ("`scheduler` in a DeepSpeed config", EVERY): configured(scheduler={"type": "WarmupLR", "params": {}}),
    ("`gradient_clipping` in a DeepSpeed config", "`trainer.gradient_clip_val`"):
        configured(gradient_clipping=0.5) | {"trainer.gradient_clip_val": 1.0},
    ("`offload_parameters` of a DeepSpeed strategy", "`deepspeed_stage_1` or `_2`"): zero(stage=2, offload_parameters=True),
    ("float16 under DeepSpeed", "a processor without DeepSpeed's float16"):
        {"trainer.strategy": "deepspeed_stage_2", "trainer.precision": "16-true"},
    **{(f"`{name}` of a DeepSpeed strategy", "a precision without a loss scale"): MASTERS | zero(**{name: value})
       for name, value in ZERO_KEPT.items()},
    ("a checkpoint of one device or `ddp`", "resuming with `deepspeed` or `fsdp2`"):
        {"earlier": {}, "trainer.strategy": "deepspeed_stage_2"},
    ("a checkpoint of `deepspeed` or `fsdp2`", "resuming with one device or `ddp`"):
        {"earlier": {"trainer.strategy": "deepspeed_stage_2"}},
    ("a checkpoint of another 16-bit precision", "resuming with `deepspeed`"): {
        "earlier": {"trainer.strategy": "deepspeed_stage_2", "trainer.precision": "bf16-mixed"},
        "trainer.strategy": "deepspeed_stage_2"},
    ("processes started by `spawn`", EVERY): {"trainer.strategy": "ddp_spawn"},
    ("`trainer.min_epochs`", "no `trainer.callbacks` and no `trainer.max_time`"): {"trainer.min_epochs": 1},
    ("`trainer.min_steps`", "no `trainer.callbacks` and no `trainer.max_time`"): {"trainer.min_steps": 1},
    ("`trainer.overfit_batches`", "every run"): {"trainer.overfit_batches": 1},
    ("`trainer.reload_dataloaders_every_n_epochs`", "every run"): {"trainer.reload_dataloaders_every_n_epochs": 1},
    ("`data.val_sources`", "`data.val_fraction`"): {"data.val_sources": CHATS, "data.val_fraction": 0.1},
    ("`data.test_sources`", "`data.test_fraction`"): {"data.test_sources": CHATS, "data.test_fraction": 0.1},
    ("a `weight` in `data.val_sources`", "`data.val_sources`"): {"data.val_sources": [{"path": "train.jsonl", "weight": 2.0}]},
    ("a `weight` in `data.test_sources`", "`data.test_sources`"): {"data.test_sources": [{"path": "train.jsonl", "weight": 2.0}]},
    ("a `weight` in `data.guard_sources`", "`data.guard_sources`"): {"data.guard_sources": [{"path": "train.jsonl", "weight": 2.0}]},
    ("`data.stride`", "no evaluation"): {"data.stride": 8},
    ("a `data.stride` of at least `data.seq_len`", "`data.stride`"): {"data.stride": 64, "data.val_sources": CHATS},
    ("`data.guard_tokens`", "no `data.guard_sources`"): {"data.guard_tokens": 1000},
    ("`data.stream_buffer`", "no `data.streaming`"): {"data.stream_buffer": 60},
    ("a `weight` of the only source", "`data.streaming`"):
        {"data.sources": [{"path": "train.jsonl", "weight": 2.0}], "data.streaming": True, "trainer.max_steps": 2},
    ("`data.bad_record_limit`", "`data.on_bad_record: error`"): {"data.bad_record_limit": 0.5},
    ("`data.packing: concat`, no evaluation", "`data.overlong`"): {"data.packing": "concat", "data.overlong": "drop"},
    ("`data.packing: concat`", "conversations of which a part is supervised"): {"data.packing": "concat"},
}
LATE = {"a model that computes its own logits", "a model that processes documents one by one",     # properties of the model or the data are needed first
        "gradient checkpointing with a load-balancing loss", "conversations of which a part is supervised"}
BASE = {"model.base": "BASE", "model.lora": {"r": 2}, "data.sources": CHATS, "data.seq_len": 64, "data.batch_size": 1,
        "data.packing": "none", "trainer.accelerator": "cpu", "trainer.devices": 1, "trainer.max_steps": 1,
        "trainer.default_root_dir": "run", "trainer.enable_progress_bar": False, "trainer.enable_checkpointing": False}


def config_of(example, base):
    config = {}
    for key, value in {**BASE, **example}.items():
        wing, _, name = key.partition(".")
        config.setdefault(wing, {})[name] = base if value == "BASE" else value
    return config


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIT_LLM_CACHE", str(tmp_path / "cache"))
    write_data(tmp_path)
    (tmp_path / "adapter").mkdir()
    yield tmp_path
    torch.use_deterministic_algorithms(False)


def test_every_rule_has_an_example():
    assert {(rule.first, rule.second) for rule in ALL} == set(EXAMPLES)
    assert len(EXAMPLES) == len(ALL)


@pytest.mark.parametrize("rule", ALL, ids=lambda rule: f"{rule.first} x {rule.second}".replace("`", ""))
def test_every_rule_is_enforced_by_the_command_line(rule, place, monkeypatch, tiny_model, run_processes, caplog):
    example = dict(EXAMPLES[rule.first, rule.second])
    for name, value in example.pop("environ", {}).items():
        monkeypatch.setenv(name, value)
    earlier = example.pop("earlier", None)
    config = config_of(example, tiny_model("llama"))
    (place / "run.yaml").write_text(yaml.safe_dump(config))
    late = earlier is not None or {rule.first, rule.second} & LATE
    words, ranks = ["fit", "--config", str(place / "run.yaml")], config["trainer"]["devices"]
    if earlier is not None:                         # another run writes a checkpoint, from which this one resumes
        (place / "earlier.yaml").write_text(yaml.safe_dump(config_of(
            earlier | {"trainer.enable_checkpointing": True}, tiny_model("llama"))))
        result = run_processes.run("fit", "--config", str(place / "earlier.yaml"), limit=60, cwd=str(place))
        assert result["codes"] == [0], result["outputs"][0]["err"][-2000:]
        words += ["--ckpt_path", "last", "--trainer.max_steps", 2]
    if late and (ranks == 2 or earlier is not None):
        result = run_processes.run(*words, ranks=ranks, limit=60, cwd=str(place))
        code, err = max(result["codes"]), "".join(output["err"] for output in result["outputs"])
        assert result["codes"] == [2] * ranks, err[-2000:]
    else:
        code, err = 0, io.StringIO()
        with contextlib.redirect_stderr(err):
            try:
                main(["fit", "--config", "run.yaml"])
            except SystemExit as stopped:
                code = stopped.code
        err = err.getvalue()
    constant = max(rule.why.replace("}", "{").split("{")[::2], key=len)         # what does not depend on the run
    if rule.refused:
        assert code == 2
        assert constant in err
        assert rule.where in err
        assert rule.fix.replace("{{", "{").replace("}}", "}") in err
    else:
        assert code == 0
        assert constant in caplog.text
    if rule.refused and not late:
        assert not list((place / "cache").rglob("*.bin")), "data were read before"


def test_the_readme_shows_the_table_as_it_is(place, monkeypatch):
    """And the command that CONTRIBUTING.md names makes it so from any older one."""
    text = matrix.README.read_text(encoding="utf-8")
    assert matrix.BEGIN + matrix.as_markdown() + matrix.END in text, matrix.__doc__
    (place / "README.md").write_text(text.replace("| yes |", "| no |"), encoding="utf-8")
    monkeypatch.setattr(matrix, "README", place / "README.md")
    exec("from lit_llm.training.rules import matrix; matrix.write()")
    assert (place / "README.md").read_text(encoding="utf-8") == text


def test_a_pair_that_goes_together_is_no_error(place, tiny_model):
    """So that the examples above fail for their pair, and not for something that they share."""
    (place / "run.yaml").write_text(yaml.safe_dump(config_of({}, tiny_model("llama"))))
    main(["fit", "--config", "run.yaml"])
    assert list((place / "cache").rglob("*.bin")), "where the other test looks for data"
    assert len((place / "run" / "metrics.csv").read_text().splitlines()) == 2
