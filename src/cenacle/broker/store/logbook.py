"""The writer's memory of the log: its peaks, and what the running transaction appended.

Entries and nodes wait here and reach the database in two batched inserts before the commit.
A closure that fails is undone by :meth:`reset`. What is read back in the same transaction is
found here first, so a proof of an entry just appended needs no query.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cenacle.broker.merkle import Frontier, Node, NodeReader, inclusion_proof
from cenacle.broker.store.rows import LogEntry
from cenacle.broker.store.session import Session

__all__ = ["Logbook", "Mark", "Place"]

Mark = tuple[Frontier, int, int, int]


@dataclass(slots=True)
class Place:
    """Entry ``index`` in a tree of ``size`` entries with the root ``root``: its path there."""

    index: int
    size: int = 0
    root: bytes = b""
    path: tuple[bytes, ...] = ()


class Logbook:
    """Append-only state of one writer over one transaction; :meth:`committed` keeps the peaks."""

    def __init__(self, frontier: Frontier) -> None:
        self._base: Final = {(node.level, node.index): node.hash for node in frontier.nodes}
        self.frontier = frontier
        self.entries: list[LogEntry] = []
        self.places: list[Place] = []
        self._nodes: dict[tuple[int, int], bytes] = {}

    @property
    def size(self) -> int:
        return self.frontier.size

    @property
    def stored(self) -> int:
        """How many entries the database had when the transaction began."""
        return self.size - len(self.entries)

    def append(self, kind: str, body: bytes) -> int:
        entry = LogEntry(self.size, kind, body)
        self.frontier, created = self.frontier.append(entry.leaf_hash)
        self.entries.append(entry)
        for node in created:
            self._nodes[node.level, node.index] = node.hash
        return entry.index

    def find(self, level: int, index: int) -> bytes | None:
        """A node that is here; None: ask the database."""
        return self._nodes.get((level, index)) or self._base.get((level, index))

    def mark(self) -> Mark:
        return self.frontier, len(self.entries), len(self._nodes), len(self.places)

    def reset(self, mark: Mark) -> None:
        """Forget everything since ``mark``."""
        self.frontier, entries, nodes, places = mark
        del self.entries[entries:]
        del self.places[places:]
        while len(self._nodes) > nodes:
            self._nodes.popitem()

    def fill(self, reader: NodeReader) -> None:
        """Tell every place the tree as it is now."""
        if not self.places:
            return
        size, root = self.size, self.frontier.root()
        for place in self.places:
            place.size, place.root = size, root
            place.path = inclusion_proof(place.index, size, reader)

    def flush(self, session: Session) -> None:
        """Write what waits into the transaction, which is about to commit."""
        if not self.entries:
            return
        session.run_many(
            "INSERT INTO log_entries (leaf_index, kind, body, leaf_hash)"
            " VALUES (:leaf_index, :kind, :body, :leaf_hash)",
            [
                {
                    "leaf_index": entry.index,
                    "kind": entry.kind,
                    "body": entry.body,
                    "leaf_hash": self._nodes[0, entry.index],
                }
                for entry in self.entries
            ],
        )
        nodes = [Node(*place, value) for place, value in self._nodes.items() if place[0] > 0]
        if nodes:
            session.run_many(
                "INSERT INTO log_nodes (level, node_index, hash)"
                " VALUES (:level, :node_index, :hash)",
                [
                    {"level": node.level, "node_index": node.index, "hash": node.hash}
                    for node in nodes
                ],
            )
