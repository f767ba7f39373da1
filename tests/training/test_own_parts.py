"""If this breaks: users with their own DataLoader, data module, LightningModule or Lightning Trainer cannot combine it with this
project, or train another loss than transformers computes.
"""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel, ManualOptimBoringModel
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, DataCollatorWithFlattening

from lit_llm import CausalLMModule, InputError, LoRA, Source, TextDataModule, Trainer
from lit_llm.data.rows import padded
from lit_llm.training.checks.proof import Wide

TEXTS = ["Tom has a red kite.", "What colour is the kite? It is red.", "one two three", "小明有一只红色的风筝。",
         "Say it again: one two three four five.", "The kite flies high over the hill."]


def rows(folder, side="right", *, prompt=2):
    """Tokenized texts in the form of the Hugging Face libraries, and the collator that pads them."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=side)
    examples = []
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        examples.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * prompt + ids[prompt:]})
    return examples, DataCollatorForSeq2Seq(tokenizer, padding=True)


def loader(folder, side="right", *, size=3, count=None, **options):
    examples, collate = rows(folder, side, **options)
    return DataLoader(examples[:count], batch_size=size, collate_fn=collate)


def plain(tmp_path, **options):
    """Lightning's own trainer."""
    return L.Trainer(**{"default_root_dir": str(tmp_path), "accelerator": "cpu", "devices": 1, "logger": False,
                        "enable_progress_bar": False, "enable_model_summary": False, "max_epochs": 1,
                        "precision": "64-true", "enable_checkpointing": False} | options)


def own_trainer(tmp_path, **options):
    return Trainer(**{"default_root_dir": str(tmp_path / "run"), "accelerator": "cpu", "devices": 1, "max_epochs": 1,
                      "enable_progress_bar": False, "precision": "64-true"} | options)


def by_transformers(folder, batches, *, backward=False):
    """Sum of the loss over supervised tokens, and their number, by transformers in float64 with its own padding."""
    model = AutoModelForCausalLM.from_pretrained(folder).double()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for batch in batches:
        positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                       position_ids=positions).logits
        total = total + F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(),
                                        ignore_index=-100, reduction="sum")
        count += int((batch["labels"][:, 1:] != -100).sum())
    if backward:
        (total / count).backward()
    return total.item() / count, count, model


# ---- the loss of padded batches --------------------------------------------------------------------------------------

@pytest.fixture
def exact():
    """Norms and positions in float64, which transformers always computes in float32."""
    with Wide():
        yield


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "gemma2"])
@pytest.mark.parametrize("trainer", [plain, own_trainer])
def test_perplexity_of_padded_batches_is_that_of_transformers(trainer, kind, side, tiny_model, tmp_path):
    folder = tiny_model(kind)
    nll, count, _ = by_transformers(folder, loader(folder, side))
    (figures,) = trainer(tmp_path).validate(CausalLMModule(base=folder), loader(folder, side), verbose=False)
    assert figures["val/nll"] == pytest.approx(nll, rel=1e-9)
    assert figures["val/perplexity"] == pytest.approx(torch.tensor(nll, dtype=torch.float64).exp().item(), rel=1e-9)
    assert figures["val/tokens"] == count
    assert "val/bits_per_byte" not in figures, "the bytes are not known"


class Gradient(L.Callback):
    """Keeps the gradient that the optimizer reads, and the loss that was logged."""

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.gradients = {name: weight.grad.clone() for name, weight in module.model.named_parameters()
                          if weight.grad is not None}

    def on_train_batch_end(self, trainer, *_):
        self.loss = trainer.callback_metrics.get("train/loss")


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("trainer", [plain, own_trainer])
@pytest.mark.parametrize("size", [6, 2, 1])
def test_a_step_has_the_gradient_of_all_its_supervised_tokens(trainer, size, tiny_model, tmp_path):
    """However it is divided into micro-batches, which have different numbers of them."""
    folder, seen = tiny_model("llama"), Gradient()
    nll, _, model = by_transformers(folder, loader(folder, size=6), backward=True)
    made = trainer(tmp_path, callbacks=[seen], accumulate_grad_batches=6 // size, log_every_n_steps=1)
    made.fit(CausalLMModule(base=folder), loader(folder, "left", size=size))
    assert made.global_step == 1
    assert float(seen.loss) == pytest.approx(nll, rel=1e-6)            # logged in float32
    assert len(seen.gradients) > 10
    for name, gradient in seen.gradients.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-9, atol=1e-12, msg=name)


