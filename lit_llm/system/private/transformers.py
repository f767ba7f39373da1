"""Private names of transformers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def attention_of(config: object) -> str | None:
    """The attention that a config selects; None where it does not select any."""
    return getattr(config, "_attn_implementation", None)


def set_attention(config: Any, name: str | None) -> None:
    """Select an attention."""
    config._attn_implementation = name


@contextmanager
def eager_attention(model: Any) -> Iterator[None]:
    """Within, every layer of a model uses transformers' plain attention, which needs no document boundaries."""
    parts: list[Any] = [getattr(layer, "config", None) for layer in model.modules()]
    configs = {id(config): config for config in parts if attention_of(config) is not None}
    before = {key: attention_of(config) for key, config in configs.items()}
    try:
        for config in configs.values():
            set_attention(config, "eager")
        yield
    finally:
        for key, config in configs.items():
            set_attention(config, before[key])


def without_attention(config: dict[str, Any]) -> dict[str, Any]:
    """A config's keys and values without the attention that it selects."""
    return {key: value for key, value in config.items() if key != "_attn_implementation"}


def takes_other_attention(model: Any) -> bool:
    """Whether the layers of a model call the attention that its config selects."""
    return bool(getattr(model, "_supports_attention_backend", False))


def layer_classes(model: Any) -> set[str]:
    """Names of the classes whose modules a model stacks."""
    return set(model._no_split_modules or ())


def recorded_outputs(backbone: object) -> dict[str, Any]:
    """What of its layers' outputs a model can return: name -> classes of layers."""
    return getattr(backbone, "_can_record_outputs", None) or {}


def of_config(model_class: Any, config: Any, **options: Any) -> Any:
    """A model of a class with random weights."""
    return model_class._from_config(config, **options)


def chat_template_environment() -> Any:
    """The sandboxed Jinja environment in which chat templates are rendered."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return _compile_jinja_template("").environment
