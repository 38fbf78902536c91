"""The service's OpenAPI description, made from the model that it serves at the moment."""

from __future__ import annotations

from typing import Any, Final

import cenacle
from cenacle.cut.specs import TensorSpec
from cenacle.serving.answers import Limits
from cenacle.serving.deployment import Deployment
from cenacle.serving.open_inference import LENGTH_HEADER, TICKET_PARAMETER
from cenacle.serving.tensors import DATATYPES, MAX_DIMENSIONS, SAFETENSORS_NAMES

__all__ = ["describe"]

_TEXT: Final = {
    "type": "string",
    "minLength": 1,
    "maxLength": 256,
    "pattern": "^[^\\x00-\\x1f\\x7f]+$",
}
_BINARY: Final = {"type": "string", "format": "binary"}
_BOOL: Final = {"type": "boolean"}
_BITS: Final = {f"{sign}INT{bits}": bits for sign in ("", "U") for bits in (8, 16, 32, 64)}
_WORDS: Final = {
    "400": "The request cannot be read, or is not what the model takes.",
    "403": "The contract does not allow the query.",
    "404": "There is no such model.",
    "405": "The address has another method.",
    "413": "The request is too large.",
    "415": "The body is of another type.",
    "500": "The model failed.",
    "503": "Too much waits, or no enclave serves; ask again later.",
    "504": "The enclave does not answer in time.",
}