def test_an_epoch_may_end_within_a_window(tiny_model, tmp_path):
    """Six micro-batches in windows of four: the last window has two, whose tokens are all of its step."""
    folder, seen = tiny_model("llama"), Gradient()
    made = plain(tmp_path, callbacks=[seen], accumulate_grad_batches=4, log_every_n_steps=1)
    made.fit(CausalLMModule(base=folder, lr=1e-12), loader(folder, size=1))
    assert made.global_step == 2
    _, _, model = by_transformers(folder, list(loader(folder, size=1))[4:], backward=True)
    for name, gradient in seen.gradients.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-4, atol=1e-7, msg=name)


RANKS = """
import sys, torch
from tests.training.test_own_parts import Gradient, loader, own_trainer
from pathlib import Path
from lit_llm import CausalLMModule

if __name__ == "__main__":
    folder, strategy, accumulate = sys.argv[1:]
    seen = Gradient()
    trainer = own_trainer(Path("."), devices=2, strategy=strategy, accumulate_grad_batches=int(accumulate), max_steps=1,
                   log_every_n_steps=1, enable_checkpointing=False, precision="32-true", callbacks=[seen])
    trainer.fit(CausalLMModule(base=folder, lr=1e-12), loader(folder, "left", size=3 // int(accumulate)))
    if trainer.is_global_zero:
        torch.save([seen.gradients, float(seen.loss)], "gradients.pt")
"""


def ranks(folder, tmp_path, *words):
    """The script on two processes."""
    (tmp_path / "ranks.py").write_text(RANKS)
    return script(tmp_path, "ranks.py", folder, *words)


def script(tmp_path, *words):
    root = Path(__file__).resolve().parents[2]
    return subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True,
                          timeout=200, check=False, env=os.environ | {
                              "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests/training'}"})


def test_all_processes_of_a_step_are_weighed_together(tiny_model, tmp_path):
    """Each has other numbers of supervised tokens in its three micro-batches."""
    folder = tiny_model("llama")
    nll, _, model = by_transformers(folder, loader(folder, size=6), backward=True)
    done = ranks(folder, tmp_path, "ddp", "3")
    assert done.returncode == 0, done.stderr
    gradients, loss = torch.load(tmp_path / "gradients.pt", weights_only=True)
    assert loss == pytest.approx(nll, rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient.double(), model.get_parameter(name).grad, rtol=1e-4, atol=1e-7, msg=name)


PREDICT = """
import sys, torch
from tests.training.test_own_parts import loader, own_trainer
from pathlib import Path
from lit_llm import CausalLMModule

if __name__ == "__main__":
    folder, strategy = sys.argv[1:]
    trainer = own_trainer(Path("."), devices=2, strategy=strategy, enable_checkpointing=False, precision="32-true")
    scores = trainer.predict(CausalLMModule(base=folder), loader(folder, "left", size=2, count=5))
    torch.save([[each.tolist() for each in score.values()] for score in scores], f"scores{trainer.global_rank}.pt")
"""


@pytest.mark.parametrize("strategy", ["fsdp2", "deepspeed_stage_3"])
def test_processes_that_share_weights_score_unequal_numbers_of_documents(strategy, tiny_model, tmp_path):
    """Five documents in batches of two: one rank has two and one, the other two; the figures are those of one process."""
    folder = tiny_model("llama")
    (tmp_path / "predict.py").write_text(PREDICT)
    done = script(tmp_path, "predict.py", folder, strategy)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"scores{rank}.pt") for rank in (0, 1))
    assert [len(nll) for nll, _ in first] == [2, 1]
    assert [len(nll) for nll, _ in second] == [2]
    by_document = dict(zip((0, 2, 4, 1, 3), (pair for nll, tokens in first + second for pair in zip(nll, tokens, strict=True)),
                     strict=True))
    alone = plain(tmp_path, precision="32-true").predict(CausalLMModule(base=folder), loader(folder, "left", size=5, count=5))
    for number, (nll, tokens) in by_document.items():
        assert tokens == int(alone[0]["tokens"][number])
        assert nll == pytest.approx(float(alone[0]["nll"][number]), rel=1e-5)


