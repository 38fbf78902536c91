"""The append-only Merkle tree of RFC 9162, section 2.1, with SHA-256. Pure: no I/O.

Only hashes of *perfect* subtrees are ever stored. Node ``(level, index)`` covers the leaves
``[index * 2**level, (index + 1) * 2**level)`` and never changes once it is complete, so a store
needs inserts alone. Roots and proofs of every size, past ones too, take O(log n) reads.

Verification raises :class:`~cenacle.errors.ProofError`; nothing here returns a bool.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from cenacle.errors import InputError, ProofError

__all__ = [
    "EMPTY_ROOT",
    "HASH_BYTES",
    "MAX_SIZE",
    "Frontier",
    "Node",
    "NodeReader",
    "append",
    "consistency_proof",
    "inclusion_proof",
    "leaf_hash",
    "node_hash",
    "peaks",
    "root",
    "verify_consistency",
    "verify_inclusion",
]

HASH_BYTES: Final = 32
EMPTY_ROOT: Final = hashlib.sha256(b"").digest()
MAX_SIZE: Final = 2**63 - 1
"""Tree sizes fit a signed 64-bit integer, as databases keep them."""


class NodeReader(Protocol):
    """Where perfect-subtree hashes are kept."""

    def get(self, level: int, index: int) -> bytes:
        """The 32-byte hash of a complete node; raises ProofError if it is missing."""
        ...


@dataclass(frozen=True, slots=True)
class Node:
    """A perfect subtree: its place and its 32-byte hash."""

    level: int
    index: int
    hash: bytes


def leaf_hash(data: bytes) -> bytes:
    """SHA-256(0x00 || data): RFC 9162, 2.1.1."""
    return hashlib.sha256(b"\x00" + data).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """SHA-256(0x01 || left || right): RFC 9162, 2.1.1."""
    return hashlib.sha256(b"\x01" + left + right).digest()


def peaks(size: int) -> list[tuple[int, int]]:
    """``(level, index)`` of the perfect subtrees that make up a tree, from left to right."""
    return _cover(0, size)


def _cover(start: int, end: int) -> list[tuple[int, int]]:
    """The fewest perfect subtrees that cover ``[start, end)``; ``start`` must be aligned."""
    found = []
    while start < end:
        level = (end - start).bit_length() - 1
        found.append((level, start >> level))
        start += 1 << level
    return found


def _fold(hashes: Sequence[bytes]) -> bytes:
    result = hashes[-1]
    for left in reversed(hashes[:-1]):
        result = node_hash(left, result)
    return result


def _span(start: int, end: int, reader: NodeReader) -> bytes:
    """MTH(D[start:end]); ``start`` must be aligned to the span's largest power of two."""
    return _fold([reader.get(level, index) for level, index in _cover(start, end)])


class Frontier:
    """The right edge of a growing tree: its size and its peaks. Immutable.

    Appending and taking the root need nothing but this, so a writer keeps one in memory.
    """

    __slots__ = ("nodes", "size")

    def __init__(self, size: int = 0, nodes: tuple[Node, ...] = ()) -> None:
        if [(node.level, node.index) for node in nodes] != peaks(size):
            raise ProofError(
                "the peaks of a log's tree do not match its size",
                found=f"{len(nodes)} nodes",
                expected=f"the peaks of a tree of {size} leaves",
            )
        self.size = size
        self.nodes = nodes

    @classmethod
    def load(cls, size: int, reader: NodeReader) -> Frontier:
        """Read the at most 63 peaks of a stored tree."""
        return cls(size, tuple(Node(*place, reader.get(*place)) for place in peaks(size)))

    def append(self, leaf: bytes) -> tuple[Frontier, list[Node]]:
        """Add one leaf hash: the new frontier, and the nodes to store (the leaf first)."""
        node = Node(0, self.size, leaf)
        created = [node]
        kept = list(self.nodes)
        while kept and kept[-1].level == node.level:
            left = kept.pop()
            node = Node(left.level + 1, left.index >> 1, node_hash(left.hash, node.hash))
            created.append(node)
        kept.append(node)
        grown = object.__new__(Frontier)  # the peaks are right by construction
        grown.size, grown.nodes = self.size + 1, tuple(kept)
        return grown, created

    def root(self) -> bytes:
        return _fold([node.hash for node in self.nodes]) if self.nodes else EMPTY_ROOT


def append(size: int, leaf: bytes, reader: NodeReader) -> list[Node]:
    """The nodes that adding one leaf hash to a stored tree of ``size`` leaves completes."""
    return Frontier.load(size, reader).append(leaf)[1]


def root(size: int, reader: NodeReader) -> bytes:
    """MTH(D[0:size]), for any size up to the stored one (RFC 9162, 2.1.1)."""
    _check_size(size)
    return _span(0, size, reader) if size else EMPTY_ROOT


def inclusion_proof(index: int, size: int, reader: NodeReader) -> tuple[bytes, ...]:
    """PATH(index, D[0:size]): RFC 9162, 2.1.3.1.

    Raises:
        InputError: there is no such leaf in a tree of that size.
    """
    _check_size(size)
    if not 0 <= index < size:
        raise InputError("a log has no such entry", found=index, expected=f"0 to {size - 1}")
    path: list[bytes] = []
    start, end = 0, size
    while end - start > 1:
        middle = start + (1 << ((end - start - 1).bit_length() - 1))
        if index < middle:
            path.append(_span(middle, end, reader))
            end = middle
        else:
            path.append(_span(start, middle, reader))
            start = middle
    return tuple(reversed(path))


