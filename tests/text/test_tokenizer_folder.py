"""Tokenizers of model folders: the same token ids and text as transformers' AutoTokenizer gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers_in_memory import SCRIPTS, byte_fallback, byte_level, metaspace, word_level, word_piece
from transformers import AutoTokenizer

from tulle.errors import UserError
from tulle.text.tokenizer_folder import read_tokenizer

TEXTS = [
    *SCRIPTS,
    "<s>Once</s> upon<|im_end|>\n<|im_end|> a time",
    " <think> é! leading and trailing ",
    "don't  I'LL 1234567 e\u0301",
    "[INST] <<SYS>>x<</SYS>> y [/INST]<extra>z<new> <mine>",
]


def write(folder: Path, name: str, content: Any) -> None:
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


def llama() -> Tokenizer:
    """As the files of Llama 2 say it: another pipeline than its class has."""
    tokenizer = byte_fallback()
    tokenizer.pre_tokenizer = None  # type: ignore[assignment]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def llama_3() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}{1,3}|\S+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def cut_and_filled() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=50, pad_token="<s>", pad_id=tokenizer.token_to_id("<s>"))
    return tokenizer


TOKEN = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    # name: (tokenizer, files)
    "Llama 2": (
        llama,
        {"config": {"model_type": "llama"}, "tokenizer_config": {"tokenizer_class": "LlamaTokenizer"} | NAMES},
    ),
    "Llama 2, legacy": (
        llama,
        {
            "config": {"model_type": "llama"},
            "tokenizer_config": {"tokenizer_class": "LlamaTokenizerFast", "legacy": True} | NAMES,
        },
    ),
    "Llama 2, no first space": (
        llama,
        {
            "config": {"model_type": "llama"},
            "tokenizer_config": {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False} | NAMES,
        },
    ),
    "Mistral of the same files": (
        llama,
        {"config": {"model_type": "mistral"}, "tokenizer_config": {"tokenizer_class": "LlamaTokenizer"} | NAMES},
    ),
    "a class in config.json": (llama, {"config": {"model_type": "llama", "tokenizer_class": "LlamaTokenizer"}}),
    "no class": (llama, {"config": {"model_type": "llama"}}),
    "Code Llama": (
        llama,
        {"config": {"model_type": "llama"}, "tokenizer_config": {"tokenizer_class": "CodeLlamaTokenizer"} | NAMES},
    ),
    "Gemma": (
        lambda: byte_fallback("never"),
        {"config": {"model_type": "gemma2"}, "tokenizer_config": {"tokenizer_class": "GemmaTokenizer"} | NAMES},
    ),
    "Llama 3": (
        llama_3,
        {
            "config": {"model_type": "llama"},
            "tokenizer_config": {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"},
        },
    ),
    "Llama 3 that calls itself Llama": (
        llama_3,
        {"config": {"model_type": "llama"}, "tokenizer_config": {"tokenizer_class": "LlamaTokenizer"} | NAMES},
    ),
    "Qwen 2": (byte_level, {"config": {"model_type": "qwen2"}, "tokenizer_config": {"eos_token": "<|im_end|>"}}),
    "Qwen 2 that calls itself fast": (
        byte_level,
        {
            "config": {"model_type": "qwen2"},
            "tokenizer_config": {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"},
        },
    ),
    "Qwen 3": (
        byte_level,
        {
            "config": {"model_type": "qwen3"},
            "tokenizer_config": {
                "tokenizer_class": "Qwen2Tokenizer",
                "bos_token": None,
                "eos_token": "<|im_end|>",
                "pad_token": "<s>",
                "additional_special_tokens": ["<extra>"],
            },
        },
    ),
    "Qwen 3.5": (byte_level, {"config": {"model_type": "qwen3_5_text"}, "tokenizer_config": {"eos_token": "</s>"}}),
    "GPT-2": (byte_level, {"config": {"model_type": "gpt2"}, "tokenizer_config": {"tokenizer_class": "GPT2Tokenizer"}}),
    "GPT-NeoX": (
        llama_3,
        {"config": {"model_type": "gpt_neox"}, "tokenizer_config": {"tokenizer_class": "GPTNeoXTokenizer"} | NAMES},
    ),
    "tokens with properties": (
        byte_level,
        {
            "tokenizer_config": {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": {"__type": "AddedToken", "content": "<s>"} | TOKEN,
                "eos_token": "<new>",
                "added_tokens_decoder": {
                    "320": {"content": "<s>"} | TOKEN,
                    "325": {"content": "<new>", "lstrip": True, "rstrip": True}
                    | {k: TOKEN[k] for k in ("single_word",)},
                    "326": {"content": "upon"} | TOKEN | {"single_word": True, "special": False},
                },
            }
        },
    ),
    "a Llama whose configuration lists tokens": (
        llama,
        {
            "config": {"model_type": "llama"},
            "tokenizer_config": {
                "tokenizer_class": "LlamaTokenizer",
                "added_tokens_decoder": {
                    str(i): {"content": c} | TOKEN for i, c in enumerate(["<s>", "</s>", "<new>"], 500)
                },
            }
            | NAMES,
        },
    ),
    "files of old": (
        byte_level,
        {
            "tokenizer_config": {"tokenizer_class": "PreTrainedTokenizerFast"},
            "special_tokens_map": {
                "bos_token": {"content": "<s>"} | {k: v for k, v in TOKEN.items() if k != "special"},
                "eos_token": "<new>",
                "additional_special_tokens": ["<extra>", "<|im_end|>"],
            },
            "added_tokens": {"<extra>": 325, "<mine>": 326},
        },
    ),
    "special tokens of its own": (
        byte_level,
        {
            "tokenizer_config": {
                "tokenizer_class": "TokenizersBackend",
                "image_token": "<extra>",
                "extra_special_tokens": {"eot_token": "<new>"},
            }
            | NAMES
        },
    ),
    "special tokens as text": (
        byte_level,
        {"tokenizer_config": {"tokenizer_class": "PreTrainedTokenizerFast", "split_special_tokens": True} | NAMES},
    ),
    "BOS that the post-processor does not add": (
        byte_level,
        {"tokenizer_config": {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True} | NAMES},
    ),
    "saved with truncation and padding": (cut_and_filled, {"tokenizer_config": NAMES}),
    "only tokenizer.json": (byte_level, {}),
    "Metaspace": (metaspace, {"tokenizer_config": {"tokenizer_class": "PreTrainedTokenizerFast"}}),
    "unigram, cleaned up": (
        lambda: metaspace(True),
        {"tokenizer_config": {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": True}},
    ),
    "WordPiece, cleaned up": (
        lambda: word_piece(False),
        {"tokenizer_config": {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": True}},
    ),
    "BPE is not cleaned up": (
        byte_level,
        {"tokenizer_config": {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": True}},
    ),
    "WordLevel": (word_level, {"tokenizer_config": {"tokenizer_class": "PreTrainedTokenizerFast"}}),
}


def assert_as_transformers(folder: Path) -> None:
    ours, theirs = read_tokenizer(folder), AutoTokenizer.from_pretrained(folder, local_files_only=True)
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs(text)["input_ids"], text
        assert ours.encode(text, special=False) == theirs(text, add_special_tokens=False)["input_ids"], text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, keep_special=True) == theirs.decode(ids)
    assert dict(ours.special) == theirs.special_tokens_map
    for name in ("bos_token", "eos_token", "pad_token"):
        assert ours.special_id(name) == getattr(theirs, f"{name}_id")


@pytest.mark.parametrize("name", CASES)
def test_ids_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    tokenizer, files = CASES[name]
    tokenizer().save(str(tmp_path / "tokenizer.json"))
    for file, content in ({"config": {}} | files).items():
        write(tmp_path, f"{file}.json", content)
    assert_as_transformers(tmp_path)


def test_vocabulary_and_merges(tmp_path: Path) -> None:
    byte_level().model.save(str(tmp_path))
    write(tmp_path, "config.json", {"model_type": "qwen2"})
    write(tmp_path, "tokenizer_config.json", {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>"})
    assert_as_transformers(tmp_path)


@pytest.mark.parametrize(
    ("generation", "config", "ends"),
    [
        ({"eos_token_id": [5, 7]}, {"eos_token_id": 9}, {5, 7}),
        ({"eos_token_id": 5}, {}, {5}),
        ({}, {"eos_token_id": [9, 8]}, {9, 8}),
        ({}, {}, set()),
    ],
)
def test_ends_of_texts(tmp_path: Path, generation: dict[str, Any], config: dict[str, Any], ends: set[int]) -> None:
    tokenizer = byte_level()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, "generation_config.json", generation)
    write(tmp_path, "config.json", config)
    assert read_tokenizer(tmp_path).end_tokens == ends
    write(tmp_path, "tokenizer_config.json", {"eos_token": {"content": "</s>"}, "eot_token": "<|im_end|>"})
    own = {tokenizer.token_to_id("</s>"), tokenizer.token_to_id("<|im_end|>")}
    assert read_tokenizer(tmp_path).end_tokens == ends | own


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", "{", "expected a tokenizer.json"),
        ("tokenizer_config.json", "{", "expected JSON in"),
        ("tokenizer_config.json", "[]", "expected a JSON object"),
        ("tokenizer_config.json", '{"chat_template": 3}', "chat_template"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"3": "x"}}', "added_tokens_decoder"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "x"}}}', "ids of added tokens"),
        ("special_tokens_map.json", "nonsense", "expected JSON in"),
        ("generation_config.json", "{", "expected JSON in"),
        ("chat_template.jinja", "\udcff", "expected a chat template"),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, file: str, content: str, message: str) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / file).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=message):
        read_tokenizer(tmp_path)


def test_a_folder_without_a_tokenizer_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected a tokenizer.json in .*save_pretrained"):
        read_tokenizer(tmp_path)
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(UserError, match="mistral-common"):
        read_tokenizer(tmp_path)


def test_an_unknown_part_of_the_pipeline_stays(tmp_path: Path) -> None:
    """A class that is not known here takes tokenizer.json as it is."""
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, "[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.CharDelimiterSplit("-"), decoders.Fuse()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, "tokenizer_config.json", {"tokenizer_class": "SomebodysTokenizer"})
    found = read_tokenizer(tmp_path)
    assert found.encode("a-b-c") == [0, 1, 2] and found.decode([0, 1]) == "ab"
