"""IDX files: every type, hostile sizes, and the real MNIST."""

from __future__ import annotations

import contextlib
import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cenacle.crypto import SecretBytes
from cenacle.errors import CenacleError, DataError
from cenacle.sealing import TensorReader, seal_path

TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


@pytest.fixture
def key() -> SecretBytes:
    return SecretBytes(bytes(range(32)))


def idx(code: int, shape: tuple[int, ...], data: bytes) -> bytes:
    return bytes([0, 0, code, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + data


def seal(folder: Path, data: bytes, key: SecretBytes, name: str = "a.idx") -> Any:
    (folder / name).write_bytes(data)
    seal_path(folder / name, folder / "sealed", key)
    with TensorReader(folder / "sealed", key) as reader:
        return reader.read("data")


@pytest.mark.parametrize("code", TYPES)
@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 3, 4), (1, 1, 1, 1, 2), (0, 3), (300_000,)])
@pytest.mark.parametrize("packed", [False, True])
def test_every_type_and_shape(
    tmp_path: Path, key: SecretBytes, code: int, shape: tuple[int, ...], packed: bool
) -> None:
    array = np.random.default_rng(0).integers(0, 100, shape).astype(TYPES[code])
    data = idx(code, shape, array.tobytes())
    found = seal(tmp_path, gzip.compress(data, 1) if packed else data, key)
    assert found.shape == shape
    assert found.dtype == array.dtype.newbyteorder("<")
    assert np.array_equal(found, array)


@pytest.mark.parametrize("name", ["a-idx3-ubyte", "A-IDX1-UBYTE.GZ", "b.idx.gz", "c-float"])
def test_names(tmp_path: Path, key: SecretBytes, name: str) -> None:
    assert seal(tmp_path, idx(8, (2,), b"ab"), key, name).tolist() == [97, 98]


HOSTILE = {
    "empty": b"",
    "three bytes": b"\0\0\x08",
    "other magic": b"\x01\0\x08\x01" + bytes(5),
    "unknown type": idx(0x0A, (1,), b"x"),
    "no dimensions": b"\0\0\x08\0",
    "255 dimensions": b"\0\0\x08\xff" + bytes(1020),
    "sizes cut short": b"\0\0\x08\x03" + bytes(11),
    "no items": idx(8, (5,), b""),
    "too few items": idx(8, (5,), b"1234"),
    "too many items": idx(8, (5,), b"123456"),
    "4 GiB claimed": idx(8, (0xFFFFFFFF,), b"x"),
    "2^96 claimed": idx(8, (0xFFFFFFFF,) * 3, b"x"),
    "2^2048 claimed": idx(8, (0xFFFFFFFF,) * 64, b"x"),
    "half an item": idx(0x0C, (2,), b"1234567"),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.parametrize("packed", [False, True])
def test_hostile_files(tmp_path: Path, key: SecretBytes, data: bytes, packed: bool) -> None:
    with pytest.raises(DataError, match="IDX file is malformed"):
        seal(tmp_path, gzip.compress(data) if packed else data, key)
    assert [path.name for path in tmp_path.iterdir()] == ["a.idx"]


@pytest.mark.parametrize("cut", [5, 12, 20, -1, -8])
def test_damaged_gzip(tmp_path: Path, key: SecretBytes, cut: int) -> None:
    data = gzip.compress(idx(8, (100,), bytes(range(100))))
    with pytest.raises(DataError, match="IDX"):
        seal(tmp_path, data[:cut], key)
    damaged = bytearray(data)
    damaged[cut if cut != 5 else 2] ^= 0x55  # bytes 4 to 7 are a time stamp, which nobody needs
    with pytest.raises(DataError, match="IDX"):
        seal(tmp_path, bytes(damaged), key)


def test_a_gzip_bomb_is_not_unpacked(tmp_path: Path, key: SecretBytes) -> None:
    """One item is claimed; the gigabytes behind it are never read."""
    bomb = gzip.compress(idx(8, (1,), b"x") + bytes(50 << 20))
    with pytest.raises(DataError, match="more bytes than the sizes say"):
        seal(tmp_path, bomb, key)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(
    head=st.sampled_from([b"", b"\0\0", b"\0\0\x08\x01", b"\0\0\x0d\x02", b"\x1f\x8b\x08"]),
    data=st.binary(max_size=60),
)
def test_arbitrary_bytes_never_crash(
    tmp_path: Path, key: SecretBytes, head: bytes, data: bytes
) -> None:
    with contextlib.suppress(CenacleError):
        seal(tmp_path, head + data, key)


def test_mnist(tmp_path: Path, key: SecretBytes, mnist: Path) -> None:
    for name, shape in (
        ("t10k-images-idx3-ubyte.gz", (10_000, 28, 28)),
        ("t10k-labels-idx1-ubyte.gz", (10_000,)),
    ):
        info = seal_path(mnist / name, tmp_path / "sealed", key)
        assert info.schema == {"tensors": {"data": {"dtype": "U8", "shape": list(shape)}}}
        reader = TensorReader(tmp_path / "sealed", key)
        raw = gzip.decompress((mnist / name).read_bytes())
        plain = np.frombuffer(raw, np.uint8)[4 + 4 * len(shape) :].reshape(shape)
        assert np.array_equal(reader.read("data"), plain)
        assert np.array_equal(reader.rows("data", 5000, 5010), plain[5000:5010])
