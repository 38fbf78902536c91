"""What offloading costs: seconds in the enclave, at the workers and waiting, and bytes.

Seconds in the enclave are what its own thread spent on a layer: all the time in it, less
waiting for workers, less what a worker inside this process computed. Workers' seconds are
what they report, and are not trusted.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from cenacle.accelerators.protocol import Accelerator
from cenacle.documents.offload_profile import OffloadProfile

__all__ = ["Cost", "Phase", "Profile"]

Phase = Literal["forward", "backward"]
_MAX_EVENTS: Final = 50_000
_MAX_NAME: Final = 500
_MAX_SECONDS: Final = 1e9


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


class _Event(NamedTuple):
    """A span on a track. Times are those of ``time.perf_counter``."""

    site: str
    kind: Phase | Literal["wait", "compute"]
    track: str
    begin: float
    end: float
    size: int


class Profile:
    """Costs by layer, and a timeline. Not for use by two threads at once.

    Args:
        events: how many spans the timeline keeps, the last ones; costs count all.
    """

    def __init__(self, *, events: int = _MAX_EVENTS) -> None:
        self.layers: dict[str, Cost] = {}
        self._events: deque[_Event] = deque(maxlen=events)
        self._noted = 0
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
            self._note(_Event(site, phase, "enclave", begin, end, 0))
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
        self._note(_Event(site, "wait", "enclave", begin, end, 0))
        self._note(_Event(site, "compute", accelerator.name, end - seconds, end, size))

    def reset(self) -> None:
        """Forget everything, e.g. after a step that warmed up."""
        self.layers.clear()
        self._events.clear()
        self._noted = 0
        self._begin = time.perf_counter()

    def _note(self, event: _Event) -> None:
        self._noted += 1
        self._events.append(event)

    # ------------------------------------------------------------------ for people

    def rows(self) -> list[dict[str, Any]]:
        """One row a layer, in the order of first use."""
        return [{"layer": site, **asdict(cost)} for site, cost in self.layers.items()]

    def document(self) -> OffloadProfile:
        """The costs as they go into files. Names are cut to 500 characters."""
        rows = [
            {
                name: round(min(max(value, 0.0), _MAX_SECONDS), 6)
                if isinstance(value, float)
                else value
                for name, value in row.items()
            }
            | {"layer": row["layer"][:_MAX_NAME] or "model"}
            for row in self.rows()
        ]
        left_out = self._noted - len(self._events)
        return OffloadProfile.from_fields({"layers": rows, "events_left_out": left_out})

    def table(self) -> str:
        """Costs by layer and in all, as text: milliseconds, megabytes, number of results."""
        return self.document().table()

    def trace(self) -> dict[str, Any]:
        """The timeline as Chrome's Trace Event Format, which Perfetto opens too.

        One track for the enclave, with its waits, and one for each worker. The costs by layer
        are in it as metadata.
        """
        tracks = {name: number for number, name in enumerate(dict.fromkeys(
            event.track for event in self._events
        ))}  # fmt: skip
        events: list[dict[str, Any]] = [
            {"ph": "M", "pid": 1, "tid": number, "name": "thread_name", "args": {"name": name}}
            for name, number in tracks.items()
        ]
        events += [self._traced(event, tracks[event.track]) for event in self._events]
        return {
            "traceEvents": events,
            "displayTimeUnit": "ms",
            "otherData": self.document().to_fields(),
        }

    def _traced(self, event: _Event, track: int) -> dict[str, Any]:
        # A worker's word on how long it took must not bring times before the beginning.
        begin = max(event.begin, self._begin)
        traced: dict[str, Any] = {
            "ph": "X",
            "pid": 1,
            "tid": track,
            "name": event.site if event.kind == "compute" else f"{event.site} {event.kind}",
            "cat": event.kind,
            "ts": round((begin - self._begin) * 1e6, 3),
            "dur": round(max(event.end - begin, 0.0) * 1e6, 3),
        }
        if event.kind == "compute":
            traced["args"] = {"bytes_received": event.size}
        return traced

    def write_trace(self, path: Path) -> None:
        """Write :meth:`trace` as JSON, whole or not at all.

        It shows names of layers, times and sizes, and no content of any tensor.

        Raises:
            InputError: the path cannot be written to.
            UnavailableError: the disk has no room.
        """
        from cenacle.sealing.disk import AtomicFile, disk_errors, pwrite_all  # noqa: PLC0415

        with AtomicFile(path) as file:
            with disk_errors(f"write {path}"):
                pwrite_all(file.fd, json.dumps(self.trace(), allow_nan=False).encode(), 0)
            file.commit()
