"""A causal LM and a PEFT method in, the model with its adapters out: wrapped, loaded, saved.

The home of peft; `merging.py` makes a plain model of it again. A method is data (`class_path`, `init_args`), as it
stands in a config. Knows nothing of where models come from, of training or of Lightning.
"""

import json
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_llm import patterns, tying, vocabulary
from lit_llm.class_paths import refuse_within
from lit_llm.errors import InputError, did_you_mean
from lit_llm.redaction import redact_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Methods of peft that want more than tokens and labels: task numbers, other adapters, a second model.
NO_METHOD = ("base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision", "auto_mapping",
             "task_type")                           # of an adapter's config: where it is from, not what it is
WEIGHTS = "adapter_model.safetensors"
ROWS = "vocabulary.json"                            # in an adapter's folder: rows of a base that has grown
UNFIT = ("ArrowConfig", "CartridgeConfig", "CPTConfig", "MultitaskPromptTuningConfig", "PeftConfig", "PolyConfig",
         "PromptLearningConfig", "ShadowConfig", "XLoraConfig")


@dataclass(slots=True)
class LoRA:
    """Low-rank adapters (arXiv:2106.09685): the short form of `peft: {class_path: LoraConfig, ...}`.

    Args:
        r: Rank of the two matrices. 8 to 32 is usual; memory and capacity grow with it.
        alpha: Scale: the adapter's output is multiplied by alpha / r.
        dropout: Probability of dropping an adapter input, in training.
        target_modules: Names of the layers to adapt, or `all-linear`: every linear layer (GPT-2's Conv1D too) but the
            output head; adapting all of them learns most (arXiv:2305.14314 section 4).
        dora: Train direction and magnitude apart (arXiv:2402.09353).
        rslora: Scale by alpha / sqrt(r) (arXiv:2312.03732); for ranks above 32.
        train_tokens: Tokens whose rows of the embedding and the output head learn too. `auto`: of the tokens in the
            training data and of the chat template's control tokens those that the base was never trained on, since
            adapters alone cannot make such a token likely; at most 4,096, the most frequent. Or spellings, e.g.
            [<|im_end|>]; null trains none.
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    dora: bool = False
    rslora: bool = False
    train_tokens: str | list[str] | None = "auto"

    def as_peft(self) -> dict[str, Any]:
        """The long form."""
        return {"class_path": "LoraConfig", "init_args": {
            "r": self.r, "lora_alpha": self.alpha, "lora_dropout": self.dropout, "target_modules": self.target_modules,
            "use_dora": self.dora, "use_rslora": self.rslora}}


def spec_of(peft: dict[str, Any] | None, lora: LoRA | None) -> dict[str, Any] | None:
    """The one PEFT spec of a config that may give the long form, the short form, or none.

    Raises:
        InputError: Both are given, or a class below `init_args`.
    """
    refuse_within((peft or {}).get("init_args"), "model.peft.init_args")
    if peft is not None and lora is not None:
        raise InputError("model.peft and model.lora are two ways to say one thing; keep one", where="model")
    return peft if peft is not None else (lora.as_peft() if lora is not None else None)


def spec_in(folder: Path) -> dict[str, Any]:
    """The method of the adapter that lies in a folder in PEFT's format: its class, and keys that are not the default.

    Raises:
        InputError: Its config cannot be read, or names a method that is not trained here.
    """
    config = _stored_config(folder)
    keys = config.to_dict()
    plain = type(config)().to_dict()
    kept = {key: sorted(value, key=str) if isinstance(value, set) else value for key, value in keys.items()
            if value != plain.get(key) and key not in NO_METHOD}
    spec = {"class_path": type(config).__name__, "init_args": kept}
    _peft_config(spec)
    return spec


def stored_keys(folder: Path) -> dict[str, Any]:
    """The keys of `adapter_config.json`, which may be a stranger's.

    Raises:
        InputError: It is no mapping.
    """
    file = folder / "adapter_config.json"
    try:
        keys = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"it cannot be read: {_line(error)}", where=str(file)) from None
    if not isinstance(keys, dict):
        raise InputError("it is no mapping of keys to values", where=str(file), fix="copy the adapter's folder again")
    return keys


def _stored_config(folder: Path) -> Any:
    """PEFT's config of the adapter in a folder; nothing that it names is imported or fetched.

    Raises:
        InputError: It cannot be read, or its method needs more than this folder.
    """
    from peft import PeftConfig

    keys = stored_keys(folder)
    if keys.get("megatron_config") is not None:     # PEFT imports whatever module `megatron_core` names
        raise InputError("it wants layers of Megatron, which are not supported", where=str(folder))
    try:
        config = PeftConfig.from_pretrained(str(folder))
        config.to_dict()
    except Exception as error:                      # forty methods, each with its own way to say no
        raise InputError(f"its config cannot be read: {_line(error)}", where=str(folder)) from None
    if type(config).__name__ in UNFIT:
        raise InputError(f"adapters of {keys.get('peft_type')} need more than their folder and are not supported",
                         where=str(folder))
    return config


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__


def wrap_peft(model: "PreTrainedModel", spec: dict[str, Any], *, tokens: Sequence[int] = ()) -> Any:
    """The model with a PEFT method's adapters: base frozen, adapters trainable.

    Nearly every method starts exactly at the base (FourierFT and C3A with `init_weights: true`; VB-LoRA and Uni-LoRA
    only close to it).

    Args:
        model: The base.
        spec: `class_path` (a config class of peft, with or without the `peft.` prefix) and `init_args`, its keys.
        tokens: Ids whose rows learn too, in the embedding and in the head; where there is no `row_obstacle`.

    Raises:
        InputError: No such class or key, or the model has no such layer.
    """
    from peft import get_peft_model

    config = _peft_config(spec)
    if tokens:
        config.trainable_token_indices = {name: sorted(tokens) for name in _token_layers(model)}
    try:
        with _steady_start(config), tying.explained(model, config):
            wrapped = _as_trained_here(get_peft_model(model, config))
            if not any(weight.requires_grad and getattr(weight, "ds_numel", weight.numel())
                       for weight in wrapped.parameters()):
                raise ValueError(f"{type(config).__name__} has nothing to train on these layers of this model")
            return wrapped
    except Exception as error:                      # forty methods, each with its own way to say no
        linears = sorted({name.rsplit(".", 1)[-1] for name, layer in model.named_modules() if _is_linear(layer)})
        raise InputError(f"{str(error).splitlines()[0][:160]}", where="model.peft",
                         fix=f"linear layers here: {', '.join(linears)}; all-linear takes all but the head") from None


def _peft_config(spec: dict[str, Any]) -> Any:
    from dataclasses import fields

    import peft

    unknown = sorted(set(spec) - {"class_path", "init_args"})
    name = str(spec.get("class_path", "")).removeprefix("peft.")
    known = [key for key, kind in vars(peft).items()
             if isinstance(kind, type) and issubclass(kind, peft.PeftConfig) and key not in UNFIT]
    if name not in known or unknown:
        raise InputError(f"'{unknown[0] if unknown else name}' is not known here; give class_path: a config class of "
                         f"peft, and init_args.{did_you_mean(name, known)}", where="model.peft")
    kind = getattr(peft, name)
    keys = {field.name for field in fields(kind)}
    args = dict(spec.get("init_args") or {})
    if wrong := sorted(set(args) - keys):
        raise InputError(f"{name} has no key '{wrong[0]}'.{did_you_mean(wrong[0], sorted(keys))}", where="model.peft")
    args.setdefault("task_type", "CAUSAL_LM")
    own_layers = name in ("IA3Config", "AdaptionPromptConfig")
    if "target_modules" in keys and args.get("target_modules") is None and not own_layers:
        args["target_modules"] = "all-linear"
    try:
        return kind(**args)
    except (ValueError, TypeError, ImportError) as error:
        raise InputError(f"{name}: {str(error).splitlines()[0][:160]}", where="model.peft") from None


@contextmanager
def _steady_start(config: Any) -> Iterator[None]:
    """Fast PiSSA draws a part of the base by random numbers: the same in training and whenever it is loaded."""
    if not str(getattr(config, "init_lora_weights", "")).startswith("pissa_niter"):
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def ties_adapters(spec: dict[str, Any] | None) -> bool:
    """Whether embedding and head of one matrix would share one adapter."""
    return bool(spec and (spec.get("init_args") or {}).get("ensure_weight_tying"))


def learns_prompt_by(spec: dict[str, Any] | None) -> bool:
    """Whether the method of a spec will put virtual tokens before each conversation."""
    return spec is not None and bool(_peft_config(spec).is_prompt_learning)


def _is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"


# ---- rows of single tokens -------------------------------------------------------------------------------------------

@dataclass(frozen=True, slots=True)
class TrainedRows:
    """A frozen output head of which some rows learn: `rows` (K, D) stand in place of `layer.weight[index]`."""

    layer: nn.Linear
    index: Tensor
    rows: Tensor


def trained_rows(layer: nn.Module) -> TrainedRows | None:
    """The rows that learn in an output head; None where none do, or another thing is on it.

    PEFT copies the whole matrix at each call to put them in; who knows them can do without.
    """
    inner: Any = getattr(layer, "token_adapter", None)      # a TrainableTokensWrapper
    if inner is None or type(inner.base_layer) is not nn.Linear:
        return None
    if inner.merged or inner.disable_adapters or len(inner.active_adapters) != 1:
        return None
    name = inner.active_adapters[0]
    index = _on_device(tuple(inner.token_indices[name]), inner.base_layer.weight.device)
    return TrainedRows(inner.base_layer, index, inner.trainable_tokens_delta[name])


@lru_cache(maxsize=8)
def _on_device(ids: tuple[int, ...], device: torch.device) -> Tensor:
    """Copied there once: each copy from pageable memory is a wait for the device."""
    return torch.tensor(ids, device=device)


@lru_cache(maxsize=8)
def _places(ids: tuple[int, ...], vocabulary: int, device: torch.device) -> Tensor:
    """(V,) where each token of the vocabulary stands in `ids`; -1 where it does not."""
    places = torch.full((vocabulary,), -1)
    places[list(ids)] = torch.arange(len(ids))
    return places.to(device)


def _as_trained_here(model: Any) -> Any:
    """PEFT's model, its embeddings without a copy of the matrix, its heads with their bias, tied adapters as one."""
    from peft.tuners.lora.layer import ParamWrapper
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in model.named_modules():
        below, dora = getattr(layer, "base_layer", None), any(getattr(layer, "use_dora", {}).values())
        twice = isinstance(below, BaseTunerLayer) and not isinstance(layer, ParamWrapper)   # experts' are nested
        if twice or (dora and hasattr(below, "token_adapter")):
            raise ValueError(f"{name.removeprefix('base_model.model.')} would be adapted twice: it and the embedding "
                             "are one matrix; name only one of the two")
        if isinstance(layer, TrainableTokensLayer):
            if type(layer.base_layer) is nn.Embedding:
                layer.forward = MethodType(_embed, layer)  # type: ignore[method-assign]
            elif isinstance(layer.base_layer, nn.Linear) and layer.base_layer.bias is not None:
                layer.forward = MethodType(_with_bias, layer)  # type: ignore[method-assign]
    tying.tie(model)
    return model


