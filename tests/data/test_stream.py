"""If this breaks: a streaming run skips or repeats data, trains on other sequences when it is resumed or when the number of
processes changes, or stops without naming the bad record.
"""

import csv
import json
import multiprocessing
import re
from collections import Counter
from itertools import cycle, islice, pairwise

import datasets
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lit_llm.cli.main import main
from lit_llm.data.datamodule import TextDataModule
from lit_llm.data.records import readers, sources, textfile
from lit_llm.data.records.sources import Source
from lit_llm.data.rows import packing
from lit_llm.data.stream.chunks import Stream
from lit_llm.data.stream.feed import Feed
from lit_llm.data.stream.loader import StreamLoader
from lit_llm.data.tokens.encode import SourceEncoder
from lit_llm.data.tokens.prepare import prepare
from lit_llm.data.tokens.workers import Exchange
from lit_llm.errors import InputError
from lit_llm.text import cutting

SEQ_LEN = 24
DEFAULTS = {"train_on": "assistant", "seq_len": SEQ_LEN, "packing": "best_fit", "overlong": "cut", "seed": 1,
            "buffer": 150}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Conversations and documents in JSON lines, in three files; documents between separators, some of them long."""
    folder = tmp_path_factory.mktemp("corpus")
    records = [{"prompt": f"q{number}", "completion": f"a{number}" * (1 + number % 5)} for number in range(13)]
    records += [{"text": " ".join(f"{number}{place:x}" for place in range(1 + number % 11))} for number in range(100, 117)]
    for part in range(3):
        lines = "".join(json.dumps(record) + "\n" for record in records[part::3])
        (folder / f"part{part}.jsonl").write_text(lines)
    words = [" ".join(f"w{number}{place}" for place in range(size)) for number, size in enumerate([3, 60, 1, 90, 7])]
    (folder / "text.txt").write_text("\n<|endoftext|>\n".join(words))
    return folder


def stream(tokenizer, *paths, **options):
    options = DEFAULTS | options
    train_on = options.pop("train_on")
    return Stream([SourceEncoder(path if isinstance(path, Source) else Source(str(path)), tokenizer, train_on)
                   for path in paths], **options)


def loader(tokenizer, *paths, batch_size=2, steps=5, rank=0, world=1, accumulate=1, **options):
    return StreamLoader(stream(tokenizer, *paths, rank=rank, world=world, **options), steps=steps, pad_id=0,
                        batch_size=batch_size, token_bytes=tokenizer.token_bytes, rank=rank, world=world,
                        accumulate=accumulate, identity={"seed": options.get("seed", 1)})


def rows_in(batch):
    """The content of each packed sequence as hashable values."""
    return [(tuple(ids), tuple(labels)) for ids, labels in
            zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)]


def everything(batch):
    return {name: value.tolist() if hasattr(value, "tolist") else value for name, value in batch.items()}


@pytest.fixture
def small_pieces(monkeypatch):
    """A text of some hundred characters is long here: read in blocks, cut into pieces."""
    monkeypatch.setattr(textfile, "BLOCK", 64)
    monkeypatch.setattr(readers, "LONG", 60)
    monkeypatch.setattr(cutting, "PIECE", 50)
    monkeypatch.setattr(cutting, "CONTEXT", 8)


# ---- content of an epoch ---------------------------------------------------------------------------------------------

def segments_of(tokenizer, source, tmp_path):
    """By record, its segments as the stored way makes them."""
    store = prepare(source, tokenizer, cache_dir=str(tmp_path))
    table = store.sequences
    split = packing.split(table["length"].astype(np.int64), table["kind"] == 1, seq_len=SEQ_LEN)
    records = {}
    for sequence, start, stop in zip(*(getattr(split.segments, name).tolist() for name in ("sequence", "start", "stop")),
                                     strict=True):
        part = slice(table["offset"][sequence] + start, table["offset"][sequence] + stop)
        supervised = store.marks[part] & 1
        if supervised[1:].any():
            segment = (tuple(store.tokens[part].tolist()), tuple(supervised[1:].tolist()))
            records.setdefault((int(table["file"][sequence]), int(table["number"][sequence])), []).append(segment)
    return list(records.values())


@pytest.mark.parametrize("name", ["*.jsonl", "text.txt"])
@pytest.mark.parametrize("buffer", [40, 333, 5000])
def test_each_record_comes_once_in_a_pass(tokenizer, files, tmp_path, small_pieces, name, buffer):
    """Whatever a chunk's size, and also where a document goes through several chunks."""
    source = Source(str(files / name))
    records = segments_of(tokenizer, source, tmp_path)
    seen, turn = Counter(), 0
    made = stream(tokenizer, source, buffer=buffer)
    for chunk in islice(made.chunks(made.beginning), 150):
        if not chunk.begin.remainder.open:
            drawn, turn = chunk.begin.cursors[0].drawn, chunk.begin.cursors[0].turn
            counts = [seen[record[0]] for record in records]            # each begins like no other
            assert set(counts) <= {turn, turn + 1}
            assert sum(counts) == drawn
            assert seen == Counter(segment for record, count in zip(records, counts, strict=True) for segment in record * count)
        if turn >= 3:
            return
        for number in chunk.order.tolist():
            for place in chunk.rows.row(number):
                ids, supervised = chunk.corpus.read(*place)
                seen[tuple(ids.tolist()), tuple(supervised[1:].astype(int).tolist())] += 1
    raise AssertionError("the corpus does not end")


