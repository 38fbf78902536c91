"""An exported PyTorch program becomes ONNX, layer by layer as it was written.

``torch.onnx`` with its optimizer folds batch normalisation into convolutions and renames
weights, so the layers of the model can no longer be told apart. Here nothing is fused: only
values that depend on no weight are computed ahead, and shapes that differ in the batch alone
become constants. Every node keeps the path of the layer that it belongs to and loses the rest
of its history, which quotes the source code of whoever wrote the model.
"""

from __future__ import annotations

import ast
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnxscript.optimizer import fold_constants_ir, remove_unused_nodes
from torch.utils import _pytree as pytree

from cenacle.errors import DataError

__all__ = ["BATCH", "CLASSES", "SCOPES", "Path", "quiet", "to_proto"]

# Metadata of a node: paths and classes of the layers around it, outermost first, then the
# operation. The first is the model.
SCOPES: Final = "pkg.torch.onnx.name_scopes"
CLASSES: Final = "pkg.torch.onnx.class_hierarchy"
Path = list[tuple[str, str]]
"""Layers around a node, each with its class; the model comes first, the operation last."""

# The name of the first axis where it counts rows.
BATCH: Final = "batch"

_NO_MODULE: Final = "_empty_nn_module_stack_from_metadata_hook"
_OPERATOR: Final = re.compile(r"(?:torch\.ops\.)?\baten[.:]+[A-Za-z_0-9.]+")


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings and log lines of the exporters, which users can do nothing about."""
    before = logging.root.manager.disable
    try:
        # All loggers: formatting what torch logs takes longer than an export.
        logging.disable(max(before, logging.ERROR))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def to_proto(
    program: torch.export.ExportedProgram,
    *,
    names: Mapping[str, str] | None = None,
    inputs: Sequence[str] | None = None,
    rescope: Callable[[Path], Path] | None = None,
) -> onnx.ModelProto:
    """The program as an ONNX model whose layers are those of the program.

    Args:
        program: an inference program; its first axes may vary, and no others.
        names: new names of weights, by their names in the program.
        inputs: new names of the inputs, in their order.
        rescope: the layers of a node from those that the program names.

    Raises:
        DataError: the program keeps state, draws random numbers, varies in another axis than
            the first, or uses an operator that ONNX does not have.
    """
    _check_randomness(program)
    with quiet():
        try:
            converted = torch.onnx.export(
                program, (), dynamo=True, optimize=False, verbose=False, external_data=False
            )
        except Exception as error:
            raise _not_converted(error) from error
        assert converted is not None
        assert converted.exported_program is not None
        _check_state(converted.exported_program)
        model: ir.Model = converted.model
        for value, name in zip(model.graph.inputs, inputs or (), strict=inputs is not None):
            value.name = name
        _name_outputs(model, program)
        _name_batch(model)
        weights = set(model.graph.initializers)
        fold_constants_ir(model, should_fold=lambda node: False if _reads(node, weights) else None)
        _flatten_shapes(model.graph)
        _drop_zero_biases(model.graph, weights)
        remove_unused_nodes(model)
        _rename(model, names or {})
        _strip(model, rescope)
        return ir.serde.serialize_model(model)


def _check_state(program: torch.export.ExportedProgram) -> None:
    """Of the program in functional form: only there the signature says what is written to."""
    signature = program.graph_signature
    if changed := [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate]:
        raise DataError(
            "the model changes its own state when it runs, so its parts cannot be separated",
            found=f"writes to {str(changed[0])[:120]}",
            expected="a function of its inputs",
            remedy="put its layers into evaluation mode and drop running statistics",
        )


def _check_randomness(program: torch.export.ExportedProgram) -> None:
    for node in program.graph.nodes:
        if node.op == "call_function" and _draws(node):
            raise DataError(
                "the model draws random numbers, so no two runs of it agree",
                found=f"{node.target} in layer {_layer_of(node)}",
                expected="a function of its inputs",
                remedy="use dropout as a module, or pass training=self.training to it",
            )


def _draws(node: torch.fx.Node) -> bool:
    """Whether a node draws random numbers: dropout that is switched off does not."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    assert isinstance(node.target, torch._ops.OpOverload)
    arguments = node.target._schema.arguments
    given = {argument.name: argument.default_value for argument in arguments}
    given |= dict(zip((argument.name for argument in arguments), node.args, strict=False))
    given |= node.kwargs
    switches = [given[name] for name in ("train", "training", "dropout_p") if name in given]
    return not switches or any(switches)


