"""Find out whether the requests of a model can share a pass: try it, and compare with the model's own attention.

There is no list of architectures. A model qualifies if the logits of prompts that are read side by side, in parts and
token by token, are those that it gives for each prompt alone.
"""

from typing import Any

import torch

from lit_llm.inference.forward.ragged import NAME, Part, Step, UnsupportedError, register
from lit_llm.inference.forward.slots import Slots
from lit_llm.models.adapters.adapter import has_virtual_tokens
from lit_llm.system.private import transformers as transformers_private

LENGTHS = (11, 7)                                   # tokens of the two prompts that are tried
LONGEST_WINDOW = 64                                 # a sliding window up to here is crossed by the first prompt
SCALED_BY_LENGTH = ("dynamic", "longrope")          # rotary positions that depend on the longest request of a pass


def obstacle(model: Any) -> str | None:
    """Why requests cannot be computed together; null if they can: the attention of the model is replaced then.

    Args:
        model: A causal LM in eval mode.
    """
    if has_virtual_tokens(model):
        return "its adapter adds virtual tokens before each request"
    before = transformers_private.attention_of(model.config)
    if before == NAME:                              # another engine had it
        before = "sdpa"
        model.set_attn_implementation(before)
    if not transformers_private.takes_other_attention(model):
        return "its layers do not let another attention in"
    if _is_scaled_by_length(model.config.to_dict()):
        return "its rotary positions depend on the longest request of a pass"
    try:
        if _agrees(model):
            return None
        reason = "its logits differ when prompts are read side by side"
    except UnsupportedError as error:
        reason = str(error)
    except Exception as error:                      # each architecture fails in its own way on what it does not know
        reason = f"a trial failed with {type(error).__name__}: {' '.join(str(error).split())[:120]}"
    model.set_attn_implementation(before)
    return reason


def is_causal(model: Any) -> bool:
    """Whether the logits after a token are the same with other tokens behind it, as generation needs it.

    Args:
        model: In eval mode.
    """
    ids = torch.arange(3, 11, device=model.device)[None] % model.config.get_text_config().vocab_size
    try:
        with torch.no_grad():
            whole, part = model(input_ids=ids).logits[0, :4].float(), model(input_ids=ids[:, :4]).logits[0].float()
        return bool((whole - part).norm() <= _tolerance(model) * part.norm())
    except Exception:                               # an architecture with inputs of its own: its first request tells
        return True


def _agrees(model: Any) -> bool:
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    lengths = list(LENGTHS)
    if isinstance(window, int) and window <= LONGEST_WINDOW:
        lengths[0] = window + 7
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, config.vocab_size, (length,), generator=draw).tolist() for length in lengths]
    with torch.no_grad():
        alone = [model(input_ids=torch.tensor([prompt], device=model.device)).logits[0].float() for prompt in prompts]
    model.set_attn_implementation(register())
    slots = Slots(0, max(lengths) + 1)
    places = [slots.begin(prompt, len(prompt)) for prompt in prompts]
    tolerance = _tolerance(model)
    windows: dict[int, int | None] = {}
    # The first prompt in three parts, the second in one; then a token of the second beside the last part of the first.
    for generating, reading in (([], [(0, 0, 3), (1, 0, 5)]), ([], [(1, 5, 6), (0, 3, lengths[0] - 1)]),
                                ([1], [(0, lengths[0] - 1, lengths[0])])):
        if generating:
            assert places[1] is not None
            places[1].pool.finish_reading(places[1])
        parts = [Part(_slot(places[at]), prompts[at][begin:end]) for at, begin, end in reading]
        rows = [Part(_slot(places[at]), prompts[at][-1:]) for at in generating]
        step = Step(rows, parts, model.device)
        for part, logits in zip(step.parts, step.logits(model), strict=True):
            which = places.index(part.slot)
            part.slot.ids += part.ids
            want = alone[which][len(part.slot.ids) - 1]
            if not (logits - want).norm() <= tolerance * want.norm():
                return False
        windows |= step.windows
    return _windows_agree(config, windows)


def _tolerance(model: Any) -> float:
    return 1e-3 if next(model.parameters()).dtype == torch.float32 else 0.1


def _slot(place: Any) -> Any:
    assert place is not None, "there is room for two short prompts"
    return place


def _windows_agree(config: Any, seen: dict[int, int | None]) -> bool:
    """Whether layers pass their sliding window, which has no effect on short prompts."""
    window = getattr(config, "sliding_window", None)
    if not isinstance(window, int) or getattr(config, "use_sliding_window", True) is False:
        return set(seen.values()) == {None}
    kinds = getattr(config, "layer_types", None)
    want = {number: window if kinds is None or kinds[number] == "sliding_attention" else None for number in seen}
    return seen == want


def _is_scaled_by_length(config: Any) -> bool:
    if isinstance(config, dict):
        return any((key in ("rope_type", "type") and value in SCALED_BY_LENGTH) or _is_scaled_by_length(value)
                   for key, value in config.items())
    return False


def bytes_a_token(model: Any) -> int:
    """Of the keys and values of a token in all layers, for a model that shares a pass.

    Args:
        model: Which `share_a_pass` has accepted.
    """
    assert transformers_private.attention_of(model.config) == NAME
    slots = Slots(0, 2)
    (slot,) = [slots.begin([0], 1)]
    Step([], [Part(_slot(slot), [0])], model.device).logits(model)
    return sum(state[0, :, 0].nbytes for pool in slots.pools for pair in pool.layers.values() for state in pair)
