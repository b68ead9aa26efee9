"""The plain decoder against transformers, for the dense families beyond Llama's."""

from __future__ import annotations

from pathlib import Path

import pytest

from random_decoders import largest_difference, plain_model, reference_model, text
from random_families import DENSE, EXPERTS, HYBRID, corrected, family_config, saved_model

pytestmark = pytest.mark.usefixtures("one_thread")

SEEDS = 12


@pytest.mark.parametrize("family", DENSE + HYBRID)
def test_logits_are_those_of_transformers(family: str) -> None:
    for seed in range(SEEDS):
        config = family_config(family, seed)
        model = reference_model(config, seed)
        tokens, valid = text(seed)
        wanted = model(tokens, attention_mask=valid.long()).logits[valid]
        found = plain_model(config, model)(tokens)[valid]
        assert largest_difference(wanted, found) <= 1e-5, config


@pytest.mark.parametrize("family", EXPERTS)
def test_logits_of_experts_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    for seed in range(SEEDS):
        config = family_config(family, seed)
        model = corrected(reference_model(config, seed), seed)
        tokens, valid = text(seed)
        wanted = model(tokens, attention_mask=valid.long()).logits[valid]
        found = saved_model(model, tmp_path / str(seed))(tokens)[valid]
        assert largest_difference(wanted, found) <= 1e-5, config
