"""The whole model: caches, padding, generation, files, sizes, bad configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import tulle.hf  # noqa: F401 (registers the model)
from tulle.errors import UserError
from tulle.models.scaling_transformer import (
    ScalingTransformerConfig,
    ScalingTransformerForCausalLM,
    matching_intermediate_size,
    parameter_count,
)

SHAPE: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {"ff_block": None, "qkv_modules": None},
    "ff": {"ff_block": 8, "qkv_modules": None},
    "qkv": {"ff_block": None, "qkv_modules": 8},
    "both": {"ff_block": 8, "qkv_modules": 4},
    "both, no positions": {"ff_block": 8, "qkv_modules": 4, "position_embedding": "none"},
    "all": {"ff_block": 8, "qkv_modules": 4, "loss_modules": 6, "tie_word_embeddings": False},
}
FLOAT32 = {"rtol": 1e-4, "atol": 1e-5}
"""Logits are of order 1; the same sums are taken in another order."""


def config(**settings: Any) -> ScalingTransformerConfig:
    return ScalingTransformerConfig(**(SHAPE | settings))


def build(seed: int = 0, **settings: Any) -> ScalingTransformerForCausalLM:
    torch.manual_seed(seed)
    model = ScalingTransformerForCausalLM(config(**settings))
    for parameter in model.parameters():  # biases of zero would hide mistakes at the edges of sequences
        if parameter.ndim == 1:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def tokens(*shape: int) -> Tensor:
    """None of them 0, which generate is told to take for padding."""
    return torch.randint(1, SHAPE["vocab_size"], shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_no_token_sees_a_later_one(settings: dict[str, Any]) -> None:
    model, ids = build(**settings), tokens(1, 9)

    @given(st.integers(0, 8), st.integers(0, SHAPE["vocab_size"] - 1))
    def holds(position: int, token: int) -> None:
        changed = ids.clone()
        changed[0, position:] = token
        with torch.no_grad():
            assert torch.equal(model(changed).logits[:, :position], before[:, :position])

    with torch.no_grad():
        before = model(ids).logits
    holds()


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
@torch.no_grad()
def test_cached_decode_equals_the_full_forward(settings: dict[str, Any]) -> None:
    """One token at a time, and in chunks of which the first is shorter than the convolutions' reach."""
    model, ids = build(**settings), tokens(2, 12)
    full = model(ids).logits
    assert float(full.std()) > 0.1
    for sizes in ([1] * 12, [1, 2, 5, 1, 3], [7, 1, 1, 3], [12]):
        cache, parts = None, []
        for part in ids.split(sizes, dim=1):
            out = model(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
        torch.testing.assert_close(torch.cat(parts, 1), full, **FLOAT32)


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
@torch.no_grad()
def test_left_padding_changes_nothing(settings: dict[str, Any]) -> None:
    """A batch of sequences of 8, 5 and 1 tokens: forward, then decoding from its cache."""
    model, ids = build(**settings), tokens(3, 11)
    lengths = (8, 5, 1)
    prompt, mask = torch.zeros(3, 8, dtype=torch.int64), torch.zeros(3, 8, dtype=torch.int64)
    for row, length in enumerate(lengths):
        prompt[row, 8 - length :], mask[row, 8 - length :] = ids[row, :length], 1
    out = model(prompt, attention_mask=mask, use_cache=True)
    alone = [model(ids[row : row + 1, : length + 3]).logits[0] for row, length in enumerate(lengths)]
    for row, length in enumerate(lengths):
        torch.testing.assert_close(out.logits[row, 8 - length :], alone[row][:length], **FLOAT32)
    for step in range(3):
        following = torch.stack([ids[row, length + step] for row, length in enumerate(lengths)])[:, None]
        mask = torch.cat([mask, torch.ones_like(following)], 1)
        out = model(following, attention_mask=mask, past_key_values=out.past_key_values, use_cache=True)
        for row, length in enumerate(lengths):
            torch.testing.assert_close(out.logits[row, 0], alone[row][length + step], **FLOAT32)


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
@torch.no_grad()
def test_generate(settings: dict[str, Any]) -> None:
    """Greedy with and without cache, from one prompt and from a padded batch: the same tokens."""
    model, ids = build(**settings), tokens(2, 6)
    wanted = ids
    for _ in range(8):
        wanted = torch.cat([wanted, model(wanted).logits[:, -1:].argmax(-1)], 1)
    greedy: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **greedy), wanted)
    assert torch.equal(model.generate(ids, use_cache=False, **greedy), wanted)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.int64), ids], 1)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.int64), torch.ones_like(ids)], 1)
    assert torch.equal(model.generate(padded, attention_mask=mask, **greedy)[:, 3:], wanted)


