"""Outputs: one value of the right kind each, sealed to its recipient alone, or nothing at all."""

from __future__ import annotations

import io
import os
import resource
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cenacle.crypto import HpkePrivateKey
from cenacle.documents.base import unb64
from cenacle.documents.contract import Output
from cenacle.documents.receipt import OutputRecord
from cenacle.enclave.outputs import check_outputs, seal_outputs
from cenacle.errors import CenacleError, EnclaveError, SealError, UnavailableError
from cenacle.sealing import SealedReader, TableReader, TensorReader

CONTRACT = "sha256:" + "c" * 64
CANARY = "canary-271828"
KINDS = {"weights": "model", "numbers": "metrics", "rows": "table", "report": "file"}
VALUES: dict[str, Any] = {
    "weights": {"w": np.arange(3.0)},
    "numbers": {"accuracy": 0.5},
    "rows": pa.table({"x": [1, 2, 3]}),
    "report": b"%PDF",
}


@pytest.fixture(scope="module")
def clinic() -> HpkePrivateKey:
    return HpkePrivateKey.generate()


def _opened(clinic: HpkePrivateKey, kinds: dict[str, str] = KINDS) -> Any:
    outputs = tuple(
        Output.from_fields({"name": name, "kind": kind, "recipient": "clinic"})
        for name, kind in kinds.items()
    )
    party = SimpleNamespace(hpke_public_key=clinic.public_key)
    return SimpleNamespace(contract=SimpleNamespace(outputs=outputs), parties={"clinic": party})


def _reader(folder: Path, record: OutputRecord, clinic: HpkePrivateKey) -> SealedReader:
    context = OutputRecord.wrapping_context(CONTRACT, record.name, record.header)
    key = clinic.open(unb64(record.wrapped_key), *context)
    return SealedReader(
        folder / f"{record.name}.sealed",
        key,
        expected_header=record.header,
        expected_digest=record.content,
    )


def test_every_kind_is_sealed_to_its_recipient(tmp_path: Path, clinic: HpkePrivateKey) -> None:
    records = {r.name: r for r in seal_outputs(_opened(clinic), CONTRACT, VALUES, tmp_path)}
    assert list(records) == list(KINDS)
    readers = {name: _reader(tmp_path, record, clinic) for name, record in records.items()}
    assert np.array_equal(TensorReader(readers["weights"]).read("w"), np.arange(3.0))
    assert readers["numbers"].read_range(0, 16) == b'{"accuracy":0.5}'
    assert TableReader(readers["rows"]).read().to_pydict() == {"x": [1, 2, 3]}
    assert readers["report"].read_range(0, 4) == b"%PDF"


def test_a_key_is_bound_to_contract_output_and_container(
    tmp_path: Path, clinic: HpkePrivateKey
) -> None:
    kinds = {"report": "file", "second": "file"}
    values = {"report": b"1", "second": b"2"}
    first, second = seal_outputs(_opened(clinic, kinds), CONTRACT, values, tmp_path)
    wrapped = unb64(first.wrapped_key)
    for context in (
        ("sha256:" + "d" * 64, first.name, first.header),
        (CONTRACT, second.name, first.header),
        (CONTRACT, first.name, second.header),
    ):
        with pytest.raises(SealError):
            clinic.open(wrapped, *OutputRecord.wrapping_context(*context))
    with pytest.raises(SealError):
        HpkePrivateKey.generate().open(
            wrapped, *OutputRecord.wrapping_context(CONTRACT, first.name, first.header)
        )


