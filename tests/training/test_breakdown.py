"""If this breaks: figures by document, source, answer or position are wrong, or depend on batches, packing or processes.

Oracle: plain transformers in float64, one window at a time, whose losses are added in plain dictionaries. The number of an
answer comes from the text before a token, not from the marks of the data.
"""

import json
import math
import shutil
from collections import defaultdict

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping

from lit_llm import CausalLMModule, InputError, Source, StepCheckpoint, TextDataModule, Trainer
from lit_llm.models.load import load_causal_lm
from lit_llm.statistics import intervals
from lit_llm.statistics.documents import Documents
from lit_llm.training import forward

WORDS = ["say", "it", "again", "one", "two", "three", "four", "five", "小明有一只红色的风筝", "kite"]
START = "<|im_start|>assistant"


def talk(number):
    return {"messages": [message for turn in range(1 + number % 3) for message in (
        {"role": "user", "content": " ".join(WORDS[:1 + (number + turn) % 7])},
        {"role": "assistant", "content": " ".join(WORDS[(number + turn) % 5:])})]}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Twelve conversations of one to three answers, and nine documents of up to three windows."""
    folder = tmp_path_factory.mktemp("sources")
    records = {"talks.jsonl": [talk(number) for number in range(12)],
               "texts.jsonl": [{"text": " ".join(WORDS[number % 3:] * (1 + number))} for number in range(9)]}
    for name, rows in records.items():
        (folder / name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return [str(folder / name) for name in records]


def evaluated(base, files, folder, *, verb="validate", **options):
    keys = {name: options.pop(name) for name in ("peft",) if name in options}
    sources = [Source(file) for file in files]
    data = TextDataModule(sources, val_sources=sources, tokenizer=base, **{"seq_len": 96, "batch_size": 2} | options)
    module = CausalLMModule(base=base, **keys)
    trainer = Trainer(accelerator="cpu", devices=1, default_root_dir=str(folder), enable_progress_bar=False)
    (figures,) = getattr(trainer, verb)(module, datamodule=data)
    return figures, module.perplexity["val" if verb == "validate" else "test"].breakdown, data


def oracle(base, data, *, stride=None, seq_len=96):
    """{(source, record): {"nll", "tokens", "correct", "text"}}, {answer: nll, tokens}, {exponent: nll, tokens}."""
    from transformers import AutoModelForCausalLM

    model, tokenizer = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64, attn_implementation="eager").eval(), data.tokenizer
    corpus, stride = data.plans["val"].corpus, stride or seq_len - 1
    documents, answers, positions = ({} for _ in range(3))
    for sequence in range(len(corpus)):
        tokens, marks = corpus.marked(sequence, 0, int(corpus.lengths[sequence]))
        ids, is_supervised = tokens.astype(int).tolist(), (marks & 1).astype(bool)
        total = documents[int(corpus.store_of[sequence]), sequence] = defaultdict(float)
        if not corpus.is_document[sequence]:
            ids = ids[:seq_len]                         # a conversation keeps its beginning
        windows, text = {}, []
        for at in range(1, len(ids)):
            if not is_supervised[at]:
                continue
            start = 0 if at < seq_len else math.ceil((at - seq_len + 1) / stride) * stride
            if start not in windows:
                with torch.no_grad():
                    windows[start] = model(input_ids=torch.tensor([ids[start:start + seq_len]]), use_cache=False).logits[0]
            logits = windows[start][at - 1 - start]
            nll = -float(logits.log_softmax(-1)[ids[at]])
            before = tokenizer.decode(ids[:at], skip_special_tokens=False)
            answer = 0 if corpus.is_document[sequence] else before.count(START)
            for values in (total, answers.setdefault(answer, defaultdict(float)),
                           positions.setdefault(int(math.log2(at - start)), defaultdict(float))):
                values["nll"] += nll
                values["tokens"] += 1
                values["correct"] += int(logits.argmax()) == ids[at]
            text.append(ids[at])
        total["text"] = tokenizer.decode(text)
    return documents, answers, positions


def check(found, wanted):
    documents, answers, positions = wanted
    got, order = found.documents, sorted(documents)
    by_source = {source: [documents[key] for key in order if key[0] == source] for source in (0, 1)}
    for source, totals in by_source.items():
        part = got.where(got.source == source)
        assert part.nll.tolist() == pytest.approx([total["nll"] for total in totals], rel=2e-6)
        assert part.tokens.tolist() == [total["tokens"] for total in totals]
        assert part.correct.tolist() == [total["correct"] for total in totals]
        whole = [place for place, total in enumerate(totals) if "\ufffd" not in total["text"]]     # not cut in a character
        assert len(whole) >= 0.8 * len(totals)
        assert part.bytes[whole].tolist() == [len(totals[place]["text"].encode()) for place in whole]
        assert part.characters[whole].tolist() == [len(totals[place]["text"]) for place in whole]
    details = found.details()
    for name, group, named in (("answers", answers, str), ("positions", positions, lambda exponent: (
            f"{2**exponent}-{2**(exponent + 1) - 1}" if exponent else "1"))):
        want = {named(number): values for number, values in group.items() if name == "positions" or number}
        assert details[name].keys() == want.keys()
        for number, values in want.items():
            assert details[name][number]["nll"] == pytest.approx(values["nll"] / values["tokens"], rel=2e-6)
            assert details[name][number]["tokens"] == values["tokens"]
    every = [documents[key] for key in order]
    interval = intervals.ratio([total["nll"] for total in every], [total["tokens"] for total in every])
    assert interval.low < details["total"]["nll"] < interval.high


@pytest.fixture(scope="module")
def wanted(files, tiny_model, tmp_path_factory):
    base = tiny_model("llama")
    *_, data = evaluated(base, files, tmp_path_factory.mktemp("first"))
    return {stride: oracle(base, data, stride=stride) for stride in (None, 32)}


@pytest.mark.parametrize("options", [{"packing": "none", "batch_size": 1}, {"batch_size": 3}, {"batch_size": 8},
                                     {"packing": "none", "batch_size": 5}, {"stride": 32}], ids=str)
def test_against_transformers(options, wanted, files, tiny_model, tmp_path):
    figures, found, _ = evaluated(tiny_model("llama"), files, tmp_path, **options)
    check(found, wanted[options.get("stride")])
    details = found.details()
    assert figures["val/nll"] == pytest.approx(details["total"]["nll"], rel=1e-12)
    assert figures["val/nll_low"] == details["total"]["nll_low"] < figures["val/nll"] < figures["val/nll_high"]
    assert figures["val/bits_per_character"] == details["total"]["bits_per_character"] > figures["val/bits_per_byte"]
    assert figures["val/documents"] == 21
    assert {name: figures[f"val/nll/{name}"] for name in ("talks", "texts")} == {
        name: part["nll"] for name, part in details["sources"].items()}
    worst = list(details["sources"])
    assert details["sources"][worst[0]]["nll"] >= details["sources"][worst[1]]["nll"]


@pytest.fixture(scope="module")
def capped(tiny_model, tmp_path_factory):
    """A model whose attention cannot isolate packed documents."""
    folder = tmp_path_factory.mktemp("capped") / "model"
    shutil.copytree(tiny_model("gemma2"), folder)
    config = json.loads((folder / "config.json").read_text()) | {"attn_logit_softcapping": 0.5}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_documents_that_have_a_forward_pass_each(capped, files, tmp_path):
    _, found, data = evaluated(capped, files, tmp_path / "a", batch_size=4)
    check(found, oracle(capped, data))


def test_virtual_tokens(wanted, files, tiny_model, tmp_path):
    """Prompt tuning: the same tokens in the same cells, and sums that add up to the whole."""
    peft = {"class_path": "peft.PromptTuningConfig", "init_args": {"num_virtual_tokens": 3}}
    figures, found, _ = evaluated(tiny_model("llama"), files, tmp_path, peft=peft)
    assert found.documents.tokens.sum() == sum(total["tokens"] for total in wanted[None][0].values())
    assert found.documents.figures()["nll"] == pytest.approx(figures["val/nll"], rel=1e-12)
    assert figures["val/nll_low"] < figures["val/nll"]


def test_the_models_own_logits_give_the_same_tokens(files, tiny_model, tmp_path):
    _, _, data = evaluated(tiny_model("llama"), files, tmp_path)
    model, batch = load_causal_lm(tiny_model("llama")).eval(), next(iter(data.val_dataloader()))
    with torch.no_grad():
        ours, theirs = (forward.nll(model, batch, forward.Choices(forward.Way(packed=False, own_logits=own, keep=own)))
                        for own in (False, True))
    assert torch.equal(ours.tokens.correct, theirs.tokens.correct)
    assert torch.allclose(ours.tokens.nll, theirs.tokens.nll, rtol=1e-5)
    assert ours.tokens.nll.shape == batch["cell_of_token"].shape
    assert theirs.tokens.nll.sum() == pytest.approx(theirs.total.item(), rel=1e-12)


@pytest.mark.parametrize("strategy", ["ddp", "deepspeed_stage_3", "fsdp2"])
def test_two_processes(strategy, wanted, files, tiny_model, tmp_path, lit_llm):
    sources = "[" + ", ".join(f"{{path: {file}}}" for file in files) + "]"
    done = lit_llm("validate", "--model.base", tiny_model("llama"), "--data.sources", sources, "--data.val_sources", sources,
                   "--data.seq_len", 96, "--trainer.accelerator", "cpu", "--trainer.devices", 2, "--trainer.strategy",
                   strategy, "--trainer.default_root_dir", "run", ranks=2)
    assert done.code == 0, done.err
    found = Documents.read(tmp_path / "run/val_documents.jsonl")
    documents = wanted[None][0]
    assert found.nll.tolist() == pytest.approx([documents[key]["nll"] for key in sorted(documents)], rel=2e-6)
    assert found.tokens.tolist() == [documents[key]["tokens"] for key in sorted(documents)]
    line = json.loads((tmp_path / "run/evaluations.jsonl").read_text())
    assert line["breakdown"]["total"]["nll"] == pytest.approx(line["val/nll"], rel=1e-12)
    assert f"{'val/nll':<13}  {line['val/nll']:<8.5g} {line['val/nll_low']:.4g} to {line['val/nll_high']:.4g}" in done.err
    assert done.err.index("val/nll/" + next(iter(line["breakdown"]["sources"]))) < done.err.index("val/nll/" + list(
        line["breakdown"]["sources"])[1])


def fit(base, files, folder, *callbacks, **options):
    sources = [Source(file) for file in files]
    data = TextDataModule(sources, val_sources=sources, tokenizer=base, seq_len=96, batch_size=4)
    trainer = Trainer(accelerator="cpu", devices=1, default_root_dir=str(folder), enable_progress_bar=False, max_steps=4,
                      val_check_interval=2, callbacks=list(callbacks))
    trainer.fit(CausalLMModule(base=base, lr=1e-2, warmup=0), datamodule=data, **options)
    return trainer


def test_a_source_decides_about_the_best_checkpoint(files, tiny_model, tmp_path):
    keeper, stop = StepCheckpoint(monitor="val/nll/texts"), EarlyStopping(monitor="val/nll/talks", patience=9)
    trainer = fit(tiny_model("llama"), files, tmp_path / "run", keeper, stop)
    assert keeper.scores["step_4"] == float(trainer.callback_metrics["val/nll/texts"])
    lines = [json.loads(line) for line in (tmp_path / "run/breakdown.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2, 4]
    assert lines[-1]["sources"]["texts"]["nll"] == keeper.scores["step_4"]
    assert lines[-1]["total"]["nll"] < lines[0]["total"]["nll_low"]
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["val/nll_low"] == lines[-1]["total"]["nll_low"]
    with pytest.raises(InputError, match=r"no metric 'val/nll/text' is logged.*'val/nll/texts'"):
        fit(tiny_model("llama"), files, tmp_path / "other", StepCheckpoint(monitor="val/nll/text"))


def test_a_loss_with_another_term_has_no_interval(files, tiny_model, tmp_path):
    """The documents' sums would not be those of the figure."""
    class Penalized(CausalLMModule):
        def sums(self, batch):
            sums = super().sums(batch)
            return sums._replace(total=sums.total + 1.0)

    sources = [Source(file) for file in files]
    data = TextDataModule(sources, val_sources=sources, tokenizer=tiny_model("llama"), seq_len=96)
    trainer = Trainer(accelerator="cpu", devices=1, default_root_dir=str(tmp_path), enable_progress_bar=False)
    (figures,) = trainer.validate(Penalized(base=tiny_model("llama")), datamodule=data)
    assert "val/nll" in figures
    assert "val/nll_low" not in figures


def test_a_stride_that_has_no_effect_is_refused(files, tiny_model, tmp_path):
    with pytest.raises(InputError, match="would leave tokens out"):
        evaluated(tiny_model("llama"), files, tmp_path, stride=96)
    data = TextDataModule([Source(files[1])], tokenizer=tiny_model("llama"), stride=32)
    with pytest.raises(InputError, match="there are no data for it"):
        data.setup("fit")
