"""Read the files of a run folder as the values of `report.json`, which the page and the comparison show as well.

Files may be missing or half written, because a run may be running or have been killed; what is unknown is null.
"""

import json
import math
import os
import socket
from pathlib import Path
from typing import Any

import yaml

from lit_llm.errors import InputError
from lit_llm.report import commands, settings, verdict
from lit_llm.report.rows import FIRST, whole_rows
from lit_llm.system import integrity, lock
from lit_llm.system.redaction import redact

VERSION = 1                                         # of report.json; increase it when a key changes its meaning
RUN, SAMPLES, ANSWERS, BREAKDOWNS = "run.json", "samples.jsonl", "answers.jsonl", "breakdown.jsonl"
STATES = ("running", "finished", "stopped", "failed")       # in run.json; `killed` and `unknown` are concluded
POINTS = 400                                        # points of a curve; more cannot be seen
CURVES, LINES, LONGEST = 48, 50, 2000               # curves, lines of a file, characters of a text
SAMPLED_PROMPTS, SAMPLED_STEPS, SAMPLE = 5, 8, 300  # shown of the samples: prompts, steps, characters of a text
COUNTS = ("read", "kept", "sequences", "tokens", "supervised", "quarantined", "stopless", "cleaned", "double_bos")


def of(run: Path) -> dict[str, Any]:
    """All values of `report.json`, without secrets.

    Args:
        run: The run folder.

    Returns:
        `version`; `run`: name, folder, state, reason, steps and times; `curves`; `checkpoints`; `metrics` before
        training, of the best and of the last checkpoint; `breakdown` of the newest validation; `forgetting`;
        `evaluations`; `data`; `samples`: answers at validations, by prompt; `answers` at the end; `config`: keys that
        differ from their defaults; `cost`; `versions`; `hardware`; `commands`; `warnings`.

    Raises:
        InputError: It is not a run folder.
    """
    if not run.is_dir() or not any((run / name).exists() for name in ("config.yaml", "metrics.csv", "checkpoints")):
        raise InputError(f"{run} is not the folder of a run: it has neither config.yaml nor metrics.csv",
                         where="report", fix="give the folder that trainer.default_root_dir named, such as runs/sft")
    run = run.absolute()
    recorded, measured, data = (mapping(run / name) for name in (RUN, "metrics.json", "data.json"))
    curves, last_step = curves_of(run / "metrics.csv")
    breakdowns = lines_of(run / BREAKDOWNS, last=None)
    saved = checkpoints_of(run)
    best = next((entry for entry in saved if entry["best"]), None)
    before = {name.removeprefix("before/"): value for name, value in measured.items() if name.startswith("before/")}
    state = state_of(run, recorded)
    config = config_of(run)
    facts = {
        "version": VERSION,
        "run": {"name": run.name, "folder": str(run), "state": state, "reason": recorded.get("reason"),
                "step": last_step, "planned_steps": recorded.get("planned_steps"),
                "saved_step": saved[-1]["step"] if saved else None,
                **{key: recorded.get(key) for key in ("started", "updated", "base", "method", "parameters")}},
        "curves": curves + bands_of(breakdowns, {curve["name"] for curve in curves}),
        "checkpoints": saved,
        "metrics": {"before": before, "best": best["figures"] if best else {},
                    "last": saved[-1]["figures"] if saved else {}},
        "breakdown": breakdowns[-1] if breakdowns else {},
        "forgetting": forgetting_of(curves, (data.get("guard") or {})),
        "evaluations": lines_of(run / "evaluations.jsonl"),
        "data": data_of(data),
        "samples": samples_of(run / SAMPLES),
        "answers": lines_of(run / ANSWERS, last=SAMPLED_PROMPTS),
        "config": settings.differences(config),
        "cost": cost_of(recorded),
        "versions": recorded.get("versions") or {},
        "hardware": recorded.get("hardware") or {},
        "commands": commands.of(run, state, config, allowed=recorded.get("allow") or []),
        "warnings": verdict.warnings(verdict.course_of(run, before.get("val/nll")),
                                     finished=state in ("finished", "unknown")) if curves else [],
    }
    clean: dict[str, Any] = redact(_bounded(facts))
    return clean


def state_of(run: Path, recorded: dict[str, Any]) -> str:
    """Whether a run is running, finished, stopped, failed or killed; `unknown` without a record.

    A run that records itself as running and does not hold its lock was killed.
    """
    state = str(recorded.get("state"))
    if state not in STATES:
        return "unknown"
    own = recorded.get("pid") == os.getpid() and recorded.get("host") == socket.gethostname()
    if state == "running" and not own and not lock.is_held(run / lock.NAME):
        return "killed"
    return state


