"""What ``q_sparse.py`` compresses and trains by: recipes by the name of their cells."""

from __future__ import annotations

from typing import Any


def free_recipes(share: float) -> dict[str, list[dict[str, Any]]]:
    """Method → steps at a share of dropped inputs."""
    budget = {"activation_budget": {"share": share}}
    top_k = {"kind": "top_k", "share": share}
    return {
        "Top-K": [{"teal": top_k}],
        "TEAL": [{"teal": {"share": share}}],
        "WINA": [{"wina": {"share": share}}],
        "budget + TEAL": [budget, {"teal": {"share": share}}],
        "budget + WINA": [budget, {"wina": {"share": share}}],
        "Top-K of 32": [{"teal": top_k | {"block": 32}}],
        "units of 4": [{"teal": top_k | {"unit": 4}}],
        "units of 4, WINA": [{"wina": {"share": share, "unit": 4}}],
        "LaRoSA": [{"larosa": {}}, {"teal": top_k}],
        "budget + Top-K": [budget, {"teal": top_k}],
        "LaRoSA, budget + Top-K": [{"larosa": {}}, budget, {"teal": top_k}],
        "LaRoSA, budget + WINA": [{"larosa": {}}, budget, {"wina": {"share": share}}],
        "LaRoSA, units of 4, WINA": [{"larosa": {}}, {"wina": {"share": share, "unit": 4}}],
        "LaRoSA, budget + units of 4, WINA": [{"larosa": {}}, budget, {"wina": {"share": share, "unit": 4}}],
    }


def joint_recipes() -> dict[str, list[dict[str, Any]]]:
    """Sparse weights, 4 bits and sparse inputs together, each also alone."""
    pruned: dict[str, Any] = {"sparsegpt": {"sparsity": 0.5}}
    w4: dict[str, Any] = {"gptq": {"bits": 4, "group_size": 64}}
    thinned: list[dict[str, Any]] = [{"activation_budget": {"share": 0.4}}, {"teal": {"share": 0.4}}]
    rotated = [{"larosa": {}}, {"activation_budget": {"share": 0.5}}, {"teal": {"share": 0.5, "kind": "top_k"}}]
    return {
        "weights 50 %": [pruned],
        "weights 50 %, inputs 40 %": [*thinned, pruned],
        "w4": [w4],
        "w4, inputs 40 %": [*thinned, w4],
        "w4, weights 50 %": [pruned, w4],
        "w4, weights 50 %, inputs 40 %": [*thinned, pruned, w4],
        "LaRoSA, w4, inputs 50 %": [*rotated, w4],
        "LaRoSA, w4, weights 50 %, inputs 50 %": [*rotated, pruned, w4],
    }


SIZES: dict[str, dict[str, int]] = {
    "0.3M": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4},
    "1M": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4},
    "2M": {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 6},
    "1M deep": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 16, "num_attention_heads": 4},
    "2M wide": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2, "num_attention_heads": 8},
}
"""Parameters with a vocabulary of 2048, embedding included. Heads of 16 or 32, half as many for keys."""
LAW_SIZES = ["0.3M", "1M", "2M"]
RATES = {"0.3M": 2e-3, "1M": 2e-3, "2M": 1e-3, "1M deep": 2e-3, "2M wide": 1e-3}
"""Learning rates: of 1e-3, 2e-3 and 4e-3 the best for a dense model, as far as tried; 2e-3 makes 2M worse than 1M."""
VOCABULARY = 2048
PYTHON = ("stdlib", "numpy", "networkx", "pydantic", "rich", "click", "jinja2", "pytest")
DATA: dict[str, Any] = {"sources": [{"name": name} for name in PYTHON]}
CONTEXT, BATCH = 256, 4
SCRATCH = {
    "context": CONTEXT, "batch": BATCH, "optimizer": "adamw", "schedule": "wsd",
    "warmup_steps": 50, "decay_fraction": 0.25, "betas": [0.9, 0.95], "weight_decay": 0.1, "precision": "fp32",
    "compile": False, "evaluate_every": 100, "evaluate_windows": 64, "checkpoint_every": 200,
}  # fmt: skip
CONTINUED = SCRATCH | {"context": 512, "batch": 2, "learning_rate": 3e-4, "schedule": "linear", "warmup_steps": 10}


def q_sparse(share: float, **settings: Any) -> dict[str, Any]:
    return {"q_sparse": {"share": share, "activation": "relu2"} | settings}


