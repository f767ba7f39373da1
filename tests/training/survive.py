"""Kills a real run again and again, lets it go on, and compares its end with that of a run never killed, bit by bit.

    python tests/training/survive.py --kills 30                                   at random moments, one process
    python tests/training/survive.py --kills 30 --ranks 2 --strategy ddp
    python tests/training/survive.py --points                                     at each named point of saving
    python tests/training/survive.py --every-step --ranks 2 --strategy deepspeed_stage_2 --full

A model of 43,000 parameters, 2 epochs of 5 steps, a checkpoint every 2. It needs the tests' tiny model: `--base FOLDER`.
"""

import argparse
import random
import shutil
import signal
import tempfile
from pathlib import Path

from lives import Lives, assert_same_end, config_of, write_config, write_data

STEPS, EVERY = 10, 2
POINTS = [("state", 1), ("weights", 1), ("manifest", 1), ("rename", 1), ("pointer", 1), ("prune", 1), ("save", 2),
          ("row", 2), ("data", 6), ("step", 4), ("backward", 2), ("validation", 3), ("set aside", 1), ("export", 1)]


def newest(run):
    steps = [int(path.name[5:]) for path in Path(run, "checkpoints").glob("step_*")
             if path.name[5:].isdigit() and (path / "manifest.json").is_file()]
    return max(steps, default=0)


def finish(lives, words, ranks):
    done = lives.live(*words, "killed", "--ckpt_path", "auto", ranks=ranks, limit=200)
    assert done["codes"] == [0] * ranks, done["said"][0]["err"][-2000:]


def strike(lives, words, ranks, blow):
    """One life and its end: (whether it was killed, steps on disk before, after)."""
    before = newest(lives.folder / "killed")
    blow = {"signals": [signal.SIGKILL], "ranks": list(range(ranks))} | blow
    life = lives.live(*words, "killed", "--ckpt_path", "auto", ranks=ranks, limit=200, strike=blow)
    killed = -signal.SIGKILL in life["codes"]
    assert killed or life["codes"] == [0] * ranks, life["said"][0]["err"][-2000:]
    after = newest(lives.folder / "killed")
    assert after >= before, "a kill lost what was on disk"
    return killed, before, after


def at_points(lives, words, ranks=1, points=POINTS):
    """One run killed at point after point; the points it came to."""
    reached = [point for point, turn in points if strike(lives, words, ranks, {"point": point, "turn": turn})[0]]
    finish(lives, words, ranks)
    return reached


def at_random(lives, words, ranks, kills, seed, longest):
    """Runs killed at random moments until there were so many kills; (kills, runs)."""
    draw, count, runs = random.Random(seed), 0, 0
    while count < kills:
        shutil.rmtree(lives.folder / "killed", ignore_errors=True)
        for _ in range(min(8, kills - count)):
            killed, before, after = strike(lives, words, ranks, {"after": draw.uniform(0.1, longest)})
            count += killed
            print(f"kill {count}: {before} -> {after}" if killed else "it came to its end", flush=True)
            if not killed:
                break
        finish(lives, words, ranks)
        runs += 1
        assert_same_end(lives.folder / "killed", lives.folder / "straight", STEPS)
    return count, runs


def every_step(lives, words, ranks, steps=STEPS):
    """Resume from each step's checkpoint in a folder of its own."""
    for step in range(1, steps):
        shutil.rmtree(lives.folder / "resumed", ignore_errors=True)
        (lives.folder / "resumed" / "checkpoints").mkdir(parents=True)
        shutil.copytree(lives.folder / "straight" / "checkpoints" / f"step_{step}",
                        lives.folder / "resumed" / "checkpoints" / f"step_{step}")
        for name in ("metrics.csv", "config.yaml"):
            shutil.copy(lives.folder / "straight" / name, lives.folder / "resumed")
        done = lives.live(*words, "resumed", "--ckpt_path", "last", ranks=ranks, limit=200)
        assert done["codes"] == [0] * ranks, done["said"][0]["err"][-2000:]
        assert_same_end(lives.folder / "resumed", lives.folder / "straight", steps)
        print(f"from step {step}: the same", flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", required=True)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--points", action="store_true")
    parser.add_argument("--every-step", action="store_true")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    lives = Lives(folder)
    config = config_of(given.base, write_data(folder), ranks=given.ranks, strategy=given.strategy, lora=not given.full,
                       save_every=1 if given.every_step else EVERY, keep_last=99 if given.every_step else 1)
    words = write_config(folder, config)
    straight = lives.live(*words, "straight", ranks=given.ranks, limit=200)
    assert straight["codes"] == [0] * given.ranks, straight["said"][0]["err"][-3000:]
    print(f"{given.strategy}, {given.ranks} ranks: a life takes {straight['seconds']:.1f} s", flush=True)
    if given.points:
        reached = at_points(lives, words, given.ranks)
        assert_same_end(folder / "killed", folder / "straight", STEPS)
        print(f"killed at {len(reached)} points, {', '.join(reached)}: the same end")
    if given.every_step:
        every_step(lives, words, given.ranks)
    if given.kills:
        kills, runs = at_random(lives, words, given.ranks, given.kills, given.seed, straight["seconds"])
        print(f"{kills} kills in {runs} runs: the same end each time")
    lives.close()
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
