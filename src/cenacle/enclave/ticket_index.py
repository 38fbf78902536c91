"""Which requests were answered under which tickets, in 48 bytes of memory each.

A request is found by a keyed 64-bit hash (BLAKE2b, RFC 7693) of serial and request, under a key
that this process alone knows, in a sorted array; the newest ones are in a dictionary until there
are enough of them to sort in. Two requests of one hash cannot be told apart: with a million of
them, chance does that to one request in 10^13, which is then refused; nobody can seek it without
the key. Rows and digest of the input are kept whole, so nothing is ever taken for another input.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "RECORD_BYTES",
    "Burn",
    "BurnIndex",
    "pack_burns",
    "pack_totals",
    "unpack_burns",
    "unpack_totals",
]

_SORT_IN: Final = 1 << 16

_RECORD: Final = np.dtype(
    [
        ("name", "u1", (32,)),  # serial and request
        ("rows", ">u8"),
        ("expires", ">u8"),
        ("input", "u1", (32,)),
    ]
)
RECORD_BYTES: Final = _RECORD.itemsize
_VALUE: Final = np.dtype([("rows", ">u8"), ("input", "u1", (32,))])


class Burn(NamedTuple):
    """One request that was answered, or is about to be.

    Attributes:
        serial, request: 16 bytes each.
        rows: queries that it cost.
        expires: of its ticket, in seconds since 1970.
        digest: SHA-256 of the input, 32 bytes.
    """

    serial: bytes
    request: bytes
    rows: int
    expires: int
    digest: bytes


def pack_burns(burns: Iterable[Burn]) -> bytes:
    """Records of a fixed length, :data:`RECORD_BYTES` each."""
    return b"".join(
        burn.serial
        + burn.request
        + burn.rows.to_bytes(8, "big")
        + burn.expires.to_bytes(8, "big")
        + burn.digest
        for burn in burns
    )


def unpack_burns(data: bytes) -> NDArray[np.void]:
    """The inverse of :func:`pack_burns`, as an array with fields name, rows, expires, input."""
    return np.frombuffer(data, _RECORD)


def pack_totals(burned: Mapping[bytes, int]) -> bytes:
    """How many there are, and each serial with what was burned of it."""
    totals = (serial + rows.to_bytes(8, "big") for serial, rows in burned.items())
    return len(burned).to_bytes(8, "big") + b"".join(totals)


def unpack_totals(data: bytes) -> tuple[dict[bytes, int], bytes]:
    """The inverse of :func:`pack_totals`, and what follows."""
    end = 8 + 24 * int.from_bytes(data[:8], "big")
    totals = {
        data[at : at + 16]: int.from_bytes(data[at + 16 : at + 24], "big")
        for at in range(8, end, 24)
    }
    return totals, data[end:]


class BurnIndex:
    """All burns of a contract. Not for use by two threads at once.

    Attributes:
        burned: queries by serial.
        count: requests that are remembered.
    """

    def __init__(self) -> None:
        self.burned: dict[bytes, int] = {}
        self.count = 0
        self._secret = secrets.token_bytes(32)
        self._keys = np.empty(0, np.uint64)
        self._values = np.empty(0, _VALUE)
        self._recent: dict[bytes, tuple[int, bytes]] = {}
        self._unsorted: list[tuple[NDArray[np.uint64], NDArray[np.void]]] = []

    def find(self, serial: bytes, request: bytes) -> tuple[int, bytes] | None:
        """Rows and digest of the input of a request that was burned."""
        name = serial + request
        recent = self._recent.get(name)
        if recent is not None:
            return recent
        if self._unsorted:
            self.sort_in()
        key = self._hash(name)
        at = int(np.searchsorted(self._keys, key))
        if at == len(self._keys) or self._keys[at] != key:
            return None
        found = self._values[at]
        return int(found["rows"]), found["input"].tobytes()

    def add(self, burn: Burn) -> None:
        """Remember and count one more."""
        self._recent[burn.serial + burn.request] = burn.rows, burn.digest
        self.burned[burn.serial] = self.burned.get(burn.serial, 0) + burn.rows
        self.count += 1
        if len(self._recent) >= _SORT_IN:
            self._put_aside(list(self._recent), self._recent_values())
            self._recent.clear()
            self.sort_in()

    def add_all(self, records: NDArray[np.void], *, counted: bool = True) -> None:
        """Remember many; ``counted``: they are not in :attr:`burned` yet."""
        raw = records["name"].tobytes()
        names = [raw[start : start + 32] for start in range(0, len(raw), 32)]
        if counted:
            burned = self.burned
            for name, rows in zip(names, records["rows"].tolist(), strict=True):
                serial = name[:16]
                burned[serial] = burned.get(serial, 0) + rows
        values = np.empty(len(records), _VALUE)
        values["rows"], values["input"] = records["rows"], records["input"]
        self._put_aside(names, values)
        self.count += len(names)

    def _recent_values(self) -> NDArray[np.void]:
        raw = b"".join(rows.to_bytes(8, "big") + digest for rows, digest in self._recent.values())
        return np.frombuffer(raw, _VALUE)

    def _put_aside(self, names: list[bytes], values: NDArray[np.void]) -> None:
        keys = np.fromiter(map(self._hash, names), np.uint64, len(names))
        self._unsorted.append((keys, values))

    def sort_in(self) -> None:
        """Do now what the next :meth:`find` would have to do."""
        keys = np.concatenate([self._keys, *(keys for keys, _ in self._unsorted)])
        values = np.concatenate([self._values, *(values for _, values in self._unsorted)])
        self._unsorted.clear()
        order = np.argsort(keys)
        self._keys, self._values = keys[order], values[order]

    def _hash(self, name: bytes) -> np.uint64:
        digest = hashlib.blake2b(name, key=self._secret, digest_size=8).digest()
        return np.uint64(int.from_bytes(digest, "big"))
