"""If this breaks: a misspelt key is reported only after seconds of imports, or an existing key is refused.

Oracle: the parser itself, which is made from the signatures.
"""

import json
import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants

from lit_llm import InputError, Source, TextDataModule, hub
from lit_llm.cli import pages, precheck, settings

ROOT = Path(__file__).resolve().parents[1]


BY_THE_RUN = ("trainer.strategy", "data.packing", "ckpt_path", "model.base", "model.adapter",
              "data.tokenizer")                     # keys whose names the parser leaves to the run


def refusal(*words: str) -> str:
    """The message before the parser is built; empty if there is none."""
    try:
        precheck.check("fit", ["--data.sources", "[]", *words])
    except InputError as error:
        return str(error)
    return ""


def test_the_table_of_keys_is_that_of_the_parser():
    from lit_llm.cli import runs

    derived = json.loads(json.dumps(runs.described()))
    assert pages.table() == derived, 'run: python -c "from lit_llm.cli import runs; runs.write_keys()"'


def test_one_batch_is_not_all_batches_whatever_was_imported_before():
    """`typing` shares `Union[int, float]` between libraries that write it in either order."""
    code = ("import httpx, json; from lit_llm.cli import runs; "       # httpx writes it in the other order than Lightning
            "print(json.dumps(runs.described()['keys']['trainer.limit_val_batches']['type']))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert json.loads(done.stdout.splitlines()[-1]) == pages.table()["keys"]["trainer.limit_val_batches"]["type"]


def test_every_key_is_known(monkeypatch):
    monkeypatch.chdir(ROOT)
    for key in pages.all_keys():
        for words in ([f"--{key}", "1"], [f"--{key}=null"]):
            assert key == "config" or "unknown key" not in refusal(*words)
    assert not refusal("--model.lora.r", "3", "--data.sources+", "[]", "--trainer.strategy.init_args.stage", "2",
                       "--model.init.hidden_size=3", "--print_config", "--trust-checkpoint")
    for file in [*ROOT.glob("configs/*.yaml"), *ROOT.glob("configs/with/*.yaml")]:
        own = file.name in ("qwen3_lora.yaml", "own_questions.yaml")        # which name a file of the user's
        hub = file.name == "tutorial.yaml"          # which names a model of the hub
        without = file.name == "tensorboard.yaml" and find_spec("tensorboard") is None
        logger = without or file.name == "swanlab.yaml"     # the latter needs --allow swanlab
        wanted = "my.jsonl" if own else "model.base" if hub else "trainer.logger" if logger else ""
        assert wanted == refusal("--config", str(file)).partition(":")[0]


def test_a_value_is_refused_only_where_the_parser_refuses_it(tmp_path, monkeypatch):
    """And for numbers, texts and choices wherever it does."""
    from lit_llm.cli.runs import check_values
    from tests.test_class_paths import fit_parser

    parser = fit_parser()

    def parser_refuses(word):
        try:
            check_values("fit", parser.parse_args(["--data.sources=[]", word]))
        except (InputError, SystemExit, ValueError):
            return True
        return False

    monkeypatch.chdir(tmp_path)
    seen = {True: 0, False: 0}
    for key, entry in (pages.table()["keys"] | pages.table()["verbs"]["fit"]).items():
        for value in ("-1", "abc") if settings.hint_of(entry["type"]) in (int, float, bool, str) else ("abc",):
            refused = bool(refusal(f"--{key}={value}"))
            if key in (*precheck.CLASSES, *BY_THE_RUN):
                assert refused
            elif refused or key in ("model.lr", "data.seq_len", "model.schedule", "model.quantize"):
                assert refused == parser_refuses(f"--{key}={value}"), (key, value)
            seen[refused] += 1
    assert seen[True] > 60
    assert seen[False] > 10


@pytest.mark.parametrize(("words", "says"), [
    (["--model.lrr", "1"], "unknown key 'model.lrr'. Did you mean 'model.lr'?"),
    (["--html", "page.html"], "this verb has no key 'html'; other verbs have"),
    (["--learning_rate=1"], "Did you mean 'model.lr'?"),
    (["--config", "nope.yaml"], "there is no file"),
    (["--config", "godo.yml"], "there is no file godo.yml. Did you mean 'good.yaml'?"),
    (["--config", "confgis/stf.yaml"], "Did you mean 'configs/sft.yaml'?"),
    (["--config", "zer3.yaml"], "Did you mean 'configs/with/zero3.yaml'?"),
    (["--config", "good.yaml", "--model.base", "mymodl"], "model.base: 'mymodl' is not a local folder and could not be "
     "downloaded from the Hugging Face hub. Did you mean 'mymodel'?"),
    (["--config", "good.yaml", "--data.tokenizer", "./mymodl"], "data.tokenizer: there is no folder ./mymodl. Did you mean"),
    (["--config", "good.yaml", "--model.adapter", "mymodl"], "model.adapter: there is no folder mymodl. Did you mean"),
    (["--config", "good.yaml", "--trainer.devices", "x"], "trainer.devices: 'x' is not a number of devices"),
    (["--config", "good.yaml", "--data.sources", "[{path:nope}]"], "data.sources: write a space after the colon: path: nope"),
    (["--config", "good.yaml", "--data.sources", "{path:nope}"], "data.sources: '{path:nope}' is not a list"),
    (["--config", "good.yaml", "--model.lora.rank", "3"], "model.lora: unknown key 'rank'. Did you mean 'model.lora.r'?"),
    (["--config", "nested.yaml"], "model.lora: unknown key 'rank'. Did you mean 'model.lora.r'?"),
    (["--config", "good.yaml", "--model.lr", "abc"], "model.lr: 'abc' is not a number\n  model.lr takes a number above 0"),
    (["--config", "typed.yaml"], "data.seq_len: 'long' is not a whole number"),
    (["--config", "good.yaml", "--data.packing=bestfit"], "Did you mean 'best_fit'?"),
    (["--config", "good.yaml", "--model.lr", "100"], "model.lr: 100.0 is not a number above 0, at most 10"),
    (["--config", "good.yaml", "--data.sources", "[{path: good.yaml, wieght: 2}]"], "Did you mean 'weight'?"),
    (["--model.base", "sample:base"], "data.sources is not given; set it with --data.sources"),
    (["--config", "bad.yaml"], "unknown key 'data.pakcing'. Did you mean 'data.packing'?"),
    (["--config", "good.yaml", "--data.val_sources", "[{path: there/no.jsonl}]"], "The path exists as far as"),
    (["--data.sources=[{path: god.yaml}]"], "no such file or folder. Did you mean 'good.yaml'?")])
def test_mistakes_are_reported_without_torch(words, says, tmp_path):
    (tmp_path / "good.yaml").write_text("model: {base: sample:base}\ndata: {sources: [{path: sample:conversations.jsonl}]}\n")
    (tmp_path / "nested.yaml").write_text("model: {lora: {rank: 3}}\n")
    (tmp_path / "typed.yaml").write_text("data: {seq_len: long}\n")
    (tmp_path / "bad.yaml").write_text("data: {pakcing: none}\n")
    (tmp_path / "mymodel").mkdir()
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
    precheck.check("fit", ["--config", "run.yaml", "--data.sources", json.dumps([{"path": "here.jsonl"}])])
    with pytest.raises(InputError, match=r"gone\.jsonl"):
        precheck.check("fit", ["--config", "run.yaml"])


GOOD = '{"prompt": "a", "completion": "b"}\n'
BROKEN = {                                          # file -> its content and what is wrong with it
    "half.jsonl": (GOOD + '{"prompt": "a", "completion": \n', "half.jsonl:2:31: not JSON: Expecting value"),
    "open.json": ("[" + GOOD.strip(), "the array is not closed"),
    "keys.json": ('[{"a": 1}]', "keys.json:1: no known format has the keys a"),
    "fields.csv": ("prompt,completion\na,b\na\n", "fields.csv:3: the row has 1 fields, but the header has 2"),
    "latin.txt": (b"caf\xe9", "latin.txt:1:4: not UTF-8: byte 0xe9"),
    "number.jsonl": ('{"messages": 3}\n', "messages must be a list")}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_record_at_the_beginning_is_reported_without_torch(name, tmp_path, monkeypatch):
    """With the message of the data module, which reads the whole file."""
    content, says = BROKEN[name]
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    found = refusal("--data.val_sources", json.dumps([{"path": name}]))
    assert says in found
    data = TextDataModule([Source(name)], tokenizer="sample:tokenizer", cache_dir=str(tmp_path))
    with pytest.raises(InputError) as error:
        data.prepare_data()
    assert str(error.value) == found
    assert not refusal("--data.val_sources", json.dumps([{"path": name}]), "--data.on_bad_record", "quarantine")


def test_only_the_beginning_of_a_source_is_read_before_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("late.jsonl").write_text(GOOD * 5000 + "{\n")
    Path("own.jsonl").write_text('{"q": 1}\n')        # in a format that a package of the user may add
    assert not refusal("--data.sources", "[{path: late.jsonl}]")
    assert not refusal("--data.sources", "[{path: own.jsonl, format: mine}]")


# ---- names of classes and strategies, paths --------------------------------------------------------------------------

@pytest.mark.parametrize(("words", "says"), [
    (["--trainer.strategy", "deepsped_stage_1"], "no strategy is named 'deepsped_stage_1'. Did you mean 'deepspeed_stage_1'?"),
    (["--trainer.callbacks", "[{class_path: EarlyStoping}]"], "Did you mean 'EarlyStopping'?"),
    (["--trainer.callbacks", "[{class_path: my_package.Mine}]"], "trainer.callbacks: 'my_package.Mine' is not allowed"),
    (["--model.base", "./nope"], "model.base: there is no folder ./nope"),
    (["--data.tokenizer", "a/b/c"], "data.tokenizer: there is no folder a/b/c"),
    (["--data.chat_template", "nope.jinja"], "there is no template file nope.jinja"),
    (["--ckpt_path", "nope"], "there is no checkpoint folder nope"),
    (["--ckpt_path", "last", "--trainer.default_root_dir", "runs/mine"], "runs/mine has no last checkpoint"),
    (["--data.val_sources", "here.jsonl"], "data.val_sources: 'here.jsonl' is not a list"),
    (["--data.packing", "bestfit"], "data.packing: 'bestfit' is not one of best_fit, concat, none")])
def test_names_and_paths_that_are_none(words, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert says in refusal(*words)


@pytest.mark.parametrize("words", [
    ["--trainer.strategy", "ddp"], ["--trainer.strategy", "{class_path: lit_llm.Fsdp2Strategy}"],
    ["--trainer.strategy=lightning.pytorch.strategies.DDPStrategy"], ["--trainer.profiler", "simple"],
    ["--trainer.logger", "false"], ["--trainer.callbacks", "LearningRateMonitor"], ["--trainer.devices", "0, 1"],
    ["--trainer.callbacks+", "lightning.pytorch.callbacks.early_stopping.EarlyStopping"], ["--ckpt_path", "auto"],
    ["--trainer.callbacks", "null"], ["--data.chat_template", "chatml"], ["--data.tokenizer", "sample:tokenizer"]])
def test_names_that_are_left_to_the_run(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refusal(*words) == ""


def test_an_id_of_the_hub_is_left_to_the_run_where_it_can_be_loaded(tmp_path, monkeypatch):
    """Refused only without a connection to the hub, and if no file of it was downloaded before."""
    monkeypatch.chdir(tmp_path)
    words = ["--model.base", "owner/name"]
    hub.offline.cache_clear()
    assert "model.base: 'owner/name' is not a local folder" in refusal(*words)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "models--owner--name").mkdir()
    assert refusal(*words) == ""
    (tmp_path / "models--owner--name").rmdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        hub.offline.cache_clear()
        assert refusal(*words) == ""
    hub.offline.cache_clear()
