"""Kill a real run repeatedly, resume it, and compare its end bit by bit with that of an uninterrupted run.

    python tests/training/survive.py --kills 30                                   at random moments, one process
    python tests/training/survive.py --kills 30 --ranks 2 --strategy ddp
    python tests/training/survive.py --points                                     at each named point of saving
    python tests/training/survive.py --every-step --ranks 2 --strategy deepspeed_stage_2 --full
    python tests/training/survive.py --every-step --strategy auto --float16         with a loss scale that overflows

A model of 43,000 parameters, 2 epochs of 5 steps, a checkpoint every 2. It needs the tests' tiny model: `--base FOLDER`.
"""

import argparse
import random
import shutil
import signal
import tempfile
from pathlib import Path

from run_processes import (
    ForkServer,
    RunProcesses,
    assert_same_end,
    config_of,
    float16,
    metrics_rows,
    write_config,
    write_data,
)

STEPS, EVERY = 10, 2
POINTS = [("state", 1), ("weights", 1), ("manifest", 1), ("rename", 1), ("pointer", 1), ("prune", 1), ("save", 2),
          ("row", 2), ("data", 6), ("step", 4), ("backward", 2), ("validation", 3), ("set aside", 1), ("export", 1)]


def newest(run):
    steps = [int(path.name[5:]) for path in Path(run, "checkpoints").glob("step_*")
             if path.name[5:].isdigit() and (path / "manifest.json").is_file()]
    return max(steps, default=0)


def finish(run_processes, words, ranks):
    done = run_processes.run(*words, "killed", "--ckpt_path", "auto", ranks=ranks, limit=200)
    assert done["codes"] == [0] * ranks, done["outputs"][0]["err"][-2000:]


def strike(run_processes, words, ranks, blow):
    """One life and its end: (whether it was killed, steps on disk before, after)."""
    before = newest(run_processes.folder / "killed")
    blow = {"signals": [signal.SIGKILL], "ranks": list(range(ranks))} | blow
    life = run_processes.run(*words, "killed", "--ckpt_path", "auto", ranks=ranks, limit=200, strike=blow)
    killed = -signal.SIGKILL in life["codes"]
    assert killed or life["codes"] == [0] * ranks, life["outputs"][0]["err"][-2000:]
    after = newest(run_processes.folder / "killed")
    assert after >= before, "a kill lost what was on disk"
    return killed, before, after


def at_points(run_processes, words, ranks=1, points=POINTS):
    """One run killed at point after point; the points it came to."""
    reached = [point for point, turn in points if strike(run_processes, words, ranks, {"point": point, "turn": turn})[0]]
    finish(run_processes, words, ranks)
    return reached


def at_random(run_processes, words, ranks, kills, seed, longest):
    """Runs killed at random moments until there were so many kills; (kills, runs)."""
    draw, count, runs = random.Random(seed), 0, 0
    while count < kills:
        shutil.rmtree(run_processes.folder / "killed", ignore_errors=True)
        for _ in range(min(8, kills - count)):
            killed, before, after = strike(run_processes, words, ranks, {"after": draw.uniform(0.1, longest)})
            count += killed
            print(f"kill {count}: {before} -> {after}" if killed else "it came to its end", flush=True)
            if not killed:
                break
        finish(run_processes, words, ranks)
        runs += 1
        assert_same_end(run_processes.folder / "killed", run_processes.folder / "straight", STEPS)
    return count, runs


