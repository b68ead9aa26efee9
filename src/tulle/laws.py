"""The scaling law of sparsely activated models, its fit and its optimum (Wang et al. 2024, "Q-Sparse", section 3).

    L(N, S) = E + A(S)/N^α,   A(S) = B + C·exp(β/(1 − S))          (equations 11 and 12)

L is the loss in nats per token, N the number of parameters, S the share of inputs (so of parameters) that a token does
not read. Constants are found as in Hoffmann et al. 2022: the Huber loss (δ = 1e-3) of log L̂ − log L, minimised by
L-BFGS from a grid of starting points. Here all are positive by construction, in logarithms:

    log L̂ = logsumexp(e, b − α·log N, c + β/(1 − S) − α·log N),   E = exp(e), B = exp(b), C = exp(c).

Printed constants are for N as the paper counts it; units of N only change B and C.

**Optimum.** Of models with N_a = N·(1 − S) active parameters, the best S minimises A(S)·(1 − S)^α, whatever N_a is
(equation 14). For B = 0 that is S* = 1 − β/α, and 0 where β > α. A budget of FLOPs per token, F = 2·N_a, is the same.

Intervals are of a bootstrap over runs: each replicate is fitted from the optimum of the whole.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize, minimize_scalar
from scipy.special import huber

from tulle.errors import UserError

Array = NDArray[np.float64]
DELTA = 1e-3
"""δ of the Huber loss."""
MOST_SPARSE = 0.99
"""The optimum is looked for below this."""
START = {
    "log_e": (-2.0, -0.7, -0.1),
    "log_b": (-6.0, -1.5),
    "log_c": (-2.0, -0.5),
    "alpha": (0.1, 0.3),
    "log_beta": (-4.0, -2.0, -0.5),
}
"""Grid of starting points, E, B and C relative to the mean loss, N to the mean size: all combinations are tried for
``TRIED`` iterations, and the ``PURSUED`` best until they stop."""
TRIED, PURSUED = 60, 6
ALIASES = {
    "size": ("size", "n", "parameters", "params"),
    "sparsity": ("sparsity", "s"),
    "loss": ("loss", "l", "held_out_loss"),
    "weights": ("weights", "precision"),
}


@dataclass(frozen=True)
class Run:
    """One trained model: parameters N, sparsity S in [0, 1), loss L in nats per token."""

    size: float
    sparsity: float
    loss: float
    weights: str = ""
    """Their precision: runs of one kind share a law."""

    def __post_init__(self) -> None:
        if not self.size > 0 or not 0 <= self.sparsity < 1 or not 0 < self.loss < math.inf:
            raise UserError(
                f"expected a run with size > 0, sparsity in [0, 1) and a finite loss > 0, found {self.size}, "
                f"{self.sparsity}, {self.loss}; correct its row"
            )


@dataclass(frozen=True)
class Law:
    """The constants of L(N, S)."""

    e: float
    b: float
    c: float
    alpha: float
    beta: float

    def amplitude(self, sparsity: Any) -> Any:
        """A(S)."""
        return self.b + self.c * np.exp(self.beta / (1 - np.asarray(sparsity, dtype=np.float64)))

    def loss(self, size: Any, sparsity: Any) -> Any:
        """L(N, S) in nats per token."""
        return self.e + self.amplitude(sparsity) / np.asarray(size, dtype=np.float64) ** self.alpha

    def loss_of_active(self, active: Any, sparsity: Any) -> Any:
        """L of the model of which a token reads ``active`` parameters."""
        return self.loss(np.asarray(active, dtype=np.float64) / (1 - np.asarray(sparsity, dtype=np.float64)), sparsity)

    @property
    def optimum(self) -> float:
        """S* that minimises A(S)·(1 − S)^α on [0, 0.99]."""

        # With u = 1/(1 − S): log A(u) − α·log u. Its derivative's sign is that of β·C·e^(βu)·u − α·(B + C·e^(βu)),
        # which rises with u wherever it is 0 from below: one minimum.
        def cost(sparsity: float) -> float:
            return float(np.log(self.amplitude(sparsity)) + self.alpha * np.log1p(-sparsity))

        found = minimize_scalar(cost, bounds=(0.0, MOST_SPARSE), method="bounded", options={"xatol": 1e-10})
        ends = [(cost(s), s) for s in (0.0, MOST_SPARSE)]
        return float(min([(float(found.fun), float(found.x)), *ends])[1])

    def to_json(self) -> dict[str, float]:
        return {"E": self.e, "B": self.b, "C": self.c, "alpha": self.alpha, "beta": self.beta}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Law:
        """Inverse of :meth:`to_json`. Raises ``UserError``."""
        try:
            found = cls(*(float(data[key]) for key in ("E", "B", "C", "alpha", "beta")))
        except (KeyError, TypeError, ValueError):
            raise UserError(f"expected a law with E, B, C, alpha and beta, found {data!r}; fit one first") from None
        if min(found.e, found.b, found.beta) < 0 or found.c <= 0 or found.alpha <= 0:
            raise UserError(f"expected E, B and beta of 0 or more, C and alpha above 0, found {found.to_json()}")
        return found


PUBLISHED = {
    "full precision": Law(1.86, 0.01, 1.89, 0.10, 0.05),
}
"""The paper's table 1, as printed: two digits."""
STATED_OPTIMA = {"full precision": 0.4558, "1.58-bit": 0.6125}
"""What the paper says follows from its own unrounded constants. The printed ones give 0.502 in full precision."""


