"""Keras 3 models, on Keras' torch backend.

The graph of a functional model is run operation by operation, each inside a module of its own,
while ``torch.export`` watches: so every node carries the name of its Keras layer, and every
weight its Keras path. Recurrent layers are unrolled over their time steps.
"""

from __future__ import annotations

import copy
import importlib
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import onnx
import torch
from torch import nn

from cenacle.cut.program import BATCH, quiet, to_proto
from cenacle.cut.program import Path as LayerPath
from cenacle.cut.torch_source import not_exported
from cenacle.errors import DataError, InputError, UnavailableError

__all__ = ["export_keras", "import_keras", "is_keras_model", "load_keras"]

_ROWS: Final = 2
_PART: Final = re.compile(r"(?P<path>parts\.l\d+(?:\.parts\.l\d+)*)(?P<again>@\d+)?")
_SPARE: Final = 1 << 20  # bytes of state that the file of weights need not hold


def import_keras() -> Any:
    """Keras on its torch backend; the one place where it is imported.

    Raises:
        UnavailableError: Keras is not installed.
        InputError: this process runs Keras on another backend already.
    """
    if "keras" not in sys.modules:
        before = os.environ.get("KERAS_BACKEND")
        os.environ["KERAS_BACKEND"] = "torch"
        try:
            with quiet():
                importlib.import_module("keras")
        except ImportError as error:
            raise UnavailableError(
                "Keras is not installed",
                expected="Keras 3, for models in .keras files",
                remedy="pip install 'cenacle[keras]'",
            ) from error
        finally:
            if before is None:
                del os.environ["KERAS_BACKEND"]
            else:
                os.environ["KERAS_BACKEND"] = before
    keras: Any = sys.modules["keras"]
    if keras.backend.backend() != "torch":
        raise InputError(
            "Keras runs on another backend in this process",
            found=keras.backend.backend(),
            expected="torch",
            remedy="set KERAS_BACKEND=torch before keras is imported, or give a .keras file",
        )
    return keras


def is_keras_model(value: object) -> bool:
    """Whether a value is a Keras model, without importing Keras for the answer."""
    keras: Any = sys.modules.get("keras")
    return keras is not None and isinstance(value, keras.Model)


def load_keras(path: Path) -> Any:
    """The model of a ``.keras`` file, built from layers of Keras itself only.

    Raises:
        DataError: see :func:`cenacle.cut.keras_archive.open_archive`; or its weights do not fit.
    """
    from cenacle.cut.keras_archive import check_weights, open_archive  # noqa: PLC0415 - optional

    keras = import_keras()
    with open_archive(path) as (config, weights):
        try:
            with quiet():
                # First without memory: a description may ask for more than its weights fill.
                with keras.device("meta"):
                    sketch = _build(keras, config)
                asked = sum(_bytes(variable) for variable in sketch.variables)
                if asked <= check_weights(weights) + _SPARE:
                    model = _build(keras, config)
                    model.load_weights(weights)
                    return model
        except (ImportError, MemoryError):
            raise
        except Exception as error:  # Keras raises anything for descriptions that it cannot build
            raise DataError(
                f"Keras cannot build the model: {path.name}",
                found=f"{type(error).__name__}: {_first_line(error)}",
                expected="a file that model.save('name.keras') of Keras 3 wrote",
            ) from error
    raise DataError(
        f"the weights do not fit the model: {path.name}",
        found=f"a description of {asked} bytes of weights",
        expected="as many as the file holds",
    )


def _build(keras: Any, config: dict[str, Any]) -> Any:
    return keras.saving.deserialize_keras_object(copy.deepcopy(config), safe_mode=True)


def _bytes(variable: Any) -> int:
    return math.prod(int(size) for size in variable.shape) * 4


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:160]


