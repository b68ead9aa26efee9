"""Reading a ``config.json``: every key is either read or known to change nothing, or it is refused by name."""

from __future__ import annotations

import contextlib
import difflib
import math
from collections.abc import Mapping
from typing import Any

from tulle.errors import UserError

TOKENS = "token ids: what the tokenizer and generation use, not the decoder"
STORAGE = "how the file is stored or was made"
TRAINING = "matters only in training"
GENERATION = "a default of generation, moved to generation_config.json since"
TASK = "for heads of other tasks, which a language model does not have"
OUTPUT = "what transformers returns besides the logits"

DEEPEST, LARGEST = 10_000, 1 << 40
"""Layers that a config may ask for, each of which takes memory before any tensor is looked for; other sizes."""

HARMLESS: dict[str, str] = {
    "model_type": "read by describe",
    "bos_token_id": TOKENS,
    "eos_token_id": TOKENS,
    "pad_token_id": TOKENS,
    "unk_token_id": TOKENS,
    "sep_token_id": TOKENS,
    "cls_token_id": TOKENS,
    "mask_token_id": TOKENS,
    "decoder_start_token_id": TOKENS,
    "eod_token_id": TOKENS,
    "tokenizer_class": TOKENS,
    "dtype": STORAGE,
    "torch_dtype": STORAGE,
    "_name_or_path": STORAGE,
    "name_or_path": STORAGE,
    "_model_name_or_path": STORAGE,
    "model_name": STORAGE,
    "_attn_implementation_internal": "which kernel computes the attention, not what",
    "_commit_hash": STORAGE,
    "architectures": STORAGE,
    "transformers_version": STORAGE,
    "transformers.js_config": STORAGE,
    "unsloth_version": STORAGE,
    "unsloth_fixed": STORAGE,
    "unsloth_training_args": STORAGE,
    "is_llama_config": "a mark of nanotron's converter",
    "auto_map": "remote code, which is never run",
    "quantization_config": "how the linears are packed, which the readers of packed weights check",
    "attn_implementation": "which kernel computes the attention, not what",
    "_attn_implementation": "which kernel computes the attention, not what",
    "_attn_implementation_autoset": "which kernel computes the attention, not what",
    "_flash_attn_2_enabled": "which kernel computes the attention, not what",
    "experts_implementation": "which kernel computes experts, not what",
    "use_cache": "a cache changes the speed, not the result",
    "cache_implementation": "a cache changes the speed, not the result",
    "pretraining_tp": "splits products into parts; not read since transformers 5",
    "initializer_range": TRAINING,
    "attention_dropout": TRAINING,
    "hidden_dropout": TRAINING,
    "resid_pdrop": TRAINING,
    "embd_pdrop": TRAINING,
    "router_aux_loss_coef": TRAINING,
    "gradient_checkpointing": TRAINING,
    "use_bfloat16": TRAINING,
    "max_sequence_length": "said by old Llama 2 files besides max_position_embeddings; never read",
    "model_max_length": "for the tokenizer",
    "chunk_size_feed_forward": "splits the work of encoders; these decoders do not read it",
    "torchscript": STORAGE,
    "tf_legacy_loss": TRAINING,
    "output_attentions": OUTPUT,
    "output_router_logits": OUTPUT,
    "output_hidden_states": OUTPUT,
    "output_scores": OUTPUT,
    "return_dict": OUTPUT,
    "return_dict_in_generate": OUTPUT,
    "finetuning_task": TASK,
    "classifier_dropout": TASK,
    "id2label": TASK,
    "label2id": TASK,
    "num_labels": TASK,
    "problem_type": TASK,
    "task_specific_params": TASK,
    "prefix": GENERATION,
    "max_length": GENERATION,
    "min_length": GENERATION,
    "max_new_tokens": GENERATION,
    "do_sample": GENERATION,
    "early_stopping": GENERATION,
    "num_beams": GENERATION,
    "num_beam_groups": GENERATION,
    "diversity_penalty": GENERATION,
    "temperature": GENERATION,
    "top_k": GENERATION,
    "top_p": GENERATION,
    "typical_p": GENERATION,
    "repetition_penalty": GENERATION,
    "length_penalty": GENERATION,
    "no_repeat_ngram_size": GENERATION,
    "encoder_no_repeat_ngram_size": GENERATION,
    "bad_words_ids": GENERATION,
    "num_return_sequences": GENERATION,
    "forced_bos_token_id": GENERATION,
    "forced_eos_token_id": GENERATION,
    "remove_invalid_values": GENERATION,
    "exponential_decay_length_penalty": GENERATION,
    "suppress_tokens": GENERATION,
    "begin_suppress_tokens": GENERATION,
}
"""Keys that never change what these decoders compute, whatever their value, and why."""

