"""Settings of every method: their defaults, and the ends of their ranges."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

import pytest

from tulle.compression.recipe import METHODS, method_class
from tulle.core.grid import Grid
from tulle.core.masks import Pattern, check_sparsity
from tulle.core.token_grid import TokenGrid
from tulle.core.topk import top_k
from tulle.errors import UserError

PRUNER = {"sparsity": None, "pattern": None, "refit": False, "swaps": 0, "damping": 0.01}
LEARNED = {"bits": 4, "group_size": None, "symmetric": False}
DEFAULTS: dict[str, dict[str, Any]] = {
    "magnitude": {"sparsity": None, "pattern": None, "scope": "layer"},
    "wanda": PRUNER,
    "ria": PRUNER | {"power": 0.5},
    "sparsegpt": PRUNER | {
        "refit": True, "bits": None, "group_size": None, "symmetric": True, "clip_search": 20, "descent": 4,
        "block": 128,
    },
    "alps": PRUNER | {"refit": True, "scope": "layer", "rho": 0.1, "growth": 0.02, "iterations": 300},
    "reconstruct": {"epochs": 10, "rate": 0.01, "separate": True},
    "permute_channels": {"pattern": "2:4", "score": "wanda", "power": 2.0, "residual": True, "effort": 1.0},
    "owl": {"spread": 0.08, "multiple": 5.0},
    "allocate": {
        "budget": "zeros", "bits": 16, "per": "linear", "lowest": 0.0, "highest": 0.95, "tokens": 8192, "damping": 0.01,
        "steps": 10,
    },
    "round_to_nearest": {
        "bits": 8, "group_size": None, "symmetric": True, "scale_bits": 16, "format": "int", "clip_search": 0,
        "clip": 1.0, "input_bits": None,
    },
    "gptq": {
        "bits": 4, "group_size": None, "symmetric": True, "scale_bits": 16, "format": "int", "act_order": True,
        "clip_search": 20, "descent": 4, "damping": 0.01, "block": 32, "input_bits": None,
    },
    "activations": {"bits": 4, "symmetric": False, "clip": 1.0},
    "kv_cache": {"bits": 4, "query_bits": None, "symmetric": False, "clip": 1.0, "hadamard": True},
    "smoothquant": {"alpha": 0.5, "size": "max"},
    "larosa": {"residual": True, "heads": True},
    "quarot": {"residual": True, "heads": True, "across_heads": True, "down": True},
    "duquant": {
        "steps": 256, "block": 128, "permutations": 1, "permutation": "zigzag", "rotation": "greedy",
        "choose": "channel",
    },
    "perq": {"block": 128, "permute": True, "gather": True, "rotation": "hadamard", "steps": 256},
    "learned_clipping": LEARNED | {
        "epochs": 20, "rate": 0.005, "inputs": False, "scales": False, "scale_rate": 0.005,
    },
    "flatquant": LEARNED | {"start": "rms", "epochs": 15, "rate": 0.005, "clip_rate": 0.05},
    "affinequant": LEARNED | {
        "block": 128, "alpha": 0.1, "epochs": 20, "rate": 0.005, "clip_rate": 0.01, "inputs": True,
    },
    "spinquant": {
        "bits": 4, "symmetric": True, "input_bits": 4, "input_symmetric": False, "input_clip": 1.0, "steps": 200,
        "rate": 0.5,
    },
    "allocate_bits": {
        "size": None, "bits": None, "choices": (2, 3, 4, 5, 6, 8), "group_sizes": ("auto-64",), "symmetric": False,
        "scale_bits": 8, "tokens": 8192, "clip_search": 20, "damping": 0.01,
    },
    "keep_sensitive": {
        "count": 5, "keep_bits": 16, "siblings": True, "bits": 8, "group_size": None, "symmetric": True,
        "input_bits": 8, "input_symmetric": True, "error": "relative",
    },
    "activation_budget": {"share": 0.5, "per": "role", "lowest": 0.0, "highest": 0.9, "tokens": 8192},
    "teal": {"share": 0.5, "kind": "threshold", "block": None, "unit": 1, "by": "max", "rescale": False},
    "wina": {"share": 0.5, "block": None, "unit": 1, "by": "norm", "rescale": False},
}  # fmt: skip
"""What a recipe gets that does not say: another default gives other bytes for the same recipe."""


@pytest.mark.parametrize("name", METHODS)
def test_defaults(name: str) -> None:
    found = {f.name: f.default for f in fields(method_class(name)) if f.default is not MISSING}
    assert found == DEFAULTS[name]


def make(name: str) -> Any:
    return method_class(name)


SPARSE: dict[str, Any] = {"sparsity": 0.5}
INFINITE = float("inf")
# What is made, further settings, the setting, its ends, values just beyond.
LIMITS: list[tuple[Any, dict[str, Any], str, tuple[Any, ...], tuple[Any, ...]]] = [
    (Grid, {}, "bits", (2, 8), (1, 9)),
    (Grid, {"bits": 4}, "group_size", (1, None), (0,)),
    (TokenGrid, {}, "bits", (2, 8), (1, 9)),
    (TokenGrid, {"bits": 4}, "clip", (1e-6, 1.0), (0.0, 1.001)),
    (Pattern, {"m": 4}, "n", (1, 4), (0, 5)),
    (check_sparsity, {"pattern": None}, "sparsity", (0, 0.0, 0.999), (-0.001, 1, 1.0)),
    (top_k, {"channels": 8}, "share", (0, 0.0, 0.999), (-0.001, 1, 1.0)),
    (top_k, {"channels": 8, "share": 0.5}, "unit", (1, 8), (0, 3, 16)),
    (top_k, {"channels": 8, "share": 0.5}, "block", (1, 8), (3, 16)),
    (make("wanda"), SPARSE | {"refit": True}, "swaps", (0, 1), (-1,)),
    (make("ria"), SPARSE, "power", (0, 0.5, 9.0), (-0.001, INFINITE)),
    (make("alps"), SPARSE, "rho", (1e-6, 1e6), (0.0, INFINITE)),
    (make("alps"), SPARSE, "growth", (1e-6, 1e6), (0.0, INFINITE)),
    (make("alps"), SPARSE, "iterations", (1,), (0,)),
    (make("alps"), SPARSE, "damping", (1e-9, 10.0), (0.0, INFINITE)),
    (make("owl"), SPARSE, "spread", (0, 0.499), (-0.001, 0.5)),
    (make("owl"), SPARSE, "multiple", (1e-6,), (0.0,)),
    (make("allocate"), SPARSE, "lowest", (0, 0.0, 0.5), (-0.001, 0.501)),
    (make("allocate"), SPARSE, "highest", (0.5, 0.999), (0.499, 1, 1.0)),
    (make("allocate"), SPARSE, "bits", (2, 8, 16, 32), (1, 9, 15, 17)),
    (make("allocate"), SPARSE, "tokens", (2,), (1,)),
    (make("allocate"), SPARSE, "steps", (0,), (-1,)),
    (make("permute_channels"), {}, "power", (1e-6,), (0.0,)),
    (make("permute_channels"), {}, "effort", (1e-6,), (0.0,)),
    (make("reconstruct"), {}, "epochs", (1,), (0,)),
    (make("reconstruct"), {}, "rate", (1e-9,), (0.0,)),
    (make("round_to_nearest"), {}, "clip", (1e-6, 1.0), (0.0, 1.001)),
    (make("smoothquant"), {}, "alpha", (0, 0.0, 1, 1.0), (-0.001, 1.001)),
    (make("duquant"), {}, "block", (2, 128), (0, 1, 3, 12)),
    (make("duquant"), {}, "steps", (1,), (0,)),
    (make("duquant"), {}, "permutations", (0,), (-1,)),
    (make("perq"), {}, "block", (0, 1, 2, 128), (-1, 3, 12)),
    (make("affinequant"), {}, "block", (1,), (0,)),
    (make("spinquant"), {}, "steps", (0,), (-1,)),
    (make("spinquant"), {}, "rate", (1e-6,), (0.0,)),
    (make("allocate_bits"), {"bits": 4.0}, "tokens", (2,), (1,)),
    (make("allocate_bits"), {"bits": 4.0}, "damping", (1e-9, 10.0), (0.0, INFINITE)),
    (make("keep_sensitive"), {}, "count", (0,), (-1,)),
    (make("keep_sensitive"), {}, "keep_bits", (2, 8, 16), (1, 9, 15, 17)),
    (make("activation_budget"), {}, "lowest", (0, 0.5), (-0.001, 0.501)),
    (make("activation_budget"), {}, "highest", (0.5, 0.999), (0.499, 1, 1.0)),
    (make("activation_budget"), {}, "tokens", (2,), (1,)),
    (make("teal"), {"kind": "threshold"}, "unit", (1,), (2,)),
]


@pytest.mark.parametrize("made, others, setting, ends, beyond", LIMITS, ids=lambda x: x if isinstance(x, str) else "")
def test_ranges_end_where_they_say(
    made: Any, others: dict[str, Any], setting: str, ends: tuple[Any, ...], beyond: tuple[Any, ...]
) -> None:
    for value in ends:
        made(**others, **{setting: value})
    for value in beyond:
        with pytest.raises(UserError, match="expected") as error:
            made(**others, **{setting: value})
        assert "\n" not in str(error.value)


def test_levels_by_hand() -> None:
    """Densities of 0.3 to 1.5 times what the budget leaves, and both ends; nothing beyond them."""
    found = make("activation_budget")(share=0.5).levels()
    assert found == pytest.approx([0.0, 0.25, 0.375, 0.5, 0.625, 0.75, 0.85, 0.9])
    found = make("activation_budget")(share=0.2, lowest=0.1, highest=0.5).levels()
    assert found == pytest.approx([0.1, 0.2, 0.4, 0.5])
    # The share itself is a level of allocate only by its density of 1.
    found = make("allocate")(sparsity=0.5).levels()
    assert found == pytest.approx([0.0, 0.2, 0.375, 0.5, 0.6, 0.7, 0.8, 0.95])
