"""If this breaks: a source is drawn more or less often than its weight says, the mixture report is wrong, or training records
are used for validation.
"""

import json
import random
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lit_llm.data.datamodule import TextDataModule
from lit_llm.data.records.sources import Source
from lit_llm.data.rows.corpus import Corpus
from lit_llm.data.rows.loader import RowLoader
from lit_llm.data.rows.mixture import Mixture, side
from lit_llm.data.tokens.prepare import prepare

SEQ_LEN, PAD = 48, 0
LETTERS = "xyz"                                         # what the records of each source are made of


@pytest.fixture(scope="module")
def stores(tokenizer, tmp_path_factory):
    """Three sources, each with a letter of its own; the last is one document of many packed sequences."""
    folder = tmp_path_factory.mktemp("sources")
    talks = [[{"prompt": letter * (number % 9 + 1), "completion": letter * (number % 6 + 1)} for number in range(count)]
             for letter, count in (("x", 17), ("y", 10))]
    made = []
    for letter, records in zip(LETTERS, [*talks, [{"text": "w" + "z" * 751}]], strict=True):
        (folder / f"{letter}.jsonl").write_text("\n".join(map(json.dumps, records)))
        made.append(prepare(Source(str(folder / f"{letter}.jsonl")), tokenizer, cache_dir=str(folder)))
    return made


def mixed(stores, weights, **how):
    names = [store.report.source for store in stores]
    return Mixture(Corpus([(store, np.arange(len(store))) for store in stores], names=names), weights, seq_len=SEQ_LEN, **how)


def loaders(mixture, tokenizer, world=1, **how):
    how = {"batch_size": 2, "accumulate": 2} | how
    return [RowLoader(mixture.corpus, mixture.first, seq_len=SEQ_LEN, pad_id=PAD, token_bytes=tokenizer.token_bytes,
                      rank=rank, world=world, draw=mixture.rows if mixture.moves else None, **how)
            for rank in range(world)]


def counted(batches, tokenizer):
    """Sequences, tokens and supervised tokens of each source in batches, counted by letters.

    A section between two boundaries has one letter. Only the document's window with its w counts as a sequence.
    """
    conversations, supervised, tokens = Counter(), Counter(), Counter()
    letter_of = {tokenizer.encode_text(letter)[0]: letter for letter in LETTERS}
    for batch in batches:
        ids, labels = batch["input_ids"].flatten().tolist(), batch["labels"].flatten().tolist()
        bounds = batch["cu_seqlens"].tolist()
        for begin, end in pairwise(bounds):
            letters = {letter_of[id_] for id_ in ids[begin:end] if id_ in letter_of}
            if not letters:
                continue                                # padding
            (letter,) = letters
            conversations[letter] += letter != "z" or tokenizer.encode_text("w")[0] in ids[begin:end]
            tokens[letter] += end - begin
            supervised[letter] += sum(label != -100 for label in labels[begin:end])
    return conversations, tokens, supervised


# ---- weights ---------------------------------------------------------------------------------------------------------

def begun(rows, corpus):
    """How often the beginning of each sequence, or each window of the document, is in these packed sequences."""
    segments = rows.segments
    return Counter(zip(corpus.store_of[segments.sequence].tolist(), segments.sequence.tolist(), segments.start.tolist(),
                       strict=True))


@settings(max_examples=60, deadline=None)
@given(weights=st.tuples(*[st.sampled_from([0.25, 0.3, 1, 1.5, 2, 2.3])] * 3), seed=st.integers(0, 5),
       packing=st.sampled_from(["best_fit", "none"]))
