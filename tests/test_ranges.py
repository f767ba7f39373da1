"""If this breaks: an invalid value causes a traceback or is used in a run.

Every key of `fit`, and every place of every shipped config, is given each value of `mutations.py`; the config is parsed,
checked and built as the command does it. The accepted values are listed here by hand. `benchmarks/mutations.py` runs the
commands themselves.
"""

import logging
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import yaml
from jsonargparse import Namespace
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_llm import CausalLMModule, LoRA, Source, TextDataModule, Trainer
from lit_llm.cli import precheck, runs, settings
from lit_llm.errors import InputError
from lit_llm.models.adapters import peft_method
from lit_llm.system import ranges
from lit_llm.training.run.checkpoint import StepCheckpoint
from lit_llm.training.run.progress import Progress
from tests import mutations
from tests.test_class_paths import fit_parser
from tests.test_cli import call, place, refused

assert place                                        # a fixture

SMALL = {"model": {"base": "sample:base", "lora": {"r": 2}}, "data": {"sources": [{"path": "good.jsonl"}]},
         "trainer": {"accelerator": "cpu", "devices": 1}}
TEXT = "x 1e3_text unicode"                         # a name that is looked for later, in files or among the data's
# Key -> names of all values that may be taken. A key that is not here takes none of them.
ACCEPTED = {
    "seed_everything": "true 0 1", "trainer": "{}", "model.class_path": "null", "data.class_path": "null",
    "model.base": TEXT, "model.init": "null", "model.lora": "null {}", "model.peft": "null", "model.quantize": "null",
    "model.adapter": "null", "model.lr": "1 0.5", "model.warmup": "0 1 0.5 1e3_text", "model.min_lr_share": "0 1 0.5",
    "model.weight_decay": "0 1 0.5", "model.eps": "1 0.5", "model.router_aux_loss": "null 0 1 0.5",
    "model.neftune_alpha": "null 0 1 0.5 1e3_text", "model.gradient_checkpointing": "true", "model.compile": "true",
    "model.lora.r": "1", "model.lora.alpha": "1 0.5 1e3_text", "model.lora.dropout": "0 0.5", "model.lora.dora": "true",
    "model.lora.rslora": "true", "model.lora.target_modules": f"{TEXT} []", "model.lora.train_tokens": f"null {TEXT} []",

    "data.sources.path": TEXT, "data.sources.format": TEXT, "data.sources.split": TEXT,
    "data.sources.subset": f"null {TEXT}", "data.sources.weight": "1 0.5 1e3_text", "data.sources.columns": "{}",
    "data.sources.document": TEXT, "data.val_sources": "null []", "data.test_sources": "null []", "data.guard_sources": "null []",
    "data.val_fraction": "0 0.5", "data.test_fraction": "0 0.5", "data.tokenizer": f"null {TEXT}",
    "data.chat_template": f"null {TEXT}", "data.template_args": "null {} {a} {1}", "data.batch_size": "1",
    "data.seed": "0 1", "data.cache_dir": f"null {TEXT}", "data.num_proc": "null 1", "data.dedup": "true",
    "data.streaming": "true", "data.stride": "null",

    "trainer.strategy": "", "trainer.default_root_dir": TEXT, "trainer.logger": "null true []",
    "trainer.callbacks": "null []", "trainer.plugins": "null [] {}", "trainer.profiler": "null",
    "trainer.num_sanity_val_steps": "0 -1 1", "trainer.log_every_n_steps": "0 1", "trainer.max_epochs": "null -1 1",
    "trainer.max_steps": "-1 1", "trainer.max_time": "null", "trainer.min_epochs": "null 0", "trainer.min_steps": "null 0",
    "trainer.enable_model_summary": "true", "trainer.max_skipped_steps": "1", "trainer.accept_changes": "null []",
    "trainer.threads": "1", "trainer.accelerator": "", "trainer.devices": "1", "trainer.num_nodes": "1",
    "trainer.precision": "null", "trainer.fast_dev_run": "true 0 1", "trainer.limit_train_batches": "null 1 0.5",
    "trainer.limit_val_batches": "null 0 1 0.5", "trainer.limit_test_batches": "null 0 1 0.5",
    "trainer.limit_predict_batches": "null", "trainer.overfit_batches": "0", "trainer.val_check_interval": "null 1 0.5",
    "trainer.check_val_every_n_epoch": "null 1", "trainer.enable_checkpointing": "null true",
    "trainer.enable_progress_bar": "null true", "trainer.accumulate_grad_batches": "1",
    "trainer.stop_on_forgetting": "null 1 0.5", "trainer.samples": "0 1",
    "trainer.gradient_clip_val": "null 0 1 0.5 1e3_text", "trainer.gradient_clip_algorithm": "null",
    "trainer.deterministic": "null true", "trainer.benchmark": "null true", "trainer.inference_mode": "true",
    "trainer.use_distributed_sampler": "true", "trainer.detect_anomaly": "true",
    "trainer.kernels": "null", "trainer.reload_dataloaders_every_n_epochs": "0", "trainer.enable_autolog_hparams": "true",
    "trainer.model_registry": "null",
    "trainer.callbacks.StepCheckpoint.every_n_steps": "null 1", "trainer.callbacks.StepCheckpoint.monitor": TEXT,
    "trainer.callbacks.StepCheckpoint.keep_best": "0 1", "trainer.callbacks.StepCheckpoint.keep_last": "1",
    "trainer.callbacks.StepCheckpoint.keep_every_n_steps": "null 1",
    "trainer.callbacks.Progress.every_seconds": "0 1 0.5 1e3_text",
}


