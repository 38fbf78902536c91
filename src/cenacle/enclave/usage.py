"""What an enclave that serves counts: numbers of queries, and nothing of what is in them."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

from cenacle.documents.receipt import ServingRecord
from cenacle.enclave.serving_messages import FailureCode

__all__ = ["Usage"]


class Usage:
    """Counts since this enclave began to serve. Several threads may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answered = Counter[str]()
        self._refused = Counter[str]()
        self._rows = 0
        self._batches = 0
        self._attested = 0

    def batch(self) -> None:
        """One batch was computed."""
        with self._lock:
            self._batches += 1

    def answered(self, rows: int, *, sealed: bool) -> None:
        """One query was answered."""
        with self._lock:
            self._answered["sealed" if sealed else "plain"] += 1
            self._rows += rows

    def refused(self, code: FailureCode) -> None:
        """One query got an error."""
        with self._lock:
            self._refused[code] += 1

    def attested(self) -> None:
        """One client got evidence."""
        with self._lock:
            self._attested += 1

    def report(self) -> dict[str, Any]:
        """For the job's output of kind ``metrics``."""
        with self._lock:
            return {
                "queries": self._answered.total(),
                "rows": self._rows,
                "plain": self._answered["plain"],
                "sealed": self._answered["sealed"],
                "batches": self._batches,
                "attestations": self._attested,
                "refused": dict(sorted(self._refused.items())),
            }

    def record(self) -> ServingRecord:
        """For the receipt."""
        with self._lock:
            return ServingRecord(
                queries=self._answered.total(),
                rows=self._rows,
                sealed=self._answered["sealed"],
                refused=self._refused.total(),
            )
