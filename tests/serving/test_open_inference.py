"""Requests and answers of the Open Inference Protocol, with and without binary tensor data."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cenacle.cut.specs import TensorSpec
from cenacle.errors import InputError
from cenacle.serving.open_inference import (
    LENGTH_HEADER,
    InferRequest,
    encode_request,
    encode_response,
    fit,
    metadata,
    parse_request,
    parse_response,
)

TENSOR: dict[str, Any] = {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1.0, 2.0]}
BINARY: dict[str, Any] = {
    "name": "x",
    "shape": [1, 2],
    "datatype": "FP32",
    "parameters": {"binary_data_size": 8},
}


def _request(**fields: Any) -> bytes:
    return json.dumps({"inputs": [TENSOR], **fields}).encode()


def test_the_specifications_example_is_read() -> None:
    body = """{"id": "42", "inputs": [
      {"name": "input0", "shape": [2, 2], "datatype": "UINT32", "data": [1, 2, 3, 4]},
      {"name": "input1", "shape": [1], "datatype": "BOOL", "data": [true]}],
      "outputs": [{"name": "output0"}]}"""
    found = parse_request(body.encode())
    assert found.id == "42"
    assert found.inputs["input0"].tolist() == [[1, 2], [3, 4]]
    assert found.inputs["input0"].dtype == np.uint32
    assert found.inputs["input1"].tolist() == [True]
    assert found.outputs == {"output0": None}
    assert not found.as_binary("output0")


@pytest.mark.parametrize("binary", [True, False])
def test_a_request_and_its_answer_go_round(binary: bool) -> None:
    inputs = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.array([True, False]),
        "c": np.array([2**63], np.uint64),
    }
    body, headers = encode_request(inputs, request_id="7", ticket='{"t": 1}', binary=binary)
    length = headers.get(LENGTH_HEADER)
    assert (length is not None) is binary
    asked = parse_request(body, None if length is None else int(length))
    assert (asked.id, asked.ticket) == ("7", '{"t": 1}')
    for name, array in inputs.items():
        assert asked.inputs[name].tobytes() == array.tobytes()

    answer, headers = encode_response(asked, "net", "1", inputs)
    length = headers.get(LENGTH_HEADER)
    assert (length is not None) is binary
    got = parse_response(answer, None if length is None else int(length))
    assert (got.model, got.version, got.id) == ("net", "1", "7")
    for name, array in inputs.items():
        assert got.outputs[name].tobytes() == array.tobytes()


def test_json_and_binary_tensors_mix() -> None:
    head = json.dumps({"inputs": [{**BINARY, "name": "b"}, TENSOR, {**BINARY, "name": "c"}]})
    tail = np.array([1, 2, 3, 4], "<f4").tobytes()
    asked = parse_request(head.encode() + tail, len(head))
    assert asked.inputs["b"].tolist() == [[1, 2]]
    assert asked.inputs["c"].tolist() == [[3, 4]]


def test_outputs_are_chosen_and_each_says_its_form() -> None:
    asked = parse_request(
        _request(
            parameters={"binary_data_output": True},
            outputs=[{"name": "b", "parameters": {"binary_data": False}}, {"name": "a"}],
        )
    )
    arrays = {name: np.ones(2, np.int8) for name in ("a", "b", "c")}
    body, headers = encode_response(asked, "net", None, arrays)
    head = json.loads(body[: int(headers[LENGTH_HEADER])])
    assert [output["name"] for output in head["outputs"]] == ["b", "a"]
    assert head["outputs"][0]["data"] == [1, 1]
    assert head["outputs"][1]["parameters"] == {"binary_data_size": 2}
    assert "model_version" not in head


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not JSON"),
        (b"[]", "no JSON object"),
        (b"\xff\xfe{\x00}\x00", "not JSON"),
        (b'{"inputs": NaN}', "not JSON"),
        (b'{"inputs": [Infinity]}', "not JSON"),
        (b'{"id": "1", "id": "2", "inputs": []}', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"inputs": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"{}", "no usable inputs"),
        (b'{"inputs": []}', "no usable inputs"),
        (json.dumps({"inputs": [TENSOR] * 65}).encode(), "no usable inputs"),
        (json.dumps({"inputs": [TENSOR, TENSOR]}).encode(), "a tensor twice"),
        (json.dumps({"inputs": [7]}).encode(), "no JSON object"),
        (_request(extra=1), "a field that is not known"),
        (_request(id=7), "the id of a request"),
        (_request(id="a\r\nb"), "the id of a request"),
        (_request(id=""), "the id of a request"),
        (_request(parameters=[]), "no JSON object"),
        (_request(parameters={"priority": 1}), "a field that is not known"),
        (_request(parameters={"binary_data_output": 1}), "of another kind"),
        (_request(parameters={"ticket": {}}), "of another kind"),
        (_request(parameters={"ticket": "t" * 20_000}), "too large"),
        (_request(outputs=[]), "no usable outputs"),
        (_request(outputs=[{"name": "a"}, {"name": "a"}]), "an output twice"),
        (_request(outputs=[{"name": "a", "parameters": {"classification": 3}}]), "not known"),
        (_request(inputs=[{**TENSOR, "data": [1.0]}]), "does not have its shape"),
        (_request(inputs=[{**TENSOR, "datatype": "BYTES"}]), "datatype of tensor x"),
        (_request(inputs=[{**TENSOR, "datatype": 5}]), "no datatype"),
        (_request(inputs=[{**TENSOR, "parameters": {"binary_data_size": 8}}]), "its data once"),
        (_request(inputs=[{k: v for k, v in TENSOR.items() if k != "data"}]), "its data once"),
        (_request(inputs=[{**BINARY, "parameters": {"binary_data_size": -1}}]), "not in the body"),
        (_request(inputs=[{**BINARY, "parameters": {"binary_data_size": True}}]), "another kind"),
        (_request(inputs=[{**TENSOR, "unit": "m"}]), "a field that is not known"),
    ],
)
def test_a_request_of_another_form_is_refused(body: bytes, words: str) -> None:
    with pytest.raises(InputError, match=words):
        parse_request(body)


@pytest.mark.parametrize(
    ("extra", "length", "words"),
    [
        (b"", None, "not in the body"),
        (b"1234567", 0, "not in the body"),
        (b"123456789", 0, "bytes follow"),
        (b"12345678", -1, "not within the body"),
        (b"12345678", 9, "not within the body"),
    ],
)
def test_binary_data_that_does_not_fit_is_refused(
    extra: bytes, length: int | None, words: str
) -> None:
    head = json.dumps({"inputs": [BINARY]}).encode()
    at = None if length is None else len(head) + length if length != -1 else -1
    with pytest.raises(InputError, match=words):
        parse_request(head + extra, at)


@settings(max_examples=150)
@given(st.binary(max_size=200), st.none() | st.integers(-5, 300))
def test_random_bytes_are_refused_in_words(body: bytes, length: int | None) -> None:
    with pytest.raises(InputError):
        parse_request(body, length)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)


@settings(max_examples=150)
@given(JSON, st.sampled_from(["id", "parameters", "inputs", "outputs"]))
def test_any_field_may_hold_anything(value: Any, name: str) -> None:
    try:
        found = parse_request(_request(**{name: value}))
    except InputError:
        return
    assert isinstance(found, InferRequest)


@settings(max_examples=100)
@given(JSON, st.sampled_from(["name", "shape", "datatype", "parameters", "data"]))
def test_any_field_of_a_tensor_may_hold_anything(value: Any, name: str) -> None:
    try:
        found = parse_request(_request(inputs=[{**TENSOR, name: value}]))
    except InputError:
        return
    assert isinstance(found, InferRequest)


# ---------------------------------------------------------------------------- what a model takes

SPECS = (TensorSpec("a", "F32", (None, 2)), TensorSpec("b", "I64", (None,)))


def _arrays(rows: int = 3, other: int = 3) -> dict[str, Any]:
    return {"a": np.zeros((rows, 2), np.float32), "b": np.zeros(other, np.int64)}


def test_rows_are_counted() -> None:
    assert fit(_arrays(), SPECS, max_rows=3) == 3
    assert fit({"s": np.zeros(2, np.uint8)}, (TensorSpec("s", "U8", (2,)),), max_rows=1) == 1
    free = (TensorSpec("ids", "I64", (None, None)),)
    assert fit({"ids": np.zeros((2, 7), np.int64)}, free, max_rows=4) == 2


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"a": np.zeros((1, 2), np.float32)}, "not those of the model"),
        ({**_arrays(), "c": np.zeros(1)}, "not those of the model"),
        ({**_arrays(), "a": np.zeros((3, 2))}, "another datatype"),
        ({**_arrays(), "a": np.zeros((3, 3), np.float32)}, "another shape"),
        ({**_arrays(), "a": np.zeros((3, 2, 1), np.float32)}, "another shape"),
        (_arrays(3, 2), "different numbers of rows"),
        (_arrays(0, 0), "unusable number of rows"),
        (_arrays(5, 5), "unusable number of rows"),
    ],
)
def test_inputs_of_another_form_are_refused(inputs: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        fit(inputs, SPECS, max_rows=4)


def test_an_output_that_is_not_there_and_a_nan_in_json_are_refused() -> None:
    asked = parse_request(_request(outputs=[{"name": "z"}]))
    with pytest.raises(InputError, match="no such output"):
        encode_response(asked, "net", None, {"y": np.zeros(1)})
    with pytest.raises(InputError, match="JSON cannot say"):
        encode_response(parse_request(_request()), "net", None, {"y": np.array([np.nan])})


def test_metadata_marks_what_varies() -> None:
    assert metadata(SPECS[0]) == {"name": "a", "datatype": "FP32", "shape": [-1, 2]}


@pytest.mark.parametrize(
    "body", [b"", b"{}", b'{"model_name": "n"}', b'{"model_name": "n", "outputs": [{}]}']
)
def test_an_answer_of_another_form_is_refused(body: bytes) -> None:
    with pytest.raises(InputError):
        parse_response(body)
