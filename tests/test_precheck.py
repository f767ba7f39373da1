"""If this breaks, a misspelt key is told only after seconds of imports, or a key that exists is refused.

Oracle: the parser itself, which is made from the signatures.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lit_llm import InputError
from lit_llm.cli import precheck

ROOT = Path(__file__).resolve().parents[1]


def test_the_keys_are_those_of_the_parser():
    from lit_llm.cli import runs

    assert precheck.known() == runs.keys(), 'run: python -c "from lit_llm.cli import runs; runs.write_keys()"'


def test_every_key_is_taken(monkeypatch):
    monkeypatch.chdir(ROOT)
    for key in precheck.known():
        for words in ([f"--{key}", "1"], [f"--{key}=null"]):
            if not key.startswith("config"):
                precheck.check(words)
    precheck.check(["--model.lora.r", "3", "--data.sources+", "[]", "--trainer.strategy.init_args.stage", "2",
                    "--model.init.hidden_size=3", "--print_config", "--trust-checkpoint"])
    for file in [*ROOT.glob("configs/*.yaml"), *ROOT.glob("configs/with/*.yaml")]:
        if file.name not in ("qwen3_lora.yaml", "own_questions.yaml"):      # which name a file of the user's
            precheck.check(["--config", str(file)])


@pytest.mark.parametrize(("words", "says"), [
    (["--model.lrr", "1"], "unknown key 'model.lrr'. Did you mean 'model.lr'?"),
    (["--learning_rate=1"], "Did you mean 'model.lr'?"),
    (["--config", "nope.yaml"], "there is no file"),
    (["--config", "bad.yaml"], "unknown key 'data.pakcing'. Did you mean 'data.packing'?"),
    (["--config", "good.yaml", "--data.val_sources", "[{path: there/no.jsonl}]"], "The path exists as far as"),
    (["--data.sources=[{path: god.yaml}]"], "no such file or folder. Did you mean 'good.yaml'?")])
def test_what_is_wrong_is_said_without_torch(words, says, tmp_path):
    (tmp_path / "good.yaml").write_text("model: {base: sample:base}\ndata: {sources: [{path: sample:conversations.jsonl}]}\n")
    (tmp_path / "bad.yaml").write_text("data: {pakcing: none}\n")
    code = ("import sys\nfrom lit_llm.cli.main import main\ntry:\n    main(['fit', *sys.argv[1:]])\n"
            "finally:\n    print('torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True, timeout=60,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stdout.strip()) == (2, "False"), done.stderr
    assert says in done.stderr


def test_a_source_that_is_replaced_need_not_exist(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(yaml.safe_dump({"data": {"sources": [{"path": "gone.jsonl"}]}}))
    Path("here.jsonl").write_text("")
    precheck.check(["--config", "run.yaml", "--data.sources", json.dumps([{"path": "here.jsonl"}])])
    with pytest.raises(InputError, match=r"gone\.jsonl"):
        precheck.check(["--config", "run.yaml"])
