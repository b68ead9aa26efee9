"""Keys and values in pages, shared between sequences that begin alike.

A page holds the keys and values of ``PAGE`` consecutive tokens in all layers. What they are depends on those tokens and
on all before them, so a full page may serve every sequence that begins with the same tokens. A **prefix tree** knows
the full pages: an edge is the ``PAGE`` tokens of a page, and a path from the root is the beginning of a text. A new
sequence takes the longest path of its prompt as it is, and computes only the rest.

Pages in use have references. Pages that nobody uses stay in the tree until memory is wanted; then those go first that
were not used for longest, the ends of paths before their beginnings.

A model with a recurrent state (convolutions, linear attention) can go on from a page only where its state at the end of
that page was kept too, as a **snapshot**. Snapshots are numbered places in the engine's memory. A state may be as
large as hundreds of pages, so that there are fewer places than pages; the snapshot that was not used for longest goes
first, or one that whoever asks says to be worth little.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Sequence
from itertools import count

import numpy as np
from numpy.typing import NDArray

PAGE = 16
"""Tokens of a page: the engine's block of keys (kKeyBlock)."""


class Node:
    """A full page in the prefix tree."""

    __slots__ = ("children", "key", "page", "parent", "refs", "snapshot", "used")

    def __init__(self, parent: Node | None, key: tuple[int, ...], page: int):
        self.parent, self.key, self.page = parent, key, page
        self.children: dict[tuple[int, ...], Node] = {}
        self.refs = 0
        """Sequences that run along this page."""
        self.used = 0
        """When it was last used; counts up."""
        self.snapshot: int | None = None


class KVCache:
    """Which of an engine's ``pages`` hold what; the numbers, not the memory.

    ``snapshots``: how many recurrent states are kept. ``recurrent``: the model has such a state, even where there is no
    room for a snapshot: then no sequence goes on from what others computed.
    """

    def __init__(self, pages: int, snapshots: int = 0, recurrent: bool = False):
        self.pages, self.snapshots = pages, snapshots
        self.recurrent = recurrent or snapshots > 0
        self._free = list(range(pages))[::-1]
        self._free_snapshots = list(range(snapshots))[::-1]
        self._snapshots: OrderedDict[Node, None] = OrderedDict()
        self._root = Node(None, (), -1)
        self._clock = count(1)
        # Leaves that nobody uses: (when used, tie-breaker, node); entries whose node was used since are passed over.
        self._leaves: list[tuple[int, int, Node]] = []
        self.cached = 0
        """Pages in the tree."""
        self.idle = 0
        """Of these, pages that no sequence uses."""

    @property
    def free(self) -> int:
        """Pages that hold nothing."""
        return len(self._free)

    @property
    def available(self) -> int:
        """Pages that a sequence could get: free ones, and those that can be evicted."""
        return len(self._free) + self.idle

    def allocate(self) -> int | None:
        """A page for new tokens; evicts one where none is free. None: all are in use."""
        if not self._free and not self._evict():
            return None
        return self._free.pop()

    def release(self, page: int) -> None:
        """Gives back a page that is not in the tree."""
        self._free.append(page)

    def match(self, tokens: Sequence[int], limit: int) -> list[Node]:
        """The longest known path of full pages along the first ``limit`` tokens; of a recurrent model, up to the last
        page whose state was kept."""
        path = self._path(tokens, limit)
        while self.recurrent and path and path[-1].snapshot is None:
            path.pop()
        return path

    def known(self, tokens: Sequence[int], limit: int) -> int:
        """Of the first ``limit`` tokens, those whose full pages are known, with a state or without."""
        return len(self._path(tokens, limit)) * PAGE

    def _path(self, tokens: Sequence[int], limit: int) -> list[Node]:
        path: list[Node] = []
        node = self._root
        for start in range(0, limit - PAGE + 1, PAGE):
            found = node.children.get(tuple(tokens[start : start + PAGE]))
            if found is None:
                break
            path.append(found)
            node = found
        return path

    def enter(self, parent: Node | None, tokens: Sequence[int], page: int) -> tuple[Node, bool]:
        """Puts a full page under its parent (None: the root); of equal pages the first stays.

        Returns the node and whether it holds ``page``. The node counts one more reference.
        """
        parent = parent or self._root
        key = tuple(tokens)
        node = parent.children.get(key)
        mine = node is None
        if node is None:
            node = Node(parent, key, page)
            parent.children[key] = node
            self.cached += 1
            self.idle += 1  # until the reference below
        self.hold(node)
        return node, mine

    def hold(self, node: Node) -> None:
        """One more reference."""
        if node.refs == 0:
            self.idle -= 1
        node.refs += 1

    def drop(self, node: Node) -> None:
        """One reference less."""
        node.refs -= 1
        node.used = next(self._clock)
        if node.refs == 0:
            self.idle += 1
            self._offer(node)

    def snapshot(self, node: Node, instead: Node | None = None) -> int | None:
        """A place for the state at the end of a page; None where it has one already or there is none to be had. Where
        all are taken, that of ``instead``, or else of the one that was not used for longest."""
        if node.snapshot is not None:
            self.use_snapshot(node)
            return None
        if not self._free_snapshots and self._snapshots:
            least = instead if instead is not None and instead.snapshot is not None else next(iter(self._snapshots))
            self._forget_snapshot(least)
        if not self._free_snapshots:
            return None
        node.snapshot = self._free_snapshots.pop()
        self._snapshots[node] = None
        return node.snapshot

    def use_snapshot(self, node: Node) -> None:
        """A sequence goes on from the state at the end of a page."""
        self._snapshots.move_to_end(node)

    def clear(self) -> int:
        """Forgets all pages that nobody uses; returns how many."""
        count_ = 0
        while self._evict():
            count_ += 1
        return count_

    def _offer(self, node: Node) -> None:
        """For eviction, where it is a leaf."""
        if node.children or node is self._root:
            return
        if len(self._leaves) > 4 * self.cached + 64:
            self._leaves = [entry for entry in self._leaves if self._current(entry)]
            heapq.heapify(self._leaves)
        heapq.heappush(self._leaves, (node.used, next(self._clock), node))

    def _current(self, entry: tuple[int, int, Node]) -> bool:
        used, _, node = entry
        return used == node.used and node.refs == 0 and not node.children and node.parent is not None

    def _evict(self) -> bool:
        """The leaf that was not used for longest; False where there is none."""
        while self._leaves:
            entry = heapq.heappop(self._leaves)
            if not self._current(entry):
                continue
            node, parent = entry[2], entry[2].parent
            assert parent is not None
            del parent.children[node.key]
            node.parent = None
            self._forget_snapshot(node)
            self._free.append(node.page)
            self.cached -= 1
            self.idle -= 1
            if parent.refs == 0:
                self._offer(parent)
            return True
        return False

    def _forget_snapshot(self, node: Node) -> None:
        if node.snapshot is not None:
            self._free_snapshots.append(node.snapshot)
            node.snapshot = None
            del self._snapshots[node]


