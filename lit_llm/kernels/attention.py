"""Attention over packed sequences: each document attends only to itself.

It gets queries, keys and values of all documents in a packed sequence with their boundaries (`cu_seqlens`), and
computes causal attention per document. It is registered with transformers as `lit_varlen`, without a mask function: the
model then builds no mask, passes the keyword arguments to every layer, and cannot leak across documents (with
`position_ids` only it can: a cache or a 2-D mask silently switches isolation off).

    cu_seqlens  [0        4      7   8]        documents occupy [0, 4), [4, 7), [7, 8) of the flattened row
"""


import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.functional import scaled_dot_product_attention as sdpa

from lit_llm.errors import InputError
from lit_llm.kernels import blockwise, switch

NAME = "lit_varlen"


class PackingError(InputError):
    """The documents of a packed sequence could not be isolated from each other."""


def register() -> str:
    """Register `lit_varlen` with transformers; returns the name for `attn_implementation`."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, lit_varlen)
    return NAME


def lit_varlen(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int = 0,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Causal attention per document, with the interface of transformers.

    Args:
        module: The attention layer, of which only the training flag is used.
        query: (1, H, T, D).
        key: (1, K, T, D); K divides H (grouped-query attention).
        value: (1, K, T, E); E equals D except in latent attention (DeepSeek).
        attention_mask: Must be None; a mask would mean that the model isolates documents itself.
        cu_seqlens: (documents + 1,) int32, from 0 to T.
        max_seqlen: Tokens of the longest document, known on the host.
        scaling: Factor on the scores; null is 1/sqrt(D).
        dropout: Probability of dropping an attention weight, in training.
        sliding_window: Tokens that a query attends to, including itself; null is the whole document.
        softcap: Gemma-2's cap on scores; not supported here.
        s_aux: GPT-OSS's attention sinks; not supported here.

    Returns:
        (1, T, H, E) and None for the weights.
    """
    if softcap is not None or s_aux is not None:
        raise PackingError("the attention caps its scores or uses sinks, which packed attention does not support",
                           where="model.base")
    if attention_mask is not None or cu_seqlens is None:    # it builds its own mask, or drops the keyword arguments
        raise PackingError("this model does not pass the document boundaries to its attention, so documents in a "
                           "packed sequence could not be isolated", where="model.base")
    dropout = dropout if module.training else 0.0
    kind = query.device.type
    if torch.is_autocast_enabled(kind):             # rotary embeddings have converted queries and keys to float32
        query, key, value = (states.to(torch.get_autocast_dtype(kind)) for states in (query, key, value))
    if _flash(query, dropout):
        return _on_cuda(query, key, value, cu_seqlens, max_seqlen, scaling, sliding_window), None
    return _by_length(query, key, value, tuple(cu_seqlens.tolist()), scaling, dropout, sliding_window), None


def _flash(query: Tensor, dropout: float) -> bool:
    """Whether torch's variable-length kernel applies: half precision, no dropout, head width <= 256, Ampere on."""
    width = query.shape[-1]
    return (query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and dropout == 0.0
            and width <= 256 and width % 8 == 0 and _generation(query.device) >= 8)


@torch.compiler.assume_constant_result              # otherwise a compiled layer would have a graph break here
def _generation(device: torch.device) -> int:
    """Compute capability of a GPU: 7 is Volta and Turing (T4), 8 Ampere, 9 Hopper."""
    return torch.cuda.get_device_capability(device)[0]


def _on_cuda(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int,
             scaling: float | None, sliding_window: int | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    groups = query.shape[1] // key.shape[1]
    flat_query, flat_key, flat_value = (states[0].transpose(0, 1).contiguous() for states in (query, key, value))
    if groups > 1:                                  # torch 2.11 has no enable_gqa here
        flat_key, flat_value = (states.repeat_interleave(groups, 1) for states in (flat_key, flat_value))
    width, missing = value.shape[-1], query.shape[-1] - value.shape[-1]
    if missing:                                     # values of latent attention; the kernel needs equal widths
        flat_value = pad(flat_value, (0, missing))
    left = -1 if sliding_window is None else sliding_window - 1
    out = varlen_attn(flat_query, flat_key, flat_value, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=scaling,
                      window_size=(left, 0))
    assert isinstance(out, Tensor)
    return out[..., :width].unsqueeze(0)


@torch.compiler.disable                             # document boundaries depend on the data
def _by_length(query: Tensor, key: Tensor, value: Tensor, borders: tuple[int, ...], scaling: float | None,
               dropout: float, sliding_window: int | None) -> Tensor:
    """One call for all documents of similar length, stacked.

    The cost is the sum of squared lengths instead of T squared, without a mask.
    """
    device = query.device.type
    with torch.autocast(device, enabled=False):
        if device == "cpu" and not dropout and not switch.is_plain():
            return blockwise.causal(query[0], key[0], value[0], borders, scale=scaling or query.shape[-1] ** -0.5,
                                    window=sliding_window).unsqueeze(0)
        order, back, _, stacks = blockwise.stacks(borders)
        if order is not None and back is not None:
            order, back = order.to(query.device), back.to(query.device)
            query, key, value = (states.index_select(2, order) for states in (query, key, value))
        sizes = [count * length for count, length in stacks]
        parts = (states[0].split(sizes, dim=1) for states in (query, key, value))
        out = torch.cat([_sdpa(queries, keys, values, count, scale=scaling, window=sliding_window, dropout=dropout)
                         for (count, _), queries, keys, values in zip(stacks, *parts, strict=True)])
        return (out if back is None else out.index_select(0, back)).unsqueeze(0)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, count: int, *, scale: float | None, window: int | None,
          dropout: float) -> Tensor:
    """(H, count * length, D) and (K, count * length, D or E) -> (count * length, H, E), by torch's attention.

    It supports dropout of attention weights, and runs on any device.
    """
    heads, tokens, _ = query.shape
    length, groups = tokens // count, heads // len(key)
    if groups > 1:
        key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    stack_query, stack_key, stack_value = (
        states.reshape(heads, count, length, -1).transpose(0, 1) for states in (query, key, value))
    mask = _band(length, window, query) if window is not None and length > window else None
    out = sdpa(stack_query, stack_key, stack_value, attn_mask=mask, is_causal=mask is None, dropout_p=dropout,
               scale=scale)
    return out.transpose(1, 2).reshape(tokens, heads, -1)


def _band(length: int, window: int, like: Tensor) -> Tensor:
    """(length, length) bool: causal, limited to the last `window` tokens."""
    ones = torch.ones(length, length, dtype=torch.bool, device=like.device)
    return ones.tril().triu(1 - window)
