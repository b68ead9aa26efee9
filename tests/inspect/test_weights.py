"""Statistics of weights, on weights whose statistics are known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from checkpoints import write_checkpoint
from tiny_models import write_model
from tulle.inspect.weights import inspect_model, rounding_error, weight_statistics
from tulle.models.checkpoint import Checkpoint


def test_kurtosis_of_known_distributions() -> None:
    two_values = torch.tensor([1.0, -1.0]).repeat(64, 32)
    assert weight_statistics(two_values)["kurtosis"] == pytest.approx(1.0)
    gaussian = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    # Standard error of the kurtosis: sqrt(24/n) = 0.01.
    assert weight_statistics(gaussian)["kurtosis"] == pytest.approx(3.0, abs=0.03)


def test_pruned_weights_count_as_sparsity_only() -> None:
    weight = torch.tensor([2.0, 0.0, -2.0, 0.0]).repeat(8, 8)
    found = weight_statistics(weight)
    assert (found["sparsity"], found["std"], found["kurtosis"]) == (0.5, 2.0, pytest.approx(1.0))


def test_outlier_channels() -> None:
    weight = torch.ones(4, 9)
    weight[2, 3], weight[1, 5] = -8.0, 4.0
    found = weight_statistics(weight)
    assert (found["absmax"], found["outlier_ratio"], found["outlier_channels"]) == (8.0, 8.0, 1)  # 4 is not above 4


def test_an_all_zero_weight_has_statistics() -> None:
    assert weight_statistics(torch.zeros(4, 8))["outlier_ratio"] == 0.0
    assert rounding_error(torch.zeros(4, 8)) == 0.0


def test_rounding_error() -> None:
    on_the_grid = torch.arange(-7.0, 8.0).repeat(3, 1)
    assert rounding_error(on_the_grid) == 0.0
    # A step of 8/7 of max|w| = 8: 1 becomes 8/7, all others are exact.
    weight = torch.tensor([[8.0, 1.0]])
    step = float((torch.tensor(8.0) / 7).bfloat16())
    expected = ((7 * step - 8) ** 2 + (step - 1) ** 2) / 65
    assert rounding_error(weight) == pytest.approx(expected, rel=1e-5)


def test_dense_model(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", dtype=torch.bfloat16)
    found = inspect_model(tmp_path / "model")
    assert len(found["linears"]) == 7 * found["architecture"]["blocks"] == 21
    assert found["totals"]["bits_per_weight"] == 16
    assert found["totals"]["bytes"] == Checkpoint.open(tmp_path / "model").bytes
    assert found["totals"]["bytes"] == found["totals"]["linear_bytes"] + sum(x["bytes"] for x in found["others"])
    assert all(0 < x["rounding_error"] < 0.05 for x in found["linears"])


def test_packed_model_is_seen_dequantised(tmp_path: Path) -> None:
    dense = write_model(tmp_path / "packed", {"all": {"bits": 4, "group_size": 32, "sparse": True}})
    found = inspect_model(tmp_path / "packed")
    weights = dict(dense.named_parameters())
    for linear in found["linears"]:
        weight = weights[linear["name"] + ".weight"].detach()
        assert linear["absmax"] == float(weight.abs().max())
        assert linear["sparsity"] == pytest.approx(float((weight == 0).double().mean()), abs=1e-12)
        assert (linear["bits"], linear["group_size"], linear["rounding_error"]) == (4, 32, None)
