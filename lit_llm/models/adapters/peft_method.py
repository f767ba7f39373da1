"""Read the PEFT method and its keys from a run's config or from an adapter's folder.

A method is a mapping with `class_path` and `init_args`, as in a config. `adapter.py` applies it to a model.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_llm.errors import InputError, did_you_mean
from lit_llm.system import ranges
from lit_llm.system.class_paths import refuse_within
from lit_llm.system.config_limits import scalars

MOST, MOST_TOKEN = 1 << 20, 1 << 27                  # of ranks, layers and trained tokens; of a token id
STRONGEST = 1e9                                     # limit on scales
NO_METHOD = ("base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision", "auto_mapping",
             "task_type")                           # keys of an adapter's config about its origin
# PEFT methods that need more than tokens and labels: task ids, other adapters, a second model.
UNFIT = ("ArrowConfig", "CartridgeConfig", "CPTConfig", "MultitaskPromptTuningConfig", "PeftConfig", "PolyConfig",
         "PromptLearningConfig", "ShadowConfig", "XLoraConfig")


@dataclass(slots=True)
class LoRA:
    """Low-rank adapters (arXiv:2106.09685), a short form of `peft: {class_path: LoraConfig, ...}`.

    Args:
        r: Rank of the two matrices. Usually 8 to 32; memory and capacity grow with it.
        alpha: Scale of the adapter's output, which is multiplied by alpha / r.
        dropout: Dropout probability of adapter inputs during training.
        target_modules: Names of the layers to adapt, or `all-linear`: every linear layer (including GPT-2's Conv1D)
            except the output head; adapting all of them works best (arXiv:2305.14314 section 4).
        dora: Train direction and magnitude separately (arXiv:2402.09353).
        rslora: Scale by alpha / sqrt(r) (arXiv:2312.03732); for ranks above 32.
        train_tokens: Tokens whose rows of the embedding and the output head are trained as well. `auto` selects tokens
            of the training data and control tokens of the chat template that the base model was never trained on,
            because adapters alone cannot make such a token likely; at most the 4,096 most frequent. A list names
            tokens, e.g. [<|im_end|>]; null trains none.
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    dora: bool = False
    rslora: bool = False
    train_tokens: str | list[str] | None = "auto"

    def as_peft(self) -> dict[str, Any]:
        """The equivalent `peft` mapping."""
        return {"class_path": "LoraConfig", "init_args": {
            "r": self.r, "lora_alpha": self.alpha, "lora_dropout": self.dropout, "target_modules": self.target_modules,
            "use_dora": self.dora, "use_rslora": self.rslora}}


def spec_of(peft: dict[str, Any] | None, lora: LoRA | None) -> dict[str, Any] | None:
    """The PEFT spec of a config, which may give `peft`, `lora`, or neither.

    Raises:
        InputError: Both are given, or there is a class within `init_args`.
    """
    refuse_within((peft or {}).get("init_args"), "model.peft.init_args")
    if peft is not None and lora is not None:
        raise InputError("model.peft and model.lora are both set; keep one of them", where="model")
    if lora is not None:
        ranges.check_all("model.lora", {name: getattr(lora, name) for name in ("r", "alpha", "dropout")})
    for name, value in ((peft or {}).get("init_args") or {}).items():
        ranges.check(f"model.peft.init_args.{name}", value)
    return peft if peft is not None else (lora.as_peft() if lora is not None else None)


def spec_in(folder: Path) -> dict[str, Any]:
    """The method of an adapter folder in PEFT's format: its class, and keys that differ from their defaults.

    Raises:
        InputError: Its config cannot be read, or names a method that is not supported.
    """
    config = stored_config(folder)
    keys = config.to_dict()
    plain = type(config)().to_dict()
    init_args = {key: sorted(value, key=str) if isinstance(value, set) else value for key, value in keys.items()
            if value != plain.get(key) and key not in NO_METHOD}
    spec = {"class_path": type(config).__name__, "init_args": init_args}
    peft_config(spec)
    return spec


def stored_keys(folder: Path) -> dict[str, Any]:
    """The keys of `adapter_config.json`, which is untrusted.

    Raises:
        InputError: The file is not a mapping.
    """
    file = folder / "adapter_config.json"
    try:
        keys = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"the file cannot be read: {one_line(error)}", where=str(file)) from None
    if not isinstance(keys, dict):
        raise InputError("the file is not a mapping of keys to values", where=str(file),
                         fix="copy the adapter's folder again")
    return keys


