"""config.json → description: what is read, what passes, what is refused by name."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from random_decoders import FAMILIES, ROTARY, plain_model, random_config, reference_model
from random_families import DENSE, EXPERTS, HYBRID
from tulle.errors import UserError
from tulle.models.config_keys import HARMLESS, HARMLESS_WHEN
from tulle.models.description import Attention, Rotary, describe, families
from tulle.models.rotary import depends_on_length, frequencies

pytestmark = pytest.mark.usefixtures("one_thread")

LLAMA_2 = {
    "_name_or_path": "meta-llama/Llama-2-7b-hf",
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_length": 4096,
    "max_position_embeddings": 4096,
    "max_sequence_length": 2048,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pad_token_id": 0,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
LLAMA_3_1 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 128256,
}
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    "transformers_version": "4.40.1",
    "use_cache": True,
    "vocab_size": 49152,
}
MISTRAL_V01 = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
MISTRAL_V03 = MISTRAL_V01 | {
    "attention_dropout": 0.0,
    "head_dim": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "vocab_size": 32768,
}
QWEN2_5 = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 896,
    "initializer_range": 0.02,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
REAL = {
    "Llama 2": LLAMA_2,
    "Llama 3.1": LLAMA_3_1,
    "SmolLM2": SMOLLM2,
    "Mistral 0.1": MISTRAL_V01,
    "Mistral 0.3": MISTRAL_V03,
    "Qwen 2.5": QWEN2_5,
    "Qwen 3": QWEN3,
}
SMALL: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "head_dim": 8,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-5,
}


def assert_same(config: dict[str, Any]) -> None:
    """Sizes and settings of the description are those that transformers reads from the same config."""
    decoder = describe(copy.deepcopy(config))
    wanted = CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(config))
    layer = decoder.layers[-1]
    head_dim = getattr(wanted, "head_dim", wanted.hidden_size // wanted.num_attention_heads)
    assert decoder.hidden == wanted.hidden_size
    assert decoder.vocabulary == wanted.vocab_size
    assert decoder.context == wanted.max_position_embeddings
    assert decoder.tied == wanted.tie_word_embeddings
    assert len(decoder.layers) == wanted.num_hidden_layers
    assert layer.mixer.heads == wanted.num_attention_heads
    assert layer.mixer.kv_heads == wanted.num_key_value_heads
    assert layer.mixer.head_dim == head_dim
    assert layer.feed_forward.intermediate == wanted.intermediate_size
    assert layer.mixer_norm.eps == decoder.final_norm.eps == wanted.rms_norm_eps
    assert decoder.rotary["default"].theta == wanted.rope_parameters["rope_theta"]
    assert decoder.rotary["default"].kind == wanted.rope_parameters["rope_type"]
    window = getattr(wanted, "sliding_window", None)
    types = getattr(wanted, "layer_types", None)
    for index, found in enumerate(decoder.layers):
        assert found.mixer.window == (window if types is None or types[index] == "sliding_attention" else None)


@pytest.mark.parametrize("name", REAL)
def test_configs_of_real_models_pass(name: str) -> None:
    assert_same(REAL[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_missing_keys_have_the_defaults_of_transformers(family: str) -> None:
    assert_same({"model_type": family})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_that_transformers_writes_passes(family: str) -> None:
    """Written by this version: read back, the description is the same."""
    for seed in range(12):
        config = random_config(family, seed)
        written = CONFIG_MAPPING[family].from_dict(copy.deepcopy(config)).to_dict()
        assert describe(written) == describe(config)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "key",
    [
        "hidden_activation",
        "no_rope_layers",
        "query_pre_attn_scalar",
        "final_logit_softcapping",
        "attn_logit_softcapping",
        "logits_scaling",
        "residual_multiplier",
        "embedding_multiplier",
        "attention_multiplier",
        "clip_qkv",
        "qk_layernorm",
        "num_local_experts",
        "sandwich_norm",
    ],
)
def test_unknown_keys_are_refused_by_name_even_when_they_look_off(family: str, key: str) -> None:
    for value in (None, False, 0, [], 3.0):
        with pytest.raises(UserError, match=f"knows for {family}, found '{key}'"):
            describe(SMALL | {"model_type": family, key: value})


def test_a_mistyped_key_is_told_its_neighbour() -> None:
    with pytest.raises(UserError, match="found 'rope_tetha'.*did you mean rope_theta"):
        describe({"model_type": "llama", "rope_tetha": 5e5})


def test_keys_of_another_family_are_refused() -> None:
    with pytest.raises(UserError, match="for sliding_window in a llama"):
        describe({"model_type": "llama", "sliding_window": 4096})
    with pytest.raises(UserError, match="for layer_types in a mistral"):
        describe({"model_type": "mistral", "layer_types": ["full_attention"] * 32})
    with pytest.raises(UserError, match="'attention_bias'"):
        describe({"model_type": "qwen2", "attention_bias": False})


@pytest.mark.parametrize("key", HARMLESS_WHEN)
def test_keys_that_are_harmless_with_one_value_only(key: str) -> None:
    values, _ = HARMLESS_WHEN[key]
    for value in values:
        describe(SMALL | {"model_type": "llama", key: value})
    with pytest.raises(UserError, match=key):
        describe(SMALL | {"model_type": "llama", key: "something"})


def test_harmless_keys_change_nothing_in_transformers() -> None:
    """Every key of the list with odd values: transformers' logits, where it accepts them, are the same."""
    config = SMALL | {"model_type": "llama"}
    tokens = torch.arange(12)[None]
    wanted = reference_model(config)(tokens).logits
    tried = 0
    for key in HARMLESS.keys() - {"model_type", "quantization_config", "return_dict", "torch_dtype", "dtype"}:
        for value in (3, True, "eager", [2]):
            try:
                model = reference_model(config | {key: value})
                found = model(tokens).logits
            except Exception:
                continue  # transformers refuses the value
            tried += 1
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert tried > 120


