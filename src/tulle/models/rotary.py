"""Frequencies of rotary position embeddings, in NumPy.

RoPE (Su et al. 2021): channels i and i + dim/2 of a head at position p are rotated by the angle p·f_i, with
f_i = θ^(−2i/dim). The other kinds stretch the frequencies for longer texts: linear (position interpolation, Chen et al.
2023), dynamic (NTK-aware, with the length at hand), yarn (Peng et al. 2023), longrope (Ding et al. 2024), llama3 (of
Llama 3.1), proportional (of Gemma 4: the last channels keep frequency 0).

As transformers computes them: exponents are float32, everything else is rounded to float32 at the end.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from tulle.errors import UserError
from tulle.models.description import Rotary

Array = NDArray[np.float64]


def frequencies(rotary: Rotary, length: int) -> tuple[NDArray[np.float32], float]:
    """f ``[dim/2]`` for a text of ``length`` tokens, and the factor of all cosines and sines.

    Raises ``UserError`` for parameters that give no finite numbers.
    """
    try:
        with np.errstate(all="ignore"):
            f, scaling = _frequencies(rotary, length)
            if np.isfinite(f).all() and math.isfinite(scaling):
                return f, scaling
    except (ArithmeticError, TypeError, ValueError):  # TypeError: a root of a negative number is complex
        pass
    raise UserError(f"expected rope parameters that give frequencies, found {rotary}; repair the config")


def _frequencies(rotary: Rotary, length: int) -> tuple[NDArray[np.float32], float]:
    scaling = 1.0
    if rotary.kind == "dynamic":
        f = 1 / _powers(_dynamic_theta(rotary, length), rotary.dim)
    else:
        f = 1 / _powers(rotary.theta, rotary.dim)
    if rotary.kind == "linear":
        f = f / _factor(rotary)
    elif rotary.kind == "yarn":
        f, scaling = _yarn(rotary, f), _yarn_scaling(rotary)
    elif rotary.kind == "longrope":
        original = _original(rotary)
        stretch = rotary.long_factor if length > original else rotary.short_factor
        f, scaling = f / np.array(stretch, dtype=np.float32), _longrope_scaling(rotary)
    elif rotary.kind == "llama3":
        f = _llama3(rotary, f)
    elif rotary.kind == "proportional":
        turned = int(rotary.rotated * rotary.dim // 2)
        f = np.where(np.arange(len(f)) < turned, f, 0.0) / (rotary.factor or 1.0)
    return f.astype(np.float32), scaling


def depends_on_length(rotary: Rotary) -> bool:
    """Whether the frequencies of one position differ between short and long texts."""
    return rotary.kind in ("dynamic", "longrope")


def _powers(theta: float, dim: int) -> Array:
    """θ^(2i/dim) ``[dim/2]``."""
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return np.power(np.float64(theta), exponents.astype(np.float64))


def _factor(rotary: Rotary) -> float:
    return rotary.max_positions / _original(rotary) if rotary.factor is None else rotary.factor


def _original(rotary: Rotary) -> int:
    return rotary.original_max_positions or rotary.max_positions


def _dynamic_theta(rotary: Rotary, length: int) -> float:
    factor, most = _factor(rotary), rotary.max_positions
    stretch = factor * max(length, most) / most - (factor - 1)
    return rotary.theta * float(stretch ** (rotary.dim / (rotary.dim - 2)))


def _yarn(rotary: Rotary, f: Array) -> Array:
    """Low frequencies are divided by the factor, high ones stay, with a ramp between (the paper's section 3.2)."""

    def channel(rotations: float) -> float:
        """That turns so many times within the original context."""
        turns = _original(rotary) / (rotations * 2 * math.pi)
        return rotary.dim * math.log(turns) / (2 * math.log(rotary.theta))

    low, high = channel(rotary.beta_fast), channel(rotary.beta_slow)
    if rotary.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary.dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(len(f)) - low) / (high - low), 0, 1)
    return f / _factor(rotary) * ramp + f * (1 - ramp)


def _yarn_scaling(rotary: Rotary) -> float:
    def mscale(weight: float = 1.0) -> float:
        factor = _factor(rotary)
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if rotary.attention_factor is not None:
        return rotary.attention_factor
    if rotary.mscale and rotary.mscale_all_dim:
        return mscale(rotary.mscale) / mscale(rotary.mscale_all_dim)
    return mscale()


def _longrope_scaling(rotary: Rotary) -> float:
    if rotary.attention_factor is not None:
        return rotary.attention_factor
    factor = _factor(rotary)
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(_original(rotary)))


def _llama3(rotary: Rotary, f: Array) -> Array:
    """Wavelengths above original/low are stretched, those below original/high stay, with a blend between."""
    original, factor = _original(rotary), _factor(rotary)
    low, high = rotary.low_freq_factor, rotary.high_freq_factor
    turns = original * f / (2 * math.pi)
    blend = np.clip((turns - low) / (high - low), 0, 1)
    return (1 - blend) * f / factor + blend * f
