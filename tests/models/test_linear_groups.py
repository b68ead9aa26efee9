"""The linear groups of a description against transformers' own modules."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from checkpoints import SIZES
from random_families import EXPERTS
from tulle.errors import UserError
from tulle.models.description import ROLES, describe, families


def sizes(model_type: str) -> dict[str, Any]:
    """Of a small model; two families have no head_dim of their own."""
    found = SIZES | {"pad_token_id": 0}
    if model_type == "gemma4_text":
        found |= {"vocab_size_per_layer_input": 300, "hidden_size_per_layer_input": 8}
    return {key: found[key] for key in found if key != "head_dim" or model_type not in ("bitnet", "stablelm")}


APART = [family for family in families() if family not in EXPERTS]
"""Families whose experts, which transformers holds in one parameter, are not in the way; of the others
test_families.py reads what is saved."""


@pytest.mark.parametrize("model_type", APART)
@pytest.mark.parametrize("tied", [False, True])
def test_names_and_shapes_are_those_of_transformers(model_type: str, tied: bool) -> None:
    config = AutoConfig.for_model(model_type, **(sizes(model_type) | {"tie_word_embeddings": tied}))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = describe(config.to_dict())
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items() if name != "lm_head.weight" or not tied}
    ours = found.outer_tensors()
    for layer in found.layers:
        ours |= {layer.prefix + name: shape for name, shape in layer.tensors().items()}
    assert ours == expected


@pytest.mark.parametrize("setting", ["attention_bias", "mlp_bias"])
def test_llama_biases_follow_the_config(setting: str) -> None:
    config = AutoConfig.for_model("llama", **(SIZES | {setting: True}))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    prefix = "model.layers.0."
    expected = {n.removeprefix(prefix) for n, _ in model.named_parameters() if n.startswith(prefix)}
    assert set(describe(config.to_dict()).layers[0].tensors()) == expected


@pytest.mark.parametrize("model_type", APART)
def test_groups_name_every_linear_once_and_norms_feed_what_they_say(model_type: str) -> None:
    config = AutoConfig.for_model(model_type, **sizes(model_type))
    model = AutoModelForCausalLM.from_config(config)
    groups = describe(config.to_dict()).layers[0].groups
    block = model.model.layers[0]
    linears = {name for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    listed = [name for group in groups for name in group.names]
    assert sorted(listed) == sorted(linears)
    own = ("input_gate", "input_down") if model_type == "gemma4_text" else ()
    assert tuple(group.role for group in groups) == (*ROLES, *own)

    seen: dict[str, torch.Tensor] = {}
    for name, module in block.named_modules():
        module.register_forward_hook(
            lambda m, a, y, name=name: seen.update({name: a[0] if a else None, name + ":out": y})
        )
    model(torch.arange(10)[None], use_cache=False)
    for group in groups:
        inputs = [seen[name] for name in group.names]
        assert all(torch.equal(inputs[0], x) for x in inputs)
        if group.norm is not None:
            assert torch.equal(seen[group.norm.name + ":out"], inputs[0])
        assert group.adds == (group.role in ("o", "down", "input_down"))
        for producer in group.producers:
            assert producer.stop <= seen[producer.name + ":out"].shape[-1]
            assert producer.stop - producer.start <= inputs[0].shape[-1]


def test_role_of() -> None:
    found = describe(AutoConfig.for_model("qwen3", **SIZES).to_dict())
    assert found.role_of("model.layers.2.mlp.down_proj") == "down"
    assert found.role_of("mlp.up_proj") == "gate_up"
    assert found.role_of("lm_head") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llamma"}, "did you mean llama?"),
        ({"model_type": "gpt2"}, "starcoder2, found 'gpt2'"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"vocab_size": "many"}, "vocab_size"),
    ],
)
def test_bad_config(change: dict, message: str) -> None:
    config = AutoConfig.for_model("llama", **SIZES).to_dict() | change
    with pytest.raises(UserError) as error:
        describe(config)
    assert message in str(error.value) and "\n" not in str(error.value)
