from itertools import combinations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from tulle.core.masks import Pattern, follows, keep_pattern, keep_share, largest, largest_plain, within
from tulle.errors import UserError


@given(seed=st.integers(0, 999), n=st.integers(1, 40), data=st.data())
@settings(max_examples=60, deadline=None)
def test_largest_is_a_stable_sort(seed: int, n: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(0, n))
    # Few distinct values, so that ties are the rule.
    scores = torch.randint(0, 4, (3, n), generator=torch.Generator().manual_seed(seed)).float()
    mask = largest(scores, keep)
    for row, kept in zip(scores.tolist(), mask.tolist(), strict=True):
        order = sorted(range(n), key=lambda i: (-row[i], i))
        assert [i for i in range(n) if kept[i]] == sorted(order[:keep])


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.77, 0.999])
def test_counts_are_exact(sparsity: float) -> None:
    scores = torch.rand(7, 33, generator=torch.Generator().manual_seed(0))
    assert int((~keep_share(scores, sparsity, "layer")).sum()) == round(sparsity * 7 * 33)
    assert (~keep_share(scores, sparsity, "row")).sum(1).tolist() == [round(sparsity * 33)] * 7


@given(seed=st.integers(0, 999), m=st.integers(1, 8), data=st.data())
@settings(max_examples=60, deadline=None)
def test_pattern_is_the_best_of_all(seed: int, m: int, data: st.DataObject) -> None:
    """Against every choice of N of M: none retains more, and each stripe keeps exactly N."""
    n = data.draw(st.integers(1, m))
    scores = torch.rand(2, 3 * m, generator=torch.Generator().manual_seed(seed))
    mask = keep_pattern(scores, Pattern(n, m)).reshape(2, 3, m)
    assert bool((mask.sum(-1) == n).all())
    stripes = scores.reshape(2, 3, m)
    best = torch.stack([stripes[..., list(c)].sum(-1) for c in combinations(range(m), n)]).amax(0)
    torch.testing.assert_close((stripes * mask).sum(-1), best, rtol=1e-6, atol=0)


def test_pattern_ties_go_to_the_lower_index() -> None:
    assert keep_pattern(torch.zeros(1, 8), Pattern(2, 4)).tolist() == [[True, True, False, False] * 2]


def test_pattern_text() -> None:
    assert Pattern.parse(" 2 : 4") == Pattern(2, 4)
    assert str(Pattern(8, 16)) == "8:16" and Pattern(1, 4).sparsity == 0.75
    with pytest.raises(UserError, match="quote it in YAML"):
        Pattern.parse(124)  # type: ignore[arg-type]  # YAML reads an unquoted 2:4 as 124 in base 60


def test_within_never_prefers_what_is_pruned() -> None:
    scores, mask = torch.zeros(1, 4), torch.tensor([[False, True, True, False]])
    assert torch.equal(largest(within(scores, mask), 2), mask)


def test_follows_by_hand() -> None:
    """At most N of every M entries of a row; the number of rows does not matter, columns that are no stripes do."""
    fits = torch.tensor(
        [[1, 1, 0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 1, 0, 0, 1], [1, 0, 1, 0, 0, 1, 1, 0]], dtype=torch.bool
    )
    assert follows(fits, Pattern(2, 4)) and follows(fits, Pattern(4, 8)) and not follows(fits, Pattern(1, 4))
    assert not follows(fits.T.contiguous(), Pattern(2, 4))  # 3 columns
    assert not follows(fits[:, :6].repeat(4, 1), Pattern(2, 4))  # 12 rows of 6
    one_more = fits.clone()
    one_more[1, 5] = True
    assert not follows(one_more, Pattern(2, 4)) and follows(one_more, Pattern(3, 4))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1000), rows=st.integers(1, 4), columns=st.integers(1, 300), levels=st.integers(1, 400))
def test_compiled_search_for_the_largest_is_the_plain_one(seed: int, rows: int, columns: int, levels: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, levels, (rows, columns), generator=generator).float() / 7  # few levels: many ties
    scores[torch.rand(rows, columns, generator=generator) < 0.05] = torch.inf
    for signs in (scores, scores - 1, -scores):  # zeros of both signs, and scores below 0
        for keep in {1, columns // 2, columns - 1} - {0, columns}:
            assert torch.equal(largest(signs, keep), largest_plain(signs, keep))
