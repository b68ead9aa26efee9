"""GGUF files made by the gguf library's writer, of random models, and what transformers makes of the same weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

Type = GGMLQuantizationType
ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2",
    "gemma3_text": "gemma3", "phi3": "phi3", "olmo2": "olmo2", "olmo3": "olmo2", "granite": "granite", "glm4": "glm4",
    "cohere2": "cohere2", "starcoder2": "starcoder2", "exaone4": "exaone4", "smollm3": "smollm3",
    "seed_oss": "seed_oss", "ernie4_5": "ernie4_5", "hunyuan_v1_dense": "hunyuan-dense", "stablelm": "stablelm",
    "nemotron": "nemotron", "arcee": "arcee", "apertus": "apertus", "ministral3": "mistral3", "bitnet": "bitnet",
    "mixtral": "llama", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "olmoe": "olmoe", "gpt_oss": "gpt-oss",
    "granitemoe": "granitemoe", "qwen3_5_text": "qwen35", "qwen3_5_moe_text": "qwen35moe",
    "lfm2": "lfm2", "gemma4_text": "gemma4", "glm4_moe": "glm4moe",
    "qwen3_next": "qwen3next",
}  # fmt: skip
PERMUTED = ("llama", "granite", "granitemoe", "smollm3", "arcee", "mistral3")
"""Architectures whose converters are children of Llama's and reorder q and k."""
OFFSET = ("gemma2", "gemma3", "nemotron", "qwen35", "qwen35moe", "qwen3next")
"""Whose converters add 1 to norms."""
HALVES = {
    Type.Q4_0: (0,), Type.Q4_1: (0, 2), Type.Q5_0: (0,), Type.Q5_1: (0, 2), Type.Q8_0: (0,), Type.Q2_K: (80, 82),
    Type.Q3_K: (108,), Type.Q4_K: (0, 2), Type.Q5_K: (0, 2), Type.Q6_K: (208,), Type.IQ4_NL: (0,), Type.IQ4_XS: (0,),
    Type.MXFP4: (), Type.TQ1_0: (52,), Type.TQ2_0: (64,),
}  # fmt: skip
"""Bytes of a block where half-precision scales and minima stand (ggml-common.h)."""
LARGEST = {
    Type.Q4_0: 8, Type.Q4_1: 15, Type.Q5_0: 16, Type.Q5_1: 31, Type.Q8_0: 128, Type.Q2_K: 45, Type.Q3_K: 128,
    Type.Q4_K: 945, Type.Q5_K: 1953, Type.Q6_K: 4096, Type.IQ4_NL: 127, Type.IQ4_XS: 4064, Type.TQ1_0: 1, Type.TQ2_0: 2,
}  # fmt: skip
"""What a block's largest number is, in scales."""
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "phi3": {"partial_rotary_factor": 0.75, "sliding_window": 40},
    "olmo2": {},
    "olmo3": {"sliding_window": 8, "rope_parameters": {
        "full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0}}},
    "granite": {"embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.25,
                "attention_multiplier": 0.5, "attention_bias": True, "mlp_bias": True},
    "glm4": {"head_dim": 32, "attention_bias": True, "partial_rotary_factor": 0.5},
    "cohere2": {"sliding_window": 8, "logit_scale": 0.25, "layer_norm_eps": 1e-5, "tie_word_embeddings": True},
    "starcoder2": {"norm_epsilon": 1e-5, "use_bias": True, "sliding_window": None},
    "exaone4": {"sliding_window": None, "layer_types": ["full_attention"] * 5},
    "smollm3": {"tie_word_embeddings": True},
    "seed_oss": {"head_dim": 32, "attention_bias": True},
    "ernie4_5": {"head_dim": 32, "tie_word_embeddings": True},
    "hunyuan_v1_dense": {"head_dim": 32},
    "stablelm": {"layer_norm_eps": 1e-5, "partial_rotary_factor": 0.25, "use_qkv_bias": True,
                 "use_parallel_residual": True},
    "nemotron": {"norm_eps": 1e-5, "partial_rotary_factor": 0.5, "attention_bias": True, "mlp_bias": True,
                 "hidden_act": "relu2"},
    "arcee": {"rope_parameters": YARN},
    "apertus": {"attention_bias": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}},
    "ministral3": {"head_dim": 32, "sliding_window": None, "rope_parameters": YARN | {
        "beta_fast": 16.0, "beta_slow": 2.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.5}},
    "bitnet": {"hidden_act": "silu", "tie_word_embeddings": True},
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen2_moe": {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                  "shared_expert_intermediate_size": 64},
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 32,
                  "norm_topk_prob": True},
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 2, "eos_token_id": 1},
    "gpt_oss": {"num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": 8, "attention_bias": True,
                "rope_parameters": YARN | {"truncate": False}},
    "granitemoe": {"num_local_experts": 6, "num_experts_per_tok": 2, "embedding_multiplier": 12.0,
                   "logits_scaling": 8.0, "residual_multiplier": 0.25, "attention_multiplier": 0.5},
}  # fmt: skip
DELTA_NET = {
    "head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 6, "linear_key_head_dim": 16,
    "linear_value_head_dim": 32, "linear_conv_kernel_dim": 4, "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.25},
}  # fmt: skip
READ_ONLY: dict[str, dict[str, Any]] = {
    "qwen3_5_text": DELTA_NET,
    "qwen3_5_moe_text": DELTA_NET | {
        "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64},
    "qwen3_next": DELTA_NET | {
        "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64},
    "lfm2": {"norm_eps": 1e-5, "conv_L_cache": 3, "block_auto_adjust_ff_dim": False, "tie_word_embeddings": True,
             "layer_types": ["conv", "conv", "full_attention", "conv", "full_attention"]},
    "glm4_moe": {"n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 2,
                 "first_k_dense_replace": 2, "norm_topk_prob": True, "routed_scaling_factor": 1.5, "use_qk_norm": True,
                 "attention_bias": True, "n_group": 1, "topk_group": 1, "rope_parameters": {
                     "rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.5}},
    "gemma4_text": {"head_dim": 16, "global_head_dim": 32, "sliding_window": 8, "tie_word_embeddings": True,
                    "layer_types": ["sliding_attention"] + ["sliding_attention", "full_attention"] * 2,
                    "num_kv_shared_layers": 2, "use_double_wide_mlp": True, "hidden_size_per_layer_input": 32,
                    "vocab_size_per_layer_input": 96, "attention_k_eq_v": True, "num_global_key_value_heads": 1,
                    "final_logit_softcapping": 3.0, "rope_parameters": {
                        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                        "full_attention": {"rope_type": "proportional", "rope_theta": 1000.0,
                                           "partial_rotary_factor": 0.25}}},
}  # fmt: skip
READ_ONLY["gemma4_text, experts"] = READ_ONLY["gemma4_text"] | {
    "model_type": "gemma4_text", "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0,
    "use_double_wide_mlp": False,
    "enable_moe_block": True, "num_experts": 6, "top_k_experts": 2, "moe_intermediate_size": 32,
}  # fmt: skip
"""Families whose files are read, but not written."""
XIELU = ("alpha_p", "alpha_n", "beta", "eps")


def small_config(model_type: str = "llama", **changes: Any) -> dict[str, Any]:
    """Wide enough for blocks of 256."""
    config: dict[str, Any] = {
        "model_type": model_type, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 96, "hidden_act": "silu",
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
    }  # fmt: skip
    if model_type == "mistral":
        config["sliding_window"] = None
    if model_type.startswith("gemma"):
        del config["hidden_act"]
        config |= {"sliding_window": 8, "tie_word_embeddings": True, "pad_token_id": 0, "query_pre_attn_scalar": 64}
    if model_type == "gemma2":
        config |= {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0}
    if model_type == "gemma3_text":
        config |= {"num_hidden_layers": 7}
        full = {"rope_type": "linear", "factor": 8.0, "rope_theta": config.pop("rope_theta")}
        config["rope_parameters"] = {
            "full_attention": full,
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
    return config | changes


def family_config(family: str) -> dict[str, Any]:
    """A small config with what is special about a family; 64 tokens of context, a vocabulary of 96."""
    config: dict[str, Any] = {
        "model_type": family, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 5,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 96,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 1000.0, "tie_word_embeddings": False,
        "pad_token_id": 0,
    }  # fmt: skip
    config |= (FAMILIES | READ_ONLY)[family]
    kinds = {"layer_norm_eps", "norm_epsilon", "norm_eps"} & config.keys()
    for key in ("rms_norm_eps",) * bool(kinds) + ("rope_theta",) * ("rope_parameters" in config):
        del config[key]
    return config


def random_bytes(
    rng: np.random.Generator, kind: Type, rows: int, columns: int, size: float = 0.05
) -> NDArray[np.uint8]:
    """A random tensor of any type, its weights about as large as ``size``: ``[rows, bytes of a row]``."""
    if kind in (Type.F32, Type.F16, Type.BF16):
        values = (rng.standard_normal((rows, columns)) * size).astype(np.float32)
        if kind is Type.BF16:
            return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        return values.astype(np.float16 if kind is Type.F16 else np.float32).view(np.uint8)
    block, length = GGML_QUANT_SIZES[kind]
    found = rng.integers(0, 256, (rows, columns // block, length), np.uint8)
    for at in HALVES[kind]:
        scale = rng.uniform(0.5, 1.5, found.shape[:2]) * 2 * size / LARGEST[kind]
        if kind in (Type.Q4_1, Type.Q5_1) and at == 2:
            scale = -size * rng.uniform(0.5, 1.5, found.shape[:2])
        found[:, :, at : at + 2] = scale.astype(np.float16)[:, :, None].view(np.uint8)
    if kind is Type.MXFP4:
        found[:, :, 0] = rng.integers(119, 122, found.shape[:2])
    if kind is Type.TQ1_0:  # bytes that stand for five digits of base 3
        digits = rng.integers(0, 3, (rows, columns)).astype(np.float32) - 1
        return np.asarray(gguf.quants.quantize(digits * np.float32(size), kind))
    return found.reshape(rows, -1)


def theirs(name: str, architecture: str = "llama") -> str:
    """The GGUF name of a Hugging Face tensor, by the gguf library."""
    if name.endswith(("router.scale", "router.per_expert_scale")):
        return f"blk.{name.split('.')[2]}.ffn_{'down_exps' if 'expert' in name else 'gate_inp'}.scale"
    name = name.replace("e_score_correction_bias", "e_score_correction.bias")
    name = name.replace("block_sparse_moe.router.weight", "block_sparse_moe.router.layer.weight")
    name = name + ".weight" if name.endswith(("sinks", "layer_scalar")) else name
    if architecture == "bitnet" and "_sub_norm" in name:  # the library knows an older spelling
        name = name.replace("self_attn.attn_sub_norm", "self_attn.inner_attn_ln").replace(
            "ffn_sub_norm", "ffn_layernorm"
        )
    found = _name_map(architecture).get_name(name, try_suffixes=(".weight", ".bias"))
    assert found is not None, name
    return found


@cache
def _name_map(architecture: str) -> gguf.TensorNameMap:
    (of,) = [arch for arch, called in gguf.MODEL_ARCH_NAMES.items() if called == architecture]
    return gguf.get_tensor_name_map(of, 8)


def permuted(weight: NDArray[Any], heads: int) -> NDArray[Any]:
    """Rows of q or k as convert_hf_to_gguf stores those of Llama: ``[heads, 2, d/2] → [heads, d/2, 2]``."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write_random(
    file: Path,
    config: Mapping[str, Any],
    kind: Type,
    seed: int = 0,
    metadata: Mapping[str, Any] | None = None,
    embedding: Type | None = None,
    size: float = 0.05,
    factors: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """A random model of a config, its linears in ``kind``, as a GGUF file, with ``factors`` as further tensors; returns
    transformers' model of the same weights, dequantised by the gguf library, in float32."""
    rng = np.random.default_rng(seed)
    model = AutoModelForCausalLM.from_config(
        CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(dict(config)))
    )
    architecture = ARCHITECTURES[config["model_type"]]
    writer = gguf.GGUFWriter(file, architecture)
    write_keys(writer, config)
    for key, value in (metadata or {}).items():
        add(writer, key, value)
    state = {}
    for name, tensor in model.state_dict().items():
        if config["tie_word_embeddings"] and name == "lm_head.weight" or ".act_fn." in name:
            continue
        if ".experts." in name:
            state[name] = _write_experts(writer, rng, name, tuple(tensor.shape), kind, size, architecture)
            continue
        if ".conv.conv." in name:
            values = rng.standard_normal(tuple(tensor.shape)).astype(np.float32)
            writer.add_tensor(theirs(name, architecture), values.squeeze(1))
            state[name] = torch.from_numpy(values)
            continue
        if ".linear_attn." in name:
            state[name] = _write_delta_net(writer, rng, name, tensor, kind, config, size)
            continue
        if tensor.ndim == 1:
            values = rng.standard_normal(tensor.shape).astype(np.float32) * 0.1
            values = values + 1 if name.endswith(("norm.weight", "layernorm.weight", "scalar", "scale")) else values
            state[name] = torch.from_numpy(values)
            stored = values + np.float32(1) if architecture in OFFSET and name.endswith("norm.weight") else values
            raw, of = stored.view(np.uint8), Type.F32
        else:
            of = (embedding or Type.F16) if name.startswith(("model.embed", "lm_head")) else kind
            raw = random_bytes(rng, of, *tensor.shape, size)
            state[name] = torch.from_numpy(dequantised(raw, of))
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        if architecture in PERMUTED and heads is not None:
            rows = raw.reshape(tensor.shape[0], -1)
            raw = np.ascontiguousarray(permuted(rows, config[heads])).reshape(raw.shape)
        writer.add_tensor(theirs(name, architecture), raw, raw_dtype=of)
    for name, values in (factors or {}).items():
        writer.add_tensor(name, np.asarray(values, np.float32))
    for name in XIELU if architecture == "apertus" else ():
        numbers = rng.uniform(-0.5, 0.5, config["num_hidden_layers"]).astype(np.float32)
        state |= {
            key: torch.full_like(model.state_dict()[key], float(number))
            for key, number in zip(
                (f"model.layers.{i}.mlp.act_fn.{name}" for i in range(len(numbers))), numbers, strict=True
            )
        }
        writer.add_array(f"xielu.{name}", numbers.tolist())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    return model.float().eval()


def _write_experts(
    writer: gguf.GGUFWriter,
    rng: np.random.Generator,
    name: str,
    shape: tuple[int, ...],
    kind: Type,
    size: float,
    architecture: str,
) -> torch.Tensor:
    """Writes transformers' tensor of all experts as GGUF's one or two; returns it. gpt-oss stores gate and up by turns,
    and inputs before outputs."""
    layer, module = name.split(".")[2], name.split(".")[-1]
    if architecture == "gemma4" and module == "gate_up_proj":  # as they are
        raw = random_bytes(rng, kind, shape[0] * shape[1], shape[2], size)
        writer.add_tensor(f"blk.{layer}.ffn_gate_up_exps.weight", raw.reshape(*shape[:2], -1), raw_dtype=kind)
        return torch.from_numpy(dequantised(raw, kind).reshape(shape))
    bias, by_turns = module.endswith("_bias"), architecture == "gpt-oss"
    parts = ("gate", "up") if "gate_up" in module else ("down",)
    rows, columns = (shape[-1], 1) if bias else (shape[-1], shape[1]) if by_turns else shape[1:]
    found = []
    for part in parts:
        count = rows // len(parts)
        if bias:
            values = rng.standard_normal((shape[0], count)).astype(np.float32) * 0.1
            writer.add_tensor(f"blk.{layer}.ffn_{part}_exps.bias", values)
        else:
            raw = random_bytes(rng, kind, shape[0] * count, columns, size)
            values = dequantised(raw, kind).reshape(shape[0], count, columns)
            raw = raw.reshape(shape[0], count, -1)
            writer.add_tensor(f"blk.{layer}.ffn_{part}_exps.weight", raw, raw_dtype=kind)
        found.append(values)
    if bias:
        return torch.from_numpy(np.stack(found, -1).reshape(shape))
    if not by_turns:
        return torch.from_numpy(np.concatenate(found, 1))
    whole = np.stack(found, 2).reshape(shape[0], rows, columns)
    return torch.from_numpy(np.ascontiguousarray(whole.swapaxes(1, 2)))


def _write_delta_net(
    writer: gguf.GGUFWriter,
    rng: np.random.Generator,
    name: str,
    tensor: torch.Tensor,
    kind: Type,
    config: Mapping[str, Any],
    size: float,
) -> torch.Tensor:
    """Writes a tensor of a gated delta net as Qwen 3.5's converter does, value heads in its order; returns it."""
    keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    layer, module = name.split(".")[2], name.split("linear_attn.")[1]
    fused = config["model_type"] == "qwen3_next"
    theirs = {
        "in_proj_qkvz.weight": "attn_qkv.weight", "in_proj_ba.weight": "ssm_ba.weight",
        "in_proj_qkv.weight": "attn_qkv.weight", "in_proj_z.weight": "attn_gate.weight", "A_log": "ssm_a",
        "in_proj_a.weight": "ssm_alpha.weight", "in_proj_b.weight": "ssm_beta.weight", "dt_bias": "ssm_dt.bias",
        "norm.weight": "ssm_norm.weight", "conv1d.weight": "ssm_conv1d.weight", "out_proj.weight": "ssm_out.weight",
    }[module]  # fmt: skip
    if tensor.ndim == 2:
        raw = random_bytes(rng, kind, *tensor.shape, size)
        found = torch.from_numpy(dequantised(raw, kind))
    else:
        kind = Type.F32
        raw = rng.standard_normal(tuple(tensor.shape)).astype(np.float32) * np.float32(0.3)
        found = torch.from_numpy(raw.copy())
        raw = -np.exp(raw) if module == "A_log" else raw.squeeze()
    if fused:
        if module == "in_proj_qkvz.weight":
            width = config["linear_key_head_dim"], values // keys * config["linear_value_head_dim"]
            by_head = np.split(raw.reshape(keys, -1, raw.shape[1]), np.cumsum([width[0], width[0], width[1]]), 1)
            *qkv, z = (np.ascontiguousarray(part).reshape(-1, raw.shape[1]) for part in by_head)
            writer.add_tensor(f"blk.{layer}.attn_gate.weight", z, raw_dtype=kind)
            raw = np.concatenate(qkv)
        writer.add_tensor(f"blk.{layer}.{theirs}", np.ascontiguousarray(raw), raw_dtype=kind)
        return found
    before = 2 * keys * config["linear_key_head_dim"] if module in ("in_proj_qkv.weight", "conv1d.weight") else 0

    def tiled(rows: NDArray[Any]) -> NDArray[Any]:
        return rows.reshape(keys, values // keys, -1).swapaxes(0, 1).reshape(rows.shape)

    if module == "out_proj.weight":
        raw = np.stack([tiled(row) for row in raw])
    elif module != "norm.weight":
        raw = np.concatenate([raw[:before], tiled(raw[before:])])
    writer.add_tensor(f"blk.{layer}.{theirs}", np.ascontiguousarray(raw), raw_dtype=kind)
    return found


def write_keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    """What a converter writes of a config."""
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    if config["model_type"] not in ("qwen3_5_moe_text", "gemma4_text"):
        writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    kv_heads = config["num_key_value_heads"]
    if config["model_type"] == "lfm2":
        writer.add_head_count_kv([0 if kind == "conv" else kv_heads for kind in config["layer_types"]])
        writer.add_shortconv_l_cache(config["conv_L_cache"])
    elif config["model_type"] == "gemma4_text":
        _write_gemma4(writer, config)
        return
    else:
        writer.add_head_count_kv(kv_heads)
    if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    for key in ("rms_norm_eps", "layer_norm_eps", "norm_epsilon", "norm_eps"):
        if key in config:
            rms = key == "rms_norm_eps" or config["model_type"] == "lfm2"
            (writer.add_layer_norm_rms_eps if rms else writer.add_layer_norm_eps)(config[key])
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta")}
    full = rope.get("full_attention", rope)
    writer.add_rope_freq_base(full["rope_theta"])
    if full.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(full["factor"])
    if full.get("rope_type") == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(full["factor"])
        writer.add_rope_scaling_orig_ctx_len(full["original_max_position_embeddings"])
    for key, write in (
        ("sliding_window", writer.add_sliding_window),
        ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
        ("final_logit_softcapping", writer.add_final_logit_softcapping),
        ("attention_multiplier", writer.add_attention_scale), ("embedding_multiplier", writer.add_embedding_scale),
        ("residual_multiplier", writer.add_residual_scale), ("logits_scaling", writer.add_logit_scale),
        ("logit_scale", writer.add_logit_scale), ("use_parallel_residual", writer.add_parallel_residual),
    ):  # fmt: skip
        if config.get(key) is not None:
            write(config[key])
    if (partial := config.get("partial_rotary_factor", full.get("partial_rotary_factor"))) is not None:
        writer.add_rope_dimension_count(int(partial * config["head_dim"]))
    if "linear_num_key_heads" in config:
        writer.add_ssm_conv_kernel(config["linear_conv_kernel_dim"])
        writer.add_ssm_state_size(config["linear_key_head_dim"])
        writer.add_ssm_group_count(config["linear_num_key_heads"])
        writer.add_ssm_time_step_rank(config["linear_num_value_heads"])
        writer.add_ssm_inner_size(config["linear_value_head_dim"] * config["linear_num_value_heads"])
        writer.add_full_attention_interval(4)
        writer.add_rope_dimension_sections([2, 1, 1, 0])
    if config["model_type"] == "ministral3":
        writer.add_attn_temperature_scale(rope["llama_4_scaling_beta"])
        writer.add_rope_scaling_yarn_log_mul(rope["mscale_all_dim"])
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
    if config["model_type"] == "olmo3":
        writer.add_sliding_window_pattern([(i + 1) % 4 != 0 for i in range(config["num_hidden_layers"])])
    experts = next(
        (config[key] for key in ("num_experts", "num_local_experts", "n_routed_experts") if key in config), None
    )
    if "n_routed_experts" in config:
        writer.add_expert_shared_count(config["n_shared_experts"])
        writer.add_leading_dense_block_count(config["first_k_dense_replace"])
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
        writer.add_expert_weights_scale(config["routed_scaling_factor"])
        writer.add_expert_weights_norm(config["norm_topk_prob"])
    if experts is not None:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
    if (width := config.get("moe_intermediate_size")) is not None or config["model_type"] == "gpt_oss":
        writer.add_expert_feed_forward_length(width or config["intermediate_size"])
    if "shared_expert_intermediate_size" in config:
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    writer.add_vocab_size(config["vocab_size"])


def _write_gemma4(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    """What Gemma 4's converter writes besides sizes that all models have."""
    narrow = [kind == "sliding_attention" for kind in config["layer_types"]]
    shared, inner = config["num_kv_shared_layers"], config["intermediate_size"]
    wide = [inner] * (len(narrow) - shared) + [inner * (1 + config["use_double_wide_mlp"])] * shared
    writer.add_feed_forward_length(wide if config["use_double_wide_mlp"] else inner)
    kv_heads, of_wide = config["num_key_value_heads"], config["num_global_key_value_heads"]
    writer.add_head_count_kv([kv_heads if one else of_wide for one in narrow])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_shared_kv_layers(shared)
    writer.add_embedding_length_per_layer_input(config["hidden_size_per_layer_input"])
    writer.add_sliding_window_pattern(narrow)
    writer.add_sliding_window(config["sliding_window"])
    writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    writer.add_key_length(config["global_head_dim"])
    writer.add_value_length(config["global_head_dim"])
    writer.add_key_length_swa(config["head_dim"])
    writer.add_value_length_swa(config["head_dim"])
    writer.add_rope_dimension_count(config["global_head_dim"])
    writer.add_rope_dimension_count_swa(config["head_dim"])
    rope = config["rope_parameters"]
    writer.add_rope_freq_base(rope["full_attention"]["rope_theta"])
    writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
    pairs = config["global_head_dim"] // 2
    rotated = int(pairs * rope["full_attention"]["partial_rotary_factor"])
    writer.add_tensor("rope_freqs.weight", np.array([1.0] * rotated + [1e30] * (pairs - rotated), np.float32))
    writer.add_vocab_size(config["vocab_size"])
    if config.get("enable_moe_block"):
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["top_k_experts"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def dequantised(raw: NDArray[np.uint8], kind: Type) -> NDArray[np.float32]:
    """By the gguf library."""
    if kind is Type.BF16:
        return (np.ascontiguousarray(raw).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.array(gguf.quants.dequantize(np.ascontiguousarray(raw), kind), np.float32)
