from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from tulle.engine.native_model import Model, ScalingModel

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
def top_k(x: NDArray[np.float32], keep: int, block: int = 0, unit: int = 1) -> None:
    """Zeroes all but the ``keep`` largest |x| of every block (0: of all), as the engine does in front of a linear."""

def keep_largest(scores: NDArray[np.float32], keep: int, mask: NDArray[np.bool_], threads: int) -> None: ...
def read_bandwidth(bytes: int, threads: int, passes: int) -> float: ...

class Engine:
    def __init__(
        self,
        model: Model,
        pages: int,
        slots: int,
        context: int,
        batch: int,
        cache: str,
        threads: int,
        snapshots: int = 0,
        deterministic: bool = False,
    ) -> None: ...
    def forward(
        self,
        tokens: NDArray[np.int32],
        slots: NDArray[np.int32],
        positions: NDArray[np.int32],
        tables: NDArray[np.int32],
        rows: NDArray[np.int32],
        logits: NDArray[np.float32],
    ) -> None: ...
    def embed(
        self,
        tokens: NDArray[np.int32],
        slots: NDArray[np.int32],
        positions: NDArray[np.int32],
        tables: NDArray[np.int32],
        rows: NDArray[np.int32],
        hidden: NDArray[np.float32],
    ) -> None: ...
    def copy_page(self, source: int, target: int) -> None: ...
    def save_state(self, slot: int, snapshot: int) -> None: ...
    def load_state(self, snapshot: int, slot: int) -> None: ...
    def take_bytes_per_token(self) -> float: ...
    @property
    def weight_bytes(self) -> int: ...
    @property
    def state_bytes(self) -> int: ...
    @property
    def page_bytes(self) -> int: ...
    @property
    def cache_bytes(self) -> int: ...
    @property
    def work_bytes(self) -> int: ...

class ScalingEngine:
    def __init__(
        self,
        model: ScalingModel,
        pages: int,
        slots: int,
        context: int,
        batch: int,
        cache: str,
        threads: int,
        snapshots: int = 0,
        deterministic: bool = False,
    ) -> None: ...
    def forward(
        self,
        tokens: NDArray[np.int32],
        slots: NDArray[np.int32],
        positions: NDArray[np.int32],
        tables: NDArray[np.int32],
        rows: NDArray[np.int32],
        logits: NDArray[np.float32],
    ) -> None: ...
    def embed(
        self,
        tokens: NDArray[np.int32],
        slots: NDArray[np.int32],
        positions: NDArray[np.int32],
        tables: NDArray[np.int32],
        rows: NDArray[np.int32],
        hidden: NDArray[np.float32],
    ) -> None: ...
    def copy_page(self, source: int, target: int) -> None: ...
    def save_state(self, slot: int, snapshot: int) -> None: ...
    def load_state(self, snapshot: int, slot: int) -> None: ...
    def take_bytes_per_token(self) -> float: ...
    @property
    def weight_bytes(self) -> int: ...
    @property
    def state_bytes(self) -> int: ...
    @property
    def page_bytes(self) -> int: ...
    @property
    def cache_bytes(self) -> int: ...
    @property
    def work_bytes(self) -> int: ...
    @property
    def units_read(self) -> int: ...
    @property
    def units_skipped(self) -> int: ...

class SparsePattern:
    def __init__(self, mask: NDArray[np.bool_]) -> None: ...
    @property
    def rows(self) -> int: ...
    @property
    def columns(self) -> int: ...
    @property
    def kept(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    def entries(self) -> NDArray[np.int64]: ...
    def product(
        self,
        values: NDArray[np.float32],
        x: NDArray[np.float32],
        bias: NDArray[np.float32] | None,
        y: NDArray[np.float32],
        threads: int,
    ) -> None: ...
    def input_gradient(
        self, values: NDArray[np.float32], dy: NDArray[np.float32], dx: NDArray[np.float32], threads: int
    ) -> None: ...
    def weight_gradient(
        self, x: NDArray[np.float32], dy: NDArray[np.float32], dvalues: NDArray[np.float32], threads: int
    ) -> None: ...

# The search for codes: what the arrays are, native/include/tulle/search.hpp says.
def find_steps(
    weight: NDArray[np.float32],
    importance: NDArray[np.float32],
    mask: NDArray[np.bool_] | None,
    low: float,
    high: float,
    symmetric: bool,
    ratios: NDArray[np.float32],
    least: NDArray[np.float32] | None,
    largest: NDArray[np.float32] | None,
    step: NDArray[np.float32],
    zero: NDArray[np.float32],
    threads: int,
) -> None: ...
def sweep_block(
    start: int,
    feedback: NDArray[np.float32],
    weight: NDArray[np.float32] | None,
    value: NDArray[np.float32],
    error: NDArray[np.float32],
    group: NDArray[np.int64] | None,
    step: NDArray[np.float32] | None,
    zero: NDArray[np.float32] | None,
    low: float,
    high: float,
    codes: NDArray[np.int16] | None,
    mask: NDArray[np.bool_] | None,
    n: int,
    m: int,
    weighting: NDArray[np.float32] | None,
    threads: int,
) -> None: ...
def take_columns(source: NDArray[Any], order: NDArray[np.int64], to: NDArray[Any], threads: int) -> None: ...
def put_columns(source: NDArray[Any], order: NDArray[np.int64], to: NDArray[Any], threads: int) -> None: ...
def open_levels(
    codes: NDArray[np.int16],
    step: NDArray[np.float32],
    zero: NDArray[np.float32],
    mask: NDArray[np.bool_] | None,
    weight: NDArray[np.float32],
    level: NDArray[np.float32],
    residual: NDArray[np.float32],
    threads: int,
) -> None: ...
def has_flash_attention() -> bool: ...
def flash_attention(
    q: NDArray[np.int16],
    k: NDArray[np.int16],
    v: NDArray[np.int16],
    out: NDArray[np.int16],
    window: int,
    scale: float,
    threads: int,
) -> None: ...
def has_outer() -> bool: ...
def accumulate_outer(
    total: NDArray[np.float32],
    a: NDArray[np.int16],
    b: NDArray[np.int16] | None,
    alpha: float,
    beta: float,
    threads: int,
) -> None: ...
def descend(
    hessian: NDArray[np.float32],
    gradient: NDArray[np.float32],
    product: NDArray[np.float32],
    codes: NDArray[np.int16],
    step: NDArray[np.float32],
    zero: NDArray[np.float32],
    mask: NDArray[np.bool_] | None,
    low: float,
    high: float,
    sweeps: int,
    steps_first: bool,
    threads: int,
    row_scale: NDArray[np.float32] | None = None,
) -> None: ...
