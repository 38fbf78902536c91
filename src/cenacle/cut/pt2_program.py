"""The program in a ``.pt2`` file, rebuilt value by value from what an inference graph needs.

See :mod:`cenacle.cut.pt2_archive` for why.
"""

from __future__ import annotations

import ast
import json
import keyword
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from cenacle.errors import DataError

__all__ = ["check_weight_name", "clean_program", "fields", "get", "refused", "stored_meta"]

_MAX_DEPTH: Final = 64
_NAME: Final = re.compile(r"[A-Za-z_]\w{0,511}", re.ASCII)
_FQN: Final = re.compile(r"[A-Za-z0-9_]\w{0,511}(?:\.\w{1,512}){0,63}", re.ASCII)
_SYMBOL: Final = re.compile(r"[su]\d{1,9}")
_TARGET: Final = re.compile(
    r"torch\.ops\.aten\.[A-Za-z_]\w{0,80}\.\w{1,80}"
    r"|_operator\.(?:add|sub|mul|floordiv|mod|neg|truediv|eq|ne|lt|le|gt|ge)"
    r"|math\.(?:ceil|floor|trunc)|torch\.sym_(?:max|min|not|int|float)",
    re.ASCII,
)
_FILES: Final = {"from_file", "save", "_save", "_load"}  # aten's own operators that open files
_STRING: Final = re.compile(r"[a-z_]{0,32}|[A-Za-z., >-]{1,200}")
_STACK: Final = re.compile(r"[\w.,;@()'<>\[\] -]{0,20000}", re.ASCII)
_SIZES: Final = frozenset(
    {
        *("Symbol", "Integer", "Add", "Mul", "Max", "Min", "FloorDiv", "CleanDiv", "CeilDiv"),
        *("Mod", "PythonMod", "Equality", "Unequality", "LessThan", "GreaterThan"),
        *("StrictLessThan", "StrictGreaterThan", "Rational", "Not", "And", "Or"),
    }
)


def refused(what: str, found: object, remedy: str | None = None) -> DataError:
    """Something in the archive that is not taken."""
    return DataError(
        f"the .pt2 archive holds {what}",
        found=str(found)[:160],
        expected="an inference graph of PyTorch's own operators, with plain tensors",
        remedy=remedy or "export the model again with torch.export.save, or to .onnx",
    )


def clean_program(value: Any) -> dict[str, Any]:
    """A copy of a serialized program with nothing in it but what was looked at.

    Stack traces, guards, call signatures of modules and types of the author's own are left out.

    Raises:
        DataError: anything that is no inference graph of PyTorch's own operators.
    """
    module = get(value, "graph_module")
    version = get(value, "schema_version")
    return {
        "graph_module": {
            "graph": _graph(get(module, "graph")),
            "signature": _signature(get(module, "signature")),
            "module_call_graph": [],
            "metadata": {},
            "treespec_namedtuple_fields": {},
        },
        "opset_version": {
            _name(name): _int(n) for name, n in fields(get(value, "opset_version")).items()
        },
        "range_constraints": {
            _symbol(name): {
                end: None if get(limits, end) is None else _int(limits[end])
                for end in ("min_val", "max_val")
            }
            for name, limits in fields(get(value, "range_constraints")).items()
        },
        "schema_version": {part: _int(get(version, part)) for part in ("major", "minor")},
        "verifiers": ["TRAINING"],
        "torch_version": "",
        "guards_code": [],
        "output_names": _output_names(module),
    }


def _graph(graph: Any) -> dict[str, Any]:
    if fields(get(graph, "custom_obj_values")):
        raise refused("objects that are no tensors", ", ".join(graph["custom_obj_values"]))
    return {
        "inputs": [_tensor_only(item) for item in _items(get(graph, "inputs"))],
        "outputs": [_tensor_only(item) for item in _items(get(graph, "outputs"))],
        "nodes": [_node(item) for item in _items(get(graph, "nodes"))],
        "tensor_values": _each(get(graph, "tensor_values"), _meta),
        "sym_int_values": _each(get(graph, "sym_int_values"), _size),
        "sym_bool_values": _each(get(graph, "sym_bool_values"), _size),
        "sym_float_values": _each(get(graph, "sym_float_values"), _size),
        "is_single_tensor_return": False,
        "custom_obj_values": {},
    }


def _node(node: Any) -> dict[str, Any]:
    target = get(node, "target")
    if not isinstance(target, str) or _TARGET.fullmatch(target) is None:
        raise refused("an operation that is none of PyTorch's own tensor operators", target)
    if target.startswith("torch.ops.aten.") and target.split(".")[3] in _FILES:
        raise refused("an operation on files", target)
    name = node.get("name")
    stack = fields(get(node, "metadata")).get("nn_module_stack", "")
    known = isinstance(stack, str) and _STACK.fullmatch(stack) is not None
    return {
        "target": target,
        "inputs": [
            {
                "name": _name(get(item, "name")) if get(item, "name") else "",
                "arg": _argument(get(item, "arg")),
                "kind": None if item.get("kind") is None else _int(item["kind"]),
            }
            for item in _items(get(node, "inputs"))
        ],
        "outputs": [_argument(item) for item in _items(get(node, "outputs"))],
        # The layer, and nothing else of where the node came from.
        "metadata": {"nn_module_stack": stack} if known and stack else {},
        "is_hop_single_tensor_return": None,
        "name": None if name is None else _name(name),
    }


