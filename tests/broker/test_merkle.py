"""The tree against published vectors, a naive definition, and altered proofs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cenacle.broker import merkle
from cenacle.errors import InputError, ProofError

VECTORS = Path(__file__).parents[1] / "vectors" / "rfc9162"


def cases(name: str) -> list[Any]:
    return [
        pytest.param(case, id=case["name"])
        for case in json.loads((VECTORS / f"{name}.json").read_text())
    ]


def published_leaves() -> list[bytes]:
    return [
        bytes.fromhex(leaf) for leaf in json.loads((VECTORS / "tree.json").read_text())["leaves"]
    ]


def published(name: str) -> list[Any]:
    """The good proofs about the eight leaves."""
    return [c for c in cases(name) if c.values[0]["valid"] and "/happy-path" in c.values[0]["name"]]


class Nodes(dict[tuple[int, int], bytes]):
    """A reader in memory, filled by appending."""

    def __init__(self, leaves: list[bytes]) -> None:
        super().__init__()
        for size, data in enumerate(leaves):
            for node in merkle.append(size, merkle.leaf_hash(data), self):
                assert (node.level, node.index) not in self
                self[node.level, node.index] = node.hash

    def get(self, level: int, index: int) -> bytes:  # type: ignore[override]
        return self[level, index]


def naive_root(leaves: list[bytes]) -> bytes:
    """MTH as RFC 9162, 2.1.1 words it."""
    if not leaves:
        return merkle.EMPTY_ROOT
    if len(leaves) == 1:
        return merkle.leaf_hash(leaves[0])
    split = 1
    while split * 2 < len(leaves):
        split *= 2
    return merkle.node_hash(naive_root(leaves[:split]), naive_root(leaves[split:]))


def test_published_roots() -> None:
    vectors = json.loads((VECTORS / "tree.json").read_text())
    leaves = [bytes.fromhex(leaf) for leaf in vectors["leaves"]]
    nodes = Nodes(leaves)
    frontier = merkle.Frontier()
    for size, expected in enumerate(vectors["roots"]):
        assert merkle.root(size, nodes).hex() == expected
        assert frontier.root().hex() == expected
        if size < len(leaves):
            frontier, _ = frontier.append(merkle.leaf_hash(leaves[size]))


@pytest.mark.parametrize("case", cases("inclusion"))
def test_published_inclusion(case: dict[str, Any]) -> None:
    def verify() -> None:
        merkle.verify_inclusion(
            bytes.fromhex(case["leaf_hash"]),
            case["index"],
            case["size"],
            [bytes.fromhex(step) for step in case["path"]],
            bytes.fromhex(case["root"]),
        )

    if case["valid"]:
        verify()
    else:
        with pytest.raises(ProofError):
            verify()


@pytest.mark.parametrize("case", cases("consistency"))
def test_published_consistency(case: dict[str, Any]) -> None:
    def verify() -> None:
        merkle.verify_consistency(
            case["first"],
            case["second"],
            bytes.fromhex(case["first_root"]),
            bytes.fromhex(case["second_root"]),
            [bytes.fromhex(step) for step in case["path"]],
        )

    # One published case has roots of 12 bytes that it does not care about; we do.
    lengths = {len(case["first_root"]), len(case["second_root"])}
    if case["valid"] and lengths == {64}:
        verify()
    else:
        with pytest.raises(ProofError):
            verify()


@pytest.mark.parametrize("case", published("inclusion"))
def test_we_make_the_published_inclusion_proofs(case: dict[str, Any]) -> None:
    nodes = Nodes(published_leaves())
    path = merkle.inclusion_proof(case["index"], case["size"], nodes)
    assert [step.hex() for step in path] == case["path"]


@pytest.mark.parametrize("case", published("consistency"))
def test_we_make_the_published_consistency_proofs(case: dict[str, Any]) -> None:
    nodes = Nodes(published_leaves())
    path = merkle.consistency_proof(case["first"], case["second"], nodes)
    assert [step.hex() for step in path] == case["path"]


LEAVES = [bytes([i]) * (i % 5) for i in range(70)]
NODES = Nodes(LEAVES)


def test_every_small_tree_is_the_defined_one() -> None:
    for size in range(len(LEAVES) + 1):
        assert merkle.root(size, NODES) == naive_root(LEAVES[:size])
        assert merkle.Frontier.load(size, NODES).root() == naive_root(LEAVES[:size])


def test_every_inclusion_proof_of_small_trees_verifies() -> None:
    for size in range(1, 41):
        root = merkle.root(size, NODES)
        for index in range(size):
            path = merkle.inclusion_proof(index, size, NODES)
            merkle.verify_inclusion(merkle.leaf_hash(LEAVES[index]), index, size, path, root)


def test_every_consistency_proof_of_small_trees_verifies() -> None:
    roots = [merkle.root(size, NODES) for size in range(len(LEAVES) + 1)]
    for second in range(41):
        for first in range(second + 1):
            path = merkle.consistency_proof(first, second, NODES)
            merkle.verify_consistency(first, second, roots[first], roots[second], path)


def test_proofs_read_few_nodes() -> None:
    class Counting:
        def __init__(self) -> None:
            self.reads = 0

        def get(self, level: int, index: int) -> bytes:
            self.reads += 1
            return bytes(32)

    size = 2**40 - 1
    for index in (0, size // 2, size - 1):
        reader = Counting()
        merkle.inclusion_proof(index, size, reader)
        assert reader.reads <= 2 * 40
    reader = Counting()
    merkle.consistency_proof(2**39 + 12345, size, reader)
    assert reader.reads <= 2 * 40


@st.composite
def inclusion(draw: st.DrawFn) -> tuple[int, int, list[bytes]]:
    size = draw(st.integers(1, len(LEAVES)))
    index = draw(st.integers(0, size - 1))
    return index, size, list(merkle.inclusion_proof(index, size, NODES))


@settings(max_examples=200, deadline=None)
@given(inclusion(), st.data())
def test_an_altered_inclusion_proof_fails(
    proof: tuple[int, int, list[bytes]], data: st.DataObject
) -> None:
    index, size, path = proof
    leaf, root = merkle.leaf_hash(LEAVES[index]), merkle.root(size, NODES)
    merkle.verify_inclusion(leaf, index, size, path, root)
    kinds = ["leaf", "root", "longer", "index"]
    if path:
        kinds += ["flip", "shorter", "drop-first"]
    if len(set(path)) > 1:
        kinds.append("swap")
    match data.draw(st.sampled_from(kinds)):
        case "leaf":
            leaf = merkle.leaf_hash(b"another")
        case "root":
            root = merkle.leaf_hash(b"another")
        case "longer":
            path.insert(
                data.draw(st.integers(0, len(path))), data.draw(st.binary(min_size=32, max_size=32))
            )
        case "index":
            index = data.draw(st.integers(0, size + 3).filter(lambda i: i != index))
        case "flip":
            at = data.draw(st.integers(0, len(path) - 1))
            bit = data.draw(st.integers(0, 255))
            path[at] = (int.from_bytes(path[at]) ^ 1 << bit).to_bytes(32)
        case "shorter":
            path.pop()
        case "drop-first":
            path.pop(0)
        case "swap":
            path.reverse()
            if path == list(merkle.inclusion_proof(index, size, NODES)):
                return
    with pytest.raises(ProofError):
        merkle.verify_inclusion(leaf, index, size, path, root)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, len(LEAVES)), st.data())
def test_an_altered_consistency_proof_fails(second: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, second))
    roots = [merkle.root(first, NODES), merkle.root(second, NODES)]
    path = list(merkle.consistency_proof(first, second, NODES))
    merkle.verify_consistency(first, second, roots[0], roots[1], path)
    kinds = ["longer"] + (["first-root"]) + (["second-root"] if first else [])
    if path:
        kinds += ["flip", "shorter"]
    match data.draw(st.sampled_from(kinds)):
        case "longer":
            path.insert(
                data.draw(st.integers(0, len(path))), data.draw(st.binary(min_size=32, max_size=32))
            )
        case "first-root":
            roots[0] = merkle.leaf_hash(b"another")
        case "second-root":
            roots[1] = merkle.leaf_hash(b"another")
        case "flip":
            at = data.draw(st.integers(0, len(path) - 1))
            bit = data.draw(st.integers(0, 255))
            path[at] = (int.from_bytes(path[at]) ^ 1 << bit).to_bytes(32)
        case "shorter":
            path.pop(data.draw(st.integers(0, len(path) - 1)))
    with pytest.raises(ProofError):
        merkle.verify_consistency(first, second, roots[0], roots[1], path)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.binary(max_size=8), min_size=2, max_size=40), st.data())
def test_a_rewritten_log_has_no_consistency_proof(leaves: list[bytes], data: st.DataObject) -> None:
    first = data.draw(st.integers(1, len(leaves)))
    changed = list(leaves)
    changed[data.draw(st.integers(0, first - 1))] += b"!"
    honest, rewritten = Nodes(leaves), Nodes(changed)
    with pytest.raises(ProofError):
        merkle.verify_consistency(
            first,
            len(leaves),
            merkle.root(first, honest),
            merkle.root(len(leaves), rewritten),
            merkle.consistency_proof(first, len(leaves), rewritten),
        )


ROOT = merkle.root(8, NODES)
LEAF = merkle.leaf_hash(LEAVES[3])
PATH = merkle.inclusion_proof(3, 8, NODES)


@pytest.mark.parametrize(
    ("index", "size", "path", "leaf"),
    [
        (-1, 8, PATH, LEAF),
        (8, 8, PATH, LEAF),
        (3, 0, PATH, LEAF),
        (3, 2**63, PATH, LEAF),
        (True, 8, PATH, LEAF),
        (3.0, 8, PATH, LEAF),
        ("3", 8, PATH, LEAF),
        (3, 8, (PATH[0][:31], *PATH[1:]), LEAF),
        (3, 8, (PATH[0].hex(), *PATH[1:]), LEAF),
        (3, 8, (None, *PATH[1:]), LEAF),
        (3, 8, PATH, LEAF[:-1]),
        (3, 8, PATH, b""),
        (3, 8, (), LEAF),
        (3, 8, PATH * 30, LEAF),
    ],
)
def test_hostile_inclusion_proofs_are_refused(index: Any, size: Any, path: Any, leaf: Any) -> None:
    with pytest.raises(ProofError):
        merkle.verify_inclusion(leaf, index, size, path, ROOT)


@pytest.mark.parametrize(("index", "size"), [(8, 8), (-1, 8), (0, 0), (0, -1), (0, 2**63)])
def test_no_proof_of_what_is_not_there(index: int, size: int) -> None:
    with pytest.raises(InputError):
        merkle.inclusion_proof(index, size, NODES)


@pytest.mark.parametrize(("first", "second"), [(9, 8), (-1, 8), (0, 2**63)])
def test_no_consistency_of_what_is_not_there(first: int, second: int) -> None:
    with pytest.raises(InputError):
        merkle.consistency_proof(first, second, NODES)


def test_a_frontier_must_have_its_peaks() -> None:
    whole = merkle.Frontier.load(7, NODES)
    with pytest.raises(ProofError):
        merkle.Frontier(7, whole.nodes[:-1])
    with pytest.raises(ProofError):
        merkle.Frontier(6, whole.nodes)


def test_leaves_and_nodes_cannot_be_confused() -> None:
    left, right = merkle.leaf_hash(b"a"), merkle.leaf_hash(b"b")
    assert merkle.leaf_hash(left + right) != merkle.node_hash(left, right)
