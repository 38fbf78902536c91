"""Sealed paging: within its memory, and never a weight that the owner did not seal there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cenacle.crypto import SecretBytes
from cenacle.cut import paging
from cenacle.cut.onnx_model import OnnxModel
from cenacle.cut.paging import Buffer, Pager, _plan, segment_bytes
from cenacle.cut.runtime import TailRuntime
from cenacle.cut.tail_file import write_tail
from cenacle.cut.tail_format import read_manifest
from cenacle.errors import SealError
from cenacle.sealing import SealedWriter, TensorReader

Feeds = dict[str, Any]
LIMIT = 9000  # bytes; the tail has 28 000


class _Counter:
    """Stands where buffers are made: the most bytes that were in memory at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.most = 0
        counter = self

        class Counted(Buffer):
            def __init__(self, size: int) -> None:
                super().__init__(size)
                counter.now += size
                counter.most = max(counter.most, counter.now)

            def __del__(self) -> None:
                counter.now -= self.size

        monkeypatch.setattr(paging, "Buffer", Counted)


@pytest.mark.parametrize("limit", [4096, 6000, LIMIT, 20_000])
def test_weights_stay_within_the_limit(
    dense: tuple[OnnxModel, Feeds], sealed: Any, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    model, feeds = dense
    sealed.write(model)
    counter = _Counter(monkeypatch)
    with sealed.open() as reader, TailRuntime(reader, memory_limit=limit, threads=1) as tail:
        for _ in range(2):
            tail.run(feeds)
        assert tail._pager is not None
        assert 0 < counter.most <= tail._pager.memory - reader.cache_bytes
        assert tail._pager.memory <= limit
        assert tail.paged


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=12).filter(any),
    st.integers(-5, 400),
)
def test_the_plan_holds_its_limit_and_wastes_none(sizes: list[int], room: int) -> None:
    kept, buffers = _plan(sizes, room)
    rest = [size for index, size in enumerate(sizes) if index not in kept]
    if buffers == 0:
        assert room < max(sizes)
        return
    held = sum(sizes[index] for index in kept)
    assert held + buffers * max(rest, default=0) <= room
    if room >= 2 * max(sizes):
        assert buffers == 2 or not rest
    for index, size in enumerate(sizes):
        if index not in kept and size:
            others = [s for i, s in enumerate(sizes) if i not in kept | {index}]
            largest = max(max(others, default=0), max(rest))
            assert held + size + buffers * largest > room


def test_each_segment_has_the_weights_that_were_sealed(
    dense: tuple[OnnxModel, Feeds], sealed: Any
) -> None:
    sealed.write(dense[0])
    with sealed.open() as reader:
        segments = read_manifest(reader).segments
        for limit in (4096, LIMIT):
            pager = Pager(reader, segments, limit)
            # Forwards twice, and an order for which nothing was read ahead.
            for index in [*range(len(segments))] * 2 + [3, 0, 5, 1, 1, 2]:
                arrays = pager.weights(index)
                for piece in segments[index].weights:
                    whole = reader.read(piece.tensor)
                    wanted = whole[piece.start : piece.stop] if whole.ndim else whole
                    np.testing.assert_array_equal(arrays[piece.name], wanted)
            pager.close()


def test_closing_overwrites_the_weights(dense: tuple[OnnxModel, Feeds], sealed: Any) -> None:
    sealed.write(dense[0])
    with sealed.open() as reader:
        pager = Pager(reader, read_manifest(reader).segments, LIMIT)
        arrays = [*pager.weights(0).values(), *pager.weights(1).values()]
        assert all(array.any() for array in arrays)
        pager.close()
        assert not any(array.any() for array in arrays)


def _flip(sealed: Any, _: OnnxModel) -> None:
    """One bit in each chunk but the first, which holds the header."""
    content = bytearray(sealed.path.read_bytes())
    for position in range(2000, len(content), 97):
        content[position] ^= 1
    _in_place(sealed.path, content)


def _another_model(sealed: Any, model: OnnxModel) -> None:
    """The same owner's tail with other weights, sealed under the same key, as after training."""
    other = OnnxModel.from_proto(model.proto)
    for tensor in other.proto.graph.initializer:
        values = np.frombuffer(tensor.raw_data, np.float32) + np.float32(1)
        tensor.raw_data = values.tobytes()
    folder = sealed.folder / "other"
    folder.mkdir()
    write_tail(other, folder / "tail", segment_bytes=1 << 10)
    with SealedWriter(folder / "sealed", sealed.key, "tensors", chunk_log2=8) as writer:
        writer.write((folder / "tail").read_bytes())
    newer = (folder / "sealed").read_bytes()
    assert len(newer) == sealed.path.stat().st_size
    _in_place(sealed.path, newer)