def stored_config(folder: Path) -> Any:
    """PEFT's config of the adapter in a folder; nothing that it names is imported or downloaded.

    Raises:
        InputError: The config cannot be read, or its method needs more than this folder.
    """
    from peft import PeftConfig

    keys = stored_keys(folder)
    _check_numbers(keys, str(folder / "adapter_config.json"))
    if keys.get("megatron_config") is not None:     # PEFT imports whatever module `megatron_core` names
        raise InputError("it requires Megatron layers, which are not supported", where=str(folder))
    try:
        config = PeftConfig.from_pretrained(str(folder))
        config.to_dict()
    except Exception as error:                      # forty methods raise errors of many types
        raise InputError(f"its config cannot be read: {one_line(error)}", where=str(folder)) from None
    if type(config).__name__ in UNFIT:
        raise InputError(f"adapters of {keys.get('peft_type')} need more than their folder and are not supported",
                         where=str(folder))
    return config


def _check_numbers(keys: object, where: str) -> None:
    """Refuse numbers that would give nan weights or huge adapters.

    Raises:
        InputError: The error names the key and the value.
    """
    for key, value in scalars(keys):
        if isinstance(value, bool) or not isinstance(value, int | float) or re.search(r"seed|prng", key):
            continue
        most = (MOST_TOKEN if "token" in key else MOST) if isinstance(value, int) else STRONGEST
        if not abs(value) <= most:                  # also true for nan
            raise InputError(f"{key} is {str(value)[:40]}; at most {most:,.0f} is allowed", where=where)


def one_line(error: BaseException) -> str:
    """The message of an error in one line."""
    return " ".join(str(error).split())[:160] or type(error).__name__


def peft_config(spec: dict[str, Any]) -> Any:
    """Build PEFT's config from a spec.

    Raises:
        InputError: No such class or key, or a value that the class refuses.
    """
    from dataclasses import fields

    import peft

    unknown = sorted(set(spec) - {"class_path", "init_args"})
    name = str(spec.get("class_path", "")).removeprefix("peft.")
    classes = [key for key, kind in vars(peft).items()
               if isinstance(kind, type) and issubclass(kind, peft.PeftConfig) and key not in UNFIT]
    if name not in classes or unknown:
        raise InputError(f"'{unknown[0] if unknown else name}' is unknown; give class_path (a config class of peft) "
                         f"and init_args.{did_you_mean(name, classes)}", where="model.peft")
    kind = getattr(peft, name)
    keys = {field.name for field in fields(kind)}
    args = dict(spec.get("init_args") or {})
    if wrong := sorted(set(args) - keys):
        raise InputError(f"{name} has no key '{wrong[0]}'.{did_you_mean(wrong[0], sorted(keys))}", where="model.peft")
    _check_numbers(args, "model.peft")
    args.setdefault("task_type", "CAUSAL_LM")
    own_layers = name in ("IA3Config", "AdaptionPromptConfig")
    if "target_modules" in keys and args.get("target_modules") is None and not own_layers:
        args["target_modules"] = "all-linear"
    try:
        return kind(**args)
    except (ValueError, TypeError, ImportError) as error:
        raise InputError(f"{name}: {str(error).splitlines()[0][:160]}", where="model.peft") from None


def ties_adapters(spec: dict[str, Any] | None) -> bool:
    """Whether a tied embedding and head share one adapter."""
    return bool(spec and (spec.get("init_args") or {}).get("ensure_weight_tying"))


def adds_virtual_tokens(spec: dict[str, Any] | None) -> bool:
    """Whether the method of a spec adds virtual tokens before each conversation."""
    return spec is not None and bool(peft_config(spec).is_prompt_learning)
