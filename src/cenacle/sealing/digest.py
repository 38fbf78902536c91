"""Check a container against its content digest, without any key."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Callable
from pathlib import Path

from cenacle.errors import SealError
from cenacle.sealing.container import (
    DIGEST_BYTES,
    HEADER_BYTES,
    TAG_BYTES,
    Header,
    Layout,
    content_digest,
    parse_digest,
)
from cenacle.sealing.disk import disk_errors, open_source, pread_into
from cenacle.sealing.parallel import for_each, thread_count

__all__ = ["compute_digest", "verify_digest"]


def _damaged(what: str) -> SealError:
    return SealError(
        "a sealed file is damaged or was altered",
        found=what,
        expected="the bytes its writer sealed",
        remedy="fetch the sealed file again from its owner",
    )


def compute_digest(path: Path | str, *, threads: int | None = None) -> str:
    """The content digest of a sealed file, from all of its bytes; needs no key.

    Raises:
        SealError: not a container, or one whose digest table does not match its chunks.
        InputError: the file cannot be read.
    """
    path = Path(path)
    fd = open_source(path)
    try:
        with disk_errors(f"read {path}"):
            return f"sha256:{_digest(fd, thread_count(threads)).hex()}"
    finally:
        os.close(fd)


def _digest(fd: int, threads: int) -> bytes:
    size = os.fstat(fd).st_size
    head = os.pread(fd, HEADER_BYTES, 0)
    header = Header.parse(head)
    layout = Layout.of_container(header, size)
    if not layout.table:
        raise SealError(
            "a sealed file has no content digest",
            found="a container without digest table, as is made in memory only",
            expected="a container with digest table",
            remedy="seal it to a file",
        )
    table = bytearray(layout.table_bytes)
    if pread_into(fd, memoryview(table), layout.table_offset) != len(table):
        raise _damaged("an end before its digest table")

    def make_worker() -> Callable[[int], None]:
        scratch = memoryview(bytearray(min(layout.chunk, layout.plaintext) + TAG_BYTES))

        def work(index: int) -> None:
            record = scratch[: layout.chunk_bytes(index) + TAG_BYTES]
            got = pread_into(fd, record, layout.record_offset(index))
            start = index * DIGEST_BYTES
            expected = table[start : start + DIGEST_BYTES]
            if got != len(record) or hashlib.sha256(record).digest() != expected:
                raise _damaged(f"chunk {index} with another digest than the table says")

        return work

    for_each(layout.chunks, make_worker, threads)
    end = os.pread(fd, layout.end_bytes, layout.end_offset)
    return content_digest(header, layout, hashlib.sha256(table).digest(), end)


def verify_digest(path: Path | str, expected: str, *, threads: int | None = None) -> None:
    """Check that a sealed file is, byte for byte, the one a manifest names.

    Args:
        path: the sealed file.
        expected: its content digest, ``sha256:<hex>``.
        threads: how many threads hash; by default one a core, at most 8.

    Raises:
        SealError: another file, or a damaged one.
        InputError: the file cannot be read, or ``expected`` is malformed.
    """
    wanted = parse_digest(expected)
    found = compute_digest(path, threads=threads)
    if not hmac.compare_digest(parse_digest(found), wanted):
        raise SealError(
            "a sealed file is not the one that was named",
            found=found,
            expected=expected,
            remedy="fetch the sealed file that belongs to the manifest",
        )