def _with_bias(layer: Any, hidden: Tensor) -> Tensor:
    """A head's logits, its bias included wherever peft replaces the rows of its matrix."""
    own: Tensor = type(layer).forward(layer, hidden)
    replaced = not (layer.merged or layer.disable_adapters or not layer.active_adapters)
    return own + layer.base_layer.bias if replaced else own


def _embed(layer: Any, ids: Tensor) -> Tensor:
    """The same embeddings and the same gradient as peft's."""
    base = layer.base_layer
    if layer.merged or layer.disable_adapters or len(layer.active_adapters) != 1 or base.max_norm is not None:
        return type(layer).forward(layer, ids)
    name = layer.active_adapters[0]
    trained = tuple(layer.token_indices[name])
    place = _places(trained, base.num_embeddings, ids.device)[ids]
    padding = trained.index(base.padding_idx) if base.padding_idx in trained else None
    rows = F.embedding(place.clamp_min(0), layer.trainable_tokens_delta[name].to(base.weight.dtype), padding)
    return torch.where((place >= 0)[..., None], rows, base(ids))


def chooses_rows(model: "PreTrainedModel", spec: dict[str, Any]) -> bool:
    """Whether a spec itself says what learns of the vocabulary's rows: some tokens', or adapters on the whole layer."""
    config = _peft_config(spec)
    if "trainable_token_indices" in (spec.get("init_args") or {}) or hasattr(config, "token_indices"):
        return True
    names = [_name(model, layer) for layer in (model.get_input_embeddings(), model.get_output_embeddings())]
    aims = (getattr(config, "target_modules", None), getattr(config, "modules_to_save", None))
    return any(_hits(aim, name) for aim in aims for name in names)


