"""Memory that two processes share: who can write it, and when it is used again."""

from __future__ import annotations

import fcntl
import gc
import itertools
import mmap
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cenacle.accelerators import SharedStaging
from cenacle.accelerators.shared_memory import Arena, Region
from cenacle.errors import UnavailableError

_PAGE = mmap.PAGESIZE
_MB = 1 << 20


def _mode(address: int) -> str:
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, mode, *_ = line.split()
        begin, end = (int(part, 16) for part in span.split("-"))
        if begin <= address < end:
            return mode
    return "none"


def _open_files() -> set[str]:
    links = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            links.add(str(entry.readlink()) + entry.name)
        except FileNotFoundError:  # the listing's own descriptor
            continue
    return {link for link in links if "cenacle-tensors" in link}


def test_what_is_sent_can_be_mapped_for_reading_only() -> None:
    region = Region(2 * _MB, writable=True)
    assert _mode(region.address) == "rw-s"
    with pytest.raises(PermissionError):
        mmap.mmap(region.fd, _PAGE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    with pytest.raises(PermissionError):
        os.write(region.fd, b"x")
    again = os.open(f"/proc/self/fd/{region.fd}", os.O_RDWR)
    try:
        with pytest.raises(PermissionError):
            mmap.mmap(again, _PAGE, mmap.MAP_SHARED, mmap.PROT_WRITE)
    finally:
        os.close(again)
    mmap.mmap(region.fd, _PAGE, mmap.MAP_SHARED, mmap.PROT_READ).close()


def test_results_can_be_read_only_by_the_enclave() -> None:
    """A write there would hand plaintext to the worker."""
    arena = Arena(writable=False)
    value = arena.empty((8,), torch.float32)
    assert _mode(value.data_ptr()) == "r--s"
    region, offset = arena.locate(value) or pytest.fail("not found")
    worker = mmap.mmap(region.fd, region.size, mmap.MAP_SHARED)
    worker[offset : offset + 4] = torch.tensor([2.5]).numpy().tobytes()
    assert value[0].item() == 2.5
    worker.close()


@pytest.mark.parametrize("writable", [True, False])
def test_nobody_can_change_a_region_s_size_or_seals(writable: bool) -> None:
    region = Region(2 * _MB, writable=writable)
    for size in (0, _PAGE, 4 * _MB):
        with pytest.raises(PermissionError):
            os.ftruncate(region.fd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(region.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def test_memory_is_used_again_when_a_tensor_and_its_views_are_dead() -> None:
    staging = SharedStaging()
    value = staging.empty((1000,), torch.float32)
    place, view = value.data_ptr(), value[10:20].view(2, 5)
    del value
    other = staging.empty((1000,), torch.float32)
    assert other.data_ptr() != place
    del view
    assert staging.empty((1000,), torch.float32).data_ptr() == place


def test_memory_does_not_grow_with_use() -> None:
    staging = SharedStaging()
    sizes = (10, 4096, 70_000, 300_000)
    for _ in range(3):
        _ = [staging.empty((size,), torch.float32) for size in sizes]
    used = staging.arena.bytes
    for _ in range(50):
        _ = [staging.empty((size,), torch.float32) for size in sizes]
    assert staging.arena.bytes == used < 1.2 * 2 * 4 * sum(sizes)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(1, 5000), st.booleans()), max_size=60))
def test_living_tensors_never_overlap(plan: list[tuple[int, bool]]) -> None:
    arena = Arena(writable=True, region_bytes=2 * _MB)
    living: list[torch.Tensor] = []
    for number, (size, drop) in enumerate(plan):
        living.append(arena.empty((size,), torch.uint8).fill_(number))
        if drop and len(living) > 1:
            living.pop(0)
    for tensor in living:
        assert int(tensor.min()) == int(tensor.max())
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in living)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))


def test_a_copy_begins_at_the_same_place_in_a_cache_line() -> None:
    staging = SharedStaging()
    base = torch.randn(64)
    for first in range(16):
        value = base[first:]
        own = staging.copy(value)
        assert torch.equal(own, value)
        assert own.data_ptr() % 64 == value.data_ptr() % 64
        assert staging.arena.locate(own) is not None
        assert staging.arena.locate(value) is None


def test_only_contiguous_views_lie_in_shared_memory() -> None:
    staging = SharedStaging()
    value = staging.empty((4, 6), torch.float64)
    found = staging.arena.locate(value[1:3])
    assert found is not None
    assert found[1] == (staging.arena.locate(value) or found)[1] + 6 * 8
    assert staging.arena.locate(value.t()) is None
    assert staging.arena.locate(value[:, 1:]) is None


def test_there_is_a_limit() -> None:
    staging = SharedStaging(limit=_MB)
    held = [staging.empty((200, 1024), torch.uint8) for _ in range(4)]
    with pytest.raises(UnavailableError, match="used up"):
        staging.empty((800, 1024), torch.uint8)
    del held
    # Within the limit, a larger block serves a smaller tensor.
    assert len({staging.empty((n, 1024), torch.uint8).data_ptr() for n in (190, 150)}) >= 1


def test_closing_gives_everything_back_but_what_is_still_used() -> None:
    gc.collect()
    before = _open_files()
    staging = SharedStaging()
    kept = staging.empty((100,), torch.float32).fill_(3)
    assert _open_files() - before
    staging.close()
    staging.close()
    assert kept.sum().item() == 300
    assert _open_files() - before, "its memory is still in use"
    assert staging.empty((5,), torch.float32).shape == (5,), "ordinary memory"
    assert staging.arena.locate(kept) is None
    del kept
    assert _open_files() == before


def test_a_large_tensor_gets_a_region_of_its_own() -> None:
    arena = Arena(writable=True, region_bytes=2 * _MB)
    large = arena.empty((5 * _MB,), torch.uint8)
    large[-1] = 7
    small = arena.empty((16,), torch.uint8).fill_(1)
    assert large[-1].item() == 7
    assert small.sum().item() == 16
