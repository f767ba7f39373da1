"""If this breaks: a shipped config does not parse, or an overlay does not fit a run."""

from pathlib import Path

import pytest
import yaml

from lit_llm.cli.runs import LitLLMCLI, RunParser, TextDataModule, Trainer
from lit_llm.errors import InputError
from lit_llm.training.module import CausalLMModule

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
RUNS = sorted(CONFIGS.glob("*.yaml"))
OVERLAYS = sorted((CONFIGS / "with").glob("*.yaml"))


class Parsed(LitLLMCLI):
    """The command line up to the point where it would start to train."""

    def _run_subcommand(self, subcommand):
        pass


def parse(*words: object, tmp_path: Path) -> Parsed:
    args = ["fit", *map(str, words), "--trainer.default_root_dir", str(tmp_path / "run")]
    return Parsed(
        CausalLMModule,
        TextDataModule,
        trainer_class=Trainer,
        parser_class=RunParser,
        save_config_callback=None,
        seed_everything_default=42,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        parser_kwargs={"allow_abbrev": False},
        args=args,
    )


@pytest.mark.parametrize("overlay", [None, *OVERLAYS], ids=lambda path: path.stem if path else "alone")
@pytest.mark.parametrize("run", RUNS, ids=lambda path: path.stem)
def test_every_run_takes_every_overlay(run, overlay, tmp_path):
    """`fit --config RUN --config with/OVERLAY` builds module, data and trainer without touching weights or network."""
    words = ["--config", run] + (["--config", overlay] if overlay else [])
    if overlay and overlay.stem in ("lora", "qlora") and "init" in yaml.safe_load(run.read_text())["model"]:
        pytest.skip("adapters on random weights are refused")
    if overlay and overlay.stem == "tensorboard":
        pytest.importorskip("tensorboard")
    if overlay and overlay.stem == "swanlab":
        pytest.skip("its class is another package's, which --allow opens: test_loggers.py")
    cli = parse(*words, tmp_path=tmp_path)
    assert cli.model.model is None  # nothing was built
    if overlay:
        for key, value in _leaves(yaml.safe_load(overlay.read_text())):
            if "logger" not in key and "lora" not in key:
                parsed = cli.config["fit"]
                for part in key.split("."):
                    parsed = parsed[part]
                assert parsed == value


def _leaves(tree: dict, prefix: str = ""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@pytest.mark.parametrize("file", RUNS, ids=lambda path: path.stem)
def test_headers_say_how_to_run(file):
    """The first line of a run is its command, and names this file."""
    assert f"python -m lit_llm fit --config configs/{file.name}" in file.read_text().splitlines()[0]


@pytest.mark.parametrize("name", ["tutorial", "qwen3_lora"])
def test_without_the_hub_the_offline_ways_are_named(name, tmp_path, lit_llm):
    """One clear message, no traceback, no minute of retries, no files left behind."""
    (tmp_path / "my.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
    )
    done = lit_llm("fit", "--config", CONFIGS / f"{name}.yaml", "--trainer.accelerator", "cpu")
    assert done.code == 2
    assert "Traceback" not in done.err
    assert len(done.err.strip().splitlines()) <= 6
    for way in ("local folder", "HF_HOME", "HF_ENDPOINT"):
        assert way in done.err
    assert not (tmp_path / "runs").exists()


def test_base_and_init_exclude_each_other(tmp_path):
    """Two origins of weights are an error, not a silent choice."""
    with pytest.raises(InputError, match="one of the two"):
        parse("--config", CONFIGS / "sft.yaml", "--model.init", "{model_type: llama}", tmp_path=tmp_path)
