"""Programs saved by ``torch.export.save``, loaded without unpickling anything of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Final

import torch
from torch._export.serde import schema, serialize
from torch.utils import _pytree as pytree

from cenacle.cut.program import quiet
from cenacle.cut.pt2_archive import Archive, Table, read_archive
from cenacle.cut.pt2_program import refused

__all__ = ["load_program"]

_MAX_RANK: Final = 64


def load_program(path: Path) -> torch.export.ExportedProgram:
    """The program of a ``.pt2`` file.

    Raises:
        InputError: no such file.
        DataError: see :mod:`cenacle.cut.pt2_archive`; or its tensors do not fit it.
    """
    archive = read_archive(path)
    program = dict(archive.program)
    program["graph_module"]["module_call_graph"] = [_call(program)]
    _check_operators(program)
    weights = _tensors(archive, archive.weights)
    constants = _tensors(archive, archive.constants)
    for item in program["graph_module"]["signature"]["input_specs"]:
        if "parameter" in item and (name := item["parameter"]["parameter_name"]) in weights:
            weights[name] = _parameter(weights[name])
    with quiet():
        try:
            to_dataclass: Any = serialize._dict_to_dataclass
            described = to_dataclass(schema.ExportedProgram, program)
            return serialize.ExportedProgramDeserializer().deserialize(
                described, weights, constants, None
            )
        except Exception as error:  # the deserializer raises anything for graphs that do not fit
            text = (str(error).strip().splitlines() or ["no message"])[-1]
            raise refused(
                "a program that PyTorch cannot read", f"{type(error).__name__}: {text}"
            ) from error


def _call(program: dict[str, Any]) -> dict[str, Any]:
    """The call signature of the whole: tensors in, one after the other; tensors out, by name."""
    signature = program["graph_module"]["signature"]
    inputs = [
        item["user_input"]["arg"] for item in signature["input_specs"] if "user_input" in item
    ]
    outputs = [item["user_output"]["arg"] for item in signature["output_specs"]]
    names = program.pop("output_names")
    results: Any = dict.fromkeys(names, 0) if names else (0,) * len(outputs)
    if not names and len(outputs) == 1:
        results = 0
    return {
        "fqn": "",
        "signature": {
            "inputs": inputs,
            "outputs": outputs,
            "in_spec": pytree.treespec_dumps(pytree.tree_structure(((0,) * len(inputs), {}))),
            "out_spec": pytree.treespec_dumps(pytree.tree_structure(results)),
            "forward_arg_names": None,
        },
    }


def _check_operators(program: dict[str, Any]) -> None:
    """Every ``aten`` operator is one of PyTorch's tensor library, none of its old interpreter."""
    for node in program["graph_module"]["graph"]["nodes"]:
        target = node["target"]
        if not target.startswith("torch.ops.aten."):
            continue
        _, _, _, name, overload = target.split(".")
        try:
            operator = getattr(getattr(torch.ops.aten, name), overload)
        except AttributeError:
            raise refused("an operator that this PyTorch does not have", target) from None
        if torch.Tag.pt2_compliant_tag not in getattr(operator, "tags", ()):
            raise refused("an operator that is no tensor operator", target)


def _tensors(archive: Archive, table: Table) -> dict[str, torch.Tensor]:
    storages: dict[str, bytearray] = {}
    found: dict[str, torch.Tensor] = {}
    for name, (file, meta) in table.tensors.items():
        if file not in storages:
            storages[file] = bytearray(archive.read(file))
        found[name] = _tensor(name, storages[file], meta)
    return found


def _parameter(value: torch.Tensor) -> torch.nn.Parameter:
    if isinstance(value, torch.nn.Parameter):
        return value
    return torch.nn.Parameter(value, requires_grad=False)


def _tensor(name: str, storage: bytearray, meta: Any) -> torch.Tensor:
    """A tensor over raw bytes, once its sizes and strides are known to stay within them."""
    sizes, strides = ([item["as_int"] for item in meta[key]] for key in ("sizes", "strides"))
    offset = meta["storage_offset"]["as_int"]
    dtype = serialize._SERIALIZE_TO_TORCH_DTYPE.get(meta["dtype"])
    if dtype is None or len(sizes) != len(strides) or len(sizes) > _MAX_RANK:
        raise refused("a tensor of a malformed type or shape", name)
    if 0 in sizes:
        return torch.empty(sizes, dtype=dtype)
    available = len(storage) // dtype.itemsize
    last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    # No more elements than are stored: an axis of stride 0 could stand for any number of them.
    if last >= available or math.prod(sizes) > available:
        raise refused("a tensor that is larger than its bytes", name)
    whole = torch.frombuffer(storage, dtype=dtype, count=available)
    return whole.as_strided(sizes, strides, offset)
