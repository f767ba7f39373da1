"""If this breaks: help takes seconds, hides a key, or prints hundreds of lines.

Oracle: the parser itself, which is made from the signatures and docstrings.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lit_llm import InputError
from lit_llm.cli import configs, pages
from lit_llm.cli.main import RUNS, main

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _narrow(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def shown(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("verb", RUNS)
def test_the_short_page_fits_on_a_screen(verb, capsys):
    text = shown(capsys, verb, "--config", "nowhere.yaml", "--help")
    assert len(text.splitlines()) <= 60
    assert max(map(len, text.splitlines())) <= 80
    own = {option for option in pages.table()["verbs"][verb] if option not in pages.table()["hidden"]}
    assert set(re.findall(r"^  --([\w.]+)", text, re.MULTILINE)) == {
        "config", *own, *(f"{part}.{name}" for part, names in pages.COMMON.items() for name in names)}
    assert "configs/sft.yaml" in text
    assert RUNS[verb] in " ".join(text.split())


def test_fit_shows_25_keys(capsys):
    assert len(re.findall(r"^  --(?!config)", shown(capsys, "fit", "-h"), re.MULTILINE)) == 25


@pytest.mark.parametrize("verb", RUNS)
def test_every_key_of_a_verb_is_on_its_whole_page(verb, capsys):
    """With its type, default and description; except keys of Lightning that have no effect here."""
    keys = pages.table()["keys"] | pages.table()["verbs"][verb] | pages.table()["nested"]
    text = shown(capsys, verb, "--help", "all")
    entries = re.findall(r"^  --([\w.]+)  (.*)\n((?:      .*\n)+)", text, re.MULTILINE)
    hidden = set(pages.table()["hidden"])
    assert {key for key, _, _ in entries} == set(keys) - hidden
    for key, kind, description in entries:
        entry = " ".join(f"{kind} {description}".split())
        assert keys[key]["help"] in entry
        assert "(required)" in entry if keys[key]["required"] else "(default: " in entry
    assert "trainer.overfit_batches" not in text


def test_keys_that_are_left_out_are_refused(tmp_path):
    """Each of them with another value than its default."""
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    from lit_llm import Trainer

    others = {"model_registry": "x", "limit_predict_batches": 1, "overfit_batches": 1, "sync_batchnorm": True,
              "reload_dataloaders_every_n_epochs": 1, "gradient_clip_algorithm": "value", "barebones": True,
              "use_distributed_sampler": False, "enable_autolog_hparams": False}
    assert {"weights_only", *(f"trainer.{key}" for key in others)} == set(pages.table()["hidden"])
    options = {"accelerator": "cpu", "devices": 1, "default_root_dir": str(tmp_path)}
    Trainer(**options)
    for key, value in others.items():
        with pytest.raises((InputError, MisconfigurationException, ValueError)):
            Trainer(**options, **{key: value})


@pytest.mark.parametrize(("words", "says"), [
    (["--help", "model.lora"], ["--model.lora LoRA | null (default: null)", "--model.lora.r whole number (default: 16)"]),
    (["--help=model.lora.r"], ["--model.lora.r whole number", "A whole number from 1 to 65,536."]),
    (["--data.sources.help"], ["--data.sources.path text (required)", "--data.sources.weight number"]),
    (["--help", "trainer"], ["--trainer.overfit_batches", "--trainer.max_steps"]),
    (["--help", "StepCheckpoint"], ["lit_llm.StepCheckpoint", "every_n_steps whole number | null"]),
    (["--trainer.callbacks.help", "lightning.pytorch.callbacks.EarlyStopping"], ["monitor text (required)"])])
def test_the_page_of_a_key_or_class(words, says, capsys):
    text = " ".join(shown(capsys, "fit", *words).split())
    for expected in says:
        assert expected in text


def test_a_subject_that_is_none():
    with pytest.raises(InputError, match=r"no key or class 'model\.lorra'\. Did you mean 'model\.lora'\?"):
        pages.page("fit", "model.lorra", "", [])


@pytest.mark.parametrize("words", [["fit", "--help"], ["plan", "--help", "all"], ["fit", "--help", "model.peft"],
                                   ["fit", "--trainer.strategy.help", "lit_llm.ZeroStrategy"], ["fit"]], ids=" ".join)
def test_pages_come_without_torch(words, tmp_path):
    code = ("import sys\nfrom lit_llm.cli.main import main\ntry:\n    main(sys.argv[1:])\n"
            "finally:\n    print('torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True, timeout=60,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.stdout.splitlines()[-1] == "False", done.stderr


def test_a_bare_verb_names_the_configs_and_what_to_type(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["validate"])
    assert stop.value.code == 2
    stderr = capsys.readouterr().err
    files = [*ROOT.glob("configs/*.yaml"), *ROOT.glob("configs/with/*.yaml")]
    assert len(files) >= 10
    for file in files:
        assert f" {file.relative_to(ROOT).as_posix()} " in stderr
    assert "python -m lit_llm validate --config configs/sft.yaml" in stderr


def test_a_reader_that_has_enough_is_no_error():
    done = subprocess.run(f"{sys.executable} -m lit_llm fit --help all | head -n 1", shell=True, capture_output=True,
                          text=True, cwd=ROOT, timeout=60)
    assert (done.stdout, done.stderr) == ("usage: python -m lit_llm fit --config FILE [--KEY VALUE ...]\n", "")


# ---- configs found by name -------------------------------------------------------------------------------------------

def test_configs_that_ship_are_found_by_name(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["--config", "configs/sft.yaml", "--config=with/cpu.yaml", "-c", "sft.yaml", "--model.lr", "1"]
    sft, cpu = ROOT / "configs/sft.yaml", ROOT / "configs/with/cpu.yaml"
    assert configs.with_shipped(words) == ["--config", str(sft), f"--config={cpu}", "-c", str(sft), "--model.lr", "1"]
    assert f"--config with/cpu.yaml: {cpu}, which ships with the package" in capsys.readouterr().err


def test_a_file_of_the_user_s_wins_over_one_that_ships(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    Path("sft.yaml").write_text("{}")
    for words in (["--config", "sft.yaml"], ["--config", "other.yaml"], ["--config", "../../pyproject.toml"],
                  ["--config", "configs/../pyproject.toml"]):
        assert configs.with_shipped(words) == words
    assert capsys.readouterr().err == ""