def test_a_strategy_that_adds_gradients_up_itself_wants_one_micro_batch(tiny_model, tmp_path):
    folder = tiny_model("llama")
    with pytest.raises(InputError, match=r"(?s)trainer.accumulate_grad_batches: .*set it to 1"):
        own_trainer(tmp_path, strategy="deepspeed_stage_1", accumulate_grad_batches=2, precision="32-true").fit(
            CausalLMModule(base=folder), loader(folder))


def test_rows_packed_by_transformers_keep_their_documents_apart(tiny_model, tmp_path):
    """`DataCollatorWithFlattening` puts all documents into one row and marks them only by position ids."""
    folder = tiny_model("llama")
    examples, _ = rows(folder)
    flat = DataLoader([{key: row[key] for key in ("input_ids", "labels")} for row in examples], batch_size=3,
                      collate_fn=DataCollatorWithFlattening())
    nll, count, _ = by_transformers(folder, loader(folder))
    (figures,) = plain(tmp_path).validate(CausalLMModule(base=folder), flat, verbose=False)
    assert (figures["val/tokens"], figures["val/nll"]) == (count, pytest.approx(nll, rel=1e-9))


def test_without_labels_all_tokens_are_supervised_and_padding_never_is(tiny_model):
    examples, collate = rows(tiny_model("llama"), "left", prompt=1)
    whole = collate([dict(row) for row in examples])
    bare = padded.as_batch({"input_ids": whole["input_ids"], "attention_mask": whole["attention_mask"]})
    wrong = padded.as_batch(dict(whole, labels=whole["input_ids"]))     # padding has labels as well
    right = padded.as_batch(whole)
    for batch in (bare, wrong):
        assert torch.equal(batch["labels"], right["labels"])
    assert [len(row["input_ids"]) for row in examples] == [
        stop - start for start, stop in pairwise(right["cu_seqlens"].tolist())]


@pytest.mark.parametrize(("batch", "says"), [
    ({"tokens": torch.ones(1, 4)}, ["a mapping with input_ids", "keys tokens"]),
    ([torch.ones(1, 4)], ["a mapping with input_ids", "list"]),
    ({"input_ids": [1, 2, 3]}, ["list instead of a tensor", "(batch, tokens)"]),
    ({"input_ids": torch.ones(4)}, ["shape (4,)"]),
    ({"input_ids": torch.ones(2, 4), "labels": torch.ones(2, 3)}, ["batch.labels", "(2, 3)", "(2, 4)"]),
    ({"input_ids": torch.ones(1, 4), "attention_mask": torch.tensor([[1, 0, 1, 1]])}, ["there is padding between tokens"]),
], ids=["other key", "no mapping", "a list", "one row", "other labels", "holes"])
def test_a_batch_of_another_form_is_refused_with_what_a_loader_needs(batch, says):
    with pytest.raises(InputError) as caught:
        padded.as_batch(batch)
    for words in (*says, "DataCollatorForSeq2Seq"):
        assert words in str(caught.value)


# ---- Lightning's trainer ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options", [{}, {"lora": LoRA(r=4)}], ids=["all weights", "lora"])
def test_fit_save_load_validate_predict_with_lightnings_trainer(options, tiny_model, tmp_path):
    folder, file = tiny_model("llama"), str(tmp_path / "saved.ckpt")
    trainer = plain(tmp_path, max_epochs=3, precision="32-true")
    module = CausalLMModule(base=folder, lr=1e-2, **options)
    (before,) = trainer.validate(module, loader(folder), verbose=False)
    trainer.fit(module, loader(folder), loader(folder))
    (after,) = trainer.validate(module, loader(folder), verbose=False)
    assert after["val/nll"] < before["val/nll"] - 0.1
    trainer.save_checkpoint(file)
    again = CausalLMModule.load_from_checkpoint(file)
    assert again.lr == 1e-2
    (loaded,) = plain(tmp_path, precision="32-true").validate(again, loader(folder), verbose=False)
    assert loaded == after
    for name, weight in again.named_parameters():
        assert torch.equal(weight, module.get_parameter(name)), name
    (scores, _) = plain(tmp_path, precision="32-true").predict(again, loader(folder, "left"))
    assert scores["nll"].shape == scores["tokens"].shape == (3,)
    batch = next(iter(loader(folder)))
    losses = F.cross_entropy(module(batch["input_ids"], batch["attention_mask"])[:, :-1].transpose(1, 2),
                             batch["labels"][:, 1:], reduction="none").sum(1)
    torch.testing.assert_close(scores["nll"].float(), losses, rtol=1e-4, atol=1e-4)


