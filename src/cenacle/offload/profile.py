"""What offloading costs: seconds in the enclave, at the workers and waiting, and bytes.

Seconds in the enclave are what its own thread spent on a layer: all the time in it, less
waiting for workers, less what a worker inside this process computed. Workers' seconds are
what they report, and are not trusted.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

from cenacle.accelerators.protocol import Accelerator

__all__ = ["Cost", "Phase", "Profile"]

Phase = Literal["forward", "backward"]
_MAX_EVENTS: Final = 1_000_000


@dataclass
class Cost:
    """Of one layer. Seconds, bytes, and how many products were asked for."""

    enclave_seconds: float = 0.0
    accelerator_seconds: float = 0.0
    wait_seconds: float = 0.0
    bytes_sent: int = 0
    bytes_received: int = 0
    products: int = 0

    def __iadd__(self, other: Cost) -> Cost:
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self


class Profile:
    """Costs by layer, and a timeline. Not for use by two threads at once."""

    def __init__(self) -> None:
        self.layers: dict[str, Cost] = {}
        self._events: list[tuple[str, str, str, float, float]] = []
        self._begin = time.perf_counter()
        self._outside = 0.0  # seconds within the current span that are not the enclave's

    def cost(self, site: str) -> Cost:
        """A layer's cost so far, to be added to."""
        return self.layers.setdefault(site, Cost())

    @property
    def total(self) -> Cost:
        total = Cost()
        for cost in self.layers.values():
            total += cost
        return total

    @contextmanager
    def span(self, site: str, phase: Phase) -> Iterator[None]:
        """The enclave works on a layer."""
        outer, self._outside = self._outside, 0.0
        begin = time.perf_counter()
        try:
            yield
        finally:
            end = time.perf_counter()
            self.cost(site).enclave_seconds += end - begin - self._outside
            self._note(f"{site} {phase}", "enclave", begin, end)
            self._outside = outer + (end - begin)

    @contextmanager
    def calling(self, accelerator: Accelerator) -> Iterator[None]:
        """Requests to a worker: its own time if it computes within this very call."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            if accelerator.kind == "inline":
                self._outside += time.perf_counter() - begin

    def sent(self, site: str, size: int) -> None:
        self.cost(site).bytes_sent += size

    def waited(
        self, site: str, accelerator: Accelerator, begin: float, seconds: float, size: int
    ) -> None:
        """A result arrived, for which the enclave waited since ``begin``."""
        end = time.perf_counter()
        self._outside += end - begin
        cost = self.cost(site)
        cost.wait_seconds += end - begin
        cost.accelerator_seconds += seconds
        cost.bytes_received += size
        cost.products += 1
        self._note(site, accelerator.name, end - seconds, end)

    def reset(self) -> None:
        """Forget everything, e.g. after a step that warmed up."""
        self.layers.clear()
        self._events.clear()
        self._begin = time.perf_counter()

    def _note(self, name: str, track: str, begin: float, end: float) -> None:
        if len(self._events) < _MAX_EVENTS:
            self._events.append((name, track, "offload", begin, end))

    # ------------------------------------------------------------------ for people

    def rows(self) -> list[dict[str, Any]]:
        """One row a layer, in the order of first use."""
        return [{"layer": site, **asdict(cost)} for site, cost in self.layers.items()]

    def trace(self) -> dict[str, Any]:
        """The timeline as Chrome's Trace Event Format, which Perfetto opens too."""
        tracks = {name: number for number, name in enumerate(dict.fromkeys(
            track for _, track, _, _, _ in self._events
        ))}  # fmt: skip
        events: list[dict[str, Any]] = [
            {"ph": "M", "pid": 1, "tid": number, "name": "thread_name", "args": {"name": name}}
            for name, number in tracks.items()
        ]
        events += [
            {
                "ph": "X",
                "pid": 1,
                "tid": tracks[track],
                "name": name,
                "cat": category,
                "ts": (begin - self._begin) * 1e6,
                "dur": (end - begin) * 1e6,
            }
            for name, track, category, begin, end in self._events
        ]
        return {"traceEvents": events, "displayTimeUnit": "ms"}

    def write_trace(self, path: Path) -> None:
        """Write :meth:`trace` as JSON."""
        path.write_text(json.dumps(self.trace()))
