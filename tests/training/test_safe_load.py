"""If this breaks: resuming from an untrusted checkpoint runs its author's code, whatever strategy wrote it; or a user's own
checkpoint is refused.

The payload is put into every file of a real checkpoint, and the hashes in the manifest are updated to match.
"""

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from lit_llm.training.parallel import safe_load
from tests.test_cli import call, place

assert place                                        # a fixture
STRATEGIES = ["auto", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3", "fsdp2"]


class Payload:
    """What pickle calls a function for."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return (os.system, (f"touch {self.trace}",))


def poison(file, trace):
    """The same file with a call of `os.system` in addition to its content."""
    if file.name == ".metadata":
        index = pickle.loads(file.read_bytes())
        index.planner_data = Payload(trace)
        file.write_bytes(pickle.dumps(index))
    else:
        state = torch.load(file, weights_only=False)
        torch.save(state | {"more": Payload(trace)}, file)


def seal(folder):
    """Update the manifest to the current files."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest["files"]:
        content = (folder / name).read_bytes()
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_file_of_a_checkpoint_runs_code(strategy, place):
    trace = place / "TRACE"
    run = ["fit", "--config", "ok.yaml", "--trainer.strategy", strategy, "--trainer.num_sanity_val_steps", "0"]
    code, _, err = call(*run, "--trainer.max_steps", "1")
    assert code == 0, err
    shutil.copytree("run", "whole")
    (state,) = Path("run/checkpoints").glob("step_*/state")
    files = [state] if state.is_file() else [*state.rglob("*.pt"), *state.rglob(".metadata")]
    assert files
    for file in files:
        shutil.rmtree("run")
        shutil.copytree("whole", "run")
        poison(file, trace)
        seal(file.parents[len(file.relative_to(state).parts)] if state.is_dir() else state.parent)
        code, _, err = call(*run, "--trainer.max_steps", "2", "--ckpt_path", "last")
        assert code == 2, err
        assert "posix.system" in err
        assert file.name in err
        assert "Traceback" not in err
        assert not trace.exists()
    shutil.rmtree("run")
    shutil.copytree("whole", "run")
    code, _, err = call(*run, "--trainer.max_steps", "2", "--ckpt_path", "last")
    assert code == 0, err
    assert Path("run/checkpoints/step_2").is_dir()


def test_the_reader_itself_refuses_what_the_check_would_have_passed(tmp_path):
    """DeepSpeed calls with `weights_only=False`, which the context overrides."""
    file, trace = tmp_path / "x_optim_states.pt", tmp_path / "TRACE"
    torch.save({"more": Payload(trace)}, file)
    with safe_load.data_only(), pytest.raises(pickle.UnpicklingError, match=r"posix\.system"):
        torch.load(file, weights_only=False)
    assert not trace.exists()


def test_an_index_names_no_file_outside(tmp_path):
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

    from lit_llm.errors import InputError

    for name in ("../__0_0.distcp", "/etc/passwd"):
        index = Metadata(state_dict_metadata={}, storage_data={MetadataIndex("w"): _StorageInfo(name, 0, 1)})
        (tmp_path / ".metadata").write_bytes(pickle.dumps(index))
        with pytest.raises(InputError, match="outside of the checkpoint"):
            safe_load.check(tmp_path)


def test_a_checkpoint_is_trusted_only_by_what_is_typed(place):
    trace = place / "TRACE"
    run = ["fit", "--config", "ok.yaml", "--trainer.num_sanity_val_steps", "0"]
    code, _, err = call(*run, "--trainer.max_steps", "1")
    assert code == 0, err
    poison(Path("run/checkpoints/step_1/state"), trace)
    seal(Path("run/checkpoints/step_1"))
    Path("trust.yaml").write_text("trust_checkpoint: true\n")
    more = ["--trainer.max_steps", "2", "--ckpt_path", "last"]
    code, _, err = call(*run, *more, "--config", "trust.yaml")
    assert code == 2, err
    assert "trust_checkpoint" in err
    code, _, err = call(*run, *more, "--trust-checkpoint")
    assert "can run any program" in err
    assert trace.exists(), err
