"""Add the adapters of a PEFT method to a causal language model, load them from a folder, and save them.

`peft_method.py` reads the method from a config or a folder, `trained_rows.py` handles embedding rows that are trained
beside adapters, and `merging.py` merges adapters into the model.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_llm import disk
from lit_llm.errors import InputError
from lit_llm.models import vocabulary
from lit_llm.models.adapters import patterns, tying
from lit_llm.models.adapters.peft_method import one_line, peft_config, stored_config
from lit_llm.models.adapters.trained_rows import embed, token_layers, with_bias
from lit_llm.system import config_limits
from lit_llm.system.private import torch as torch_private
from lit_llm.system.redaction import redact_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS = "adapter_model.safetensors"
ROWS = "vocabulary.json"                            # in an adapter folder: vocabulary size of a resized base



def wrap_peft(model: "PreTrainedModel", spec: dict[str, Any], *, tokens: Sequence[int] = (),
              elements: Callable[[nn.Parameter], int] = nn.Parameter.numel) -> Any:
    """Add a PEFT method's adapters to a model; the base is frozen, the adapters are trainable.

    With nearly every method the model initially computes the same as its base (FourierFT and C3A with
    `init_weights: true`; VB-LoRA and Uni-LoRA only approximately).

    Args:
        model: The base model.
        spec: `class_path` (a config class of peft, with or without the `peft.` prefix) and `init_args`, its keys.
        tokens: Ids whose rows of the embedding and the head are trained as well; needs a method without `row_obstacle`.
        elements: Gives the size of a weight that a strategy may have split.

    Raises:
        InputError: No such class or key, or the model has no such layer.
    """
    from peft import get_peft_model

    config = peft_config(spec)
    if tokens:
        config.trainable_token_indices = {name: sorted(tokens) for name in token_layers(model)}
    try:
        with _seeded_init(config), tying.explaining(model, config):
            wrapped = _adjusted(get_peft_model(model, config))
            if not any(weight.requires_grad and elements(weight) for weight in wrapped.parameters()):
                raise ValueError(f"{type(config).__name__} has nothing to train on these layers of this model")
            return wrapped
    except Exception as error:                      # forty methods raise errors of many types
        linears = sorted({name.rsplit(".", 1)[-1] for name, layer in model.named_modules() if _is_linear(layer)})
        raise InputError(f"{str(error).splitlines()[0][:160]}", where="model.peft",
                         fix=f"its linear layers: {', '.join(linears)}; all-linear selects all but the head") from None


@contextmanager
def _seeded_init(config: Any) -> Iterator[None]:
    """Seed fast PiSSA, which picks a part of the base at random, equally in training and at each load."""
    if not str(getattr(config, "init_lora_weights", "")).startswith("pissa_niter"):
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def _is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"


def _adjusted(model: nn.Module) -> Any:
    """Adjust a PEFT model: embed without copying the matrix, keep the head's bias, tie adapters that share a matrix."""
    from peft.tuners.lora.layer import ParamWrapper
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in model.named_modules():
        below, dora = getattr(layer, "base_layer", None), any(getattr(layer, "use_dora", {}).values())
        twice = isinstance(below, BaseTunerLayer) and not isinstance(layer, ParamWrapper)  # those of experts are nested
        if twice or (dora and hasattr(below, "token_adapter")):
            raise ValueError(f"{name.removeprefix('base_model.model.')} would be adapted twice: it and the embedding "
                             "share one matrix; name only one of them")
        if isinstance(layer, TrainableTokensLayer):
            if type(layer.base_layer) is nn.Embedding:
                layer.forward = MethodType(embed, layer)  # type: ignore[method-assign]
            elif isinstance(layer.base_layer, nn.Linear) and layer.base_layer.bias is not None:
                layer.forward = MethodType(with_bias, layer)  # type: ignore[method-assign]
    tying.tie(model)
    return model


def load_adapter(model: "PreTrainedModel", folder: str | Path, *, trainable: bool = False) -> Any:
    """Add the adapter in a folder in PEFT's format to a model.

    Raises:
        InputError: The folder has no safetensors file, lacks weights of adapters that its config names, or does not
            fit the model.
    """
    import warnings

    from peft import PeftModel

    folder = Path(folder)
    config = stored_config(folder)
    if not (folder / WEIGHTS).is_file():            # PEFT would unpickle adapter_model.bin, or query the hub
        raise InputError(f"{WEIGHTS} is missing; other weight formats are not loaded", where=str(folder))
    patterns.check(config.to_dict(), [name for name, _ in model.named_modules()], str(folder))
    try:
        if (count := stored_rows(folder)) is not None:
            vocabulary.grow(model, count)
        _check_finite(folder / WEIGHTS)
        with (_seeded_init(config), tying.explaining(model, config, say=False), warnings.catch_warnings(),
              config_limits.building(str(folder), most=_most_parameters(model, folder))):
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return _adjusted(PeftModel.from_pretrained(model, str(folder), is_trainable=trainable))
    except UserWarning as error:
        raise InputError(f"weights that its config names are missing: {str(error).partition(': ')[2][:160]}",
                         where=str(folder), fix="copy the adapter's folder again, or train it again") from None
    except (InputError, MemoryError):
        raise
    except Exception as error:                      # untrusted files, and forty methods
        raise InputError(f"the adapter does not fit this model: {one_line(error)}", where=str(folder),
                         fix="use it with the base that it was trained on, or copy its folder again") from None


