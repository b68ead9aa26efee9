"""The check of an export: loaded by plain transformers, does it compute what it should?

Two comparisons of float32 logits on fixed random tokens, both as a share of the largest logit. The first must be
rounding error only: the export against the packed model's weights with everything the format is known to change
(dtype of the weights, rule for quantised inputs). The second is what the user wants to know: the export against the
packed model itself.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tulle.errors import UserError
from tulle.export.plan import InputRule, Plan
from tulle.hf import load_checkpoint
from tulle.hf.attention import IMPLEMENTATION
from tulle.hf.packed_embedding import PackedEmbedding, TiedHead
from tulle.hf.packed_linear import PackedLinear
from tulle.models.checkpoint import Checkpoint

TOLERANCE = 1e-4
"""Two float32 runs of one model differ by about 1e-6 of the largest logit."""
INPUT_TOLERANCE = 1e-2
"""With quantised inputs a difference of 1e-7 can turn into a step of 1/127 where a value lies on an edge."""

LENGTH = 64
"""Tokens that logits are compared on, at most."""

LOADER = """
import sys
import numpy, torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

def logits(folder, tokens, made, mode):
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if mode == "dequantise" else {}
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **options
    )
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    wrong = {kind: sorted(map(str, info[kind])) for kind in kinds if info[kind]}
    if wrong:
        raise ValueError(f"tensors do not fit the model: {wrong}")
    if mode == "unpack":
        model.hf_quantizer.compressor.decompress_model(model)
        torch.nn.Module.float(model)
    with torch.no_grad():
        numpy.save(made, model.eval()(torch.from_numpy(numpy.load(tokens))).logits.numpy())
    if any(name.split(".")[0] == "tulle" for name in sys.modules):
        raise ImportError("tulle was imported")
"""


def check(source: Checkpoint, folder: Path, plan: Plan) -> dict[str, Any]:
    """``{"difference", "difference_from_packed"}`` of the export in ``folder``; ``UserError`` when it fails."""
    tokens = _tokens(source)
    if plan.four_bit_floats:
        plan.notes.append("readers unpack floats of 4 bits to bfloat16: load the export with dtype=torch.bfloat16")
        return compare(source, _plain_logits(folder, tokens, "unpack"), plan)
    try:
        found = _plain_logits(folder, tokens)
    except UserError:
        if not plan.asymmetric_words:
            raise
        found = _plain_logits(folder, tokens, "dequantise")
        # Dequantising on load computes in the dtype of the scales, and leaves inputs as they are.
        plan = replace(plan, weight_dtype=torch.bfloat16, input_rule="none")
        plan.notes.append(
            "the installed transformers reads asymmetric weights only when told to dequantise: "
            "from_pretrained(..., quantization_config=CompressedTensorsConfig(dequantize=True))"
        )
    return compare(source, found, plan)


def logits_of(model: Checkpoint, source: Checkpoint, most: int = LENGTH) -> np.ndarray:
    """float32 logits of a dense checkpoint, on the ``most`` tokens that ``source`` is compared on."""
    with torch.no_grad():
        loaded = load_checkpoint(model, torch.float32).eval()
        return np.asarray(loaded(torch.from_numpy(_tokens(source, most))).logits.numpy())


def compare(source: Checkpoint, found: np.ndarray, plan: Plan, most: int = LENGTH) -> dict[str, Any]:
    """``{"difference", "difference_from_packed"}`` of an export's logits; ``UserError`` when they are off."""
    packed, expected = _own_logits(source, _tokens(source, most), plan)
    scale = float(np.abs(expected).max())
    difference = float(np.abs(found - expected).max()) / scale
    tolerance = TOLERANCE if plan.input_rule == "none" else INPUT_TOLERANCE
    # Written so that NaN fails.
    if not difference <= tolerance:
        raise UserError(
            f"expected the export's logits within {tolerance:g} of ours, found {difference:.2g} of the largest logit; "
            "nothing was written, please report the recipe"
        )
    return {"difference": difference, "difference_from_packed": float(np.abs(found - packed).max()) / scale}


def _tokens(source: Checkpoint, most: int = LENGTH) -> np.ndarray:
    config = source.config
    length = min(most, config.get("max_position_embeddings", most))
    return np.random.default_rng(0).integers(0, config["vocab_size"], (2, length))


def _own_logits(source: Checkpoint, tokens: np.ndarray, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """Logits of the packed model, and those that the export should have."""
    model = load_checkpoint(source, torch.float32).eval()
    ids = torch.from_numpy(tokens)
    with torch.no_grad():
        packed = model(ids).logits
        if plan.other_dtype is not None:
            for parameter in model.parameters():
                parameter.copy_(parameter.to(plan.other_dtype))
        for name, module in list(model.named_modules()):
            if isinstance(module, PackedEmbedding):
                table = module.dequantise().to(plan.plain.get(name, plan.weight_dtype)).float()
                model.set_submodule(name, nn.Embedding.from_pretrained(table))
                if isinstance(model.get_output_embeddings(), TiedHead):
                    model.set_output_embeddings(_Table(table))
            if isinstance(module, PackedLinear):
                plain = name in plan.plain
                dtype = plan.plain[name] if plain else plan.weight_dtype
                model.set_submodule(name, _AsExported(module, dtype, "none" if plain else plan.input_rule))
        if model.config._attn_implementation == IMPLEMENTATION:
            model.set_attn_implementation("sdpa")
        expected = model(ids).logits
    return packed.numpy(), expected.numpy()


class _Table(nn.Module):
    """A head with the embedding's table."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class _AsExported(nn.Module):
    """A packed linear as readers of the export see it."""

    def __init__(self, linear: PackedLinear, dtype: torch.dtype, rule: InputRule):
        super().__init__()
        self.weight, self.bias = linear.effective().to(dtype).float(), linear.bias
        self.quantise = rule == "compressed-tensors" and linear.spec.input_bits is not None

    def forward(self, x: Tensor) -> Tensor:
        if self.quantise:
            step = x.abs().amax(-1, keepdim=True) / 127.5
            step = torch.where(step == 0, 1.0, step)
            x = (x / step).round().clamp(-128, 127) * step
        return F.linear(x, self.weight, self.bias)


def _plain_logits(folder: Path, tokens: np.ndarray, mode: str = "") -> np.ndarray:
    """float32 logits computed by a process that has transformers but not Tulle."""
    with tempfile.TemporaryDirectory() as scratch:
        given, made = Path(scratch) / "tokens.npy", Path(scratch) / "logits.npy"
        np.save(given, tokens)
        done = subprocess.run(
            [sys.executable, "-c", LOADER + "logits(*sys.argv[1:])", str(folder), str(given), str(made), mode],
            capture_output=True,
            text=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
        if done.returncode:
            line = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"expected transformers to load the export, found: {line}; upgrade transformers")
        return np.load(made)