@example(weights=(0.3, 0.25, 1), seed=0, packing="best_fit")
def test_a_weight_is_so_many_copies_and_a_part_that_moves_on(stores, weights, seed, packing):
    mixture = mixed(stores, weights, seed=seed, packing=packing)
    every = begun(mixed(stores, [1, 1, 1]).first, mixture.corpus)
    # packed again, a part may need one packed sequence too many; what is left out comes in another epoch
    total, epochs = Counter(), 12 if packing == "none" else 13
    for epoch in range(epochs):
        rows = mixture.rows(epoch)
        assert len(rows) == len(mixture.first)
        drawn = begun(rows, mixture.corpus)
        assert drawn.keys() <= every.keys()
        for piece in every:
            assert drawn[piece] >= int(weights[piece[0]])
        total += drawn
    assert total.keys() == every.keys(), "everything was drawn"
    first = begun(mixture.first, mixture.corpus)
    for number, weight in enumerate(weights):
        pieces = sum(count for (owner, *_), count in every.items() if owner == number)
        once = sum(count for (owner, *_), count in first.items() if owner == number)
        assert once == int(weight) * pieces + (max(1, round(weight % 1 * pieces)) if weight % 1 else 0)


def test_a_part_comes_again_only_after_all_the_others(stores):
    """A quarter of sixteen windows: four epochs see each once."""
    mixture = mixed(stores[2:], [0.25], packing="none")
    windows = [set(begun(mixture.rows(epoch), mixture.corpus)) for epoch in range(5)]
    assert len(windows[0]) * 4 == len(set().union(*windows[:4])) == sum(map(len, windows[:4]))
    assert windows[4] == windows[0]


def test_the_same_seed_draws_the_same_and_another_does_not(stores):
    corpus = mixed(stores, [1, 1, 1]).corpus
    draws = [[begun(mixed(stores, [0.5, 1, 0.25], seed=seed).rows(epoch), corpus)
              for epoch in range(3)] for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert draws[0][0] != draws[0][1]


@settings(max_examples=25, deadline=None)
@given(weights=st.sampled_from([(0.25,), (1.5,), (2,)]), seed=st.integers(0, 3))
def test_a_stream_of_documents_has_weights_too(stores, weights, seed):
    mixture = mixed(stores[2:], weights, packing="concat", seed=seed)
    for epoch in range(3):
        rows = mixture.rows(epoch)
        assert abs(rows.lengths.sum() - weights[0] * 753) <= SEQ_LEN
        assert (np.sort(rows.lengths)[2:] == SEQ_LEN).all()


# ---- the ledger ------------------------------------------------------------------------------------------------------

@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(weights=st.sampled_from([(0.25, 1, 2.5), (1, 1, 1), (1, 2, 1), (0.3, 0.5, 0.25)]), world=st.sampled_from([1, 2]),
       share=st.floats(0, 1))
def test_the_ledger_is_what_was_handed_out(stores, tokenizer, weights, world, share):
    """Counted in the batches themselves, over three epochs, also in the middle of one and of a step."""
    mixture = mixed(stores, weights)
    ranks = loaders(mixture, tokenizer, world)
    stop = round(share * 3 * len(ranks[0]))
    batches = []
    for rank in ranks:
        mine = []
        while len(mine) < stop:
            mine += islice(rank, min(len(rank), stop - len(mine)))
        batches += mine
    ledgers = [rank.ledger for rank in ranks]
    assert all(ledger == ledgers[0] for ledger in ledgers)
    conversations, tokens, supervised = counted(batches, tokenizer)
    for letter, (path, counts) in zip(LETTERS, ledgers[0].items(), strict=True):
        assert Path(path).name == f"{letter}.jsonl"
        assert counts == {"sequences": conversations[letter], "tokens": tokens[letter], "supervised": supervised[letter]}
    assert sum(counts["tokens"] for counts in ledgers[0].values()) == sum(batch["num_tokens"] for batch in batches)
    assert sum(counts["supervised"] for counts in ledgers[0].values()) == sum(batch["num_supervised"] for batch in batches)


def test_the_mixture_report_continues_after_a_resume(stores, tokenizer):
    mixture = mixed(stores, (0.25, 1, 2.5))
    (first,) = loaders(mixture, tokenizer)
    list(first)
    list(islice(first, 3))
    (second,) = loaders(mixed(stores, (0.25, 1, 2.5)), tokenizer)
    second.load_state_dict(first.state_dict())
    assert second.ledger == first.ledger
    list(islice(second, 2))
    assert second.ledger == first.drawn(len(first) + 5)


@pytest.mark.parametrize(("world", "accumulate", "batch_size"), [(2, 2, 2), (4, 1, 2), (1, 4, 2)])
def test_rotating_parts_are_the_same_in_every_process(stores, tokenizer, world, accumulate, batch_size):
    def steps(world, accumulate, batch_size):
        ranks = loaders(mixed(stores, (0.25, 1, 2.5)), tokenizer, world, accumulate=accumulate, batch_size=batch_size)
        out = []
        for number in range(3 * len(ranks[0])):
            out += [batch["input_ids"].tolist() for batch in (rank.batch(number) for rank in ranks) if batch["num_tokens"]]
        return [row for batch in out for row in batch]

    assert steps(world, accumulate, batch_size) == steps(1, 1, 8)


# ---- the split -------------------------------------------------------------------------------------------------------

hashes = st.lists(st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 2**63, 2**64 - 1]), max_size=30)
shares = st.floats(0, 0.999)


