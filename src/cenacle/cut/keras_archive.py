"""What a ``.keras`` file may contain: checked before Keras sees any of it.

A ``.keras`` file is a zip of a description (``config.json``) and of weights in HDF5. Keras
builds whatever classes the description names, and HDF5 follows links to other files, so both
are held against lists of what is known to be harmless: layers of Keras itself that compute
tensors from tensors, and plain arrays of numbers. All else is refused by name.
"""

from __future__ import annotations

import json
import re
import shutil
import stat
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import h5py

from cenacle.errors import DataError, InputError

__all__ = ["check_config", "check_weights", "open_archive"]

CONFIG: Final = "config.json"
METADATA: Final = "metadata.json"
WEIGHTS: Final = "model.weights.h5"
_LIMITS: Final = {CONFIG: 64 << 20, METADATA: 1 << 20, WEIGHTS: 64 << 30}
_MAX_RATIO: Final = 100  # unpacked to packed: Keras itself does not compress at all
_MAX_DEPTH: Final = 200
_MAX_OBJECTS: Final = 200_000
_IDENTIFIER: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")

_MODELS: Final = {
    "keras": {"Sequential", "Functional", "Model"},
    "keras.models": {"Sequential", "Functional", "Model"},
    "keras.src.models.functional": {"Functional"},
    "keras.src.models.sequential": {"Sequential"},
}
# Not among them: Lambda, and the layers that load other programs or read files
# (TorchModuleWrapper, TFSMLayer, JaxLayer, FlaxLayer, StringLookup, TextVectorization, ...).
_LAYERS: Final = frozenset(
    re.findall(
        r"\w+",
        """Activation ActivityRegularization AdaptiveAveragePooling1D AdaptiveAveragePooling2D
    AdaptiveAveragePooling3D AdaptiveMaxPooling1D AdaptiveMaxPooling2D AdaptiveMaxPooling3D Add
    AdditiveAttention AlphaDropout Attention Average AveragePooling1D AveragePooling2D
    AveragePooling3D BatchNormalization Bidirectional CategoryEncoding CenterCrop Concatenate
    Conv1D Conv1DTranspose Conv2D Conv2DTranspose Conv3D Conv3DTranspose Cropping1D Cropping2D
    Cropping3D Dense DepthwiseConv1D DepthwiseConv2D Discretization Dot Dropout ELU EinsumDense
    Embedding Flatten GRU GRUCell GaussianDropout GaussianNoise GlobalAveragePooling1D
    GlobalAveragePooling2D GlobalAveragePooling3D GlobalMaxPooling1D GlobalMaxPooling2D
    GlobalMaxPooling3D GroupNormalization GroupQueryAttention Identity InputLayer LSTM LSTMCell
    LayerNormalization LeakyReLU Masking MaxPooling1D MaxPooling2D MaxPooling3D Maximum Minimum
    MultiHeadAttention Multiply Normalization PReLU Permute RMSNormalization RNN
    RandomBrightness RandomContrast RandomCrop RandomFlip RandomRotation RandomTranslation
    RandomZoom ReLU RepeatVector Rescaling Reshape Resizing ReversibleEmbedding SeparableConv1D
    SeparableConv2D SimpleRNN SimpleRNNCell Softmax SpatialDropout1D SpatialDropout2D
    SpatialDropout3D SpectralNormalization StackedRNNCells Subtract TimeDistributed
    UnitNormalization UpSampling1D UpSampling2D UpSampling3D ZeroPadding1D ZeroPadding2D
    ZeroPadding3D""",
    )
)
# Modules of which every class computes with what its own description says.
_PLAIN: Final = frozenset(
    {
        "keras.initializers",
        "keras.regularizers",
        "keras.constraints",
        "keras.src.ops.numpy",
        "keras.src.ops.nn",
        "keras.src.ops.math",
        "keras.src.ops.linalg",
    }
)
_CORE_OPS: Final = {"Cast", "ConvertToTensor", "SaturateCast", "Shape", "Slice", "StopGradient"}
_POLICIES: Final = {"DTypePolicy", "FloatDTypePolicy", "DTypePolicyMap"}
_VALUES: Final = {"__keras_tensor__", "__tensor__", "__numpy__", "__slice__", "__ellipsis__"}
_ACTIVATIONS: Final = frozenset(
    re.findall(
        r"\w+",
        """celu elu exponential gelu glu hard_shrink hard_sigmoid hard_silu hard_swish hard_tanh
    leaky_relu linear log_sigmoid log_softmax mish relu relu6 selu sigmoid silu soft_shrink
    softmax softplus softsign sparse_plus sparse_sigmoid sparsemax squareplus swish tanh
    tanh_shrink threshold""",
    )
)


