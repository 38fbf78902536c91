"""Costs by layer as they stand in trace files: strict to read, easy to look at."""

from __future__ import annotations

from typing import Any

import pytest

from cenacle.documents.offload_profile import COLUMNS, LayerCost, OffloadProfile
from cenacle.errors import DocumentError

Fields = dict[str, Any]
ROW: Fields = {
    "layer": "features.0",
    "enclave_seconds": 0.0123,
    "accelerator_seconds": 1.5,
    "wait_seconds": 0,
    "bytes_sent": 1_234_567,
    "bytes_received": 89,
    "products": 1200,
}


def test_a_table_has_a_line_for_each_layer_and_one_for_all() -> None:
    profile = OffloadProfile.from_fields({"layers": [ROW, {**ROW, "layer": "fc"}]})
    assert profile.cells() == [
        ("features.0", "12.3", "1,500.0", "0.0", "1.2", "0.0", "1,200"),
        ("fc", "12.3", "1,500.0", "0.0", "1.2", "0.0", "1,200"),
        ("all", "24.6", "3,000.0", "0.0", "2.5", "0.0", "2,400"),
    ]
    assert profile.table().splitlines() == [
        "layer       enclave  accelerators  waiting  sent  received  results",
        "                 ms            ms       ms    MB        MB",
        "features.0     12.3       1,500.0      0.0   1.2       0.0    1,200",
        "fc             12.3       1,500.0      0.0   1.2       0.0    1,200",
        "all            24.6       3,000.0      0.0   2.5       0.0    2,400",
    ]


def test_nothing_offloaded_is_a_table_of_nothing() -> None:
    empty = OffloadProfile()
    assert empty.total == LayerCost(layer="all")
    assert len(empty.table().splitlines()) == 3
    assert all(len(line) == len(COLUMNS) for line in empty.cells())


def test_a_profile_is_found_in_its_trace() -> None:
    told = {"format": "cenacle-offload-profile/1", "layers": [ROW], "events_left_out": 7}
    found = OffloadProfile.from_trace({"traceEvents": [], "otherData": told, "displayTimeUnit": 1})
    assert found.events_left_out == 7
    assert found.layers[0].to_fields() == ROW
    assert found.to_fields() == told


@pytest.mark.parametrize(
    "trace",
    [
        None,
        [],
        "layers",
        {},
        {"traceEvents": []},
        {"otherData": None},
        {"otherData": []},
        {"otherData": {"version": "My Application v1.0"}},
        {"otherData": {"layers": ROW}},
        {"otherData": {"layers": [ROW], "format": "cenacle-offload-profile/2"}},
        {"otherData": {"layers": [ROW], "more": 1}},
        {"otherData": {"layers": [{**ROW, "more": 1}]}},
        {"otherData": {"layers": [{**ROW, "layer": ""}]}},
        {"otherData": {"layers": [{**ROW, "layer": "x" * 501}]}},
        {"otherData": {"layers": [{**ROW, "layer": 3}]}},
        {"otherData": {"layers": [{**ROW, "wait_seconds": -1}]}},
        {"otherData": {"layers": [{**ROW, "wait_seconds": 1e10}]}},
        {"otherData": {"layers": [{**ROW, "wait_seconds": float("nan")}]}},
        {"otherData": {"layers": [{**ROW, "wait_seconds": "1"}]}},
        {"otherData": {"layers": [{**ROW, "bytes_sent": 1.5}]}},
        {"otherData": {"layers": [{**ROW, "bytes_sent": -1}]}},
        {"otherData": {"layers": [{**ROW, "products": True}]}},
        {"otherData": {"layers": [], "events_left_out": -1}},
    ],
)
def test_other_files_are_refused(trace: Any) -> None:
    with pytest.raises(DocumentError):
        OffloadProfile.from_trace(trace)