def _argument(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or len(value) != 1:
        raise refused("a malformed argument", value)
    [(kind, inner)] = value.items()
    clean = _ARGUMENTS.get(kind)
    if clean is None:
        raise refused(
            "control flow, or objects that are no tensors",
            kind,
            remedy="write the model without branches and loops, or convert it to .onnx yourself",
        )
    return {kind: clean(inner)}


def _named(value: Any) -> dict[str, Any]:
    return {"name": _name(get(value, "name"))}


def _sym(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or len(value) != 1:
        raise refused("a malformed size", value)
    [(kind, inner)] = value.items()
    if kind == "as_name":
        return {kind: _name(inner)}
    if kind in {"as_int", "as_float", "as_bool"}:
        return {kind: _number(inner)}
    raise refused("a malformed size", value)


def _optional(value: Any) -> dict[str, Any]:
    if isinstance(value, dict) and set(value) == {"as_none"}:
        return {"as_none": True}
    return {"as_tensor": _named(get(value, "as_tensor"))}


def _string(value: Any) -> str:
    if not isinstance(value, str) or _STRING.fullmatch(value) is None:
        raise refused("an unusual text", value)
    return value


def _list(clean: Callable[[Any], Any]) -> Callable[[Any], list[Any]]:
    return lambda value: [clean(item) for item in _items(value)]


def _int(value: Any) -> int:
    if type(value) is not int or abs(value) >= 1 << 63:
        raise refused("a malformed number", value)
    return value


def _number(value: Any) -> int | float | bool | str:
    # JSON has no infinity; the serializer writes these.
    if value in ("Infinity", "-Infinity", "NaN"):
        return str(value)
    if isinstance(value, bool | float):
        return value
    return _int(value)


_ARGUMENTS: Final[Mapping[str, Callable[[Any], Any]]] = {
    "as_none": lambda _: True,
    "as_tensor": _named,
    "as_tensors": _list(_named),
    "as_int": _int,
    "as_ints": _list(_int),
    "as_float": _number,
    "as_floats": _list(_number),
    "as_bool": bool,
    "as_bools": _list(bool),
    "as_string": _string,
    "as_sym_int": _sym,
    "as_sym_ints": _list(_sym),
    "as_sym_float": _sym,
    "as_sym_floats": _list(_sym),
    "as_sym_bool": _sym,
    "as_sym_bools": _list(_sym),
    "as_scalar_type": _int,
    "as_memory_format": _int,
    "as_layout": _int,
    "as_device": lambda _: {"type": "cpu", "index": None},
    "as_optional_tensors": _list(_optional),
    "as_optional_tensor": _optional,
}


def _tensor_only(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or set(value) != {"as_tensor"}:
        raise refused("an input or output that is no tensor", value)
    return {"as_tensor": _named(value["as_tensor"])}


def stored_meta(value: Any) -> dict[str, Any]:
    """Type, sizes and strides of a stored tensor, all of them plain numbers."""
    return _meta(value, _fixed)


def _meta(value: Any, size: Callable[[Any], dict[str, Any]] | None = None) -> dict[str, Any]:
    size = size or _size
    return {
        "dtype": _int(get(value, "dtype")),
        "sizes": [size(item) for item in _items(get(value, "sizes"))],
        "requires_grad": False,
        "device": {"type": "cpu", "index": None},
        "strides": [size(item) for item in _items(get(value, "strides"))],
        "storage_offset": size(get(value, "storage_offset")),
        "layout": _int(get(value, "layout")),
    }


def _fixed(value: Any) -> dict[str, Any]:
    number = _int(get(value, "as_int"))
    if number < 0:
        raise refused("a negative size", number)
    return {"as_int": number}


def _size(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or len(value) != 1:
        raise refused("a malformed size", value)
    [(kind, inner)] = value.items()
    if kind != "as_expr":
        return {kind: _number(inner)} if kind in {"as_int", "as_float", "as_bool"} else _sym(value)
    hint = fields(inner).get("hint")
    return {
        "as_expr": {
            "expr_str": _expression(get(inner, "expr_str")),
            "hint": None if hint is None else _sym(hint),
        }
    }


def _expression(text: Any) -> str:
    """A symbolic size, which sympy will EVALUATE as Python: names and calls of a short list."""
    if not isinstance(text, str) or len(text) > 2000:
        raise refused("a malformed symbolic size", text)
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise refused("a malformed symbolic size", text) from error
    if not _harmless(tree, 0):
        raise refused("a symbolic size that is code", text)
    return text


def _harmless(node: ast.AST, depth: int) -> bool:
    parts: list[ast.expr] = []
    match node:
        case ast.Constant(value=int(number)):  # True and False too
            return abs(number) < 1 << 63
        case ast.Name(id=name):
            return _SYMBOL.fullmatch(name) is not None
        case ast.Call(func=ast.Name(id="Symbol"), args=[ast.Constant(value=str(name))]):
            flags = [option.value for option in node.keywords]
            return _SYMBOL.fullmatch(name) is not None and all(
                isinstance(flag, ast.Constant) and isinstance(flag.value, bool) for flag in flags
            )
        case ast.Call(func=ast.Name(id=name), keywords=[]) if name in _SIZES:
            parts = node.args
        case ast.BinOp(op=ast.Add() | ast.Sub() | ast.Mult()):
            parts = [node.left, node.right]
        case ast.UnaryOp(op=ast.USub()):
            parts = [node.operand]
        case _:
            return False
    return depth < _MAX_DEPTH and all(_harmless(part, depth + 1) for part in parts)


_INPUTS: Final[Mapping[str, tuple[str, ...]]] = {
    "parameter": ("parameter_name",),
    "buffer": ("buffer_name",),
    "tensor_constant": ("tensor_constant_name",),
}


def _signature(signature: Any) -> dict[str, Any]:
    inputs: list[dict[str, Any]] = []
    for item in _items(get(signature, "input_specs")):
        [(kind, inner)] = fields(item).items() if len(fields(item)) == 1 else [("", None)]
        if kind == "user_input":
            inputs.append({kind: {"arg": _tensor_only(get(inner, "arg"))}})
        elif kind in _INPUTS:
            spec: dict[str, Any] = {"arg": _named(get(inner, "arg"))}
            spec |= {field: check_weight_name(get(inner, field)) for field in _INPUTS[kind]}
            if kind == "buffer":
                spec["persistent"] = get(inner, "persistent") is True
            inputs.append({kind: spec})
        else:
            raise refused("an input that is no tensor", kind)
    outputs = []
    for item in _items(get(signature, "output_specs")):
        if set(fields(item)) != {"user_output"}:
            raise refused("a graph that changes its own state", ", ".join(fields(item)))
        outputs.append({"user_output": {"arg": _tensor_only(get(item["user_output"], "arg"))}})
    return {"input_specs": inputs, "output_specs": outputs}


def _output_names(module: Any) -> list[str] | None:
    """Names of the outputs where the model returns them by name."""
    count = len(get(get(module, "signature"), "output_specs"))
    try:
        entry = next(item for item in module["module_call_graph"] if item["fqn"] == "")
        spec = json.loads(entry["signature"]["out_spec"])[1]
        names = json.loads(spec["context"])
        leaves = [child["type"] is None for child in spec["children_spec"]]
    except (KeyError, IndexError, TypeError, ValueError, StopIteration, RecursionError):
        return None
    if not isinstance(names, list) or len(names) != count or len(set(map(str, names))) != count:
        return None
    usable = all(isinstance(name, str) and _NAME.fullmatch(name) for name in names)
    return names if usable and all(leaves) and len(leaves) == count else None


def _name(value: Any) -> str:
    """A name that may stand in generated source code."""
    if (
        not isinstance(value, str)
        or _NAME.fullmatch(value) is None
        or keyword.iskeyword(value)
        or value.startswith("__")
    ):
        raise refused("a name that is none", repr(value))
    return value


def check_weight_name(value: Any) -> str:
    """The path of a weight in its module.

    Raises:
        DataError: it is none.
    """
    if not isinstance(value, str) or _FQN.fullmatch(value) is None or "__" in value[:2]:
        raise refused("a name of a weight that is none", repr(value))
    if any(part.startswith("__") for part in value.split(".")):
        raise refused("a name of a weight that is none", repr(value))
    return value


def _symbol(value: Any) -> str:
    if not isinstance(value, str) or _SYMBOL.fullmatch(value) is None:
        raise refused("a malformed symbolic size", value)
    return value


def get(value: Any, field: str) -> Any:
    """A field that must be there.

    Raises:
        DataError: it is not.
    """
    if field not in fields(value):
        raise refused("a description without a field that it needs", field)
    return value[field]


def fields(value: Any) -> dict[str, Any]:
    """A JSON object.

    Raises:
        DataError: it is something else.
    """
    if not isinstance(value, dict):
        raise refused("a malformed description", type(value).__name__)
    return value


def _items(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise refused("a malformed description", type(value).__name__)
    return value


def _each(value: Any, clean: Callable[[Any], Any]) -> dict[str, Any]:
    return {_name(name): clean(item) for name, item in fields(value).items()}