BAD = [
    ({"model_type": "lama"}, "did you mean llama"),
    ({"model_type": "gpt2"}, "add a file to tulle/models/families"),
    ({}, "found None"),
    ({"hidden_size": None}, "hidden_size"),
    ({"hidden_size": 24.0}, "hidden_size"),
    ({"hidden_size": True}, "hidden_size"),
    ({"num_hidden_layers": 0}, "num_hidden_layers"),
    ({"hidden_size": 25}, "multiple of num_attention_heads"),
    ({"num_key_value_heads": 4}, "equal groups"),
    ({"head_dim": 7}, "even number"),
    ({"hidden_act": "xielu"}, "hidden_act"),
    ({"hidden_act": None}, "hidden_act"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
    ({"tie_word_embeddings": None}, "tie_word_embeddings"),
    ({"rms_norm_eps": None}, "rms_norm_eps"),
    ({"rms_norm_eps": -1e-5}, "rms_norm_eps"),
    ({"rope_theta": None}, "rope_theta"),
    ({"rope_theta": 0}, "rope_theta"),
    ({"rope_parameters": []}, "rope_parameters"),
    ({"rope_scaling": {"rope_type": "mrope"}}, "rope_type"),
    ({"rope_scaling": {"rope_type": "linear"}}, "factor for linear"),
    ({"rope_scaling": {"rope_type": "linear", "factor": None}}, "factor"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "finetuned": True}}, "'finetuned'"),
    ({"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 2.0}}, "alike"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "'full_attention'"),
    ({"rope_parameters": {"rope_type": "default", "mrope_section": [1, 2]}}, "'mrope_section'"),
    ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, "4 numbers"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    (
        {"rope_scaling": {"rope_type": "llama3", "factor": 2, "low_freq_factor": 4.0, "high_freq_factor": 1.0}},
        "high_freq_factor",
    ),
]


@pytest.mark.parametrize("change, message", BAD)
def test_bad_values_are_refused_in_one_line(change: dict[str, Any], message: str) -> None:
    config = SMALL | {"model_type": "llama"} | change
    if not change:
        del config["model_type"]
    with pytest.raises(UserError, match=message) as caught:
        describe(config)
    assert "\n" not in str(caught.value)


def test_windows_of_qwen() -> None:
    base = SMALL | {"model_type": "qwen2", "sliding_window": 5}
    windows = lambda **more: [layer.mixer.window for layer in describe(base | more).layers]  # noqa: E731
    assert windows() == [None, None]
    assert windows(use_sliding_window=True) == [None, None]  # max_window_layers is 28
    assert windows(use_sliding_window=True, max_window_layers=1) == [None, 5]
    assert windows(use_sliding_window=True, layer_types=["sliding_attention", "full_attention"]) == [5, None]
    with pytest.raises(UserError, match="layer_types"):
        windows(layer_types=["sliding_attention", "full_attention"])
    with pytest.raises(UserError, match="a list of 2 types"):
        windows(layer_types=["full_attention"])
    with pytest.raises(UserError, match="chunked_attention"):
        windows(layer_types=["chunked_attention", "full_attention"])


@pytest.mark.parametrize("kind", ROTARY)
def test_frequencies_are_those_of_transformers(kind: str) -> None:
    """Both lengths: within the context and beyond; contexts and heads of real size."""
    for seed in range(ROTARY.index(kind), 120, len(ROTARY)):
        config = random_config("llama", seed)
        wanted_config = CONFIG_MAPPING["llama"].from_dict(copy.deepcopy(config))
        rotary = describe(config).rotary["default"]
        for length in (4, 100, 3000):
            found, scaling = frequencies(rotary, length)
            if kind == "default":
                exponent = torch.arange(0, rotary.dim, 2, dtype=torch.float) / rotary.dim
                wanted, factor = 1.0 / (rotary.theta**exponent), 1.0
            else:
                wanted, factor = ROPE_INIT_FUNCTIONS[kind](wanted_config, "cpu", seq_len=length)
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-6)
            assert scaling == pytest.approx(factor, rel=1e-6)
    assert depends_on_length(rotary) == (kind in ("dynamic", "longrope"))


