"""Looking into a graph before ONNX Runtime does, without trusting whoever wrote it.

A reader of the protobuf encoding that knows the few messages and fields that a tail's graph
needs and refuses every other: functions, metadata, sparse tensors, training information,
operators of other domains, and tensors that lie in files. So ONNX Runtime never sees the name of
a file, nor one of the addresses in memory that it writes in their place for itself.

Encoding: https://protobuf.dev/programming-guides/encoding/. Messages:
https://github.com/onnx/onnx/blob/main/onnx/onnx.proto. Needs nothing but Python.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Final

from cenacle.cut.operators import CONTRIBUTED, DOMAINS
from cenacle.errors import DataError

__all__ = ["LOCATION", "MAX_GRAPH_BYTES", "check_graph"]

MAX_GRAPH_BYTES: Final = 1 << 26
LOCATION: Final = "cenacle.tail"
"""The name of the file that all external weights are said to lie in. There is no such file."""

_MAX_NODES: Final = 100_000
_MAX_DEPTH: Final = 8  # of graphs within nodes
_MAX_NAME: Final = 1024
_CONTROL: Final = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")
_OPERATOR: Final = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,127}", re.ASCII)
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

_Field = Callable[[memoryview | int], None]


def _bad(found: str, expected: str) -> DataError:
    return DataError(
        "the graph of a tail is malformed",
        found=found,
        expected=expected,
        remedy="write the tail again with cenacle cut",
    )


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 64:
        if position >= len(data):
            raise _bad("an end within a number", "whole fields")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, position
        shift += 7
    raise _bad("a number of more than 64 bits", "protobuf's encoding")


def _fields(data: memoryview) -> Iterator[tuple[int, int, memoryview | int]]:
    """(field, wire type, value) of a message; groups, which ONNX has none of, are refused."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, position = _varint(data, position)
            yield number, wire, value
            continue
        if wire == _BYTES:
            length, position = _varint(data, position)
        elif wire in {_FIXED32, _FIXED64}:
            length = 4 if wire == _FIXED32 else 8
        else:
            raise _bad(f"wire type {wire}", "protobuf's encoding, without groups")
        if length > len(data) - position:
            raise _bad("a field that is longer than its message", "whole fields")
        yield number, wire, data[position : position + length]
        position += length


def _text(value: memoryview | int) -> str:
    if isinstance(value, int):
        raise _bad("a number in place of a text", "the fields of ONNX")
    try:
        text = bytes(value).decode()
    except UnicodeDecodeError:
        raise _bad("a text that is not UTF-8", "UTF-8") from None
    if len(text) > _MAX_NAME or _CONTROL.search(text):
        raise _bad(repr(text[:80]), f"at most {_MAX_NAME} printable characters")
    return text


