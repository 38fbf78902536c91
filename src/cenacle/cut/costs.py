"""What a node costs: multiply-accumulate operations for one row, counted from inferred sizes.

With ``|t|`` the number of elements of a tensor:

====================  ===========================================================================
``Conv``              ``|Y|`` times the elements of one filter, ``C/groups * kernel``
``ConvTranspose``     ``|X|`` times the elements of one filter, ``M/groups * kernel``
``Gemm``, ``MatMul``  ``|Y|`` times the length of the sum, ``K``; integer and quantized forms too
``Einsum``            the product of the sizes of all its letters
``Attention``         ``(|Q| + |Y|) * L``, with ``L`` the length of the keys: scores and mixture
``LSTM, GRU, RNN``    steps times rows times the elements of ``W`` and ``R`` (all gates and
                      directions)
all others            1 for each element of their outputs; 0 if they only move or rename them
====================  ===========================================================================

Source: the definitions in https://onnx.ai/onnx/operators/.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate
from typing import Final

from onnx import NodeProto, helper

from cenacle.cut.graph import GraphIndex, subgraphs
from cenacle.cut.shapes import Shape, Sizes

__all__ = ["node_costs", "peak_bytes"]

_MOVES: Final = {
    *("Cast", "Concat", "Constant", "DepthToSpace", "Expand", "Flatten", "Gather"),
    *("GatherElements", "GatherND", "Identity", "Pad", "Reshape", "Shape", "Size", "Slice"),
    *("SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"),
}


def node_costs(index: GraphIndex, sizes: Sizes) -> list[int | None]:
    """Multiply-accumulates of each node for one row; ``None`` where sizes are unknown.

    What graphs inside a node do (``If``, ``Loop``, ``Scan``) is not known before they run.
    """
    return [_cost(node, sizes) for node in index.nodes]


def _cost(node: NodeProto, sizes: Sizes) -> int | None:
    if any(subgraphs(node)):
        return None
    if node.op_type in _MOVES:
        return 0
    shapes = [sizes.row.get(name) if name else () for name in node.input]
    made = [sizes.row.get(name) for name in node.output if name]
    if any(shape is None for shape in [*shapes, *made]):
        return None
    known = [shape for shape in shapes if shape is not None]
    results = [shape for shape in made if shape is not None]
    try:
        return _products(node, known, results)
    except (IndexError, ValueError):
        return None  # fewer inputs or axes than its operator has


_FORMULAS: Final[dict[str, Callable[[list[Shape], Shape], int]]] = {
    **dict.fromkeys(
        ("Conv", "ConvInteger", "FusedConv", "NhwcConv"),
        lambda x, y: math.prod(y) * math.prod(x[1][1:]),
    ),
    **dict.fromkeys(
        ("MatMul", "FusedMatMul", "MatMulInteger", "MatMulIntegerToFloat", "QLinearMatMul"),
        lambda x, y: math.prod(y) * x[0][-1],
    ),
    **dict.fromkeys(
        ("LSTM", "GRU", "RNN"),
        lambda x, _: x[0][0] * x[0][1] * (math.prod(x[1]) + math.prod(x[2])),
    ),
    "QLinearConv": lambda x, y: math.prod(y) * math.prod(x[3][1:]),
    "ConvTranspose": lambda x, _: math.prod(x[0]) * math.prod(x[1][1:]),
    "Attention": lambda x, y: (math.prod(x[0]) + math.prod(y)) * x[1][-2],
    "MultiHeadAttention": lambda x, y: (math.prod(x[0]) + math.prod(y)) * x[1][-2],
}


def _products(node: NodeProto, inputs: list[Shape], outputs: list[Shape]) -> int:
    formula = _FORMULAS.get(node.op_type)
    if formula is not None:
        return formula(inputs, outputs[0])
    if node.op_type in {"Gemm", "FusedGemm"}:
        transposed = any(a.name == "transA" and a.i for a in node.attribute)
        return math.prod(outputs[0]) * inputs[0][0 if transposed else 1]
    if node.op_type == "Einsum":
        return _einsum(node, inputs)
    return sum(math.prod(shape) for shape in outputs)


def _einsum(node: NodeProto, inputs: list[Shape]) -> int:
    equation = next(a for a in node.attribute if a.name == "equation")
    terms = helper.get_attribute_value(equation).decode().replace(" ", "").split("->")[0]
    letters: dict[str, int] = {}
    for term, shape in zip(terms.split(","), inputs, strict=True):
        spread = len(shape) - len(term.replace("...", ""))
        names = term.replace("...", "".join(chr(0x100 + i) for i in range(spread)))
        letters.update({k: max(v, letters.get(k, 1)) for k, v in zip(names, shape, strict=True)})
    return math.prod(letters.values())


def peak_bytes(
    index: GraphIndex, nodes: list[int], given: tuple[str, ...], sizes: Sizes
) -> tuple[int, bool]:
    """Most bytes of activations alive at once while nodes run in order, for one row.

    A tensor lives from where it is made (or given) until its last reader has run; what the
    model gives out lives to the end. Weights are not counted.

    Returns:
        the bytes, and whether all sizes were known; unknown ones count as 0.
    """
    place = {node: k for k, node in enumerate(nodes)}
    steps = len(nodes)
    change = [0] * (steps + 2)
    complete = True
    kept = set(index.outputs)
    made = [(name, place[i]) for i in nodes for name in index.nodes[i].output if name]
    for name, born in [*((name, 0) for name in given), *made]:
        size = sizes.size(name)
        complete = complete and size is not None
        last = born
        # Readers stand in order: the last one in these nodes comes first from behind.
        for reader in reversed(index.readers.get(name, ())):
            if reader in place:
                last = place[reader]
                break
        if name in kept:
            last = steps
        change[born] += size or 0
        change[last + 1] -= size or 0
    return max(accumulate(change), default=0), complete
