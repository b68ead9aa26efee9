"""What stands in front of a compressed linear: its transforms, the quantiser of its input, and the selection."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tulle.core.token_grid import TokenGrid
from tulle.core.topk import Selection
from tulle.core.transform import Transform, run


class QuantisedInput:
    """x ``[..., C_in]`` → what the selection keeps of the quantiser's x̂ of x·T₁·T₂·…

    Siblings that read one x share one object: the last result is kept. Also a forward pre-hook of a linear.
    """

    def __init__(self, transform: tuple[Transform, ...], grid: TokenGrid | None, selection: Selection | None = None):
        self.transform, self.grid, self.selection = transform, grid, selection
        self._seen: Tensor | None = None
        self._result: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self._result is None or self._seen is not x:
            result = run(self.transform, x.float())
            if self.grid is not None:
                rounded = self.grid.fake(result.detach())
                # Straight through, for what is trained behind it.
                result = result + (rounded - result).detach() if result.requires_grad else rounded
            if self.selection is not None:
                result = self.selection.apply(result)
            self._seen, self._result = x, result.to(x.dtype)
        return self._result

    def pre_hook(self, module: Any, arguments: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (self(arguments[0]),)

    def forget(self) -> None:
        """Lets go of the last input and its result."""
        self._seen = self._result = None
