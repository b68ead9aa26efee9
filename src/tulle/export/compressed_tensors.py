"""Export to the compressed-tensors format, which transformers (with that library) and vLLM read.

Weight-only linears of 4 and 8 bits become ``pack-quantized`` (int32 words), 8-bit weights with quantised inputs
``int-quantized`` (int8), both written with an explicit ``format`` in their config group: left to guess, the library
stores 4-bit weights with quantised inputs as int8. Floats of 4 bits become ``mxfp4-pack-quantized`` and
``nvfp4-pack-quantized``: our bytes as they are, but that ``weight_global_scale`` divides where our scale of the tensor
multiplies. Sparse quantised linears are written dense, a pruned weight as the
code that means zero; ``sparsity_config`` stays empty, since the library no longer reads sparse formats.

**One scheme per fused group.** vLLM computes q, k, v (gate, up) as one linear and refuses a model that gives them
different schemes. Compression gives them one (``keep_sensitive: {siblings: true}``); a packed model that has several is
brought to one here, without loss where there is such a scheme: codes of fewer bits are also codes of more, a step per
output channel is also one per group, a symmetric grid has its zero point in the middle. Where one of a group is not
quantised at all, its siblings are written as plain weights, which a note says. Of NVFP4 they also need one scale of the
tensor: the largest, where the bytes of the others can be moved to it exactly.

Readers quantise inputs by the library's rule, s = max|x|/127.5 and codes in [−128, 127], where ours is max|x|/127
and ±127: the logits of such a model differ from ours by the rounding of its inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import ceil, gcd
from typing import Any, Literal

import torch
from torch import Tensor

from tulle.errors import UserError
from tulle.export.dense import stored_dtype
from tulle.export.folder import Entry
from tulle.export.plan import InputRule, Plan, linear_entry, unpacked_entries
from tulle.extras import needs
from tulle.format.spec import LinearSpec
from tulle.hf.packed_linear import dequantise, unpack_codes, unpack_integer_weight, unpack_zero
from tulle.models.checkpoint import Checkpoint
from tulle.models.description import Decoder

Scheme = tuple[int, int | None, bool, int | None, str]
"""bits, group size, symmetric, input bits, format of the codes"""


def plan(checkpoint: Checkpoint, linears: Mapping[str, LinearSpec], dtype: torch.dtype | None) -> Plan:
    """Raises ``UserError`` when the library is missing or a linear has no counterpart in the format."""
    needs("export", "--to compressed-tensors", "use --to dense")
    import compressed_tensors

    model = checkpoint.describe()
    # Readers of the format know no quantised embedding beside a tied head: tables are written as plain weights.
    tables = {name: spec for name, spec in linears.items() if f"{name}.weight" in (model.embedding, model.head)}
    blocks = {name: spec for name, spec in linears.items() if name not in tables}
    quantised = {name: spec for name, spec in blocks.items() if _is_quantised(name, spec)}
    if not quantised:
        raise UserError("expected quantised linears for --to compressed-tensors, found none; use --to dense")
    if checkpoint.config["quantization_config"].get("attention") is not None:
        raise UserError(
            "expected keys and values as they are for --to compressed-tensors, found them quantised; use --to dense"
        )
    schemes, notes = fused_schemes(model, {name: _scheme(spec) for name, spec in quantised.items()})
    if not schemes:
        raise UserError(
            "expected q, k, v (gate, up) quantised alike for --to compressed-tensors, found an unquantised one in each "
            "of these groups; compress again with keep_sensitive: {siblings: true} or use --to dense"
        )
    plain = dict.fromkeys((quantised.keys() - schemes.keys()) | tables.keys(), dtype or stored_dtype(checkpoint))
    if tables:
        notes.append(f"{' and '.join(sorted(tables))} written as {next(iter(plain.values()))}".replace("torch.", ""))
    entries = unpacked_entries(checkpoint, quantised | tables, dtype)
    whole = _common_scales(checkpoint, model, {n: s for n, s in quantised.items() if n in schemes}, notes)
    for name, spec in (quantised | tables).items():
        if name in schemes and spec.format != "int":
            entries += _float_entries(checkpoint, name, spec, whole.get(name))
        elif name in schemes:
            entries += _linear_entries(checkpoint, name, spec, schemes[name])
        else:
            unpack = partial(_plain_weight, dtype=plain[name])
            entries.append(linear_entry(checkpoint, name, spec, "weight", plain[name], spec.shape, unpack))
    config = dict(checkpoint.config)
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
    config["quantization_config"] = {
        **quantization_config(model, schemes),
        "version": compressed_tensors.__version__,
    }
    if any(spec.sparse for spec in quantised.values()):
        notes.append("pruned weights are stored as codes of zero: the format has no masks")
    if any(spec.input_sparsity for spec in linears.values()):
        notes.append("the format cannot say which inputs a token keeps: all of them are read in the export")
    rule: InputRule = "none"
    if any(input_bits for _, _, _, input_bits, _ in schemes.values()):
        rule = "compressed-tensors"
        notes.append("readers quantise inputs in steps of max|x|/127.5, tulle in steps of max|x|/127")
    words = any(not scheme[2] and _format(*scheme) == "pack-quantized" for scheme in schemes.values())
    floats = any(scheme[4] != "int" for scheme in schemes.values())
    return Plan(entries, config, torch.float32, dtype, rule, words, floats, notes, plain)


def fused_schemes(model: Decoder, own: Mapping[str, Scheme]) -> tuple[dict[str, Scheme], list[str]]:
    """The schemes of quantised linears, one for all of a fused group, and what that changed.

    ``own``: those of the packed model. A linear that is left out is to be written as a plain weight.
    """
    schemes, raised, unpacked = dict(own), [], []
    for layer in model.layers:
        for group in layer.groups:
            names = [layer.prefix + name for name in group.names]
            found = [own.get(name) for name in names]
            if len(set(found)) == 1:
                continue
            common = _common_scheme(found, group.inputs)
            for name in names:
                if common is None and schemes.pop(name, None) is not None:
                    unpacked.append(name)
                elif common is not None and schemes[name] != common:
                    schemes[name] = common
                    raised.append(name)
    notes = []
    if raised:
        notes.append(f"stored without loss in the scheme of the others that vLLM fuses them with: {_listed(raised)}")
    if unpacked:
        notes.append(
            "stored as plain weights, because others that vLLM fuses them with are not quantised so: "
            f"{_listed(unpacked)} (keep_sensitive with siblings: true avoids that)"
        )
    return schemes, notes


def _common_scheme(found: Sequence[Scheme | None], columns: int) -> Scheme | None:
    """One that holds all of them exactly; None where there is none."""
    schemes = [scheme for scheme in found if scheme is not None]
    if len(schemes) < len(found) or len({scheme[3:] for scheme in schemes}) > 1:
        return None
    size = gcd(*(scheme[1] or columns for scheme in schemes))
    bits = max(scheme[0] for scheme in schemes)
    return bits, None if size == columns else size, all(scheme[2] for scheme in schemes), *schemes[0][3:]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def quantization_config(model: Decoder, schemes: Mapping[str, Scheme]) -> dict[str, Any]:
    """``quantization_config``: one group per scheme, each with its format; everything else ignored by name."""
    groups: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        groups.setdefault(scheme, []).append(name)
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
        "ignore": [head] + [name for name in linears if name not in schemes],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
    }


def _is_quantised(name: str, spec: LinearSpec) -> bool:
    what = None
    if spec.transform:
        what = "transforms of inputs"
    elif spec.format != "int" and spec.input_bits is not None:
        what = "quantised inputs of floats of 4 bits"
    elif spec.scale_bits != 16 and spec.format == "int":
        # Readers keep scales in the model's dtype, and bfloat16 would round these.
        what = "scales of 8 bits (allocate_bits and gptq have scale_bits: 16)"
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
    return spec.bits or 0, spec.group_size, spec.symmetric, spec.input_bits, spec.format


def _format(bits: int, group_size: int | None, symmetric: bool, input_bits: int | None, codes: str) -> str:
    if codes != "int":
        return f"{codes}-pack-quantized"
    return "int-quantized" if bits == 8 and input_bits is not None else "pack-quantized"


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    bits, group_size, symmetric, input_bits, codes = scheme
    inputs = None
    if input_bits is not None:
        inputs = _arguments(input_bits, True, "token", None, dynamic=True)
    strategy = "channel" if group_size is None else "tensor_group" if codes == "nvfp4" else "group"
    weights = _arguments(bits, symmetric, strategy, group_size, dynamic=False)
    if codes != "int":
        scale_dtype = "torch.uint8" if codes == "mxfp4" else "torch.float8_e4m3fn"
        weights |= {"type": "float", "scale_dtype": scale_dtype}
    return {
        "targets": targets,
        "weights": weights,
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


def _linear_entries(checkpoint: Checkpoint, name: str, spec: LinearSpec, scheme: Scheme) -> list[Entry]:
    """``spec`` as the packed model has it, written in ``scheme``, which holds it exactly."""
    (bits, _, symmetric, _, _), (rows, columns) = scheme, spec.shape
    entry = partial(linear_entry, checkpoint, name, spec)
    count = columns // (scheme[1] or columns)
    groups, zeros = (rows, count), ("zero_point",) if not spec.symmetric else ()

    def scale(spec: LinearSpec, tensors: Mapping[str, Tensor]) -> Tensor:
        return _spread(tensors["scale"], count)

    def codes(spec: LinearSpec, tensors: Mapping[str, Tensor]) -> Tensor:
        return _signed_codes(spec, tensors, bits, symmetric)

    def zero(spec: LinearSpec, tensors: Mapping[str, Tensor]) -> Tensor:
        return _spread(_signed_zero(spec, tensors, bits), count)

    entries = [entry("weight_scale", torch.bfloat16, groups, scale, ("scale",))]
    if _format(*scheme) == "int-quantized":
        entries.append(entry("weight", torch.int8, spec.shape, codes))
        if not symmetric:
            entries.append(entry("weight_zero_point", torch.int8, groups, zero, zeros))
        return entries
    words = (rows, ceil(columns * bits / 32))
    entries.append(entry("weight_packed", torch.int32, words, lambda spec, t: _in_words(codes(spec, t), bits)))
    entries.append(entry("weight_shape", torch.int64, (2,), lambda spec, t: torch.tensor(spec.shape), ()))
    if not symmetric:
        words = (ceil(rows * bits / 32), count)
        pack = partial(_in_words, bits=bits, packed_dim=0)
        entries.append(entry("weight_zero_point", torch.int32, words, lambda spec, t: pack(zero(spec, t)), zeros))
    return entries


def _float_entries(checkpoint: Checkpoint, name: str, spec: LinearSpec, whole: float | None) -> list[Entry]:
    """``spec``, of floats of 4 bits. ``whole``: the scale of the tensor that its bytes are moved to, of nvfp4."""
    entry = partial(linear_entry, checkpoint, name, spec)
    rows, columns = spec.shape
    packed = ("mask", "values") if spec.sparse else ("codes",)

    entries = [entry("weight_packed", torch.uint8, (rows, columns // 2), _dense_codes, packed)]
    groups = (rows, spec.groups)
    if whole is None:
        return [*entries, entry("weight_scale", torch.uint8, groups, lambda spec, t: t["scale"], ("scale",))]

    def moved(spec: LinearSpec, tensors: Mapping[str, Tensor]) -> Tensor:
        return _moved_scale(tensors, whole)

    return [
        *entries,
        entry("weight_scale", torch.float8_e4m3fn, groups, moved, ("scale", "tensor_scale")),
        entry("weight_global_scale", torch.float32, (1,), lambda spec, t: torch.tensor([1 / whole]), ()),
    ]


def _dense_codes(spec: LinearSpec, tensors: Mapping[str, Tensor]) -> Tensor:
    """uint8 ``[C_out, C_in/2]``: codes of 4 bits, 0 at pruned positions."""
    if not spec.sparse:
        return tensors["codes"]
    codes, _ = unpack_codes(spec, tensors)
    return codes[:, ::2] | codes[:, 1::2] << 4


def _moved_scale(tensors: Mapping[str, Tensor], whole: float) -> Tensor:
    """E4M3 ``[C_out, G]``: scales as multiples of ``whole``."""
    ratio = tensors["tensor_scale"] / whole
    return (tensors["scale"].view(torch.float8_e4m3fn).float() * ratio).to(torch.float8_e4m3fn)


def _common_scales(
    checkpoint: Checkpoint, model: Decoder, linears: Mapping[str, LinearSpec], notes: list[str]
) -> dict[str, float]:
    """The scale of the tensor that each linear of nvfp4 is written with: one for those that vLLM fuses."""
    own: dict[str, float] = {}
    for name, spec in linears.items():
        if spec.format == "nvfp4":
            own[name] = float(checkpoint.read(f"{name}.tensor_scale"))
    found, apart = dict(own), []
    for layer in model.layers:
        for group in layer.groups:
            names = [layer.prefix + name for name in group.names if layer.prefix + name in own]
            most = max((own[name] for name in names), default=0.0)
            parts = {n: checkpoint.read_many([f"{n}.scale", f"{n}.tensor_scale"]) for n in names if own[n] != most}
            if all(_moves_exactly({k.rpartition(".")[2]: t for k, t in part.items()}, most) for part in parts.values()):
                found |= dict.fromkeys(names, most)
            else:
                apart += names
    if apart:
        notes.append(f"vLLM will round the scales of {_listed(apart)}: it computes them with one scale of the tensor")
    return found


def _moves_exactly(tensors: Mapping[str, Tensor], whole: float) -> bool:
    before = tensors["scale"].view(torch.float8_e4m3fn).float() * tensors["tensor_scale"]
    return torch.equal(_moved_scale(tensors, whole).float() * whole, before)


def _in_words(codes: Tensor, bits: int, packed_dim: Literal[0, 1] = 1) -> Tensor:
    from compressed_tensors.compressors import pack_to_int32

    return pack_to_int32(codes, bits, packed_dim=packed_dim)


def _spread(per_group: Tensor, count: int) -> Tensor:
    """``[C_out, G]`` → ``[C_out, count]``: every group cut into equal ones."""
    return per_group.repeat_interleave(count // per_group.shape[1], 1)


def _signed_codes(spec: LinearSpec, tensors: Mapping[str, Tensor], bits: int, symmetric: bool) -> Tensor:
    """int8 ``[C_out, C_in]``: u − 2^(b−1) for b = ``bits``, and at pruned positions the code of zero."""
    whole = unpack_integer_weight(spec, tensors)
    if not symmetric:
        whole = whole + _spread(_signed_zero(spec, tensors, bits).short(), spec.shape[1])
    return whole.to(torch.int8)


def _signed_zero(spec: LinearSpec, tensors: Mapping[str, Tensor], bits: int) -> Tensor:
    """int8 ``[C_out, G]``: z − 2^(b−1) for b = ``bits``; 0, the middle, for a symmetric grid."""
    if spec.symmetric:
        return torch.zeros(spec.shape[0], 1, dtype=torch.int8)
    return (unpack_zero(spec, tensors).short() - (1 << (bits - 1))).to(torch.int8)


def _plain_weight(spec: LinearSpec, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    return dequantise(spec, tensors).to(dtype)
