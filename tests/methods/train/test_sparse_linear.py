"""SparseLinear against nn.Linear with a held mask: outputs, gradients, optimizer steps, checkpoints."""

import copy
import pickle
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tulle.errors import UserError
from tulle.methods.train.sparse_linear import SparseLinear, SparseProduct, densify, sparsify

ROUNDING = 1e-5
"""Of float32 sums of up to 300 terms of size 1, two orders above what is seen."""


def pruned(columns: int, rows: int, sparsity: float = 0.7, bias: bool = True, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    linear = nn.Linear(columns, rows, bias=bias)
    with torch.no_grad():
        linear.weight.mul_(torch.rand_like(linear.weight) >= sparsity)
    return linear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (2, 33), (2, 3, 5), (0,)])
def test_forward_and_backward_equal_dense(shape: tuple[int, ...], bias: bool) -> None:
    dense = pruned(130, 70, bias=bias)
    sparse = SparseLinear.from_linear(dense)
    mask = dense.weight != 0
    x = torch.randn(*shape, 130)
    dy = torch.randn(*shape, 70)
    results = []
    for module in (dense, sparse):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        y.backward(dy)
        results.append((y.detach(), leaf.grad))
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, atol=ROUNDING, rtol=ROUNDING)
    assert dense.weight.grad is not None
    torch.testing.assert_close(
        sparse.values.grad, dense.weight.grad.reshape(-1)[sparse.entries], atol=ROUNDING, rtol=ROUNDING
    )
    if bias:
        torch.testing.assert_close(sparse.bias.grad, dense.bias.grad)
    assert torch.equal(sparse.mask, mask) and torch.equal(sparse.weight, dense.weight)


def test_gradients_agree_with_finite_differences() -> None:
    # The loss is linear in each argument, so that wide steps have no truncation error, only rounding.
    sparse = SparseLinear.from_linear(pruned(9, 6, 0.5))
    x, dy = torch.randn(5, 9), torch.randn(5, 6)
    leaf = x.clone().requires_grad_()
    (sparse(leaf) * dy).sum().backward()

    def loss(x: Tensor) -> float:
        with torch.no_grad():
            return float((sparse(x) * dy).double().sum())

    for t, c in [(0, 0), (4, 8), (2, 3)]:
        step = torch.zeros_like(x)
        step[t, c] = 1.0
        assert leaf.grad is not None
        assert float(leaf.grad[t, c]) == pytest.approx(loss(x + step) - loss(x), abs=1e-4)


