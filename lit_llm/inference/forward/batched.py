"""Compute all requests of a step in one pass, and long prompts in parts, so that they never stop the others."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_llm.inference.forward.adapters import Adapters, Span
from lit_llm.inference.forward.ragged import Part, Step
from lit_llm.inference.forward.request import Answer, Request
from lit_llm.inference.forward.slots import COPIED, Slots

CHUNK, ON_GPU = 256, 4                              # tokens of prompts that are read in a step, times 4 on a GPU
AHEAD = 64                                          # positions for an answer that a new request gets at first


class Batched:
    """Reads the new tokens of all requests in one pass.

    Args:
        model: A causal LM that passed `proof.shares_a_pass`.
        cache_tokens: Tokens whose keys and values are kept, of all requests together.
        context_length: Tokens of a request at most.
        adapters: Those that requests may name.
    """

    def __init__(self, model: Any, cache_tokens: int, context_length: int, adapters: Adapters) -> None:
        self.model, self.adapters = model, adapters
        self.slots = Slots(cache_tokens, context_length)
        self.reused_tokens = 0                      # of prompts, which an earlier request began with
        self._preempted: list[Request] = []
        self._failed: list[tuple[Request, Exception]] = []      # for which there was no memory

    def begin(self, request: Request) -> bool:
        """Admit a request if there is room for its prompt; tokens that a slot still contains are reused."""
        # The logits of reused tokens are not computed.
        reusable_ids = [] if request.needs_all_logits else request.ids
        try:
            slot = self.slots.begin(reusable_ids, len(request.ids) + min(request.left, AHEAD), request.adapter)
        except RuntimeError as error:               # out of memory: it ends with this error in the next step
            self._failed.append((request, error))
            return True
        request.state = slot
        if slot is None:
            return False
        self.reused_tokens += len(slot.ids)
        return True

    @property
    def cached_tokens(self) -> int:
        """Tokens of running requests whose keys and values are kept."""
        return sum(len(slot.ids) for pool in self.slots.pools for slot in pool.slots[:pool.busy])

    def is_read(self, request: Request, running: Iterable[Request]) -> bool:
        """Whether another request is reading the same prompt now: its keys and values are copied when it has."""
        return not request.needs_all_logits and len(request.ids) > COPIED and any(
            other.state is not None and not other.state.generates and other.ids == request.ids
            and other.adapter == request.adapter for other in running)

    def end(self, request: Request, *, broken: bool = False) -> None:
        """Take the slot of a request; its tokens stay for prompts that begin alike, unless they are `broken`."""
        if request.state is not None:
            slot, request.state = request.state, None
            slot.pool.end(slot)
            if broken:
                slot.clear()

    def preempted(self) -> list[Request]:
        """Requests that gave their slots to others in the last step and must begin again, the oldest first."""
        taken, self._preempted = self._preempted, []
        return taken

    def advance(self, running: Sequence[Request]) -> list[Answer]:
        """Read one token of every request that generates, and parts of prompts within the step's budget.

        Args:
            running: In order of arrival. Where there is no room for a token, the last of them gives its slot.

        Returns:
            Answers of the requests of which all tokens are read.
        """
        chosen = self._chosen(list(running))
        generating = [Part(request.state, part) for request, part in chosen if request.state.generates]
        reading = [Part(request.state, part, request.needs_all_logits) for request, part in chosen
                   if not request.state.generates]
        by_request = dict(self._logits(generating, reading))
        answers = [Answer(request, None, error) for request, error in self._failed]
        self._failed.clear()
        for request, part in chosen:                # before any slot changes its place, which copies these tokens
            logits = by_request[id(request.state)]
            if isinstance(logits, Exception):
                continue
            if logits.dim() > 1:
                request.take(len(request.state.ids), logits)
                by_request[id(request.state)] = logits[-1]
            request.state.ids += part
        for request, _ in chosen:
            logits = by_request[id(request.state)]
            if isinstance(logits, Exception):
                answers.append(Answer(request, None, logits))
            elif len(request.state.ids) == len(request.ids):
                answers.append(Answer(request, logits))
                if not request.state.generates:
                    request.state.pool.finish_reading(request.state)
        return answers

    def _chosen(self, running: list[Request]) -> list[tuple[Request, list[int]]]:
        """Requests of this step with the tokens that they read, each with room for them."""
        budget = CHUNK * (1 if self.model.device.type == "cpu" else ON_GPU)
        chosen = []
        for request in list(running):
            if request.state is None:               # it gave its slot to an older one in this step
                continue
            read = len(request.state.ids)
            part = request.ids[read:] if request.state.generates else request.ids[read:read + budget]
            budget -= 0 if request.state.generates else len(part)
            if part and self._has_room(request, read + len(part), running):
                chosen.append((request, part))
        return [(request, part) for request, part in chosen if request.state is not None]

    def _has_room(self, request: Request, room: int, running: list[Request]) -> bool:
        while not self._grows(request, room):
            if any(request is failed for failed, _ in self._failed):
                return False
            last = next(other for other in reversed(running) if other.state is not None)
            self.end(last)
            self._preempted.insert(0, last)
            if last is request:
                return False
        return True

    def _grows(self, request: Request, room: int) -> bool:
        try:
            return self.slots.grow(request.state, room)
        except RuntimeError as error:               # out of memory
            self._failed.append((request, error))
            return False

    def _logits(self, generating: list[Part], reading: list[Part]) -> Iterator[tuple[int, Tensor | Exception]]:
        """The logits of each part, by the identity of its slot; one by one if the pass of all fails."""
        if not generating and not reading:
            return
        try:
            yield from self._pass(generating, reading)
            return
        except Exception:                           # out of memory, for one
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        for part in (*generating, *reading):
            try:
                yield from self._pass([], [part])
            except Exception as error:
                yield id(part.slot), error

    def _pass(self, generating: list[Part], reading: list[Part]) -> list[tuple[int, Tensor]]:
        step = Step(generating, reading, self.model.device)
        spans = (Span(part.slot.adapter, len(part.ids), len(part.ids) if part.every else 1) for part in step.parts)
        with self.adapters.applied(spans, self.model.device):
            return [(id(part.slot), logits) for part, logits in zip(step.parts, step.logits(self.model), strict=True)]
