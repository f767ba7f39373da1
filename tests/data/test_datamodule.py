"""If this breaks: a real file trains on the wrong records, or perplexity depends on packing and batch size."""

import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from lit_llm.data.datamodule import TextDataModule
from lit_llm.data.records.sources import Source
from lit_llm.data.rows.loader import RowLoader
from lit_llm.errors import InputError
from lit_llm.text.conversation import Document


def talk(number, answer="a"):
    return {"prompt": f"question {number}", "completion": answer}


@pytest.fixture
def module(tokenizer_folder):
    def make(*sources, stage="fit", **settings):
        settings = {"tokenizer": str(tokenizer_folder), "seq_len": 64, "batch_size": 4} | settings
        made = TextDataModule(sources=[Source(path) if isinstance(path, str) else path for path in sources], **settings)
        made.prepare_data()
        made.setup(stage)
        return made
    return make


def predicted(loader, tokenizer):
    """Every supervised token in its place, as a multiset of (token before, token)."""
    pairs = Counter()
    for batch in loader:
        ids, labels = batch["input_ids"].flatten().numpy(), batch["labels"].flatten().numpy()
        pairs.update((int(ids[at - 1]), int(labels[at])) for at in np.flatnonzero(labels != -100))
    return pairs


# ---- real files ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("name", "count", "kind"), [
    ("sft/llamafactory/alpaca_en_demo.json", 999, 0), ("sft/llamafactory/alpaca_zh_demo.json", 1000, 0),
    ("sft/llamafactory/identity.json", 91, 0), ("sft/openai/toy_chat_fine_tuning.jsonl", 5, 0),
    ("sft/fastchat/dummy_conversation.json", 500, 0), ("sft/mlx_wikisql/train.jsonl", 1000, 1),
    ("pretrain/c4_demo.jsonl", 300, 1), ("pretrain/xiyouji.txt", 1, 1),
    ("tokenizers/cs336/tinystories_sample.txt", 5, 1)])
def test_real_files(module, shared_data, capsys, name, count, kind):
    made = module(str(shared_data / name), seq_len=512)
    report = made.reports[0]
    assert (report.read, report.kept, report.dropped) == (count, count, {})
    corpus, rows = made.plans["train"].corpus, made.plans["train"].rows
    assert set(corpus.is_document.tolist()) == {bool(kind)}
    assert 0 < rows.supervised.sum() < report.tokens
    assert f"{count:,} record{'s' * (count > 1)}, {count:,} kept" in capsys.readouterr().err


def test_real_alpaca_fills_its_rows(module, shared_data):
    files = [str(shared_data / f"sft/llamafactory/alpaca_{language}_demo.json") for language in ("en", "zh")]
    rows = module(*files, seq_len=2048).plans["train"].rows
    assert rows.lengths.sum() / (len(rows) * 2048) > 0.98


def test_real_tables_by_columns(module, shared_data):
    dolly = Source(str(shared_data / "sft/litgpt/dolly.json"), columns={"input": "context", "output": "response"})
    code = Source(str(shared_data / "eval/HumanEval.jsonl.gz"), weight=0.5,
                  columns={"completion": "canonical_solution"})
    exam = Source(str(shared_data / "eval/cmmlu/world_history.csv"), columns={"text": "Question"})
    poems = Source(str(shared_data / "pretrain/chinese-poetry/poet.tang.0.json"), columns={"text": "paragraphs"})
    made = module(dolly, code, exam, poems, seq_len=512)
    assert [report.kept for report in made.reports] == [12, 164, 161, 1000]
    assert [counts["sequences"] for counts in made.train_dataloader().drawn(len(made.train_dataloader())).values()] == [
        5, 58, 161, 1000]                               # 7 and 48 prompts fill a packed sequence each


def test_the_embedded_default():
    import lit_llm.samples

    made = TextDataModule(sources=[Source("sample:conversations_val.jsonl")], val_fraction=0.1,
                          tokenizer=str(Path(lit_llm.samples.__file__).parent / "tokenizer"), seq_len=256)
    made.prepare_data()
    made.setup("fit")
    report = made.reports[0]
    assert report.read == report.kept > 0
    assert len(made.train_dataloader()) > len(made.val_dataloader()) > 0


