"""Small random models of every family: config.json, transformers' model of it, ours."""

from __future__ import annotations

import copy
import random
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tulle.models.decoder import PlainDecoder
from tulle.models.description import describe

LENGTH = 20
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ROTARY = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
ACTIVATIONS = ("silu", "swish", "gelu", "gelu_python", "gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh")
ACTIVATIONS += ("gelu_python_tanh", "quick_gelu", "relu", "relu2")


def rotary_settings(draw: random.Random, kind: str, head_dim: int, context: int) -> dict[str, Any]:
    found: dict[str, Any] = {"rope_type": kind}
    if kind in ("linear", "dynamic", "yarn", "llama3"):
        found["factor"] = draw.choice([2, 4.0, 8.5])
    if kind in ("yarn", "llama3", "longrope") and draw.random() < 0.8:
        found["original_max_position_embeddings"] = draw.choice([4, 8, context])
    if kind == "yarn":
        optional = {"beta_fast": 16, "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 0.9, "truncate": False}
        optional["attention_factor"] = 1.3
        found |= {key: value for key, value in optional.items() if draw.random() < 0.4}
    if kind == "longrope":
        found["short_factor"] = [1 + draw.random() for _ in range(head_dim // 2)]
        found["long_factor"] = [1 + 3 * draw.random() for _ in range(head_dim // 2)]
        found |= {key: v for key, v in {"factor": 4.0, "attention_factor": 1.2}.items() if draw.random() < 0.4}
    if kind == "llama3":
        found["low_freq_factor"], found["high_freq_factor"] = 1.0, draw.choice([2.0, 4.0])
    return found


def random_config(family: str, seed: int) -> dict[str, Any]:
    """A config.json. Kinds of rotary table and activations take turns by seed, all else is drawn."""
    draw = random.Random(f"{family} {seed}")
    kv_heads, head_dim = draw.choice([1, 2, 3]), draw.choice([4, 6, 8, 16])
    heads = kv_heads * draw.choice([1, 2, 4])
    hidden = heads * 8 if family == "llama" or draw.random() < 0.5 else draw.choice([12, 20, 24])
    context, layers = draw.choice([8, 16, 64]), draw.choice([1, 2, 3])
    config: dict[str, Any] = {
        "model_type": family,
        "hidden_size": hidden,
        "intermediate_size": draw.choice([16, 24, 40]),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": 40,
        "max_position_embeddings": context,
        "tie_word_embeddings": draw.random() < 0.5,
        "hidden_act": ACTIVATIONS[seed % len(ACTIVATIONS)],
        "rms_norm_eps": draw.choice([1e-6, 1e-5, 1e-2]),
    }
    if family in ("llama", "mistral", "qwen2") and not hidden % heads and not hidden // heads % 2:
        if draw.random() < 0.3:
            del config["head_dim"]
            head_dim = hidden // heads
    if family in ("llama", "qwen3"):
        config["attention_bias"] = draw.random() < 0.5
    if family == "llama":
        config["mlp_bias"] = draw.random() < 0.5
    if family == "mistral":
        config["sliding_window"] = draw.choice([None, 1, 3, 5, 64])
    if family.startswith("qwen"):
        config["use_sliding_window"] = draw.random() < 0.7
        config["sliding_window"], config["max_window_layers"] = draw.choice([1, 3, 5]), draw.choice([0, 1, 2])
        if config["use_sliding_window"] and draw.random() < 0.3:
            kinds = ["full_attention", "sliding_attention"]
            config["layer_types"] = [draw.choice(kinds) for _ in range(layers)]
    rotary = rotary_settings(draw, ROTARY[seed % len(ROTARY)], head_dim, context)
    theta, form = draw.choice([100.0, 10000, 1e6]), draw.choice(["new", "old", "oldest", "both"])
    if form == "new":
        config["rope_parameters"] = {**rotary, "rope_theta": theta}
    elif form == "old":
        config |= {"rope_scaling": rotary, "rope_theta": theta}
        if rotary["rope_type"] == "default":
            config["rope_scaling"] = None
    elif form == "oldest":
        config["rope_scaling"] = {"type": rotary.pop("rope_type"), **rotary}
        if draw.random() < 0.7:
            config["rope_theta"] = theta
    else:
        config |= {"rope_scaling": rotary, "rope_parameters": {"rope_type": "default", "rope_theta": 55.0}}
    return config


def reference_model(config: dict[str, Any], seed: int = 0, scale: float = 1.5) -> PreTrainedModel:
    """transformers' model with random weights, float32: biases and norms, too."""
    found = CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(config))
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(found).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(1 + 0.3 * noise if "norm" in name else noise * scale / parameter.shape[-1] ** 0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):
            buffer.copy_(1 + 0.3 * torch.randn(buffer.shape, generator=generator))
    return model


def layer_tensors(model: PreTrainedModel, index: int) -> dict[str, Tensor]:
    """A layer's tensors by relative name."""
    prefix = f"model.layers.{index}."
    return {name.removeprefix(prefix): t for name, t in model.state_dict().items() if name.startswith(prefix)}


def plain_model(config: dict[str, Any], model: PreTrainedModel, dtype: torch.dtype = torch.float32) -> PlainDecoder:
    """Ours, with the same weights; of a tied model only the embedding."""
    decoder = describe(copy.deepcopy(config))
    state = model.state_dict()
    outer = {name: state[name] for name in decoder.outer_tensors()}
    return PlainDecoder(decoder, lambda index: layer_tensors(model, index), outer, dtype=dtype)


def text(seed: int) -> tuple[Tensor, Tensor]:
    """Tokens ``[2, T]``, the second sequence being padded at the right, and the mask of real ones."""
    tokens = torch.randint(0, 40, (2, LENGTH), generator=torch.Generator().manual_seed(seed))
    valid = torch.ones(2, LENGTH, dtype=torch.bool)
    valid[1, 13:] = False
    return tokens, valid


def largest_difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / a.abs().max())