def test_proportional_frequencies_are_those_of_transformers() -> None:
    for share in (0.25, 0.5, 0.6, 1.0):
        settings = {"rope_type": "proportional", "rope_theta": 1e4, "partial_rotary_factor": share, "factor": 2.0}
        config = SMALL | {"model_type": "llama", "head_dim": 20, "rope_parameters": settings}
        wanted = ROPE_INIT_FUNCTIONS["proportional"](CONFIG_MAPPING["llama"].from_dict(copy.deepcopy(config)), "cpu")[0]
        np.testing.assert_allclose(frequencies(describe(config).rotary["default"], 9)[0], wanted.numpy(), rtol=1e-6)
        model = reference_model(config)
        tokens = torch.arange(12)[None]
        found = plain_model(config, model)(tokens)
        assert float((found - model(tokens).logits).abs().max() / found.abs().max()) <= 1e-5


def test_frequencies_at_the_size_of_llama_3_1() -> None:
    wanted_config = CONFIG_MAPPING["llama"].from_dict(copy.deepcopy(LLAMA_3_1))
    wanted = ROPE_INIT_FUNCTIONS["llama3"](wanted_config, "cpu")[0].numpy()
    rotary = describe(LLAMA_3_1).rotary["default"]
    assert rotary == Rotary(
        128,
        5e5,
        "llama3",
        131072,
        factor=8.0,
        original_max_positions=8192,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    )
    np.testing.assert_allclose(frequencies(rotary, 1)[0], wanted, rtol=1e-6)


def test_names_and_shapes_are_those_of_the_checkpoint() -> None:
    for family in FAMILIES:
        for seed in range(8):
            config = random_config(family, seed)
            decoder = describe(config)
            found = {name: shape for name, shape in decoder.outer_tensors().items()}
            for layer in decoder.layers:
                found |= {layer.prefix + name: shape for name, shape in layer.tensors().items()}
            state = reference_model(config).state_dict()
            if decoder.tied:
                del state["lm_head.weight"]
            assert found == {name: tuple(t.shape) for name, t in state.items()}


def test_groups_roles_and_names() -> None:
    decoder = describe(QWEN3)
    layer = decoder.layers[3]
    assert decoder.roles == ("qkv", "o", "gate_up", "down")
    assert layer.prefix == "model.layers.3."
    assert layer.group("qkv").names == ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    assert layer.group("qkv").norm == layer.mixer_norm and layer.mixer_norm.name == "input_layernorm"
    assert [p.name for p in layer.group("o").producers] == ["self_attn.v_proj"]
    assert layer.group("o").inputs == 16 * 128
    assert [group.adds for group in layer.groups] == [False, True, False, True]
    assert decoder.linear_names(3)[0] == "model.layers.3.self_attn.q_proj"
    assert len(decoder.linear_names(3)) == 7
    assert decoder.role_of("model.layers.27.mlp.up_proj") == decoder.role_of("mlp.up_proj") == "gate_up"
    assert decoder.role_of("model.norm") is decoder.role_of("lm_head") is None
    assert decoder.role_of("xmodel.layers.27.mlp.up_proj") is None
    assert decoder.embedding_name({"lm_head.weight"}) == "lm_head.weight"
    assert decoder.embedding_name({"lm_head.weight", "model.embed_tokens.weight"}) == "model.embed_tokens.weight"
    assert list(Attention(8, 2, 4).query_heads(1)) == [4, 5, 6, 7]


def test_every_family_has_a_file_and_every_file_a_family() -> None:
    assert families() == sorted(FAMILIES + DENSE + HYBRID + EXPERTS)


def test_the_description_needs_no_torch() -> None:
    code = (
        "import sys; from tulle.models.description import describe; import tulle.models.rotary; "
        "describe({'model_type': 'llama'}); assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
