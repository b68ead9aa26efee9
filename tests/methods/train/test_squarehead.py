"""SquareHead's terms against sums written out, and padding that does not count."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tulle.errors import UserError
from tulle.methods.train.squarehead import SquareHead, divergence, normalised_error


class Fixed(nn.Module):
    """A 'teacher' that answers the same states and logits, whatever it is asked."""

    def __init__(self, hidden, logits):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.answer = SimpleNamespace(hidden_states=hidden, logits=logits)

    def forward(self, **inputs):
        assert inputs["output_hidden_states"] and not torch.is_grad_enabled()
        return self.answer


def states(seed: int):
    generator = torch.Generator().manual_seed(seed)
    hidden = tuple(torch.randn(2, 3, 4, generator=generator) for _ in range(3))
    return hidden, torch.randn(2, 3, 7, generator=generator)


def test_terms_written_out():
    (hs, zs), (ht, zt) = states(0), states(1)
    method = SquareHead(weight=0.5, kl=2.0, temperature=3.0, epsilon=0.25).teach(Fixed(ht, zt))
    method.prepare(nn.Linear(1, 1))
    inputs = {"input_ids": torch.zeros(2, 3, dtype=torch.int64)}
    found = method.loss_terms(inputs, SimpleNamespace(hidden_states=hs, logits=zs))
    layers = 0.0  # the first state, the embedding, does not count
    for s, t in zip(hs[1:], ht[1:], strict=True):
        error = sum(float(a - b) ** 2 for a, b in zip(s.flatten(), t.flatten(), strict=True)) / 24
        layers += error / (sum(float(b) ** 2 for b in t.flatten()) / 24 + 0.25)
    assert float(found["squarehead"]) == pytest.approx(0.5 * layers, rel=1e-5)
    kl = 0.0
    for s, t in zip(zs.reshape(6, 7), zt.reshape(6, 7), strict=True):
        p, q = (t / 3).softmax(0), (s / 3).softmax(0)
        kl += float((p * (p.log() - q.log())).sum()) / 6
    assert float(found["kl"]) == pytest.approx(2.0 * 9 * kl, rel=1e-4)


def test_metrics_are_means_since_last_asked():
    (hs, zs), (ht, zt) = states(0), states(1)
    method = SquareHead(kl=1.0).teach(Fixed(ht, zt))
    inputs = {"input_ids": torch.zeros(2, 3, dtype=torch.int64)}
    first = method.loss_terms(inputs, SimpleNamespace(hidden_states=hs, logits=zs))
    method.loss_terms(inputs, SimpleNamespace(hidden_states=ht, logits=zt))  # a student like its teacher: 0
    assert method.metrics() == pytest.approx({name: float(term) / 2 for name, term in first.items()}, abs=1e-6)
    assert method.metrics() == {}


def test_padding_does_not_count():
    (hs, zs), (ht, zt) = states(2), states(3)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    corrupt = [h.clone() for h in (hs[1], ht[1])]
    for h in corrupt:
        h[~mask] = 1e6
    assert torch.equal(normalised_error(hs[1], ht[1], mask, 1e-6), normalised_error(*corrupt, mask, 1e-6))
    other = zs.clone()
    other[~mask] = -50.0
    assert torch.equal(divergence(zs, zt, mask, 1.0), divergence(other, zt, mask, 1.0))


def test_a_student_like_its_teacher_loses_nothing():
    hidden, logits = states(4)
    method = SquareHead(kl=1.0).teach(Fixed(hidden, logits))
    inputs = {"input_ids": torch.zeros(2, 3, dtype=torch.int64)}
    found = method.loss_terms(inputs, SimpleNamespace(hidden_states=hidden, logits=logits))
    assert float(found["squarehead"]) == 0 and abs(float(found["kl"])) < 1e-6


def test_gradients_reach_the_student_alone_and_the_teacher_is_bf16():
    (hs, zs), (ht, zt) = states(5), states(6)
    hs = tuple(h.requires_grad_() for h in hs)
    teacher = Fixed(ht, zt)
    method = SquareHead().teach(teacher)
    inputs = {"input_ids": torch.zeros(2, 3, dtype=torch.int64)}
    method.loss_terms(inputs, SimpleNamespace(hidden_states=hs, logits=zs))["squarehead"].backward()
    assert hs[1].grad is not None and hs[0].grad is None
    assert teacher.weight.dtype == torch.bfloat16 and not teacher.weight.requires_grad


def test_no_teacher_and_another_depth():
    with pytest.raises(UserError, match="a teacher of squarehead, found none"):
        SquareHead().prepare(nn.Linear(1, 1))
    (hs, zs), (ht, zt) = states(7), states(8)
    method = SquareHead().teach(Fixed(ht, zt))
    inputs = {"input_ids": torch.zeros(2, 3, dtype=torch.int64)}
    with pytest.raises(UserError, match="outputs of 2 layers as the teacher has, found 1"):
        method.loss_terms(inputs, SimpleNamespace(hidden_states=hs[:2], logits=zs))
