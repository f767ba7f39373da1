"""If this breaks: the gradient does not belong to the loss, or the loss needs the memory of all logits."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lit_llm.kernels import cross_entropy as fused
from lit_llm.kernels import tiles
from lit_llm.models import anatomy
from lit_llm.models import load as models
from lit_llm.models.adapters.trained_rows import trained_rows
from lit_llm.training import loss
from lit_llm.training.loss import nll_sum, shift

TOKENS, WIDTH, VOCABULARY = 90, 12, 37


class Adapted(nn.Linear):
    """A head that is more than a linear layer, as one with an adapter on it is."""


def case(dtype=torch.float64, bias=False, adapted=False, seed=0):
    """Hidden states, labels with holes, and a head."""
    torch.manual_seed(seed)
    hidden = torch.randn(TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    labels = torch.randint(VOCABULARY, (TOKENS,))
    labels[torch.rand(TOKENS) < 0.4] = -100
    labels[0] = labels[30] = -100
    return hidden, labels, (Adapted if adapted else nn.Linear)(WIDTH, VOCABULARY, bias=bias, dtype=dtype)


def oracle(hidden, labels, head, factor=1.0, cap=None):
    """Plain torch in float64, all logits at once, the shift written out."""
    bias = None if head.bias is None else head.bias.double()
    logits = F.linear(hidden.double(), head.weight.double(), bias) * factor
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    return sum((-logits[at - 1].log_softmax(-1)[labels[at]] for at in range(1, len(labels)) if labels[at] != -100),
               torch.zeros((), dtype=torch.float64))


@pytest.fixture(params=[None, 16 * 4 * VOCABULARY], ids=["one chunk", "chunks of 16 rows"])
def chunks(request, monkeypatch):
    if request.param:
        chunks_of(monkeypatch, request.param)


def chunks_of(monkeypatch, size):
    """Bytes of float32 logits at a time."""
    monkeypatch.setattr(loss, "CHUNK_BYTES", size)
    monkeypatch.setitem(fused.SLICE_BYTES, "cpu", size)
    monkeypatch.setitem(fused.WORK_BYTES, "cpu", size // 4)
    monkeypatch.setitem(tiles.TILE, "cpu", (16, 10))


PATHS = {"fused": {}, "bias": {"bias": True}, "scaled": {"factor": 0.25}, "capped": {"cap": 0.8},
         "both": {"bias": True, "factor": 2.0, "cap": 1.5}, "adapted": {"adapted": True, "factor": 2.0, "cap": 1.5}}


def split(path):
    """Keys of `case`, keys of `nll_sum`."""
    keys = PATHS[path]
    shape = {name: keys[name] for name in ("bias", "adapted") if name in keys}
    return shape, {name: value for name, value in keys.items() if name not in shape}


@pytest.mark.usefixtures("chunks", "kernels")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("path", PATHS)
def test_value_and_gradients_are_those_of_cross_entropy(path, dtype, record_property):
    shape, keys = split(path)
    hidden, labels, head = case(dtype, **shape)
    actual = nll_sum(hidden, labels, head, **keys).total
    got = torch.autograd.grad(3.0 * actual, [hidden, *head.parameters()])
    expected = oracle(hidden, labels, head, **keys)
    want = torch.autograd.grad(3.0 * expected, [hidden, *head.parameters()])
    assert actual.dtype == dtype
    limit = 1e-12 if dtype == torch.float64 else 1e-5
    worst = max((a - b).norm() / b.norm() for a, b in zip(got, want, strict=True))
    assert abs(actual.item() / expected.item() - 1) < limit
    record_property("max_relative", float(worst))
    assert worst < limit


@pytest.mark.usefixtures("chunks", "kernels")
@pytest.mark.parametrize("path", PATHS)
def test_a_frozen_head_gets_no_gradient_and_changes_nothing(path):
    shape, keys = split(path)
    hidden, labels, head = case(**shape)
    (want,) = torch.autograd.grad(nll_sum(hidden, labels, head, **keys).total, [hidden])
    head.requires_grad_(False)
    nll_sum(hidden, labels, head, **keys).total.backward()
    assert torch.allclose(hidden.grad, want, rtol=1e-12)
    assert head.weight.grad is None


@pytest.mark.usefixtures("chunks", "kernels")
@pytest.mark.parametrize("path", PATHS)
def test_evaluation_is_the_same_sum_and_counts_what_was_right(path):
    shape, keys = split(path)
    hidden, labels, head = case(**shape)
    labels[50:70] = head(hidden[49:69]).argmax(-1)             # its wrong result
    with torch.no_grad():
        total, correct = nll_sum(hidden, labels, head, **keys)
        per_token, _ = nll_sum(hidden, labels, head, per_token=True, **keys)
        right = sum(int(head(hidden[at - 1]).argmax() == labels[at]) for at in range(1, TOKENS) if labels[at] != -100)
        assert total.dtype == torch.float64
        assert abs(total - oracle(hidden, labels, head, **keys)) < 1e-9
        assert abs(per_token.sum() - total) < 1e-9
        assert correct == right >= 20


@pytest.mark.usefixtures("kernels")
def test_nothing_supervised_is_a_zero_with_a_graph():
    hidden, labels, head = case()
    total = nll_sum(hidden, torch.full_like(labels, -100), head).total
    total.backward()
    assert total == 0
    assert (hidden.grad == 0).all()
    assert (head.weight.grad == 0).all()
    with torch.no_grad():
        assert nll_sum(hidden, torch.full_like(labels, -100), head).total == 0


def test_the_first_token_is_never_a_target():
    """Its label would wrap around to the last position."""
    assert shift(torch.tensor([7, 8, 9])).tolist() == [8, 9, -100]
    hidden, labels, head = case()
    labels[0] = 5
    with_first = nll_sum(hidden, labels, head).total
    labels[0] = -100
    assert with_first == nll_sum(hidden, labels, head).total


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_under_bf16_autocast(path, frozen):
    """Gradients come in the dtypes of their tensors, as close as bf16 allows."""
    shape, keys = split(path)
    hidden, labels, head = case(torch.float32, **shape)
    head.requires_grad_(not frozen)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = nll_sum(hidden, labels, head, **keys).total
    total.backward()
    assert total.dtype == hidden.grad.dtype == torch.float32
    want = oracle(hidden, labels, head, **keys)
    leaves = [hidden] if frozen else [hidden, *head.parameters()]
    wanted = torch.autograd.grad(want, leaves)
    assert abs(total - want) / want < 3e-3
    for got, ref in zip([leaf.grad for leaf in leaves], wanted, strict=True):
        assert got.dtype == torch.float32
        assert (got - ref).norm() / ref.norm() < 1e-2


def test_bf16_weights():
    hidden, labels, head = case(torch.bfloat16)
    total = nll_sum(hidden, labels, head).total
    total.backward()
    assert hidden.grad.dtype == head.weight.grad.dtype == torch.bfloat16
    assert abs(total - oracle(hidden, labels, head)) / total < 1e-2


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("grad", [True, False], ids=["train", "evaluate"])
@pytest.mark.parametrize("path", PATHS)
def test_no_logits_of_a_whole_batch_exist_in_memory(monkeypatch, path, grad):
    tokens, vocabulary, rows = 512, 400, 16
    chunks_of(monkeypatch, rows * 4 * vocabulary)
    shape, keys = split(path)
    head = (Adapted if shape.pop("adapted", False) else nn.Linear)(8, vocabulary, **shape)
    hidden = torch.randn(tokens, 8, requires_grad=grad)
    labels = torch.randint(vocabulary, (tokens,))
    with torch.set_grad_enabled(grad), Largest() as largest:
        total = nll_sum(hidden, labels, head, **keys).total
        if grad:
            total.backward()
    assert largest.numel <= rows * vocabulary
    with Largest() as naive:
        F.cross_entropy(head(hidden), labels)
    assert naive.numel == tokens * vocabulary


def tiny(kind, **keys):
    shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                 num_key_value_heads=1)
    torch.manual_seed(1)
    return models.init_causal_lm({"model_type": kind, "initializer_range": 0.5, **shape, **keys}, vocab_size=64,
                                 dtype=torch.float64, attention="eager", pad_token_id=0, bos_token_id=1, eos_token_id=2)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("kind", "keys"), [
    ("llama", {}), ("gemma2", {"head_dim": 8, "final_logit_softcapping": 0.7}), ("cohere", {"logit_scale": 0.3}),
    ("granite", {"logits_scaling": 6.0}), ("phi", {}),      # Phi's head has a bias
])
def test_the_loss_of_a_model_is_transformers_own(kind, keys, record_property):
    """Value and gradients of every weight against `model(labels=...)`, whose mean is over the same tokens."""
    model = tiny(kind, **keys)
    ids = torch.randint(3, 64, (1, 40))
    labels = ids.clone()
    labels[0, :9] = -100
    count = (labels[0, 1:] != -100).sum()
    wanted = model(input_ids=ids, labels=labels, use_cache=False).loss * count
    want = torch.autograd.grad(wanted, list(model.parameters()), allow_unused=True)
    hidden = anatomy.backbone(model)(input_ids=ids, use_cache=False).last_hidden_state[0]
    factor, cap = anatomy.logit_adjustment(model)
    total = nll_sum(hidden, labels[0], anatomy.head(model), factor=factor, cap=cap).total
    got = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
    worst = max((a - b).norm() / b.norm().clamp_min(1e-9) for a, b in zip(got, want, strict=True) if b is not None)
    record_property("max_relative", worst.item())
    assert abs(total / wanted - 1) < 1e-6                   # transformers takes its loss in float32
    assert worst < 1e-5


# ---- rows that are trained beside adapters

ROWS = {"plain": {}, "scaled": {"factor": 0.25}, "capped": {"factor": 2.0, "cap": 0.8}}


def with_rows(dtype=torch.float64):
    """A frozen head with three rows that PEFT trains, changed from their initial values; and those rows."""
    from peft.utils.other import TrainableTokensWrapper

    hidden, labels, inner = case(dtype)
    labels[20:26] = torch.tensor([3, 30, 7, 7, 3, 5])
    head = TrainableTokensWrapper(inner.requires_grad_(False), "default", token_indices=[7, 3, 30])
    head.set_adapter("default")
    rows = head.token_adapter.trainable_tokens_delta["default"]
    with torch.no_grad():
        rows += torch.randn_like(rows)
    assert trained_rows(head) is not None
    return hidden, labels, head, rows


def rows_oracle(hidden, labels, head, rows, factor=1.0, cap=None):
    """`oracle` for the matrix with the rows inserted by hand."""
    weight = list(head.token_adapter.base_layer.weight.double())
    for place, row in zip([7, 3, 30], rows.double(), strict=True):
        weight[place] = row
    whole = nn.Module()
    whole.weight, whole.bias = torch.stack(weight), None
    return oracle(hidden, labels, whole, factor, cap)


@pytest.mark.usefixtures("chunks", "kernels")
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("keys", ROWS.values(), ids=ROWS)
def test_rows_that_learn_have_exact_gradients(keys, per_token):
    """Loss, gradient of the rows and of the hidden states; the rest of the matrix gets none."""
    hidden, labels, head, rows = with_rows()
    actual = nll_sum(hidden, labels, head, per_token=per_token, **keys).total.sum()
    expected = rows_oracle(hidden, labels, head, rows, **keys)
    got, want = (torch.autograd.grad(3.0 * total, [hidden, rows]) for total in (actual, expected))
    assert abs(actual - expected) < 1e-10
    for mine, other in zip(got, want, strict=True):
        assert (mine - other).norm() / other.norm() < 1e-12


@pytest.mark.usefixtures("chunks", "kernels")
def test_rows_that_learn_are_evaluated_and_counted():
    hidden, labels, head, rows = with_rows()
    with torch.no_grad():
        labels[50:70] = head(hidden[49:69]).argmax(-1)
        total, correct = nll_sum(hidden, labels, head)
        assert abs(total - rows_oracle(hidden, labels, head, rows)) < 1e-9
        assert correct >= 20
    nothing = nll_sum(hidden, torch.full_like(labels, -100), head).total
    assert torch.equal(torch.autograd.grad(nothing, rows)[0], torch.zeros_like(rows))


@pytest.mark.parametrize("autocast", [True, False])
def test_rows_that_learn_in_bf16(autocast):
    """Under autocast, and as float32 rows of a bf16 matrix."""
    hidden, labels, head, rows = with_rows(torch.float32 if autocast else torch.bfloat16)
    rows.data = rows.data.float()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        total = nll_sum(hidden, labels, head).total
        with torch.no_grad():
            assert abs(nll_sum(hidden, labels, head).total / total - 1) < 1e-2
    got = torch.autograd.grad(total, [hidden, rows])
    want = torch.autograd.grad(rows_oracle(hidden, labels, head, rows), [hidden, rows])
    for mine, other in zip(got, want, strict=True):
        assert (mine.float() - other.float()).norm() / other.float().norm() < 1e-2
    assert got[1].dtype == torch.float32


def test_a_count_from_the_host_spares_asking_the_device():
    """`nonzero` synchronises with a CUDA device to get the count; if the count is given, nothing synchronises."""
    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(function.overloadpacket._qualified_op_name)
            return function(*args, **(kwargs or {}))

    hidden, labels, head = case()
    names: list[str] = []
    with Names():
        actual = nll_sum(hidden, labels, head, count=int((labels != -100).sum())).total
    assert "aten::nonzero" not in names
    assert "aten::_local_scalar_dense" not in names[names.index("aten::nonzero_static"):]
    assert actual.item() == nll_sum(hidden, labels, head).total.item() == pytest.approx(oracle(hidden, labels, head).item())


@pytest.mark.parametrize("tile", [(2048, 1024), (16, 5)])
def test_of_equal_logits_the_first_counts_as_argmax_has_it(monkeypatch, tile):
    """Half precision rounds many logits to the same number; a tie that counted as right would flatter a model."""
    monkeypatch.setitem(tiles.TILE, "cpu", tile)
    torch.manual_seed(0)
    head = nn.Linear(4, 23, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.randint(-3, 4, (4, 4))[torch.arange(23) % 4])      # each logit is there five or six times
        hidden, targets = torch.randint(-3, 4, (50, 4)).float(), torch.randint(23, (50,))
        _, right = tiles.measure(hidden, targets, fused.Head(head.weight))
        assert right.tolist() == (head(hidden).argmax(1) == targets).tolist()
        targets = torch.randint(4, (50,))
        _, right = tiles.measure(hidden, targets, fused.Head(head.weight))
        assert right.tolist() == (head(hidden).argmax(1) == targets).tolist()
    assert right.any()
    assert not right.all()
