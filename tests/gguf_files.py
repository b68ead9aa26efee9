"""GGUF files made by the gguf library's writer, of random models, and what transformers makes of the same weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
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
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2"}
ARCHITECTURES["gemma3_text"] = "gemma3"
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
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


GEMMA_NAMES = NAMES | {
    "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip


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
    """The GGUF name of a Hugging Face tensor."""
    stem, suffix = name.rsplit(".", 1)
    parts, names = stem.split("."), GEMMA_NAMES if architecture.startswith("gemma") else NAMES
    if parts[:2] == ["model", "layers"]:
        return f"blk.{parts[2]}.{names['.'.join(parts[3:])]}.{suffix}"
    return f"{names[stem]}.{suffix}"


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
) -> PreTrainedModel:
    """A random model of a config, its linears in ``kind``, as a GGUF file; returns transformers' model of the same
    weights, dequantised by the gguf library, in float32."""
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
        if config["tie_word_embeddings"] and name == "lm_head.weight":
            continue
        if tensor.ndim == 1:
            values = rng.standard_normal(tensor.shape).astype(np.float32) * 0.1
            values = values + 1 if "norm" in name else values
            state[name] = torch.from_numpy(values)
            stored = values + np.float32(1) if architecture.startswith("gemma") else values
            raw, of = stored.view(np.uint8), Type.F32
        else:
            of = (embedding or Type.F16) if name.startswith(("model.embed", "lm_head")) else kind
            raw = random_bytes(rng, of, *tensor.shape)
            state[name] = torch.from_numpy(dequantised(raw, of))
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        if architecture == "llama" and heads is not None:
            rows = raw.reshape(tensor.shape[0], -1)
            raw = np.ascontiguousarray(permuted(rows, config[heads])).reshape(raw.shape)
        writer.add_tensor(theirs(name, architecture), raw, raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    return model.float().eval()


def write_keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    """What a converter writes of a config."""
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if "rope_theta" in config:
        writer.add_rope_freq_base(config["rope_theta"])
    else:
        full = config["rope_parameters"]["full_attention"]
        writer.add_rope_freq_base(full["rope_theta"])
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(full["factor"])
    if config["model_type"].startswith("gemma"):
        writer.add_sliding_window(config["sliding_window"])
    if config["model_type"] == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    writer.add_vocab_size(config["vocab_size"])


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
