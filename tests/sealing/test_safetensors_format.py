"""Attacks on the safetensors format, and agreement with the reference library."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cenacle.errors import DataError
from cenacle.sealing.safetensors_format import build_header, header_bytes, parse_header


def parse(data: bytes) -> Any:
    size = header_bytes(data[:8], len(data))
    return parse_header(data[:8], data[8 : 8 + size], len(data))


def file(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": list(shape) if isinstance(shape, tuple) else shape,
        "data_offsets": list(offsets) if isinstance(offsets, tuple) else offsets,
    }


GOOD = file({"__metadata__": {"a": "b"}, "t": entry(), "u": entry(offsets=(4, 8))}, bytes(8))
BIG = 1 << 63

ATTACKS: dict[str, bytes] = {
    "empty file": b"",
    "seven bytes": bytes(7),
    "no header": bytes(8),
    "header beyond the end": (100).to_bytes(8, "little") + b"{}",
    "header of all memory": b"\xff" * 8 + b"{}",
    "header above the bound": (100_000_001).to_bytes(8, "little") + b"{}",
    "not JSON": file(b"{nope}"),
    "a list": file(b"[]"),
    "a space first": file(b" {}"),
    "not UTF-8": file(b'{"\xff":1}'),
    "behind the object": file(b"{}{}"),
    "duplicate tensor": file(
        b'{"t":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},'
        b'"t":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}',
        bytes(4),
    ),
    "duplicate field": file(
        b'{"t":{"dtype":"U8","dtype":"I8","shape":[4],"data_offsets":[0,4]}}', bytes(4)
    ),
    "duplicate metadata": file(b'{"__metadata__":{"a":"b","a":"c"}}'),
    "metadata of numbers": file({"__metadata__": {"a": 1}}),
    "metadata that is no object": file({"__metadata__": "x"}),
    "unknown field": file({"t": {**entry(), "x": 1}}, bytes(4)),
    "missing field": file({"t": {"dtype": "U8", "shape": [4]}}, bytes(4)),
    "no object": file({"t": 1}),
    "unknown type": file({"t": entry("U7")}, bytes(4)),
    "type that is no text": file({"t": entry(["U8"])}, bytes(4)),
    "type below a byte": file({"t": entry("F4", (8,), (0, 4))}, bytes(4)),
    "negative size": file({"t": entry(shape=(-4,))}, bytes(4)),
    "two negative sizes": file({"t": entry(shape=(-2, -2))}, bytes(4)),
    "size that is a float": file({"t": entry(shape=(4.0,))}, bytes(4)),
    "size that is true": file({"t": entry(shape=(True, 4))}, bytes(4)),
    "size that is text": file({"t": entry(shape=("4",))}, bytes(4)),
    "shape that is no list": file({"t": entry(shape=4)}, bytes(4)),
    "shape with a hole": file({"t": entry(shape=(None,))}, bytes(4)),
    "overflowing size": file({"t": entry(shape=(BIG, 2), offsets=(0, 0))}),
    "overflowing product": file({"t": entry(shape=(1 << 32, 1 << 32), offsets=(0, 0))}),
    "65 dimensions": file({"t": entry(shape=(1,) * 65, offsets=(0, 1))}, bytes(1)),
    "NaN": file(b'{"t":{"dtype":"U8","shape":[NaN],"data_offsets":[0,4]}}', bytes(4)),
    "number with an exponent": file(
        b'{"t":{"dtype":"U8","shape":[4e0],"data_offsets":[0,4]}}', bytes(4)
    ),
    "number of 5000 digits": file(
        b'{"t":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}', bytes(4)
    ),
    "one offset": file({"t": entry(offsets=(0,))}, bytes(4)),
    "three offsets": file({"t": entry(offsets=(0, 4, 8))}, bytes(4)),
    "offsets backwards": file({"t": entry(offsets=(4, 0))}, bytes(4)),
    "offsets and shape disagree": file({"t": entry(shape=(5,))}, bytes(4)),
    "overlap": file({"t": entry(), "u": entry(offsets=(2, 6))}, bytes(6)),
    "the same bytes twice": file({"t": entry(), "u": entry()}, bytes(4)),
    "hole at the start": file({"t": entry(offsets=(1, 5))}, bytes(5)),
    "hole between": file({"t": entry(), "u": entry(offsets=(5, 9))}, bytes(9)),
    "data cut short": file({"t": entry()}, bytes(3)),
    "data beyond the last": file({"t": entry()}, bytes(5)),
    "data without tensors": file({}, bytes(1)),
    "control characters in a name": file({"a\nb": entry()}, bytes(4)),
    "half a surrogate in a name": file(
        b'{"\\ud800":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', bytes(4)
    ),
    "an empty name": file({"": entry()}, bytes(4)),
    "deep nesting": file(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
}


@pytest.mark.parametrize("data", ATTACKS.values(), ids=ATTACKS.keys())
def test_attacks_are_refused(data: bytes) -> None:
    with pytest.raises(DataError):
        parse(data)


def test_a_good_file_is_parsed() -> None:
    assert list(parse(GOOD)) == ["t", "u"]
    assert parse(file({})) == {}
    assert parse(file(b"{}   ")) == {}


@settings(max_examples=200)
@given(data=st.binary(max_size=300))
@example(data=GOOD)
def test_arbitrary_bytes_never_crash(data: bytes) -> None:
    with contextlib.suppress(DataError):
        parse(data)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


@settings(max_examples=200)
@given(
    header=st.dictionaries(
        st.text(max_size=3) | st.just("__metadata__"),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["U8", "F32", "BF16", "F4"]) | _json,
                "shape": st.lists(st.integers(-1, 4), max_size=3) | _json,
                "data_offsets": st.lists(st.integers(-1, 40), min_size=2, max_size=2) | _json,
            }
        )
        | _json,
        max_size=3,
    ),
    size=st.integers(0, 40),
)
def test_what_is_accepted_the_reference_accepts_too(header: dict[str, Any], size: int) -> None:
    data = file(header, bytes(size))
    try:
        specs = parse(data)
    except DataError:
        return
    found = dict(safetensors.deserialize(data))  # type: ignore[no-untyped-call]
    assert {name: spec.shape for name, spec in specs.items()} == {
        name: tuple(value["shape"]) for name, value in found.items()
    }


def test_files_of_the_reference_are_accepted(tmp_path: Path) -> None:
    tensors: dict[str, Any] = {
        "a": np.zeros((3, 4)),
        "b": np.zeros(5, np.uint8),
        "c": np.zeros(0, np.int16),
    }
    data = safetensors.numpy.save(tensors, {"meta": "data"})
    specs = parse(data)
    assert {name: spec.shape for name, spec in specs.items()} == {
        "a": (3, 4),
        "b": (5,),
        "c": (0,),
    }


def test_a_built_header_parses() -> None:
    header, order = build_header({"b": ("U8", (3,)), "a": ("F64", (2, 2)), "c": ("F64", ())})
    assert order == ["a", "c", "b"]
    assert len(header) % 64 == 0
    assert list(parse(header + bytes(32 + 8 + 3))) == order
