"""Small random configs of the dense families beyond Llama's, with what is special about each drawn both ways."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from random_decoders import ROTARY, rotary_settings
from tulle.models.checkpoint import Checkpoint
from tulle.models.decoder import PlainDecoder

DENSE = (
    "apertus",
    "arcee",
    "bitnet",
    "cohere2",
    "ernie4_5",
    "exaone4",
    "gemma2",
    "gemma3_text",
    "gemma4_text",
    "glm4",
    "granite",
    "hunyuan_v1_dense",
    "ministral3",
    "nemotron",
    "olmo2",
    "olmo3",
    "phi3",
    "seed_oss",
    "smollm3",
    "stablelm",
    "starcoder2",
)
HYBRID = ("lfm2", "qwen3_5_text")
"""With recurrent states."""
EXPERTS = (
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe",
    "glm4_moe_lite",
    "gpt_oss",
    "granitemoe",
    "granitemoehybrid",
    "mixtral",
    "nemotron_h",
    "olmoe",
    "qwen2_moe",
    "qwen3_5_moe_text",
    "qwen3_moe",
    "qwen3_next",
)
"""With a mixture of experts."""
LAYERS = 2


def family_config(family: str, seed: int) -> dict[str, Any]:
    draw = random.Random(f"{family} {seed}")
    kv_heads, head_dim = draw.choice([1, 2, 3]), draw.choice([8, 16])
    heads = kv_heads * draw.choice([1, 2])
    context = draw.choice([8, 16, 64])
    config: dict[str, Any] = {
        "model_type": family,
        "hidden_size": heads * head_dim,
        "intermediate_size": draw.choice([16, 24]),
        "num_hidden_layers": LAYERS,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": 40,
        "max_position_embeddings": context,
        "tie_word_embeddings": draw.random() < 0.5,
        "rope_theta": draw.choice([100.0, 10000.0]),
        "pad_token_id": 0,
    }
    special = globals().get(f"_{family}")
    if special is not None:
        special(config, draw, head_dim, seed)
    return config


def corrected(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """With random corrections of the routers' scores, which are buffers."""
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.randn(buffer.shape, generator=torch.Generator().manual_seed(seed)))
    return model


def saved_model(model: PreTrainedModel, folder: Path) -> PlainDecoder:
    """Ours of what transformers saves: experts have other names in files than in memory."""
    model.save_pretrained(folder)
    checkpoint = Checkpoint.open(folder)
    decoder = checkpoint.describe()
    outer = {name: checkpoint.read(name) for name in decoder.outer_tensors() if name in checkpoint}
    return PlainDecoder(decoder, lambda index: checkpoint.read_layer(decoder.layers[index]), outer)


def _drawn(config: dict[str, Any], draw: random.Random, **choices: list[Any]) -> None:
    for key, values in choices.items():
        config[key] = draw.choice(values)


def _kinds(draw: random.Random) -> list[str]:
    return [draw.choice(["full_attention", "sliding_attention"]) for _ in range(LAYERS)]


def _stretched(config: dict[str, Any], draw: random.Random, dim: int, seed: int) -> None:
    config["rope_scaling"] = rotary_settings(draw, ROTARY[seed % len(ROTARY)], dim, config["max_position_embeddings"])


def _apertus(config: dict[str, Any], draw: random.Random, head_dim: int, seed: int) -> None:
    _drawn(config, draw, attention_bias=[False, True], hidden_act=["xielu", "xielu", "relu2"])
    if seed % 2:
        _stretched(config, draw, head_dim, seed)


def _arcee(config: dict[str, Any], draw: random.Random, head_dim: int, seed: int) -> None:
    _drawn(config, draw, attention_bias=[False, True], mlp_bias=[False, True], head_dim=[8, None])
    if config["head_dim"] is None:
        del config["head_dim"]


def _bitnet(config: dict[str, Any], draw: random.Random, head_dim: int, seed: int) -> None:
    _drawn(config, draw, attention_bias=[False, True], hidden_act=["relu2", "silu"])


def _cohere2(config: dict[str, Any], draw: random.Random, head_dim: int, seed: int) -> None:
    _drawn(config, draw, attention_bias=[False, True], logit_scale=[0.25, 1.0], sliding_window=[3, 5])
    _drawn(config, draw, sliding_window_pattern=[2, 3, 4], layer_norm_eps=[1e-5, 1e-2])
    if draw.random() < 0.5:
        config["layer_types"] = _kinds(draw)


