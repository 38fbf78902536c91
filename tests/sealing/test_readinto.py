"""Tensors read into memory that the caller uses again, as paging does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cenacle.crypto import SecretBytes
from cenacle.errors import DataError, InputError, SealError
from cenacle.sealing import TensorReader, seal_tensors

TENSORS: dict[str, Any] = {
    "a": np.arange(120, dtype=np.float32).reshape(10, 4, 3),
    "b": np.array(7, np.int64),
    "c": np.array([True, False]),
}


@pytest.fixture
def sealed(tmp_path: Path) -> tuple[Path, SecretBytes]:
    key = SecretBytes.random()
    seal_tensors(TENSORS, tmp_path / "sealed", key, chunk_log2=6)
    return tmp_path / "sealed", key


@pytest.mark.parametrize(
    ("name", "rows"), [("a", (0, None)), ("a", (0, 10)), ("a", (3, 7)), ("a", (9, None)),
                       ("a", (5, 5)), ("b", (0, None)), ("c", (0, None)), ("c", (1, 2))]
)  # fmt: skip
def test_rows_arrive_as_they_were_sealed(
    sealed: tuple[Path, SecretBytes], name: str, rows: tuple[int, int | None]
) -> None:
    wanted = TENSORS[name][rows[0] : rows[1]] if TENSORS[name].ndim else TENSORS[name]
    memory = np.full(wanted.nbytes, 255, np.uint8)
    with TensorReader(*sealed) as reader:
        reader.readinto(name, memory, start=rows[0], stop=rows[1])
        assert reader.cache_bytes == 4 * 64
    assert memory.tobytes() == wanted.tobytes()


@pytest.mark.parametrize(
    ("name", "size", "rows", "error"),
    [
        ("missing", 480, (0, None), DataError),
        ("a", 479, (0, None), InputError),
        ("a", 481, (0, None), InputError),
        ("a", 48, (0, 11), InputError),
        ("a", 48, (-1, 0), InputError),
        ("a", 48, (7, 3), InputError),
        ("b", 8, (0, 1), InputError),
        ("b", 8, (1, None), InputError),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(
    sealed: tuple[Path, SecretBytes], name: str, size: int, rows: Any, error: type[Exception]
) -> None:
    memory = np.full(size, 255, np.uint8)
    with TensorReader(*sealed) as reader, pytest.raises(error):
        reader.readinto(name, memory, start=rows[0], stop=rows[1])
    assert (memory == 255).all()


def test_an_altered_chunk_is_refused(sealed: tuple[Path, SecretBytes]) -> None:
    path, key = sealed
    content = bytearray(path.read_bytes())
    with TensorReader(path, key) as reader:
        middle = len(content) // 2
        for position in range(middle, middle + 80):
            content[position] ^= 1
        with path.open("r+b") as file:
            file.write(content)
        with pytest.raises(SealError):
            reader.readinto("a", np.empty(480, np.uint8))
