"""For every possible cut of a model: what it hides, and what it costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from cenacle.cut.costs import node_costs, peak_bytes
from cenacle.cut.cutting import Cutter
from cenacle.cut.onnx_model import OnnxModel
from cenacle.cut.specs import TensorSpec

__all__ = ["Choice", "Refusal", "Suggestion", "suggest"]

_NEAR: Final = 0.1


@dataclass(frozen=True)
class Choice:
    """One cut, before it is made.

    Attributes:
        layer: its name for ``--at``: the outermost of the layers after which it is the same cut.
        same: the other layers.
        nodes: of the front.
        parameters, parameter_bytes: learned weights in the tail: numbers and bytes.
        share: of all learned numbers of the model, 0 to 1.
        macs: multiply-accumulates of the tail for one row; see :mod:`cenacle.cut.costs`.
        macs_share: of those of the whole model, 0 to 1.
        memory: bytes that the tail needs for one row: its weights, and its activations at their
            peak.
        crossing: the tensors that cross, and ``crossing_bytes`` of one row.
        exact: whether all sizes were known; otherwise the numbers are lower bounds.
        good: whether no other cut hides as many numbers for no more computation in the tail and
            no more bytes crossing; nor nearly as many (90 %) for little more computation (110 %)
            and fewer bytes. A cut that hides nothing is never good.
        accuracy: after retraining, 0 to 1, if it was measured; see
            :meth:`Suggestion.with_accuracy`.
    """

    layer: str
    same: tuple[str, ...]
    nodes: int
    parameters: int
    parameter_bytes: int
    share: float
    macs: int
    macs_share: float
    memory: int
    crossing: tuple[TensorSpec, ...]
    crossing_bytes: int
    exact: bool
    good: bool = False
    accuracy: float | None = None

    def to_fields(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "layer": self.layer,
            "same": list(self.same),
            "parameters": self.parameters,
            "parameter_bytes": self.parameter_bytes,
            "share": self.share,
            "macs": self.macs,
            "macs_share": self.macs_share,
            "memory": self.memory,
            "crossing": [spec.to_fields() for spec in self.crossing],
            "crossing_bytes": self.crossing_bytes,
            "exact": self.exact,
            "good": self.good,
            "accuracy": self.accuracy,
        }


@dataclass(frozen=True)
class Refusal:
    """A layer after which the model cannot be cut, and why."""

    layer: str
    why: str


@dataclass(frozen=True)
class Suggestion:
    """All cuts of a model, from the one that hides most, and the layers that are none."""

    choices: tuple[Choice, ...]
    refused: tuple[Refusal, ...]

    def with_accuracy(self, measured: Mapping[str, float | None]) -> Suggestion:
        """The same with accuracies after retraining, by the names of layers."""
        return replace(
            self,
            choices=tuple(replace(one, accuracy=measured.get(one.layer)) for one in self.choices),
        )

    def __iter__(self) -> Iterator[Choice]:
        return iter(self.choices)

    def __len__(self) -> int:
        return len(self.choices)


def suggest(
    model: OnnxModel,
    *,
    secret: Sequence[str] = (),
    shapes: Mapping[str, Sequence[int | None]] | None = None,
) -> Suggestion:
    """Every possible cut at a layer of any depth, each once, in topological order.

    Args:
        secret: patterns of names of weights that must lie in the tail.
        shapes: sizes of inputs for axes that the model leaves open, so that costs are exact.

    Raises:
        InputError: a pattern that matches no weight, or a shape that does not fit.
    """
    cutter = Cutter(model, secret=secret, shapes=shapes)
    costs = node_costs(cutter.index, cutter.sizes)
    by_front: dict[frozenset[int], list[str]] = {}
    for name, members in cutter.layers.members.items():
        if cutter.neutral.nodes.issuperset(members):
            continue  # arithmetic of sizes, which belongs to no part
        by_front.setdefault(cutter.front_of(members), []).append(name)
    choices: list[Choice] = []
    refused: list[Refusal] = []
    for front, names in sorted(
        by_front.items(), key=lambda item: (len(item[0]), max(item[0], default=0))
    ):
        fault = cutter.fault(front)
        if fault is None:
            choices.append(_choice(cutter, front, names, costs))
        else:
            refused += [Refusal(name, fault) for name in names]
    pairs = zip(choices, _good(choices), strict=True)
    return Suggestion(tuple(replace(one, good=good) for one, good in pairs), tuple(refused))


def _choice(
    cutter: Cutter, front: frozenset[int], names: list[str], costs: list[int | None]
) -> Choice:
    index, sizes = cutter.index, cutter.sizes
    plan = cutter.plan(front)
    tail = [i for i in plan.tail if i not in plan.added]
    within = set(tail)
    learned = [index.weights[name] for name in index.parameters]
    hidden = [weight for weight in learned if not within.isdisjoint(weight.readers)]
    parameters = sum(weight.elements for weight in hidden)
    total = sum(weight.elements for weight in learned)
    macs = sum(costs[i] or 0 for i in tail)
    whole = sum(cost or 0 for cost in costs)
    stored = sum(w.size for w in index.weights.values() if not within.isdisjoint(w.readers))
    peak, known = peak_bytes(index, tail, plan.crossing, sizes)
    crossing = [sizes.size(name) for name in plan.crossing]
    first, *others = sorted(names, key=lambda name: (name.count("."), names.index(name)))
    return Choice(
        layer=first,
        same=tuple(others),
        nodes=len(front),
        parameters=parameters,
        parameter_bytes=sum(weight.size for weight in hidden),
        share=parameters / total if total else 0.0,
        macs=macs,
        macs_share=macs / whole if whole else 0.0,
        memory=stored + peak,
        crossing=tuple(sizes.spec(name) for name in plan.crossing),
        crossing_bytes=sum(size or 0 for size in crossing),
        exact=known and None not in crossing and all(costs[i] is not None for i in tail),
    )


def _good(choices: Sequence[Choice]) -> list[bool]:
    hidden, macs, crossing, nodes = (
        np.array([getattr(one, name) for one in choices], dtype=np.float64)
        for name in ("parameters", "macs", "crossing_bytes", "nodes")
    )
    found = []
    for k, one in enumerate(choices):
        no_worse = (hidden >= hidden[k]) & (macs <= macs[k]) & (crossing <= crossing[k])
        equal = (hidden == hidden[k]) & (macs == macs[k]) & (crossing == crossing[k])
        near = (
            (crossing < crossing[k])
            & (hidden >= (1 - _NEAR) * hidden[k])
            & (macs <= (1 + _NEAR) * macs[k])
        )
        # Of equal cuts the first stands for all.
        better = (no_worse & ~equal) | (equal & (nodes < nodes[k])) | near
        found.append(one.parameters > 0 and not better.any())
    return found
