"""Export to the compressed-tensors format, which transformers (with that library) and vLLM read.

Weight-only linears of 4 and 8 bits become ``pack-quantized`` (int32 words), 8-bit weights with quantised inputs
``int-quantized`` (int8), both written with an explicit ``format`` in their config group: left to guess, the library
stores 4-bit weights with quantised inputs as int8. Sparse quantised linears are written dense, a pruned weight as the
code that means zero; ``sparsity_config`` stays empty, since the library no longer reads sparse formats.

Readers quantise inputs by the library's rule, s = max|x|/127.5 and codes in [−128, 127], where ours is max|x|/127
and ±127: the logits of such a model differ from ours by the rounding of its inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import ceil
from typing import Any

import torch
from torch import Tensor

from tulle.errors import UserError
from tulle.export.folder import Entry
from tulle.export.plan import InputRule, Plan, linear_entry, unpacked_entries
from tulle.format.spec import LinearSpec
from tulle.hf.packed_linear import unpack_integer_weight
from tulle.models.checkpoint import Checkpoint

Scheme = tuple[int, int | None, bool, int | None]
"""bits, group size, symmetric, input bits"""


def plan(checkpoint: Checkpoint, linears: Mapping[str, LinearSpec], dtype: torch.dtype | None) -> Plan:
    """Raises ``UserError`` when the library is missing or a linear has no counterpart in the format."""
    try:
        import compressed_tensors
    except ImportError:
        raise UserError(
            "expected the package compressed-tensors, found none; pip install compressed-tensors or use --to dense"
        ) from None
    quantised = {name: spec for name, spec in linears.items() if _is_quantised(name, spec)}
    if not quantised:
        raise UserError("expected quantised linears for --to compressed-tensors, found none; use --to dense")
    if checkpoint.config["quantization_config"].get("attention") is not None:
        raise UserError(
            "expected keys and values as they are for --to compressed-tensors, found them quantised; use --to dense"
        )
    entries = unpacked_entries(checkpoint, quantised, dtype)
    for name, spec in quantised.items():
        entries += _linear_entries(checkpoint, name, spec)
    config = dict(checkpoint.config)
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
    config["quantization_config"] = {
        **quantization_config(checkpoint, quantised),
        "version": compressed_tensors.__version__,
    }
    notes = []
    if any(spec.sparse for spec in quantised.values()):
        notes.append("pruned weights are stored as codes of zero: the format has no masks")
    if any(spec.input_sparsity for spec in linears.values()):
        notes.append("the format cannot say which inputs a token keeps: all of them are read in the export")
    rule: InputRule = "none"
    if any(spec.input_bits for spec in quantised.values()):
        rule = "compressed-tensors"
        notes.append("readers quantise inputs in steps of max|x|/127.5, tulle in steps of max|x|/127")
    words = any(not spec.symmetric and _format(*_scheme(spec)) == "pack-quantized" for spec in quantised.values())
    return Plan(entries, config, torch.float32, dtype, rule, words, notes)


def quantization_config(checkpoint: Checkpoint, quantised: Mapping[str, LinearSpec]) -> dict[str, Any]:
    """``quantization_config``: one group per scheme, each with its format; everything else ignored by name."""
    groups: dict[Scheme, list[str]] = {}
    for name, spec in quantised.items():
        groups.setdefault(_scheme(spec), []).append(name)
    model = checkpoint.describe()
    linears = [name for layer in model.layers for name in model.linear_names(layer.index)]
    head = model.head.removesuffix(".weight")
    formats = {_format(*scheme) for scheme in groups}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": _group(scheme, ["Linear"] if len(groups) == 1 else names)
            for i, (scheme, names) in enumerate(groups.items())
        },
        "ignore": [head] + [name for name in linears if name not in quantised],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
    }


def _is_quantised(name: str, spec: LinearSpec) -> bool:
    what = None
    if spec.transform:
        what = "transforms of inputs"
    elif spec.input_bits is not None and (spec.input_bits, spec.input_symmetric, spec.input_clip) != (8, True, 1):
        what = "inputs other than 8-bit, symmetric and unclipped"
    if what:
        raise UserError(f"expected no {what} for --to compressed-tensors, found them in {name}; use --to dense")
    if spec.bits in (4, 8):
        return True
    if spec.bits is not None:
        raise UserError(
            f"expected 4 or 8 bits for --to compressed-tensors, found {spec.bits} in {name}; use --to dense"
        )
    if spec.sparse or spec.input_bits is not None:
        what = "sparse unquantised weights" if spec.sparse else "quantised inputs without quantised weights"
        raise UserError(
            f"expected quantised weights for --to compressed-tensors, found {what} in {name}; use --to dense"
        )
    return False


def _scheme(spec: LinearSpec) -> Scheme:
    return spec.bits or 0, spec.group_size, spec.symmetric, spec.input_bits


def _format(bits: int, group_size: int | None, symmetric: bool, input_bits: int | None) -> str:
    return "int-quantized" if bits == 8 and input_bits is not None else "pack-quantized"


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    bits, group_size, symmetric, input_bits = scheme
    inputs = None
    if input_bits is not None:
        inputs = _arguments(input_bits, True, "token", None, dynamic=True)
    strategy = "channel" if group_size is None else "group"
    return {
        "targets": targets,
        "weights": _arguments(bits, symmetric, strategy, group_size, dynamic=False),
        "input_activations": inputs,
        "output_activations": None,
        "format": _format(*scheme),
    }


def _arguments(bits: int, symmetric: bool, strategy: str, group_size: int | None, dynamic: bool) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": strategy,
        "group_size": group_size,
        "dynamic": dynamic,
        "actorder": None,
        "block_structure": None,
        "observer": None if dynamic else "minmax",
        "observer_kwargs": {},
    }


def _linear_entries(checkpoint: Checkpoint, name: str, spec: LinearSpec) -> list[Entry]:
    bits, rows, columns = spec.bits or 0, spec.shape[0], spec.shape[1]
    entry = partial(linear_entry, checkpoint, name, spec)
    groups = (rows, spec.groups)
    entries = [entry("weight_scale", torch.bfloat16, groups, lambda spec, t: t["scale"], ("scale",))]
    if _format(*_scheme(spec)) == "int-quantized":
        entries.append(entry("weight", torch.int8, spec.shape, _signed_codes))
        if not spec.symmetric:
            entries.append(entry("weight_zero_point", torch.int8, groups, _signed_zero, ("zero_point",)))
        return entries
    words = (rows, ceil(columns * bits / 32))
    entries.append(entry("weight_packed", torch.int32, words, _packed_codes))
    entries.append(entry("weight_shape", torch.int64, (2,), lambda spec, t: torch.tensor(spec.shape), ()))
    if not spec.symmetric:
        words = (ceil(rows * bits / 32), spec.groups)
        entries.append(entry("weight_zero_point", torch.int32, words, _packed_zero, ("zero_point",)))
    return entries


def _packed_codes(spec: LinearSpec, tensors: Mapping[str, Tensor]) -> Tensor:
    from compressed_tensors.compressors import pack_to_int32

    return pack_to_int32(_signed_codes(spec, tensors), spec.bits)


def _packed_zero(spec: LinearSpec, tensors: Mapping[str, Tensor]) -> Tensor:
    from compressed_tensors.compressors import pack_to_int32

    return pack_to_int32(_signed_zero(spec, tensors), spec.bits, packed_dim=0)


def _signed_codes(spec: LinearSpec, tensors: Mapping[str, Tensor]) -> Tensor:
    """int8 ``[C_out, C_in]``: u − 2^(b−1), and at pruned positions the code of zero."""
    whole = unpack_integer_weight(spec, tensors)
    if not spec.symmetric:
        whole = whole + _signed_zero(spec, tensors).short().repeat_interleave(spec.shape[1] // spec.groups, 1)
    return whole.to(torch.int8)


def _signed_zero(spec: LinearSpec, tensors: Mapping[str, Tensor]) -> Tensor:
    """int8 ``[C_out, G]``: z − 2^(b−1)."""
    return (tensors["zero_point"].short() - (1 << ((spec.bits or 0) - 1))).to(torch.int8)
