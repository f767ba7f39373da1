"""Find keys of `model.init` that its architecture accepts but never uses.

Configs of transformers have keys that no forward pass uses, such as Llama's `pretraining_tp`. A key is reported if
neither its absence nor any other value changes the rest of the config or a small model of it: the shapes and first
values of its weights, and its logits in training and evaluation, in float32 and in bfloat16.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from lit_llm.models import load as models
from lit_llm.models import miniature
from lit_llm.training.checks.proof import documents, perturb

log = logging.getLogger(__name__)
OVERRULED = ("dtype", "torch_dtype")                # overridden by trainer.precision
ELSEWHERE = re.compile(r"_token_id$|_token_index$|^max_position_embeddings$|router|aux_loss")  # used outside of logits
LARGE = 5_000_000                                   # limit on parameters of tried models


def unread(init: dict[str, Any], **defaults: Any) -> list[str]:
    """Keys that have no effect on a model of this architecture.

    Args:
        init: As in `load.init_causal_lm`, which accepts it.
        defaults: As there.
    """
    keys = {key: value for key, value in init.items() if key != "model_type"}
    tried = [key for key, value in keys.items() if isinstance(value, bool | int | float | str | None)
             and not ELSEWHERE.search(key)]
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        trial = _Trial(str(init["model_type"]), defaults, keys)
        return [key for key in tried if key in OVERRULED or (trial.base is not None and trial.is_dead(key))]


def warn(init: dict[str, Any], **defaults: Any) -> None:
    """Warn about keys without effect. Complete published configs contain some, so they are no error.

    Args:
        init: As in `unread`.
        defaults: As there.
    """
    if names := unread(init, **defaults):
        log.warning("model.init: %s does not use %s: no value of %s changes this model", init["model_type"],
                    ", ".join(f"'{name}'" for name in names), "it" if len(names) == 1 else "them")


class _Trial:
    """A small model of a config, compared with models that have another value of a key."""

    def __init__(self, kind: str, defaults: dict[str, Any], keys: dict[str, Any]) -> None:
        self.defaults, self.keys = defaults, keys
        self.like = models.skeleton(None, {"model_type": kind, **keys}, **defaults)
        self.config = self._whole(keys)
        self.way, self.small, self.base = self._first()

    def _first(self) -> tuple[int, Any, dict[str, Tensor] | None]:
        """The first small config that can be built, with its index and its values for comparison."""
        for way, small in enumerate(self._candidates(self.config)):
            with suppress(Exception):               # architectures raise errors of many types
                return way, small, _evidence(self.like, small)
        return 0, None, None

    def is_dead(self, key: str) -> bool:
        """Whether the model is the same without the key and with other values."""
        name = self.config.attribute_map.get(key, key)
        try:
            absent = self._whole({other: value for other, value in self.keys.items() if other != key})
        except Exception:                           # other keys need it
            return False
        taken = getattr(self.config, name, None)
        if taken == self.keys[key] == getattr(absent, name, None):
            return False                            # the value is the default
        if taken != self.keys[key] and absent.to_dict() == self.config.to_dict():
            return True                             # the config drops it
        try:
            return not (any(map(self._differs, self._changed(key, name, absent)))
                        or any(self._shapes(other) != self._shapes(self.config) for other in self._wholes(key, absent)))
        except Exception:                           # a refused value was read
            return False

    def _changed(self, key: str, name: str, absent: object) -> Iterator[Any]:
        """Small configs with other values of a key.

        Raises:
            LookupError: The rest of a config changed with it.
        """
        rest = _without(self.config, name)
        for other in self._wholes(key, absent):
            if _without(other, name) != rest:
                raise LookupError(name)
        yield list(self._candidates(absent))[self.way]
        facts = self.small.to_dict()
        for value in _others(facts.get(name, self.keys[key])):
            yield type(self.config).from_dict({**facts, name: value})

    def _differs(self, small: object) -> bool:
        reference, values = self.base or {}, _evidence(self.like, small)
        return reference.keys() != values.keys() or any(
            not torch.equal(reference[name], values[name]) for name in reference)

    def _wholes(self, key: str, absent: object) -> Iterator[Any]:
        """The config without a key, and with other values."""
        yield absent
        yield from (self._whole({**self.keys, key: value}) for value in _others(self.keys[key]))

    def _shapes(self, config: object) -> list[Any]:
        """Parameter shapes at full size: a small model with one head, for example, hides how heads are shared."""
        with torch.device("meta"):
            return [(name, weight.shape) for name, weight in models.like(self.like, config, None).named_parameters()]

    def _whole(self, keys: dict[str, Any]) -> Any:
        return type(self.like.config)(**{**self.defaults, **keys})

    def _candidates(self, config: Any) -> Iterator[Any]:
        """Like `miniature.candidates`, with the config's own dropout."""
        for small in miniature.candidates(config, whole=False):
            for key, value in config.to_dict().items():
                if miniature.RANDOM.search(key) and isinstance(value, float):
                    setattr(small, key, value)
            yield small


def _without(config: Any, name: str) -> dict[str, Any]:
    return {key: value for key, value in config.to_dict().items() if key != name}


def _others(value: object) -> list[Any]:
    """Other values of the same kind."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [other for other in (2 * value, value // 2, value + 1) if other != value]
    if isinstance(value, float):
        return [value / 2, value * 2] if value else [0.25]
    return ["another"] if isinstance(value, str) else [1]


def _evidence(like: Any, config: Any) -> dict[str, Tensor]:
    """Weights, buffers and logits of a new model."""
    with torch.device("meta"):
        size = sum(weight.numel() for weight in models.like(like, config, None).parameters())
    if size > LARGE:
        raise OverflowError(size)
    torch.manual_seed(0)
    model = models.like(like, config, None)
    tensors = {name: weight.detach().clone() for name, weight in model.state_dict(keep_vars=False).items()}
    tensors |= {name: buffer.clone() for name, buffer in model.named_buffers()}
    perturb(model)
    ids = documents(model, 0)["input_ids"][:, :40]
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        for training in (True, False):
            torch.manual_seed(0)
            with torch.no_grad():
                tensors[f"logits {dtype} {training}"] = model.train(training)(input_ids=ids).logits
    return tensors