# ---- curves ----------------------------------------------------------------------------------------------------------

def curves_of(file: Path) -> tuple[list[dict[str, Any]], int | None]:
    """The curves of a `metrics.csv`, and its last step.

    Returns:
        For each metric: `name`, `steps`, `values` (at most about `POINTS`, with the extremes of each part of the
        curve), `count` of its finite values, and `not_finite`.
    """
    points: dict[str, list[tuple[int, float]]] = {}
    lost: dict[str, int] = {}
    step = None
    for row in whole_rows(file):
        if row is None:
            continue
        step = int(row["step"])
        for name, text in row.items():
            if name in FIRST or not text:
                continue
            if math.isfinite(value := float(text)):
                points.setdefault(name, []).append((step, value))
            else:
                points.setdefault(name, [])
                lost[name] = lost.get(name, 0) + 1
    curves = []
    for name, every in list(points.items())[:CURVES]:
        chosen = thinned(every)
        curves.append({"name": name, "steps": [step for step, _ in chosen], "values": [value for _, value in chosen],
                       "count": len(every), "not_finite": lost.get(name, 0)})
    return curves, step


def bands_of(breakdowns: list[dict[str, Any]], names: set[str]) -> list[dict[str, Any]]:
    """The ends of the intervals of each source's nll as curves, `val/nll/SOURCE_low` and `_high`.

    Args:
        breakdowns: The lines of `breakdown.jsonl`.
        names: Names of the curves; intervals of others are left out.
    """
    points: dict[str, list[tuple[int, float]]] = {}
    for line in breakdowns:
        for source, figures in mapping_of(line.get("sources")).items():
            name = f"{line.get('split')}/nll/{source}"
            for suffix in ("_low", "_high"):
                end = mapping_of(figures).get(f"nll{suffix}")
                if name in names and isinstance(line.get("step"), int) and isinstance(end, float):
                    points.setdefault(name + suffix, []).append((line["step"], end))
    return [{"name": name, "steps": [step for step, _ in every], "values": [value for _, value in every],
             "count": len(every), "not_finite": 0} for name, every in points.items()]


def forgetting_of(curves: list[dict[str, Any]], counts: dict[str, Any]) -> dict[str, Any] | None:
    """How the loss of the guard documents has changed; null for a run without any.

    Args:
        curves: The curves of the run.
        counts: Counts of the guard documents in `data.json`.

    Returns:
        `documents`, `tokens` (supervised), and `rows`: `step`, `nll`, `rise` over the value before training, `low` and
        `high` of its interval, and `worse`, the share of documents whose loss has increased.
    """
    points = {curve["name"].removeprefix("guard/"): dict(zip(curve["steps"], curve["values"], strict=True))
              for curve in curves if curve["name"].startswith("guard/")}
    if not points.get("nll"):
        return None
    rows = [{"step": step, "nll": nll, "rise": points.get("rise", {}).get(step),
             "low": points.get("rise_low", {}).get(step), "high": points.get("rise_high", {}).get(step),
             "worse": points.get("worse", {}).get(step)} for step, nll in points["nll"].items()]
    return {"documents": counts.get("sequences"), "tokens": counts.get("supervised"), "rows": rows}


def mapping_of(value: Any) -> dict[str, Any]:
    """The value if it is a mapping, and otherwise an empty one."""
    return value if isinstance(value, dict) else {}


