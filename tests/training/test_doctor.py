"""If this breaks: `verify-resume` or `selftest` report a fault of a correct run, or miss one.

The real verbs run their real child processes; then their output is changed by hand and compared again.
"""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from test_cli import call, place  # noqa: F401

from lit_llm.training.planning import doctor, trial


@pytest.fixture
def tape(tmp_path_factory, monkeypatch):
    """Keeps what each child leaves; `tape.replay(spoil)` gives it again, spoiled, without a child."""
    real, folder, trials = trial.fit, tmp_path_factory.mktemp("tape"), []

    def record(config, run, watch, *rest, **changes):
        real(config, run, watch, *rest, **changes)
        trials.append(folder / str(len(trials)))
        shutil.copytree(run.parent, trials[-1])

    def replay(spoil):
        calls = iter(trials)

        def again(config, run, watch, *rest, **changes):
            shutil.copytree(next(calls), run.parent, dirs_exist_ok=True)
            spoil(run, watch)

        monkeypatch.setattr(trial, "fit", again)

    monkeypatch.setattr(trial, "fit", record)
    record.replay = replay
    return record


def test_verify_resume(place, tape, capsys):  # noqa: F811
    """Every step is an epoch's last, so the checkpoint in the middle is one too."""
    assert call("fit", "--config", "ok.yaml", "--trainer.max_steps", 1, "--trainer.default_root_dir", "made",
                "--data.packing", "none", "--trainer.accumulate_grad_batches", 4)[0] == 0
    code, out, err = call("verify-resume", "--config", "made/config.yaml", "--steps", 2)
    assert code == 0, err
    assert (out.count("PASS"), out.count("FAIL")) == (4, 0)
    assert not Path("run").exists()

    def spoil(run, watch):
        if run.name == "resumed":
            file = next((run / "checkpoints" / "step_2").rglob("*.safetensors"))
            data = bytearray(file.read_bytes())
            data[-1] ^= 1                               # the last bit of a weight
            file.write_bytes(data)

    tape.replay(spoil)
    assert not doctor.verify_resume(yaml.safe_load(Path("ok.yaml").read_text()), steps=2)
    stdout = capsys.readouterr().out
    assert (stdout.count("PASS"), stdout.count("FAIL  weights")) == (3, 1)


def test_shards_of_fsdp2_are_looked_into(tmp_path):
    """Checkpoints of several ranks: a changed bit in the optimizer of any rank is reported with its name."""
    from torch.distributed.checkpoint import save

    for name, bit in (("one", 0.0), ("other", 2.0**-24)):
        state = {"model": {"w": torch.ones(5)}, "optimizer": {"state": {"w": {"exp_avg": torch.tensor([0.25, 0.5 + bit])}}}}
        save(state, checkpoint_id=tmp_path / name / "state", no_dist=True)
        torch.save({"loops": 3}, tmp_path / name / "state" / "rest.pt")
    one, other = (doctor._content(tmp_path / name) for name in ("one", "other"))
    assert [len(part) for part in one.values()] == [1, 2, 1]
    apart = [line for part in one for line in doctor._differences(one[part], other[part])]
    assert len(apart) == 1
    assert apart[0].endswith("/w/exp_avg")


def test_selftest(place, tape, capsys):  # noqa: F811
    assert call("fit", "--config", "ok.yaml", "--trainer.max_steps", 1, "--trainer.default_root_dir", "made")[0] == 0
    code, out, err = call("selftest", "--config", "made/config.yaml")      # of a run
    assert code == 0, err
    assert (out.count("PASS"), out.count("FAIL")) == (2, 0)
    assert not Path("run").exists()

    def spoil(run, watch):
        if watch.args["apart"]:
            gradient = torch.load(watch.file)
            torch.save({name: part * 1.0001 for name, part in gradient.items()}, watch.file)

    tape.replay(spoil)

    class Data:
        batch_size, packing = 2, "best_fit"

    assert not doctor.selftest(yaml.safe_load(Path("ok.yaml").read_text()), Data(), devices=1, processes=1)
    stdout = capsys.readouterr().out
    assert (stdout.count("PASS"), stdout.count("FAIL")) == (1, 1)
