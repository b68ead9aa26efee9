"""The column sweep that GPTQ and SparseGPT share.

Columns of W are compressed one after the other; the error of each is made up for by the columns still free,
which by the OBS rule (GPTQ eq. 2-3, SparseGPT eq. 3) takes only the rows of U, the upper Cholesky factor of
H⁻¹ = UᵀU: e = (w_j − ŵ_j)/U_jj, W_{:,k} ← W_{:,k} − e·U_jk for k > j. Updates beyond a block of columns are
collected and applied once per block as a matrix product (GPTQ section 3.3), which changes the speed and
nothing else.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Compressor(Protocol):
    """Chooses compressed columns. Weights come transposed (``[columns, C_out]``) in the order of the
    sweep.
    """

    def open_block(self, start: int, weight: Tensor) -> None:
        """The sweep enters the block that begins at column ``start``; ``weight`` ``[width, C_out]`` as
        updated so far.
        """

    def column(self, j: int, weight: Tensor) -> Tensor:
        """ŵ_j ``[C_out]``. ``weight[0]`` is column j as updated so far, the other rows are the rest of its
        block.
        """
        ...


def sweep(weight: Tensor, upper: Tensor, compressor: Compressor, block: int = 128) -> Tensor:
    """Ŵ ``[C_out, C_in]`` for W ``[C_out, C_in]`` and U ``[C_in, C_in]``, both in the order of the sweep.

    W is not changed. The result approximately minimises tr((W−Ŵ)H(W−Ŵ)ᵀ) over what ``compressor`` can choose.
    """
    # Columns first, so that a column is contiguous: the inner loop then runs at memory speed.
    w = weight.T.contiguous()
    if w.data_ptr() == weight.data_ptr():
        w = w.clone()
    columns = w.shape[0]
    for start in range(0, columns, block):
        end = min(start + block, columns)
        part = w[start:end]
        errors = torch.empty_like(part)
        compressor.open_block(start, part)
        for j in range(start, end):
            i = j - start
            compressed = compressor.column(j, part[i:])
            errors[i] = (part[i] - compressed) / upper[j, j]
            part[i + 1 :].addr_(upper[j, j + 1 : end], errors[i], alpha=-1)
            part[i] = compressed
        w[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    return w.T.contiguous()
