"""Store the weights of linear layers in oneDNN's blocked layout, so that inference on a CPU reads them once per step.

A step of an engine multiplies few rows (one for each request) by every weight. With PyTorch's layout, the library
rearranges a weight again in each product. Milliseconds of CPU time for all linear layers of a Llama of 32M parameters,
one thread of an AMD EPYC with AVX512 and BF16 instructions:

    rows                    1       8      32     256
    float32, plain       11.1    17.4    32.4   176.7
    float32, packed       9.5     9.8    22.4   140.4
    bfloat16, plain       8.0    10.2    16.3    76.3
    bfloat16, packed      5.1     5.5    12.0    70.7

The plain weights are released, so the memory stays the same; only an output head that is tied to the embedding is
stored twice.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lit_llm.kernels import switch
from lit_llm.system.private import torch as private_torch

ROWS = 32                                           # for which the layout is chosen; others may have any number
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def pack(model: nn.Module) -> int:
    """Pack the weights of a model's linear layers, for inference only; returns how many.

    A layer keeps its own product where oneDNN does not compute it, or gives another result on random inputs. If a part
    of the model reads a weight directly, so that its logits change, all layers get their plain weights back.

    Args:
        model: A causal LM in eval mode. Neither trained nor saved afterwards: packed weights are not in its state dict.
    """
    if switch.is_plain() or not private_torch.has_fused_linear() or any(
            weight.device.type != "cpu" for weight in model.parameters()):
        return 0
    ids = torch.arange(1, 6).unsqueeze(0)
    with torch.no_grad():
        want = model(input_ids=ids, use_cache=False).logits
        packed = [layer for layer in model.modules() if type(layer) is nn.Linear and _pack(layer)]
        try:
            have = model(input_ids=ids, use_cache=False).logits
        except RuntimeError:
            have = want.new_full((), torch.nan)
        if packed and not _agree(have, want):
            for layer in packed:
                _unpack(layer)
            return 0
    return len(packed)


def _pack(layer: nn.Linear) -> bool:
    weight = layer.weight
    if weight.dtype not in TOLERANCE or "forward" in vars(layer) or private_torch.has_hooks(layer):
        return False
    rows = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    try:
        blocked = private_torch.packed_weight(weight.detach(), ROWS)
        if not _agree(private_torch.fused_linear(rows, blocked, layer.bias), layer(rows)):
            return False
    except RuntimeError:                            # no instructions for this dtype, or a shape that it does not take
        return False
    # What reads the weight itself gets nan instead of numbers that are no longer kept.
    layer.weight = nn.Parameter(weight.new_full((), torch.nan).expand(weight.shape), requires_grad=False)
    layer.forward = partial(_forward, blocked, layer.bias)      # type: ignore[method-assign]
    return True


def _forward(blocked: Tensor, bias: Tensor | None, rows: Tensor) -> Any:
    """The product; more than 32 rows are padded to a multiple of 32.

    oneDNN keeps memory of about the size of the output for every number of rows that it has seen.
    """
    count = rows.shape[-2]
    padding = -count % ROWS if count > ROWS else 0
    if not padding:
        return private_torch.fused_linear(rows, blocked, bias)
    return private_torch.fused_linear(nn.functional.pad(rows, (0, 0, 0, padding)), blocked, bias)[..., :count, :]


def _unpack(layer: nn.Linear) -> None:
    blocked: Tensor = vars(layer).pop("forward").args[0]
    layer.weight = nn.Parameter(blocked.to_dense(), requires_grad=False)


def _agree(have: Tensor, want: Tensor) -> bool:
    return bool((have - want).float().norm() <= TOLERANCE.get(want.dtype, 1e-4) * want.float().norm())