OPTIMIZERS: dict[str, Callable[[Iterable[Tensor]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_equal_those_of_a_held_mask(name: str) -> None:
    dense = pruned(48, 32)
    mask = dense.weight.detach() != 0
    sparse = SparseLinear.from_linear(dense)
    optimizers = [OPTIMIZERS[name](module.parameters()) for module in (dense, sparse)]
    for seed in range(5):
        torch.manual_seed(seed)
        x, target = torch.randn(20, 48), torch.randn(20, 32)
        for module, optimizer in zip((dense, sparse), optimizers, strict=True):
            optimizer.zero_grad()
            functional.mse_loss(module(x), target).backward()
            if module is dense:
                assert dense.weight.grad is not None
                dense.weight.grad *= mask
            nn.utils.clip_grad_norm_(module.parameters(), 0.01)
            optimizer.step()
        with torch.no_grad():
            dense.weight *= mask
    torch.testing.assert_close(sparse.weight, dense.weight.detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(sparse.bias, dense.bias, atol=1e-5, rtol=1e-4)
    assert not sparse.weight[~mask].any()
    state = optimizers[1].state[sparse.values]
    assert all(value.numel() in (1, int(mask.sum())) for value in state.values() if isinstance(value, Tensor))


def test_only_what_is_asked_for_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    sparse = SparseLinear.from_linear(pruned(20, 10))
    calls = []
    for name in ("input_gradient", "weight_gradient"):
        method = getattr(sparse.pattern, name)
        monkeypatch.setattr(
            sparse.pattern, name, lambda *a, _name=name, _method=method: calls.append(_name) or _method(*a)
        )
    sparse(torch.randn(3, 20)).sum().backward()
    assert calls == ["weight_gradient"]
    calls.clear()
    sparse.values.requires_grad_(False)
    sparse(torch.randn(3, 20, requires_grad=True)).sum().backward()
    assert calls == ["input_gradient"]


def test_autocast_takes_the_product_in_float32() -> None:
    sparse = SparseLinear.from_linear(pruned(64, 32))
    x = torch.randn(5, 64)
    expected = sparse(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = sparse(x)
        rounded = sparse(x.bfloat16())
    assert torch.equal(found, expected)
    torch.testing.assert_close(rounded, sparse(x.bfloat16().float()), atol=0, rtol=0)
    rounded.sum().backward()
    assert sparse.values.grad is not None and sparse.values.grad.dtype == torch.float32


def test_state_dict_is_the_dense_one() -> None:
    dense = nn.Sequential(pruned(24, 16), nn.ReLU(), pruned(16, 8, bias=False, seed=1))
    sparse = copy.deepcopy(dense)
    assert list(sparsify(sparse)) == ["0", "2"]
    for key, value in dense.state_dict().items():
        assert torch.equal(sparse.state_dict()[key], value)
    other = copy.deepcopy(sparse)
    with torch.no_grad():
        for module in other.modules():
            if isinstance(module, SparseLinear):
                module.values.mul_(2)
    sparse.load_state_dict(other.state_dict())
    assert torch.equal(sparse[0].values, other[0].values)
    assert torch.equal(densify(sparse)[2].weight, 2 * dense[2].weight)
    assert isinstance(sparse[0], nn.Linear)


def test_loading_refuses_other_masks_shapes_and_keys() -> None:
    sparse = SparseLinear.from_linear(pruned(12, 6))
    before = sparse.values.detach().clone()
    with pytest.raises(RuntimeError, match="expected zeros where the held mask has them"):
        sparse.load_state_dict({"weight": torch.ones(6, 12), "bias": torch.zeros(6)})
    with pytest.raises(RuntimeError, match="weight: expected"):
        sparse.load_state_dict({"weight": torch.zeros(6, 11), "bias": torch.zeros(6)})
    assert torch.equal(sparse.values, before)
    with pytest.raises(RuntimeError, match='Missing key.*"bias"'):
        sparse.load_state_dict({"weight": torch.zeros(6, 12)})
    with pytest.raises(RuntimeError, match='Unexpected key.*"scale"'):
        sparse.load_state_dict({"weight": sparse.weight, "bias": torch.zeros(6), "scale": torch.ones(1)})


def test_copies_and_pickles() -> None:
    sparse = SparseLinear.from_linear(pruned(40, 30))
    x = torch.randn(4, 40)
    for again in (copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))):
        assert torch.equal(again(x), sparse(x))
        with torch.no_grad():
            again.values.zero_()
    assert sparse.values.any()


def test_sparsify_leaves_dense_and_shared_weights() -> None:
    model = nn.Module()
    model.embedding = nn.Embedding(16, 8)
    model.head = nn.Linear(8, 16, bias=False)
    model.head.weight = model.embedding.weight
    with torch.no_grad():
        model.embedding.weight.mul_(torch.rand(16, 8) > 0.7)
    model.dense = nn.Linear(8, 8)
    model.sparse = pruned(8, 8)
    model.sparse.weight.requires_grad_(False)
    made = sparsify(model)
    assert list(made) == ["sparse"] and model.sparse is made["sparse"]
    assert not model.sparse.values.requires_grad and model.sparse.bias.requires_grad
    densify(model)
    assert type(model.sparse) is nn.Linear and not model.sparse.weight.requires_grad


def test_a_given_mask_may_keep_zeros() -> None:
    linear = pruned(8, 8)
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[:, :2] = True
    made = sparsify(nn.ModuleDict({"a": linear}), {"a": mask})["a"]
    assert torch.equal(made.mask, mask)
    assert torch.equal(made.weight, linear.weight * mask)


def test_bad_input_is_refused_in_one_line() -> None:
    linear = pruned(8, 4)
    with pytest.raises(UserError, match="expected a float32 matrix on the CPU, found torch.bfloat16"):
        SparseLinear.from_linear(linear.bfloat16())
    linear = linear.float()
    with pytest.raises(UserError, match="expected a bool mask of shape \\(4, 8\\), found torch.bool \\(8, 4\\)"):
        SparseLinear.from_linear(linear, torch.ones(8, 4, dtype=torch.bool))
    with pytest.raises(UserError, match="found 'b'"):
        sparsify(nn.ModuleDict({"a": linear}), {"b": torch.ones(4, 8, dtype=torch.bool)})
    with pytest.raises(UserError, match="use SparseLinear.from_linear"):
        sparsify(linear)
    sparse = SparseLinear.from_linear(linear)
    with pytest.raises(UserError, match="expected inputs of 8 channels"):
        sparse(torch.zeros(2, 7))
    with pytest.raises(UserError, match="expected float32 inputs"):
        sparse(torch.zeros(2, 8).double())


def test_a_second_derivative_is_refused() -> None:
    sparse = SparseLinear.from_linear(pruned(8, 4))
    x = torch.randn(2, 8, requires_grad=True)
    y = SparseProduct.apply(x, sparse.values, sparse.bias, sparse.pattern)
    (gradient,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