def test_a_fit_resumes_from_a_checkpoint_of_lightnings_trainer(tiny_model, tmp_path):
    folder, ends = tiny_model("llama"), []
    for name, epochs in (("whole", 4), ("half", 2)):
        torch.manual_seed(0)
        trainer = plain(tmp_path / name, max_epochs=epochs)
        module = CausalLMModule(base=folder, lr=1e-3, schedule="constant", warmup=0)
        trainer.fit(module, loader(folder))
        ends.append(module)
        trainer.save_checkpoint(tmp_path / f"{name}.ckpt")
    resumed = CausalLMModule(base=folder, lr=1e-3, schedule="constant", warmup=0)
    plain(tmp_path / "half", max_epochs=4).fit(resumed, loader(folder), ckpt_path=str(tmp_path / "half.ckpt"))
    for name, weight in resumed.named_parameters():
        assert torch.equal(weight, ends[0].get_parameter(name)), name
        assert weight.ndim < 2 or not torch.equal(weight, ends[1].get_parameter(name)), name


def test_a_module_of_random_weights_is_loaded_without_its_data(tiny_tokenizer, tmp_path):
    """The checkpoint knows the size of the vocabulary."""
    from tests.conftest import NARROW

    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    data = TextDataModule(sources=[Source(str(tmp_path / "text.jsonl"))], tokenizer=tiny_tokenizer, seq_len=32)
    trainer = plain(tmp_path, precision="32-true")
    module = CausalLMModule(init=NARROW | {"model_type": "llama"}, warmup=0)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    again = CausalLMModule.load_from_checkpoint(tmp_path / "saved.ckpt")
    for name, weight in module.named_parameters():
        assert torch.equal(weight, again.get_parameter(name)), name


def test_a_checkpoint_folder_of_a_run_is_loaded_with_its_trained_rows(tiny_model, tmp_path):
    """Rows of tokens that are trained beside adapters, and of tokens that the base does not have."""
    folder, chats = tiny_model("llama"), tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps({"prompt": f"say {n}", "completion": f"one {n}"}) + "\n" for n in range(8)))
    more = AutoTokenizer.from_pretrained(folder)
    more.add_tokens(["<new>"])
    more.save_pretrained(tmp_path / "more")
    data = TextDataModule(sources=[Source(str(chats))], tokenizer=str(tmp_path / "more"), seq_len=64, batch_size=2)
    module = CausalLMModule(base=folder, lora=LoRA(r=2, train_tokens=["<|im_end|>", "<new>"]), lr=1e-2)
    own_trainer(tmp_path, max_steps=2, precision="32-true").fit(module, datamodule=data)
    again = CausalLMModule.load_from_checkpoint(tmp_path / "run/checkpoints/step_2")
    assert len(again.trained_ids) == 2
    ids = torch.tensor([[1, 5, again.vocabulary - 1, 7]])
    torch.testing.assert_close(again(ids), module.eval()(ids))


def test_a_checkpoint_that_holds_a_program_is_not_loaded(tmp_path):
    class Program:
        def __reduce__(self):
            return (open, (str(tmp_path / "TRACE"), "w"))

    torch.save({"state_dict": {}, "hyper_parameters": {"base": Program()}}, tmp_path / "evil.ckpt")
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        CausalLMModule.load_from_checkpoint(tmp_path / "evil.ckpt")
    assert not (tmp_path / "TRACE").exists()


# ---- data and modules of other people --------------------------------------------------------------------------------

