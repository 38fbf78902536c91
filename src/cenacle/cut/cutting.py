"""Cut a model after a layer: a public front, a confidential tail, and what passes between them.

The front holds the layer and all that it depends on, and nothing else; the tail holds the rest.
So the front is closed under predecessors: no tensor ever passes back from the tail, and the
operations behind the layer (an activation without weights, say) are the tail's.

What a node computes from *sizes and constants alone*, such as the shape for a reshape, belongs to
neither part: each part computes it again for itself. Where that needs the size of a tensor that
does not cross, it is read from one that does, if an axis is known to be equal (the batch).
"""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from cenacle.cut.layers import Layers
from cenacle.cut.neutral import Neutral, Plan
from cenacle.cut.onnx_model import OnnxModel
from cenacle.cut.parts import build_part
from cenacle.cut.shapes import Sizes, infer_sizes
from cenacle.cut.specs import TensorSpec
from cenacle.errors import DataError, InputError

__all__ = ["Cut", "Cutter", "cut"]

_NAMES: Final = 5
_TELLING: Final = 64  # elements of which equal values are no chance


@dataclass(frozen=True)
class Cut:
    """A model in two parts.

    Attributes:
        layer: the last public layer.
        front: what may be given away. Its inputs are the model's, its outputs what crosses.
        tail: what must stay secret. Its inputs are what crosses, its outputs the model's.
        crossing: what the tail reads of the front, in the order of its inputs; inputs of the
            model that the tail reads are among them.
        public_parameters, secret_parameters: names of learned weights on each side.
    """

    layer: str
    front: OnnxModel
    tail: OnnxModel
    crossing: tuple[TensorSpec, ...]
    public_parameters: tuple[str, ...]
    secret_parameters: tuple[str, ...]

    @property
    def batched(self) -> bool:
        """Whether queries can be joined: every crossing tensor's first axis counts rows."""
        return all(spec.batched for spec in self.crossing)


