"""Convert an exception inside a PEFT layer to an error that names the method and the layer.

PEFT accepts some methods on layers that they cannot compute on, and fails later with a shape error: OLoRA on GPT-2's
Conv1D, for example, whose weight is transposed.
"""

from collections.abc import Generator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from torch import nn

from lit_llm.errors import InputError

MEMORY = ("memory", "alloc")                        # words of errors that are not caused by a method


@contextmanager
def explained(model: nn.Module, spec: dict[str, Any] | None) -> Generator[None, None, None]:
    """Context for a forward pass of a model with adapters.

    Args:
        model: The model with adapters.
        spec: The method, as in `model.peft`; null without adapters.

    Raises:
        InputError: A PEFT layer raised an exception.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        layer = _raised_by(error.__traceback__) if spec is not None else None
        if layer is None or any(word in f"{type(error).__name__} {error}".lower() for word in MEMORY):
            raise
        inner = getattr(layer, "base_layer", None)
        kind = type(inner if isinstance(inner, nn.Module) else layer).__name__
        name = next((name for name, module in model.named_modules() if module is layer), "a layer")
        options = (spec or {}).get("init_args") or {}
        init = options.get("init_lora_weights")
        method = str((spec or {}).get("class_path")).rpartition(".")[2]
        method += f" with init_lora_weights: {init}" if isinstance(init, str) else ""
        message = next(iter(str(error).splitlines()), type(error).__name__)[:160]
        raise InputError(f"{method} cannot compute on {name.removeprefix('base_model.model.')} ({kind}): PEFT fails "
                         f"there with: {message}", where="model.peft",
                         fix="name layers of another kind in target_modules, or use another method, such as plain "
                             "LoRA: --model.lora.r 16 --model.peft null") from None


def _raised_by(place: TracebackType | None) -> nn.Module | None:
    """The PEFT layer whose own code raised an exception, with only torch below it."""
    layer: nn.Module | None = None
    while place is not None:
        home, owner = str(place.tb_frame.f_globals.get("__name__")), place.tb_frame.f_locals.get("self")
        if home.startswith("peft."):
            if isinstance(owner, nn.Module) and type(owner).__module__.startswith("peft."):
                layer = owner
        elif home.partition(".")[0] not in ("torch", "deepspeed"):      # DeepSpeed replaces functions of torch
            layer = None                            # a layer below, or a caller above
        place = place.tb_next
    return layer
