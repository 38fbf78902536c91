"""The published vectors: three ways to the same bytes."""

from __future__ import annotations

import hashlib
import json
import secrets
from pathlib import Path
from typing import Any

import pytest

from cenacle.crypto import SecretBytes
from cenacle.sealing import SealedReader, SealedWriter, compute_digest, verify_digest

VECTORS = sorted((Path(__file__).parents[1] / "vectors" / "sealing").glob("*.json"))


def _load(path: Path) -> tuple[dict[str, Any], bytes]:
    vector = json.loads(path.read_text())
    if "plaintext" in vector:
        return vector, bytes.fromhex(vector["plaintext"])
    return vector, bytes(i % 251 for i in range(vector["plaintext_length"]))


def _check(vector: dict[str, Any], container: bytes) -> None:
    if "container" in vector:
        assert container.hex() == vector["container"]
    else:
        assert hashlib.sha256(container).hexdigest() == vector["container_sha256"]


def test_there_are_vectors() -> None:
    assert len(VECTORS) == 8


@pytest.fixture(params=VECTORS, ids=lambda path: path.stem)
def case(request: pytest.FixtureRequest) -> tuple[dict[str, Any], bytes]:
    return _load(request.param)


def _reference(vector: dict[str, Any], plaintext: bytes, reference_seal: Any) -> Any:
    return reference_seal(
        bytes.fromhex(vector["asset_key"]),
        bytes.fromhex(vector["salt"]),
        plaintext,
        kind=vector["kind"],
        chunk_log2=vector["chunk_log2"],
        table=vector["table"],
    )


def test_the_independent_implementation_gives_the_vector(
    case: tuple[dict[str, Any], bytes], reference_seal: Any
) -> None:
    vector, plaintext = case
    made = _reference(vector, plaintext, reference_seal)
    _check(vector, made.container)
    assert made.header_digest == vector["header_digest"]
    assert made.content_digest == vector["content_digest"]


def test_the_reader_opens_the_vector(
    case: tuple[dict[str, Any], bytes], reference_seal: Any, tmp_path: Path
) -> None:
    vector, plaintext = case
    container = _reference(vector, plaintext, reference_seal).container
    with SealedReader(
        container,
        SecretBytes(bytes.fromhex(vector["asset_key"])),
        expected_header=vector["header_digest"],
        expected_digest=vector["content_digest"],
        kind=vector["kind"],
    ) as reader:
        assert reader.read_range(0, reader.size) == plaintext
        assert reader.info.digest == (vector["content_digest"] or "")
    if vector["table"]:
        path = tmp_path / "sealed"
        path.write_bytes(container)
        verify_digest(path, vector["content_digest"])
        assert compute_digest(path, threads=1) == vector["content_digest"]


# Files always have a table; test_tensors checks the in-memory writer.
@pytest.mark.parametrize(
    "path", [path for path in VECTORS if "no-table" not in path.stem], ids=lambda path: path.stem
)
def test_the_writer_gives_the_vector(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vector, plaintext = _load(path)
    salt = bytes.fromhex(vector["salt"])
    monkeypatch.setattr(secrets, "token_bytes", lambda length: salt[:length])
    with SealedWriter(
        tmp_path / "sealed",
        SecretBytes(bytes.fromhex(vector["asset_key"])),
        vector["kind"],
        chunk_log2=vector["chunk_log2"],
    ) as writer:
        for start in range(0, len(plaintext), 50_000):
            writer.write(plaintext[start : start + 50_000])
    _check(vector, (tmp_path / "sealed").read_bytes())
    assert writer.info.digest == vector["content_digest"]
    assert writer.info.header_digest == vector["header_digest"]