def thinned(points: list[tuple[int, float]], most: int = POINTS) -> list[tuple[int, float]]:
    """At most `most` points: the first, the last, and the lowest and highest value of each part in between."""
    if len(points) <= most:
        return points
    parts = most // 2 - 1
    indices = {0, len(points) - 1}
    for part in range(parts):
        places = range(1 + part * (len(points) - 2) // parts, 1 + (part + 1) * (len(points) - 2) // parts)
        indices |= {min(places, key=lambda at: points[at][1]), max(places, key=lambda at: points[at][1])}
    return [points[place] for place in sorted(indices)]


# ---- checkpoints, data, cost -----------------------------------------------------------------------------------------

def checkpoints_of(run: Path) -> list[dict[str, Any]]:
    """The complete checkpoints in the order of their steps: `step`, `name`, `best`, `score`, `figures`."""
    best = _text(run / "checkpoints" / "BEST")
    checkpoints = []
    for folder in (run / "checkpoints").glob("step_*"):
        try:
            facts = integrity.read(folder)
        except (InputError, OSError):
            continue                                # it is being written, or was never completed
        checkpoints.append({"step": int(facts["step"]), "name": folder.name, "best": folder.name == best,
                            "score": facts.get("score"), "figures": dict(facts.get("figures") or {})})
    return sorted(checkpoints, key=lambda entry: int(entry["step"]))


def data_of(data: dict[str, Any]) -> dict[str, Any]:
    """What was read, dropped, cut and supervised, and what training has drawn of each source so far."""
    sources = []
    for report in data.get("sources") or []:
        dropped = [{"reason": reason, "count": count, "first": first, "fix": (report.get("fixes") or {}).get(reason)}
                   for reason, (count, first) in (report.get("dropped") or {}).items()]
        sources.append({"source": report.get("source"), **{name: report.get(name) for name in COUNTS},
                        "dropped": sorted(dropped, key=lambda entry: -entry["count"])[:LINES],
                        "notes": report.get("notes") or {}, "mended": report.get("mended") or {},
                        "speakers": report.get("speakers") or {}})
    drawn = [{"source": source, **counts} for source, counts in (data.get("ledger") or {}).items()]
    whole = sum(entry["tokens"] for entry in drawn)
    return {"sources": sources,
            "stages": {stage: data[stage] for stage in ("train", "val", "test", "guard")
                       if isinstance(data.get(stage), dict)},
            "drawn": [entry | {"share": entry["tokens"] / whole if whole else None} for entry in drawn]}


def cost_of(recorded: dict[str, Any]) -> dict[str, Any]:
    """Time in seconds, tokens and FLOPs of all processes, in all lives of the run; null where it is not known.

    `utilisation` is the FLOP/s of training divided by `peak_flops`, the rate in the data sheets of the devices.
    """
    names = ("seconds", "training_seconds", "report_seconds", "guard_seconds", "tokens", "flops_per_token",
             "peak_flops")
    cost = {name: recorded.get(name) for name in names}
    tokens, seconds, flops_per_token = cost["tokens"], cost["training_seconds"], cost["flops_per_token"]
    cost["tokens_per_second"] = tokens / seconds if tokens and seconds else None
    cost["flops"] = tokens * flops_per_token if tokens and flops_per_token else None
    peak = cost["peak_flops"]
    cost["utilisation"] = cost["flops"] / seconds / peak if cost["flops"] and seconds and peak else None
    return cost


# ---- files -----------------------------------------------------------------------------------------------------------

def mapping(file: Path) -> dict[str, Any]:
    """The mapping in a JSON file; empty if it is missing or unreadable."""
    try:
        values = json.loads(_text(file) or "{}")
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def samples_of(file: Path) -> list[dict[str, Any]]:
    """The answers to each prompt of a `samples.jsonl`, in the order of the steps.

    Returns:
        For each of up to `SAMPLED_PROMPTS` prompts `prompt`, `expected` and `answers`: `step`, `answer` and
        `finish_reason` at up to `SAMPLED_STEPS` steps at about equal distances, with the first and the last.
    """
    entries = [entry for entry in lines_of(file, last=None)
               if isinstance(entry.get("step"), int) and isinstance(entry.get("prompt"), str)]
    steps = sorted({entry["step"] for entry in entries})
    intervals = min(SAMPLED_STEPS, len(steps)) - 1
    shown = {steps[round(number * (len(steps) - 1) / max(1, intervals))] for number in range(intervals + 1)}
    by_prompt: dict[str, dict[str, Any]] = {}
    for entry in entries:
        if entry["step"] in shown:
            sample = by_prompt.setdefault(entry["prompt"], {
                **{name: entry.get(name) and str(entry[name])[:SAMPLE] for name in ("prompt", "expected")},
                "answers": []})
            sample["answers"].append({"step": entry["step"], "answer": str(entry.get("answer"))[:SAMPLE],
                                      "finish_reason": entry.get("finish_reason")})
    return list(by_prompt.values())[:SAMPLED_PROMPTS]


def lines_of(file: Path, last: int | None = LINES) -> list[dict[str, Any]]:
    """The last mappings of a file of JSON lines, or all; incomplete lines are left out."""
    mappings = []
    for line in _text(file).splitlines()[-last if last else None:]:
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(values, dict):
            mappings.append(values)
    return mappings


def config_of(run: Path) -> dict[str, Any]:
    """The config that a run wrote; empty if it is missing or damaged."""
    try:
        config = yaml.safe_load(_text(run / "config.yaml"))
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _bounded(value: Any) -> Any:
    """JSON values with long texts cut and numbers that are not finite as null."""
    if isinstance(value, dict):
        return {str(key)[:LONGEST]: _bounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_bounded(item) for item in value]
    if isinstance(value, str):
        return value if len(value) <= LONGEST else value[:LONGEST] + "..."
    return value if not isinstance(value, float) or math.isfinite(value) else None