@pytest.mark.parametrize("buffer", [40, 333, 5000])
def test_concat_is_the_corpus_cut_into_rows(tokenizer, files, tmp_path, small_pieces, buffer):
    source = Source(str(files / "text.txt"))
    store = prepare(source, tokenizer, cache_dir=str(tmp_path))
    flow = cycle(store.tokens.tolist())
    ends = set(np.cumsum(store.sequences["length"]).tolist())
    at = 0
    made = stream(tokenizer, source, packing="concat", buffer=buffer)
    for chunk in islice(made.chunks(made.beginning), 60):
        assert sorted(chunk.order.tolist()) == list(range(len(chunk.rows)))
        for number in range(len(chunk.rows)):
            lengths = []
            for place in chunk.rows.row(number):
                ids, supervised = chunk.corpus.read(*place)
                assert ids.tolist() == list(islice(flow, len(ids)))
                assert supervised.all()
                lengths.append(len(ids))
                at += len(ids)
                whole = at % len(store.tokens) or len(store.tokens)
                assert whole in ends or len(lengths) == len(chunk.rows.row(number)), "a document is cut within a packed sequence"
            assert sum(lengths) == SEQ_LEN
            assert chunk.rows.supervised[number] == SEQ_LEN - len(lengths)
    assert at > 2 * len(store.tokens)


def test_passes_and_seeds_have_orders_of_their_own(tokenizer, files):
    def order(seed):
        feed = Feed([SourceEncoder(Source(str(files / "*.jsonl")), tokenizer)], seed=seed)
        return [str(place) for _, (_, place) in islice(feed, 30 * 6)]
    first, other = order(1), order(2)
    assert order(1) == first != other
    passes = {tuple(first[at:at + 30]) for at in range(0, 180, 30)}
    assert len(passes) > 1
    assert len({frozenset(records) for records in passes}) == 1


def test_rows_are_shuffled_within_a_chunk(tokenizer, files):
    made = stream(tokenizer, files / "*.jsonl", buffer=2000)
    first, second = islice(made.chunks(made.beginning), 2)
    assert first.order.tolist() != list(range(len(first.rows)))
    assert first.order.tolist()[:9] != second.order.tolist()[:9]


# ---- mixtures --------------------------------------------------------------------------------------------------------

