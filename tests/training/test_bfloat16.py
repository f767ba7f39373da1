"""If this breaks: gradients in bfloat16 are summed, reduced or scaled wrongly on two ranks, which no float32 test detects:
AdamW hides a wrong scale, but clipping does not.

Oracle: plain transformers in float64 on the same conversations (`test_gradient.Oracle`). Rounding to eight bits changes
single numbers by some percent, but hardly the norm of the whole gradient.
"""

import torch
from gradient_probe import on_two_ranks
from test_gradient import Oracle, data, few, talks  # noqa: F401

CASES = [(strategy, kind, "bf16-mixed" if strategy in ("ddp", "fsdp2") else "bf16-true")
         for strategy in ("ddp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3", "fsdp2")
         for kind in ("llama", "qwen3")]                # head and embedding: two matrices, and one


def test_norm_and_direction_on_two_ranks(tiny_model, talks, data, tmp_path):  # noqa: F811
    file, seven = few(talks, data, tmp_path)
    cases = [dict(name=f"{strategy}-{kind}", base=tiny_model(kind), data=file, seq_len=256, batch_size=2, accumulate=2,
                  packing="none", strategy=strategy, devices=2, precision=precision) for strategy, kind, precision in CASES]
    for case, ((one,), (other,)) in zip(cases, on_two_ranks(cases, tmp_path), strict=True):
        oracle = Oracle(case["base"], seven)
        rows = [row[0] for row in oracle.rows]
        loss, wanted = oracle.gradient([rows.index(ids) for ids in one["talks"] + other["talks"]])
        assert wanted.keys() == one["grads"].keys()
        actual, expected = (torch.cat([grads[name].double().flatten() for name in wanted]) for grads in (one["grads"], wanted))
        cosine = (actual @ expected / actual.norm() / expected.norm()).item()
        print(f"{case['name']}: norm {actual.norm() / expected.norm() - 1:+.2%}, cosine {cosine:.5f}")
        assert abs(actual.norm() / expected.norm() - 1) < 0.005
        assert cosine > 0.999
        assert abs(one["loss"] / loss - 1) < 0.005