def consistency_proof(first: int, second: int, reader: NodeReader) -> tuple[bytes, ...]:
    """PROOF(first, D[0:second]): RFC 9162, 2.1.4.1. Empty for ``first`` 0 or ``second``.

    Raises:
        InputError: the first tree is larger than the second.
    """
    _check_size(second)
    if not 0 <= first <= second:
        raise InputError(
            "a log cannot be consistent with a larger, later self",
            found=f"sizes {first} and {second}",
            expected="the earlier size first",
        )
    if first in (0, second):
        return ()
    path: list[bytes] = []
    start, end, complete = 0, second, True
    while first != end:
        middle = start + (1 << ((end - start - 1).bit_length() - 1))
        if first <= middle:
            path.append(_span(middle, end, reader))
            end = middle
        else:
            path.append(_span(start, middle, reader))
            start, complete = middle, False
    if not complete:
        path.append(_span(start, end, reader))
    return tuple(reversed(path))


def verify_inclusion(
    leaf: bytes, index: int, size: int, path: Sequence[bytes], expected_root: bytes
) -> None:
    """Check that leaf hash ``leaf`` is entry ``index`` of the tree: RFC 9162, 2.1.3.2.

    Raises:
        ProofError: the path does not lead from this leaf to this root.
    """
    _check_numbers(index, size)
    _check_hashes(leaf, expected_root, *path)
    if index >= size:
        raise ProofError(
            "an inclusion proof is for an entry outside its tree",
            found=f"entry {index}",
            expected=f"an entry below {size}",
        )
    fn, sn, result = index, size - 1, leaf
    for step in path:
        if sn == 0:
            raise _bad("an inclusion proof is too long", len(path))
        if fn & 1 or fn == sn:
            result = node_hash(step, result)
            while not fn & 1 and fn:
                fn, sn = fn >> 1, sn >> 1
        else:
            result = node_hash(result, step)
        fn, sn = fn >> 1, sn >> 1
    if sn != 0:
        raise _bad("an inclusion proof is too short", len(path))
    if not hmac.compare_digest(result, expected_root):
        raise ProofError(
            "an inclusion proof does not lead to the tree's root",
            found=result.hex(),
            expected=expected_root.hex(),
            remedy="the entry is not in that log, or the proof belongs to another head",
        )


def verify_consistency(
    first: int, second: int, first_root: bytes, second_root: bytes, path: Sequence[bytes]
) -> None:
    """Check that the second tree only appended to the first: RFC 9162, 2.1.4.2.

    A first size of zero is consistent with everything, and its proof is empty.

    Raises:
        ProofError: the proof does not hold.
    """
    _check_numbers(first, second)
    _check_hashes(first_root, second_root, *path)
    if first > second:
        raise ProofError(
            "a log became shorter", found=f"{second} entries", expected=f"{first} or more"
        )
    if first in (0, second):
        _verify_trivial(first, first_root, second, second_root, path)
        return
    if not path:
        raise _bad("a consistency proof is too short", 0)
    steps = list(path)
    if first & (first - 1) == 0:
        steps.insert(0, first_root)
    fn, sn = first - 1, second - 1
    while fn & 1:
        fn, sn = fn >> 1, sn >> 1
    first_result = second_result = steps[0]
    for step in steps[1:]:
        if sn == 0:
            raise _bad("a consistency proof is too long", len(path))
        if fn & 1 or fn == sn:
            first_result = node_hash(step, first_result)
            second_result = node_hash(step, second_result)
            while not fn & 1 and fn:
                fn, sn = fn >> 1, sn >> 1
        else:
            second_result = node_hash(second_result, step)
        fn, sn = fn >> 1, sn >> 1
    if sn != 0:
        raise _bad("a consistency proof is too short", len(path))
    _require_root(first_result, first_root)
    _require_root(second_result, second_root)


def _verify_trivial(
    first: int, first_root: bytes, second: int, second_root: bytes, path: Sequence[bytes]
) -> None:
    """From the empty tree, or from a tree to itself, where RFC 9162 has no proof."""
    if path:
        raise _bad("a consistency proof is too long", len(path))
    if first == 0:
        _require_root(first_root, EMPTY_ROOT)
    if first == second:
        _require_root(first_root, second_root)


def _check_size(size: int) -> None:
    if not 0 <= size <= MAX_SIZE:
        raise InputError("a tree has an impossible size", found=size, expected=f"0 to {MAX_SIZE}")


def _check_numbers(*numbers: int) -> None:
    for number in numbers:
        if type(number) is not int or not 0 <= number <= MAX_SIZE:
            raise ProofError(
                "a log proof has an impossible size or index",
                found=repr(number),
                expected=f"a whole number from 0 to {MAX_SIZE}",
            )


def _check_hashes(*hashes: bytes) -> None:
    for value in hashes:
        if not isinstance(value, bytes) or len(value) != HASH_BYTES:
            raise ProofError(
                "a log proof holds something that is no hash",
                found=f"{len(value)} bytes" if isinstance(value, bytes) else type(value).__name__,
                expected=f"{HASH_BYTES} bytes",
            )


def _bad(what: str, length: int) -> ProofError:
    return ProofError(what, found=f"{length} hashes", expected="one per level of the tree")


def _require_root(found: bytes, expected: bytes) -> None:
    if not hmac.compare_digest(found, expected):
        raise ProofError(
            "a log is not an extension of its earlier self",
            found=found.hex(),
            expected=expected.hex(),
            remedy="keep both signed heads: together they prove that the log was rewritten",
        )