def sides(content, val, test):
    array = np.array(content, dtype=np.uint64)
    return {stage: side(array, stage, val_fraction=val, test_fraction=test) for stage in ("train", "val", "test")}


@given(hashes, shares, shares)
def test_sides_are_complete_and_apart(content, val, test):
    if val + test < 1:
        assert (sum(mask.astype(int) for mask in sides(content, val, test).values()) == 1).all()
        assert sides(content, 0.0, 0.0)["train"].all()


@given(hashes, hashes, shares, shares)
def test_more_records_move_no_other(content, more, val, test):
    before, after = sides(content, val, test), sides([*content, *more], val, test)
    for stage, mask in before.items():
        assert (after[stage][:len(content)] == mask).all()


@given(hashes, shares, shares, shares)
def test_a_share_moves_no_record_of_the_other(content, val, test, other):
    if max(val + test, val + other, test + other) < 1:
        assert (sides(content, val, test)["val"] == sides(content, val, other)["val"]).all()
        assert (sides(content, val, test)["test"] == sides(content, other, test)["test"]).all()
        low, high = sorted([test, other])
        assert (sides(content, val, low)["test"] <= sides(content, val, high)["test"]).all(), "a larger one only adds"


def test_shares_are_what_they_say(tokenizer_folder, jsonl):
    """On real hashes; and equal records are on one side."""
    records = [{"prompt": f"question {number}", "completion": "a"} for number in range(600)]
    data = TextDataModule([Source(jsonl([*records, *records[:99]]))], tokenizer=str(tokenizer_folder), seq_len=64,
                          val_fraction=0.2, test_fraction=0.3)
    data.prepare_data()
    data.setup()
    content_of_stage = {stage: plan.corpus.column("content").tolist() for stage, plan in data.plans.items()}
    assert sum(map(len, content_of_stage.values())) == 699
    assert not set(content_of_stage["train"]) & set(content_of_stage["val"]) | set(content_of_stage["val"]) & set(content_of_stage["test"])
    assert not set(content_of_stage["train"]) & set(content_of_stage["test"])
    assert abs(len(set(content_of_stage["val"])) - 120) < 40
    assert abs(len(set(content_of_stage["test"])) - 180) < 40


# ---- what a cut leaves -----------------------------------------------------------------------------------------------

def talks():
    """Conversations of all shapes: with and without a system turn, one or several turns, some answers not supervised."""
    draw = random.Random(7)
    for _ in range(50):
        turns = [{"role": "system", "content": "s" * draw.randint(1, 9)}] if draw.random() < 0.3 else []
        for _ in range(draw.randint(1, 4)):
            answer = {"role": "assistant", "content": "a" * draw.randint(1, 30)}
            if draw.random() < 0.3:
                answer |= draw.choice([{"train": False}, {"train": True}, {"weight": 0}, {"weight": 1}])
            turns += [{"role": "user", "content": "u" * draw.randint(1, 20)}, answer]
        if any(turn.get("train", turn.get("weight", True)) for turn in turns if turn["role"] == "assistant"):
            yield turns