# ---- evaluation ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("settings", [
    {}, {"packing": "concat"}, {"packing": "none"}, {"batch_size": 1}, {"batch_size": 7, "seq_len": 24},
    {"seq_len": 5}])
def test_each_token_of_the_text_is_scored_once_whatever_the_packing(module, tokenizer, jsonl, settings):
    texts = ["short", "a longer one, of more than a row: " + "abc " * 40, "x", "中文也是文字" * 5]
    made = module(jsonl([{"text": text} for text in texts]), stage="fit",
                  val_sources=[Source(jsonl([{"text": text} for text in texts], "val.jsonl"))], **settings)
    expected = Counter()
    for text in texts:
        ids = tokenizer.encode_document(Document(text), end=False).input_ids.tolist()
        expected.update(pairwise(ids))
    loader = made.val_dataloader()
    assert predicted(loader, tokenizer) == expected
    assert sum(batch["num_bytes"] for batch in loader) == sum(len(text.encode()) - 1 for text in texts)


def test_training_learns_where_a_document_ends_and_evaluation_does_not_score_it(module, tokenizer, jsonl):
    path = jsonl([{"text": f"text {number}"} for number in range(20)])
    made = module(path, val_sources=[Source(path)])
    ends = {stage: sum(count for (_, token), count in predicted(loader, tokenizer).items() if token == tokenizer.eos_id)
            for stage, loader in (("train", made.train_dataloader()), ("val", made.val_dataloader()))}
    assert ends == {"train": 20, "val": 0}


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_validation_without_counting_twice(module, tokenizer, jsonl, world):
    made = module(jsonl([talk(number, "a" * (number + 1)) for number in range(30)]), val_fraction=0.4)
    whole = made.val_dataloader()
    ranks = [RowLoader(whole.corpus, whole.rows, batch_size=4, seq_len=64, pad_id=0, token_bytes=whole.token_bytes,
                       rank=rank, world=world, shuffle=False) for rank in range(world)]
    assert sum((predicted(rank, tokenizer) for rank in ranks), Counter()) == predicted(whole, tokenizer)


# ---- the split and the mixture ---------------------------------------------------------------------------------------

def places(made, stage):
    corpus = made.plans[stage].corpus
    return [corpus.place(sequence).rsplit("/", 1)[1] for sequence in range(len(corpus))]


def test_a_record_stays_on_its_side(module, jsonl):
    records = [talk(number) for number in range(200)]
    before = module(jsonl(records), val_fraction=0.25)
    after = module(jsonl([talk(-1), *records, records[3], records[5]]), val_fraction=0.25)
    held_out = {int(place.split(":")[1]) for place in places(before, "val")}
    assert 25 < len(held_out) < 75
    assert len(held_out) + len(places(before, "train")) == 200
    moved = {int(place.split(":")[1]) - 1 for place in places(after, "val")}
    assert {line for line in moved if 1 <= line <= 200} == held_out
    assert {number + 1 for number in (3, 5)} & held_out == {
        {201: 4, 202: 6}[line] for line in moved if line in (201, 202)}


def test_overlong_conversations_are_cut_dropped_or_refused_and_counted(module, jsonl):
    path = jsonl([talk(1), talk(2, "long " * 50), {"prompt": "x" * 100, "completion": "never seen"}])
    plans = {policy: module(path, overlong=policy).plans["train"] for policy in ("cut", "drop")}
    assert {name: count for name, count in plans["cut"].notes.items() if count} == {
        "cut": 2, "cut_in_an_answer": 1, "dropped_nothing_left": 1}
    assert {name: count for name, count in plans["drop"].notes.items() if count} == {"dropped_overlong": 2}
    assert len(plans["cut"].rows.segments) == 2
    assert len(plans["drop"].rows.segments) == 1
    with pytest.raises(InputError, match=r"data\.jsonl:2: it has \d+ tokens, but data\.seq_len is 64"):
        module(path, overlong="error")


