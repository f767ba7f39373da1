"""If this breaks: training steps on a GPU synchronise with the device, mix documents, or resume differently."""

import pytest
import torch

from lit_llm import LoRA, Source, TextDataModule, Trainer
from lit_llm.models.anatomy import backbone
from lit_llm.models.load import init_causal_lm
from lit_llm.training.module import CausalLMModule
from tests.benchmarks import on_gpu
from tests.random_models import LLAMA, QWEN3, SMALL, Rounds, Shaped, batches

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICE = torch.device("cuda", 0)
TINY = LLAMA | SMALL
WAYS = {"all weights": ({}, "bf16-mixed"), "adapters": ({"lora": True}, "bf16-true"),
        "recomputed": ({"gradient_checkpointing": True}, "bf16-mixed"), "noise": ({"neftune_alpha": 5.0}, "bf16-mixed")}


def train(folder, shape, steps, *, precision="bf16-mixed", kind=Shaped, rows=2, seq_len=512, mean=100, callbacks=(), **options):
    """A fit on random packed sequences; the module, still on the device, and the trainer."""
    options = options | ({"lora": LoRA(r=8)} if options.get("lora") else {})
    made = batches(shape["vocab_size"], rows=rows, seq_len=seq_len, mean=mean, count=3)
    trainer = Trainer(accelerator="gpu", devices=1, precision=precision, max_steps=steps, default_root_dir=str(folder / "run"),
                      enable_checkpointing=False, enable_progress_bar=False, gradient_clip_val=1.0, log_every_n_steps=1000,
                      callbacks=list(callbacks))
    trainer.exports = False
    torch.manual_seed(0)
    module = kind(shape, lr=1e-3, schedule="constant", warmup=0, **options)
    trainer.fit(module, Rounds(made, steps))
    return module, trainer


class Strict(Shaped):
    """From the third step on, any wait for the device between a batch's arrival and the end of its backward is an error."""

    checked = 0

    def _choose_tokens(self, inner):
        return [3, 5]                               # rows of single tokens are trained beside adapters

    def training_step(self, batch, batch_idx):
        if batch_idx >= 2:
            torch.cuda.set_sync_debug_mode("error")
        return super().training_step(batch, batch_idx)

    def on_after_backward(self):
        self.checked += torch.cuda.get_sync_debug_mode() == 2
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [LLAMA, QWEN3], ids=["llama", "qwen3"])
def test_a_micro_batch_never_waits_for_the_device(kind, way, tmp_path):
    options, precision = WAYS[way]
    shape = kind | SMALL | ({"head_dim": 16} if kind is QWEN3 else {})
    try:
        module, _ = train(tmp_path, shape, 5, precision=precision, kind=Strict, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert module.checked == 3


def test_documents_of_a_row_do_not_see_each_other():
    """Another document in the sequence changes no bit; separately in float32, without this project's attention, results agree."""
    torch.manual_seed(0)
    with DEVICE:
        packed = init_causal_lm(TINY, dtype=torch.bfloat16, attention="lit_varlen").eval()
        alone = init_causal_lm(TINY, dtype=torch.float32, attention="sdpa").eval()
    alone.load_state_dict(packed.state_dict())
    lengths = [100, 37, 119]
    borders = torch.tensor([0, 100, 137, 256], dtype=torch.int32, device=DEVICE)
    ids = torch.randint(SMALL["vocab_size"], (256,), device=DEVICE)
    positions = torch.cat([torch.arange(length, device=DEVICE) for length in lengths])

    def hidden(tokens):
        with torch.no_grad():
            return backbone(packed)(input_ids=tokens[None], position_ids=positions[None], attention_mask=None, use_cache=False,
                                    cu_seqlens=borders, max_seqlen=119).last_hidden_state[0]

    first = hidden(ids)
    other = ids.clone()
    other[:100] = torch.randint(SMALL["vocab_size"], (100,), device=DEVICE)
    assert torch.equal(hidden(other)[100:], first[100:])
    assert not torch.equal(hidden(other)[:100], first[:100])
    with torch.no_grad():
        want = torch.cat([backbone(alone)(input_ids=part[None], use_cache=False).last_hidden_state[0]
                          for part in ids.split(lengths)])
    assert (first.float() - want).norm() / want.norm() < 2e-2


def test_the_optimizer_is_fused_and_its_step_is_adamw_s(tmp_path):
    _, trainer = train(tmp_path, TINY, 1, precision="32-true")
    (optimizer,) = trainer.optimizers
    assert all(group["fused"] for group in optimizer.param_groups)
    start, gradient = torch.randn(2, 300, 70, device=DEVICE)
    weights = [start.clone().requires_grad_() for _ in range(2)]
    for weight, fused in zip(weights, (True, False), strict=True):
        weight.grad = gradient.clone()
        torch.optim.AdamW([weight], lr=1e-2, weight_decay=0.1, fused=fused).step()
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "adapters"])
def test_the_plan_s_estimate_is_within_15_percent_of_the_peak(lora, tmp_path, record_property):
    import lightning as L

    shape = LLAMA | {"vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16,
                     "num_attention_heads": 16, "num_key_value_heads": 8, "max_position_embeddings": 4096}
    rows, seq_len = 2, 4096
    precision = "bf16-true" if lora else "bf16-mixed"

    class Peak(L.Callback):
        seen = 0

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            torch.cuda.reset_peak_memory_stats(DEVICE)

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            self.seen = torch.cuda.max_memory_allocated(DEVICE)

    peak = Peak()
    train(tmp_path, shape, 3, precision=precision, rows=rows, seq_len=seq_len, mean=1000, lora=lora, callbacks=[peak])
    need = on_gpu.needs(shape, {"lora": {"r": 8}} if lora else {}, precision, rows, seq_len)[1]
    record_property("estimate_over_peak", need / peak.seen)
    assert need == pytest.approx(peak.seen, rel=0.15)


