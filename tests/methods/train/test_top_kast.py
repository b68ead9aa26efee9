"""Top-KAST: a step by hand, the factor of the penalty, and that gradients are of B's size."""

import pytest
import torch
from torch import nn

from tulle.errors import UserError
from tulle.methods.train.top_kast import TopKAST, penalty

WEIGHT = torch.tensor(
    [[0.5, -0.1, -1.0, 2.0, 0.3, 0.25, 0.2, 1.5], [-0.4, 3.0, 0.6, -0.7, 1.1, 0.05, 2.5, 0.9]], dtype=torch.float64
)
# 16 weights: A the 4 largest (D = 0.25), B the 8 largest.
A = WEIGHT.abs() >= 1.5
B = WEIGHT.abs() >= 0.7
X = torch.tensor([[1.0, -2.0, 3.0, -4.0, 5.0, -6.0, 7.0, -8.0]], dtype=torch.float64)


def prepared(steps: int = 0, **settings) -> tuple[TopKAST, nn.Linear]:
    layer = nn.Linear(8, 2, bias=False, dtype=torch.float64)
    layer.weight.data.copy_(WEIGHT)
    method = TopKAST(forward_sparsity=0.75, backward_sparsity=0.5, **settings)
    method.prepare(layer, steps, {"layer": layer})
    return method, layer


def test_the_example_is_what_it_says():
    assert (int(A.sum()), int(B.sum())) == (4, 8)


def test_one_step_by_hand():
    method, layer = prepared(penalty=0.0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    y = layer(X)
    assert torch.equal(y, X @ (WEIGHT * A).T)
    (y.square().sum() / 2).backward()
    # What is stored of the gradient is of B's size, and is there in all of B.
    assert layer.values.grad.shape == (8,)
    gradient = y.detach().T @ X
    torch.testing.assert_close(layer.values.grad, gradient[B], rtol=1e-12, atol=0)
    optimizer.step()
    torch.testing.assert_close(layer.values.detach(), (WEIGHT - 0.1 * gradient)[B], rtol=1e-12, atol=0)
    assert [p.numel() for p in layer.parameters()] == [8]


def test_penalty_divides_what_is_outside_a_by_the_density():
    method, layer = prepared(penalty=0.01)
    inside, outside = WEIGHT[A].square().sum(), WEIGHT[B & ~A].square().sum()
    (term,) = method.loss_terms({}, None).values()
    assert term.item() == pytest.approx(0.01 * float(inside + outside / 0.25), rel=1e-12)
    term.backward()
    factor = torch.where(A, 1.0, 4.0).double()[B]
    torch.testing.assert_close(layer.values.grad, 0.02 * factor * WEIGHT[B], rtol=1e-12, atol=0)


def test_penalty_of_a_full_forward_pass_is_plain_decay():
    values = torch.tensor([1.0, 2.0])
    assert penalty(values, torch.tensor([True, True]), 1.0).item() == 5.0


def test_refresh_chooses_anew_and_moves_the_optimizer_state():
    method, layer = prepared(penalty=0.0, refresh=1)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-12, weight_decay=0.0)
    (layer(X).square().sum() / 2).backward()
    optimizer.step()
    before = torch.zeros(16, dtype=torch.float64)
    before[B.flatten()] = optimizer.state[layer.values]["exp_avg"]
    with torch.no_grad():
        # 0.9 grows into A; -0.7 shrinks and leaves B, where the largest of the rest, 0.6, comes in.
        layer.values[(WEIGHT[B] == 0.9)] = 4.0
        layer.values[(WEIGHT[B] == -0.7)] = 0.01
    method.after_step(0, [optimizer])
    after = WEIGHT.clone()
    after[1, 7], after[1, 3] = 4.0, 0.01
    magnitude = after.abs().flatten().sort(descending=True).values
    a, b = after.abs() >= magnitude[3] - 1e-9, after.abs() >= magnitude[7] - 1e-9
    assert b[1, 2] and not b[1, 3] and a[1, 7]
    assert torch.equal(method.mask("layer"), a)
    torch.testing.assert_close(layer.values.detach(), after[b], rtol=1e-9, atol=1e-9)
    expected = (before * (B & b).flatten())[b.flatten()]
    assert torch.equal(optimizer.state[layer.values]["exp_avg"], expected)
    metrics = method.metrics()
    assert metrics["mask_change"] == metrics["mask_change_total"] == 1 / 4


def test_nothing_changes_between_refreshes():
    method, layer = prepared(penalty=0.0, refresh=3)
    for step in range(2):
        with torch.no_grad():
            layer.values.neg_().mul_(0.5)
        method.after_step(step, [])
        assert torch.equal(method.mask("layer"), A)
    with torch.no_grad():
        layer.values[0] = 100.0
    method.after_step(2, [])
    assert not torch.equal(method.mask("layer"), A)


def test_after_exploration_masks_stay_and_only_a_is_trained():
    method, layer = prepared(steps=4, penalty=0.0, refresh=1, explore=0.5)
    (layer(X).square().sum() / 2).backward()
    method.after_backward(2)
    assert (layer.values.grad[~layer.used] == 0).all() and (layer.values.grad[layer.used] != 0).all()
    with torch.no_grad():
        layer.values.copy_(torch.arange(8.0))
    method.after_step(2, [])
    assert torch.equal(method.mask("layer"), A)


def test_finish_leaves_a_plain_linear_with_a_alone():
    method, layer = prepared()
    method.finish()
    assert type(layer) is nn.Linear and torch.equal(layer.weight, WEIGHT * A)
    assert layer.weight.requires_grad and [name for name, _ in layer.named_parameters()] == ["weight"]
    assert not list(layer.named_buffers())


def test_state_goes_on_the_same_way():
    first, layer = prepared(penalty=0.0, refresh=1)
    with torch.no_grad():
        layer.values.mul_(torch.linspace(-1, 3, 8))
    first.after_step(0, [])
    second, other = prepared(penalty=0.0, refresh=1)
    second.load_state({name: value.clone() for name, value in first.state().items()})
    with torch.no_grad():
        other.values.copy_(layer.values)
    assert torch.equal(layer(X), other(X))
    for method, module in ((first, layer), (second, other)):
        with torch.no_grad():
            module.values.mul_(torch.linspace(2, -1, 8))
        method.after_step(1, [])
    assert torch.equal(layer(X), other(X)) and first.metrics() == second.metrics()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"forward_sparsity": 0.5, "backward_sparsity": 0.8}, "0 <= backward_sparsity <= forward_sparsity"),
        ({"refresh": 0}, "refresh >= 1"),
        ({"explore": 2.0}, "explore in"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(UserError, match=message):
        TopKAST(**settings)
