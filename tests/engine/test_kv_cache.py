"""The prefix tree and its pages against a plain model: a set of texts that are known."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tulle.engine.kv_cache import PAGE, KVCache, PageTable


def table_of(cache: KVCache, pages: int = 64) -> tuple[PageTable, np.ndarray]:
    row = np.empty(pages, np.int32)
    return PageTable(cache, row), row


def computed(cache: KVCache, tokens: list[int]) -> PageTable:
    table, _ = table_of(cache)
    table.begin(tokens, len(tokens))
    assert table.grow(len(tokens))
    table.enter(tokens, len(tokens))
    return table


def test_a_prompt_takes_the_full_pages_that_are_known() -> None:
    cache = KVCache(16)
    first = list(range(40))
    table = computed(cache, first)
    other, row = table_of(cache)
    assert other.begin([*first[:35], 7, 7], 36) == 2 * PAGE
    assert row.tolist()[:3] == [*table._row[:2], -1]
    third, _ = table_of(cache)
    assert third.begin([*first[:31], 99, 99], 33) == PAGE
    assert table_of(cache)[0].begin(first, PAGE - 1) == 0
    for one in (table, other, third):
        one.close()
    assert (cache.free, cache.cached, cache.idle, cache.available) == (14, 2, 2, 16)


def test_what_was_not_used_for_longest_goes_first_and_ends_before_beginnings() -> None:
    cache = KVCache(4)
    old, new = [1] * PAGE, [2] * 2 * PAGE
    for tokens in (old, new, old):  # the old one is used again
        computed(cache, tokens).close()
    pages = [cache.allocate()]
    assert cache.free == 0 and len(cache.match(new, 32)) == 2
    pages.append(cache.allocate())
    assert len(cache.match(new, 32)) == 1 and len(cache.match(old, 16)) == 1
    pages.append(cache.allocate())
    assert cache.match(new, 32) == [] and len(cache.match(old, 16)) == 1
    pages.append(cache.allocate())
    assert cache.allocate() is None and cache.cached == 0
    assert sorted(p for p in pages if p is not None) == [0, 1, 2, 3]


def test_pages_in_use_stay() -> None:
    cache = KVCache(3)
    held = computed(cache, [5] * 2 * PAGE)
    assert cache.allocate() is not None and cache.allocate() is None
    held.close()
    assert cache.allocate() is not None


def test_a_recurrent_model_goes_on_where_its_state_was_kept() -> None:
    cache = KVCache(8, snapshots=1)
    tokens = list(range(3 * PAGE))
    table = computed(cache, tokens)
    assert cache.match(tokens, 48) == []
    path = table._path
    place = cache.snapshot(path[1])
    assert place == 0 and cache.snapshot(path[1]) is None
    assert cache.match(tokens, 48) == path[:2]
    assert cache.snapshot(path[2]) == 0  # the only place, taken from the older one
    assert cache.match(tokens, 48) == path and cache.match(tokens, 47) == []
    table.close()
    assert cache.clear() == 3 and cache.free == 8
    other = computed(cache, tokens)
    assert cache.snapshot(other._path[0]) == 0


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_pages_are_neither_lost_nor_shared_by_mistake(data: st.DataObject) -> None:
    pages = data.draw(st.integers(4, 12))
    cache = KVCache(pages)
    contents: dict[int, tuple[int, ...]] = {}  # page -> all tokens up to its end
    open_: list[tuple[PageTable, np.ndarray, list[int]]] = []
    for _ in range(data.draw(st.integers(1, 25))):
        if open_ and data.draw(st.booleans()):
            open_.pop(data.draw(st.integers(0, len(open_) - 1)))[0].close()
            continue
        tokens = [t for t in data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=4)) for _ in range(PAGE)]
        tokens += [9] * data.draw(st.integers(0, 3))
        table, row = table_of(cache)
        known = table.begin(tokens, len(tokens))
        for index in range(known // PAGE):
            assert contents[int(row[index])] == tuple(tokens[: (index + 1) * PAGE])
        if not table.grow(len(tokens)):
            table.close()
            continue
        for index in range(known // PAGE, len(tokens) // PAGE):
            contents[int(row[index])] = tuple(tokens[: (index + 1) * PAGE])
        table.enter(tokens, len(tokens))
        open_.append((table, row, tokens))
        used = [int(p) for _, other, _ in open_ for p in other if p >= 0]
        assert cache.free + cache.cached <= pages
        assert cache.available == pages - len({*used})
        for _, other, text in open_:  # what others did has not touched it
            for index in range(len(text) // PAGE):
                assert contents[int(other[index])] == tuple(text[: (index + 1) * PAGE])
    for table, _, _ in open_:
        table.close()
    assert cache.free + cache.cached == pages and cache.idle == cache.cached
    cache.clear()
    assert cache.free == pages
