"""If this breaks: a new strategy trains wrongly because parts of a step are done twice or not at all."""

import json
import shutil

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, SingleDeviceStrategy

from lit_llm import CausalLMModule, Source, TextDataModule, Trainer
from lit_llm.errors import InputError
from lit_llm.models import anatomy
from lit_llm.training.parallel import distribution, named, shards

LIMIT = 0.05                                        # of the gradient's norm, which is about ten times as large


class Own(distribution.Distribution, SingleDeviceStrategy):
    """One class is all that a strategy needs: this one clips by itself, as an engine does."""

    owns_gradients = True

    def __init__(self):
        super().__init__(device="cpu")
        self.norms, self.layers, self.gathers = [], [], 0

    def optimizer_step(self, optimizer, closure, model=None, **kwargs):
        def clipped():
            loss = closure()
            grads = [weight.grad for weight in self.lightning_module.parameters() if weight.grad is not None]
            norm = sum(grad.double().square().sum() for grad in grads).sqrt()
            for grad in grads:
                grad *= min(1.0, LIMIT / (norm + 1e-6))
            self.norms.append(float(norm))
            self.lightning_module.gradient_norm, self.lightning_module.step_skipped = norm, False
            return loss

        return super().optimizer_step(optimizer, clipped, model, **kwargs)

    def shard(self, model, layers, *, dtype=None):
        self.layers = list(layers)

    def gathered(self, model, compute):
        self.gathers += 1
        return compute()


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory):
    """name -> (strategy, module, rows of metrics.csv, weights) of two steps."""
    folder = tmp_path_factory.mktemp("strategies")
    source = str(folder / "chats.jsonl")
    (folder / "chats.jsonl").write_text("".join(
        json.dumps({"prompt": f"say {word}", "completion": word * 3}) + "\n" for word in ("one", "two", "three", "four")))

    def train(strategy, name):
        torch.manual_seed(0)
        data = TextDataModule([Source(source)], val_sources=[Source(source)], tokenizer=tiny_model("llama"), seq_len=64, batch_size=1, packing="none")
        module = CausalLMModule(base=tiny_model("llama"), lr=1e-2, warmup=0, schedule="constant")
        trainer = Trainer(strategy=strategy, accelerator="cpu", devices=1, max_steps=2, accumulate_grad_batches=2, gradient_clip_val=LIMIT,
                          log_every_n_steps=1, enable_progress_bar=False, default_root_dir=str(folder / name))
        trainer.fit(module, datamodule=data)
        lines = (folder / name / "metrics.csv").read_text().splitlines()
        rows = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
        return trainer.strategy, module, rows, {key: weight.detach().clone() for key, weight in module.model.named_parameters()}

    yield {"own": train(Own(), "own"), "auto": train("auto", "auto")}
    shutil.rmtree(folder)


def test_a_strategy_that_clips_by_itself_trains_like_the_plain_one(trained):
    """The gradient is clipped once: by the strategy if it owns the gradients, otherwise by the module."""
    (own, _, rows, weights), (_, _, plain_rows, plain) = trained["own"], trained["auto"]
    assert all(norm > 2 * LIMIT for norm in own.norms)
    logged = [float(row["train/grad_norm"]) for row in rows if row.get("train/grad_norm")]
    assert logged == pytest.approx(own.norms, rel=1e-6)
    assert logged == pytest.approx([float(row["train/grad_norm"]) for row in plain_rows if row.get("train/grad_norm")], rel=1e-4)
    assert max((weights[key] - plain[key]).abs().max() for key in plain) < 1e-5


def test_a_strategy_is_given_the_layers_once_and_surrounds_each_forward(trained):
    own, module, _, _ = trained["own"]
    assert own.layers == anatomy.decoder_layers(module.model)
    assert own.gathers >= 4 + 4                     # micro-batches trained, and the validation before the first step


def test_answers_for_strategies_of_lightnings():
    for strategy in (SingleDeviceStrategy(), DDPStrategy()):
        answers = distribution.of(strategy)
        assert (answers.split_stage, answers.gathers_layers, answers.writes_folders, answers.float16_scale) == (0, False, False, None)
    assert distribution.of(FSDPStrategy()).gathers_layers


def test_names_of_own_strategies():
    assert type(named.strategy("fsdp2")).__name__ == "Fsdp2Strategy"
    assert named.strategy("deepspeed_stage_3").split_stage == 3
    assert named.strategy("ddp") == "ddp"
    with pytest.raises(InputError, match="Did you mean 'fsdp2'"):
        named.strategy("fsdp2_offload")


def test_lightnings_own_deepspeed_is_refused():
    """It divides gradients by the accumulation a second time."""
    strategy = DeepSpeedStrategy(stage=2)
    assert named.strategy("deepspeed_stage_2") is not strategy
    with pytest.raises(InputError, match="twice") as caught:
        named.strategy(strategy)
    assert "lit_llm.ZeroStrategy" in str(caught.value)


def test_the_norm_of_gradients_sees_what_is_no_number():
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(3)]
    assert shards.gradient_norm(weights) == 0
    weights[0].grad, weights[2].grad = torch.tensor([3.0, 0, 0]), torch.tensor([0, 4.0, 0], dtype=torch.float32)
    assert shards.gradient_norm(weights) == 5
    shards.clip(weights, 1.0, shards.gradient_norm(weights))
    assert torch.allclose(weights[2].grad, torch.tensor([0, 0.8, 0]))
    for broken in (torch.nan, torch.inf, 1e30):
        weights[0].grad = torch.tensor([broken, 0, 0])
        assert not shards.gradient_norm(weights).isfinite()