def stored_rows(folder: Path) -> int | None:
    """Vocabulary size of the base that an adapter was trained on, if training had resized it."""
    file = folder / ROWS
    return int(json.loads(file.read_text(encoding="utf-8"))["rows"]) if file.is_file() else None


def _most_parameters(model: nn.Module, folder: Path) -> int:
    """Limit on an adapter's parameters: those of the base plus those in the file."""
    base = sum(weight.numel() for weight in model.parameters())
    size: int = (folder / WEIGHTS).stat().st_size
    return config_limits.SPARE + base + config_limits.PER_BYTE * size


def _check_finite(file: Path) -> None:
    """Refuse weights that are not finite: such a model only produces nonsense."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        names = tensors.keys()
        for name in names:
            weight = tensors.get_tensor(name)
            if weight.is_floating_point() and not torch.isfinite(weight).all():
                raise InputError(f"{name} contains values that are not finite", where=str(file),
                                 fix="copy the adapter's folder again, or train it again")


def skip_input_copies(model: nn.Module) -> None:
    """Let LoRA compute on its inputs without casting them to float32 first, where autocast converts them anyway.

    PEFT makes a float32 copy of every adapted layer's input because its weights are float32; autocast then makes a
    bfloat16 copy of that copy. The results are the same without. DoRA depends on that dtype and is not changed.
    """
    from peft.tuners.lora import LoraLayer

    for layer in model.modules():
        if isinstance(layer, LoraLayer) and not any(getattr(layer, "use_dora", {}).values()):
            layer.cast_input_dtype_enabled = False


def adapted_layers(model: nn.Module) -> dict[str, tuple[Any, bool]]:
    """Layers that an adapter changes, by their name in the base, and whether by LoRA's two matrices alone."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    layers: dict[str, Any] = {name.removeprefix("base_model.model."): layer for name, layer in model.named_modules()
                              if isinstance(layer, BaseTunerLayer | AuxiliaryTrainingWrapper)}
    return {name: (layer, isinstance(layer, LoraLayer) and not layer.lora_variant
                   and isinstance(layer.get_base_layer(), nn.Linear)
                   and all(part.bias is None for part in layer.lora_B.values())) for name, layer in layers.items()}


def is_peft(model: nn.Module) -> bool:
    """Whether the model has PEFT adapters."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def has_virtual_tokens(model: Any) -> bool:
    """Whether the PEFT method adds virtual tokens before each conversation (prompt and prefix tuning)."""
    return is_peft(model) and bool(model.active_peft_config.is_prompt_learning)


def save_adapter(model: Any, folder: str | Path, state: dict[str, Tensor], base: str) -> None:
    """Write adapter weights and config in PEFT's format.

    Args:
        model: The PEFT model, which provides the config.
        folder: Created if it does not exist.
        state: Trainable weights by their name in `model`, on CPU.
        base: Path or hub id of the base model, stored in the config.
    """
    import warnings

    from peft.utils.save_and_load import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")    # the state has no base weights
        adapter = get_peft_model_state_dict(model, state_dict=_under_all_names(model, state))
    save_file({name: weight.clone().contiguous() for name, weight in adapter.items()},
              folder / WEIGHTS)
    disk.share(folder)
    config = model.active_peft_config.to_dict() | {"base_model_name_or_path": base, "inference_mode": True}
    if not isinstance(config.get("target_modules"), str | None):        # PEFT removes tied heads from it
        tied = getattr(model.active_peft_config, "target_modules_to_tie", None) or ()
        config["target_modules"] = {*config["target_modules"], *tied}
    text = json.dumps(config, indent=2, sort_keys=True,
                      default=lambda value: sorted(value) if isinstance(value, set) else str(value))
    (folder / "adapter_config.json").write_text(redact_text(text) + "\n", encoding="utf-8")
    inner = model.get_base_model()
    if getattr(inner, "new_rows", 0):               # a loader must resize the base to the same size
        (folder / ROWS).write_text(json.dumps({"rows": inner.all_rows}) + "\n", encoding="utf-8")


def _under_all_names(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under each of their names (VB-LoRA shares one bank), together with the frozen parts of adapters.

    VeRA's buffers and one of MiCA's two matrices are frozen. Only one rank calls this, so it does not call the model's
    `state_dict()`: with FSDP2 that would shard weights that are still unsharded on other ranks, and the ranks would
    gather different weights in the next step.
    """
    named = list(model.named_parameters(remove_duplicate=False))
    state_by_id = {id(weight): state[name] for name, weight in named if name in state}
    prefix = getattr(model.base_model, "prefix", None)
    frozen = {name: weight.detach().cpu() for name, weight in named
              if prefix and prefix in name and not weight.requires_grad}
    for place, part in model.named_modules(remove_duplicate=False):
        frozen |= {f"{place}.{name}" if place else name: value.cpu()
                   for name, value in torch_private.persistent_buffers(part)}
    for name, matrix in tying.matrices(model):
        owner = next(key for key, weight in named if weight is matrix.source[0][matrix.source[1]])
        frozen[f"{name}.weight"] = state[owner].t()
    return frozen | state | {name: state_by_id[id(weight)] for name, weight in named if id(weight) in state_by_id}
