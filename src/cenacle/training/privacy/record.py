"""What the engine did, for whoever accounts for it.

Facts, not a guarantee: turning them into epsilon at a delta is an accountant's work. Equal
consecutive steps are one :class:`Event` with a count.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

__all__ = ["Event", "Record", "Sampling"]


@dataclass(frozen=True)
class Sampling:
    """How the examples of a step were chosen.

    Attributes:
        kind: ``poisson`` (each example independently with probability ``rate``),
            ``shuffled`` (fixed-size batches of a permutation: no amplification by Poisson
            sampling may be claimed), or ``unknown`` (whatever the caller passed; only
            accounting without amplification is truthful).
        population: examples in the data set, if known.
        rate: probability of each example, for ``poisson``.
        batch_size: examples of a batch, for ``shuffled``.
        secure: the choice was made by a cryptographic generator with a fresh key.
    """

    kind: str = "unknown"
    population: int | None = None
    rate: float | None = None
    batch_size: int | None = None
    secure: bool = True


@dataclass(frozen=True)
class Event:
    """Equal steps in a row.

    Attributes:
        sampling: how the examples were chosen.
        clipping: ``flat`` or ``per_layer``.
        clip: C, the most that one example moves the released sum, in L2 norm over all
            parameters.
        group_clips: per group of parameters its own bound; their root of summed squares is C.
        noise_multiplier: standard deviation of the noise on the sum, divided by C.
        count_noise_multiplier: standard deviation of the noise on the count of examples
            within the clipping norm (sensitivity 1/2), where the norm adapts; else ``None``.
            The count is a second release in the same step.
        steps: how many.
        secure: noise came from a cryptographic generator with a fresh key; ``False`` in
            tests, which choose the key.
        neighbours: ``add_or_remove_one``: data sets that differ by one example's presence.
    """

    sampling: Sampling
    clipping: str
    clip: float
    group_clips: tuple[float, ...]
    noise_multiplier: float
    count_noise_multiplier: float | None = None
    steps: int = 1
    secure: bool = True
    neighbours: str = "add_or_remove_one"

    def to_dict(self) -> dict[str, Any]:
        """JSON-serializable fields."""
        return asdict(self)


@dataclass
class Record:
    """Every step that released something, in order."""

    events: list[Event] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """All steps."""
        return sum(event.steps for event in self.events)

    def add(self, event: Event) -> None:
        """Append one step."""
        if self.events and replace(self.events[-1], steps=1) == replace(event, steps=1):
            last = self.events[-1]
            self.events[-1] = replace(last, steps=last.steps + event.steps)
        else:
            self.events.append(event)
