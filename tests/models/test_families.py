"""The plain decoder against transformers, for the dense families beyond Llama's."""

from __future__ import annotations

from pathlib import Path

import pytest

from random_decoders import FAMILIES, largest_difference, plain_model, random_config, reference_model, text
from random_families import DENSE, EXPERTS, HYBRID, corrected, family_config, saved_model
from tulle.models.rotary import depends_on_length

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


@pytest.mark.parametrize("family", (*FAMILIES, *DENSE, *HYBRID, *EXPERTS))
def test_left_padded_logits_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    """With the positions that its ``generate`` gives; and those of the sequences alone, where no table depends on the
    length of the longest one."""
    for seed in range(2):
        config = random_config(family, seed) if family in FAMILIES else family_config(family, seed)
        model = corrected(reference_model(config, seed), seed)
        ours = saved_model(model, tmp_path / str(seed)) if family in EXPERTS else plain_model(config, model)
        tokens, valid = text(seed)
        valid = valid.flip(1)
        valid[0, : 3 * (seed % 2)] = False
        positions = (valid.long().cumsum(-1) - 1).masked_fill(~valid, 1)
        wanted = model(tokens, attention_mask=valid.long(), position_ids=positions).logits[valid]
        found = ours(tokens, valid)
        assert largest_difference(wanted, found[valid]) <= 1e-5, config
        if not any(depends_on_length(rotary) for rotary in ours.decoder.rotary.values()):
            alone = ours(tokens[1:, valid[1]])[0]
            assert largest_difference(alone, found[1, valid[1]]) <= 1e-5, config