@contextmanager
def open_archive(path: Path) -> Iterator[tuple[dict[str, Any], Path]]:
    """The checked description of a model, and a private copy of its checked weights.

    The copy is named as Keras demands and is removed at the end.

    Raises:
        InputError: no such file.
        DataError: no ``.keras`` archive, or one that holds anything that could run code, read
            other files or unpack without bound; the sentence names it.
    """
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    try:
        with zipfile.ZipFile(path) as archive, TemporaryDirectory(prefix="cenacle-") as folder:
            entries = _entries(archive)
            config = check_config(_json(archive.read(entries[CONFIG]), CONFIG))
            weights = Path(folder) / WEIGHTS
            with archive.open(entries[WEIGHTS]) as packed, weights.open("xb") as unpacked:
                shutil.copyfileobj(packed, unpacked, 1 << 20)
            check_weights(weights)
            yield config, weights
    except (zipfile.BadZipFile, zipfile.LargeZipFile, EOFError, NotImplementedError) as error:
        raise DataError(
            f"the file is no .keras archive: {path.name}",
            found=str(error)[:120],
            expected="a file that model.save('name.keras') of Keras 3 wrote",
        ) from error


def _entries(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    found: dict[str, zipfile.ZipInfo] = {}
    for entry in archive.infolist():
        kind = stat.S_IFMT(entry.external_attr >> 16)
        name = entry.filename
        if name not in _LIMITS or name in found or kind not in {0, stat.S_IFREG}:
            raise DataError(
                "the .keras archive holds a file that no model needs",
                found=repr(name[:120]),
                expected=", ".join(_LIMITS) + ", each once",
                remedy="leave out layers that read files, such as vocabularies",
            )
        packed = max(entry.compress_size, 1 << 10)
        if entry.file_size > min(_LIMITS[name], packed * _MAX_RATIO):
            raise DataError(
                f"{name} in the .keras archive unpacks to too much",
                found=f"{entry.file_size} bytes from {entry.compress_size}",
                expected=f"at most {_LIMITS[name]}, and {_MAX_RATIO} for each byte",
            )
        if entry.flag_bits & 0x1:
            raise DataError("the .keras archive is encrypted", expected="an archive in plain")
        found[name] = entry
    if missing := [name for name in (CONFIG, WEIGHTS) if name not in found]:
        raise DataError(
            "the .keras archive is incomplete",
            found=f"no {missing[0]}",
            expected=f"{CONFIG} and {WEIGHTS}",
        )
    return found


def _json(content: bytes, name: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{name} in the .keras archive is no JSON", found=str(error)[:80]
        ) from error


def check_config(config: Any) -> dict[str, Any]:
    """The description without what only training needs, once every class in it is known.

    Raises:
        DataError: a class or function outside the lists above.
    """
    if not isinstance(config, dict) or config.get("class_name") not in _MODELS["keras"]:
        kind = config.get("class_name") if isinstance(config, dict) else type(config).__name__
        raise DataError(
            "the .keras file describes no model that has a graph",
            found=repr(str(kind)[:80]),
            expected="a functional or sequential model",
            remedy="rebuild a subclassed model with keras.Model(inputs, outputs)",
        )
    cleaned = _checked(config, 0)
    assert isinstance(cleaned, dict)
    return cleaned


def _checked(value: Any, depth: int) -> Any:
    if depth > _MAX_DEPTH:
        raise DataError("the description of the Keras model is nested too deep")
    if isinstance(value, list):
        return [_checked(item, depth + 1) for item in value]
    if not isinstance(value, dict):
        return value
    if "class_name" in value:
        _check_object(value)
    return {
        name: _checked(item, depth + 1) for name, item in value.items() if name != "compile_config"
    }


def _check_object(config: Mapping[str, Any]) -> None:
    name, module = config["class_name"], config.get("module")
    if not isinstance(name, str):
        raise _refused(repr(name)[:80], module)
    if name in _VALUES and module is None:
        return
    if not isinstance(module, str) or _IDENTIFIER.fullmatch(name) is None:
        raise _refused(name, module)
    registered = config.get("registered_name")
    if name == "function":
        function = config.get("config")
        known = isinstance(function, str) and function in _ACTIVATIONS
        if not known or module not in {"builtins", "keras.activations"}:
            raise _refused(f"function {function}", module)
        if registered not in {None, function}:
            raise _refused(f"registered function {registered}", module)
        return
    if registered not in {None, name}:
        raise _refused(f"registered object {registered}", module)
    if not (
        (module == "keras.layers" and name in _LAYERS)
        or name in _MODELS.get(module, ())
        or module in _PLAIN
        or (module in {"keras", "keras.dtype_policies"} and name in _POLICIES)
        or (module == "keras.src.ops.core" and name in _CORE_OPS)
    ):
        raise _refused(name, module)


def _refused(name: object, module: object) -> DataError:
    lambdas = "Lambda" in str(name) or "lambda" in str(name)
    return DataError(
        "the .keras file asks for an object that is not taken, for it could run code",
        found=f"{str(name)[:80]} of {str(module)[:80]}",
        expected="layers, operations and initializers of Keras itself",
        remedy=(
            "replace the Lambda layer by layers or operations of Keras"
            if lambdas
            else "write the layer with those of Keras, or export the model to .onnx yourself"
        ),
    )


def check_weights(path: Path) -> int:
    """Bytes of the arrays in an HDF5 file that holds nothing but groups and arrays of numbers.

    Raises:
        DataError: links to elsewhere, data in other files, objects that are reached twice,
            types with pointers, or arrays that unpack to more than the file holds.
    """
    try:
        with h5py.File(path, "r") as file:
            total = _walk(file, set(), 0)
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        # h5py raises all of these for damaged files.
        raise _bad_weights(f"an unreadable file: {str(error)[:80]}") from error
    if total > 2 * path.stat().st_size + (1 << 20):
        raise _bad_weights(f"{total} bytes of arrays in a file of {path.stat().st_size}")
    return total


def _walk(group: h5py.Group, seen: set[int], depth: int) -> int:
    if depth > _MAX_DEPTH:
        raise _bad_weights("groups nested too deep")
    total = 0
    for name in group:
        link = group.get(name, getlink=True)
        if not isinstance(link, h5py.HardLink):
            raise _bad_weights(f"{type(link).__name__} {name[:80]!r}")
        item = group[name]
        address = h5py.h5o.get_info(item.id).addr
        if address in seen or len(seen) > _MAX_OBJECTS:
            raise _bad_weights(f"{name[:80]!r}, which stands there twice")
        seen.add(address)
        if isinstance(item, h5py.Group):
            total += _walk(item, seen, depth + 1)
        elif isinstance(item, h5py.Dataset):
            if item.external or item.is_virtual:
                raise _bad_weights(f"array {name[:80]!r} in another file")
            if item.dtype.kind not in "biufV" or item.dtype.hasobject or item.dtype.fields:
                raise _bad_weights(f"array {name[:80]!r} of type {item.dtype}")
            total += int(item.nbytes)
        else:
            raise _bad_weights(f"{type(item).__name__} {name[:80]!r}")
    return total


def _bad_weights(found: str) -> DataError:
    return DataError(
        "the weights in the .keras file are not taken",
        found=found,
        expected="groups and arrays of numbers within the file",
        remedy="save the model again with model.save('name.keras')",
    )