def _ernie4_5(config: dict[str, Any], draw: random.Random, head_dim: int, seed: int) -> None:
    _drawn(config, draw, use_bias=[False, True], head_dim=[8, 16])


def _exaone4(config: dict[str, Any], draw: random.Random, head_dim: int, seed: int) -> None:
    _drawn(config, draw, sliding_window=[None, 3, 5], sliding_window_pattern=[2, 4])
    if config["sliding_window"] is None:
        config["layer_types"] = ["full_attention"] * LAYERS
    elif draw.random() < 0.5:
        config["layer_types"] = _kinds(draw)
    _stretched(config, draw, head_dim, seed)


def _gemma2(config: dict[str, Any], draw: random.Random, head_dim: int, seed: int) -> None:
    _drawn(config, draw, head_dim=[8, 16], query_pre_attn_scalar=[7, 16], sliding_window=[3, 5], attention_bias=[False])
    _drawn(config, draw, attn_logit_softcapping=[2.0, 50.0, None], final_logit_softcapping=[3.0, None])
    if draw.random() < 0.5:
        config["layer_types"] = _kinds(draw)


def _gemma3_text(config: dict[str, Any], draw: random.Random, head_dim: int, seed: int) -> None:
    _drawn(config, draw, head_dim=[8, 16], query_pre_attn_scalar=[7, 16], sliding_window=[3, 5])
    _drawn(config, draw, final_logit_softcapping=[3.0, None])
    del config["rope_theta"]
    if seed % 3 == 0:
        config |= {"rope_theta": 5000.0, "rope_local_base_freq": 70.0, "sliding_window_pattern": 2}
        config["rope_scaling"] = {"rope_type": "linear", "factor": 4.0}
    else:
        config["layer_types"] = _kinds(draw)
        config["rope_parameters"] = {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 900.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        }


def _gemma4_text(config: dict[str, Any], draw: random.Random, head_dim: int, seed: int) -> None:
    """With and without inputs of every layer's own; in transformers, layers that share keys and values need those."""
    layers = 4
    config |= {"num_hidden_layers": layers, "vocab_size_per_layer_input": 300, "tie_word_embeddings": True}
    config |= {"layer_types": _kinds(draw) + ["sliding_attention", "full_attention"]}
    del config["rope_theta"]
    _drawn(config, draw, head_dim=[8, 16], global_head_dim=[16, 24], sliding_window=[3, 5], attention_bias=[False])
    _drawn(config, draw, final_logit_softcapping=[3.0, None], use_double_wide_mlp=[False, True])
    _drawn(config, draw, attention_k_eq_v=[False, True], rms_norm_eps=[1e-6, 1e-2])
    config["hidden_size_per_layer_input"] = [8, 0, 12][(seed + 1) % 3]
    if config["hidden_size_per_layer_input"] and set(config["layer_types"][:2]) == set(config["layer_types"]):
        config["num_kv_shared_layers"] = 2
    if config["attention_k_eq_v"]:
        config["num_global_key_value_heads"] = draw.choice([1, config["num_key_value_heads"]])
    if seed % 2:
        config["rope_parameters"] = {
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            "full_attention": {"rope_type": "proportional", "rope_theta": 900.0, "partial_rotary_factor": 0.5},
        }


def _glm4(config: dict[str, Any], draw: random.Random, head_dim: int, seed: int) -> None:
    _drawn(config, draw, head_dim=[8, 16], attention_bias=[False, True], partial_rotary_factor=[0.5, 1.0, 0.25])


def _granite(config: dict[str, Any], draw: random.Random, head_dim: int, seed: int) -> None:
    _drawn(config, draw, embedding_multiplier=[1.0, 12], logits_scaling=[1.0, 8.0], residual_multiplier=[0.22, 1.0])
    _drawn(config, draw, attention_multiplier=[0.3, 0.015625], attention_bias=[False, True], mlp_bias=[False, True])