def spelled(turns, train_on):
    """Tokens as strings, whether each is supervised, and whether it is of a supervised answer; ChatML by hand, one byte per token."""
    last = len(turns) - 1
    tokens, supervised, answers = [], [], []
    for place, turn in enumerate(turns):
        flag = turn.get("train", turn.get("weight"))
        wanted = turn["role"] == "assistant" and (bool(flag) if flag is not None else train_on != "last" or place == last)
        silent = turn["role"] == "assistant" and not wanted
        head = ["<|im_start|>", *turn["role"], "\n"]
        answer = [*turn["content"], "<|im_end|>"]
        tokens += [*head, *answer, "\n"]
        supervised += [train_on == "all"] * len(head) + [wanted or (train_on == "all" and not silent)] * len(answer) + [
            train_on == "all"]
        answers += [False] * len(head) + [wanted] * len(answer) + [False]
    return tokens, supervised, answers


@pytest.fixture(scope="module")
def spoken(tokenizer, tmp_path_factory):
    """For each `train_on`, its conversations by hand and their store."""
    folder, out = tmp_path_factory.mktemp("talks"), {}
    for train_on in ("assistant", "last", "all"):
        trainable = [turns for turns in talks() if any(spelled(turns, train_on)[1])]
        (folder / f"{train_on}.jsonl").write_text("\n".join(json.dumps({"messages": turns}) for turns in trainable))
        store = prepare(Source(str(folder / f"{train_on}.jsonl")), tokenizer, train_on=train_on, cache_dir=str(folder))
        out[train_on] = ([spelled(turns, train_on) for turns in trainable], store)
    return out


@settings(max_examples=60, deadline=None)
@given(seq_len=st.integers(2, 150), train_on=st.sampled_from(["assistant", "last", "all"]),
       overlong=st.sampled_from(["cut", "drop"]), packing=st.sampled_from(["best_fit", "none"]))
def test_cut_conversations_keep_their_supervised_beginning(spoken, tokenizer, seq_len, train_on, overlong, packing):
    """Batches against a slow cut of the conversations written by hand, and the counts with them."""
    by_hand, store = spoken[train_on]
    expected, notes = Counter(), Counter()
    for tokens, supervised, answers in by_hand:
        longer = len(tokens) > seq_len
        notes["dropped_overlong" if overlong == "drop" else "cut"] += longer
        if longer and overlong == "drop":
            continue
        labels = [token if flag else "" for token, flag in zip(tokens, supervised, strict=True)][:seq_len]
        labels[0] = ""
        if not any(labels):
            notes["dropped_nothing_left"] += 1
            continue
        expected[tuple(tokens[:seq_len]), tuple(labels)] += 1
        if longer:
            notes["cut_in_an_answer"] += answers[seq_len - 1] and answers[seq_len]
    if not expected:
        return
    mixture = Mixture(Corpus([(store, np.arange(len(store)))]), [1], seq_len=seq_len, overlong=overlong, packing=packing)
    assert +Counter(mixture.notes) == +notes
    (loader,) = [RowLoader(mixture.corpus, mixture.first, seq_len=seq_len, pad_id=PAD, batch_size=2,
                           token_bytes=tokenizer.token_bytes)]
    counts = Counter()
    spell = {tokenizer.encode_text(letter)[0]: letter for letter in map(chr, range(128))} | {
        id_: tokenizer.decode([id_], skip_special_tokens=False) for id_ in tokenizer.special_ids}
    for batch in loader:
        ids, labels = batch["input_ids"].flatten().tolist(), batch["labels"].flatten().tolist()
        for begin, end in pairwise(batch["cu_seqlens"].tolist()):
            if ids[begin] != PAD:
                counts[tuple(spell[id_] for id_ in ids[begin:end]),
                       tuple("" if label == -100 else spell[label] for label in labels[begin:end])] += 1
    assert counts == expected
