"""The schedule's closed form, and which parameters each optimizer gets."""

import math

import pytest
import torch

from tulle.training.architecture import Llama
from tulle.training.optim import (
    build_optimizers,
    first_decay_step,
    learning_rates,
    length_matters_from,
    warmup_stable_decay,
)
from tulle.training.recipe import Training

SHAPE = Llama(
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


@pytest.mark.parametrize(
    ("schedule", "rates", "length_matters"),
    [
        ("linear", [1 / 3, 2 / 3, 1, 3 / 4, 1 / 2, 1 / 4], 2),
        ("cosine", [1 / 3, 2 / 3, 1, (1 + 0.5**0.5) / 2, 1 / 2, (1 - 0.5**0.5) / 2], 2),
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1], 6),
        ("wsd", [1 / 3, 2 / 3, 1, 1 - (1 / 4) ** 0.5, 1 - (2 / 4) ** 0.5, 1 - (3 / 4) ** 0.5], 3),
    ],
)
def test_schedules_by_hand(schedule, rates, length_matters):
    """Six steps, two of them warm-up; the decay of wsd is the last half."""
    made = settings("adamw").model_copy(
        update={"schedule": schedule, "tokens": 6 * 16, "warmup_steps": 2, "decay_fraction": 0.5, "learning_rate": 0.5}
    )
    assert learning_rates(made) == pytest.approx([rate / 2 for rate in rates])
    assert length_matters_from(made) == length_matters


def test_no_decay():
    assert warmup_stable_decay(9, 10, 0, 0.0) == 1.0


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_parameter_once_and_decay_on_matrices_only(kind):
    model = SHAPE.build(vocab_size=300, context=8)
    groups = [g for optimizer in build_optimizers(model, settings(kind)) for g in optimizer.param_groups]
    given = [p for group in groups for p in group["params"]]
    assert {id(p) for p in given} == {id(p) for p in model.parameters()}
    assert len(given) == len(list(model.parameters()))
    for group in groups:
        assert {p.ndim for p in group["params"]} == ({2} if group["weight_decay"] else {1})


def test_muon_gets_the_hidden_matrices_and_not_the_embedding():
    model = SHAPE.build(vocab_size=300, context=8)
    muon = build_optimizers(model, settings("muon"))[1]
    assert isinstance(muon, torch.optim.Muon)
    shapes = [tuple(p.shape) for group in muon.param_groups for p in group["params"]]
    assert len(shapes) == 2 * 7 and (300, 16) not in shapes
