"""If this breaks: a run or server on a shared machine is ten times slower than necessary, or a resumed run is no longer
bit-identical.

Oracles: work whose time is known for each number of threads, a second run with the number given, torch's own state.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_cli import call, place  # noqa: F401

from lit_llm.errors import InputError
from lit_llm.system import threads


@pytest.fixture(autouse=True)
def nobody_said(monkeypatch):
    """The suite itself sets OMP_NUM_THREADS."""
    monkeypatch.setattr(threads, "GIVEN", None)
    had = torch.get_num_threads()
    yield
    torch.set_num_threads(had)


@pytest.fixture
def work_of(monkeypatch):
    """Work that takes a given number of seconds by a simulated clock, independent of the machine."""
    clock = [0.0]
    monkeypatch.setattr(threads, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def made(took):
        def work():
            clock[0] += took(torch.get_num_threads())

        return work

    return made


@pytest.mark.parametrize(("took", "best"), [
    (lambda count: 0.002 * count, 1), (lambda count: 0.008 / count, 4), (lambda count: 0.002 / min(count, 2), 2),
    (lambda count: 0.004 - 0.00005 * count, 1)], ids=["busy", "free", "two", "hardly"])
def test_the_fastest_number_is_taken(took, best, work_of, monkeypatch):
    """More threads only where they are clearly worth it: the machine may be busier later."""
    monkeypatch.setattr(threads, "cores", lambda: 4)
    choice = threads.settle("auto", work_of(took))
    assert choice.seconds == pytest.approx({count: took(count) for count in (1, 2, 4)})
    assert sorted(choice.seconds) == [1, 2, 4]
    assert torch.get_num_threads() == choice.count == best


def test_who_says_how_many(work_of, monkeypatch):
    """What is typed, the environment, what a stopped run had, and then the cores of each process."""
    monkeypatch.setattr(threads, "cores", lambda: 4)
    slow = work_of(lambda count: 0.002 * count)
    assert threads.settle(3, slow, before=2).count == 3
    choice = threads.settle("auto", slow, before=2)
    assert (choice.count, torch.get_num_threads()) == (2, 2)
    assert "same bits" in choice.why
    assert "1 would be" in choice.why
    for processes in (1, 2, 3, 4, 8):
        assert processes * max(threads.settle("auto", slow, processes=processes).seconds or [1]) <= max(4, processes)
    torch.set_num_threads(2)
    monkeypatch.setattr(threads, "GIVEN", "OMP_NUM_THREADS=2")
    assert threads.settle("auto", slow).count == 2
    assert "OMP_NUM_THREADS=2" in threads.settle("auto", slow).why
    for wrong in ("two", "0", 0, -1, "1.5"):
        with pytest.raises(InputError, match="not a number of threads"):
            threads.number(wrong)


def test_measuring_changes_nothing():
    random, had = torch.get_rng_state(), torch.get_num_threads()
    seconds = threads.measure(threads.training_work(4096, 4096), 2)
    assert sorted(seconds) == [1, 2]
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.get_num_threads() == had


def weights(run):
    return load_file(next(Path(run, "checkpoints").glob("step_2/adapter/*.safetensors")))


def test_a_run_measures_keeps_its_number_and_ends_the_same(place, monkeypatch, caplog):  # noqa: F811
    """Measured or typed, the same weights to the last bit; a resumed run does not take another number."""
    monkeypatch.setattr(threads, "cores", lambda: 2)
    monkeypatch.setattr(threads, "fastest", min)
    words = ("fit", "--config", "ok.yaml", "--trainer.default_root_dir")
    code, _, err = call(*words, "measured")
    assert code == 0, err
    assert "1 of 2 cores, measured: 1 took" in caplog.text
    code, _, err = call(*words, "typed", "--trainer.threads", 1)
    assert code == 0, err
    assert "1 of 2 cores, as configured" in caplog.text
    one, other = weights("measured"), weights("typed")
    assert all(torch.equal(one[name], other[name]) for name in one | other)
    monkeypatch.setattr(threads, "fastest", max)
    code, _, err = call(*words, "measured", "--ckpt_path", "last", "--trainer.max_steps", 3)
    assert code == 0, err
    assert "1 of 2 cores, as before the stop" in caplog.text
    code, _, err = call("fit", "--config", "ok.yaml", "--trainer.threads", 0)
    assert code == 2
    assert "trainer.threads" in err


def test_answers_have_threads_too(monkeypatch, capsys):
    from lit_llm.inference.engine import Engine
    from serve.__main__ import main

    assert Engine.load("sample:base", threads=1).threads.count == 1
    monkeypatch.setattr(threads, "cores", lambda: 2)
    assert sorted(Engine.load("sample:base").threads.seconds) == [1, 2]
    with pytest.raises(SystemExit) as end:
        main(["--model", "sample:base", "--threads", "many"])
    assert end.value.code == 2
    assert "not a number of threads" in capsys.readouterr().err