HARMLESS_WHEN: dict[str, tuple[tuple[Any, ...], str]] = {
    "is_encoder_decoder": ((False,), "true: another kind of model"),
    "is_decoder": ((False, True), "every model here is one"),
    "add_cross_attention": ((False,), "true: another kind of model"),
    "cross_attention_hidden_size": ((None,), "another kind of model"),
    "tie_encoder_decoder": ((False,), "true: another kind of model"),
    "pruned_heads": (({}, None), "otherwise heads are missing"),
    "rope_interleaved": ((False,), "true: neighbouring channels are rotated together"),
    "use_mrope": ((False,), "true: positions of pictures"),
    "use_qk_norm": ((False,), "true: norms of queries and keys"),
    "per_layer_config": ((None, {}), "otherwise layers differ"),
    "sliding_window": ((None,), "a number: attention that sees less than all, which the family does not have"),
    "use_sliding_window": ((False,), "true: attention that sees less than all, which the family does not have"),
    "layer_types": ((None,), "otherwise layers differ"),
}
"""Keys that change nothing with these values, and what another value would mean."""


class ConfigKeys:
    """A config's values by key. What has been read is remembered; ``finish`` refuses the rest."""

    def __init__(self, config: Mapping[str, Any]):
        self.config = config
        self.family = str(config.get("model_type"))
        self._read: set[str] = set()

    def raw(self, key: str, default: Any = None) -> Any:
        """The value as it is; ``default`` only where the key is missing."""
        self._read.add(key)
        return self.config.get(key, default)

    def size(self, key: str, default: int | None, null: int | None = None) -> int:
        """A positive whole number; ``null`` is what a null means, where that is allowed."""
        value = self.raw(key, default)
        value = null if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.refused(key, "a positive whole number", value)
        most = DEEPEST if key == "num_hidden_layers" else LARGEST
        if value > most:
            raise self.refused(key, f"a number up to {most}", value)
        return value

    def size_or_none(self, key: str, default: int | None) -> int | None:
        """A positive whole number or null."""
        return None if self.raw(key, default) is None else self.size(key, default)

    def flag(self, key: str, default: bool) -> bool:
        value = self.raw(key, default)
        if not isinstance(value, bool):
            raise self.refused(key, "true or false", value)
        return value

    def number(self, key: str, default: float) -> float:
        """A positive finite number."""
        return positive(self.raw(key, default), key)

    def choice(self, key: str, default: str, known: Mapping[str, str]) -> str:
        """What ``known`` says of a word."""
        value = self.raw(key, default)
        if not isinstance(value, str) or value not in known:
            raise self.refused(key, f"one of {', '.join(known)}", value)
        return known[value]

    def only(self, key: str, *values: Any) -> None:
        """Refuses a key with a value other than these."""
        if key in self.config and not any(same(self.raw(key), value) for value in values):
            wanted = " or ".join(_json(value) for value in values)
            raise self.refused(key, wanted, self.config[key])

    def refused(self, key: str, expected: str, value: Any) -> UserError:
        return UserError(
            f"expected {expected} for {key} in a {self.family} config.json, found {value!r}; repair the config"
        )

    def finish(self) -> None:
        """Raises ``UserError`` for keys that nothing has read and that are not known to be harmless."""
        for key, value in self.config.items():
            if key in self._read or key in HARMLESS:
                continue
            values, why = HARMLESS_WHEN.get(key, ((), ""))
            if any(same(value, v) for v in values):
                continue
            if values:
                raise self.refused(key, f"{' or '.join(map(_json, values))} ({why})", value)
            near = difflib.get_close_matches(key, self._read, n=1)
            hint = f"did you mean {near[0]}?" if near else "remove it if it changes nothing, else the family needs it"
            raise UserError(
                f"expected config keys that tulle knows for {self.family}, found {key!r} ({_json(value)[:40]}); {hint}"
            )


def positive(value: Any, key: str) -> float:
    """A positive finite number as float."""
    number = float("nan")
    if isinstance(value, int | float) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # a whole number of hundreds of digits
            number = float(value)
    if not math.isfinite(number) or number <= 0:
        raise UserError(f"expected a positive number for {key} in config.json, found {value!r}; repair the config")
    return number


def same(a: Any, b: Any) -> bool:
    """Equal, true and 1 being two things."""
    return type(a) is type(b) and bool(a == b)


def _json(value: Any) -> str:
    return {True: "true", False: "false", None: "null"}.get(value, repr(value)) if _plain(value) else repr(value)


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, bool)
