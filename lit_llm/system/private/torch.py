"""Private names of torch."""

from collections.abc import Iterator, Sequence
from typing import Any


def default_store() -> Any:
    """The key-value store through which the processes of a group met."""
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()


def incompatible_keys(missing: list[str], unexpected: list[str]) -> Any:
    """What `nn.Module.load_state_dict` returns."""
    from torch.nn.modules.module import _IncompatibleKeys

    return _IncompatibleKeys(missing, unexpected)


def persistent_buffers(module: Any) -> Iterator[tuple[str, Any]]:
    """Buffers of the module itself that are in its state dict."""
    for name, value in module._buffers.items():
        if value is not None and name not in module._non_persistent_buffers_set:
            yield name, value


def own_tensors(module: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tables of parameters and of buffers of a module itself, in which tensors can be replaced."""
    return module._parameters, module._buffers


def has_hooks(module: Any) -> bool:
    """Whether hooks run before or after the module's own forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def has_fused_linear() -> bool:
    """Whether this build multiplies on CPUs by oneDNN's operation."""
    import torch

    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def packed_weight(weight: object, rows: int) -> Any:
    """A (V, D) weight in the layout in which oneDNN multiplies about that many rows fastest; opaque."""
    import torch

    return torch.ops.mkldnn._reorder_linear_weight(weight, rows)


def fused_linear(inputs: object, weight: object, bias: object = None) -> Any:
    """Inputs (..., T, D) @ weight (V, D)^T + bias by oneDNN; the weight may be packed."""
    import torch

    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")


def softmax_backward(gradient: Any, probabilities: Any, dtype: Any, out: Any) -> None:
    """Gradient of the scores below a softmax over the last dimension, written into `out`."""
    import torch

    torch._softmax_backward_data(gradient, probabilities, -1, dtype, grad_input=out)


def attention_operations() -> set[Any]:
    """Operations that torch's attention calls on CPUs and CUDA."""
    import torch
    import torch.nn.attention.varlen  # registers one of them

    aten = torch.ops.aten
    return {torch.ops.torch_attn._varlen_attn.default, aten._scaled_dot_product_flash_attention_for_cpu.default,
            aten._scaled_dot_product_flash_attention.default, aten._scaled_dot_product_efficient_attention.default,
            aten._scaled_dot_product_cudnn_attention.default}


def grouped_product() -> Any:
    """The operation that multiplies the tokens of each expert by its matrix."""
    import torch

    return torch.ops.aten._grouped_mm.default


def leave_scaling_to_trainer(optimizers: Sequence[Any]) -> None:
    """Keep fused optimizers from undoing float16's loss scale in their step, after clipping."""
    for optimizer in optimizers:
        optimizer._step_supports_amp_scaling = False


def set_last_rates(schedule: Any, rates: list[float]) -> None:
    """Replace what a schedule says of its last learning rates."""
    schedule._last_lr = rates


def storage_key(storage: Any) -> int:
    """A number that two tensors share if and only if they share their memory, also where they have none."""
    return int(storage._cdata)


def fake_mode() -> Any:
    """A mode in which operations compute shapes only."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def dispatch_mode() -> type:
    """The base class of modes that see every operation."""
    from torch.utils._python_dispatch import TorchDispatchMode

    return TorchDispatchMode


def leaves(value: object) -> list[Any]:
    """What is in nested tuples, lists and mappings."""
    from torch.utils._pytree import tree_leaves

    return tree_leaves(value)