def _object(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _list(items: Any, **limits: Any) -> dict[str, Any]:
    return {"type": "array", "items": items, **limits}


def _element(datatype: str) -> dict[str, Any]:
    """One element in JSON."""
    if datatype == "BOOL":
        return _BOOL
    if datatype in _BITS:
        bits = _BITS[datatype]
        if datatype.startswith("U"):
            return {"type": "integer", "minimum": 0, "maximum": 2**bits - 1}
        return {"type": "integer", "minimum": -(2 ** (bits - 1)), "maximum": 2 ** (bits - 1) - 1}
    largest = {"FP16": 65504.0, "FP32": 3.4028234663852886e38, "FP64": 1.7976931348623157e308}
    return {"type": "number", "minimum": -largest[datatype], "maximum": largest[datatype]}


def _input(spec: TensorSpec, max_rows: int) -> dict[str, Any]:
    """A tensor of a request, with its data in JSON or behind it."""
    datatype = SAFETENSORS_NAMES[spec.dtype]
    sizes = [
        {"type": "integer", "minimum": 1, "maximum": max_rows}
        if size is None and axis == 0
        else {"type": "integer", "minimum": 1}
        if size is None
        else {"const": size}
        for axis, size in enumerate(spec.shape)
    ]
    count = len(sizes)
    shape = {"type": "array", "prefixItems": sizes, "minItems": count, "maxItems": count}
    shared = {"name": {"const": spec.name}, "datatype": {"const": datatype}, "shape": shape}
    flat = _list(_element(datatype), description="Row-major; or lists nested as the shape.")
    size = _object({"binary_data_size": {"type": "integer", "minimum": 0}}, "binary_data_size")
    named = ("name", "datatype", "shape")
    return {
        "anyOf": [
            _object({**shared, "data": flat, "parameters": _object({})}, *named, "data"),
            _object({**shared, "parameters": size}, *named, "parameters"),
        ]
    }


def _schemas(served: Deployment) -> dict[str, Any]:
    max_rows = served.tail.ready.max_batch
    sizes = _list({"type": "integer", "minimum": -1}, maxItems=MAX_DIMENSIONS)
    tensor = _object(
        {"name": _TEXT, "datatype": {"enum": list(DATATYPES)}, "shape": sizes},
        *("name", "datatype", "shape"),
    )
    output = _object(
        {
            **tensor["properties"],
            "parameters": _object({"binary_data_size": {"type": "integer", "minimum": 0}}),
            "data": _list({"type": ["number", "boolean"]}),
        },
        *("name", "datatype", "shape"),
    )
    asked = _object(
        {
            "name": {"enum": [spec.name for spec in served.outputs]},
            "parameters": _object({"binary_data": _BOOL}),
        },
        "name",
    )
    parameters = {"binary_data_output": _BOOL, TICKET_PARAMETER: {"type": "string"}}
    inputs = [_input(spec, max_rows) for spec in served.inputs]
    details = {name: {"type": ["string", "null"]} for name in ("found", "expected", "remedy")}
    return {
        "InferenceRequest": _object(
            {
                "id": _TEXT,
                "parameters": _object(parameters),
                "inputs": {
                    **_list({"anyOf": inputs}),
                    "minItems": len(inputs),
                    "maxItems": len(inputs),
                },
                "outputs": _list(asked, minItems=1, maxItems=len(served.outputs)),
            },
            "inputs",
        ),
        "InferenceResponse": _object(
            {
                "model_name": _TEXT,
                "model_version": _TEXT,
                "id": _TEXT,
                "outputs": _list(output),
            },
            *("model_name", "outputs"),
        ),
        "Model": _object(
            {
                "name": _TEXT,
                "versions": _list(_TEXT),
                "platform": _TEXT,
                "inputs": _list(tensor),
                "outputs": _list(tensor),
            },
            *("name", "versions", "platform", "inputs", "outputs"),
        ),
        "Challenge": _object(
            {"nonce": {"type": "string", "pattern": "^[A-Za-z0-9+/]{42}[AEIMQUYcgkosw048]=$"}},
            "nonce",
        ),
        "Attestation": _object(
            {
                "evidence": {"type": "object"},
                "contract": {"type": "object"},
                "parties": _list({"type": "object"}),
                "assets": {"type": "object"},
            },
            *("evidence", "contract", "parties", "assets"),
        ),
        "Error": _object(
            {
                "error": {"type": "string"},
                "details": {
                    "type": "object",
                    "properties": {
                        "error": {"type": "string"},
                        "what": {"type": "string"},
                        **details,
                    },
                    "required": ["error", "what"],
                },
            },
            *("error", "details"),
        ),
    }


def _json(schema: Any) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _operation(
    name: str, summary: str, content: dict[str, Any], *statuses: str, **fields: Any
) -> dict[str, Any]:
    wrong = {
        status: {
            "description": _WORDS[status],
            "content": _json(_ref("Error")),
            **(
                {"headers": {"Retry-After": {"schema": {"type": "string"}}}}
                if status == "503"
                else {}
            ),
        }
        for status in statuses
    }
    answers = {"200": {"description": "The answer.", "content": content}, **wrong}
    return {"operationId": name, "summary": summary, "responses": answers, **fields}


def _body(content: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": content}}


def describe(served: Deployment, limits: Limits) -> dict[str, Any]:
    """The description, OpenAPI 3.1; every status that an address may answer is in it.

    A request may satisfy the schema and yet be no query: that the data has as many elements as
    the shape says, and that there is one tensor for each input, JSON Schema cannot state.
    """
    name = {"name": "name", "in": "path", "required": True, "schema": {"enum": [served.name]}}
    version = {
        "name": "version",
        "in": "path",
        "required": True,
        "schema": {"enum": [served.version]},
    }
    infer = {
        **_body(
            {
                **_json(_ref("InferenceRequest")),
                "application/octet-stream": {"schema": _BINARY},
            }
        ),
        "description": f"Binary tensors follow the JSON object, whose length {LENGTH_HEADER} "
        f"tells. A body has at most {limits.body_bytes} bytes.",
    }
    answers = {**_json(_ref("InferenceResponse")), "application/octet-stream": {"schema": _BINARY}}
    length = {
        "name": LENGTH_HEADER,
        "in": "header",
        "required": False,
        "schema": {"type": "integer", "minimum": 0},
    }
    wrong = ("400", "403", "404", "413", "415", "500", "503", "504")
    paths: dict[str, Any] = {
        "/v2": {
            "get": _operation(
                "server",
                "What this server is",
                _json(
                    _object(
                        {"name": _TEXT, "version": _TEXT, "extensions": _list(_TEXT)},
                        *("name", "version", "extensions"),
                    )
                ),
            )
        },
        "/v2/health/live": {
            "get": _operation(
                "live", "The process answers", _json(_object({"live": _BOOL}, "live"))
            )
        },
        "/v2/health/ready": {
            "get": _operation(
                "ready", "An enclave serves", _json(_object({"ready": _BOOL}, "ready")), "503"
            )
        },
        "/v1/sealed/{name}": {
            "parameters": [name],
            "post": _operation(
                "sealed",
                "A query that only the enclave reads",
                {"application/vnd.cenacle.sealed-answer": {"schema": _BINARY}},
                *wrong,
                **_body({"application/vnd.cenacle.sealed-query": {"schema": _BINARY}}),
            ),
        },
        "/v1/attestation": {
            "post": _operation(
                "attestation",
                "The enclave's evidence for a client's nonce, and the contract that judges it",
                _json(_ref("Attestation")),
                *("400", "413", "415", "500", "503", "504"),
                **_body(_json(_ref("Challenge"))),
            )
        },
        "/metrics": {
            "get": _operation("metrics", "Load", {"text/plain": {"schema": {"type": "string"}}})
        },
        "/openapi.json": {"get": _operation("openapi", "This", _json({"type": "object"}), "503")},
    }
    for suffix, parameters in (("", [name]), ("/versions/{version}", [name, version])):
        at, tail = f"/v2/models/{{name}}{suffix}", "-version" if suffix else ""
        paths[at] = {
            "parameters": parameters,
            "get": _operation(
                f"model{tail}", "What the model takes and gives", _json(_ref("Model")), "404", "503"
            ),
        }
        paths[f"{at}/ready"] = {
            "parameters": parameters,
            "get": _operation(
                f"model-ready{tail}",
                "The model can be queried",
                _json(_object({"name": _TEXT, "ready": _BOOL}, "name", "ready")),
                *("404", "503"),
            ),
        }
        paths[f"{at}/infer"] = {
            "parameters": [*parameters, length],
            "post": _operation(f"infer{tail}", "Inference", answers, *wrong, **infer),
        }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Cenacle serving",
            "version": cenacle.__version__,
            "description": "The Open Inference Protocol, and sealed queries to an enclave.",
        },
        "paths": paths,
        "components": {"schemas": _schemas(served)},
    }
