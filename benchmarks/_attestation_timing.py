"""Verification of genuine evidence, timed with empty caches and with full ones."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from types import ModuleType

from cenacle.attestation.claims import Evidence
from cenacle.attestation.registry import Verifier

__all__ = ["verify_ms"]


def verify_ms(
    kinds: Sequence[tuple[Verifier, Evidence]],
    when: datetime,
    rounds: int,
    caches: Sequence[ModuleType],
) -> dict[str, float]:
    """Medians of CPU milliseconds by kind; ``... again`` with the certificates seen before.

    Args:
        when: the moment to judge at.
        caches: modules whose caches of certificates are emptied before each round.
    """

    def forget() -> None:
        for module in caches:
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()

    found = {}
    for verifier, evidence in kinds:

        def run(verifier: Verifier = verifier, evidence: Evidence = evidence) -> object:
            return verifier.inspect(evidence, when)

        found[verifier.kind] = _median_ms(run, forget, rounds)
        found[f"{verifier.kind} again"] = _median_ms(run, lambda: None, rounds)
    return found


def _median_ms(run: Callable[[], object], before: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        before()
        start = time.thread_time()
        run()
        times.append(time.thread_time() - start)
    return round(statistics.median(times) * 1e3, 3)