def test_an_empty_table_and_no_bytes_are_outputs_too(
    tmp_path: Path, clinic: HpkePrivateKey
) -> None:
    kinds = {"rows": "table", "report": "file"}
    values = {"rows": pa.table({"x": pa.array([], pa.int32())}), "report": b""}
    rows, report = seal_outputs(_opened(clinic, kinds), CONTRACT, values, tmp_path)
    assert TableReader(_reader(tmp_path, rows, clinic)).read().num_rows == 0
    assert _reader(tmp_path, report, clinic).size == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rows": None}, "expected numbers, report, rows, weights"),
        ({"other": b""}, "found numbers, other, report, rows, weights"),
        ({"weights": [1]}, "output weights has a value of the wrong type; found list"),
        ({"weights": {"w": [1]}}, "output weights has a value of the wrong type"),
        ({"numbers": b"{}"}, "output numbers has a value of the wrong type; found bytes"),
        ({"rows": {"x": [1]}}, "output rows has a value of the wrong type; found dict"),
        ({"report": "text"}, "output report has a value of the wrong type; found str"),
    ],
)
def test_values_that_are_not_the_contracts_are_refused_before_anything_is_written(
    tmp_path: Path, clinic: HpkePrivateKey, change: dict[str, Any], words: str
) -> None:
    values = {**VALUES, **change}
    if "rows" in change and change["rows"] is None:
        del values["rows"]
    with pytest.raises(EnclaveError, match=words):
        seal_outputs(_opened(clinic), CONTRACT, values, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weights", {CANARY + "\x00": np.zeros(1)}),
        ("weights", {CANARY: np.array([CANARY])}),
        ("numbers", {CANARY: float("nan")}),
        ("numbers", {CANARY: 2**60}),
        ("rows", pa.table({CANARY: pa.array([{"a": 1}])})),
        ("rows", pa.table([pa.array([1]), pa.array([1])], names=[CANARY, CANARY])),
    ],
)
def test_an_output_that_cannot_be_sealed_is_named_without_its_content(
    tmp_path: Path, clinic: HpkePrivateKey, name: str, value: Any
) -> None:
    with pytest.raises(EnclaveError, match=f"output {name} cannot be sealed") as caught:
        seal_outputs(_opened(clinic, {name: KINDS[name]}), CONTRACT, {name: value}, tmp_path)
    assert CANARY not in str(caught.value.to_dict())
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_no_part_of_an_output(tmp_path: Path, clinic: HpkePrivateKey) -> None:
    opened = _opened(clinic, {"report": "file"})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, hard))
    try:
        with pytest.raises(UnavailableError, match="the disk has no room"):
            seal_outputs(opened, CONTRACT, {"report": os.urandom(1 << 20)}, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
    (record,) = seal_outputs(opened, CONTRACT, {"report": b"fits"}, tmp_path)
    assert _reader(tmp_path, record, clinic).size == 4


def test_a_folder_that_is_gone_is_an_error_in_words(tmp_path: Path, clinic: HpkePrivateKey) -> None:
    with pytest.raises(CenacleError, match="cannot write"):
        seal_outputs(_opened(clinic), CONTRACT, VALUES, tmp_path / "missing")


def test_sealing_again_replaces_what_an_interrupted_run_left(
    tmp_path: Path, clinic: HpkePrivateKey
) -> None:
    opened = _opened(clinic, {"report": "file"})
    (old,) = seal_outputs(opened, CONTRACT, {"report": b"first"}, tmp_path)
    (new,) = seal_outputs(opened, CONTRACT, {"report": b"second"}, tmp_path)
    assert _reader(tmp_path, new, clinic).read_range(0, 6) == b"second"
    with pytest.raises(SealError):
        _reader(tmp_path, old, clinic)


def test_outputs_are_checked_as_a_set() -> None:
    outputs = (Output.from_fields({"name": "a", "kind": "file", "recipient": "clinic"}),)
    check_outputs(outputs, {"a": b""})
    with pytest.raises(EnclaveError, match="found none; expected a"):
        check_outputs(outputs, {})


def test_a_table_larger_than_one_batch_arrives_in_order(
    tmp_path: Path, clinic: HpkePrivateKey
) -> None:
    table = pa.table({"x": np.arange(200_000), "y": np.random.default_rng(0).random(200_000)})
    (record,) = seal_outputs(
        _opened(clinic, {"rows": "table"}), CONTRACT, {"rows": table}, tmp_path
    )
    with _reader(tmp_path, record, clinic) as reader:
        content = reader.read_range(0, reader.size)
    assert pa.ipc.open_file(io.BytesIO(content)).read_all().equals(table)
