"""If this breaks: a resumed run repeats or skips data, two processes train on other sequences than one, or labels are shifted."""

from itertools import islice

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lit_llm.data.records.sources import Source
from lit_llm.data.rows.loader import Corpus, RowLoader, collate
from lit_llm.data.rows.packing import pack, split
from lit_llm.data.tokens.prepare import prepare
from lit_llm.errors import InputError

SEQ_LEN, PAD = 24, 0


@pytest.fixture(scope="module")
def data(tokenizer, tmp_path_factory):
    """A corpus of conversations and long documents, its packed sequences, and the bytes of each token."""
    import json

    folder = tmp_path_factory.mktemp("corpus")
    talk = [{"prompt": "q" * (number % 5 + 1), "completion": "a" * (number % 7 + 1)} for number in range(13)]
    records = [*talk, *({"text": "x" * number} for number in range(1, 27))]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    store = prepare(Source(str(folder / "data.jsonl")), tokenizer, cache_dir=str(folder))
    corpus = Corpus([(store, np.arange(len(store)))])
    segments = split(corpus.lengths, corpus.is_document, seq_len=SEQ_LEN).segments
    rows = pack(segments[corpus.count(segments) > 0], seq_len=SEQ_LEN, packing="best_fit")
    return corpus, rows.counted(corpus.count(rows.segments)), tokenizer.token_bytes


def loader(data, **settings):
    corpus, rows, token_bytes = data
    settings = {"batch_size": 2, "seq_len": SEQ_LEN, "pad_id": PAD, "seed": 1} | settings
    return RowLoader(corpus, rows, token_bytes=token_bytes, **settings)


def rows_in(batch):
    """The content of each packed sequence as hashable values, without the padding of a rank that has none."""
    return [(tuple(ids), tuple(labels)) for ids, labels in
            zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True) if batch["num_tokens"]]


# ---- one batch -------------------------------------------------------------------------------------------------------

def slow_collate(corpus, rows, numbers, seq_len, token_bytes):
    """Token by token, from the store's own arrays."""
    out = {"input_ids": [], "labels": [], "position_ids": []}
    bounds, count, size = [], 0, 0
    for number in numbers:
        ids, labels, positions = [], [], []
        for sequence, start, stop in rows.row(number):
            bounds.append(len(out["input_ids"]) + len(ids))
            row = corpus.stores[0].sequences[sequence]
            for place in range(start, stop):
                token = int(corpus.stores[0].tokens[row["offset"] + place])
                is_supervised = place > start and bool(corpus.stores[0].marks[row["offset"] + place] & 1)
                ids.append(token)
                labels.append(token if is_supervised else -100)
                positions.append(place - start)
                count, size = count + is_supervised, size + is_supervised * int(token_bytes[0][token])
        if len(ids) < seq_len:
            bounds.append(len(out["input_ids"]) + len(ids))
            rest = seq_len - len(ids)
            ids, labels, positions = ids + [PAD] * rest, labels + [-100] * rest, positions + list(range(rest))
        for key, values in (("input_ids", ids), ("labels", labels), ("position_ids", positions)):
            out[key] += values
    return out, [*bounds, len(numbers) * seq_len], count, size


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_collate_is_the_slow_way(data, draw):
    corpus, rows, token_bytes = data
    numbers = draw.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=5))
    batch = collate(corpus, rows, numbers, seq_len=SEQ_LEN, pad_id=PAD, token_bytes=token_bytes)
    slow, bounds, count, size = slow_collate(corpus, rows, numbers, SEQ_LEN, token_bytes)
    for key, values in slow.items():
        assert batch[key].dtype == torch.int64
        assert batch[key].flatten().tolist() == values
    assert (batch["cu_seqlens"].dtype, batch["cu_seqlens"].tolist()) == (torch.int32, bounds)
    assert batch["max_seqlen"] == max(np.diff(bounds))
    assert (batch["num_supervised"], batch["num_bytes"]) == (count, size)


def test_labels_begin_anew_at_each_bound(data):
    for batch in loader(data):
        bounds = batch["cu_seqlens"][:-1].long()
        assert (batch["labels"].flatten()[bounds] == -100).all()
        assert (batch["position_ids"].flatten()[bounds] == 0).all()
        assert (batch["labels"][batch["labels"] != -100] == batch["input_ids"][batch["labels"] != -100]).all()


def test_trimmed_to_the_longest_row(data):
    for batch in loader(data, trim=True, batch_size=1):
        assert batch["input_ids"].shape[1] == max(batch["num_tokens"], 2)


# ---- the order -------------------------------------------------------------------------------------------------------

