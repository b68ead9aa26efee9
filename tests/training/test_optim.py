"""The schedule's closed form, and which parameters each optimizer gets."""

import math

import pytest
import torch

from tulle.training.loop import build_model
from tulle.training.optim import build_optimizers, first_decay_step, warmup_stable_decay
from tulle.training.recipe import Model, Training

SHAPE = Model(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
)


def settings(optimizer: str) -> Training:
    return Training(
        tokens=64,
        context=8,
        batch=2,
        optimizer=optimizer,
        learning_rate=0.01,
        warmup_steps=0,
        decay_fraction=0.0,
    )


def test_schedule_closed_form():
    factors = [warmup_stable_decay(step, 20, warmup_steps=3, decay_fraction=0.25) for step in range(20)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4:15] == [1.0] * 11
    assert factors[15:] == [1 - math.sqrt(t / 6) for t in (1, 2, 3, 4, 5)]


def test_before_the_decay_the_length_does_not_matter():
    for step in range(first_decay_step(60, 0.25)):
        short, long = (warmup_stable_decay(step, n, 5, 0.25) for n in (60, 1000))
        assert short == long


def test_no_decay():
    assert warmup_stable_decay(9, 10, 0, 0.0) == 1.0


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_parameter_once_and_decay_on_matrices_only(kind):
    model = build_model(SHAPE, vocab_size=300, context=8)
    groups = [g for optimizer in build_optimizers(model, settings(kind)) for g in optimizer.param_groups]
    given = [p for group in groups for p in group["params"]]
    assert {id(p) for p in given} == {id(p) for p in model.parameters()}
    assert len(given) == len(list(model.parameters()))
    for group in groups:
        assert {p.ndim for p in group["params"]} == ({2} if group["weight_decay"] else {1})


def test_muon_gets_the_hidden_matrices_and_not_the_embedding():
    model = build_model(SHAPE, vocab_size=300, context=8)
    muon = build_optimizers(model, settings("muon"))[1]
    assert isinstance(muon, torch.optim.Muon)
    shapes = [tuple(p.shape) for group in muon.param_groups for p in group["params"]]
    assert len(shapes) == 2 * 7 and (300, 16) not in shapes
