"""The plain decoder against transformers, and the coroutine's promises."""

from __future__ import annotations

import dataclasses
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from random_decoders import (
    FAMILIES,
    largest_difference,
    layer_tensors,
    plain_model,
    random_config,
    reference_model,
    text,
)
from tulle.errors import UserError
from tulle.models.attention import rotary_table
from tulle.models.decoder import (
    ACTIVATIONS,
    DecoderBlock,
    GroupInput,
    drive,
    run_group,
)
from tulle.models.description import ACTIVATIONS as NAMES
from tulle.models.description import Decoder, describe

pytestmark = pytest.mark.usefixtures("one_thread")

SEEDS = 72
"""Configs per family; a multiple of the kinds of rotary table and of activations, which take turns."""


def live_tensors() -> list[Tensor]:
    return [found for found in gc.get_objects() if issubclass(type(found), Tensor)]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family: str) -> None:
    for seed in range(SEEDS):
        config = random_config(family, seed)
        model = reference_model(config, seed)
        tokens, valid = text(seed)
        wanted = model(tokens, attention_mask=valid.long()).logits[valid]
        found = plain_model(config, model)(tokens)[valid]
        assert largest_difference(wanted, found) <= 1e-5, config


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_as_exact_as_transformers_bfloat16(family: str) -> None:
    """Both round after every operation, in another order. So neither is nearer to float32 than the other: over many
    models the mean squared distances from it are alike."""
    ours, theirs = 0.0, 0.0
    for seed in range(24):
        config = random_config(family, seed)
        model = reference_model(config, seed, scale=1.0)
        model.to(torch.bfloat16)
        tokens, _ = text(seed)
        rounded = model(tokens).logits.float()
        found = plain_model(config, model, torch.bfloat16)(tokens).float()
        exact = plain_model(config, model)(tokens)  # float32 with the weights that bfloat16 holds
        size = exact.abs().max()
        ours += float(((found - exact) / size).square().mean())
        theirs += float(((rounded - exact) / size).square().mean())
    assert ours <= 1.3 * theirs


def test_a_text_beyond_window_and_context() -> None:
    """1,500 tokens, a window of 100 and a table stretched from 512 positions."""
    config = random_config("mistral", 0) | {"sliding_window": 100, "max_position_embeddings": 512}
    config |= {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}, "rope_scaling": None}
    config["rope_parameters"]["original_max_position_embeddings"] = 512
    model = reference_model(config)
    tokens = torch.randint(0, 40, (1, 1500), generator=torch.Generator().manual_seed(1))
    assert largest_difference(model(tokens).logits, plain_model(config, model)(tokens)) <= 1e-5


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_follow_the_length(kind: str) -> None:
    """A text within the context and one beyond it, by the same block."""
    seed = {"dynamic": 2, "longrope": 4}[kind]
    config = random_config("llama", seed) | {"max_position_embeddings": 16}
    model = reference_model(config)
    ours = plain_model(config, model)
    assert ours.decoder.rotary["default"].kind == kind
    for length in (6, 40, 6):
        tokens = torch.randint(0, 40, (1, length), generator=torch.Generator().manual_seed(length))
        fresh = reference_model(config)  # transformers keeps the longest length it has seen
        assert largest_difference(fresh(tokens).logits, ours(tokens)) <= 1e-5


@pytest.fixture
def block() -> DecoderBlock:
    config = random_config("qwen3", 1) | {"num_hidden_layers": 1, "layer_types": None}
    return DecoderBlock(describe(config), 0, layer_tensors(reference_model(config), 0))


def hidden_of(block: DecoderBlock, length: int = 9) -> Tensor:
    return torch.randn(2, length, block.layer.hidden, generator=torch.Generator().manual_seed(3))


def test_groups_come_in_order_with_what_their_linears_read(block: DecoderBlock) -> None:
    hidden, seen = hidden_of(block), []

    def answer(given: GroupInput) -> tuple[Tensor, ...]:
        seen.append((given.role, given.adds))
        assert given.x.shape == (2, 9, given.group.inputs)
        assert given.residual.shape == hidden.shape
        return run_group(block, given.group, given.x)

    out = drive(block.steps(hidden), answer)
    assert seen == [("qkv", False), ("o", True), ("gate_up", False), ("down", True)]
    assert torch.equal(out, block(hidden))


def test_inputs_are_those_that_hooks_see(block: DecoderBlock) -> None:
    hidden, yielded, hooked = hidden_of(block), {}, {}

    def answer(given: GroupInput) -> tuple[Tensor, ...]:
        yielded[given.role] = given.x
        return run_group(block, given.group, given.x)

    for group in block.layer.groups:
        module = block.get_submodule(group.names[0])
        module.register_forward_pre_hook(lambda m, x, role=group.role: hooked.__setitem__(role, x[0]))
    block(hidden)
    drive(block.steps(hidden), answer)
    assert hooked.keys() == yielded.keys()
    assert all(torch.equal(hooked[role], yielded[role]) for role in hooked)


def test_outputs_that_are_sent_take_part(block: DecoderBlock) -> None:
    """Zeros at o and down leave the residual stream as it came."""
    hidden = hidden_of(block)
    out = drive(
        block.steps(hidden),
        lambda given: tuple(y * (not given.adds) for y in run_group(block, given.group, given.x)),
    )
    assert torch.equal(out, hidden)