def steps(data, world, accumulate, batch_size, epochs=2):
    """For each step, the packed sequences of all micro-batches on all ranks, in the order in which they are drawn."""
    settings = {"world": world, "accumulate": accumulate, "batch_size": batch_size}
    ranks = [loader(data, rank=rank, **settings) for rank in range(world)]
    assert len({len(rank) for rank in ranks}) == 1
    out = []
    for _ in range(epochs):
        epoch = [list(rank) for rank in ranks]
        for step in range(0, len(epoch[0]), accumulate):
            micros = [rank[step + micro] for micro in range(accumulate) for rank in epoch]
            for name in ("num_supervised", "num_tokens"):
                assert {batch[f"{name}_in_step"] for batch in micros} == {sum(batch[name] for batch in micros)}
            idle = [[micros[at + rank]["idle"] for rank in range(world)] for at in range(0, len(micros), world)]
            assert idle == [[not any(b["num_supervised"] for b in micros[at:at + world])] * world
                            for at in range(0, len(micros), world)]
            assert idle == sorted(idle, reverse=True)       # the last one is not empty: gradients are reduced there
            assert [rank[step + micro]["last_in_step"] for micro in range(accumulate) for rank in epoch[:1]] == [
                False] * (accumulate - 1) + [True]
            out.append([row for batch in micros for row in rows_in(batch)])
    return out


@pytest.mark.parametrize(("world", "accumulate", "batch_size"), [(2, 1, 4), (4, 1, 2), (1, 4, 2), (2, 2, 2), (1, 8, 1)])
def test_the_order_does_not_depend_on_who_works(data, world, accumulate, batch_size):
    assert steps(data, world, accumulate, batch_size) == steps(data, 1, 1, 8)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(world=st.integers(1, 4), accumulate=st.integers(1, 3), batch_size=st.integers(1, 3), seed=st.integers(0, 9),
       epochs=st.floats(0, 2.5))
def test_any_division_resumes_anywhere_with_the_next_sequences(data, world, accumulate, batch_size, seed, epochs):
    """Against one process that takes a step at once and never stops."""
    division = {"world": world, "accumulate": accumulate, "batch_size": batch_size, "seed": seed}
    ranks = [loader(data, rank=rank, **division) for rank in range(world)]
    stopped = int(epochs * len(ranks[0]))
    state = ranks[0].state_dict() | {"batches": stopped}
    for rank in ranks:
        rank.load_state_dict(state)
    resumed = [list(rank) for rank in ranks]
    got = [row for micro in zip(*resumed, strict=True) for batch in micro for row in rows_in(batch)]
    whole = loader(data, batch_size=world * accumulate * batch_size, seed=seed)
    stream = [row for _ in range(4) for batch in whole for row in rows_in(batch)]
    begin = sum(len(rows_in(loader(data, rank=rank, **division).batch(number))) for number in range(stopped)
                for rank in range(world))
    assert got == stream[begin:begin + len(got)]
    if stopped % accumulate == 0:
        assert len(got) == len(stream) // 4
    assert [batch["last_in_step"] for batch in resumed[0]] == [
        number % accumulate == accumulate - 1 for number in range(stopped, stopped + len(resumed[0]))]


