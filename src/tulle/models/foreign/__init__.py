"""Checkpoints that other tools quantised, read as dense models. One file per format, to be read as its specification.

A format says which tensors a linear is stored as and what numbers they mean; :class:`Dequantised` makes a
:class:`tulle.models.source.TensorSource` of it. Numbers come out in float32: scale·(code − zero) of 8-bit codes and
16-bit scales has at most 20 significant bits, so float32 keeps it and bfloat16 would round it. Only products with
float32 scales are rounded, once. One tensor is in memory at a time.
"""

from __future__ import annotations

from tulle.models.foreign._parts import Dequantised, Format, open_foreign

__all__ = ["Dequantised", "Format", "open_foreign"]