def _hits(aim: str | Collection[str] | None, name: str) -> bool:
    """As PEFT matches: a pattern, or ends of dotted names."""
    if isinstance(aim, str):
        return aim != "all-linear" and re.fullmatch(aim, name) is not None
    return any(name == end or name.endswith(f".{end}") for end in aim or ())


def row_obstacle(model: "PreTrainedModel", spec: dict[str, Any]) -> str | None:
    """Why the method of a spec cannot train rows of single tokens beside its adapters; None if it can."""
    config = _peft_config(spec)
    if not hasattr(config, "trainable_token_indices"):
        return f"{type(config).__name__} trains no single rows (LoRA does)"
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        return "PEFT would lose the bias of this output head"
    return None


def stored_tokens(folder: Path) -> list[int]:
    """Ids whose rows learned with the adapter that lies in a folder in PEFT's format."""
    chosen = stored_keys(folder).get("trainable_token_indices")
    lists = chosen.values() if isinstance(chosen, dict) else [chosen or []]
    try:
        return sorted({int(id_) for ids in lists for id_ in ids})
    except (ValueError, TypeError) as error:
        raise InputError(f"trainable_token_indices is no list of token ids: {_line(error)}",
                         where=str(folder / "adapter_config.json")) from None


def _token_layers(model: "PreTrainedModel") -> list[str]:
    """Names of the embedding and, unless it is the same matrix, the head."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    layers = [embedding] if head is None or head.weight is embedding.weight else [embedding, head]
    return [_name(model, layer) for layer in layers]


def _name(model: nn.Module, layer: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is layer)


# ---- load and save ---------------------------------------------------------------------------------------------------

def load_adapter(model: "PreTrainedModel", folder: str | Path, *, trainable: bool = False) -> Any:
    """The model with the adapter that lies in a folder in PEFT's format.

    Raises:
        InputError: The folder holds no safetensors, or none for some of the adapters that its config names; or its
            config or weights do not fit the model.
    """
    import warnings

    from peft import PeftModel

    folder = Path(folder)
    config = _stored_config(folder)
    if not (folder / WEIGHTS).is_file():            # PEFT would unpickle adapter_model.bin, or ask the hub
        raise InputError(f"it holds no {WEIGHTS}, and other files of weights are not read", where=str(folder))
    patterns.check(config.to_dict(), [name for name, _ in model.named_modules()], str(folder))
    try:
        if (folder / ROWS).is_file():
            vocabulary.grow(model, int(json.loads((folder / ROWS).read_text(encoding="utf-8"))["rows"]))
        with _steady_start(config), tying.explained(model, config, say=False), warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return _as_trained_here(PeftModel.from_pretrained(model, str(folder), is_trainable=trainable))
    except UserWarning as error:
        raise InputError(f"it lacks weights that its config names: {str(error).partition(': ')[2][:160]}",
                         where=str(folder), fix="copy the adapter's folder again, or train it again") from None
    except (InputError, MemoryError):
        raise
    except Exception as error:                      # a stranger's files, and forty methods
        raise InputError(f"the adapter cannot be put on this model: {_line(error)}", where=str(folder),
                         fix="use it with the base that it was trained on, or copy its folder again") from None


def spare_copies(model: Any) -> None:
    """Let LoRA take its inputs as they come, where autocast brings them and its weights together.

    peft makes a float32 copy of every adapted layer's input first, since its weights are float32; autocast then makes a
    bfloat16 copy of the copy. The numbers are the same without. DoRA measures weights by that dtype and keeps it.
    """
    from peft.tuners.lora import LoraLayer

    for layer in model.modules():
        if isinstance(layer, LoraLayer) and not any(getattr(layer, "use_dora", {}).values()):
            layer.cast_input_dtype_enabled = False


def is_peft(model: Any) -> bool:
    """Whether adapters are on it."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def learns_prompt(model: Any) -> bool:
    """Whether the PEFT method puts virtual tokens before each conversation (prompt and prefix tuning)."""
    return is_peft(model) and bool(model.active_peft_config.is_prompt_learning)