# ---- messages and refusals -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("settings", "named"), [
    ({"packing": "concat"}, "concat would separate answers"), ({"val_fraction": 1.5}, "data.val_fraction: 1.5"),
    ({"val_fraction": 0.5, "test_fraction": 0.5}, "leave no training data"), ({"test_fraction": -1}, "data.test_fraction: -1"),
    ({"bad_record_limit": 2}, "data.bad_record_limit: 2"),
    ({"seq_len": 1}, "data.seq_len: 1"), ({"batch_size": 0}, "data.batch_size: 0"),
    ({"tokenizer": None}, "data.tokenizer: no tokenizer"), ({"val_fraction": 1e-12}, "no record is left for val")])
def test_what_cannot_be_meant_is_refused(module, jsonl, settings, named):
    with pytest.raises(InputError, match=named):
        module(jsonl([talk(1), talk(2)]), **settings)


def test_no_source_and_no_weight_are_refused(module, jsonl):
    with pytest.raises(InputError, match=r"data\.sources: no source is set"):
        module()
    for weight in (0, -1, float("inf"), float("nan"), 1e12, 1e308):
        with pytest.raises(InputError, match=r"data\.sources\.weight: .* is not a number above 0, at most 1,000"):
            module(Source(jsonl([talk(1)]), weight=weight))


def test_building_costs_nothing_and_validation_may_be_absent(module, jsonl):
    TextDataModule(sources=[Source("not/there.jsonl")])
    assert module(jsonl([talk(1)])).val_dataloader() == []


def test_the_facts_are_json(module, jsonl):
    made = module(jsonl([talk(number) for number in range(9)]), val_fraction=0.3)
    facts = json.loads(json.dumps(made.facts()))
    assert facts["train"]["sequences"] + facts["val"]["sequences"] == facts["sources"][0]["kept"] == 9


def test_the_facts_say_what_people_ask(module, jsonl):
    """Short questions of the validation data, and how many follow each other in training; documents have none."""
    turns = [{"role": role, "content": f"{role} {turn}"} for turn in range(3) for role in ("user", "assistant")]
    sources = [*[talk(number) for number in range(5)], {"messages": turns}, {"text": "a document"}]
    made = module(jsonl(sources), val_sources=[Source(jsonl([talk("梨" * 200), talk(" 梨 "), talk(77)], "val.jsonl"))])
    assert made.facts()["conversations"] == {"questions": ["question  梨", "question 77", *[f"question {n}" for n in range(2)]],
                                             "turns": 3}
    assert module(jsonl([talk(1), talk(2)])).facts()["conversations"]["turns"] == 1
    assert module(jsonl([{"text": "a document"}])).facts()["conversations"] == {}


def silent(number, **how):
    return {"messages": [{"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": "a", **how}]}


def test_data_without_supervised_stop_tokens_are_refused(module, jsonl):
    """Refused only if all answers are cut: one whole answer is enough, and documents have none; cuts are counted."""
    long = [talk(number, "long " * 50) for number in range(5)]
    with pytest.raises(InputError, match=r"data\.seq_len: none of 5 conversations has a supervised stop token"):
        module(jsonl(long))
    with pytest.raises(InputError, match="none of 5 conversations"):
        module(jsonl([*long, {"text": "a document, whole"}]))
    assert module(jsonl([*long, talk(1)])).plans["train"].notes["cut_in_an_answer"] == 5
    module(jsonl([{"text": "x" * 300}]))
    module(jsonl(long), packing="concat", train_on="all")       # cut at any token; the rest is in the next packed sequence


def test_unsupervised_answers_need_no_stop_token(module, jsonl):
    """`train: false` on some answers leaves the others; on all, under `train_on: all`, the user wants the questions."""
    assert module(jsonl([silent(1, train=False), silent(2)]), on_bad_record="quarantine", bad_record_limit=0.5).plans
    with pytest.raises(InputError, match="no assistant message of this conversation is trained on"):
        module(jsonl([silent(number, train=False) for number in range(3)]))
    made = module(jsonl([silent(number, train=False) for number in range(3)]), train_on="all")
    assert made.plans["train"].rows.supervised.sum() > 0


