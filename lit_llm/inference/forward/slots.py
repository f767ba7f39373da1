"""Keys and values of many requests in preallocated slots, so that one operation attends for all of them.

Slots of one size lie side by side in a `Pool`, one tensor of keys and one of values for each layer. Within a pool the
requests that generate come first, then those whose prompt is still being read, then slots without a request: attention
of all generating requests reads one contiguous part of the tensors. A slot without a request keeps its tokens, and a
new prompt that begins with the same tokens takes them over.

Shape suffixes: S slots, K key heads, L positions of a slot, D width of a head.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

SMALLEST = 128                                      # positions of the smallest slots; larger ones double
IDLE = 64                                           # slots without a request for which a pool is not enlarged
COPIED = 16                                         # fewer tokens than this are read again and not copied


class Slot:
    """The place of one request's keys and values.

    Args:
        pool: Its pool; a request that outgrows it moves to a larger one.
        index: Its index in the pool.
    """

    __slots__ = ("adapter", "ids", "index", "pool", "used")

    def __init__(self, pool: "Pool", index: int) -> None:
        self.pool, self.index = pool, index
        self.ids: list[int] = []                    # the tokens whose keys and values it contains
        self.adapter: str | None = None             # with which they were computed
        self.used = 0                               # when it was last given to a request, as a count

    @property
    def generates(self) -> bool:
        """Whether its request has read its prompt."""
        return self.index < self.pool.generating

    def clear(self) -> None:
        """Forget its tokens; numbers that are not finite would spoil the next request's attention."""
        self.ids = []
        for states in self.pool.layers.values():
            for state in states:
                state[self.index] = 0


class Pool:
    """Slots of one size.

    Args:
        room: Positions of each.
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self.slots: list[Slot] = []
        self.generating = self.reading = 0          # requests of each kind; the other slots have none
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}      # (S, K, L, D) keys and values

    @property
    def busy(self) -> int:
        """Slots that have a request."""
        return self.generating + self.reading

    @property
    def idle(self) -> list[Slot]:
        """Slots that have none."""
        return self.slots[self.busy:]

    def layer(self, number: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values of a layer, allocated like the first that are written to it.

        On a CPU they are float32 also of a model in half precision: for a single query, attention over bfloat16 took
        2.4 to 6 times as long.

        Args:
            number: Of the layer.
            key: (1, K, T, D), of any tokens.
            value: (1, K, T, E).
        """
        if number not in self.layers:
            self.layers[number] = tuple(                # type: ignore[assignment]
                state.new_zeros(len(self.slots), state.shape[1], self.room, state.shape[3],
                                dtype=_stored(state))
                for state in (key, value))
        return self.layers[number]

    def resize(self, count: int) -> None:
        """Add slots without a request, or drop those at the end, which have none.

        Raises:
            RuntimeError: There is no memory for more; the pool is as before.
        """
        assert count >= self.busy
        before = len(self.slots)
        try:
            for number, states in self.layers.items():
                self.layers[number] = tuple(_resized(state, count) for state in states)     # type: ignore[assignment]
        except RuntimeError:
            for number, (keys, values) in self.layers.items():      # of some layers the tensors have the new size
                self.layers[number] = keys[:min(before, count)], values[:min(before, count)]
            if count > before:
                raise
        del self.slots[count:]
        self.slots += [Slot(self, index) for index in range(len(self.slots), count)]

    def swap(self, slot: Slot, index: int) -> None:
        """Exchange the places of a slot and of the one at an index."""
        other = self.slots[index]
        if other is slot:
            return
        mine, others = len(slot.ids), len(other.ids)
        for states in self.layers.values():
            for state in states:
                one, two = state[slot.index], state[index]
                first_part = one[:, :mine].clone() if others else one[:, :mine]
                one[:, :others] = two[:, :others]
                two[:, :mine] = first_part
        self.slots[slot.index], self.slots[index] = other, slot
        slot.index, other.index = index, slot.index

    def begin(self, slot: Slot) -> None:
        """Give a slot to a request that reads its prompt."""
        self.swap(slot, self.busy)
        self.reading += 1

    def finish_reading(self, slot: Slot) -> None:
        """The request of a slot generates from now on."""
        self.swap(slot, self.generating)
        self.generating += 1
        self.reading -= 1

    def end(self, slot: Slot) -> None:
        """Take a slot from its request; its tokens stay."""
        if slot.generates:
            self.swap(slot, self.generating - 1)
            self.generating -= 1
            self.reading += 1
        self.swap(slot, self.busy - 1)
        self.reading -= 1


def _stored(state: Tensor) -> torch.dtype:
    return torch.promote_types(state.dtype, torch.float32) if state.device.type == "cpu" else state.dtype


def _resized(state: Tensor, count: int) -> Tensor:
    if count <= len(state):
        return state[:count].clone()
    return torch.cat([state, state.new_zeros(count - len(state), *state.shape[1:])])