SCRATCH_METHODS: dict[str, list[dict[str, Any]]] = {
    "dense": [],
    "Top-K 70 %": [q_sparse(0.3)],
    "no straight-through": [q_sparse(0.3, straight_through=False)],
    "ReLU": [{"q_sparse": {"kind": "none", "activation": "relu"}}],
    "ReLU² alone": [q_sparse(0.0, kind="none")],
    "b1.58 dense": [{"bitnet": {}}],
    "b1.58 Top-K 70 %": [{"bitnet": {}}, q_sparse(0.3)],
    "Top-K 16 of 32": [q_sparse(0.5, block=32)],
    "Top-K 50 %": [q_sparse(0.5)],
    "Top-K 70 %, rescaled": [q_sparse(0.3, rescale=True)],
    "Top-K 70 %, grown": [q_sparse(0.3, begin=0.1, end=0.6)],
    "Top-K 50 % by fours": [q_sparse(0.5, unit=4)],
    "Top-K 50 %, no straight-through": [q_sparse(0.5, straight_through=False)],
    "Top-K 20 %": [q_sparse(0.8)],
    "Top-K 20 %, no straight-through": [q_sparse(0.8, straight_through=False)],
}


def scratch_recipe(
    size: str, methods: list[dict[str, Any]], tokens: int, rate: float | None = None, seed: int = 0
) -> dict[str, Any]:
    shape = SIZES[size]
    heads = shape["num_attention_heads"]
    head = {"num_key_value_heads": heads // 2, "head_dim": shape["hidden_size"] // heads}
    return {
        "model": shape | head,
        "data": DATA | {"vocab_size": VOCABULARY},
        "training": SCRATCH | {"tokens": tokens, "learning_rate": rate or RATES[size]},
        "methods": methods,
        "seed": seed,
    }


ROTATED = {"Top-K 70 %, rotated half-way": q_sparse(0.3), "ReLU² alone, rotated half-way": q_sparse(0.0, kind="none")}
"""What the second half of a run is trained with."""


def rotated_recipe(size: str, tokens: int, method: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """Half of the tokens dense with ReLU², then in principal components (LaRoSA), head apart from embedding; the
    rate falls as in one run, and rises anew for the second half."""
    whole = scratch_recipe(size, [], tokens, seed=seed)
    half = tokens // 2
    fall = SCRATCH["decay_fraction"] * tokens / (tokens - half)
    return whole | {
        "stages": [
            {
                "name": "dense",
                "training": {"tokens": half, "schedule": "constant"},
                "methods": [q_sparse(0.0, kind="none")],
            },
            {
                "name": "sparse",
                "prune": {"steps": [{"larosa": {}}], "calibration": {"samples": 64, "length": CONTEXT}},
                "training": {"tokens": tokens - half, "decay_fraction": fall},
                "methods": [method],
            },
        ]
    }


def continued_recipes() -> dict[str, list[dict[str, Any]]]:
    """Method → training methods."""
    methods: dict[str, list[dict[str, Any]]] = {"dense": []}
    methods |= {f"Top-K, {share:.0%} dropped": [{"q_sparse": {"share": share}}] for share in (0.4, 0.5, 0.6)}
    methods["Top-K by fours, 50% dropped"] = [{"q_sparse": {"share": 0.5, "unit": 4}}]
    methods["Top-K, rescaled, 50% dropped"] = [{"q_sparse": {"share": 0.5, "rescale": True}}]
    methods["ReLUfication"] = [{"q_sparse": {"kind": "none", "activation": "relu"}}]
    methods["ReLUfication, stage 2"] = [{"q_sparse": {"kind": "relu", "activation": "relu"}}]
    methods["no straight-through, 50% dropped"] = [{"q_sparse": {"share": 0.5, "straight_through": False}}]
    for method in [key for key in methods if key == "dense" or key.startswith("Top-K")]:
        methods[f"LaRoSA, {method}"] = methods[method]
    return methods


def untrained_recipes() -> dict[str, list[dict[str, Any]]]:
    """Method → compression steps on the dense model that was trained as long."""
    found: dict[str, list[dict[str, Any]]] = {}
    for share in (0.4, 0.5, 0.6):
        found[f"TEAL, {share:.0%} dropped"] = [{"teal": {"share": share}}]
        found[f"LaRoSA, {share:.0%} dropped"] = [{"larosa": {}}, {"teal": {"share": share, "kind": "top_k"}}]
    return found