def test_a_flood_of_bad_records_stops_early_or_at_the_end(module, jsonl, monkeypatch):
    """Checked while the file is read, not at the end of a long file; set-aside records are counted."""
    from lit_llm.data.tokens import prepare

    records = [talk(number) if number % 4 else {"prompt": 5} for number in range(400)]
    with pytest.raises(InputError, match=r"100 of 400 records are bad, more than the limit of 20\.0%;") as caught:
        module(jsonl(records), on_bad_record="quarantine", bad_record_limit=0.2)
    lines = Path(re.search(r"\S+quarantine\.jsonl", caught.value.fix)[0]).read_text().splitlines()
    assert [json.loads(line)["where"].rsplit(":", 1)[1] for line in lines] == [str(n + 1) for n in range(0, 400, 4)]
    monkeypatch.setattr(prepare, "ENOUGH", 100)
    monkeypatch.setattr(prepare, "BATCH_RECORDS", 64)
    with pytest.raises(InputError, match=r"32 of 128 records are bad"):
        module(jsonl(records, "again.jsonl"), on_bad_record="quarantine", bad_record_limit=0.2)
    report = module(jsonl(records, "thrice.jsonl"), on_bad_record="quarantine", bad_record_limit=0.25).reports[0]
    assert (report.read, report.kept, report.quarantined) == (400, 300, 100)


def test_test_data_come_from_the_configured_sources(module, jsonl):
    records = [talk(number) for number in range(200)]
    mine = [Source(jsonl([talk("mine")], "mine.jsonl"))]
    for how, counts in (({"val_fraction": 0.3}, "same"), ({"test_fraction": 0.3}, "own"),
                        ({"val_fraction": 0.2, "test_sources": mine}, 1),
                        ({"val_sources": mine, "test_fraction": 0.3}, "own"), ({"val_sources": mine}, 1)):
        made = module(jsonl(records), stage=None, **how)
        places_of_stage = {stage: set(places(made, stage)) for stage in made.plans}
        if counts == "same":
            assert places_of_stage["test"] == places_of_stage["val"]
        elif counts == "own":
            assert 30 < len(places_of_stage["test"]) < 90
            assert not places_of_stage["test"] & places_of_stage["train"] | places_of_stage["test"] & places_of_stage.get("val", set())
        else:
            assert places_of_stage["test"] == {"mine.jsonl:1"}
    assert len(places_of_stage["train"]) == 200


def test_records_to_validate_on_that_are_trained_on_are_counted(module, jsonl):
    records = [talk(number) for number in range(9)]
    made = module(jsonl(records), val_sources=[Source(jsonl([*records[:2], talk(99)], "val.jsonl"))])
    assert made.plans["val"].notes["also_in_train"] == 2


def test_the_summary_says_all_that_was_left_out(module, jsonl, capsys):
    records = [talk(1), talk(1), {"text": "  "}, {"prompt": 5}, talk(2, "long " * 50), {"prompt": "x" * 100, "completion": "a"}]
    module(jsonl(records), on_bad_record="quarantine", bad_record_limit=0.5, val_sources=[Source(jsonl([talk(3)], "v.jsonl"))])
    stderr = capsys.readouterr().err
    for words in ("data.jsonl: 6 records, 4 kept;", "1 dropped: the text is empty (first at", "data.jsonl:3)",
                  "1 (25.0%) records that are exact duplicates of earlier ones", "2 (50.0%) longer than data.seq_len and cut",
                  "1 (25.0%) of them cut within an answer", "1 (25.0%) left out: no supervised token", "v.jsonl: 1 record, 1 kept",
                  "val: 1 sequence in 1 packed sequence of 64", "steps: 1 per epoch, of 4 packed sequences each (the last one 2)"):
        assert words in stderr, stderr


@pytest.mark.parametrize("devices", [1, 2])
def test_several_processes_do_not_wait_in_a_collective_for_the_tokens(devices, jsonl, tokenizer_folder, tmp_path):
    """Lightning keeps all ranks in a barrier around `prepare_data`; in `setup` they poll the disk."""
    from lit_llm.training.trainer import Trainer

    data = TextDataModule([Source(jsonl([talk(1), talk(2)]))], tokenizer=str(tokenizer_folder), cache_dir=str(tmp_path / "cache"))
    data.trainer = Trainer(accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto",
                           default_root_dir=str(tmp_path / "run"))
    data.prepare_data()
    assert (tmp_path / "cache").exists() == (devices == 1)
    data.setup("fit")
    assert (tmp_path / "cache").exists()