def _layer_of(node: torch.fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    return repr(str(path)[:120]) if path else "(top level)"


def _not_converted(error: BaseException) -> DataError:
    """One sentence that names the operator and where it stands."""
    messages = []
    cause: BaseException | None = error
    while cause is not None:
        messages.append(str(cause))
        cause = cause.__cause__ or cause.__context__
    text = "\n".join(messages)
    operator = _OPERATOR.search(text)
    layer = re.search(r"nn_module_stack.*?\('([^']*)'", text)
    found = operator.group(0).rstrip(".") if operator else messages[-1].splitlines()[0][:160]
    return DataError(
        "the model cannot be converted to ONNX",
        found=found + (f" in layer {layer.group(1)!r}" if layer else ""),
        expected="operators that ONNX has",
        remedy="write this layer with other operators, or convert the model to .onnx yourself",
    )


def _reads(node: ir.Node, weights: set[str]) -> bool:
    """Whether a node looks at the values of weights; their shapes are no secret of theirs."""
    return node.op_type != "Shape" and any(
        value is not None and value.name in weights for value in node.inputs
    )


def _name_outputs(model: ir.Model, program: torch.export.ExportedProgram) -> None:
    """``output``, or as the model names its outputs; each a value of its own."""
    spec = program.call_spec.out_spec
    paths = [str(index) for index in range(len(model.graph.outputs))]
    if spec is not None:
        leaves = list(range(spec.num_leaves))
        tree = pytree.tree_unflatten(leaves, spec)
        flat, _ = pytree.tree_flatten_with_path(tree)
        kinds = [s.arg for s in program.graph_signature.output_specs if _is_user(s)]
        found = [
            ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)
            for (path, _), kind in zip(flat, kinds, strict=True)
            if isinstance(kind, torch.export.graph_signature.TensorArgument)
        ]
        if len(found) == len(paths):
            paths = found
    taken = {value.name for value in [*model.graph.inputs, *model.graph.initializers.values()]}
    taken |= {value.name for node in model.graph for value in node.outputs}
    seen: set[int] = set()
    for index, (value, path) in enumerate(zip(list(model.graph.outputs), paths, strict=True)):
        own = value
        if value.producer() is None or id(value) in seen:
            node = ir.node("Identity", [value])
            node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
            node.metadata_props[SCOPES] = repr(["", "output"])
            node.metadata_props[CLASSES] = repr(["", "Identity"])
            model.graph.append(node)
            own = model.graph.outputs[index] = node.outputs[0]
        seen.add(id(value))
        taken.discard(own.name)
        wanted = path if path and not path.isdigit() else "_".join(filter(None, ("output", path)))
        while wanted in taken:
            wanted += "_"
        own.name = wanted
        taken.add(wanted)


def _is_user(spec: torch.export.graph_signature.OutputSpec) -> bool:
    return spec.kind is torch.export.graph_signature.OutputKind.USER_OUTPUT


def _name_batch(model: ir.Model) -> None:
    """Calls the varying first axis ``batch``, and refuses every other varying axis."""
    symbols: set[str] = set()
    for value in model.graph.inputs:
        for axis, size in enumerate(value.shape or ()):
            if isinstance(size, int):
                continue
            if axis != 0 or size.value is None:
                raise DataError(
                    f"input {str(value.name)[:80]!r} of the model varies in axis {axis}",
                    expected="fixed sizes; only the first axis, of the batch, may vary",
                    remedy="pad inputs to one size when the model is exported",
                )
            symbols.add(size.value)
    if len(symbols) > 1:
        raise DataError(
            "inputs of the model vary in different first axes",
            found=", ".join(sorted(symbols)),
            expected="one batch for all inputs",
            remedy="give the first axes of all inputs the same torch.export.Dim",
        )
    values = [*model.graph.inputs, *(out for node in model.graph for out in node.outputs)]
    for value in values:
        if value.shape is not None:
            sizes = [_rename_symbol(size, symbols) for size in value.shape]
            value.shape = ir.Shape(sizes)