class _Leaf(nn.Module):
    """One operation of the graph, so that torch sees where it begins and ends."""

    def __init__(self, operation: Any) -> None:
        super().__init__()
        self.op = operation

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        from keras.src.models.functional import operation_fn  # noqa: PLC0415

        return operation_fn(self.op, training=False)(*args, **kwargs)


class _Graph(nn.Module):
    """A functional model whose operations are modules ``parts.l0``, ``parts.l1``, ..."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        # Behind a function, so that it is no child: its weights belong to the parts.
        self.behind: Callable[[], Any] = lambda: model
        self.parts = nn.ModuleDict()
        self.operations: dict[int, nn.Module] = {}
        for index, operation in enumerate(model.operations):
            inner = _functional(operation)
            part = _Leaf(operation) if inner is None else _Graph(inner)
            self.parts[f"l{index}"] = self.operations[id(operation)] = part

    def forward(self, inputs: Any, mask: Any = None, **_: Any) -> Any:
        from keras.src import backend, tree  # noqa: PLC0415

        model = self.behind()
        inputs = model._standardize_inputs(inputs)
        if mask is not None:
            for value, own in zip(tree.flatten(inputs), tree.flatten(mask), strict=True):
                if own is not None:
                    backend.set_keras_mask(value, own)
        outputs = model._run_through_graph(
            inputs, operation_fn=lambda operation: self.operations[id(operation)]
        )
        return outputs[0] if isinstance(outputs, list) and len(outputs) == 1 else outputs

    def names(self, prefix: str = "", scope: str = "") -> Iterator[tuple[str, str, Any]]:
        """Scope in torch and Keras name of each part, and the Keras layer or operation."""
        for index, operation in enumerate(self.behind().operations):
            here, name = f"{scope}parts.l{index}", f"{prefix}{operation.name}"
            yield here, name, operation
            part = self.parts[f"l{index}"]
            if isinstance(part, _Graph):
                yield from part.names(f"{name}.", f"{here}.")


class _Root(nn.Module):
    """Takes one tensor for each input and returns outputs by name."""

    def __init__(self, graph: _Graph, outputs: list[str]) -> None:
        super().__init__()
        self.top, self.outputs = graph, outputs  # "graph" is torch.fx's own

    def forward(self, inputs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        from keras.src import tree  # noqa: PLC0415

        model = self.top.behind()
        found = self.top(tree.pack_sequence_as(model._inputs_struct, inputs))
        return dict(zip(self.outputs, tree.flatten(found), strict=True))


def _functional(model: Any) -> Any | None:
    """The functional model behind a model; None for a layer."""
    keras: Any = sys.modules["keras"]
    if isinstance(model, keras.Sequential):
        return model._functional
    return model if isinstance(model, keras.src.models.functional.Functional) else None


def export_keras(model: Any) -> onnx.ModelProto:
    """A functional or sequential Keras model as ONNX, one layer for each of its layers.

    Raises:
        DataError: a subclassed model; a size besides the batch that is not fixed; a recurrent
            layer that keeps its state; an operation that ONNX does not have.
    """
    keras = import_keras()
    functional = _functional(model)
    if functional is None:
        raise DataError(
            "the Keras model has no graph",
            found=f"a {'sequential model without inputs' if _is_sequential(model) else 'subclass'}",
            expected="a functional or sequential model with inputs",
            remedy="build it with keras.Model(inputs, outputs), or begin it with keras.Input",
        )
    root = _Root(_Graph(functional), _output_names(functional))
    inputs = [_sample(tensor) for tensor in functional.inputs]
    shapes = [{0: torch.export.Dim(BATCH)} for _ in inputs]
    scopes = {f"top.{scope}": (name, type(part).__name__) for scope, name, part in root.top.names()}
    try:
        with _unrolled(keras, functional), torch.no_grad(), quiet():
            root.eval()
            program = torch.export.export(
                root, (inputs,), dynamic_shapes={"inputs": shapes}, strict=False
            )
    except DataError:
        raise
    except Exception as error:
        raise not_exported(error) from error
    return to_proto(
        program,
        names=_weight_names(program, root.top),
        inputs=[tensor.name for tensor in functional.inputs],
        rescope=lambda path: _rescope(path, scopes),
    )


def _is_sequential(model: Any) -> bool:
    return isinstance(model, sys.modules["keras"].Sequential)


def _output_names(functional: Any) -> list[str]:
    from keras.src import tree  # noqa: PLC0415

    struct = functional._outputs_struct
    found = list(struct) if isinstance(struct, dict) else functional.output_names
    if isinstance(struct, dict) and len(tree.flatten(struct)) != len(found):
        found = functional.output_names
    names: list[str] = []
    for name in found:
        unique, count = str(name), 1
        while unique in names:
            count += 1
            unique = f"{name}_{count}"
        names.append(unique)
    return names


def _sample(tensor: Any) -> torch.Tensor:
    if tensor.shape[0] is not None or any(size is None for size in tensor.shape[1:]):
        raise DataError(
            f"input {tensor.name[:80]!r} of the Keras model has an unusable shape",
            found=str(tuple(tensor.shape)),
            expected="any number of rows, and fixed sizes otherwise",
            remedy="give keras.Input a shape without None, such as the number of time steps",
        )
    kind = getattr(torch, str(tensor.dtype), None)
    if not isinstance(kind, torch.dtype):
        raise DataError(
            f"input {tensor.name[:80]!r} of the Keras model is no number", found=tensor.dtype
        )
    return torch.zeros((_ROWS, *tensor.shape[1:]), dtype=kind)


def _weight_names(program: torch.export.ExportedProgram, graph: _Graph) -> dict[str, str]:
    """Names of the tensors that the program holds: path of the layer, then the layer's own path.

    Keras reads its variables past torch's lists of parameters, so torch takes them for constants.
    Paths in Keras itself depend on how a model was built, so they begin with the layer here.
    """
    paths: dict[tuple[int, tuple[int, ...]], str] = {}
    for _, name, part in graph.names():
        for variable in getattr(part, "variables", ()):
            _, found, own = f"/{variable.path}".partition(f"/{part.name}/")
            path = f"{name.replace('.', '/')}/{own if found else variable.path}"
            # Of a model inside the model the innermost layer says the name.
            paths[variable.value.data_ptr(), tuple(variable.shape)] = path
    names: dict[str, str] = {}
    for name, value in [*program.constants.items(), *program.state_dict.items()]:
        path = paths.pop((value.data_ptr(), tuple(value.shape)), "")
        if not path:
            continue
        unique, count = path, 1
        while unique in names.values():
            count += 1
            unique = f"{path}_{count}"
        names[name] = unique
    return names


def _rescope(path: LayerPath, scopes: Mapping[str, tuple[str, str]]) -> LayerPath:
    """Keras layers instead of the modules around them, and nothing of what is inside a layer."""
    operation = path[-1]
    layers: LayerPath = [("", "")]
    for scope, _ in path[:-1]:
        match = re.fullmatch(r"top\." + _PART.pattern, scope)
        if match is not None:
            name, kind = scopes[f"top.{match['path']}"]
            layers.append((name + (match["again"] or ""), kind))
    return [*layers, operation]


@contextmanager
def _unrolled(keras: Any, functional: Any) -> Iterator[None]:
    """Recurrent layers as one step after the other; as they were afterwards."""
    layers = [
        layer
        for layer in functional._flatten_layers()
        if isinstance(layer, keras.layers.RNN) and not isinstance(layer, keras.Model)
    ]
    for layer in layers:
        if layer.stateful:
            raise DataError(
                f"layer {layer.name[:80]!r} of the Keras model keeps its state between queries",
                expected="recurrent layers with stateful=False",
            )
    before = [layer.unroll for layer in layers]
    try:
        for layer in layers:
            layer.unroll = True
        yield
    finally:
        for layer, unroll in zip(layers, before, strict=True):
            layer.unroll = unroll