def save_adapter(model: Any, folder: str | Path, state: dict[str, Tensor], base: str) -> None:
    """Write adapter weights and config in PEFT's format.

    Args:
        model: The PEFT model, for its config.
        folder: Made if absent.
        state: Trainable weights by their name in `model`, on CPU.
        base: Where the base came from, kept in the config so that others find it.
    """
    import warnings

    from peft.utils.save_and_load import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")    # the state holds no base weight
        adapter = get_peft_model_state_dict(model, state_dict=_under_all_names(model, state))
    save_file({name: weight.clone().contiguous() for name, weight in adapter.items()},
              folder / WEIGHTS)
    config = model.active_peft_config.to_dict() | {"base_model_name_or_path": base, "inference_mode": True}
    if not isinstance(config.get("target_modules"), str | None):        # peft takes tied heads out of it
        tied = getattr(model.active_peft_config, "target_modules_to_tie", None) or ()
        config["target_modules"] = {*config["target_modules"], *tied}
    text = json.dumps(config, indent=2, sort_keys=True,
                      default=lambda value: sorted(value) if isinstance(value, set) else str(value))
    (folder / "adapter_config.json").write_text(redact_text(text) + "\n", encoding="utf-8")
    inner = model.get_base_model()
    if getattr(inner, "new_rows", 0):               # who loads it must give the base as many
        (folder / ROWS).write_text(json.dumps({"rows": inner.all_rows}) + "\n", encoding="utf-8")


def _under_all_names(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under each of their names (VB-LoRA shares one bank) with the frozen parts beside them.

    Frozen are VeRA's buffers, and one of MiCA's two matrices.
    """
    named = list(model.named_parameters(remove_duplicate=False))
    known = {id(weight): state[name] for name, weight in named if name in state}
    prefix = getattr(model.base_model, "prefix", None)
    kept = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    kept |= {name for name, weight in named if prefix and prefix in name and not weight.requires_grad}
    frozen = {name: value.cpu() for name, value in model.state_dict().items() if name in kept}
    for name, matrix in tying.matrices(model):
        owner = next(key for key, weight in named if weight is matrix.source[0][matrix.source[1]])
        frozen[f"{name}.weight"] = state[owner].t()
    return frozen | state | {name: known[id(weight)] for name, weight in named if id(weight) in known}