def test_weights_are_shares_and_the_ledger_is_what_was_drawn(tokenizer, files):
    sources = {"a.jsonl": ("apple", 3.0), "b.jsonl": ("bread", 1.0), "c.jsonl": ("cream", 0.5)}
    for name, (word, _) in sources.items():
        (files / name).write_text("".join(json.dumps({"text": f"{word} {number}"}) + "\n" for number in range(5)))
    listed = [Source(str(files / name), weight=weight) for name, (_, weight) in sources.items()]
    made = loader(tokenizer, *listed, steps=60, buffer=90)
    count = {source.path: Counter() for source in listed}
    for batch in made:
        bounds = batch["cu_seqlens"].tolist()
        for start, stop in pairwise(bounds):
            text = tokenizer.decode(batch["input_ids"].flatten()[start:stop].tolist(), skip_special_tokens=True)
            name = next((name for name, (word, _) in sources.items() if word in text), None)
            if name:
                supervised = int((batch["labels"].flatten()[start:stop] != -100).sum())
                count[str(files / name)] += Counter(sequences=1, tokens=supervised + 1, supervised=supervised)
    assert made.ledger == {path: dict(counts) for path, counts in count.items()}
    drawn = [counts["sequences"] for counts in made.ledger.values()]
    assert [round(number / sum(drawn), 1) for number in drawn] == [0.7, 0.2, 0.1]
    for chunk in islice(made.stream.chunks(made.stream.beginning), 20):
        numbers = np.array([cursor.drawn for cursor in chunk.begin.cursors])
        assert (abs(numbers - numbers.sum() * np.array([3, 1, 0.5]) / 4.5) <= 1).all()


# ---- processes -------------------------------------------------------------------------------------------------------

def steps(tokenizer, paths, world, accumulate, batch_size, **options):
    """For each step, the packed sequences of all its micro-batches on all ranks."""
    ranks = [loader(tokenizer, *paths, rank=rank, world=world, accumulate=accumulate, batch_size=batch_size, **options)
             for rank in range(world)]
    out = []
    for micros in zip(*ranks, strict=True):
        if not out or out[-1][1]:
            out.append(([], False, set(), []))
        rows, _, counts, real = out[-1]
        rows += [row for batch in micros for row in rows_in(batch)]
        counts |= {batch["num_supervised_in_step"] for batch in micros}
        real += [batch["num_supervised"] for batch in micros]
        out[-1] = (rows, micros[0]["last_in_step"], counts, real)
    assert all(counts == {sum(real)} for *_, counts, real in out)
    assert len({json.dumps(rank.state_dict()["cursors"]) + json.dumps(rank.ledger) for rank in ranks}) == 1
    return [rows for rows, *_ in out]


@pytest.mark.parametrize(("world", "accumulate", "batch_size"), [(2, 1, 4), (4, 1, 2), (1, 4, 2), (2, 2, 2)])
def test_the_order_does_not_depend_on_who_works(tokenizer, files, world, accumulate, batch_size):
    paths = [files / "*.jsonl", files / "text.txt"]
    assert steps(tokenizer, paths, world, accumulate, batch_size) == steps(tokenizer, paths, 1, 1, 8)


def test_nor_on_how_many_processes_tokenize(tokenizer, files):
    alone = [everything(batch) for batch in loader(tokenizer, files / "*.jsonl", files / "text.txt", steps=12)]
    helped = [everything(batch) for batch in
              loader(tokenizer, files / "*.jsonl", files / "text.txt", steps=12, num_proc=2)]
    assert alone == helped


def one_rank(rank, meeting, tokenizer, paths, bad, results):
    """A real process of two, which tokenizes only its share."""
    import torch.distributed as dist

    from lit_llm.data.stream import chunks as stream
    from lit_llm.text.tokenizer import Tokenizer

    stream.BLOCK_RECORDS, tokenizer = 4, Tokenizer.load(tokenizer)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    batches = loader(tokenizer, *paths, rank=rank, world=2, accumulate=2, share=Exchange(), buffer=900, steps=8)
    own = list(map(everything, batches))
    try:
        list(loader(tokenizer, bad, rank=rank, world=2, share=Exchange(), buffer=90_000))
    except InputError as error:
        results.put((rank, own, str(error)))
    dist.destroy_process_group()