@pytest.fixture(scope="module")
def parser():
    """The real one of `fit`."""
    return fit_parser()


@pytest.fixture(scope="module", autouse=True)
def quiet():
    """Thousands of objects are built, and each would print something."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(before)


def taken(parser, config):
    """Whether a config is parsed, checked and built; errors that the command does not report are raised."""
    try:
        settings.check_plain(config)
        paths = {part: keys.get("class_path") for part, keys in config.items()
                 if part in ("model", "data") and isinstance(keys, dict)}
        precheck.own_classes([f"--{part}.class_path={path}" for part, path in paths.items() if isinstance(path, str)])
        parsed = parser.parse_object(config, defaults=False)
        runs.check_values("fit", parsed)
        built = parser.instantiate(parsed)
        built.data._check()
        Trainer(**vars(built.get("trainer", Namespace())) | {"logger": None})
    except InputError:
        return False
    except (MisconfigurationException, ValueError, TypeError) as error:     # of constructors
        assert str(runs.refusal(error))
        return False
    return True


PARTS = ("seed_everything", "model", "data", "trainer.callbacks.", "trainer.strategy.", "trainer")


@pytest.mark.parametrize("part", PARTS)
def test_each_key_takes_what_makes_sense_and_refuses_the_rest(part, parser):
    keys = {key: how for key, how in mutations.schema().items()
            if next(section for section in PARTS if key.startswith(section)) == part}
    assert keys
    wrong = []
    for key, (beside, path) in keys.items():
        small = mutations.merged(SMALL, beside)
        for name in mutations.VALUES:
            config = mutations.with_value(small, path, mutations.value_of(name))
            try:
                accepted = taken(parser, config)
            except Exception as error:              # a traceback for the user
                wrong.append(f"{key}: {name} gives {type(error).__name__}: {str(error)[:100]}")
                continue
            if not key.startswith("trainer.strategy.") and accepted != (name in ACCEPTED.get(key, "").split()):
                wrong.append(f"{key}: {name} is {'taken' if accepted else 'refused'}")
    assert not wrong, "\n".join(wrong)


def test_each_place_of_each_shipped_config_ends_in_no_traceback(parser):
    schema = {place for _, place in mutations.schema().values()}
    wrong, tried = [], 0
    for file in mutations.CONFIGS:
        whole = yaml.safe_load(file.read_text())
        random = "init" in whole.get("model", {})
        small = {"trainer": SMALL["trainer"]} if random else SMALL
        for path in set(mutations.leaves(whole)) - schema:
            for name in mutations.VALUES:
                config = mutations.with_value(mutations.merged(whole, small), path, mutations.value_of(name))
                tried += 1
                try:
                    taken(parser, config)
                except Exception as error:
                    wrong.append(f"{file.name} {path}: {name} gives {type(error).__name__}: {str(error)[:100]}")
    assert tried > 500
    assert not wrong, "\n".join(wrong)


# ---- where the table is read -----------------------------------------------------------------------------------------

def test_a_refusal_says_key_value_range_and_what_to_type(place):
    message = refused("fit", "--config", "ok.yaml", "--model.lr", "1e12", says="model.lr")
    assert "1000000000000.0 is not a number above 0, at most 10" in message
    assert "for example --model.lr 2e-4" in message
    message = refused("fit", "--config", "ok.yaml", "--data.seq_len", "null", says="data.seq_len")
    assert "null is not a whole number" in message
    assert "data.seq_len takes a whole number from 2 to 16,777,216; for example --data.seq_len 1024" in message


@pytest.mark.parametrize(("text", "says"), [
    ("model: {lr: .nan}\n", ["model.lr: nan", "--model.lr 2e-4"]),
    ("model: {lr: 1" + 5_000 * "0" + "}\n", "bad.yaml"),
    ("trainer: {default_root_dir: 2026-13-45}\n", "bad.yaml"),
    ("model: {peft: " + 500 * "[" + 500 * "]" + "}\n", ""),
    ("model: {lora: {dropout: .nan}}\n", "model.lora.dropout"),
    ("model: {lora: {dropout: -0.5}}\n", "model.lora.dropout"),
    ("model: {lora: null, peft: {class_path: LoraConfig, init_args: {lora_dropout: -0.5}}}\n", "lora_dropout"),
    ("trainer: {max_time: 12:00:00:00}\n", "trainer.max_time"),
    ("trainer: {max_time: {months: 1}}\n", ["trainer.max_time", "{hours: 12}"]),
    ("trainer: {callbacks: [{class_path: lit_llm.training.run.checkpoint.StepCheckpoint, init_args: {keep_last: null}}]}\n",
     "keep_last: null is not allowed"),
    ("a: &a [x, x, x, x, x, x, x, x, x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a, *a]\n"
     "c: &c [*b, *b, *b, *b, *b, *b, *b, *b, *b, *b]\nd: &d [*c, *c, *c, *c, *c, *c, *c, *c, *c, *c]\n"
     "e: [*d, *d, *d, *d, *d, *d, *d, *d, *d, *d]\n", "more than 100,000 values"),
    ("a: &a [*a]\n", "nested more than 50 levels deep"),
    ("model: {base: '" + 300 * "a" + "/b'}\n", "File name too long"),
])
def test_a_file_with_a_value_that_nothing_takes(text, says, place):
    Path("bad.yaml").write_text(text)
    refused("fit", "--config", "ok.yaml", "--config", "bad.yaml", says=says)


@pytest.mark.parametrize(("words", "says"), [
    (["inspect", "--rows", "-1"], "rows"), (["plan", "--memory", "nan"], "memory"),
    (["selftest", "--processes", "0"], "processes"), (["verify-resume", "--steps", "1"], "steps"),
    (["plan", "--memory", "1" + 400 * "0"], "memory"), (["fit", "--model.lr", "1" + 400 * "0"], "model.lr"),
    (["fit", "--model.lr=" + "1" + 400 * "0"], "model.lr"), (["validate", "--verbose", "null"], "verbose"),
])
def test_a_typed_value_that_nothing_takes(words, says, place):
    refused(words[0], "--config", "ok.yaml", *words[1:], says=says)


@pytest.mark.parametrize(("words", "says"), [
    (["--temperature", "nan"], "temperature"), (["--temperature", "2.5"], "from 0 to 2"), (["--top_p", "0"], "top_p"),
    (["--top_k", "-1"], "top_k"), (["--max_tokens", "0"], "max_tokens"), (["--threads", "0"], "threads"),
    (["--top_p", "1" + 400 * "0"], "top_p"), (["--temperature", "null"], "temperature"), (["--model", "a" * 400], "long"),
])
def test_an_option_of_chat(words, says, place):
    refused("chat", "--model", "nowhere", *words, says=says)


def test_classes_in_python_refuse_the_same():
    for make in (lambda: CausalLMModule(base="x", lr=1e12), lambda: CausalLMModule(base="x", eps=float("inf")),
                 lambda: CausalLMModule(base="x", weight_decay=1e308), lambda: CausalLMModule(base="x", betas=(0.9, 1.0)),
                 lambda: CausalLMModule(base="x", lora=LoRA(dropout=float("nan"))),
                 lambda: CausalLMModule(base="x", lora=LoRA(r=0)),
                 lambda: CausalLMModule(base="x", lr=10.0, weight_decay=0.2),
                 lambda: TextDataModule([Source("a.txt")], seq_len=1)._check(),
                 lambda: TextDataModule([Source("a.txt", weight=1e12)])._check(),
                 lambda: Trainer(log_every_n_steps=-1), lambda: Trainer(max_time="soon"),
                 lambda: Trainer(max_steps=10**12), lambda: Trainer(threads=0), lambda: Progress(float("nan")),
                 lambda: peft_method.spec_of({"class_path": "LoraConfig", "init_args": {"r": -1}}, None)):
        with pytest.raises(InputError) as caught:
            make()
        assert caught.value.where
    Trainer(max_time=timedelta(hours=1), accelerator="cpu", devices=1)
    Trainer(max_time="00:01:00:00", accelerator="cpu", devices=1)


def test_every_number_in_a_signature_has_a_range():
    """A new numeric key of this project needs an entry in the table."""
    for prefix, kind in (("model", CausalLMModule), ("data", TextDataModule), ("trainer", Trainer),
                         ("model.lora", LoRA), ("data.sources", Source), ("StepCheckpoint", StepCheckpoint),
                         ("Progress", Progress)):
        for name, (hint, _) in settings.arguments(kind).items():
            numeric = {int, float} & set(settings.flat(hint))
            if numeric and name not in ("template_args",):
                assert ranges.of(f"{prefix}.{name}"), f"{prefix}.{name}"
    for key, numbers in ranges.RANGES.items():
        example = yaml.safe_load(numbers.example.replace("e-", ".0e-"))
        ranges.check(key, example)


@pytest.mark.parametrize(("words", "says"), [
    (["fit", "--help", "all"], ["A number above 0, at most 10. Never null.", "A whole number from 1 to 1,024, or null."]),
    (["fit", "--model.lora.help"], ["A number from 0 to below 1. Never null.", "A whole number from 1 to 65,536."]),
    (["fit", "--trainer.callbacks.help", "lit_llm.training.run.checkpoint.StepCheckpoint"],
     ["A whole number from 1 to 1,000,000. Never null.", "A whole number from 1 to 1,000,000,000, or null."]),
    (["fit", "--trainer.strategy.help", "lit_llm.training.parallel.zero.ZeroStrategy"], "A whole number from 1 to 3."),
    (["inspect", "--help"], "Number of packed training sequences to show. A whole number from 0 to 10,000."),
    (["chat", "--help"], "A number from 0 to 2. Never null."),
])
def test_the_help_page_says_it(words, says):
    code, out, _ = call(*words)
    assert code == 0
    shown = " ".join(out.split())
    for expected in [says] if isinstance(says, str) else says:
        assert expected in shown
