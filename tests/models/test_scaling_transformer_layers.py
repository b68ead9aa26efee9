"""The layers against their formulas, written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tulle.models.scaling_transformer import (
    Multiplicative,
    ScalingTransformerConfig,
    ScalingTransformerForCausalLM,
    SparseFeedForward,
    record_choices,
    training_mask,
)
from tulle.models.scaling_transformer.attention import SparseAttention
from tulle.models.scaling_transformer.choices import Choices
from tulle.models.scaling_transformer.feed_forward import GATHERED_SHARE, DenseFeedForward


def randomised(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return module


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def config(**settings: object) -> ScalingTransformerConfig:
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    return ScalingTransformerConfig(
        **(sizes | {"num_attention_heads": 2, "ff_block": 4, "ff_lowrank": 3, "qkv_modules": 4} | settings)
    )


# The multiplicative layer


@pytest.mark.parametrize("count", [1, 9], ids=["factors", "matrix"])
def test_multiplicative_layer_is_its_sum(count: int) -> None:
    layer = randomised(Multiplicative(6, 8, 4, bias=True)).double()
    x = draw(count, 6).double()
    y = layer(x)
    for t in range(count):
        for s in range(4):
            for m in range(2):
                wanted = sum(x[t, i] * layer.d[s, i] * layer.e[m, i] for i in range(6)) + layer.bias[2 * s + m]
                torch.testing.assert_close(y[t, 2 * s + m], wanted)


@given(st.integers(1, 6), st.integers(1, 6), st.data(), st.booleans())
def test_multiplicative_layer_represents_any_permutation(
    modules: int, size: int, data: st.DataObject, many: bool
) -> None:
    """Input i goes to place m of module s: D[s, i] = 1 and E[m, i] = 1, all else zero."""
    width = modules * size
    permutation = torch.tensor(data.draw(st.permutations(range(width))))
    layer = Multiplicative(width, width, modules, bias=False)
    target = torch.empty_like(permutation)
    target[permutation] = torch.arange(width)  # output place of each input
    inputs = torch.arange(width)
    with torch.no_grad():
        layer.d.zero_()[target // size, inputs] = 1
        layer.e.zero_()[target % size, inputs] = 1
        x = draw(modules + 1 if many else 1, width)
        assert torch.equal(layer(x), x[:, permutation])


# The convolutions


def test_convolutions_are_their_sums() -> None:
    """q[t, s] = bias + Σ over three tokens, the module and its neighbours, and M channels; v: the module alone."""
    layer = randomised(SparseAttention(config(), 0)).double()
    x = draw(1, 5, 16).double()
    seen: dict[str, Tensor] = {}
    layer.attend = lambda q, k, v, *_, **__: seen.update(q=q, k=k, v=v)  # type: ignore[method-assign, assignment]
    layer(x, None, None, None, None)
    y = layer.multiplicative(x).reshape(5, 4, 4)
    for name, conv, reach in (("q", layer.q_conv, 1), ("k", layer.k_conv, 1), ("v", layer.v_conv, 0)):
        out = seen[name].reshape(5, 4, 4)
        for t in range(5):
            for s in range(4):
                wanted = conv.bias.clone()
                for back in range(3):
                    for side in range(-reach, reach + 1):
                        if t - back >= 0 and 0 <= s + side < 4:
                            wanted += conv.weight[:, :, 2 - back, side + reach] @ y[t - back, s + side]
                torch.testing.assert_close(out[t, s], wanted)


def test_sparse_attention_has_no_output_projection() -> None:
    """Its parameters: d·(S + M) + d for the multiplicative layer, M²·(9 + 9 + 3) + 3·M for the convolutions."""
    layer = SparseAttention(config(), 0)
    assert sum(p.numel() for p in layer.parameters()) == 16 * (4 + 4) + 16 + 4 * 4 * 21 + 3 * 4


# The mask of training


def test_hard_mask_is_one_hot_and_soft_mask_the_softmax() -> None:
    logits = draw(3, 5, 4, 8)
    torch.manual_seed(0)
    hard, soft = training_mask(logits, 0.1, 1.0), training_mask(logits, 0.1, 0.0)
    assert set(hard.unique().tolist()) == {0.0, 1.0} and bool((hard.sum(-1) == 1).all())
    assert torch.equal(soft, logits.softmax(-1))
    assert torch.equal(training_mask(logits, 0.0, 1.0).argmax(-1), logits.argmax(-1))


def test_hard_passes_are_three_in_ten() -> None:
    """2000 draws: 0.3 ± 4 standard deviations of a binomial. One draw serves the whole pass."""
    logits = draw(2, 3, 8)
    torch.manual_seed(0)
    hard = [bool(((mask == 0) | (mask == 1)).all()) for mask in (training_mask(logits, 0.1, 0.3) for _ in range(2000))]
    assert abs(sum(hard) / 2000 - 0.3) < 4 * (0.3 * 0.7 / 2000) ** 0.5


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_noise_is_gumbel_s(temperature: float) -> None:
    """argmax(l + τ·Gumbel) follows softmax(l/τ) exactly: frequencies of 40,000 draws within 4 standard deviations."""
    logits, count = torch.tensor([0.3, -0.5, 1.0, 0.0]), 40_000
    torch.manual_seed(0)
    found = training_mask(logits.expand(count, 1, 4), temperature, 1.0).mean(0)[0]
    wanted = (logits / temperature).softmax(-1)
    assert bool(((found - wanted).abs() < 4 * (wanted * (1 - wanted) / count).sqrt()).all())


@pytest.mark.parametrize("hard", [0.0, 1.0])
def test_gradient_of_the_mask_is_the_softmax_s(hard: float) -> None:
    logits, upstream = draw(2, 3, 4).requires_grad_(), draw(2, 3, 4, seed=2)
    torch.manual_seed(0)
    (got,) = torch.autograd.grad((training_mask(logits, 0.1, hard) * upstream).sum(), logits)
    (wanted,) = torch.autograd.grad((logits.softmax(-1) * upstream).sum(), logits)
    torch.testing.assert_close(got, wanted)


# The feed-forward


@pytest.mark.parametrize("hard", [0.0, 1.0])
def test_gradients_reach_the_controller(hard: float) -> None:
    """That of each score by hand: what its unit gives, or would have given, times the upstream gradient, through the
    softmax."""
    layer = randomised(SparseFeedForward(config(ff_hard_probability=hard))).train()
    x, upstream = draw(2, 5, 16), draw(2, 5, 16, seed=2)
    torch.manual_seed(0)
    layer(x).backward(upstream)
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and float(parameter.grad.abs().max()) > 0, name
    with torch.no_grad():
        given = (x @ layer.w1.T).relu() * (upstream @ layer.w2.T)
        soft = layer.controller(x).softmax(-1)
        given = given.unflatten(-1, (6, 4))
        wanted = (soft * (given - (soft * given).sum(-1, keepdim=True))).sum((0, 1)).flatten()
    torch.testing.assert_close(layer.controller.c2.bias.grad, wanted, rtol=1e-4, atol=1e-3)  # values of order 100


def test_evaluation_takes_the_best_unit_of_each_block_in_every_way_of_computing_it() -> None:
    """The formula unit by unit; more tokens than are gathered, as many as are gathered, and one."""
    layer = randomised(SparseFeedForward(config(ff_block=8))).eval()
    gathered = int(GATHERED_SHARE * 8)
    assert gathered > 1
    x = draw(1, 3 * gathered, 16)
    wanted = torch.zeros(len(x[0]), 16) + layer.b2
    for t, token in enumerate(x[0]):
        scores = layer.controller.c2.weight @ (layer.controller.c1.weight @ token) + layer.controller.c2.bias
        for block in range(3):
            unit = 8 * block + int(scores[8 * block : 8 * block + 8].argmax())
            wanted[t] += (layer.w1[unit] @ token).clamp(min=0) * layer.w2[unit]
    for count in (len(x[0]), gathered, 1):
        found = torch.cat([layer(part) for part in x.split(count, 1)], 1)
        torch.testing.assert_close(found[0], wanted, rtol=1e-4, atol=1e-4)  # values of order 30, in float32
    two_rows = layer(x[:, :2].transpose(0, 1))
    torch.testing.assert_close(two_rows[:, 0], wanted[:2], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_gathering_under_autocast() -> None:
    """Weights in float32, products in bfloat16: as the masked product, to a few of bfloat16's roundings."""
    layer = randomised(SparseFeedForward(config())).eval()
    x = draw(1, 1, 16)
    with torch.autocast("cpu", torch.bfloat16):
        logits = layer.controller(x)
        masked = layer._masked(x, torch.nn.functional.one_hot(logits.argmax(-1), 4))
        assert float((layer(x) - masked).norm() / masked.norm()) < 4 * 2**-8


