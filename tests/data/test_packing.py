"""If this breaks: tokens are lost or trained on twice, or an answer is separated from its question."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_llm.data.rows.packing import best_fit, pack, split, whole
from lit_llm.errors import InputError

lengths_lists = st.lists(st.integers(1, 40), max_size=60)
capacities = st.integers(2, 16)


def documents(lengths):
    return np.array(lengths, dtype=np.int64), np.ones(len(lengths), dtype=bool)


def slow_best_fit(lengths, capacity):
    """The textbook algorithm: longest first, into the bin with the least remaining space. Returns the space of all bins, sorted."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
            rooms.append(min(fitting) - length)
        else:
            rooms.append(capacity - length)
    return sorted(rooms)


@given(lengths_lists, st.integers(40, 90))
def test_best_fit_is_the_textbook(lengths, capacity):
    row_of = best_fit(np.array(lengths, dtype=np.int64), capacity)
    filled = np.bincount(row_of, weights=lengths).astype(int) if lengths else []
    assert sorted(capacity - int(tokens) for tokens in filled) == slow_best_fit(lengths, capacity)


@given(lengths_lists, capacities)
def test_concat_is_the_stream_cut_every_seq_len(lengths, seq_len):
    stream = [(sequence, place) for sequence, length in enumerate(lengths) for place in range(length)]
    rows = pack(whole(np.array(lengths, dtype=np.int64)), seq_len=seq_len, packing="concat")
    got = [[(sequence, place) for sequence, start, stop in rows.row(number) for place in range(start, stop)]
           for number in range(len(rows))]
    assert got == [stream[at:at + seq_len] for at in range(0, len(stream), seq_len)]


@given(lengths_lists, capacities, st.sampled_from(["best_fit", "none"]))
def test_every_token_of_a_document_is_predicted_exactly_once(lengths, seq_len, packing):
    made = split(*documents(lengths), seq_len=seq_len)
    rows = pack(made.segments, seq_len=seq_len, packing=packing)
    predicted = sorted((sequence, place) for number in range(len(rows))
                       for sequence, start, stop in rows.row(number) for place in range(start + 1, stop))
    assert predicted == [(sequence, place) for sequence, length in enumerate(lengths) for place in range(1, length)]
    assert rows.lengths.max(initial=0) <= seq_len
    assert len(made.cut) == len(made.dropped) == 0


@given(lengths_lists, capacities)
def test_documents_that_fit_are_whole(lengths, seq_len):
    made = split(*documents(lengths), seq_len=seq_len).segments
    for sequence, start, stop in zip(made.sequence, made.start, made.stop, strict=True):
        assert lengths[sequence] > seq_len or (start, stop) == (0, lengths[sequence])


@given(lengths_lists, capacities)
def test_overlong_conversations_keep_their_head_or_go(lengths, seq_len):
    sizes, talk = np.array(lengths, dtype=np.int64), np.zeros(len(lengths), dtype=bool)
    long = [number for number, length in enumerate(lengths) if length > seq_len]
    cut, drop = (split(sizes, talk, seq_len=seq_len, overlong=policy) for policy in ("cut", "drop"))
    assert cut.cut.tolist() == drop.dropped.tolist() == long
    assert cut.segments.stop.tolist() == [min(length, seq_len) for length in lengths]
    assert drop.segments.sequence.tolist() == [number for number in range(len(lengths)) if number not in long]
    if long:
        with pytest.raises(InputError) as caught:
            split(sizes, talk, seq_len=seq_len, overlong="error")
        assert caught.value.where == str(long[0])


@given(lengths_lists)
def test_rows_know_their_supervised_tokens(lengths):
    made = pack(whole(np.array(lengths, dtype=np.int64)), seq_len=40, packing="best_fit")
    rows = made.counted(made.segments.sequence * 10 + 1)
    assert rows.supervised.tolist() == [sum(sequence * 10 + 1 for sequence, _, _ in rows.row(number))
                                        for number in range(len(rows))]


@given(lengths_lists, lengths_lists, st.data())
def test_rows_are_joined_and_taken_as_lists_are(first, second, draw):
    made = [pack(whole(np.array(lengths, dtype=np.int64)), seq_len=40, packing="best_fit") for lengths in (first, second)]
    both = [rows.counted(rows.segments.lengths - 1) for rows in made]
    listed = [(rows.row(number), rows.supervised[number]) for rows in both for number in range(len(rows))]
    joined = both[0] + both[1]
    assert [(joined.row(number), joined.supervised[number]) for number in range(len(joined))] == listed
    numbers = draw.draw(st.lists(st.integers(0, len(listed) - 1), max_size=9)) if listed else []
    taken = joined.take(np.array(numbers, dtype=np.int64))
    assert [(taken.row(place), taken.supervised[place]) for place in range(len(taken))] == [listed[at] for at in numbers]
    assert taken.segment_supervised.sum() == taken.supervised.sum()
