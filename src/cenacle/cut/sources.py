"""Where models come from: files and programs of today's frameworks, all read into one form.

==================  ==============================================================
``.onnx``           read as it is; nothing in it can run
``.pt2``            ``torch.export.save``: read without unpickling anything
``.keras``          Keras 3, with layers of Keras itself only
``module:function`` the user's own code builds a PyTorch module: **it is run**
a PyTorch module    in evaluation mode
a Keras model       functional or sequential, on Keras' torch backend
==================  ==============================================================

A format that runs code when it is loaded (pickles, and all that contain them) is refused by name,
with what to save instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from cenacle.cut.onnx_model import OnnxModel
from cenacle.cut.specs import TensorSpec
from cenacle.errors import InputError, UnavailableError

if TYPE_CHECKING:
    from cenacle.cut.torch_source import Inputs

__all__ = ["SOURCES", "Source", "load_model", "parse_input", "register_source"]


@dataclass(frozen=True)
class Source:
    """A kind of file that holds models.

    Attributes:
        name: for people.
        suffixes: of its files, in small letters.
        load: reads one, with nothing in it being run.
    """

    name: str
    suffixes: tuple[str, ...]
    load: Callable[[Path], OnnxModel]


def _onnx(path: Path) -> OnnxModel:
    return OnnxModel.load(path)


def _pt2(path: Path) -> OnnxModel:
    _need("torch", "onnxscript")
    from cenacle.cut.program import to_proto  # noqa: PLC0415 - torch is optional and slow
    from cenacle.cut.pt2_source import load_program  # noqa: PLC0415

    program = load_program(path)
    names = list(program.graph_signature.user_inputs)
    return OnnxModel.from_proto(to_proto(program, inputs=names))


def _keras(path: Path) -> OnnxModel:
    _need("torch", "onnxscript", "keras")
    from cenacle.cut.keras_source import export_keras, load_keras  # noqa: PLC0415

    return OnnxModel.from_proto(export_keras(load_keras(path)))


SOURCES: Final[dict[str, Source]] = {}


def register_source(source: Source) -> None:
    """Let :func:`load_model` read another kind of file.

    Raises:
        ValueError: one of its suffixes is taken.
    """
    for suffix in source.suffixes:
        if suffix in SOURCES or suffix in _REFUSED:
            raise ValueError(f"files that end in {suffix} are taken")
    SOURCES.update(dict.fromkeys(source.suffixes, source))


_STATE_DICT: Final = (
    "save its weights as .safetensors and give your code that builds the model, "
    "as package.module:function with --weights; or torch.export.save it as .pt2"
)
_REFUSED: Final[Mapping[str, str]] = {
    ".pt": _STATE_DICT,
    ".pth": _STATE_DICT,
    ".bin": _STATE_DICT,
    ".ckpt": _STATE_DICT,
    ".pkl": _STATE_DICT,
    ".pickle": _STATE_DICT,
    ".joblib": "export the model to .onnx, such as with skl2onnx",
    ".safetensors": "give your code that builds the model too, as package.module:function",
    ".h5": "load it with the Keras that wrote it, and model.save it as .keras with Keras 3",
    ".hdf5": "load it with the Keras that wrote it, and model.save it as .keras with Keras 3",
    ".pb": "convert the SavedModel with tf2onnx, or load it into Keras 3 and save it as .keras",
    ".tflite": "convert it with tf2onnx",
}
for _source in (
    Source("ONNX", (".onnx",), _onnx),
    Source("torch.export", (".pt2",), _pt2),
    Source("Keras", (".keras",), _keras),
):
    register_source(_source)


def load_model(
    spec: Any, *, weights: Path | None = None, inputs: Inputs | None = None
) -> OnnxModel:
    """A model from wherever it is.

    Args:
        spec: a path; ``package.module:function`` or ``file.py:function``, which IS RUN to build
            a PyTorch module; a ``torch.nn.Module``; a ``keras.Model``.
        weights: for a PyTorch module: a ``.safetensors`` file or a state dict, which must hold
            each of its weights and no others.
        inputs: for a PyTorch module: example inputs, or their specs, in the order of its
            ``forward`` or by name. The first axis of each counts the rows of a batch.

    Raises:
        InputError: no such file, or a format that is not taken; the remedy says what to save.
        DataError: a damaged or hostile file, or a model that cannot be brought into this form.
        UnavailableError: a library that this kind of model needs is not installed.
    """
    if isinstance(spec, str | Path):
        path = Path(spec)
        module, _, function = str(spec).rpartition(":")
        if module and function.isidentifier() and not path.exists():
            return _from_code(str(spec), weights, inputs)
        if weights is not None or inputs is not None:
            raise InputError(
                f"weights and inputs belong to models that code builds: {path.name}",
                expected="a file that holds the whole model, or package.module:function",
            )
        return _source_of(path).load(path)
    _need("torch", "onnxscript")
    from cenacle.cut.keras_source import export_keras, is_keras_model  # noqa: PLC0415
    from cenacle.cut.torch_source import export_module, load_weights  # noqa: PLC0415

    if is_keras_model(spec):
        return OnnxModel.from_proto(export_keras(spec))
    import torch  # noqa: PLC0415

    if not isinstance(spec, torch.nn.Module):
        raise InputError(
            "this is no model", found=type(spec).__name__, expected="a path or a model"
        )
    if weights is not None:
        load_weights(spec, weights)
    return OnnxModel.from_proto(export_module(spec, inputs))


def _from_code(spec: str, weights: Path | None, inputs: Inputs | None) -> OnnxModel:
    _need("torch", "onnxscript")
    from cenacle.cut.torch_source import build_module  # noqa: PLC0415

    module, own = build_module(spec)
    return load_model(module, weights=weights, inputs=own if inputs is None else inputs)


def _source_of(path: Path) -> Source:
    suffix = path.suffix.lower()
    if path.is_dir() or suffix in _REFUSED:
        saved = (path / "saved_model.pb").exists()
        raise InputError(
            f"models are not taken from this: {path.name}",
            found="a TensorFlow SavedModel" if saved else suffix or "a folder",
            expected=", ".join(SOURCES),
            remedy=_REFUSED[".pb"] if path.is_dir() else _REFUSED[suffix],
        )
    if suffix not in SOURCES:
        raise InputError(
            f"no kind of model is known by this name: {path.name}",
            found=suffix or "no suffix",
            expected=", ".join(SOURCES) + ", or package.module:function",
        )
    if not path.is_file():
        raise InputError(f"no such file: {path}", expected="a model")
    return SOURCES[suffix]


def _need(*libraries: str) -> None:
    """
    Raises:
        UnavailableError: one of the libraries is not installed.
    """
    from importlib.util import find_spec  # noqa: PLC0415

    for library in libraries:
        if find_spec(library) is None:
            raise UnavailableError(
                f"the library {library} is not installed",
                expected="the libraries that bring models into ONNX",
                remedy=f"pip install 'cenacle[{'keras' if library == 'keras' else 'cut'}]'",
            )


_INPUT: Final = re.compile(r"(?:(?P<name>[^=\[\]]+)=)?(?P<dtype>[A-Z]+[0-9]*)\[(?P<sizes>[^\]]*)\]")


def parse_input(text: str, *, position: int = 0) -> TensorSpec:
    """An input as users write it: ``image=F32[N,3,224,224]``; ``N`` counts the batch.

    Args:
        text: name, ``=``, type as in safetensors, sizes; without a name, inputs go by position.
        position: of the input among those without names.

    Raises:
        InputError: it is not written so.
    """
    match = _INPUT.fullmatch(text.replace(" ", ""))
    sizes: Sequence[str] = match["sizes"].split(",") if match and match["sizes"] else []
    if match is None or not all(size == "N" or size.isdecimal() for size in sizes):
        raise InputError(
            "this does not describe an input of a model",
            found=text[:120],
            expected="NAME=TYPE[N,SIZE,...], such as image=F32[N,3,224,224] or ids=I64[N,128]",
        )
    shape = tuple(None if size == "N" else int(size) for size in sizes)
    return TensorSpec(match["name"] or f"input_{position}", match["dtype"], shape)