def _other_order(sealed: Any, _: OnnxModel) -> None:
    """Two genuine chunks change places."""
    content = bytearray(sealed.path.read_bytes())
    record, first = 256 + 16, 128
    a, b = first + 40 * record, first + 60 * record
    content[a : a + record], content[b : b + record] = (
        content[b : b + record],
        content[a : a + record],
    )
    _in_place(sealed.path, content)


def _shorter(sealed: Any, _: OnnxModel) -> None:
    os.truncate(sealed.path, 4000)


def _in_place(path: Path, content: bytes | bytearray) -> None:
    """Written over the open file, as its host can."""
    with path.open("r+b") as file:
        file.write(content)


ATTACKS: dict[str, Callable[[Any, OnnxModel], None]] = {
    "altered": _flip,
    "another-model": _another_model,
    "other-order": _other_order,
    "shorter": _shorter,
}


@pytest.mark.parametrize("attack", sorted(ATTACKS))
def test_a_container_that_changes_while_it_is_used_gives_no_output(
    dense: tuple[OnnxModel, Feeds], sealed: Any, attack: str
) -> None:
    model, feeds = dense
    sealed.write(model)
    genuine = sealed.path.read_bytes()
    with sealed.open() as reader, TailRuntime(reader, memory_limit=4096, threads=1) as tail:
        expected = tail.run(feeds)["y"]
        ATTACKS[attack](sealed, model)
        for _ in range(2):
            with pytest.raises(SealError):
                tail.run(feeds)
        _in_place(sealed.path, genuine)
        np.testing.assert_array_equal(tail.run(feeds)["y"], expected)


def test_a_container_of_the_same_key_with_chunks_of_its_holder_is_refused(
    dense: tuple[OnnxModel, Feeds], sealed: Any
) -> None:
    """Whoever has the key can seal other weights; the pinned digest names the first ones."""
    sealed.write(dense[0])
    pinned = sealed.info.digest
    sealed.seal()
    assert sealed.info.digest != pinned
    with pytest.raises(SealError):
        TensorReader(sealed.path, sealed.key, expected_digest=pinned)


def test_a_buffer_is_wiped_when_its_filling_fails(
    dense: tuple[OnnxModel, Feeds], sealed: Any
) -> None:
    sealed.write(dense[0])
    with sealed.open() as reader:
        segment = read_manifest(reader).segments[3]
        buffer = Buffer(segment_bytes(reader, segment))
        before = buffer.fill(reader, segment.weights)[segment.weights[0].name]
        assert before.any()
        _flip(sealed, dense[0])
        with pytest.raises(SealError):
            buffer.fill(reader, segment.weights)
        assert not before.any()


_RESIDENT = """
import json, sys
from pathlib import Path
import numpy as np
from cenacle.crypto import SecretBytes
from cenacle.cut.runtime import TailRuntime
from cenacle.cut.tail_file import write_tail
from cenacle.sealing import TensorReader

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

key = SecretBytes(bytes.fromhex(sys.argv[1]))
for size, path, limit in ((8, sys.argv[2], 1 << 22), (1024, sys.argv[3], 1 << 24)):
    x = np.ones((1, size), np.float32)
    with TensorReader(Path(path), key, threads=1) as reader:
        Path("/proc/self/clear_refs").write_text("5")
        before = peak()
        with TailRuntime(reader, memory_limit=limit, threads=1) as tail:
            for _ in range(3):
                tail.run({"x": x})
print(json.dumps(peak() - before))
"""


def _chain(builder: Any, size: int) -> OnnxModel:
    value = builder.input("x", np.ones((1, size), np.float32))
    for layer in range(16):
        weight = builder.weight(f"w{layer}", size, size)
        value = builder.node("Gemm", [value, weight], f"h{layer}", transB=1)
    model: OnnxModel = builder.model((value, ["batch", size]))
    return model


def test_the_process_stays_small_though_the_tail_is_four_times_its_limit(
    builder: Any, tmp_path: Path
) -> None:
    """64 MiB of weights, 16 MiB for them. A small tail of the same nodes warms up before."""
    paths = []
    with SecretBytes.random() as key:
        for size in (8, 1024):
            plain, path = tmp_path / f"tail {size}", tmp_path / f"sealed {size}"
            write_tail(_chain(type(builder)(), size), plain, segment_bytes=1 << 22)
            with SealedWriter(path, key, "tensors") as writer:
                writer.write(plain.read_bytes())
            paths.append(str(path))
        done = subprocess.run(
            [sys.executable, "-c", _RESIDENT, bytes(key.view()).hex(), *paths],
            env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
    # Ciphertext, chunks read in parts, threads and graphs come on top, for a tail of any size.
    assert json.loads(done.stdout) < (1 << 24) + (22 << 20)