def signalled(run_processes, words, ranks, count, seed, longest):
    """Signals to any ranks at random moments, one or two of them: one end for all, and the way on is the same run."""
    draw, done, ends = random.Random(seed), 0, {}
    while done < count:
        shutil.rmtree(run_processes.folder / "killed", ignore_errors=True)
        for _ in range(min(6, count - done)):
            before = newest(run_processes.folder / "killed")
            struck = draw.sample(range(ranks), draw.randint(1, ranks))
            signals = draw.choices([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], k=draw.choice([1, 1, 2]))
            if signals.count(signal.SIGINT) == 2:                   # which means: at once
                signals.pop()
            blow = {"ranks": struck, "signals": [int(number) for number in signals]}
            if draw.random() < 0.5:
                blow["point"], blow["turn"] = draw.choice(
                    [("setup", 1), ("step", 1), ("step", 3), ("backward", 2), ("data", 3), ("validation", 1), ("validation", 4),
                     ("save", 1), ("state", 1), ("save", 2), ("row", 2)])
            else:
                blow["after"] = draw.uniform(0.1, longest)
            life = run_processes.run(*words, "killed", "--ckpt_path", "auto", ranks=ranks, strike=blow, one=True, agent=True, limit=150)
            after, stderr = newest(run_processes.folder / "killed"), life["outputs"][0]["err"]
            agreed = 130 if set(signals) == {signal.SIGINT} else 143
            if set(life["codes"]) == {0}:
                end = "it came to its end"
            elif "stopped after step" in stderr:
                end = f"a stop after step {after}"
                assert f"stopped after step {after}," in stderr, stderr
                assert "resume with" in stderr
                assert set(life["codes"]) <= {agreed, 143, 130}, (life["codes"], stderr)
                assert len(set(life["codes"])) == 1
            else:
                end = "a stop before the first step"
                assert set(life["codes"]) <= {143, 130, -signal.SIGTERM, -signal.SIGUSR1} | ({0} if before == STEPS else set()), (blow, life["codes"], [one["err"][-1500:] for one in life["outputs"]])
                assert before == after
            done += 1
            ends[end.rstrip("0123456789 ")] = ends.get(end.rstrip("0123456789 "), 0) + 1
            print(f"{done}: {blow} -> {life['codes']}, {end}, {life['seconds']:.1f} s", flush=True)
            if set(life["codes"]) == {0}:
                break
        finish(run_processes, words, ranks)
        assert_same_end(run_processes.folder / "killed", run_processes.folder / "straight", STEPS, ("val_loop", "unfinished", "RunFolder"))
    return ends


def every_step(run_processes, words, ranks, steps=STEPS):
    """Resume from each step's checkpoint in a folder of its own."""
    for step in range(1, steps):
        shutil.rmtree(run_processes.folder / "resumed", ignore_errors=True)
        (run_processes.folder / "resumed" / "checkpoints").mkdir(parents=True)
        shutil.copytree(run_processes.folder / "straight" / "checkpoints" / f"step_{step}",
                        run_processes.folder / "resumed" / "checkpoints" / f"step_{step}")
        for name in ("metrics.csv", "config.yaml"):
            shutil.copy(run_processes.folder / "straight" / name, run_processes.folder / "resumed")
        done = run_processes.run(*words, "resumed", "--ckpt_path", "last", ranks=ranks, limit=200)
        assert done["codes"] == [0] * ranks, done["outputs"][0]["err"][-2000:]
        assert_same_end(run_processes.folder / "resumed", run_processes.folder / "straight", steps)
        print(f"from step {step}: the same", flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", required=True)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--points", action="store_true")
    parser.add_argument("--signals", type=int, default=0)
    parser.add_argument("--every-step", action="store_true")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--float16", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    fork_server = ForkServer()
    run_processes = RunProcesses(folder, fork_server)
    how = float16(args.strategy) if args.float16 else {"strategy": args.strategy}
    config = config_of(args.base, write_data(folder), ranks=args.ranks, lora=not args.full, **how,
                       save_every=1 if args.every_step else EVERY, keep_last=99 if args.every_step else 1)
    words = write_config(folder, config)
    straight = run_processes.run(*words, "straight", ranks=args.ranks, limit=200)
    assert straight["codes"] == [0] * args.ranks, straight["outputs"][0]["err"][-3000:]
    print(f"{args.strategy}, {args.ranks} ranks: a life takes {straight['seconds']:.1f} s", flush=True)
    if args.float16:
        print(f"{metrics_rows(folder / 'straight')[-1]['train/skipped_steps']} of {STEPS} steps overflowed")
    if args.points:
        reached = at_points(run_processes, words, args.ranks)
        assert_same_end(folder / "killed", folder / "straight", STEPS)
        print(f"killed at {len(reached)} points, {', '.join(reached)}: the same end")
    if args.every_step:
        every_step(run_processes, words, args.ranks)
    if args.signals:
        print(signalled(run_processes, words, args.ranks, args.signals, args.seed, straight["seconds"]))
    if args.kills:
        kills, runs = at_random(run_processes, words, args.ranks, args.kills, args.seed, straight["seconds"])
        print(f"{kills} kills in {runs} runs: the same end each time")
    fork_server.close()
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