@dataclass
class _Walk:
    """One walk through a graph: what it may refer to, and what was seen."""

    external: Collection[str]
    seen: set[str] = field(default_factory=set)
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    nodes: int = 0

    def message(
        self,
        kind: str,
        value: memoryview | int,
        known: dict[int, tuple[tuple[int, ...], Callable[[memoryview | int], None] | None]],
    ) -> None:
        """Call what is known for each field; a field or wire type that is not is refused."""
        if isinstance(value, int):
            raise _bad(f"a number in place of {kind}", "the fields of ONNX")
        for number, wire, content in _fields(value):
            wires, visit = known.get(number, ((), None))
            if wire not in wires:
                raise _bad(f"field {number} of {kind}", "only fields that a tail needs")
            if visit is not None:
                visit(content)

    def model(self, data: memoryview) -> None:
        graphs: list[memoryview | int] = []
        self.message(
            "a model",
            data,
            {
                1: ((_VARINT,), None),  # ir_version
                7: ((_BYTES,), graphs.append),
                8: ((_BYTES,), self.opset),
            },
        )
        if len(graphs) != 1:
            raise _bad(f"{len(graphs)} graphs", "one")
        self.graph(graphs[0], 0)

    def opset(self, value: memoryview | int) -> None:
        self.message(
            "a set of operators",
            value,
            {1: ((_BYTES,), lambda name: _void(self.domain(name))), 2: ((_VARINT,), None)},
        )

    def domain(self, value: memoryview | int) -> str:
        domain = _text(value)
        if domain not in DOMAINS:
            raise _bad(f"operators of domain {domain[:80]!r}", "ONNX's own operators")
        return domain

    def graph(self, value: memoryview | int, depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise _bad("graphs that are nested too deeply", f"at most {_MAX_DEPTH} levels")
        outer = depth == 0

        def name_of(names: list[str]) -> Callable[[memoryview | int], None]:
            return lambda value: names.append(self.value_info(value))

        self.message(
            "a graph",
            value,
            {
                1: ((_BYTES,), lambda node: self.node(node, depth)),
                2: ((_BYTES,), lambda name: _void(_text(name))),
                5: ((_BYTES,), lambda tensor: self.tensor(tensor, initializer=outer)),
                11: ((_BYTES,), name_of(self.inputs if outer else [])),
                12: ((_BYTES,), name_of(self.outputs if outer else [])),
            },
        )

    def value_info(self, value: memoryview | int) -> str:
        names: list[str] = []
        # The type is ONNX Runtime's to read: it can name nothing outside.
        self.message(
            "a value",
            value,
            {1: ((_BYTES,), lambda name: names.append(_text(name))), 2: ((_BYTES,), None)},
        )
        if len(names) != 1:
            raise _bad("a value without a name, or with several", "one name")
        return names[0]

    def node(self, value: memoryview | int, depth: int) -> None:
        self.nodes += 1
        if self.nodes > _MAX_NODES:
            raise _bad(f"more than {_MAX_NODES} nodes", "fewer")
        operators: list[str] = []
        domains: list[str] = []
        self.message(
            "a node",
            value,
            {
                1: ((_BYTES,), lambda name: _void(_text(name))),
                2: ((_BYTES,), lambda name: _void(_text(name))),
                3: ((_BYTES,), lambda name: _void(_text(name))),
                4: ((_BYTES,), lambda name: operators.append(_text(name))),
                5: ((_BYTES,), lambda attribute: self.attribute(attribute, depth)),
                7: ((_BYTES,), lambda name: domains.append(self.domain(name))),
            },
        )
        if len(operators) != 1 or len(domains) > 1 or not _OPERATOR.fullmatch(operators[0]):
            raise _bad("a node without an operator, or with several", "one operator")
        if domains == ["com.microsoft"] and operators[0] not in CONTRIBUTED:
            raise _bad(f"operator com.microsoft.{operators[0]}", "an operator that only computes")

    def attribute(self, value: memoryview | int, depth: int) -> None:
        numbers = (_VARINT, _BYTES)  # repeated numbers come packed or not
        self.message(
            "an attribute",
            value,
            {
                1: ((_BYTES,), lambda name: _void(_text(name))),
                2: ((_FIXED32,), None),
                3: ((_VARINT,), None),
                4: ((_BYTES,), None),
                5: ((_BYTES,), self.tensor),
                6: ((_BYTES,), lambda graph: self.graph(graph, depth + 1)),
                7: ((_FIXED32, _BYTES), None),
                8: (numbers, None),
                9: ((_BYTES,), None),
                10: ((_BYTES,), self.tensor),
                11: ((_BYTES,), lambda graph: self.graph(graph, depth + 1)),
                20: ((_VARINT,), None),
            },
        )

    def tensor(self, value: memoryview | int, *, initializer: bool = False) -> None:
        names: list[str] = []
        entries: list[tuple[str, str]] = []
        places: list[memoryview | int] = []
        numbers = (_VARINT, _BYTES)
        self.message(
            "a tensor",
            value,
            {
                1: (numbers, None),  # dims
                2: ((_VARINT,), None),  # data_type
                4: ((_FIXED32, _BYTES), None),
                5: (numbers, None),
                6: ((_BYTES,), None),
                7: (numbers, None),
                8: ((_BYTES,), lambda name: names.append(_text(name))),
                9: ((_BYTES,), None),  # raw_data
                10: ((_FIXED64, _BYTES), None),
                11: (numbers, None),
                13: ((_BYTES,), lambda entry: entries.append(self.entry(entry))),
                14: ((_VARINT,), places.append),
            },
        )
        if not entries and all(place == 0 for place in places):
            return
        if not initializer or len(names) != 1 or names[0] not in self.external:
            raise _bad("a tensor that lies in another file", "weights of the tail alone")
        keys = [key for key, _ in entries]
        if (
            sorted(keys) != ["length", "location", "offset"]
            or dict(entries)["location"] != LOCATION
        ):
            raise _bad("a weight that lies in another file", "weights of the tail alone")
        if names[0] in self.seen:
            raise _bad(f"weight {names[0][:80]!r} twice", "each weight once")
        self.seen.add(names[0])

    def entry(self, value: memoryview | int) -> tuple[str, str]:
        texts: dict[int, str] = {}
        self.message(
            "an entry",
            value,
            {
                1: ((_BYTES,), lambda text: texts.__setitem__(1, _text(text))),
                2: ((_BYTES,), lambda text: texts.__setitem__(2, _text(text))),
            },
        )
        return texts.get(1, ""), texts.get(2, "")


def _void(_: object) -> None:
    """Nothing: what was looked at was only to be checked."""


def check_graph(
    data: bytes | memoryview, *, external: Collection[str] = ()
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Refuse a graph that is more than a computation on its inputs and weights.

    Args:
        data: an ONNX model.
        external: names of weights that are handed over in memory: each of them must be an
            initializer of the graph that is marked as external, and nothing else may be.

    Returns:
        The names of its inputs and of its outputs.

    Raises:
        DataError: not an ONNX model, or one that has what no tail needs.
    """
    view = memoryview(data)
    if len(view) > MAX_GRAPH_BYTES:
        raise _bad(f"{len(view)} bytes", f"at most {MAX_GRAPH_BYTES}")
    walk = _Walk(external)
    walk.model(view)
    if missing := set(external) - walk.seen:
        raise _bad(f"no weight {min(missing)[:80]!r}", "every weight that the tail lists")
    for names in (walk.inputs, walk.outputs):
        if len(set(names)) != len(names):
            raise _bad("a name that occurs twice", "each input and output once")
    return tuple(walk.inputs), tuple(walk.outputs)