def test_an_epoch_is_every_row_once_and_nothing_else(data):
    corpus, rows, token_bytes = data
    every = collate(corpus, rows, range(len(rows)), seq_len=SEQ_LEN, pad_id=PAD, token_bytes=token_bytes)
    flat = [row for step in steps(data, 4, 2, 3, epochs=1) for row in step]
    assert sorted(flat) == sorted(rows_in(every))
    both = steps(data, 1, 1, 8)
    assert both[:len(both) // 2] != both[len(both) // 2:]


def test_what_does_not_exist_takes_neither_time_nor_memory(data):
    """A micro-batch is not filled up to `batch_size`; sequences without supervised tokens are left out."""
    corpus, rows, token_bytes = data
    batch, = loader(data, batch_size=10**12, world=2, rank=0)
    assert len(batch["input_ids"]) == len(rows)
    batch, = loader(data, batch_size=10**12, world=2, rank=1)
    assert (batch["input_ids"].shape, batch["num_supervised"], batch["idle"]) == ((1, 2), 0, False)
    apart = pack(split(corpus.lengths, corpus.is_document, seq_len=2).segments, seq_len=2, packing="none")
    apart = apart.counted(corpus.count(apart.segments))
    with_supervised = np.flatnonzero(apart.supervised)
    assert 0 < len(with_supervised) < len(apart)
    mixed = RowLoader(corpus, apart, token_bytes=token_bytes, batch_size=1, accumulate=4, seq_len=2, pad_id=PAD)
    shown = [row for batch in mixed for row in rows_in(batch)]
    every = collate(corpus, apart, with_supervised, seq_len=2, pad_id=PAD, token_bytes=token_bytes)
    assert sorted(shown) == sorted(rows_in(every))


# ---- resuming --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("accumulate", [1, 3])
def test_resumed_at_any_batch_the_very_next_one_comes(data, accumulate):
    whole = loader(data, accumulate=accumulate)
    length = len(whole)
    stream = [rows_in(batch) for _ in range(3) for batch in whole]
    for stopped in range(1, 2 * length + 1):
        first = loader(data, accumulate=accumulate)
        taken = 0
        while taken < stopped:
            for _batch in islice(first, min(length, stopped - taken)):
                taken += 1
        state = first.state_dict()
        assert state["epoch"] == stopped // length
        second = loader(data, accumulate=accumulate)
        second.load_state_dict(state)
        assert rows_in(next(iter(second))) == stream[stopped]


def test_the_state_is_the_same_on_all_ranks_and_fits_no_other_run(data):
    ranks = [loader(data, world=2, rank=rank, fingerprint="f") for rank in range(2)]
    for rank in ranks:
        list(islice(rank, 3))
    state = ranks[0].state_dict()
    assert state == ranks[1].state_dict()
    for changed in ({"batch_size": 4}, {"accumulate": 2}, {"world": 4}, {"seed": 9}, {"fingerprint": "g"}):
        with pytest.raises(InputError, match=r"cannot continue.* was .* and is "):
            loader(data, **{"world": 2, "fingerprint": "f"} | changed).load_state_dict(state)


@pytest.mark.parametrize(("before", "after"), [((2, 1, 6), (1, 4, 3)), ((1, 4, 3), (2, 2, 3)), ((4, 3, 1), (1, 1, 12))])
def test_between_two_steps_a_run_resumes_with_another_division(data, before, after):
    """Processes, micro-batches and batch size may change if a step has as many packed sequences."""
    def made(division, rank=0):
        world, accumulate, batch_size = division
        return loader(data, world=world, accumulate=accumulate, batch_size=batch_size, rank=rank)

    def step(division, state=None, done=0):
        rows = []
        for rank in range(division[0]):
            own = made(division, rank)
            if state:
                own.load_state_dict(state)
            rows += [row for batch in islice(own, done * division[1], (done + 1) * division[1]) for row in rows_in(batch)]
        return sorted(rows)

    stopped = made(before)
    list(islice(stopped, 2 * before[1]))
    assert step(after, stopped.state_dict()) == step(before, done=2)
    if before[1] > 1:
        list(islice(stopped, 1))
        with pytest.raises(InputError, match="accumulate_grad_batches was"):
            made(after).load_state_dict(stopped.state_dict())


def test_evaluation_always_begins_at_the_beginning(data):
    ordered = loader(data, shuffle=False)
    list(islice(ordered, 2))
    first = [rows_in(batch) for batch in ordered]
    assert first == [rows_in(batch) for batch in ordered]
    assert len(first) == len(ordered)


class Listener(L.LightningModule):
    """Writes down what it is shown."""

    def __init__(self, data, **settings):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.data, self.settings, self.seen = data, settings, []

    def training_step(self, batch, _):
        self.seen.append(rows_in(batch))
        return self.weight.sum() * 0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return loader(self.data, accumulate=self.trainer.accumulate_grad_batches, **self.settings)


class Save(L.Callback):
    """After each step, like a run's checkpoints: `trainer.save_checkpoint` after a fit that ended with an epoch
    would shift the accumulation window by one batch (Lightning 2.6.6)."""

    def on_train_batch_end(self, trainer, *_):
        if not trainer.fit_loop._should_accumulate():
            trainer.save_checkpoint(f"{trainer.default_root_dir}/{trainer.global_step}.ckpt")


def fit(module, folder, *, steps, resume=None, **settings):
    trainer = L.Trainer(max_steps=steps, max_epochs=-1, accelerator="cpu", logger=False, enable_progress_bar=False,
                        enable_model_summary=False, enable_checkpointing=False, default_root_dir=folder,
                        accumulate_grad_batches=2, callbacks=Save(), **settings)
    trainer.fit(module, ckpt_path=resume)


@pytest.mark.parametrize("limit", [None, 4])
def test_lightning_resumes_inside_at_and_after_an_epoch(data, tmp_path, limit):
    """Also if `limit_train_batches` makes Lightning's epochs shorter than the loader's."""
    settings = {"limit_train_batches": limit} if limit else {}
    per_epoch = (limit or len(loader(data, accumulate=2))) // 2
    whole = Listener(data)
    fit(whole, tmp_path, steps=3 * per_epoch, **settings)
    uninterrupted = loader(data, accumulate=2)
    stream = [rows_in(batch) for _ in range(3) for batch in uninterrupted]
    assert whole.seen == stream[:len(whole.seen)]
    for stopped in (1, per_epoch, per_epoch + 1, 2 * per_epoch):
        begun = Listener(data)
        fit(begun, tmp_path, steps=stopped, **settings)
        resumed = Listener(data)
        fit(resumed, tmp_path, steps=3 * per_epoch, resume=tmp_path / f"{stopped}.ckpt", **settings)
        assert begun.seen + resumed.seen == whole.seen