class Cutter:
    """All that is known of a model before it is cut; for many cuts of one model.

    Args:
        model: the model.
        secret: patterns (``head.*``) of names of weights that must lie in the tail.
        shapes: sizes of the model's inputs, for axes that it leaves open.

    Raises:
        InputError: a pattern that matches no weight, or a shape that does not fit.
    """

    def __init__(
        self,
        model: OnnxModel,
        *,
        secret: Sequence[str] = (),
        shapes: Mapping[str, Sequence[int | None]] | None = None,
    ) -> None:
        self.model = model
        self.index = model.index
        self.layers = Layers.of(model)
        self._shapes = shapes
        self.secret = self._matching(secret)
        self._last: tuple[frozenset[int], Plan] | None = None

    @cached_property
    def sizes(self) -> Sizes:
        """Sizes of the model's tensors."""
        return infer_sizes(self.model.proto, self._shapes)

    @cached_property
    def neutral(self) -> Neutral:
        """Nodes that compute from sizes and constants alone."""
        return Neutral(self.index)

    def _matching(self, patterns: Sequence[str]) -> frozenset[str]:
        found: set[str] = set()
        for pattern in patterns:
            names = [n for n in self.index.weights if fnmatch.fnmatchcase(n, pattern)]
            if not names:
                raise InputError(
                    "no weight of the model has a name like the one that must be secret",
                    found=pattern,
                    expected=_among(pattern, self.index.parameters),
                )
            found.update(names)
        return frozenset(found)

    def front_of(self, nodes: Iterable[int]) -> frozenset[int]:
        """The nodes that the given ones depend on, and they themselves, without neutral ones."""
        return frozenset(self.index.ancestors(nodes)) - self.neutral.nodes

    def resolve(self, at: str) -> tuple[int, ...]:
        """The nodes of a layer, of a node or of the node that makes a tensor, by name.

        Raises:
            InputError: there is none; names the nearest ones and the nearest good cut.
        """
        members = self.layers.members.get(at.removesuffix(".*"))
        if members is not None:
            return members
        by_name = [i for i, node in enumerate(self.index.nodes) if node.name == at and at]
        if len(by_name) == 1:
            return (by_name[0],)
        if at in self.index.producer:
            return (self.index.producer[at],)
        inside = self.layers.inside.get(at)
        if inside is not None:
            node = self.index.nodes[inside]
            raise InputError(
                f"{at!r} lies inside {node.op_type} {node.name or node.output[0]!r}, "
                "which cannot be split",
                found=at,
                expected="a layer outside of it",
                remedy=self._advice(len(self.front_of([inside]))),
            )
        near = difflib.get_close_matches(at, self.layers.names, n=_NAMES, cutoff=0.4)
        remedy = f"the nearest names are {', '.join(near)}" if near else "see --suggest"
        good = next((n for n in near if self.is_good(self.front_of(self.layers.members[n]))), None)
        if good is not None:
            remedy += f"; a good cut is --at {good}"
        raise InputError(
            "the model has no such layer",
            found=at[:80],
            expected=f"one of its {len(self.layers.names)} layers",
            remedy=remedy,
        )

    def fault(self, front: frozenset[int]) -> str | None:
        """Why a front must not be cut off here, in words; ``None`` if it may."""
        index, neutral = self.index, self.neutral.nodes
        rest = [i for i in range(len(index.nodes)) if i not in front and i not in neutral]
        if not rest:
            return "nothing would be left for the tail"
        if not front:
            return "nothing would be left for the front"
        for name in sorted(self.layers.atomic):
            own = [i for i in self.layers.members[name] if i not in neutral]
            if own and not front.isdisjoint(own) and not front.issuperset(own):
                return f"layer {name!r} keeps a state or statistics and would be split in two"
        for name, weight in index.weights.items():
            outside = [i for i in weight.readers if i in front]
            if outside and weight.parameter and len(outside) < len(weight.readers):
                return f"weight {name!r} is used on both sides, so it would be public"
        return self._data_fault(front)

    def _data_fault(self, front: frozenset[int]) -> str | None:
        plan = self.plan(front)
        for name in sorted(self.secret):
            if not set(plan.front).isdisjoint(self.index.weights[name].readers):
                return f"weight {name!r} must be secret and would lie in the public front"
        public = set(self._parameters(plan.front)) if self.secret else set()
        for name, twin in self._equal(self.secret, public):
            return f"weight {name!r} must be secret, and equals {twin!r} in the public front"
        for name in plan.crossing:
            weight = self.neutral.forms.get(name)
            if weight is not None:
                return f"weight {weight!r} is used on both sides, so it would be public"
            try:
                self.sizes.spec(name)
            except (InputError, DataError) as error:
                return error.what
        secrets = {output for output in self.index.outputs if output in self.index.weights}
        return f"output {min(secrets)!r} is a weight of the model" if secrets else None

    def plan(self, front: frozenset[int]) -> Plan:
        """Which tensors cross, and which nodes each part computes."""
        if self._last is None or self._last[0] != front:
            self._last = (front, self.neutral.plan(front, self.sizes))
        return self._last[1]

    def cut(self, at: str) -> Cut:
        """Cut after a layer.

        Args:
            at: a layer (with all layers inside it), a node, or a tensor's name.

        Raises:
            InputError: no such layer, or a bad cut; the nearest good cut is named.
            DataError: a part that ``onnx.checker`` does not accept.
        """
        front = self.front_of(self.resolve(at))
        fault = self.fault(front)
        if fault is not None:
            raise InputError(
                f"the model cannot be cut at {at[:80]!r}: {fault}",
                remedy=self._advice(len(front)),
            )
        plan = self.plan(front)
        crossing = tuple(self.sizes.spec(name) for name in plan.crossing)
        types = self.sizes.types
        outputs = tuple(self._output_spec(name) for name in self.index.outputs)
        one = build_part(self.model, plan.front, self.model.inputs, crossing, types)
        two = build_part(self.model, plan.tail, crossing, outputs, types, plan.added)
        public, secret = self._parameters(plan.front), self._parameters(plan.tail)
        return Cut(at, one, two, crossing, public, secret)

    def _parameters(self, nodes: Iterable[int]) -> tuple[str, ...]:
        here = set(nodes)
        weights = self.index.weights
        return tuple(n for n in self.index.parameters if not here.isdisjoint(weights[n].readers))

    def known_weights(self, made: Cut) -> tuple[tuple[str, str], ...]:
        """Weights of a tail that equal one of its front, with that one's name.

        Tied weights that an exporter wrote twice; or tables, such as of positions, that many
        layers have. Small ones, and those of one value throughout, say nothing and do not count.
        """
        return tuple(self._equal(made.secret_parameters, made.public_parameters))

    def _equal(self, secret: Iterable[str], public: Iterable[str]) -> Iterator[tuple[str, str]]:
        by_values = {self._values[n]: n for n in sorted(public) if n in self._values}
        for name in sorted(secret):
            if self._values and self._values.get(name) in by_values:
                yield name, by_values[self._values[name]]

    @cached_property
    def _values(self) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        for tensor in self.model.proto.graph.initializer:
            weight = self.index.weights[tensor.name]
            if weight.parameter and weight.elements >= _TELLING:
                content = tensor.raw_data
                if content != content[: weight.size // weight.elements] * weight.elements:
                    head = f"{tensor.data_type} {list(tensor.dims)}".encode()
                    found[tensor.name] = hashlib.sha256(head + content).digest()
        return found

    def _output_spec(self, name: str) -> TensorSpec:
        return next(spec for spec in self.model.outputs if spec.name == name)

    def _advice(self, size: int) -> str:
        good = self.nearest(size)
        if good is None:
            return "there is no good cut under these conditions; make the whole model the tail"
        return f"the nearest good cut is --at {good}"

    def nearest(self, size: int) -> str | None:
        """The good cut that hides a weight and whose front is nearest to ``size`` nodes.

        Of two equally near ones the earlier.
        """
        fronts = {self.front_of(f): name for name, f in reversed(self.layers.members.items())}
        ranked = sorted(fronts.items(), key=lambda one: (abs(len(one[0]) - size), len(one[0])))
        return next((name for front, name in ranked if self.is_good(front)), None)

    def is_good(self, front: frozenset[int]) -> bool:
        """Whether a front may be cut off and leaves a learned weight to the tail."""
        weights = (self.index.weights[name] for name in self.index.parameters)
        hides = any(not front.issuperset(weight.readers) for weight in weights)
        return hides and self.fault(front) is None


def _among(text: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(text, names, n=_NAMES, cutoff=0.3) or list(names[:_NAMES])
    return f"a name such as {', '.join(near)}" if near else "a model with learned weights"


def cut(model: OnnxModel, at: str, *, secret: Sequence[str] = ()) -> Cut:
    """Cut a model after a layer; see :class:`Cutter`.

    Args:
        at: the last public layer: a layer's name (all layers inside it are meant), a node's, or
            a tensor's.
        secret: patterns of names of weights that must lie in the tail.

    Raises:
        InputError: no such layer; or a cut that would leave a secret weight outside, split a
            layer that keeps a state, use one weight on both sides, or leave a side empty. The
            nearest good cut is named.
    """
    return Cutter(model, secret=secret).cut(at)