class PageTable:
    """The pages of one running sequence, and its row of the engine's table.

    ``row``: ``[context / PAGE]`` page numbers, −1 where there is none.
    """

    def __init__(self, cache: KVCache, row: NDArray[np.int32]):
        self._cache, self._row = cache, row
        self._pages: list[int] = []
        self._own: list[bool] = []
        """Per page: it is not in the tree, or another page stands there for it."""
        self._path: list[Node] = []
        """Full pages in the tree, from the beginning; also where the own page is another one."""
        row[:] = -1

    @property
    def node(self) -> Node | None:
        """The last full page."""
        return self._path[-1] if self._path else None

    def begin(self, tokens: Sequence[int], limit: int) -> int:
        """Takes what the cache knows of the first ``limit`` tokens; returns how many tokens that are."""
        for node in self._cache.match(tokens, limit):
            self._cache.hold(node)
            self._path.append(node)
            self._append(node.page, False)
        return len(self._pages) * PAGE

    def missing(self, length: int) -> int:
        """Pages that ``length`` tokens need beyond those that are there."""
        return max(0, -(-length // PAGE) - len(self._pages))

    def grow(self, length: int) -> bool:
        """Room for ``length`` tokens; False where not all of the pages were to be had (those that were are kept)."""
        for _ in range(self.missing(length)):
            page = self._cache.allocate()
            if page is None:
                return False
            self._append(page, True)
        return True

    def enter(self, tokens: Sequence[int], length: int) -> None:
        """The first ``length`` tokens are computed: full pages among them become known to others."""
        while (len(self._path) + 1) * PAGE <= length:
            index = len(self._path)
            part = tokens[index * PAGE : (index + 1) * PAGE]
            node, mine = self._cache.enter(self.node, part, self._pages[index])
            self._path.append(node)
            self._own[index] = not mine

    def close(self) -> None:
        """Gives everything back; what is in the tree stays known."""
        for node in reversed(self._path):
            self._cache.drop(node)
        for page, own in zip(self._pages, self._own, strict=True):
            if own:
                self._cache.release(page)
        self._pages, self._own, self._path = [], [], []
        self._row[:] = -1

    def _append(self, page: int, own: bool) -> None:
        self._row[len(self._pages)] = page
        self._pages.append(page)
        self._own.append(own)
