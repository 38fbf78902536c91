"""The Open Inference Protocol, version 2, over REST: requests, answers, metadata. Pure.

KServe's `inference_rest.md <https://github.com/kserve/open-inference-protocol>`_ with the binary
tensor data extension: tensors stand in the JSON object, or behind it in the body, which the
header ``Inference-Header-Content-Length`` tells the two apart for. What strangers sent is read
strictly: an unknown field or parameter is refused, since nothing would act upon it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn

from numpy.typing import NDArray

from cenacle.cut.specs import TensorSpec
from cenacle.errors import InputError
from cenacle.serving.tensors import (
    SAFETENSORS_NAMES,
    array_from_bytes,
    array_from_json,
    array_to_bytes,
    array_to_json,
    check_name,
    check_shape,
    datatype_of,
)

__all__ = [
    "BINARY_TYPE",
    "JSON_TYPE",
    "LENGTH_HEADER",
    "MAX_JSON_BYTES",
    "TICKET_PARAMETER",
    "InferRequest",
    "InferResponse",
    "check_outputs",
    "encode_request",
    "encode_response",
    "fit",
    "metadata",
    "parse_request",
    "parse_response",
]

JSON_TYPE: Final = "application/json"
BINARY_TYPE: Final = "application/octet-stream"
LENGTH_HEADER: Final = "Inference-Header-Content-Length"
MAX_JSON_BYTES: Final = 16 * 1024 * 1024
"""Of a request's JSON object; larger tensors are sent as binary data."""
TICKET_PARAMETER: Final = "ticket"
"""Parameter of a request that holds its signed use of a ticket, as text."""

_MAX_TENSORS: Final = 64
_MAX_TICKET: Final = 16 * 1024
_REQUEST_FIELDS: Final = frozenset({"id", "parameters", "inputs", "outputs"})
_INPUT_FIELDS: Final = frozenset({"name", "shape", "datatype", "parameters", "data"})
_OUTPUT_FIELDS: Final = frozenset({"name", "parameters"})
_RESPONSE_FIELDS: Final = frozenset({"model_name", "model_version", "id", "parameters", "outputs"})


@dataclass(frozen=True)
class InferRequest:
    """One request for inference.

    Attributes:
        inputs: by name.
        outputs: which outputs to return, each with whether as binary data (``None``: as
            ``binary`` says); ``None`` for all of them.
        binary: whether outputs that say nothing else are returned as binary data.
        ticket: the signed use of a ticket.
    """

    inputs: Mapping[str, NDArray[Any]]
    id: str | None = None
    outputs: Mapping[str, bool | None] | None = None
    binary: bool = False
    ticket: str | None = None

    def as_binary(self, output: str) -> bool:
        """Whether this output is to be returned as binary data."""
        asked = None if self.outputs is None else self.outputs.get(output)
        return self.binary if asked is None else asked


@dataclass(frozen=True)
class InferResponse:
    """The answer to a request; outputs by name."""

    model: str
    outputs: Mapping[str, NDArray[Any]]
    version: str | None = None
    id: str | None = None


# ---------------------------------------------------------------------------- reading


def _no_constant(text: str) -> NoReturn:
    raise ValueError(text)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a field stands twice")
    return found


def _json(data: bytes | memoryview, what: str) -> dict[str, Any]:
    if len(data) > MAX_JSON_BYTES:
        raise InputError(
            f"the JSON of {what} is too large",
            found=f"{len(data)} bytes",
            expected=f"at most {MAX_JSON_BYTES}",
            remedy="send large tensors as binary data",
        )
    try:
        found = json.loads(str(data, "utf-8"), parse_constant=_no_constant, object_pairs_hook=_once)
    except (ValueError, RecursionError):
        raise InputError(
            f"{what} is not JSON",
            expected="one JSON object in UTF-8, no field twice, no NaN or infinity",
            remedy=f"state the length of the JSON in {LENGTH_HEADER} if binary data follows it",
        ) from None
    if not isinstance(found, dict):
        raise InputError(f"{what} is no JSON object", found=type(found).__name__)
    return found


def _only(fields: object, known: frozenset[str], what: str) -> dict[str, Any]:
    if not isinstance(fields, dict):
        raise InputError(f"{what} is no JSON object", found=type(fields).__name__)
    if unknown := sorted(set(fields) - known):
        raise InputError(
            f"{what} has a field that is not known here",
            found=repr(unknown[0][:40]),
            expected=", ".join(sorted(known)),
        )
    return fields


def _parameters(fields: Mapping[str, Any], kinds: Mapping[str, type], what: str) -> dict[str, Any]:
    given = _only(fields.get("parameters", {}), frozenset(kinds), f"the parameters of {what}")
    for name, value in given.items():
        if type(value) is not kinds[name]:
            raise InputError(
                f"parameter {name} of {what} is of another kind",
                found=type(value).__name__,
                expected=kinds[name].__name__,
            )
    return given