@dataclass(frozen=True)
class Fit:
    """A law, its error, and the laws of bootstrap replicates."""

    law: Law
    error: float
    """Mean Huber loss of log L̂ − log L."""
    runs: tuple[Run, ...]
    replicates: tuple[Law, ...] = ()

    def interval(self, values: Iterable[float], level: float = 0.95) -> tuple[float, float]:
        """The central interval of the replicates' values."""
        low, high = np.quantile(np.array(list(values)), [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "law": self.law.to_json(),
            "error": self.error,
            "optimum": self.law.optimum,
            "runs": [dataclasses.asdict(run) for run in self.runs],
            "replicates": [law.to_json() for law in self.replicates],
        }
        if self.replicates:
            constants = [law.to_json() for law in self.replicates]
            found["intervals"] = {key: self.interval(c[key] for c in constants) for key in self.law.to_json()}
            found["optimum_interval"] = self.interval(law.optimum for law in self.replicates)
        return found

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Fit:
        """Inverse of :meth:`to_json`. Raises ``UserError``."""
        if not isinstance(data.get("law"), Mapping):
            raise UserError("expected the JSON that tulle law fit writes, found no law in it; run tulle law fit first")
        runs = tuple(Run(r["size"], r["sparsity"], r["loss"], r.get("weights", "")) for r in data.get("runs", ()))
        replicates = tuple(Law.from_json(law) for law in data.get("replicates", ()))
        return cls(Law.from_json(data["law"]), float(data.get("error", math.nan)), runs, replicates)


def fit(runs: Sequence[Run], replicates: int = 0, seed: int = 0) -> Fit:
    """The law of ``runs`` and ``replicates`` bootstrap laws. Raises ``UserError`` for runs that cannot determine it."""
    sizes, sparsities = {run.size for run in runs}, {run.sparsity for run in runs}
    if len(runs) < 5 or len(sizes) < 2 or len(sparsities) < 2:
        raise UserError(
            f"expected at least 5 runs of at least 2 sizes and 2 sparsities for 5 constants, found {len(runs)} of "
            f"{len(sizes)} and {len(sparsities)}; add runs"
        )
    n, s, loss = (np.array([getattr(run, key) for run in runs]) for key in ("size", "sparsity", "loss"))
    scale = float(np.exp(np.log(n).mean()))
    data = (np.log(n / scale), 1 / (1 - s), np.log(loss))
    tried = [_descend(np.array(start), data, TRIED) for start in _starts(np.log(loss).mean())]
    tried.sort(key=lambda found: found[1])
    best = min((_descend(start, data) for start, _ in tried[:PURSUED]), key=lambda found: found[1])
    generator = np.random.default_rng(seed)
    laws: list[Law] = []
    while len(laws) < replicates:
        drawn = generator.integers(len(runs), size=len(runs))
        if len({runs[i].size for i in drawn}) < 2 or len({runs[i].sparsity for i in drawn}) < 2:
            continue
        found = _descend(best[0], (data[0][drawn], data[1][drawn], data[2][drawn]))
        laws.append(_law(found[0], scale))
    return Fit(_law(best[0], scale), best[1] / len(runs), tuple(runs), tuple(laws))


def _starts(level: float) -> Iterable[tuple[float, ...]]:
    """Starting points around the mean log loss."""
    for e, b, c, alpha, beta in product(*START.values()):
        yield level + e, level + b, level + c, alpha, beta


def _descend(start: Array, data: tuple[Array, Array, Array], most: int = 1000) -> tuple[Array, float]:
    """The constants (log E, log B, log C, α, log β) from ``start``, and their Σ Huber."""
    options = OPTIONS | {"maxiter": most}
    found = minimize(_objective, start, args=data, jac=True, method="L-BFGS-B", bounds=BOUNDS, options=options)
    return found.x, float(found.fun) / WEIGHT


OPTIONS = {"ftol": 1e-15, "gtol": 1e-10, "maxcor": 20}
BOUNDS = [(-25, 10), (-25, 25), (-25, 25), (1e-4, 3.0), (-12, 3)]
"""Of log E, log B, log C (at the mean size), α and log β."""
WEIGHT = 1e6
"""The objective is scaled up, so that L-BFGS does not stop at its absolute tolerances."""


def _objective(p: Array, log_n: Array, inverse: Array, log_loss: Array) -> tuple[float, Array]:
    """Σ Huber(log L̂ − log L) and its gradient."""
    e, b, c, alpha, log_beta = p
    beta = math.exp(log_beta)
    terms = np.stack([np.full_like(log_n, e), b - alpha * log_n, c + beta * inverse - alpha * log_n])
    largest = terms.max(0)
    predicted = largest + np.log(np.exp(terms - largest).sum(0))
    residual = predicted - log_loss
    share = np.exp(terms - predicted)
    slope = np.clip(residual, -DELTA, DELTA)
    gradient = np.array(
        [
            slope @ share[0],
            slope @ share[1],
            slope @ share[2],
            -slope @ ((share[1] + share[2]) * log_n),
            slope @ (share[2] * inverse) * beta,
        ]
    )
    return WEIGHT * float(huber(DELTA, residual).sum()), WEIGHT * gradient


def _law(p: Array, scale: float) -> Law:
    """Constants for N in parameters from those at N/scale."""
    e, b, c, alpha, log_beta = (float(v) for v in p)
    return Law(math.exp(e), math.exp(b) * scale**alpha, math.exp(c) * scale**alpha, alpha, math.exp(log_beta))


def read_runs(path: Path) -> list[Run]:
    """The runs of a JSON, JSONL or CSV file, in order.

    A JSON file is a list of objects, or an object with such a list under ``runs``. Columns are ``size``, ``sparsity``,
    ``loss`` and, where there are several kinds, ``weights``; others are ignored. Raises ``UserError``.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"expected a file of runs at {path}, found: {error}; check the path") from None
    found: list[Run] = []
    for number, row in enumerate(_rows(path, text), 1):
        if not isinstance(row, Mapping):
            raise UserError(f"expected run {number} of {path.name} as an object, found {row!r}; see tulle law fit -h")
        lowered = {str(key).strip().lower(): value for key, value in row.items()}
        values = {}
        for key, names in ALIASES.items():
            values[key] = next((lowered[name] for name in names if lowered.get(name) not in (None, "")), None)
        precision = str(values.pop("weights") or "")
        try:
            size, sparsity, loss = (float(values[key]) for key in ("size", "sparsity", "loss"))  # type: ignore[arg-type]
        except (TypeError, ValueError):
            raise UserError(
                f"expected numbers for size, sparsity and loss in run {number} of {path.name}, found {values}; "
                "correct that row"
            ) from None
        found.append(Run(size, sparsity, loss, precision))
    if not found:
        raise UserError(f"expected runs in {path}, found none; give rows with size, sparsity and loss")
    return found


def _rows(path: Path, text: str) -> list[Any]:
    try:
        if path.suffix == ".csv":
            return list(csv.DictReader(io.StringIO(text)))
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"expected JSON, JSONL or CSV in {path}, found: {error}; use the suffix of its format"
        ) from None
    content = content.get("runs") if isinstance(content, dict) else content
    if not isinstance(content, list):
        raise UserError(f"expected a list of runs in {path}, found {type(content).__name__}; see tulle law fit --help")
    return content
