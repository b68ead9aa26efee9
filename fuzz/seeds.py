"""First inputs of the fuzz targets: a small valid one of every layout, format and family.

``write(folder)`` makes ``folder/native`` and ``folder/READER`` for every reader of fuzz/readers.py. What a run of the
fuzzer finds is added beside them.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import readers
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tulle.compression.recipe import recipes_folder
from tulle.format.spec import LinearSpec, QuantizationConfig
from tulle.models.description import describe, families

TEXT = ["Once upon a time there was a fox.", "敏捷的棕色狐狸", "Grüße aus Köln"]
SMALL = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 24, "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}  # fmt: skip


# The engine ----------------------------------------------------------------------------------------------------

LAYOUTS, KINDS = range(6), range(5)


def native() -> Iterator[bytes]:
    """The order of the bytes is that in which fuzz/engine.cpp reads them."""
    for layout, kind in itertools.product(LAYOUTS, KINDS):
        for cut, extra, density, given in ((4, 0, 2, 0), (9, 4, 3, 80), (6, 42, 1, 25), (63, 13, 4, 160)):
            linear = bytes([layout, kind, cut, extra, density, given])
            sizes = bytes([kind, layout, 3, 4, 0, 1, 1, 3, 40])
            yield b"\0" + sizes + bytes([cut & 31, extra & 127, 0]) + (b"\x08" + linear) * 5 + b"\x02\x01\x02"
            fused = (b"\x0c" + linear) * 5  # as one linear
            yield b"\0" + sizes + bytes([64, extra & 119, 2]) + fused
    linear = bytes([0, 2, 4, 4, 2, 0])
    for transform, shared in itertools.product(range(5), range(2)):
        group = bytes([10, transform, shared]) + linear
        yield b"\0\x01\x03\x04\x00\x01\x01\x03\x28\x00\x08" + bytes([transform, shared, 0]) + group * 5
    for flags, kinds in itertools.product(range(128), (0, 0x55, 0xFF)):
        yield bytes([5, 1, flags, 1, 4, 2, 3, 5, 1, 9, flags % 3, 3, kinds, 3, 1, 2])
    for width, density in itertools.product(range(3), range(5)):
        yield bytes([7, width, 1, 37, 1, density])


# Readers ----------------------------------------------------------------------------------------------------------


def _json(content: Any) -> bytes:
    return json.dumps(content).encode()


def _header(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> dict[str, Any]:
    sizes = {"F32": 4, "F16": 2, "BF16": 2, "I32": 4, "I64": 8, "U8": 1, "I8": 1, "F8_E4M3": 1, "F64": 8}
    found, end = {}, 0
    for name, (kind, shape) in tensors.items():
        size = int(np.prod(shape)) * sizes[kind]
        found[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    return found


def _with_data(header: dict[str, Any]) -> bytes:
    text = _json(header)
    return len(text).to_bytes(8, "little") + text + bytes(readers.data_end(header))


def configs() -> Iterator[dict[str, Any]]:
    for family in families():
        if family in CONFIG_MAPPING:
            yield CONFIG_MAPPING[family](**SMALL).to_dict()
    for scaling in (
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "truncate": False},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 32},
        {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
         "original_max_position_embeddings": 32},
    ):  # fmt: skip
        yield {"model_type": "llama", **SMALL, "rope_theta": 1e4, "rope_scaling": scaling}


def _dense(config: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    model = describe(config)
    shapes = model.outer_tensors() | {layer.prefix + k: s for layer in model.layers for k, s in layer.tensors().items()}
    return {name: ("F32", shape) for name, shape in shapes.items()}


def folders() -> Iterator[dict[str, Any]]:
    config = {"model_type": "llama", **SMALL}
    dense = _dense(config)
    one = "model.safetensors"
    yield {"config.json": config, one: _header(dense)}
    half = list(dense)[: len(dense) // 2]
    parts = {"a.safetensors": half, "b.safetensors": [n for n in dense if n not in half]}
    index = {"weight_map": {name: file for file, names in parts.items() for name in names}}
    shards = {file: _header({n: dense[n] for n in names}) for file, names in parts.items()}
    yield {"config.json": config, "model.safetensors.index.json": index, **shards}
    base = {name.removeprefix("model."): entry for name, entry in dense.items() if name.startswith("model.")}
    yield {"config.json": config | {"tie_word_embeddings": True}, one: _header(base)}
    spec = LinearSpec(shape=(16, 16), bits=4, group_size=8)
    name = "model.layers.0.self_attn.q_proj"
    rest = {n: e for n, e in dense.items() if n != f"{name}.weight"}
    kinds = {"uint8": "U8", "bfloat16": "BF16"}
    stored = {f"{name}.{suffix}": (kinds[kind], shape) for suffix, (kind, shape) in spec.stored_tensors().items()}
    settings = QuantizationConfig({name: spec}).to_json()
    yield {"config.json": config | {"quantization_config": settings}, one: _header(rest | stored)}
    outer = {n: e for n, e in dense.items() if "_proj" not in n}
    linears = {n.removesuffix(".weight"): e[1] for n, e in dense.items() if "_proj" in n}
    for method in (
        {"quant_method": "gptq", "bits": 4, "group_size": 8, "desc_act": False, "sym": True},
        {"quant_method": "awq", "bits": 4, "group_size": 8, "zero_point": True, "version": "gemm"},
    ):
        packed: dict[str, tuple[str, tuple[int, ...]]] = {}
        for linear, (rows, columns) in linears.items():
            awq = method["quant_method"] == "awq"
            packed[f"{linear}.qweight"] = ("I32", (columns, rows // 8) if awq else (columns // 8, rows))
            packed[f"{linear}.qzeros"] = ("I32", (columns // 8, rows // 8))
            packed[f"{linear}.scales"] = ("F16", (columns // 8, rows))
            if not awq:
                packed[f"{linear}.g_idx"] = ("I32", (columns,))
        yield {"config.json": config | {"quantization_config": method}, one: _header(outer | packed)}
        yield {"config.json": config, "quantize_config.json": method, one: _header(outer | packed)}
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 8, "symmetric": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    settings = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}
    packed = {}
    for linear, (rows, columns) in linears.items():
        packed[f"{linear}.weight_packed"] = ("I32", (rows, columns // 8))
        packed[f"{linear}.weight_scale"] = ("BF16", (rows, columns // 8))
        packed[f"{linear}.weight_shape"] = ("I64", (2,))
    yield {
        "config.json": config | {"quantization_config": settings | {"ignore": ["lm_head"]}},
        one: _header(outer | packed),
    }
    packed = {}
    for linear, (rows, columns) in linears.items():
        packed[f"{linear}.weight"] = ("F8_E4M3", (rows, columns))
        packed[f"{linear}.weight_scale_inv"] = ("F32", (1, 1))
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    yield {"config.json": config | {"quantization_config": settings}, one: _header(outer | packed)}
    adapter = {f"base_model.model.{name}.lora_A.weight": ("F32", (2, 16))}
    adapter |= {f"base_model.model.{name}.lora_B.weight": ("F32", (16, 2))}
    lora = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "x", "target_modules": ["q_proj"]}
    yield {"adapter_config.json": lora, "adapter_model.safetensors": _header(adapter)}


def quantizations() -> Iterator[dict[str, Any]]:
    from tulle.format.spec import AttentionSpec, HeadSpec, InputSparsitySpec

    for spec in (
        LinearSpec(shape=(16, 16), bits=4, group_size=8, symmetric=False),
        LinearSpec(shape=(16, 16), bits=3, input_bits=8),
        LinearSpec(shape=(16, 16), bits=8, sparse=True, nonzeros=0),
        LinearSpec(shape=(16, 16), sparse=True, nonzeros=0, values_dtype="bfloat16", pattern="2:4"),
        LinearSpec(shape=(16, 16), bits=4, input_sparsity=InputSparsitySpec("top_k", keep=8, weighted=True)),
    ):
        yield QuantizationConfig({"a": spec}, {"steps": []}, AttentionSpec(HeadSpec(8), HeadSpec(4), None)).to_json()


def tokenizers() -> Iterator[dict[str, Any]]:
    byte_level = Tokenizer(models.BPE())
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    byte_level.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=60, special_tokens=["<s>"]))
    byte_level.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    spaces = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    spaces.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    spaces.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    spaces.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>", "<s>", "</s>"]))
    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer, unigram.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    unigram.train_from_iterator(
        TEXT, trainers.UnigramTrainer(vocab_size=60, special_tokens=["<unk>"], unk_token="<unk>")
    )
    words = Tokenizer(models.WordPiece({"[UNK]": 0, "once": 1, "##s": 2}, unk_token="[UNK]"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    token = {"content": "<s>", "special": True, "lstrip": False, "rstrip": False, "single_word": False}
    for kind, tokenizer in (
        ("GPT2Tokenizer", byte_level), ("Qwen2Tokenizer", byte_level), ("LlamaTokenizerFast", spaces),
        ("GemmaTokenizer", spaces), ("PreTrainedTokenizerFast", unigram), ("BertTokenizer", words),
    ):  # fmt: skip
        content = json.loads(tokenizer.to_str())
        settings = {"tokenizer_class": kind, "bos_token": "<s>", "eos_token": token, "add_bos_token": True}
        files = {"tokenizer.json": content, "config.json": {"model_type": "llama", "eos_token_id": [2, 3]}}
        yield files | {
            "tokenizer_config.json": settings
            | {
                "added_tokens_decoder": {"0": token},
                "chat_template": [{"name": "default", "template": "{{ messages }}"}],
            }
        }
        yield files | {
            "tokenizer_config.json": settings
            | {"additional_special_tokens": ["<x>"], "clean_up_tokenization_spaces": True},
            "special_tokens_map.json": {"bos_token": token, "extra_special_tokens": {"image_token": "<i>"}},
            "added_tokens.json": {"<y>": 61},
            "generation_config.json": {"eos_token_id": 2},
        }
    model = json.loads(byte_level.to_str())["model"]
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    yield {"vocab.json": model["vocab"], "merges.txt": merges, "tokenizer_config.json": {}}


def templates() -> Iterator[bytes]:
    yield b"{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    yield b"{%- set ns = namespace(x=1) -%}{% generation %}{{ tools | tojson(indent=2) }}{% endgeneration %}"
    yield b"{{ raise_exception('no') }}{{ strftime_now('%d') }}{% macro f(a) %}{{ a[1:] }}{% endmacro %}{{ f('b') }}"


def sentence_pieces() -> Iterator[bytes]:
    def field(number: int, value: bytes | int) -> bytes:
        if isinstance(value, int):
            return (
                bytes([number << 3 & 127 | 128 * (number > 15)])
                + (bytes([number >> 4]) if number > 15 else b"")
                + bytes([value])
            )
        return bytes([number << 3 | 2, len(value)]) + value

    def piece(text: str, score: float, kind: int) -> bytes:
        inner = field(1, text.encode()) + b"\x15" + np.float32(score).tobytes() + field(3, kind)
        return field(1, inner)

    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), ("<0x41>", 0.0, 6), ("\u2581", -1.0, 1)]
    pieces += [("a", -2.0, 1), ("b", -3.0, 1), ("ab", -4.0, 1), ("\u2581ab", -5.0, 1), ("<x>", 0.0, 4)]
    body = b"".join(piece(*of) for of in pieces)
    for kind in (1, 2):
        yield body + field(2, field(3, kind) + field(35, 1)) + field(3, field(3, 1))


def gguf_files() -> Iterator[dict[str, Any]]:
    tokens = ["<unk>", "<s>", "</s>", "<0x41>", "▁", "a", "b", "ab", "▁ab", "c"]
    sizes = {"context_length": 64, "embedding_length": 32, "feed_forward_length": 32, "block_count": 1}
    sizes |= {"attention.head_count": 2, "attention.head_count_kv": 1, "attention.layer_norm_rms_epsilon": 1e-5}
    sizes |= {"rope.freq_base": 10000.0, "rope.dimension_count": 16}
    tables = {
        "llama": {"tokens": tokens, "scores": [-float(i) for i in range(10)], "token_type": [2, 3, 3, 6] + [1] * 6},
        "gpt2": {"tokens": tokens, "merges": ["a b"], "pre": "gpt-2", "token_type": [1] * 10},
    }
    linears = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    linears |= {"ffn_gate": (32, 32), "ffn_up": (32, 32), "ffn_down": (32, 32)}
    kinds = [kind for kind, (block, _) in GGML_QUANT_SIZES.items() if 32 % block == 0]
    for number, kind in enumerate(kinds):
        architecture, model = ("llama", "qwen2", "qwen3")[number % 3], ("llama", "gpt2")[number % 2]
        metadata: dict[str, Any] = {"general.architecture": architecture, "tokenizer.ggml.model": model}
        metadata |= {f"{architecture}.{key}": value for key, value in sizes.items()}
        metadata |= {f"tokenizer.ggml.{key}": value for key, value in tables[model].items()}
        metadata |= {
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.chat_template": "{{ x }}",
        }
        if number % 4 == 3:
            metadata |= {f"{architecture}.rope.scaling.type": "yarn", f"{architecture}.rope.scaling.factor": 4.0}
        tensors: dict[str, Any] = {"token_embd.weight": [1, [10, 32]], "output.weight": [0, [10, 32]]}
        tensors |= {
            "output_norm.weight": [0, [32]],
            "blk.0.attn_norm.weight": [0, [32]],
            "blk.0.ffn_norm.weight": [0, [32]],
        }
        tensors |= {f"blk.0.{name}.weight": [int(kind), list(shape)] for name, shape in linears.items()}
        if number % 4 == 1:
            tensors["rope_freqs.weight"] = [int(GGMLQuantizationType.F32), [8]]
        yield {"metadata": metadata, "tensors": tensors}


def requests() -> Iterator[dict[str, Any]]:
    """A body of every route, with its less usual fields."""
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    function = {"name": "weather", "description": "Tells.", "parameters": schema}
    called = {"name": "weather", "arguments": '{"city": "Ulm"}'}
    user = {"role": "user", "content": "Weather in Ulm?"}
    settings = {"model": "m", "temperature": 0.7, "top_p": 0.9, "seed": 3, "stop": ["\n"], "logit_bias": {"5": -1.5}}
    yield settings | {
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
            user,
            {"role": "assistant", "tool_calls": [{"id": "c1", "type": "function", "function": called}]},
            {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        ],
        "tools": [{"type": "function", "function": function}],
        "tool_choice": {"type": "function", "function": {"name": "weather"}},
        "logprobs": True, "top_logprobs": 2, "n": 2, "stream": True, "stream_options": {"include_usage": True},
        "chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "low",
    }  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "pet", "schema": schema}}
    yield {"messages": [user], "response_format": form, "max_tokens": 5, "dry_sequence_breakers": ["\n"]}
    yield {"prompt": ["a", "b"], "max_tokens": 3, "best_of": 3, "echo": True, "logprobs": 2, "regex": "[a-z]+"}
    yield {"prompt": [[1, 2], [3]], "grammar": 'root ::= "x"', "timeout": 3.5}
    yield {"input": ["a", "b"], "encoding_format": "base64", "pooling": "last", "normalize": False}
    yield {"prompt": "a", "continuations": ["b", [1, 2]]}
    yield {"content": "a", "with_pieces": True}
    yield {"tokens": [1, 2, 3], "keep_special": True}
    yield {
        "input": [
            {"type": "message", **user},
            {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
            {"type": "function_call", "call_id": "c1", **called},
            {"type": "function_call_output", "call_id": "c1", "output": "rain"},
        ],
        "instructions": "Be brief.", "tools": [{"type": "function", **function}], "tool_choice": "required",
        "text": {"format": {"type": "json_schema", "name": "pet", "schema": schema}}, "metadata": {"a": "b"},
        "reasoning": {"effort": "low"}, "include": ["message.output_text.logprobs"], "store": False,
    }  # fmt: skip
    yield {
        "max_tokens": 5, "system": [{"type": "text", "text": "Be brief."}],
        "messages": [
            user,
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": ""},
                {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Ulm"}},
            ]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "rain"}]},
            ]},
        ],
        "tools": [{"name": "weather", "input_schema": schema}], "tool_choice": {"type": "any"},
        "thinking": {"type": "enabled", "budget_tokens": 99}, "stop_sequences": ["x"],
        "output_config": {"format": {"type": "json_schema", "schema": schema}, "effort": "low"},
    }  # fmt: skip
    yield {"messages": [user], "system": "Be brief.", "thinking": {"type": "disabled"}}


def seeds() -> dict[str, list[bytes]]:
    """By the name of the target."""
    config = {"model_type": "llama", **SMALL}
    return {
        "native": list(native()),
        "safetensors": [
            _with_data(_header(_dense(config))),
            _with_data(_header({"a": ("BF16", (2, 3)), "b": ("F8_E4M3", (0,))})),
        ],
        "folder": [_json(content) for content in folders()],
        "config": [_json(content) for content in configs()],
        "packed": [_json(content) for content in quantizations()],
        "tokenizer": [_json(content) for content in tokenizers()],
        "template": list(templates()),
        "sentencepiece": list(sentence_pieces()),
        "gguf": [readers.gguf_bytes(content) for content in gguf_files()],
        "gguf-metadata": [_json(content) for content in gguf_files()],
        "request": [_json(content) for content in requests()],
        "recipe": [file.read_bytes() for file in sorted(recipes_folder().glob("*.yaml"))],
    }


def write(folder: Path) -> None:
    for name, inputs in seeds().items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number, content in enumerate(inputs):
            (folder / name / f"seed-{number:03}").write_bytes(content)