class Slots:
    """The slots of all sizes, within a limit.

    Args:
        limit: Positions of all slots together; at least twice `largest`, so that one request can always grow.
        largest: Positions that a request may need.
    """

    def __init__(self, limit: int, largest: int) -> None:
        self.limit, self.largest = max(limit, 2 * largest), largest
        rooms: list[int] = []
        while not rooms or rooms[-1] < largest:
            rooms.append(min(largest, SMALLEST << len(rooms)))
        self.pools = [Pool(room) for room in rooms]
        self._count = 0

    @property
    def allocated(self) -> int:
        """Positions of all slots that there are."""
        return sum(pool.room * len(pool.slots) for pool in self.pools)

    def begin(self, ids: Sequence[int], room: int, adapter: str | None = None) -> Slot | None:
        """A slot for a new request, with the longest beginning of its prompt that a slot holds.

        A slot without a request is taken over if it holds little else; otherwise the tokens are copied.

        Args:
            ids: The prompt; its last token is always read, since it gives the first logits.
            room: Positions to have at first.
            adapter: Of the request; tokens that were read with another one are not its own.

        Returns:
            The slot, whose `ids` are the tokens taken over; null where there is no room before a request ends.

        Raises:
            RuntimeError: There is no memory for it; nothing has changed.
        """
        common = {slot: min(shared(slot.ids, ids), len(ids) - 1) if slot.adapter == adapter else 0
                  for slot in self._all()}
        wanted = self._pool_for(room)
        best = max(self._idle(), key=lambda slot: (common[slot], slot.pool is wanted), default=None)
        source = max(common, key=lambda slot: common[slot], default=None)
        count, most = (common[slot] if slot is not None else 0 for slot in (best, source))
        if best is not None and 0 < len(best.ids) <= 2 * count:     # otherwise the slot keeps more than it would save
            best.ids = best.ids[:count]
        elif (best := self._empty(wanted)) is None:
            return None
        if source is not None:
            self._copy(source, best, most)
        best.pool.begin(best)
        self._count += 1
        best.used, best.adapter = self._count, adapter
        return best

    def grow(self, slot: Slot, room: int) -> bool:
        """Move the request of a slot to a larger one if it needs more positions; false where there is no room.

        Raises:
            RuntimeError: There is no memory for the larger one; the request has its slot as before.
        """
        if room <= slot.pool.room:
            return True
        pool = self._pool_for(room)
        free_slot = self._empty(pool)
        if free_slot is None:
            return False
        old, index, generating = slot.pool, slot.index, slot.generates
        for number, states in old.layers.items():
            for state, new in zip(states, pool.layer(number, states[0][:1], states[1][:1]), strict=True):
                new[free_slot.index, :, :len(slot.ids)] = state[index, :, :len(slot.ids)]
        ids, place = slot.ids, free_slot.index
        old.end(slot)
        # The two slots swap roles, so that references to the request's slot stay valid.
        empty = Slot(old, slot.index)
        old.slots[slot.index] = empty
        slot.pool, slot.index, slot.ids = pool, place, ids
        pool.slots[place] = slot
        pool.begin(slot)
        if generating:
            pool.finish_reading(slot)
        return True

    def _copy(self, source: Slot, slot: Slot, end: int) -> None:
        """Copy the tokens of a slot up to `end` that another lacks, unless they are few or making room dropped them."""
        begin, end = len(slot.ids), min(end, slot.pool.room)
        if end - begin < COPIED or source not in source.pool.slots:
            return
        for number, states in source.pool.layers.items():
            for state, new in zip(states, slot.pool.layer(number, states[0][:1], states[1][:1]), strict=True):
                new[slot.index, :, begin:end] = state[source.index, :, begin:end]
        slot.ids += source.ids[begin:end]

    def _pool_for(self, room: int) -> Pool:
        return next(pool for pool in self.pools if pool.room >= min(room, self.largest))

    def _idle(self) -> Iterator[Slot]:
        for pool in self.pools:
            yield from pool.idle

    def _all(self) -> Iterator[Slot]:
        for pool in self.pools:
            yield from pool.slots

    def _empty(self, pool: Pool) -> Slot | None:
        """A slot of a pool that has no request, without its tokens; null if requests use all slots."""
        unused = next((slot for slot in pool.idle if not slot.ids), None)
        if unused is None and self._make_room(pool):
            unused = pool.slots[-1]
        free_slot = unused or min(pool.idle, key=lambda slot: slot.used, default=None)
        if free_slot is not None:
            free_slot.ids = []
        return free_slot

    def _make_room(self, pool: Pool) -> bool:
        """Add slots to a pool; others without a request are dropped for it if the limit is reached."""
        if len(pool.idle) >= IDLE:                  # enlarging copies all slots, which would stop running requests
            return False
        if self.limit - self.allocated < pool.room:
            if pool.idle:                           # one of its own is taken over instead
                return False
            for other in sorted(self.pools, key=lambda other_pool: -other_pool.room):
                if other.idle and self.limit - self.allocated < pool.room:
                    other.resize(other.busy)
        more = min((self.limit - self.allocated) // pool.room, max(1, len(pool.slots) // 2))
        if more < 1:
            return False
        try:
            pool.resize(len(pool.slots) + more)
        except RuntimeError:                        # out of memory, which other slots may give back
            for other in self.pools:
                if other is not pool:
                    other.resize(other.busy)
            pool.resize(len(pool.slots) + 1)
        return True


def shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences have in common from the beginning.

    >>> shared([1, 2, 3], [1, 2, 4, 5])
    2
    """
    low, high = 0, min(len(one), len(other))
    while low < high:                               # halving compares slices, which is much faster than token by token
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low
