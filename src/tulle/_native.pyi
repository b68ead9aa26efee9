from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Element = TypeVar("Element", np.uint8, np.uint16, np.uint32)

def cpu_features() -> dict[str, bool]: ...
def supported_isas() -> list[str]: ...
def active_isa() -> str: ...
def pack_nibbles(codes: NDArray[np.uint8], out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]: ...
def unpack_nibbles(packed: NDArray[np.uint8], n: int, out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]: ...
def count_mask(mask: NDArray[np.uint8], columns: int) -> int: ...
def expand(
    mask: NDArray[np.uint8], values: NDArray[Element], columns: int, out: NDArray[Element] | None = None
) -> NDArray[Element]: ...
def compress(
    mask: NDArray[np.uint8], dense: NDArray[Element], out: NDArray[Element] | None = None
) -> NDArray[Element]: ...
def anneal(
    scores: NDArray[np.uint8] | NDArray[np.int16],
    index: list[int],
    kept: int,
    m: int,
    proposals: int,
    start: float,
    end: float,
    seed: int,
    threads: int,
) -> tuple[list[int], int]: ...
def read_bandwidth(bytes: int, threads: int, passes: int) -> float: ...

class Engine:
    def __init__(
        self, model: dict[str, Any], slots: int, context: int, batch: int, cache: str, threads: int
    ) -> None: ...
    def forward(
        self,
        tokens: NDArray[np.int32],
        slots: NDArray[np.int32],
        positions: NDArray[np.int32],
        rows: NDArray[np.int32],
        logits: NDArray[np.float32],
    ) -> None: ...
    @property
    def weight_bytes(self) -> int: ...
    @property
    def cache_bytes(self) -> int: ...
    @property
    def work_bytes(self) -> int: ...
