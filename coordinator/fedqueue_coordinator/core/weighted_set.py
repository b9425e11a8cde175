"""A sorted set whose keys have weights, in which a position of the running sum of weights finds a key.

It is a treap (Seidel & Aragon, Algorithmica 16, 1996): a search tree by key and a heap by priority, in which each node
knows the weight of its subtree. A key's priority is its hash. Adding, removing, and each query take O(log n) expected
time for n keys. No result depends on the priorities.
"""

from __future__ import annotations

from typing import Generic, TypeVar

K = TypeVar("K", bound=tuple[object, ...])


class _Node(Generic[K]):
    __slots__ = ("key", "left", "priority", "right", "total", "weight")

    def __init__(self, key: K, weight: int) -> None:
        self.key, self.weight, self.priority = key, weight, hash(key)
        self.total = weight  # of the subtree
        self.left: _Node[K] | None = None
        self.right: _Node[K] | None = None

    def sum_up(self) -> None:
        left, right = self.left, self.right
        self.total = self.weight + (left.total if left else 0) + (right.total if right else 0)


class WeightedSet(Generic[K]):
    """Keys, which are tuples without equals, each with a weight: an integer of at least 0."""

    def __init__(self) -> None:
        self._root: _Node[K] | None = None

    def add(self, key: K, weight: int) -> None:
        """Add a key that is not in the set."""
        new = _Node(key, weight)
        parent: _Node[K] | None = None
        node = self._root
        while node is not None and node.priority >= new.priority:
            node.total += weight
            parent, node = node, node.left if key < node.key else node.right
        new.left, new.right = _split(node, key)
        new.sum_up()
        self._hang(parent, key, new)

    def remove(self, key: K) -> None:
        """Remove a key; raises KeyError for one that is not in the set."""
        path = []
        node = self._root
        while node is not None and node.key != key:
            path.append(node)
            node = node.left if key < node.key else node.right
        if node is None:
            raise KeyError(key)
        for above in path:
            above.total -= node.weight
        self._hang(path[-1] if path else None, key, _join(node.left, node.right))

    def _hang(self, parent: _Node[K] | None, key: K, child: _Node[K] | None) -> None:
        """Make `child` the child of `parent` on the side of `key`; the root if `parent` is None."""
        if parent is None:
            self._root = child
        elif key < parent.key:
            parent.left = child
        else:
            parent.right = child

    def first(self) -> K | None:
        """Return the lowest key; None if the set is empty."""
        node = self._root
        while node is not None and node.left is not None:
            node = node.left
        return node.key if node else None

    def last_below(self, bound: K) -> K | None:
        """Return the highest key below `bound`; None without such a key."""
        node, found = self._root, None
        while node is not None:
            if node.key < bound:
                found, node = node.key, node.right
            else:
                node = node.left
        return found

    def weight_below(self, bound: K) -> int:
        """Return the sum of the weights of all keys below `bound`."""
        node, total = self._root, 0
        while node is not None:
            if node.key < bound:
                total += node.weight + (node.left.total if node.left else 0)
                node = node.right
            else:
                node = node.left
        return total

    def at(self, position: float) -> K | None:
        """Return the lowest key for which the weights up to and including its own exceed `position`, at least 0.

        Returns None if the sum of all weights is not above `position`.
        """
        node, before = self._root, 0
        while node is not None:
            left = before + (node.left.total if node.left else 0)
            if left > position:
                node = node.left
            elif left + node.weight > position:
                return node.key
            else:
                before = left + node.weight
                node = node.right
        return None


def _split(node: _Node[K] | None, key: K) -> tuple[_Node[K] | None, _Node[K] | None]:
    """Split a subtree into the keys below `key`, and the others."""
    if node is None:
        return None, None
    if node.key < key:
        node.right, above = _split(node.right, key)
        node.sum_up()
        return node, above
    below, node.left = _split(node.left, key)
    node.sum_up()
    return below, node


def _join(below: _Node[K] | None, above: _Node[K] | None) -> _Node[K] | None:
    """Join two subtrees; all keys of the first are lower."""
    if below is None or above is None:
        return below or above
    if below.priority > above.priority:
        below.right = _join(below.right, above)
        below.sum_up()
        return below
    above.left = _join(below, above.left)
    above.sum_up()
    return above