def test_replaced_linears_take_part(block: DecoderBlock) -> None:
    class Doubled(nn.Module):
        def __init__(self, inner: nn.Module):
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.inner(x)

    hidden = hidden_of(block)
    before = block(hidden)
    block.mlp.down_proj = Doubled(block.mlp.down_proj)
    after = block(hidden)
    block.mlp.down_proj = block.mlp.down_proj.inner
    attention = drive(
        block.steps(hidden),
        lambda given: tuple(y * (given.role != "down") for y in run_group(block, given.group, given.x)),
    )
    torch.testing.assert_close(after - attention, 2 * (before - attention))


def test_a_parked_block_holds_nothing_of_the_sequence(block: DecoderBlock) -> None:
    """At every group: once what was yielded has been taken away, no tensor of this size is left alive."""
    length = 50
    hidden = hidden_of(block, length)
    rotary_table(block.rotary, length, hidden.device, hidden.dtype)  # kept for all sequences of this length
    gc.collect()
    before = {id(t) for t in live_tensors()}
    steps = block.steps(hidden)
    given = next(steps)
    alive = weakref.ref(hidden)
    residual = given.residual.numpy().copy()
    del given.residual, hidden
    assert alive() is None
    while True:
        role, x = given.role, given.x.numpy().copy()
        del given.x
        if role != "qkv":
            del given.residual
        left = [t.shape for t in live_tensors() if id(t) not in before]
        assert not left, (role, left)
        given.residual = torch.from_numpy(residual.copy())
        try:
            given = steps.send(run_group(block, given.group, torch.from_numpy(x)))
        except StopIteration as end:
            out = end.value
            break
        residual = given.residual.numpy().copy()
    assert torch.equal(out, block(hidden_of(block, length)))


def test_heads_are_given_rotated_queries_and_keys(block: DecoderBlock) -> None:
    mixer, hidden, seen = block.layer.mixer, hidden_of(block), []

    def heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        seen.extend([q, k, v])
        return q, k, torch.zeros_like(v)

    x_of_o = {}

    def answer(given: GroupInput) -> tuple[Tensor, ...]:
        x_of_o[given.role] = given.x
        return run_group(block, given.group, given.x)

    drive(block.steps(hidden, heads), answer)
    q, k, v = seen
    assert q.shape == (2, mixer.heads, 9, mixer.head_dim)
    assert k.shape == v.shape == (2, mixer.kv_heads, 9, mixer.head_dim)
    assert not x_of_o["o"].any()
    # Rotation keeps lengths, and the query norm fixes them: √head_dim times the gain.
    cos, sin = rotary_table(block.rotary, 9, hidden.device)
    back = q * cos - torch.cat((-q[..., mixer.head_dim // 2 :], q[..., : mixer.head_dim // 2]), -1) * sin
    scaling = float((cos[0].square() + sin[0].square())[0])
    normed = back / scaling / block.self_attn.q_norm.weight
    torch.testing.assert_close(normed.square().mean(-1), torch.ones(2, mixer.heads, 9), rtol=2e-2, atol=2e-2)
    assert torch.equal(block(hidden, heads), drive(block.steps(hidden, heads), answer))


def test_gradients_flow_through_the_steps(block: DecoderBlock) -> None:
    hidden = hidden_of(block).requires_grad_()
    block(hidden).square().sum().backward()
    assert hidden.grad is not None and bool(hidden.grad.abs().sum() > 0)


def test_tables_made_in_inference_mode_serve_gradients(block: DecoderBlock) -> None:
    rotary_table.cache_clear()
    with torch.inference_mode():
        block(hidden_of(block, 11))
    hidden = hidden_of(block, 11).requires_grad_()
    block(hidden).sum().backward()


def test_tensors_of_the_right_dtype_are_not_copied() -> None:
    config = random_config("llama", 0)
    tensors = layer_tensors(reference_model(config), 0)
    block = DecoderBlock(describe(config), 0, tensors)
    state = block.state_dict()
    assert state.keys() == tensors.keys()
    assert all(state[name].data_ptr() == t.data_ptr() for name, t in tensors.items())
    assert not any(p.requires_grad for p in block.parameters())


def test_wrong_tensors_are_refused_by_name() -> None:
    config = random_config("llama", 0) | {"attention_bias": False}
    tensors = layer_tensors(reference_model(config), 0)
    decoder = describe(config)
    missing = {name: t for name, t in tensors.items() if name != "mlp.up_proj.weight"}
    with pytest.raises(UserError, match=r"model\.layers\.0\.mlp\.up_proj\.weight, found none"):
        DecoderBlock(decoder, 0, missing)
    with pytest.raises(UserError, match=r"no tensor that .*self_attn\.q_proj\.bias, found one of shape \(3,\)"):
        DecoderBlock(decoder, 0, tensors | {"self_attn.q_proj.bias": torch.zeros(3)})
    with pytest.raises(UserError, match=r"shape .* for model\.layers\.0\.input_layernorm\.weight, found \(1,\)"):
        DecoderBlock(decoder, 0, tensors | {"input_layernorm.weight": torch.zeros(1)})


def changed(decoder: Decoder, **mixer: object) -> Decoder:
    layer = decoder.layers[0]
    return dataclasses.replace(
        decoder, layers=(dataclasses.replace(layer, mixer=dataclasses.replace(layer.mixer, **mixer)),)
    )


def test_every_activation_of_the_description_is_here() -> None:
    assert set(NAMES.values()) == ACTIVATIONS.keys()
