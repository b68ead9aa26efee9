"""Codes of dense tiles read back as native/include/tulle/linear.hpp draws them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

CODE_BITS = {
    "codes2": [[(0, 2 * unit, 2)] for unit in range(4)],
    "codes3": [[(unit // 2, unit % 2 * 3, 3)] for unit in range(6)] + [[(0, 6, 2), (2, 6, 1)], [(1, 6, 2), (2, 7, 1)]],
    "codes4": [[(0, 4 * unit, 4)] for unit in range(2)],
    "codes5": [[(unit, 0, 5)] for unit in range(5)]
    + [[(0, 5, 3), (3, 6, 2)], [(1, 5, 3), (4, 6, 2)], [(2, 5, 3), (4, 5, 1), (3, 5, 1)]],
    "codes6": [[(unit, 0, 6)] for unit in range(3)] + [[(0, 6, 2), (1, 6, 2), (2, 6, 2)]],
    "codes8": [[(0, 0, 8)]],
}
"""Per unit of a group where its code's bits lie, highest first: part, first bit, how many."""


def in_order_of_units(kind: str, values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """``values`` without their slack."""
    units = CODE_BITS[kind]
    parts = values.reshape(-1, int(kind[-1]) * len(units) // 8, 64)
    found = np.zeros((len(parts), len(units), 64), np.uint8)
    for unit, pieces in enumerate(units):
        for part, first, count in pieces:
            found[:, unit] = found[:, unit] << count | parts[:, part] >> first & ((1 << count) - 1)
    return found.reshape(-1)
