"""Numbers of four bits with an exponent, E2M1: 0, ½, 1, 1½, 2, 3, 4 and 6 with a sign, in groups that share a scale.

- MXFP4 (OCP Microscaling Formats v1.0, section 5.2): groups of 32, a scale is a power of two (E8M0, one byte).
- NVFP4 (NVIDIA's Blackwell): groups of 16, a scale is an E4M3 number of one byte times one float32 per tensor. Here
  that float32 is a power of two, which costs nothing in E4M3's range of 2^17 and makes every product exact.

A *level* is twice an E2M1 number, so that it is whole: 0, 1, 2, 3, 4, 6, 8, 12. A *step* is half a scale: weight =
step·level, as on a grid of whole numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

FloatFormat = Literal["mxfp4", "nvfp4"]
GROUP: dict[str, int] = {"mxfp4": 32, "nvfp4": 16}
"""Input channels that share a scale."""
LARGEST = 12
"""Level."""
LARGEST_E4M3 = 448.0
LEAST_E4M3 = 2.0**-9
LEAST_STEP = 2.0**-100
"""Steps of all-zero groups; smaller ones are never looked for."""
NEIGHBOURS = {"mxfp4": (1, -1), "nvfp4": tuple(sorted((d for d in range(-8, 9) if d), key=abs))}
"""Scales that a search tries beside the standard's, counted in bytes: a factor of 2 either way; E4M3 numbers from half
to twice, so that the largest weight may become a 4 or a 3 as well as a 6 (Cook et al. 2025, "Four Over Six")."""


def nearest_level(x: Tensor) -> Tensor:
    """The nearest level, float32; ties go to the even mantissa, as casts to E2M1 do."""
    size = x.abs()
    unit = torch.where(size < 4, 1.0, torch.where(size < 8, 2.0, 4.0))
    return ((x / unit).round() * unit).clamp(-LARGEST, LARGEST)


def storable_step(step: Tensor, tensor_step: Tensor | None, form: FloatFormat) -> Tensor:
    """The nearest step that can be stored. ``tensor_step`` (shapes broadcast): of nvfp4, half the tensor's scale."""
    if form == "mxfp4":
        fraction, exponent = torch.frexp(step.clamp(min=LEAST_STEP))
        return _power_of_two(exponent - (fraction < 0.75).int())
    assert tensor_step is not None
    return _e4m3(step / tensor_step).float() * tensor_step


def tensor_step(step: Tensor) -> Tensor:
    """Half the scale of a tensor, one number: the least power of two whose E4M3 multiples reach these steps."""
    fraction, exponent = torch.frexp(step.amax().clamp(min=LEAST_STEP) / LARGEST_E4M3)
    return _power_of_two(exponent - (fraction == 0.5).int())


def candidates(largest: Tensor, form: FloatFormat, search: bool) -> Iterator[Tensor]:
    """Steps for groups whose largest magnitudes are given (any shape): the standard's, then its neighbours.

    MXFP4's standard takes the power of two with the largest weight between 4 and 8 scales, NVFP4's the scale with the
    largest weight at 6.
    """
    if form == "mxfp4":
        _, exponent = torch.frexp(largest.clamp(min=LEAST_STEP))  # largest = fraction·2^exponent, fraction from ½ to 1
        for move in (0, *NEIGHBOURS[form]) if search else (0,):
            yield _power_of_two(exponent - 4 + move)
        return
    whole = tensor_step(largest / 6)  # room for the largest weight at 3
    first = _e4m3(largest / LARGEST / whole).view(torch.uint8).int()
    for move in (0, *NEIGHBOURS[form]) if search else (0,):
        # E4M3 numbers are ordered as their bytes are; 126 is the largest, 127 no number.
        yield (first + move).clamp(1, 126).to(torch.uint8).view(torch.float8_e4m3fn).float() * whole


def _e4m3(x: Tensor) -> Tensor:
    return x.clamp(LEAST_E4M3, LARGEST_E4M3).to(torch.float8_e4m3fn)


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent in float32, by its bits: torch's pow may be off in the last one."""
    return ((exponent.clamp(-100, 126) + 127).to(torch.int32) << 23).view(torch.float32)