class OwnData(L.LightningDataModule):
    """Independent of this project; its tokenizer is that of transformers."""

    def __init__(self, folder):
        super().__init__()
        self.folder, self.tokenizer = folder, AutoTokenizer.from_pretrained(folder)

    def train_dataloader(self):
        return loader(self.folder)

    def val_dataloader(self):
        return [loader(self.folder), loader(self.folder, "left")]


def test_our_trainer_and_module_with_an_own_data_module(tiny_model, tmp_path):
    """A run is kept, resumed and measured as always; two loaders are measured together."""
    folder = tiny_model("llama")
    nll, count, _ = by_transformers(folder, loader(folder))
    trainer = own_trainer(tmp_path, max_epochs=2)
    trainer.fit(CausalLMModule(base=folder, lora=LoRA(r=2)), datamodule=OwnData(folder))
    assert trainer.run.before["val/nll"] == pytest.approx(nll, rel=1e-9)
    assert trainer.run.before["val/tokens"] == 2 * count
    assert (tmp_path / "run/checkpoints/step_4/adapter").is_dir()
    assert AutoTokenizer.from_pretrained(tmp_path / "run/tokenizer").vocab_size
    again = own_trainer(tmp_path, max_epochs=3)
    again.fit(CausalLMModule(base=folder, lora=LoRA(r=2)), datamodule=OwnData(folder), ckpt_path="last")
    assert again.global_step == 6
    figures = own_trainer(tmp_path).validate(CausalLMModule(base=folder, lora=LoRA(r=2)), datamodule=OwnData(folder),
                                             ckpt_path="last")
    assert figures[0]["val/nll"] == pytest.approx(again.run.after["val/nll"], rel=1e-9)


@pytest.mark.parametrize("kind", [BoringModel, ManualOptimBoringModel])
def test_our_trainer_with_any_lightning_module(kind, tmp_path):
    """Fitted, kept, resumed to the same weights, measured from its checkpoint, predicted."""
    ends = []
    for name, steps in (("whole", [8]), ("parts", [4, 8])):
        for turn, most in enumerate(steps):
            torch.manual_seed(1)
            module, data = kind(), BoringDataModule()
            trainer = own_trainer(tmp_path / name, max_steps=most, max_epochs=-1, limit_val_batches=2, precision="32-true")
            trainer.fit(module, datamodule=data, ckpt_path="last" if turn else None)
            assert trainer.global_step == most
        ends.append(module)
    folder = tmp_path / "parts/run/checkpoints/step_8"
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "state"]
    saved = torch.load(folder / "state", weights_only=True)["state_dict"]
    for name, weight in ends[1].named_parameters():
        assert torch.equal(weight, saved[name])
        assert kind is not BoringModel or weight.shape == ends[0].get_parameter(name).shape
    fresh = kind()
    own_trainer(tmp_path / "parts", limit_val_batches=2, precision="32-true").validate(
        fresh, datamodule=BoringDataModule(), ckpt_path="last")
    assert all(torch.equal(weight, saved[name]) for name, weight in fresh.named_parameters()), "it was measured"
    assert len(own_trainer(tmp_path / "p", precision="32-true").predict(fresh, BoringDataModule())) > 0


def test_the_tokenizer_is_that_of_the_module(tiny_model, tmp_path):
    """In Python as on the command line, for each trainer and verb."""
    folder, chats = tiny_model("llama"), tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps({"prompt": f"say {n}", "completion": f"one {n}"}) + "\n" for n in range(8)))
    sources = [Source(str(chats))]
    for make in (plain, own_trainer):
        data, module = TextDataModule(sources, val_sources=sources, seq_len=64), CausalLMModule(base=folder)
        (figures,) = make(tmp_path, precision="32-true").validate(module, datamodule=data, verbose=False)
        assert figures["val/bits_per_byte"] > 0
        assert data.tokenizer.vocab_size == AutoTokenizer.from_pretrained(folder).vocab_size
    data = TextDataModule(sources, seq_len=64)
    own_trainer(tmp_path).prepare(CausalLMModule(base=folder), data)
    assert data.plans["train"].corpus
    with pytest.raises(InputError, match="no tokenizer is set"):
        own_trainer(tmp_path).prepare(CausalLMModule(init={"model_type": "llama"}), TextDataModule(sources, seq_len=64))
