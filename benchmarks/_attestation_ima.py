"""How fast an IMA list is judged: entries per second, from bytes to a verdict."""

from __future__ import annotations

import hashlib
import struct
import time

from cenacle.attestation.ima_allow import AllowList
from cenacle.attestation.ima_list import match_prefix, parse_ima_list, replay

__all__ = ["ima_entries_per_s"]


def _entry(number: int) -> tuple[str, bytes, bytes]:
    name = f"/usr/lib/python3.11/site-packages/package{number % 997}/module_{number}.so"
    digest = hashlib.sha256(name.encode()).digest()
    field = b"sha256:\0" + digest
    path = name.encode() + b"\0"
    return name, digest, b"".join(struct.pack("<I", len(f)) + f for f in (field, path, b""))


def _packed(data: bytes) -> bytes:
    shown = hashlib.sha1(data, usedforsecurity=False).digest()
    return struct.pack("<I20sI7sI", 10, shown, 7, b"ima-sig", len(data)) + data


def ima_entries_per_s(entries: int = 100_000, rounds: int = 3) -> dict[str, float]:
    """Parse, replay to the register, and appraise; CPU time of the best round."""
    listed = [_entry(number) for number in range(entries)]
    aggregate = hashlib.sha256(b"boot").digest()
    first = b"sha256:\0" + aggregate
    head = b"".join(struct.pack("<I", len(f)) + f for f in (first, b"boot_aggregate\0", b""))
    raw = _packed(head) + b"".join(_packed(data) for _, _, data in listed)
    allowed = AllowList({name: [digest] for name, digest, _ in listed})
    register = replay(parse_ima_list(raw))
    best = float("inf")
    for _ in range(rounds):
        start = time.process_time()
        parsed = parse_ima_list(raw)
        count = match_prefix(parsed, register, "sha256")
        allowed.appraise(parsed[:count], frozenset([aggregate]))
        best = min(best, time.process_time() - start)
    return {
        "ima_entries": count,
        "ima_seconds": round(best, 3),
        "ima_entries_per_s": round(count / best),
    }


if __name__ == "__main__":
    print(ima_entries_per_s())