def _rename_symbol(size: int | ir.SymbolicDim, symbols: set[str]) -> int | ir.SymbolicDim:
    if isinstance(size, ir.SymbolicDim):
        # Products and sums of the batch are unknown to whoever reads the file.
        return ir.SymbolicDim(BATCH if size.value in symbols else None)
    return size


def _flatten_shapes(graph: ir.Graph) -> None:
    """Writes ``Reshape(x, [batch, c, d])`` as ``Reshape(x, [-1, c, d])``.

    The exporter computes every such shape from the input of the whole model, so that each cut
    would have to carry the number of rows along.
    """
    for node in list(graph):
        if node.op_type != "Reshape" or node.inputs[1] is None:
            continue
        shape, name = node.outputs[0].shape, f"{node.outputs[0].name}.shape"
        if shape is None or ir.convenience.get_const_tensor(node.inputs[1]) is not None:
            continue
        sizes = [size if isinstance(size, int) else -1 for size in shape]
        if sizes.count(-1) != 1 or 0 in sizes or name in graph.initializers:
            continue
        array = np.array(sizes, np.int64)
        value = ir.Value(
            name=name,
            shape=ir.Shape(array.shape),
            type=ir.TensorType(ir.DataType.INT64),
            const_value=ir.tensor(array, name=name),
        )
        graph.register_initializer(value)
        node.replace_input_with(1, value)


def _drop_zero_biases(graph: ir.Graph, weights: set[str]) -> None:
    """The exporter makes up biases of convolutions that have none."""
    for node in graph:
        if node.op_type not in {"Conv", "ConvTranspose"} or len(node.inputs) < 3:
            continue
        bias = node.inputs[2]
        if bias is None or bias.name in weights or bias.const_value is None:
            continue
        if not bias.const_value.numpy().any():
            node.resize_inputs(2)


def _rename(model: ir.Model, names: Mapping[str, str]) -> None:
    wanted = {old: new for old, new in names.items() if old in model.graph.initializers}
    for old, new in wanted.items():
        value = model.graph.initializers.pop(old)
        value.name = new
        if value.const_value is not None:
            value.const_value.name = new
        model.graph.register_initializer(value)


def _strip(model: ir.Model, rescope: Callable[[Path], Path] | None) -> None:
    """Leaves of a node's history the layers that it belongs to only."""
    graph = model.graph
    model.metadata_props.clear()
    graph.metadata_props.clear()
    for value in [*graph.inputs, *graph.outputs, *graph.initializers.values()]:
        value.metadata_props.clear()
    paths: dict[int, Path] = {}
    for node in reversed(list(graph)):
        users = [user for value in node.outputs for user in value.consumers()]
        paths[id(node)] = _path(node, next((paths[id(user)] for user in users), [("", "")]))
    for node in graph:
        path = paths[id(node)]
        if rescope is not None:
            path = rescope(path)
        node.doc_string = None
        node.metadata_props.clear()
        node.metadata_props[SCOPES] = repr([scope for scope, _ in path])
        node.metadata_props[CLASSES] = repr([kind for _, kind in path])
        for value in node.outputs:
            value.metadata_props.clear()


def _path(node: ir.Node, user: Path) -> Path:
    """The layers of a node; those of its user if an optimization made the node."""
    scopes, classes = (_texts(node.metadata_props.get(key, "")) for key in (SCOPES, CLASSES))
    if not scopes:
        return [*(user[:-1] or user), (str(node.name), node.op_type)]
    if len(classes) != len(scopes):
        classes = [""] * len(scopes)
    # Of a class its name only: the module path tells how its author is organised.
    names = [kind.rsplit(".", 1)[-1] for kind in classes[:-1]] + classes[-1:]
    return [
        ("", "") if scope == _NO_MODULE else (scope, kind)
        for scope, kind in zip(scopes, names, strict=True)
    ]


def _texts(value: str) -> list[str]:
    try:
        found: Any = ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return []
    return [str(text) for text in found] if isinstance(found, list) else []