def test_two_processes_share_the_work_and_stop_together(tokenizer, files, tmp_path, monkeypatch):
    """New processes, not forks: a test before may have left a process group in this one."""
    monkeypatch.setattr("lit_llm.data.stream.chunks.BLOCK_RECORDS", 4)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n' * 5 + "{broken\n" + '{"text": "fine"}\n' * 5)
    paths = [files / "*.jsonl", files / "text.txt"]
    folder = str(tmp_path / "tokenizer")
    tokenizer.save(folder)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=one_rank, args=(rank, tmp_path / "meeting", folder, paths, bad, results))
             for rank in range(2)]
    for rank in ranks:
        rank.start()
    came = {rank: (own, error) for rank, own, error in (results.get(timeout=60) for _ in ranks)}
    for rank in ranks:
        rank.join()
    for number in range(2):
        alone = loader(tokenizer, *paths, rank=number, world=2, accumulate=2, buffer=900, steps=8)
        assert came[number][0] == list(map(everything, alone))
        assert came[number][1].startswith(f"{bad}:6:2: not JSON")


# ---- resuming --------------------------------------------------------------------------------------------------------

@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(which=st.lists(st.sampled_from(["*.jsonl", "part1.jsonl", "text.txt"]), min_size=1, max_size=3, unique=True),
       buffer=st.integers(1, 700), accumulate=st.integers(1, 3), policy=st.sampled_from(["best_fit", "none", "concat"]),
       stopped=st.integers(1, 30))
