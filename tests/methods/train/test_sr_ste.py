"""STE, SR-STE, S-STE and STEP against steps computed by hand on a 2 x 8 weight."""

import pytest
import torch
from torch import nn

from tulle.core.masks import Pattern
from tulle.errors import UserError
from tulle.methods.train.sr_ste import SRSTE, SSTE, STE, STEP, hard, scale_of, soft

WEIGHT = torch.tensor(
    [[0.5, -0.1, -1.0, 2.0, 0.3, 0.25, 0.2, 1.5], [-0.4, 3.0, 0.6, -0.5, 1.0, 0.1, 2.0, 0.9]], dtype=torch.float64
)
KEPT = torch.tensor([[0, 0, 1, 1, 1, 0, 0, 1], [0, 1, 1, 0, 1, 0, 1, 0]], dtype=torch.bool)
"""The two largest of every four input channels."""
PRUNED = (~KEPT).double()
X = torch.tensor([[1.0, -2.0, 3.0, -4.0, 5.0, -6.0, 7.0, -8.0]], dtype=torch.float64)


def prepared(method, steps: int = 0) -> nn.Linear:
    layer = nn.Linear(8, 2, bias=False, dtype=torch.float64)
    layer.weight.data.copy_(WEIGHT)
    method.prepare(layer, steps, {"layer": layer})
    return layer


def test_forward_uses_the_two_largest_of_four():
    layer = prepared(STE())
    assert torch.equal(layer(X), X @ (WEIGHT * KEPT).T)


@pytest.mark.parametrize(("method", "decay"), [(STE(), 0.0), (SRSTE(), 2e-4), (SRSTE(decay=0.1), 0.1)])
def test_one_step_by_hand(method, decay):
    layer = prepared(method)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    # L = (y_1² + y_2²)/2: dL/dW̃ = y·x, for all of W.
    y = X @ (WEIGHT * KEPT).T
    (layer(X).square().sum() / 2).backward()
    method.after_backward(0)
    gradient = y.T @ X + decay * PRUNED * WEIGHT
    torch.testing.assert_close(layer.weight.grad, gradient, rtol=1e-12, atol=0)
    optimizer.step()
    method.after_step(0, [optimizer])
    torch.testing.assert_close(layer.weight.detach(), WEIGHT - 0.5 * gradient, rtol=1e-12, atol=0)


def test_decay_is_added_once_however_many_micro_batches():
    method = SRSTE(decay=0.1)
    layer = prepared(method)
    for _ in range(4):
        (layer(X).sum() / 4).backward()
    method.after_backward(0)
    torch.testing.assert_close(layer.weight.grad, X.repeat(2, 1) + 0.1 * PRUNED * WEIGHT, rtol=1e-12, atol=0)


def test_decay_goes_through_the_optimizer():
    # Adam's first step is lr·sign(g): pruned weights shrink by lr whatever λ, which a decay outside would not do.
    method = SRSTE()
    layer = prepared(method)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01, eps=1e-20)
    layer.weight.grad = torch.zeros_like(WEIGHT)
    method.after_backward(0)
    optimizer.step()
    expected = WEIGHT - 0.01 * PRUNED * WEIGHT.sign()
    torch.testing.assert_close(layer.weight.detach(), expected, rtol=1e-12, atol=1e-12)


def test_sad_counts_changed_bits():
    method = STE()
    layer = prepared(method)
    with torch.no_grad():
        layer.weight[0, 0] = 5.0  # replaces -1.0: two bits of sixteen
    method.after_step(0, [])
    method.after_step(1, [])
    assert method.metrics() == {"sad": 2 / 32}
    assert method.metrics() == {"sad": 0.0}


@pytest.mark.parametrize("kind", [STE, SRSTE, SSTE, STEP])
def test_a_resumed_method_compares_with_the_masks_of_the_loaded_weights(kind):
    method = kind()
    layer = prepared(method, steps=4)
    with torch.no_grad():
        layer.weight.copy_(-WEIGHT.flip(1))  # as a checkpoint does
    method.load_state(method.state())
    assert torch.equal(method.masks["layer"], KEPT.flip(1))


def test_finish_leaves_a_plain_masked_linear():
    method = STE()
    layer = prepared(method)
    method.finish()
    assert type(layer) is nn.Linear and torch.equal(layer.weight, WEIGHT * KEPT)


@pytest.mark.parametrize("pattern", ["1:4", "2:4", "4:8", "3:8", "8:8"])
def test_any_pattern(pattern):
    torch.manual_seed(0)
    weight = torch.randn(6, 32)
    n, m = map(int, pattern.split(":"))
    kept = (hard(weight, Pattern.parse(pattern)) != 0).reshape(6, -1, m).sum(-1)
    assert (kept == n).all()
    # Soft thresholding keeps the same entries, and is continuous where an entry leaves.
    assert torch.equal(soft(weight, Pattern.parse(pattern)) != 0, hard(weight, Pattern.parse(pattern)) != 0)


def test_soft_threshold_by_hand():
    # Magnitudes .5 .1 1 2: the third is .5. And .3 .25 .2 1.5: .25.
    expected = torch.tensor([0.0, 0.0, -0.5, 1.5, 0.05, 0.0, 0.0, 1.25], dtype=torch.float64)
    torch.testing.assert_close(soft(WEIGHT[:1], Pattern(2, 4))[0], expected, rtol=1e-12, atol=1e-15)


def test_scale_is_least_squares():
    s = soft(WEIGHT, Pattern(2, 4))
    best = scale_of(WEIGHT, s)
    errors = [float((WEIGHT - b * s).norm()) for b in (best - 1e-4, best, best + 1e-4)]
    assert errors[1] < min(errors[0], errors[2])


def test_s_ste_scale_stays_what_it_was():
    method = SSTE()
    layer = prepared(method)
    scale = scale_of(WEIGHT, soft(WEIGHT, Pattern(2, 4)))
    with torch.no_grad():
        layer.weight.mul_(2)
    expected = X @ (scale * soft(2 * WEIGHT, Pattern(2, 4))).T
    torch.testing.assert_close(layer(X), expected, rtol=1e-12, atol=0)


def test_step_is_dense_first_then_masked_with_a_frozen_variance():
    method = STEP(dense=0.5)
    layer = prepared(method, steps=4)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01)
    variances = []
    for step in range(4):
        masked = step >= 2
        expected = hard(layer.weight.detach(), Pattern(2, 4)) if masked else layer.weight.detach()
        torch.testing.assert_close(layer(X), X @ expected.T, rtol=1e-12, atol=0)
        optimizer.zero_grad()
        layer(X).square().sum().backward()
        method.after_backward(step)
        optimizer.step()
        method.after_step(step, [optimizer])
        variances.append(optimizer.state[layer.weight]["exp_avg_sq"].clone())
    assert not torch.equal(variances[0], variances[1])
    assert torch.equal(variances[1], variances[2]) and torch.equal(variances[2], variances[3])


def test_step_wants_adam():
    method = STEP()
    layer = prepared(method, steps=4)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(X).sum().backward()
    optimizer.step()
    with pytest.raises(UserError, match="expected AdamW for step"):
        method.after_step(0, [optimizer])


def test_channels_must_fit_the_pattern():
    layer = nn.Linear(6, 2)
    with pytest.raises(UserError, match="divisible by 4"):
        STE().prepare(layer, linears={"layer": layer})