@pytest.mark.parametrize("name", ["dense", "qkv", "both"])
@torch.no_grad()
def test_other_ways_to_generate(name: str) -> None:
    """A static cache, for which transformers makes the masks; guessed tokens, which are taken back when wrong."""
    model, ids = build(**VARIANTS[name]), tokens(2, 6)
    ids[1, :2] = 0
    greedy: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    mask = (ids != 0).long()
    wanted = model.generate(ids, attention_mask=mask, **greedy)
    assert torch.equal(model.generate(ids, attention_mask=mask, cache_implementation="static", **greedy), wanted)
    assert torch.equal(model.generate(ids[:1], prompt_lookup_num_tokens=3, **greedy), wanted[:1])


@torch.no_grad()
def test_beams_carry_the_convolutions_along() -> None:
    """Beam search reorders the cache; without a cache there is nothing to reorder."""
    model, ids = build(**VARIANTS["both"]), tokens(2, 6)
    beams: dict[str, Any] = {"max_new_tokens": 10, "num_beams": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **beams), model.generate(ids, use_cache=False, **beams))


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
@torch.no_grad()
def test_saved_and_loaded(settings: dict[str, Any], tmp_path: Path) -> None:
    model, ids = build(**settings), tokens(2, 7)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, ScalingTransformerForCausalLM)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == loaded.config.to_diff_dict()
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half(ids).logits.dtype == torch.bfloat16
    assert half.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (2, 10)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    """Also of the layers that draw noise."""
    gradients = []
    for checkpointing in (False, True):
        model, ids = build(**VARIANTS["both"]).train(), tokens(2, 7)
        if checkpointing:
            model.activation_checkpointing_enable()
        torch.manual_seed(3)
        model(ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None and float(gradient.abs().max()) > 0, name
        torch.testing.assert_close(gradients[1][name], gradient)


def test_hidden_states_and_attentions_are_given_out() -> None:
    model = build(**VARIANTS["both"])
    model.set_attn_implementation("eager")
    out = model(tokens(1, 5), output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 3 and [a.shape for a in out.attentions] == [(1, 4, 5, 5)] * 2


def test_the_heads_that_share_or_factor() -> None:
    tied = build(**VARIANTS["both"])
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    # D of S × d and E of d × V/S in place of a matrix of V × d.
    untied = {"tie_word_embeddings": False}
    with_matrix = parameter_count(config(**VARIANTS["both"], **untied))
    factored = parameter_count(config(**VARIANTS["all"]))
    assert with_matrix - factored == 48 * 32 - 32 * (6 + 48 // 6)


def test_parameters_are_matched_by_the_feed_forward() -> None:
    dense = config(**VARIANTS["dense"], intermediate_size=256)
    for name in ("ff", "qkv", "both"):
        settings = VARIANTS[name]
        block = settings["ff_block"] or 1
        size = matching_intermediate_size(config(**settings), dense)
        assert size % block == 0
        counts = [
            parameter_count(config(**settings | {"intermediate_size": size + step * block})) for step in (-1, 0, 1)
        ]
        off = [abs(count - parameter_count(dense)) for count in counts]
        assert off[1] == min(off), name
    model = ScalingTransformerForCausalLM(config(**VARIANTS["both"]))
    assert parameter_count(config(**VARIANTS["both"])) == sum(p.numel() for p in model.parameters())


def test_the_paper_s_800m_shape() -> None:
    """d_ff 4096 → 6144 in the paper, a round figure; S 16, N 64, controller of rank d/N = 16."""
    sparse = ScalingTransformerConfig()
    assert sparse.controller_rank == 16
    dense = ScalingTransformerConfig(intermediate_size=4096, ff_block=None, qkv_modules=None)
    assert matching_intermediate_size(sparse, dense) == pytest.approx(6144, rel=0.03)
    assert parameter_count(sparse) == pytest.approx(parameter_count(dense), rel=0.03)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"hidden_size": 30},
            "hidden_size to be a multiple of num_attention_heads, found 30 and 4; try hidden_size 28 or",
        ),
        ({"intermediate_size": 60, "ff_block": 8}, "intermediate_size to be a multiple of ff_block, found 60 and 8"),
        ({"qkv_modules": 5}, "hidden_size to be a multiple of qkv_modules, found 32 and 5"),
        ({"loss_modules": 7, "tie_word_embeddings": False}, "vocab_size to be a multiple of loss_modules"),
        ({"loss_modules": 6}, "tie_word_embeddings false with loss_modules, found true"),
        ({"ff_block": 0}, "a whole number of at least 1 for ff_block, found 0"),
        ({"ff_lowrank": -1}, "a whole number of at least 1 for ff_lowrank, found -1"),
        ({"hidden_size": "wide"}, "a whole number of at least 1 for hidden_size, found 'wide'"),
        ({"num_attention_heads": 32}, "an even head size for RoPE, found 32/32 = 1"),
        ({"position_embedding": "alibi"}, "position_embedding rope or none, found 'alibi'"),
        ({"ff_hard_probability": 1.5}, "ff_hard_probability from 0 to 1, found 1.5"),
        ({"ff_temperature": -0.1}, "ff_temperature of at least 0, found -0.1"),
    ],
)
def test_bad_configurations(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        config(**({"ff_block": 8, "qkv_modules": 4} | settings))
    assert f"expected {message}" in str(error.value) and "\n" not in str(error.value)