def _listed(fields: Mapping[str, Any], name: str, what: str) -> list[Any]:
    found = fields.get(name)
    if not isinstance(found, list) or not 0 < len(found) <= _MAX_TENSORS:
        raise InputError(
            f"{what} has no usable {name}", expected=f"a list of 1 to {_MAX_TENSORS} tensors"
        )
    return found


def _identifier(fields: Mapping[str, Any]) -> str | None:
    found = fields.get("id")
    return None if found is None else check_name(found, "the id of a request")


class _Binary:
    """The binary data behind the JSON, given out in the order of the tensors."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._at = 0

    def take(self, size: int, name: str) -> memoryview:
        if not 0 <= size <= len(self._data) - self._at:
            raise InputError(
                f"the binary data of tensor {name} is not in the body",
                found=f"{len(self._data) - self._at} bytes left",
                expected=f"{size} bytes",
            )
        self._at += size
        return self._data[self._at - size : self._at]

    def end(self) -> None:
        if self._at != len(self._data):
            raise InputError(
                "bytes follow the last tensor's binary data",
                found=f"{len(self._data) - self._at} bytes",
                expected="none",
            )


def _split(body: bytes, header_length: int | None, what: str) -> tuple[dict[str, Any], _Binary]:
    view = memoryview(body)
    if header_length is None:
        return _json(view, what), _Binary(view[:0])
    if not 0 <= header_length <= len(view):
        raise InputError(
            f"{LENGTH_HEADER} of {what} is not within the body",
            found=header_length,
            expected=f"0 to {len(view)}",
        )
    return _json(view[:header_length], what), _Binary(view[header_length:])


def _tensors(listed: Sequence[Any], binary: _Binary, what: str) -> dict[str, NDArray[Any]]:
    arrays: dict[str, NDArray[Any]] = {}
    for entry in listed:
        fields = _only(entry, _INPUT_FIELDS, f"a tensor of {what}")
        name = check_name(fields.get("name"), f"the name of a tensor of {what}")
        if name in arrays:
            raise InputError(f"{what} has a tensor twice", found=name)
        shape = check_shape(fields.get("shape"), name)
        datatype = fields.get("datatype")
        if not isinstance(datatype, str):
            raise InputError(f"tensor {name} has no datatype")
        given = _parameters(fields, {"binary_data_size": int}, f"tensor {name}")
        if ("binary_data_size" in given) == ("data" in fields):
            raise InputError(
                f"tensor {name} needs its data once",
                found="data twice" if given else "no data",
                expected="data, or the parameter binary_data_size",
            )
        if given:
            part = binary.take(given["binary_data_size"], name)
            arrays[name] = array_from_bytes(part, datatype, shape, name)
        else:
            arrays[name] = array_from_json(fields["data"], datatype, shape, name)
    binary.end()
    return arrays


def _outputs(fields: Mapping[str, Any]) -> dict[str, bool | None] | None:
    if "outputs" not in fields:
        return None
    asked: dict[str, bool | None] = {}
    for entry in _listed(fields, "outputs", "a request"):
        wanted = _only(entry, _OUTPUT_FIELDS, "an output of a request")
        name = check_name(wanted.get("name"), "the name of an output")
        if name in asked:
            raise InputError("a request names an output twice", found=name)
        given = _parameters(wanted, {"binary_data": bool}, f"output {name}")
        asked[name] = given.get("binary_data")
    return asked


def parse_request(body: bytes, header_length: int | None = None) -> InferRequest:
    """Read a request; binary tensors are views of ``body``.

    Args:
        header_length: what ``Inference-Header-Content-Length`` says, if it was sent.

    Raises:
        InputError: with what does not hold.
    """
    fields, binary = _split(body, header_length, "a request")
    _only(fields, _REQUEST_FIELDS, "a request")
    given = _parameters(fields, {"binary_data_output": bool, TICKET_PARAMETER: str}, "a request")
    ticket = given.get(TICKET_PARAMETER)
    if ticket is not None and len(ticket) > _MAX_TICKET:
        raise InputError("a ticket's use is too large", expected=f"{_MAX_TICKET} characters")
    return InferRequest(
        id=_identifier(fields),
        outputs=_outputs(fields),
        binary=given.get("binary_data_output", False),
        ticket=ticket,
        inputs=_tensors(_listed(fields, "inputs", "a request"), binary, "a request"),
    )


def parse_response(body: bytes, header_length: int | None = None) -> InferResponse:
    """Read an answer, as strictly as a request; binary tensors are views of ``body``.

    Raises:
        InputError: it is not an answer of the protocol.
    """
    fields, binary = _split(body, header_length, "an answer")
    _only(fields, _RESPONSE_FIELDS, "an answer")
    version = fields.get("model_version")
    return InferResponse(
        model=check_name(fields.get("model_name"), "the model of an answer"),
        version=None if version is None else check_name(version, "the version of an answer"),
        id=_identifier(fields),
        outputs=_tensors(_listed(fields, "outputs", "an answer"), binary, "an answer"),
    )


# ---------------------------------------------------------------------------- writing


@dataclass
class _Parts:
    """Binary data that is to stand behind the JSON."""

    parts: list[memoryview] = field(default_factory=list)

    def tensor(self, name: str, array: NDArray[Any], *, binary: bool) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "name": name,
            "datatype": datatype_of(array),
            "shape": list(array.shape),
        }
        if binary:
            self.parts.append(array_to_bytes(array))
            return {**fields, "parameters": {"binary_data_size": len(self.parts[-1])}}
        return {**fields, "data": array_to_json(array, name)}

    def join(self, fields: dict[str, Any]) -> tuple[bytes, dict[str, str]]:
        head = json.dumps(fields, separators=(",", ":"), allow_nan=False).encode()
        if not self.parts:
            return head, {"Content-Type": JSON_TYPE}
        length = {"Content-Type": BINARY_TYPE, LENGTH_HEADER: str(len(head))}
        return b"".join([head, *self.parts]), length


def encode_response(
    request: InferRequest, model: str, version: str | None, outputs: Mapping[str, NDArray[Any]]
) -> tuple[bytes, dict[str, str]]:
    """The body and headers of the answer to a request.

    Args:
        outputs: everything that the model gave; the answer has what the request asked for.

    Raises:
        InputError: the request names an output that the model does not have, or wants a NaN in
            JSON.
    """
    wanted: Iterable[str] = outputs if request.outputs is None else request.outputs
    check_outputs(request, outputs)
    parts = _Parts()
    listed = [parts.tensor(n, outputs[n], binary=request.as_binary(n)) for n in wanted]
    fields: dict[str, Any] = {"model_name": model}
    if version is not None:
        fields["model_version"] = version
    if request.id is not None:
        fields["id"] = request.id
    return parts.join({**fields, "outputs": listed})


def encode_request(
    inputs: Mapping[str, NDArray[Any]],
    *,
    request_id: str | None = None,
    ticket: str | None = None,
    binary: bool = True,
) -> tuple[bytes, dict[str, str]]:
    """The body and headers of a request for all outputs, in the form of the inputs."""
    parts = _Parts()
    listed = [parts.tensor(name, array, binary=binary) for name, array in inputs.items()]
    parameters: dict[str, Any] = {"binary_data_output": True} if binary else {}
    if ticket is not None:
        parameters[TICKET_PARAMETER] = ticket
    fields: dict[str, Any] = {"inputs": listed}
    if parameters:
        fields["parameters"] = parameters
    if request_id is not None:
        fields["id"] = request_id
    return parts.join(fields)


# ---------------------------------------------------------------------------- models


def metadata(spec: TensorSpec) -> dict[str, Any]:
    """A tensor of a model as the protocol describes it: -1 where any size will do."""
    return {
        "name": spec.name,
        "datatype": SAFETENSORS_NAMES[spec.dtype],
        "shape": [-1 if size is None else size for size in spec.shape],
    }


def check_outputs(request: InferRequest, outputs: Iterable[str]) -> None:
    """Raises InputError if a request names an output that is not among these."""
    known = list(outputs)
    if request.outputs is not None and (unknown := sorted(set(request.outputs) - set(known))):
        raise InputError(
            "the model has no such output", found=unknown[0][:80], expected=", ".join(known)
        )


def fit(inputs: Mapping[str, NDArray[Any]], specs: Sequence[TensorSpec], *, max_rows: int) -> int:
    """How many rows a request's inputs have, once they are what the model takes.

    Raises:
        InputError: one is missing, unknown, or of another datatype or shape.
    """
    names = [spec.name for spec in specs]
    if set(names) != set(inputs):
        raise InputError(
            "the inputs are not those of the model",
            found=", ".join(sorted(name[:80] for name in inputs)),
            expected=", ".join(names),
        )
    rows: int | None = None
    for spec in specs:
        array = inputs[spec.name]
        datatype, wanted = datatype_of(array), SAFETENSORS_NAMES[spec.dtype]
        if datatype != wanted:
            raise InputError(
                f"input {spec.name} has another datatype", found=datatype, expected=wanted
            )
        fits = array.ndim == len(spec.shape) and all(
            size in (None, found) for size, found in zip(spec.shape, array.shape, strict=True)
        )
        if not fits:
            raise InputError(
                f"input {spec.name} has another shape",
                found=list(array.shape),
                expected=metadata(spec)["shape"],
            )
        if spec.batched and rows is not None and rows != array.shape[0]:
            raise InputError(
                "the inputs have different numbers of rows", found=array.shape[0], expected=rows
            )
        rows = array.shape[0] if spec.batched else rows
    rows = 1 if rows is None else rows
    if not 0 < rows <= max_rows:
        raise InputError(
            "a request has an unusable number of rows", found=rows, expected=f"1 to {max_rows}"
        )
    return rows
