"""What the service tells of its load: numbers and fixed words, nothing that a client sent."""

from __future__ import annotations

from typing import Final

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

__all__ = ["METRICS_TYPE", "Metrics"]

METRICS_TYPE: Final = CONTENT_TYPE_LATEST

_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_ROWS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


class Metrics:
    """Counters in a registry of their own, in Prometheus' text form.

    Labels are names of routes, status codes and reasons out of fixed lists: no model input or
    output, no ticket, no client's name or address ever becomes one.
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "cenacle_requests", "Requests answered.", ("route", "status"), registry=self._registry
        )
        self._refusals = Counter(
            "cenacle_refusals", "Requests refused.", ("reason",), registry=self._registry
        )
        self._seconds = Histogram(
            "cenacle_request_seconds",
            "Seconds from a request's head to its answer.",
            ("route",),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._rows = Histogram(
            "cenacle_batch_rows",
            "Rows that the public front computed together.",
            buckets=_ROWS,
            registry=self._registry,
        )
        self.waiting = Gauge(
            "cenacle_waiting", "Queries that were taken and not answered.", registry=self._registry
        )
        self.ready = Gauge(
            "cenacle_ready", "Whether an enclave serves: 1 or 0.", registry=self._registry
        )
        self.reloads = Counter(
            "cenacle_reloads", "Contracts that replaced another.", registry=self._registry
        )

    def answered(self, route: str, status: int, seconds: float) -> None:
        """One request was answered; ``route`` is a name of the service's, never a path."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def refused(self, reason: str) -> None:
        """A request was refused for a reason out of a fixed list."""
        self._refusals.labels(reason).inc()

    def batch(self, rows: int) -> None:
        """The front computed a batch."""
        self._rows.observe(rows)

    def page(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)
