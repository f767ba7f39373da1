"""Token embeddings in, the same with noise out (NEFTune, arXiv:2310.05914). Knows nothing of models or losses."""

import torch
from torch import Tensor


def noisy(embedded: Tensor, cu_seqlens: Tensor, alpha: float) -> Tensor:
    """Embeddings with uniform noise of alpha / sqrt(L * D) at most, L tokens being a token's own document.

    The paper's rows hold one document each. In a packed row a document must not be shaken less for its neighbours, so
    each has its own length. Drawn from torch's generator of the device, whose state a checkpoint keeps.

    Args:
        embedded: (1, T, D).
        cu_seqlens: (documents + 1,) int, from 0 to T.
        alpha: The noise of a whole document has a norm of about alpha / sqrt(3), whatever its length.
    """
    lengths = cu_seqlens.diff()
    of_token = lengths.repeat_interleave(lengths, output_size=embedded.shape[1])   # sized, or CUDA would wait
    bound = alpha / (of_token * embedded.shape[-1]).sqrt()
    noise = torch.rand(embedded.shape, device=embedded.device) * 2 - 1
    return embedded + (noise * bound[None, :, None]).to(embedded.dtype)