def test_decoding_reads_only_the_chosen_units() -> None:
    """Everything else of W₁ and W₂ is NaN and does not show."""
    layer = randomised(SparseFeedForward(config())).eval()
    x = draw(1, 1, 16)
    wanted = layer(x)
    chosen = layer.controller(x).argmax(-1)[0, 0] + 4 * torch.arange(6)
    others = torch.ones(24, dtype=torch.bool).index_fill(0, chosen, False)
    with torch.no_grad():
        layer.w1[others], layer.w2[others] = torch.nan, torch.nan
    assert torch.equal(layer(x), wanted)


@pytest.mark.parametrize("training", [False, True])
def test_blocks_of_one_are_the_dense_layer(training: bool) -> None:
    sparse = randomised(SparseFeedForward(config(ff_block=1))).train(training)
    dense = DenseFeedForward(config(ff_block=None))
    dense.w1.weight.data, dense.w2.weight.data, dense.w2.bias.data = sparse.w1.data, sparse.w2.data.T, sparse.b2.data
    x = draw(2, 7, 16)
    torch.testing.assert_close(sparse(x), dense(x))


# What the controllers choose


def test_choices_are_counted() -> None:
    """Two blocks of three, five tokens in one sequence and one of two: by hand."""
    picks = [[0, 2], [0, 1], [1, 1], [1, 1], [0, 1]], [[2, 2], [2, 0]]
    seen = Choices(2, 3)
    for sequence in picks:
        seen.add(10.0 * torch.nn.functional.one_hot(torch.tensor([sequence]), 3))
    assert seen.counts.tolist() == [[3, 2, 2], [1, 4, 2]]
    assert (seen.tokens, seen.pairs, seen.changed) == (7, 10, 4)
    assert seen.certainty == pytest.approx(14 * torch.tensor([10.0, 0.0, 0.0]).softmax(0)[0].item())
    assert seen.shown.tolist() == picks[0]


def test_every_controller_is_recorded_and_let_go() -> None:
    torch.manual_seed(0)
    model = ScalingTransformerForCausalLM(config(num_hidden_layers=2)).eval()
    ids = torch.arange(12).reshape(2, 6)
    with record_choices(model) as found:
        model(ids)
    assert list(found) == ["model.layers.0.mlp.controller", "model.layers.1.mlp.controller"]
    for choices in found.values():
        assert choices.counts.sum(-1).tolist() == [12] * 6 and choices.pairs == 2 * 5 * 6
    model(ids)
    assert all(choices.tokens == 12 for choices in found.values())
