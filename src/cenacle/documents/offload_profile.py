"""What offloading cost, by layer: the part of a trace file that programs and tables read.

A profile travels inside a file of Chrome's Trace Event Format, under ``otherData``, where
viewers show it as metadata. It is the enclave's own account of seconds and bytes; nothing is
signed, and workers' seconds are what workers said.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import Field, StringConstraints

from cenacle.documents.base import Frozen, Natural
from cenacle.errors import DocumentError

__all__ = ["COLUMNS", "PROFILE_FILE", "LayerCost", "OffloadProfile"]

PROFILE_FILE: Final = "offload.trace.json"
"""The name of a job's profile in the folder of its outputs."""

COLUMNS: Final = (
    ("layer", ""),
    ("enclave", "ms"),
    ("accelerators", "ms"),
    ("waiting", "ms"),
    ("sent", "MB"),
    ("received", "MB"),
    ("results", ""),
)
"""Heading and unit of each column of :meth:`OffloadProfile.cells`."""

Seconds = Annotated[float, Field(ge=0.0, le=1e9)]


class LayerCost(Frozen):
    """Of one layer, in all steps together.

    Attributes:
        enclave_seconds: of the enclave's thread, waiting left out.
        accelerator_seconds: that workers say they computed; at once, if there are several.
        wait_seconds: that the enclave had nothing to do but wait for results.
        products: results that came back.
    """

    layer: Annotated[str, StringConstraints(min_length=1, max_length=500)]
    enclave_seconds: Seconds = 0.0
    accelerator_seconds: Seconds = 0.0
    wait_seconds: Seconds = 0.0
    bytes_sent: Natural = 0
    bytes_received: Natural = 0
    products: Natural = 0

    def cells(self) -> tuple[str, ...]:
        """One line of a table: :data:`COLUMNS`."""
        seconds = (self.enclave_seconds, self.accelerator_seconds, self.wait_seconds)
        sizes = (self.bytes_sent, self.bytes_received)
        return (
            self.layer,
            *(f"{1e3 * value:,.1f}" for value in seconds),
            *(f"{size / 1e6:,.1f}" for size in sizes),
            f"{self.products:,}",
        )


class OffloadProfile(Frozen):
    """Costs of all layers, in the order of first use.

    Attributes:
        events_left_out: spans that happened before those of the timeline, which keeps the last.
    """

    format: Literal["cenacle-offload-profile/1"] = "cenacle-offload-profile/1"
    layers: Annotated[tuple[LayerCost, ...], Field(max_length=100_000)] = ()
    events_left_out: Natural = 0

    @classmethod
    def from_trace(cls, trace: Any) -> OffloadProfile:
        """Of a trace that was parsed from JSON.

        Raises:
            DocumentError: it is another file, or its profile does not validate.
        """
        told = trace.get("otherData") if isinstance(trace, dict) else None
        if not isinstance(told, dict) or "layers" not in told:
            raise DocumentError(
                "a file is no trace of an offloaded job",
                found="no costs by layer in it",
                expected=f"{PROFILE_FILE} of a job, or what Profile.write_trace wrote",
            )
        return cls.from_fields(told)

    @property
    def total(self) -> LayerCost:
        """Of all layers, under the name ``all``."""
        names = [name for name in LayerCost.model_fields if name != "layer"]
        sums = {name: sum(getattr(one, name) for one in self.layers) for name in names}
        return LayerCost.model_construct(layer="all", **sums)

    def cells(self) -> list[tuple[str, ...]]:
        """A table's lines: one a layer, then all of them."""
        return [one.cells() for one in (*self.layers, self.total)]

    def table(self) -> str:
        """The lines with headings, for a terminal or a file; no line break at the end."""
        lines = [*(tuple(part) for part in zip(*COLUMNS, strict=True)), *self.cells()]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(
                cell.rjust(width) if place else cell.ljust(width)
                for place, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )
