import torch

from oracles.problems import layer, state, statistics
from tulle.core.grid import Grid
from tulle.methods.quantize.round_to_nearest import RoundToNearest, round_to_nearest


def test_codes_by_hand() -> None:
    w = torch.tensor([[7.0, -3.4, 0.6, 0.0], [-14.0, 1.0, 3.1, 14.0]])
    q = round_to_nearest(w, Grid(4))
    assert q.scale.tolist() == [[1.0], [2.0]]
    assert q.codes.tolist() == [[7, -3, 1, 0], [-7, 0, 2, 7]]  # halves go to even
    q = round_to_nearest(torch.tensor([[-1.0, 0.0, 2.0, 14.0]]), Grid(4, symmetric=False))
    assert (q.scale.item(), q.zero.item(), q.codes.tolist()) == (1.0, 1.0, [[0, 1, 3, 15]])


def test_each_code_is_the_nearest_of_all() -> None:
    w, _ = layer(4, 16)
    q = round_to_nearest(w, Grid(3, 4, symmetric=False))
    points = (torch.arange(8.0) - q.zero[..., None]) * q.scale[..., None]
    nearest = (w.reshape(4, 4, 4, 1) - points[:, :, None, :]).abs().amin(-1).reshape(4, 16)
    torch.testing.assert_close((w - q.dequantise()).abs(), nearest, rtol=0, atol=1e-6)


def test_pruned_entries_do_not_widen_the_grid() -> None:
    w, x = layer(4, 16)
    linear = state(w)
    linear.mask = torch.ones_like(w, dtype=torch.bool)
    linear.mask[:, 3] = False
    w[:, 3] = 100.0
    linear.weight = w
    RoundToNearest(bits=4, clip_search=5).apply_linear(linear, statistics(x))
    assert not linear.weight[:, 3].any() and linear.quantised is not None and linear.quantised.scale.max() < 1