def _hunyuan_v1_dense(config: dict[str, Any], draw: random.Random, head_dim: int, seed: int) -> None:
    _drawn(config, draw, attention_bias=[False, True], head_dim=[8, 16])
    if seed % 3 == 0:
        config["rope_scaling"] = {"rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0}
    elif seed % 3 == 1:
        config["rope_scaling"] = {"rope_type": "dynamic", "factor": 2.0}


def _biased_padding(seed: int) -> bool:
    """Whether transformers may let biases of padding into convolutions: not of seeds that are padded at the left."""
    return seed > 1


def _lfm2(config: dict[str, Any], draw: random.Random, head_dim: int, seed: int) -> None:
    _drawn(config, draw, conv_bias=[False, _biased_padding(seed)], conv_L_cache=[2, 3, 4], norm_eps=[1e-5, 1e-2])
    _drawn(config, draw, block_auto_adjust_ff_dim=[False, True], block_ffn_dim_multiplier=[1.0, 1.3])
    config |= {"block_multiple_of": 8, "layer_types": draw.sample(["conv", "full_attention"], LAYERS)}
    if seed % 2:  # as the first files have it
        del config["layer_types"]
        config |= {"full_attn_idxs": [draw.choice([0, 1])], "block_ff_dim": 20, "theta": config["rope_theta"]}
    _stretched(config, draw, head_dim, seed)


def _ministral3(config: dict[str, Any], draw: random.Random, head_dim: int, seed: int) -> None:
    _drawn(config, draw, head_dim=[8, 16], sliding_window=[None, 4])
    del config["rope_theta"]
    if seed % 2:
        config["rope_parameters"] = {
            "rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 6,
            "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": draw.choice([0.1, 0.5]),
        }  # fmt: skip


def _nemotron(config: dict[str, Any], draw: random.Random, head_dim: int, seed: int) -> None:
    _drawn(config, draw, head_dim=[8, 16], attention_bias=[False, True], mlp_bias=[False, True])
    _drawn(config, draw, partial_rotary_factor=[0.5, 1.0], hidden_act=["relu2", "gelu"])


def _nemotron_h(config: dict[str, Any], draw: random.Random, head_dim: int, seed: int) -> None:
    config.pop("rope_theta"), config.pop("num_hidden_layers")
    config |= {"n_routed_experts": 8, "moe_intermediate_size": 12, "tie_word_embeddings": False}
    _drawn(config, draw, head_dim=[8, 16], mlp_bias=[False, True], mlp_hidden_act=["relu2", "silu"])
    _drawn(config, draw, mamba_num_heads=[2, 4], mamba_head_dim=[8, 12], n_groups=[1, 2], ssm_state_size=[4, 12])
    _drawn(config, draw, use_conv_bias=[False, True], use_bias=[False, _biased_padding(seed)], conv_kernel=[2, 4])
    _drawn(config, draw, layer_norm_epsilon=[1e-5, 1e-2], time_step_min=[0.001, 0.4], num_experts_per_tok=[1, 3])
    _drawn(config, draw, norm_topk_prob=[True, False], moe_shared_expert_intermediate_size=[12, 20])
    config["n_group"], config["topk_group"] = draw.choice([(1, 1), (2, 1), (4, 2)])
    config["routed_scaling_factor"] = draw.choice([1.0, 2.5])
    config["hybrid_override_pattern"] = ["ME*-", "M-*E", "E*M"][seed % 3]


def _olmo2(config: dict[str, Any], draw: random.Random, head_dim: int, seed: int) -> None:
    _drawn(config, draw, attention_bias=[False, True])
    _stretched(config, draw, head_dim, seed)


def _olmo3(config: dict[str, Any], draw: random.Random, head_dim: int, seed: int) -> None:
    _drawn(config, draw, sliding_window=[3, 5], attention_bias=[False, True])
    if seed % 2:
        config["layer_types"] = _kinds(draw)
    if seed % 3 == 1:
        config["rope_scaling"] = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8}