def test_resumed_at_any_batch_the_very_next_row_comes(tokenizer, files, small_pieces, which, buffer, accumulate, policy,
                                                      stopped):
    paths = [files / name for name in which]
    options = {"buffer": buffer, "accumulate": accumulate, "packing": policy, "train_on": "all"}
    whole = loader(tokenizer, *paths, steps=33 // accumulate, **options)
    batches = list(map(everything, whole))
    stopped = min(stopped, len(batches) - 1)
    begun = loader(tokenizer, *paths, steps=40, **options)
    list(islice(begun, stopped))
    resumed = loader(tokenizer, *paths, steps=40, **options)
    resumed.load_state_dict(json.loads(json.dumps(begun.state_dict())))
    rest = list(islice(resumed, len(batches) - stopped))
    assert list(map(everything, rest)) == batches[stopped:]
    assert resumed.ledger == whole.ledger


def test_resuming_tokenizes_one_chunk_again_not_the_corpus(tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": f"number {number}"}) + "\n" for number in range(500)))
    begun = loader(tokenizer, path, steps=100)
    batches = [rows_in(batch) for batch in begun]
    begun = loader(tokenizer, path, steps=80)
    assert len(list(begun)) == 80
    tokenized = []
    encode = tokenizer.encode_pieces
    monkeypatch.setattr(tokenizer, "encode_pieces", lambda pieces: tokenized.extend(pieces) or encode(pieces))
    resumed = loader(tokenizer, path, steps=100)
    resumed.load_state_dict(begun.state_dict())
    assert rows_in(next(iter(resumed))) == batches[80]
    assert len(tokenized) < 40


def test_between_steps_the_rows_may_be_divided_anew(tokenizer, files):
    begun = loader(tokenizer, files / "*.jsonl", batch_size=4, steps=3)
    list(begun)
    state = begun.state_dict()
    rest = [row for batch in islice(begun, 3) for row in rows_in(batch)]
    ranks = [loader(tokenizer, files / "*.jsonl", batch_size=2, steps=3, world=2, rank=rank) for rank in range(2)]
    for rank in ranks:
        rank.load_state_dict(state)
    assert [row for pair in zip(*ranks, strict=True) for batch in pair for row in rows_in(batch)] == rest


@pytest.fixture
def module(tokenizer_folder, tmp_path):
    def make(*paths, **options):
        listed = [path if isinstance(path, Source) else Source(str(path)) for path in paths]
        options = {"seq_len": SEQ_LEN, "stream_buffer": 150, "cache_dir": str(tmp_path / "cache")} | options
        return TextDataModule(listed, tokenizer=str(tokenizer_folder), streaming=True, **options)
    return make


def test_a_checkpoint_of_other_data_or_settings_is_refused(module, files, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text((files / "part0.jsonl").read_text())
    state = module(path).train_dataloader().state_dict()
    module(path).train_dataloader().load_state_dict(state)
    for changed, message in (({"seq_len": 32}, "seq_len was 24 and is 32"), ({"seed": 5}, "seed was 0 and is 5"),
                             ({"packing": "none"}, "packing was best_fit and is none")):
        with pytest.raises(InputError, match=f"cannot continue.*{message}"):
            module(path, **changed).train_dataloader().load_state_dict(state)
    with pytest.raises(InputError, match="the settings of"):
        module(Source(str(path), weight=2.0)).train_dataloader().load_state_dict(state)
    path.write_text(path.read_text().replace("q", "Q"))                 # of equal size
    with pytest.raises(InputError, match=r"the data of sources\[0\] was 1 files of [\d,]+ bytes"):
        module(path).train_dataloader().load_state_dict(state)


# ---- what is read ----------------------------------------------------------------------------------------------------

def test_shards_of_a_streamed_table_are_parts(tokenizer, tmp_path, monkeypatch):
    """As those of a hub dataset, which `datasets` streams in the same way."""
    for shard in range(3):
        rows = datasets.Dataset.from_dict({"text": [f"shard {shard} row {row}" for row in range(4)]})
        rows.to_parquet(str(tmp_path / f"{shard}.parquet"))
    table = datasets.load_dataset("parquet", data_files=str(tmp_path / "*.parquet"), split="train", streaming=True)
    texts_of_shards = [[record["text"] for record, _ in part()] for part in sources.shards(table, "owner/name")]
    assert sorted(map(sorted, texts_of_shards)) == [[f"shard {shard} row {row}" for row in range(4)] for shard in range(3)]
    monkeypatch.setattr(Source, "hub_dataset", lambda self, streaming: table)
    made = loader(tokenizer, Source("owner/name"), steps=20, batch_size=1)
    local = loader(tokenizer, tmp_path, steps=20, batch_size=1)         # the same files by their path
    assert [rows_in(batch) for batch in made] == [rows_in(batch) for batch in local]


@pytest.mark.parametrize("num_proc", [1, 2])
def test_a_bad_record_stops_with_its_line(module, tmp_path, num_proc):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n' * 3 + '{"txt": "?"}\n' + '{"text": "fine"}\n' * 3)
    with pytest.raises(InputError, match=rf"{path}:4: "):
        list(module(path, num_proc=num_proc).train_dataloader())


def test_bad_records_are_set_aside_once_and_counted(module, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n' * 30 + "{broken\n" + '{"text": "fine"}\n' * 30)
    made = module(path, on_bad_record="quarantine").train_dataloader()
    made.steps = 60
    assert len(list(made)) == 60
    (turns,) = made.passes
    assert turns >= 2
    (aside,) = (tmp_path / "cache").glob("stream-*/quarantine.jsonl")
    (line,) = map(json.loads, aside.read_text().splitlines())
    assert line["where"] == f"{path}:31:2"
    (cursor,) = made._at[0].cursors
    assert f" {turns + (cursor.record > 30)} bad records set aside" in "\n".join(made.summary_lines())
    strict = module(path, on_bad_record="quarantine", bad_record_limit=0.01).train_dataloader()
    strict.steps = 60
    with pytest.raises(InputError, match=r"1 of \d+ records are bad.*bad_record_limit(.|\n)*quarantine.jsonl"):
        list(strict)


@pytest.mark.parametrize(("lines", "says"), [
    ("", "the source has no record"), ('{"text": " "}\n' * 3, r"no record of \d+ could be kept: the text is empty"),
    ('{"prompt": "' + "long " * 9 + '", "completion": "x"}\n', "no sequence can be trained on")])
def test_a_source_that_gives_nothing_does_not_turn_for_ever(module, tmp_path, lines, says):
    path = tmp_path / "nothing.jsonl"
    path.write_text(lines)
    with pytest.raises(InputError, match=says):
        list(module(path, overlong="drop").train_dataloader())


@pytest.mark.parametrize(("options", "says"), [
    ({"val_fraction": 0.1}, "data.val_fraction: .*\n.*data.val_sources"), ({"dedup": True}, "data.dedup"),
    ({"stream_buffer": 0}, "data.stream_buffer")])
def test_what_a_stream_cannot_do_is_refused(module, files, options, says):
    with pytest.raises(InputError) as refused:
        module(files / "*.jsonl", **options).setup("fit")
    assert re.search(says, str(refused.value))


def test_inspection_uses_the_first_chunk(module, files, capsys):
    made = module(files / "*.jsonl", val_sources=[Source(str(files / "part0.jsonl"))])
    made.setup("fit")
    assert "below, its first 150 characters" in capsys.readouterr().err
    first = next(iter(made.train_dataloader().stream.chunks(made.train_dataloader().stream.beginning)))
    assert len(made.plans["train"].rows) == len(first.rows)
    assert len(made.plans["val"].rows)


# ---- a run -----------------------------------------------------------------------------------------------------------

def losses(folder):
    with open(folder / "metrics.csv", encoding="utf-8") as lines:
        return [float(line["train/loss"]) for line in csv.DictReader(lines) if line["train/loss"]]


def test_a_streaming_run_resumes_exactly(lit_llm, tiny_model, files, tmp_path, monkeypatch, capsys):
    """By one process, and by two that divide its steps anew."""
    monkeypatch.chdir(tmp_path)
    words = ["fit", "--model.base", tiny_model("llama"), "--data.sources", json.dumps([{"path": str(files / "*.jsonl")}]),
             "--data.val_sources", json.dumps([{"path": str(files / "part0.jsonl")}]), "--data.seq_len", "24",
             "--data.streaming", "true", "--data.stream_buffer", "150", "--trainer.max_steps", "4",
             "--trainer.accelerator", "cpu", "--trainer.accumulate_grad_batches", "2", "--trainer.log_every_n_steps", "1",
             "--trainer.callbacks", json.dumps([{"class_path": "lit_llm.training.run.checkpoint.StepCheckpoint",
                                                 "init_args": {"every_n_steps": 1, "keep_last": 9}}])]
    alone = [*words, "--data.batch_size", "2", "--trainer.devices", "1"]
    resume = ["--ckpt_path", "whole/checkpoints/step_2", "--trainer.default_root_dir"]
    main([*alone, "--trainer.default_root_dir", "whole"])
    ledger = json.loads((tmp_path / "whole/data.json").read_text())["ledger"]
    assert ledger[str(files / "*.jsonl")]["tokens"] > 0
    assert "drawn in training" in capsys.readouterr().out
    main([*alone, *resume, "resumed"])
    whole = losses(tmp_path / "whole")
    assert len(whole) == 4
    assert losses(tmp_path / "resumed") == whole[2:]
    two = lit_llm(*words, *resume, "two", "--data.batch_size", 1, "--trainer.devices", 2, "--trainer.strategy", "ddp", ranks=2)
    assert two.code == 0, two.err
    assert losses(tmp_path / "two") == pytest.approx(whole[2:], abs=2e-5)


def test_a_run_without_an_end_is_refused(tiny_model, files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["fit", "--model.base", tiny_model("llama"), "--data.sources", json.dumps([{"path": str(files / "*.jsonl")}]),
              "--data.streaming", "true", "--trainer.accelerator", "cpu"])
    assert "trainer.max_steps: a stream has no end" in capsys.readouterr().err
