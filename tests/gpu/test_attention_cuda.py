"""If this breaks: a model trained on a GPU, where packed attention uses another kernel, mixes documents."""

import pytest
import torch

from lit_llm.kernels.attention import lit_varlen

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
BORDERS = [0, 5, 12, 76, 77, 128]


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize(("kv_heads", "width"), [(4, 64), (1, 64), (4, 40)])
def test_flash_kernel_equals_float32_sdpa(kv_heads, width, window):
    """bf16 through torch's varlen kernel against float32 through one SDPA call per document, forward and backward."""
    generator = torch.Generator("cuda").manual_seed(0)
    shape = {"query": (1, 4, 128, 64), "key": (1, kv_heads, 128, 64), "value": (1, kv_heads, 128, width)}
    full = {
        name: torch.randn(size, device="cuda", generator=generator, requires_grad=True) for name, size in shape.items()
    }
    half = {name: states.detach().bfloat16().requires_grad_() for name, states in full.items()}
    cu_seqlens = torch.tensor(BORDERS, dtype=torch.int32, device="cuda")
    module = torch.nn.Module()
    outputs = []
    for states in (full, half):
        out, _ = lit_varlen(
            module,
            states["query"],
            states["key"],
            states["value"],
            None,
            cu_seqlens=cu_seqlens,
            max_seqlen=64,
            sliding_window=window,
        )
        out.float().square().sum().backward()
        outputs.append(out.float())
    torch.testing.assert_close(outputs[1], outputs[0], atol=3e-2, rtol=3e-2)
    for name in full:
        torch.testing.assert_close(half[name].grad.float(), full[name].grad, atol=2e-1, rtol=1e-1)