def test_four_bits(tmp_path):
    """QLoRA: the base is quantized on the device; adapters are trained and stay float32."""
    pytest.importorskip("bitsandbytes")
    init_causal_lm(TINY).save_pretrained(tmp_path / "base")
    module = CausalLMModule(base=str(tmp_path / "base"), lora=LoRA(r=4), quantize="nf4", lr=1e-2)
    trainer = Trainer(accelerator="gpu", devices=1, precision="bf16-true", max_steps=8, log_every_n_steps=1,
                      default_root_dir=str(tmp_path / "run"), enable_checkpointing=False, enable_progress_bar=False)
    trainer.exports = False
    trainer.fit(module, Rounds(batches(SMALL["vocab_size"], rows=1, seq_len=256, mean=60), 8))
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    losses = [float(row.split(",")[rows[0].split(",").index("train/loss")]) for row in rows[1:]]
    assert losses[-1] < losses[0] - 0.05
    assert {weight.dtype for weight in module.parameters() if weight.requires_grad} == {torch.float32}
    assert any(type(layer).__name__ == "Linear4bit" for layer in module.modules())


@pytest.fixture
def _deterministic():
    """Flash attention's backward adds up in any order otherwise."""
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize(("precision", "lora"), [("bf16-mixed", None), ("bf16-true", LoRA(r=4, dropout=0.1))],
                         ids=["all weights", "adapters"])
def test_a_resumed_run_is_the_same_to_the_last_bit(precision, lora, tmp_path):
    """With `trainer.deterministic: true`; weights and both averages of the optimizer after 4 steps, or 2 and 2."""
    init_causal_lm(TINY | {"vocab_size": 4096}).save_pretrained(tmp_path / "base")

    def run(name, steps, resume=None):
        data = TextDataModule([Source("sample:documents.jsonl")], tokenizer="sample:base", seq_len=256, batch_size=2,
                              packing="concat")
        module = CausalLMModule(base=str(tmp_path / "base"), lora=lora, lr=1e-3, schedule="constant", warmup=0)
        trainer = Trainer(accelerator="gpu", devices=1, precision=precision, max_steps=steps, deterministic=True,
                          default_root_dir=str(tmp_path / name), enable_progress_bar=False, accumulate_grad_batches=2)
        trainer.exports = False
        torch.manual_seed(0)
        trainer.fit(module, datamodule=data, ckpt_path=resume)
        states = [value for state in trainer.optimizers[0].state.values() for value in state.values()]
        return [weight.detach().cpu() for weight in module.parameters() if weight.requires_grad] + [
            value.cpu() for value in states]

    straight = run("straight", 4)
    run("parted", 2)
    resumed = run("parted", 4, "last")
    assert len(straight) == len(resumed) > 10
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))