def _phi3(config: dict[str, Any], draw: random.Random, head_dim: int, seed: int) -> None:
    _drawn(config, draw, partial_rotary_factor=[1.0, 0.75], sliding_window=[None, 4])
    if head_dim == 8:
        config["partial_rotary_factor"] = draw.choice([1.0, 0.5])
    if seed % 2:
        dim = int(head_dim * config["partial_rotary_factor"])
        inside = {"short_factor": [1.0 + i for i in range(dim // 2)], "long_factor": [2.0 + i for i in range(dim // 2)]}
        config["rope_scaling"] = {"type": "longrope", **inside}
        config["original_max_position_embeddings"] = draw.choice([4, 8])


def _qwen3_5_text(config: dict[str, Any], draw: random.Random, head_dim: int, seed: int) -> None:
    key_heads = draw.choice([1, 2])
    _drawn(config, draw, head_dim=[16, 32], attention_bias=[False, True], linear_conv_kernel_dim=[2, 4])
    _drawn(config, draw, linear_key_head_dim=[4, 8], linear_value_head_dim=[8, 16])
    config |= {"linear_num_key_heads": key_heads, "linear_num_value_heads": key_heads * draw.choice([1, 2])}
    config["layer_types"] = draw.sample(["linear_attention", "full_attention"], 2)
    theta = config.pop("rope_theta")
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": 0.25,
                                 "mrope_section": [1, 1, 0], "mrope_interleaved": True}  # fmt: skip
    if seed % 2:
        config["full_attention_interval"] = 2
        del config["layer_types"]


def _seed_oss(config: dict[str, Any], draw: random.Random, head_dim: int, seed: int) -> None:
    _drawn(config, draw, attention_bias=[False, True], attention_out_bias=[False, True], mlp_bias=[False, True])
    _drawn(config, draw, head_dim=[8, 16], residual_dropout=[0.1])


def _smollm3(config: dict[str, Any], draw: random.Random, head_dim: int, seed: int) -> None:
    _drawn(config, draw, no_rope_layer_interval=[2, 4], attention_bias=[False, True], mlp_bias=[False, True])
    if seed % 2:
        config["no_rope_layers"] = [draw.choice([0, 1]) for _ in range(LAYERS)]
    if seed % 3 == 1:
        config |= {"use_sliding_window": True, "sliding_window": 4}


def _stablelm(config: dict[str, Any], draw: random.Random, head_dim: int, seed: int) -> None:
    _drawn(config, draw, use_qkv_bias=[False, True], use_parallel_residual=[False, True])
    _drawn(config, draw, partial_rotary_factor=[0.25, 0.5, 1.0])


def _starcoder2(config: dict[str, Any], draw: random.Random, head_dim: int, seed: int) -> None:
    _drawn(config, draw, use_bias=[False, True], sliding_window=[None, 4], norm_epsilon=[1e-5, 1e-2])


def _experts(config: dict[str, Any], draw: random.Random, count: str = "num_experts") -> None:
    config[count], config["num_experts_per_tok"] = draw.choice([(4, 1), (6, 2), (8, 3)])
    config["use_sliding_window"] = False


def _qwen3_moe(config: dict[str, Any], draw: random.Random, head_dim: int, seed: int) -> None:
    _experts(config, draw)
    _drawn(config, draw, head_dim=[8, 16], norm_topk_prob=[False, True], moe_intermediate_size=[8, 20])
    _drawn(config, draw, decoder_sparse_step=[1, 1, 2], mlp_only_layers=[None, [], [0]], attention_bias=[False, True])
    if draw.random() < 0.3:
        config |= {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}


def _qwen2_moe(config: dict[str, Any], draw: random.Random, head_dim: int, seed: int) -> None:
    _experts(config, draw)
    _drawn(config, draw, norm_topk_prob=[False, True], moe_intermediate_size=[8, 20], qkv_bias=[True, False])
    _drawn(config, draw, shared_expert_intermediate_size=[12, 24], mlp_only_layers=[[], [1]])
    if draw.random() < 0.3:
        config |= {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": draw.choice([1, 28])}


def _mixtral(config: dict[str, Any], draw: random.Random, head_dim: int, seed: int) -> None:
    _experts(config, draw, "num_local_experts")
    del config["use_sliding_window"]
    _drawn(config, draw, sliding_window=[None, 4])


def _olmoe(config: dict[str, Any], draw: random.Random, head_dim: int, seed: int) -> None:
    _experts(config, draw)
    _drawn(config, draw, norm_topk_prob=[False, True], attention_bias=[False, True])


def _granitemoe(config: dict[str, Any], draw: random.Random, head_dim: int, seed: int) -> None:
    _experts(config, draw, "num_local_experts")
    _drawn(config, draw, embedding_multiplier=[1.0, 12], logits_scaling=[1.0, 8.0], residual_multiplier=[0.22, 1.0])
    _drawn(config, draw, attention_multiplier=[0.3, 0.015625], attention_bias=[False, True])


def _granitemoehybrid(config: dict[str, Any], draw: random.Random, head_dim: int, seed: int) -> None:
    _granitemoe(config, draw, head_dim, seed)
    del config["use_sliding_window"]
    if seed % 2 == 0:
        config |= {"num_local_experts": 0, "num_experts_per_tok": 0}
    heads, expand = draw.choice([2, 4]), draw.choice([1, 2])
    config |= {"mamba_n_heads": heads, "mamba_expand": expand, "mamba_d_head": draw.choice(["auto", None])}
    config["mamba_d_head"] = config["mamba_d_head"] or expand * config["hidden_size"] // heads
    _drawn(config, draw, mamba_n_groups=[1, 2], mamba_d_state=[4, 12], mamba_d_conv=[2, 4], mamba_chunk_size=[8, 256])
    _drawn(config, draw, mamba_conv_bias=[False, True], mamba_proj_bias=[False, _biased_padding(seed)])
    _drawn(config, draw, shared_intermediate_size=[12, 20])
    _drawn(config, draw, position_embedding_type=[None, "nope", "rope"], rms_norm_eps=[1e-6, 1e-2])
    kinds = draw.choice([["mamba", "attention"], ["linear_attention", "full_attention"]])
    config["layer_types"] = draw.sample(kinds, LAYERS)
    if draw.random() < 0.5:
        config["time_step_limit"] = [0.3, 0.9]


def _gpt_oss(config: dict[str, Any], draw: random.Random, head_dim: int, seed: int) -> None:
    _experts(config, draw, "num_local_experts")
    del config["use_sliding_window"]
    _drawn(config, draw, head_dim=[8, 16], sliding_window=[3, 5], swiglu_limit=[0.5, 7.0])
    if seed % 2:
        config["layer_types"] = _kinds(draw)
        del config["rope_theta"]
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": 900.0}


def _glm4_moe(config: dict[str, Any], draw: random.Random, head_dim: int, seed: int) -> None:
    _grouped(config, draw)
    _drawn(config, draw, head_dim=[8, 16], use_qk_norm=[False, True], partial_rotary_factor=[0.5, 1.0])
    _drawn(config, draw, attention_bias=[False, True], num_hidden_layers=[LAYERS])


def _grouped(config: dict[str, Any], draw: random.Random) -> None:
    groups, best = draw.choice([(1, 1), (2, 1), (4, 2)])
    config |= {"n_routed_experts": 8, "n_group": groups, "topk_group": best, "moe_intermediate_size": 12}
    _drawn(config, draw, num_experts_per_tok=[1, 3, 4], routed_scaling_factor=[1.0, 2.5], norm_topk_prob=[True, False])
    _drawn(config, draw, first_k_dense_replace=[0, 1], n_shared_experts=[1, 2])


def _qwen3_5_moe_text(config: dict[str, Any], draw: random.Random, head_dim: int, seed: int) -> None:
    _qwen3_5_text(config, draw, head_dim, seed)
    _experts(config, draw)
    del config["intermediate_size"]
    _drawn(config, draw, moe_intermediate_size=[8, 20], shared_expert_intermediate_size=[12, 24])


def _qwen3_next(config: dict[str, Any], draw: random.Random, head_dim: int, seed: int) -> None:
    _qwen3_5_text(config, draw, head_dim, seed)
    del config["rope_parameters"]["mrope_section"], config["rope_parameters"]["mrope_interleaved"]
    _experts(config, draw)
    _drawn(config, draw, moe_intermediate_size=[8, 20], shared_expert_intermediate_size=[12, 24])
    _drawn(config, draw, norm_topk_prob=[False, True], decoder_sparse_step=[1, 1, 2], mlp_only_layers=[None, [0]])


def _latent(config: dict[str, Any], draw: random.Random, seed: int) -> None:
    _grouped(config, draw)
    _drawn(config, draw, q_lora_rank=[None, 12], kv_lora_rank=[8, 20], qk_nope_head_dim=[4, 8])
    _drawn(config, draw, qk_rope_head_dim=[4, 8], v_head_dim=[6, 12], attention_bias=[False, True])
    config["num_key_value_heads"] = config["num_attention_heads"]
    if seed % 2:
        theta = config.pop("rope_theta")
        config["rope_scaling"] = {
            "rope_type": "yarn", "factor": 4.0, "rope_theta": theta, "mscale": 0.7, "mscale_all_dim": 0.9,
            "original_max_position_embeddings": 8,
        }  # fmt: skip


def _deepseek_v2(config: dict[str, Any], draw: random.Random, head_dim: int, seed: int) -> None:
    _latent(config, draw, seed)
    _drawn(config, draw, topk_method=["greedy", "group_limited_greedy"])
    config["norm_topk_prob"] = False


def _deepseek_v3(config: dict[str, Any], draw: random.Random, head_dim: int, seed: int) -> None:
    _latent(config, draw, seed)
    _drawn(config, draw, rope_interleave=[True, False])


def _glm4_moe_lite(config: dict[str, Any], draw: random.Random, head_dim: int, seed: int) -> None:
    _latent(config, draw, seed)
    del config["first_k_dense_replace"]
    _drawn(config, draw, rope_interleave=[True, False])
