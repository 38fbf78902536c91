"""PyTorch modules: the user's own code builds them, ``torch.export`` reads them."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import onnx
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from cenacle.cut.program import BATCH, quiet, to_proto
from cenacle.cut.specs import TensorSpec
from cenacle.errors import DataError, InputError

__all__ = [
    "Inputs",
    "build_module",
    "export_module",
    "load_weights",
    "not_exported",
    "read_weights",
]

Inputs = Sequence[torch.Tensor | TensorSpec] | Mapping[str, torch.Tensor]

_DTYPES: Final[Mapping[str, torch.dtype]] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_SAMPLE_ROWS: Final = 2  # torch.export takes an axis of 0 or 1 for a constant


def build_module(spec: str) -> tuple[nn.Module, Inputs | None]:
    """Calls ``package.module:function`` or ``file.py:function``, which RUNS THE USER'S CODE.

    The function takes no arguments and returns a module, or a module and its example inputs.

    Raises:
        InputError: there is no such function, it fails, or returns something else.
    """
    place, _, name = spec.rpartition(":")
    try:
        function = getattr(_import(place), name)
    except (ImportError, AttributeError, OSError, SyntaxError) as error:
        raise InputError(
            f"the function that builds the model was not found: {spec}",
            found=f"{type(error).__name__}: {error}",
            expected="package.module:function or path/file.py:function",
        ) from error
    try:
        built = function()
    except Exception as error:
        raise InputError(
            f"the function that builds the model failed: {spec}",
            found=f"{type(error).__name__}: {error}",
            expected="a function without arguments that returns a torch.nn.Module",
        ) from error
    module, inputs = built if isinstance(built, tuple) and len(built) == 2 else (built, None)
    if not isinstance(module, nn.Module):
        raise InputError(
            f"the function builds no model: {spec}",
            found=type(module).__name__,
            expected="a torch.nn.Module, or a tuple of it and of example inputs",
        )
    return module, inputs


def _import(place: str) -> Any:
    if not place.endswith(".py"):
        with _working_folder_importable():
            return importlib.import_module(place)
    path = Path(place).resolve()
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{place} is no Python file")
    module = importlib.util.module_from_spec(spec)
    # Classes are looked up by their module's name, by dataclasses and by torch.export.
    before = sys.modules.get(path.stem)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        if before is None:
            del sys.modules[path.stem]
        else:
            sys.modules[path.stem] = before
        raise
    return module


@contextmanager
def _working_folder_importable() -> Iterator[None]:
    """As ``python -m`` has it, after everything that is installed."""
    folder = str(Path.cwd())
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a ``.safetensors`` file or of a PyTorch state dict, by name.

    Nothing in the file is run: state dicts are read with ``weights_only=True``.

    Raises:
        DataError: another format, or something else than tensors by name.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file  # noqa: PLC0415 - optional

            found: Any = load_file(path)
        else:
            with quiet():
                found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling hostile bytes may fail in any way
        raise DataError(
            f"the weights cannot be read: {path.name}",
            found=type(error).__name__,
            expected="a .safetensors file, or a state dict that holds tensors only",
            remedy="save model.state_dict() with safetensors.torch.save_file",
        ) from error
    if not isinstance(found, Mapping) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in found.items()
    ):
        raise DataError(
            f"the file of weights holds something else: {path.name}",
            found=type(found).__name__,
            expected="tensors by name, as model.state_dict() gives them",
        )
    return dict(found)


def load_weights(module: nn.Module, path: Path) -> None:
    """Fills a module with the weights of a file, each of which must be there exactly.

    Raises:
        DataError: a weight is missing, left over, or of another shape.
    """
    found, own = read_weights(path), module.state_dict()
    wrong = {
        "missing": sorted(own.keys() - found.keys()),
        "not in the model": sorted(found.keys() - own.keys()),
        "of another shape": sorted(
            name for name in own.keys() & found.keys() if own[name].shape != found[name].shape
        ),
    }
    if any(wrong.values()):
        counts = [
            f"{len(names)} {what} ({names[0][:80]}{', ...' if len(names) > 1 else ''})"
            for what, names in wrong.items()
            if names
        ]
        raise DataError(
            f"the weights do not fit the model: {path.name}",
            found=", ".join(counts),
            expected="every weight of the model and no other",
        )
    # assign: a module built on the meta device has no storage to copy into.
    module.load_state_dict(found, strict=True, assign=any(t.is_meta for t in own.values()))


def export_module(module: nn.Module, inputs: Inputs | None) -> onnx.ModelProto:
    """A module in evaluation mode as ONNX, with its first axes for the batch.

    The module is put into evaluation mode for the export and back afterwards.

    Args:
        module: takes tensors; returns a tensor, or tensors in tuples, lists, dictionaries.
        inputs: example inputs or their specs, as the module's ``forward`` takes them: in its
            order, or by its names. All first axes count the rows of the batch.

    Raises:
        DataError: the model cannot be exported; the sentence names the layer or operator.
    """
    if not inputs:
        raise InputError(
            "the inputs of the model are not known",
            expected="example tensors, or a spec for each input",
            remedy="say them as NAME=F32[N,3,224,224], N for the batch",
        )
    _check_module(module)
    args, kwargs = _samples(module, inputs)
    batch = torch.export.Dim(BATCH)
    shapes: dict[str, Any] = {}
    parameters = list(inspect.signature(module.forward).parameters.values())
    for name, value in [
        *zip(_argument_names(parameters, len(args)), args, strict=True),
        *kwargs.items(),
    ]:
        shapes[name] = {0: batch} if value.dim() else None
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad(), quiet():
            program = torch.export.export(
                module, args, kwargs, dynamic_shapes=_nested(parameters, shapes), strict=False
            )
    except Exception as error:
        raise not_exported(error) from error
    finally:
        for part, training in modes:
            part.training = training
    return to_proto(program)


def _check_module(module: nn.Module) -> None:
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        if is_lazy(value) or value.is_meta:
            raise DataError(
                f"the model has a weight without values: {name[:120]}",
                expected="a model with all its weights",
                remedy="give the file of weights, or run the model once before",
            )
    for name, part in module.named_modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_mean is None:
            raise DataError(
                f"layer {name[:120]!r} normalises by the batch, so rows depend on one another",
                found="batch normalisation without running statistics",
                expected="the same answer to a query whatever else is in its batch",
                remedy="train it with track_running_stats=True, or use group normalisation",
            )


def _samples(
    module: nn.Module, inputs: Inputs
) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    if isinstance(inputs, Mapping):
        return (), {str(name): _rows(value) for name, value in inputs.items()}
    values = [_sample(item) if isinstance(item, TensorSpec) else item for item in inputs]
    if not all(isinstance(value, torch.Tensor) for value in values):
        raise InputError(
            "the inputs of a model must be tensors",
            found=", ".join(type(value).__name__ for value in values),
        )
    known = inspect.signature(module.forward).parameters
    names = [item.name for item in inputs if isinstance(item, TensorSpec)]
    if len(names) == len(values) and set(names) <= set(known):
        return (), {name: _rows(value) for name, value in zip(names, values, strict=True)}
    return tuple(_rows(value) for value in values), {}


def _sample(spec: TensorSpec) -> torch.Tensor:
    if spec.dtype not in _DTYPES or any(size is None for size in spec.shape[1:]):
        raise InputError(
            f"input {spec.name[:80]!r} cannot be made up",
            found=f"{spec.dtype}{list(spec.shape)}",
            expected="a type of numbers, and fixed sizes but for the batch",
        )
    sizes = [_SAMPLE_ROWS if size is None else size for size in spec.shape]
    # Zeros are valid as token ids too; the values themselves leave no trace in the model.
    return torch.zeros(sizes, dtype=_DTYPES[spec.dtype])


def _rows(value: torch.Tensor) -> torch.Tensor:
    """With at least two rows."""
    if value.dim() == 0 or value.shape[0] >= _SAMPLE_ROWS:
        return value
    return value.new_zeros((_SAMPLE_ROWS, *value.shape[1:]))


def _argument_names(parameters: Sequence[inspect.Parameter], count: int) -> list[str]:
    """A name for each positional argument; those of ``*args`` get made-up ones."""
    names = [p.name for p in parameters if p.kind is not inspect.Parameter.VAR_POSITIONAL]
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters):
        first = next(i for i, p in enumerate(parameters) if p.kind is p.VAR_POSITIONAL)
        return [*names[:first], *(f"*{i}" for i in range(count - first))][:count]
    if count > len(names):
        raise InputError(
            "the model takes fewer inputs", found=f"{count} inputs", expected=str(len(names))
        )
    return names[:count]


def _nested(parameters: Sequence[inspect.Parameter], shapes: Mapping[str, Any]) -> dict[str, Any]:
    """By the names of ``forward``: those of ``*args`` and ``**kwargs`` under their own name."""
    nested: dict[str, Any] = {}
    fixed = {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    several = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None)
    named = next((p.name for p in parameters if p.kind is p.VAR_KEYWORD), None)
    for name, shape in shapes.items():
        if name in fixed:
            nested[name] = shape
        elif name.startswith("*") and several is not None:
            nested[several] = (*nested.get(several, ()), shape)
        elif named is not None:
            nested.setdefault(named, {})[name] = shape
        else:
            raise InputError(
                f"the model takes no input {name[:80]!r}", expected=", ".join(sorted(fixed))
            )
    return nested


def not_exported(error: Exception) -> DataError:
    """Why ``torch.export`` could not read a model, in one sentence with a remedy."""
    text = str(error)
    if "Constraints violated" in text or "specialized" in text or "0/1 specialization" in text:
        return DataError(
            "the model fixes the number of rows of its batch",
            found=_first_line(text),
            expected="a model that takes any number of rows",
            remedy="write -1, flatten(1) or x.shape[0] instead of a number for the first axis",
        )
    return DataError(
        "the model cannot be read by torch.export",
        found=f"{type(error).__name__}: {_first_line(text)}",
        expected="a forward without branches or loops that depend on values",
        remedy="write it with tensor operations (torch.where), or export it yourself to .onnx",
    )


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:200] if lines else "no message"
