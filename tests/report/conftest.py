"""Fixtures of the tests in this folder."""

import csv
import json

import pytest


@pytest.fixture
def make_run(tmp_path):
    """Writes the folder of a run without training: figures, sources, answers and what the run recorded of itself."""
    def make(name="run", rows=(), record=None, config=None, data=None, samples=(), answers=(), before=None):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        columns = list(dict.fromkeys(["step", "epoch", "seconds", *(key for row in rows for key in row)]))
        with open(folder / "metrics.csv", "w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, columns, restval="")
            writer.writeheader()
            writer.writerows(rows)
        (folder / "config.yaml").write_text(json.dumps(config or {"model": {"lr": 0.5}}), encoding="utf-8")
        (folder / "metrics.json").write_text(json.dumps({f"before/{key}": value for key, value in (before or {}).items()}))
        for file, content in (("run.json", record), ("data.json", data)):
            if content is not None:
                (folder / file).write_text(json.dumps(content), encoding="utf-8")
        for file, lines in (("samples.jsonl", samples), ("answers.jsonl", answers)):
            (folder / file).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        return folder

    return make
