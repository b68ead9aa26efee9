"""Where a mask keeps weights, in one or two kilobytes of JSON: what the report draws of it."""

from __future__ import annotations

import base64
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from tulle.core.masks import Pattern

GRID = (32, 64)
"""At most this many tiles, rows × columns."""
CORNER = (16, 32)
"""At most this many weights of the top left corner are given one by one, rows × columns."""
SCARCE = 0.1
"""A row or column is nearly empty when it keeps less than this share of what the matrix keeps on average."""


def mask_structure(mask: Tensor, pattern: str | None = None) -> dict[str, Any]:
    """Densities of a bool mask ``[C_out, C_in]`` (True = kept) over tiles, rows, columns and stripes, as JSON.

    - ``tile``: weights in a tile, ``[rows, columns]``; those at the right and lower edge are what is left. Columns are
      a multiple of the stripe, so an N:M mask is equally dense in all whole tiles.
    - ``grid``: number of tiles ``[R, C]``, at most :data:`GRID`.
    - ``tiles``: kept share of each tile, ``[R, C]`` bytes, whole percents.
    - ``rows``: ``[3, R]`` bytes, whole percents: the least, mean and greatest kept share of a single row in each row of
      tiles, so that one empty row is seen among many; ``columns``: ``[3, C]``, the same for columns.
    - ``empty``: number of ``[rows, columns]`` that keep nothing; ``nearly_empty``: with those under :data:`SCARCE`.
    - ``stripe``: M of ``pattern``, else 4; ``kept_in_stripe``: ``M + 1`` shares of the stripes of M consecutive input
      channels, by how many of the M are kept. All is at N for a pattern N:M. A rest of channels is left out.
    - ``corner``: bits of the top left corner, ``corner_shape`` (at most :data:`CORNER`), row after row.

    Bytes are compressed by zlib and written in base64. Raises ``ValueError`` for an empty mask or one of another rank.
    """
    if mask.ndim != 2 or not mask.numel():
        raise ValueError(f"expected a mask [C_out, C_in] with weights, found the shape {tuple(mask.shape)}")
    rows, columns = mask.shape
    stripe = Pattern.parse(pattern).m if pattern else 4
    height = -(-rows // GRID[0])
    width = -(-columns // (GRID[1] * stripe)) * stripe
    grid = (-(-rows // height), -(-columns // width))
    # Kept weights by row and stripe: the one pass over the whole mask besides that over columns.
    stripes = pad(mask, (0, -columns % width)).reshape(rows, -1, stripe).sum(-1, dtype=torch.int32)
    per_tile = pad(stripes, (0, 0, 0, -rows % height)).reshape(grid[0], height, grid[1], -1).sum((1, 3))
    sizes = torch.tensor([min(height, rows - height * i) for i in range(grid[0])]).outer(
        torch.tensor([min(width, columns - width * i) for i in range(grid[1])])
    )
    by_row = stripes.sum(1).cpu() / columns
    by_column = mask.sum(0, dtype=torch.int32).cpu() / rows
    scarce = SCARCE * float(by_row.mean())
    whole = stripes[:, : columns // stripe].flatten()
    counted = torch.bincount(whole, minlength=stripe + 1).cpu().double()
    corner = mask[: CORNER[0], : CORNER[1]].cpu()
    return {
        "tile": [height, width],
        "grid": list(grid),
        "tiles": _percents(per_tile.cpu() / sizes),
        "rows": _percents(_spread(by_row, height)),
        "columns": _percents(_spread(by_column, width)),
        "empty": [int((by_row == 0).sum()), int((by_column == 0).sum())],
        "nearly_empty": [int(((x == 0) | (x < scarce)).sum()) for x in (by_row, by_column)],
        "stripe": stripe,
        "kept_in_stripe": [round(float(x), 4) for x in counted / max(len(whole), 1)],
        "corner_shape": list(corner.shape),
        "corner": _text(np.packbits(corner.numpy())),
    }


def _spread(share: Tensor, size: int) -> Tensor:
    """``[3, n]``: least, mean and greatest of every ``size`` entries of ``share``, the last ones maybe fewer."""
    parts = share.split(size)
    return torch.stack([torch.stack([part.min(), part.mean(), part.max()]) for part in parts], 1)


def _percents(share: Tensor) -> str:
    return _text((100 * share).round().to(torch.uint8).numpy())


def _text(values: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(values.tobytes(), 9)).decode("ascii")
