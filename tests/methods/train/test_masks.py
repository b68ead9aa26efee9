"""Held masks and gradual magnitude: hand-computed steps, and masks that nothing moves."""

import pytest
import torch
from torch import nn

from tulle.errors import UserError
from tulle.methods.train.masks import GradualMagnitude, HeldMasks, cubic
from tulle.methods.train.method import optimizer_state

WEIGHT = torch.tensor(
    [[0.5, 0.0, -1.0, 2.0, 0.0, 0.25, 0.0, 1.5], [0.0, 3.0, 0.0, -0.5, 1.0, 0.0, 2.0, 0.0]], dtype=torch.float64
)


def linear(weight: torch.Tensor = WEIGHT) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight.data.copy_(weight)
    return layer


def held(layer: nn.Linear) -> HeldMasks:
    method = HeldMasks()
    method.prepare(layer, linears={"layer": layer})
    return method


def test_one_sgd_step_by_hand():
    layer = linear()
    method = held(layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    x = torch.arange(1.0, 9.0, dtype=torch.float64)[None]
    layer(x).sum().backward()  # every row's gradient is x
    method.after_backward(0)
    assert torch.equal(layer.weight.grad, (WEIGHT != 0) * x)
    optimizer.step()
    method.after_step(0, [optimizer])
    torch.testing.assert_close(layer.weight.detach(), (WEIGHT != 0) * (WEIGHT - 0.1 * x), rtol=1e-12, atol=0)


def test_clipping_sees_kept_entries_alone():
    layer = linear()
    method = held(layer)
    layer.weight.grad = torch.ones_like(WEIGHT)
    method.after_backward(0)
    assert float(nn.utils.clip_grad_norm_(layer.parameters(), 1e9)) == pytest.approx(int((WEIGHT != 0).sum()) ** 0.5)


@pytest.mark.parametrize("kind", ["adamw", "adam with coupled decay", "sgd", "muon"])
def test_masks_and_optimizer_state_never_move(kind):
    torch.manual_seed(0)
    weight = torch.randn(16, 24) * (torch.rand(16, 24) < 0.4)
    layer = linear(weight)
    method = held(layer)
    parameters = list(layer.parameters())
    optimizer = {
        "adamw": lambda: torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.3),
        "adam with coupled decay": lambda: torch.optim.Adam(parameters, lr=0.05, weight_decay=0.3),
        "sgd": lambda: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.3),
        "muon": lambda: torch.optim.Muon(parameters, lr=0.05, weight_decay=0.3, momentum=0.95),
    }[kind]()
    before = layer.weight.detach().clone()
    for step in range(20):
        optimizer.zero_grad()
        layer(torch.randn(8, 24)).square().sum().backward()
        method.after_backward(step)
        optimizer.step()
        method.after_step(step, [optimizer])
        pruned = weight == 0
        assert (layer.weight[pruned] == 0).all()
        states = optimizer_state(layer.weight, [optimizer])
        assert states
        assert all((state[pruned] == 0).all() for state in states.values())
    assert (layer.weight != before)[weight != 0].all()


def test_a_dense_model_has_nothing_to_hold():
    with pytest.raises(UserError, match="found none; prune first"):
        held(linear(torch.ones(2, 8)))


def test_cubic_schedule_closed_form():
    # s_f + (s_i - s_f)(1 - t/n)^3 at quarters of the way from 20 % to 80 %: 27, 8 and 1 of 64 parts of 60 % are left.
    found = [cubic(step, 3, 7, 0.2, 0.8) for step in range(3, 8)]
    assert found == pytest.approx([0.2, 0.546875, 0.725, 0.790625, 0.8])


def test_gradual_magnitude_prunes_the_smallest_and_never_lets_back_in():
    torch.manual_seed(1)
    layer = linear(torch.randn(10, 20))
    method = GradualMagnitude(sparsity=0.75, begin=0.1, end=0.8, every=5)
    method.prepare(layer, 40, {"layer": layer})
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01, weight_decay=0.1)
    shares, previous = [], torch.ones(10, 20, dtype=torch.bool)
    for step in range(40):
        optimizer.zero_grad()
        layer(torch.randn(8, 20)).square().sum().backward()
        method.after_backward(step)
        optimizer.step()
        expected = method.scheduled(step)
        largest = (layer.weight.detach().abs() * method.masks["layer"]).flatten().sort(descending=True).values
        method.after_step(step, [optimizer])
        mask = method.masks["layer"]
        assert not (mask & ~previous).any()
        assert (layer.weight[~mask] == 0).all()
        if expected is not None:
            assert int(mask.sum()) == 200 - round(expected * 200)
            assert float(layer.weight.detach()[mask].abs().min()) == float(largest[int(mask.sum()) - 1])
            assert all((state[~mask] == 0).all() for state in optimizer_state(layer.weight, [optimizer]).values())
        shares.append(method.pruned_fraction())
        previous = mask
    # The first pruning, after a tenth of the steps, is to s_i = 0; the next five steps later.
    assert shares[8] == 0.0 < shares[9]
    assert shares[13] < shares[18] < 0.75 == shares[31] == shares[-1]  # the goal by the last step of the first 80 %


def test_masks_survive_a_checkpoint():
    layer = linear(torch.randn(4, 8))
    method = GradualMagnitude(sparsity=0.5, every=1, end=1.0)
    method.prepare(layer, 3, {"layer": layer})
    for step in range(2):
        method.after_step(step, [])
    state = {name: value.clone() for name, value in method.state().items()}
    other = linear(layer.weight.detach())
    again = GradualMagnitude(sparsity=0.5, every=1, end=1.0)
    again.prepare(other, 3, {"layer": other})
    again.load_state(state)
    method.after_step(2, [])
    again.after_step(2, [])
    assert torch.equal(again.masks["layer"], method.masks["layer"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 1.0}, "between 0 and 1"),
        ({"begin": 0.8, "end": 0.2}, "0 <= begin < end <= 1"),
        ({"targets": ("head",)}, "targets of qkv"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(UserError, match=message):
        GradualMagnitude(**settings)


def test_native_kernels_train_the_same_model(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    from tulle.methods.train.method import target_linears
    from tulle.methods.train.sparse_linear import SparseLinear
    from tulle.training.optim import build_optimizers
    from tulle.training.recipe import Training

    settings = Training(tokens=64, context=8, batch=2, learning_rate=0.01, weight_decay=0.3)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 40}
    trained = []
    for native in (False, True):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
        with torch.no_grad():
            for layer in target_linears(model).values():
                layer.weight.mul_(torch.rand_like(layer.weight) < 0.3)
        method = HeldMasks(native=native)
        method.prepare(model, 6)
        optimizers = build_optimizers(model, settings)
        for step in range(6):
            ids = torch.randint(0, 40, (2, 12), generator=torch.Generator().manual_seed(step))
            model(input_ids=ids, labels=ids).loss.backward()
            method.after_backward(step)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            for optimizer in optimizers:
                optimizer.step()
            method.after_step(step, optimizers)
            model.zero_grad(set_to_none=True)
        assert any(isinstance(m, SparseLinear) for m in model.modules()) == native
        method.finish()
        trained.append(model.state_dict())
        assert not any(isinstance(m, SparseLinear) for m in model.modules())
    for name, tensor in trained[0].items():
        # The same steps; sums in another order, which Adam amplifies where its variance is small.
        torch.testing.assert_close(trained[1][name], tensor, rtol=1e-3, atol=1e-4, msg=name)
        assert torch.equal(trained[1][name] == 0, tensor == 0)
