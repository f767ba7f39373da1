"""If this breaks: the README of a package shows code that does not run, or results that it does not give."""

import re
import shlex
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "lit_llm"


def blocks(name, language):
    return re.findall(rf"```{language}\n(.*?)```", (PACKAGE / name / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def test_a_record_on_its_way_to_a_batch(tmp_path, monkeypatch, capsys):
    (code,), (wanted,) = blocks("data", "python"), blocks("data", "text")
    monkeypatch.chdir(tmp_path)
    exec(code, {"__name__": "__main__"})
    assert capsys.readouterr().out == wanted


def test_another_term_in_the_loss(tmp_path, tiny_model):
    """The penalty is part of the training loss, divided as the rest, and no part of what validation measures."""
    import torch

    from lit_llm import LoRA, Source, TextDataModule, Trainer

    names = {}
    exec(blocks("training", "python")[0], names)
    rows = tmp_path / "chats.jsonl"
    rows.write_text('{"prompt": "say one", "completion": "one"}\n{"prompt": "say two", "completion": "two two two"}\n')
    losses = []
    for kind in (names["CausalLMModule"], names["WithPenalty"]):
        torch.manual_seed(0)
        module = kind(base=tiny_model("llama"), lora=LoRA(r=2), lr=1e-30, weight_decay=0.0)
        data = TextDataModule([Source(str(rows))], val_sources=[Source(str(rows))], tokenizer=tiny_model("llama"),
                              seq_len=64, batch_size=1, packing="none")
        trainer = Trainer(accelerator="cpu", max_steps=1, accumulate_grad_batches=2, enable_progress_bar=False,
                          default_root_dir=str(tmp_path / kind.__name__))
        trainer.fit(module, datamodule=data)
        figures = trainer.callback_metrics
        losses.append((float(figures["train/loss"]), float(figures["val/nll"])))
    penalty = sum(float(weight.float().square().sum()) for weight in module.parameters() if weight.requires_grad)
    assert penalty > 0
    assert losses[1][0] - losses[0][0] == pytest.approx(1e-4 * penalty, rel=1e-3)
    assert losses[1][1] == losses[0][1]


@pytest.mark.parametrize("name", ["data", "training"])
def test_every_module_is_in_the_list_of_its_folder(name):
    """Every module of the package is in the listing."""
    listed, _, _ = (PACKAGE / name / "README.md").read_text(encoding="utf-8").partition("\n## ")
    for folder in (PACKAGE / name, *(path for path in (PACKAGE / name).iterdir() if (path / "__init__.py").is_file())):
        modules = {path.stem for path in folder.glob("*.py") if path.stem != "__init__"}
        lines = [line for line in listed.splitlines() if folder.name == name or line.startswith(f"{folder.name}/")]
        words = set(re.findall(r"\w+", " ".join(lines)))
        assert modules <= words, f"{folder.name}: {sorted(modules - words)}"


def test_the_order_of_a_step(tmp_path, tiny_model, monkeypatch):
    """The actors of a step of two micro-batches, in the order of the table's rows."""
    from lit_llm import CausalLMModule, Source, TextDataModule, Trainer
    from lit_llm.training.record.speed import Speed
    from lit_llm.training.run.checkpoint import StepCheckpoint
    from lit_llm.training.run.finite import FiniteGuard
    from lit_llm.training.run.preemption import Preemption
    from lit_llm.training.run.progress import Progress
    from lit_llm.training.run.run_folder import RunFolder

    happened = []

    def noted(kind, method, name):
        real = getattr(kind, method)
        monkeypatch.setattr(kind, method, lambda *args, **keys: (happened.append(name), real(*args, **keys))[1])

    noted(CausalLMModule, "training_step", "module.training_step")
    noted(CausalLMModule, "backward", "the strategy")
    noted(FiniteGuard, "on_before_optimizer_step", "run/finite")
    noted(CausalLMModule, "configure_gradient_clipping", "module.configure_gradient_clipping")
    noted(CausalLMModule, "lr_scheduler_step", "optim, then the schedule")
    noted(FiniteGuard, "on_train_batch_end", "run/finite")
    for kind, name in ((RunFolder, "run/run_folder"), (Progress, "run/progress"), (StepCheckpoint, "run/checkpoint"),
                       (Preemption, "run/preemption"), (Speed, "record/speed")):
        noted(kind, "on_train_batch_end", name)
    rows = tmp_path / "chats.jsonl"
    rows.write_text('{"prompt": "say one", "completion": "one"}\n{"prompt": "say two", "completion": "two two two"}\n')
    trainer = Trainer(accelerator="cpu", max_steps=1, accumulate_grad_batches=2, default_root_dir=str(tmp_path / "run"))
    trainer.exports = False
    trainer.fit(CausalLMModule(base=tiny_model("llama"), lr=1e-3), datamodule=TextDataModule(
        [Source(str(rows))], tokenizer=tiny_model("llama"), seq_len=64, batch_size=1, packing="none"))
    table = (PACKAGE / "training" / "README.md").read_text(encoding="utf-8").partition("| when | who | what |")[2]
    who = [row.split("|")[2].strip().replace("`", "") for row in table.partition("\n\n")[0].splitlines()[2:]]
    last = happened[happened.index("module.training_step", 1):]         # of the micro-batch that ends the step
    assert len(last) == len(who)
    for actor, cell in zip(last, who, strict=True):
        assert cell.startswith(actor), (last, who)


def test_parts_of_ones_own(tmp_path, monkeypatch):
    """The module learns three sentences under Lightning's trainer, and is the same after saving and loading."""
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    exec(blocks("training", "python")[1], names)
    trainer, module, loader = names["trainer"], names["module"], names["loader"]
    (before,) = trainer.validate(names["CausalLMModule"](base="sample:base"), loader, verbose=False)
    assert trainer.validate(module, loader, verbose=False)[0]["val/nll"] < before["val/nll"] - 0.5
    assert sum(int(scores["tokens"].sum()) for scores in trainer.predict(module, loader)) == before["val/tokens"]


def test_a_package_of_ones_own_on_the_command_line(tmp_path, tiny_model, monkeypatch):
    """The command of the README, on a package as it is described."""
    from lit_llm.cli.main import main
    from lit_llm.system import class_paths

    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_package.py").write_text("""
from lightning.pytorch.callbacks import Callback
from lit_llm import CausalLMModule

class WithPenalty(CausalLMModule):
    def __init__(self, weight: float = 0.0, **kwargs):
        super().__init__(**kwargs)
        open("weight", "w").write(str(weight))

class Note(Callback):
    def __init__(self, text: str):
        self.text = text

    def on_train_start(self, trainer, module):
        open("note", "w").write(self.text)
""")
    rows = tmp_path / "chats.jsonl"
    rows.write_text('{"prompt": "say one", "completion": "one"}\n')
    (tmp_path / "my.yaml").write_text(
        f"{{model: {{base: {tiny_model('llama')}}}, data: {{sources: [{{path: {rows}}}], seq_len: 64}}, "
        "trainer: {max_steps: 1, accelerator: cpu, devices: 1}}")
    (command,) = [text for text in blocks("training", "sh") if "--allow" in text]
    words = shlex.split(command.replace("\\\n", " "))
    assert words[:3] == ["python", "-m", "lit_llm"]
    main(words[3:])
    assert [(tmp_path / name).read_text() for name in ("weight", "note")] == ["0.0001", "begins"]
    sys.path[:] = [path for path in sys.path if path != str(tmp_path)]
    del sys.modules["my_package"]
    class_paths.opened.clear()
