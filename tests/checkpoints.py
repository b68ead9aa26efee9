"""Small random checkpoints on disk, of every architecture, with a byte tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 257
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
    "initializer_range": 0.15,
}
"""GQA, and head_dim ≠ hidden/heads."""
PROSE = " ".join(f"Sentence {i} says that {i * i} is the square of {i}, as {i % 7} of us knew." for i in range(400))


def write_tokenizer(folder: Path) -> None:
    """One token per byte, and an end-of-text token that is never added by itself."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)


def write_checkpoint(
    folder: Path,
    model_type: str = "llama",
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    stored: str | None = None,
    seed: int = 0,
    **settings: Any,
) -> torch.nn.Module:
    """Writes a random model and its tokenizer; returns the model in float32.

    ``stored``: the one name under which a tied model keeps its table.
    """
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **(SIZES | settings))
    config.architectures = [f"{model_type.capitalize()}ForCausalLM"]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    state = {k: v.detach().to(dtype).clone() for k, v in model.state_dict().items()}
    model.load_state_dict({k: v.float() for k, v in state.items()})
    if config.tie_word_embeddings:
        table = state.pop("lm_head.weight")
        state.pop("model.embed_tokens.weight")
        state[stored or "model.embed_tokens.weight"] = table
    folder.mkdir(parents=True)
    write_shards(folder, state, shards)
    (folder / "config.json").write_text(json.dumps(config.to_dict() | {"dtype": str(dtype).removeprefix("torch.")}))
    write_tokenizer(folder)
    return model.eval()


def write_shards(folder: Path, state: dict[str, torch.Tensor], shards: int) -> None:
    """One ``model.safetensors``, or ``shards`` files with an index."""
    if shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(state)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: state[name] for name in names[i::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_prose(file: Path, characters: int = 20_000) -> Path:
    file.write_text(PROSE[:characters])
    return file
