"""Whatever the host does to the folder is noticed, or harms nobody but the host."""

from __future__ import annotations

import hashlib
import os
import resource
import secrets
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cenacle.crypto import SecretBytes
from cenacle.documents.ticket import Ticket
from cenacle.enclave import ticket_journal, tickets
from cenacle.enclave.ticket_index import (
    Burn,
    BurnIndex,
    pack_burns,
    pack_totals,
    unpack_burns,
    unpack_totals,
)
from cenacle.enclave.ticket_journal import NOTHING, Journal, State
from cenacle.errors import RefusedError, SealError, UnavailableError

HEADER = ticket_journal._HEADER.size
EMPTY_BATCH = ticket_journal._BATCH.size + 12 + 16
RECORD = 80


def _journal(shop: Any) -> Path:
    return Path(shop.folder / "journal")


def _burned(shop: Any) -> Any:
    """A journal of three batches: opened, one burn, one burn. Returns the ticket."""
    ticket = shop.ticket(queries=3)
    with shop.desk() as desk:
        shop.admit_one(desk, shop.present(ticket))
        shop.admit_one(desk, shop.present(ticket))
    return ticket


# ------------------------------------------------------------------ what the host may do to it


def _cut(to: int) -> Any:
    return lambda data, shop: data[:to]


def _flip(at: int) -> Any:
    def change(data: bytes, shop: Any) -> bytes:
        changed = bytearray(data)
        changed[at] ^= 1
        return bytes(changed)

    return change


def _without(start: int, end: int) -> Any:
    return lambda data, shop: data[:start] + data[end:]


FIRST, SECOND = HEADER + EMPTY_BATCH, HEADER + 2 * EMPTY_BATCH + RECORD


def _swapped(data: bytes, shop: Any) -> bytes:
    return data[:FIRST] + data[SECOND:] + data[FIRST:SECOND]


def _twice(data: bytes, shop: Any) -> bytes:
    return data[:SECOND] + data[FIRST:]


def _begun_late(data: bytes, shop: Any) -> bytes:
    """The last batch alone, behind a header that claims to go on from the one before."""
    journal = Journal(shop.folder.parent / "scratch", shop.contract, SecretBytes(bytearray(32)))
    with journal:
        journal._begin(data[:HEADER], NOTHING)
        for start, end in ((HEADER, FIRST), (FIRST, SECOND)):
            journal._move(data[start:end][:24], data[start:end][24:])
        header = struct.unpack(">16s32s16sQ32s", data[:HEADER])
        return struct.pack(">16s32s16sQ32s", *header[:3], 2, journal._head) + data[SECOND:]


def _only_claimed(data: bytes, shop: Any) -> bytes:
    """A header that claims to go on from the newest batch, and nothing more."""
    header = struct.unpack(">16s32s16sQ32s", data[:HEADER])
    head = bytes.fromhex(shop.counter.state.digest.removeprefix("sha256:"))
    return struct.pack(">16s32s16sQ32s", *header[:3], shop.counter.state.number, head)


DAMAGE = {
    "nothing left": (_cut(0), "not this contract's"),
    "cut in the header": (_cut(HEADER - 1), "not this contract's"),
    "no batch left": (_cut(HEADER), "old copy, was cut short"),
    "the last batch cut off": (_cut(SECOND), "old copy, was cut short"),
    "the last byte cut off": (_cut(-1), "old copy, was cut short"),
    "the magic altered": (_flip(0), "not this contract's"),
    "the contract altered": (_flip(20), "not this contract's"),
    "the identity altered": (_flip(50), "was altered"),
    "the base altered": (_flip(71), "was altered"),
    "the kind altered": (_flip(HEADER + 3), "was altered"),
    "the number altered": (_flip(HEADER + 11), "was altered"),
    "the count altered": (_flip(HEADER + 15), "was altered"),
    "the length altered": (_flip(HEADER + 23), "was altered"),
    "the nonce altered": (_flip(HEADER + 24), "was altered"),
    "a record altered": (_flip(FIRST + 50), "was altered"),
    "the last record altered": (_flip(SECOND + 50), "was altered"),
    "the tag altered": (_flip(-1), "was altered"),
    "a batch left out": (_without(FIRST, SECOND), "was altered"),
    "the first batch left out": (_without(HEADER, FIRST), "was altered"),
    "two batches swapped": (_swapped, "was altered"),
    "a batch repeated": (_twice, "was altered"),
    "begun late": (_begun_late, "was altered"),
    "only claimed": (_only_claimed, "was altered"),
    "zeros": (lambda data, shop: bytes(len(data)), "not this contract's"),
    "noise": (lambda data, shop: data[:HEADER] + b"\xff" * 1000, "was altered"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_journal_is_refused(shop: Any, case: str) -> None:
    change, words = DAMAGE[case]
    _burned(shop)
    data, state = _journal(shop).read_bytes(), shop.counter.state
    assert len(data) == HEADER + 3 * EMPTY_BATCH + 2 * RECORD
    _journal(shop).write_bytes(change(data, shop))
    with pytest.raises(SealError, match=words) as refusal:
        shop.desk()
    assert refusal.value.remedy
    assert "\n" not in str(refusal.value)
    assert shop.counter.state == state
    _journal(shop).write_bytes(data)
    shop.desk().close()


def test_a_missing_journal_is_refused(shop: Any) -> None:
    _burned(shop)
    _journal(shop).unlink()
    with pytest.raises(SealError, match="the ticket journal is missing; found no file"):
        shop.desk()
    assert not _journal(shop).exists()


def test_an_old_folder_is_refused(shop: Any, tmp_path: Path) -> None:
    ticket = shop.ticket(queries=2)
    with shop.desk() as desk:
        shop.admit_one(desk, shop.present(ticket))
        shutil.copytree(shop.folder, tmp_path / "old")
        shop.admit_one(desk, shop.present(ticket))
    with pytest.raises(SealError, match="an old copy"):
        shop.desk(tmp_path / "old")
    with shop.desk() as desk, pytest.raises(RefusedError, match="found 0 of 2"):
        shop.admit_one(desk, shop.present(ticket))


def test_another_contracts_journal_is_refused(shop: Any, make_shop: Any, tmp_path: Path) -> None:
    other = make_shop(tmp_path / "other")
    other.contract = "sha256:" + "2" * 64
    other.key = bytes(32)
    for known in (0, 3):
        _burned(shop)
        other.counter.state = State(known, None if not known else "sha256:" + "0" * 64)
        shutil.copytree(shop.folder, other.folder, dirs_exist_ok=True)
        with pytest.raises(SealError, match="not this contract's"):
            other.desk()


def test_another_key_opens_nothing(shop: Any) -> None:
    _burned(shop)
    shop.key = secrets.token_bytes(32)
    with pytest.raises(SealError, match="a batch does not decrypt after batch 0"):
        shop.desk()


def test_a_broker_that_went_back_is_noticed(shop: Any) -> None:
    """Its store restored from a backup: the queries since must not be sold twice."""
    shop.desk().close()
    old = shop.counter.state
    _burned(shop)
    shop.counter.state = old
    with pytest.raises(SealError, match="ahead of what was recorded") as refusal:
        shop.desk()
    assert "the broker's store is an old copy" in str(refusal.value.remedy)
    shop.counter.state = NOTHING
    with pytest.raises(SealError, match="ahead of what was recorded"):
        shop.desk()


def test_one_batch_ahead_is_made_known_and_two_are_refused(shop: Any) -> None:
    shop.desk().close()
    first = shop.counter.state, shop.counter.previous
    shop.desk().close()
    second = shop.counter.state, shop.counter.previous
    shop.desk().close()
    shop.counter.state, shop.counter.previous = first
    with pytest.raises(SealError, match="ahead of what was recorded; found batch 3"):
        shop.desk()
    shop.counter.state, shop.counter.previous = second
    shop.desk().close()
    assert shop.counter.state.number == 4


def test_what_a_crash_left_half_written_is_removed(shop: Any) -> None:
    _burned(shop)
    data = _journal(shop).read_bytes()
    for rest in (b"\0", bytes(4096), data[FIRST:SECOND], os.urandom(300), data[SECOND:][:-1]):
        _journal(shop).write_bytes(_journal(shop).read_bytes() + rest)
        with shop.desk() as desk:
            assert sum(desk.report()["burned"].values()) == 2
            assert _journal(shop).stat().st_size == desk._journal.size


def test_the_host_reads_nothing_of_a_use(shop: Any) -> None:
    ticket = shop.ticket()
    one = shop.present(ticket)
    with shop.desk() as desk:
        shop.admit_one(desk, one)
    data = _journal(shop).read_bytes()
    for secret in (
        ticket.peek(Ticket).serial_bytes,
        one.use.request_bytes,
        bytes.fromhex(one.input.removeprefix("sha256:")),
        shop.client.verify_key.raw,
    ):
        assert secret not in data
    assert {path.name for path in shop.folder.iterdir()} == {"journal", "lock"}
    assert _journal(shop).stat().st_mode & 0o777 == 0o600


# ------------------------------------------------------------------ snapshots


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every journal is worth a snapshot."""
    monkeypatch.setattr(tickets, "_WORTH_BYTES", 0)


def test_a_snapshot_keeps_everything(shop: Any, often: None) -> None:
    ticket = shop.ticket(queries=7)
    asked = [shop.present(ticket) for _ in range(3)]
    for number, one in enumerate(asked):
        with shop.desk() as desk:
            for before in asked[:number]:
                shop.admit_one(desk, before)
            shop.admit_one(desk, one)
            shop.admit_one(desk, shop.present(ticket))
            assert sum(desk.report()["burned"].values()) == 2 * (number + 1)
    assert ticket_journal._HEADER.unpack(_journal(shop).read_bytes()[:HEADER])[3] > 0
    with shop.desk() as desk:
        with pytest.raises(RefusedError, match="found 1 of 7"):
            shop.admit_one(desk, shop.present(ticket, 2))
        for one in asked:
            shop.admit_one(desk, one)


def test_requests_of_expired_tickets_are_forgotten(shop: Any, often: None) -> None:
    short = shop.ticket(expires="2027-01-31T13:00:00Z")
    asked = shop.present(short)
    with shop.desk() as desk:
        for _ in range(8):
            shop.admit_one(desk, shop.present(short))
        shop.admit_one(desk, asked)
    size = _journal(shop).stat().st_size
    shop.counter.now = shop.counter.now.replace(hour=14)
    for _ in range(2):
        with shop.desk() as desk:
            assert desk._index.count in {9, 0}
            with pytest.raises(RefusedError, match="expired"):
                shop.admit_one(desk, asked)
            assert list(desk.report()["burned"].values()) == [9]
    assert _journal(shop).stat().st_size < size / 2


@pytest.mark.parametrize("fault", ["before", "after"])
def test_a_crash_after_a_snapshot(shop: Any, often: None, fault: str) -> None:
    """The new file is in its place, and the counter was not told, or its answer was lost."""
    ticket = _burned(shop)
    shop.counter.faults = [None, fault]
    with pytest.raises(UnavailableError):
        shop.desk()
    shutil.copytree(shop.folder, shop.folder.parent / "copy")
    with shop.desk() as desk:
        assert sum(desk.report()["burned"].values()) == 2
        shop.admit_one(desk, shop.present(ticket))
    with pytest.raises(SealError):
        shop.desk(shop.folder.parent / "copy")


SNAPSHOT_DAMAGE = {
    "no snapshot": lambda data: data[:HEADER],
    "the snapshot cut": lambda data: data[: HEADER + 60],
    "the snapshot altered": lambda data: data[: HEADER + 40] + b"\0" + data[HEADER + 41 :],
    "the base moved": lambda data: data[:71] + bytes([data[71] - 1]) + data[72:],
    "the base's head altered": lambda data: data[:80] + bytes([data[80] ^ 1]) + data[81:],
    "called burns": lambda data: data[: HEADER + 3] + b"\1" + data[HEADER + 4 :],
}


@pytest.mark.parametrize("case", SNAPSHOT_DAMAGE)
def test_a_damaged_snapshot_is_refused(shop: Any, often: None, case: str) -> None:
    _burned(shop)
    shop.desk().close()
    data = _journal(shop).read_bytes()
    _journal(shop).write_bytes(SNAPSHOT_DAMAGE[case](data))
    with pytest.raises(SealError):
        shop.desk()
    _journal(shop).write_bytes(data)
    shop.desk().close()


def test_a_snapshot_that_is_put_behind_the_old_file_is_refused(shop: Any, often: None) -> None:
    """It would count everything twice."""
    _burned(shop)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tickets, "_WORTH_BYTES", 1 << 30)
        shop.desk().close()
    old = _journal(shop).read_bytes()
    opened = shop.counter.taken()
    with shop.desk(hold=opened):
        pass
    new = _journal(shop).read_bytes()[HEADER:]
    # The opening batch between the two is not in the new file; nothing else leads up to it.
    _journal(shop).write_bytes(old + new)
    with pytest.raises(SealError):
        shop.desk()


# ------------------------------------------------------------------ a real limit of the disk

_LIMITED = """
import resource, signal, sys
from pathlib import Path
from cenacle.crypto import SecretBytes
from cenacle.enclave.ticket_journal import NOTHING, Journal
from cenacle.errors import UnavailableError

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with Journal(Path(sys.argv[1]), "sha256:" + "0" * 64, SecretBytes(bytearray(32))) as journal:
    list(journal.replay(NOTHING))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    written = 0
    try:
        while True:
            journal.append(1, b"." * 80)
            written += 1
    except UnavailableError as error:
        assert "no room" in str(error), error
    assert (Path(sys.argv[1]) / "journal").stat().st_size == journal.size
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    journal.append(1, b"." * 80)
    print(written + 1, journal.state.number, journal.state.digest)
"""


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    assert resource.RLIM_INFINITY < 0 or signal.SIGXFSZ
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    written, number, digest = done.stdout.split()
    assert written == number
    with Journal(tmp_path, "sha256:" + "0" * 64, SecretBytes(bytearray(32))) as journal:
        batches = list(journal.replay(State(int(number), digest)))
    assert [batch.plain for batch in batches] == [b"." * 80] * int(number)


# ------------------------------------------------------------------ the index


def _burn(number: int, rows: int = 1) -> Burn:
    name = hashlib.sha256(number.to_bytes(8, "big")).digest()
    return Burn(name[:16], name[16:], rows, 4_000_000_000, hashlib.sha256(name).digest())


def test_the_index_finds_what_was_burned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cenacle.enclave.ticket_index._SORT_IN", 16)
    index = BurnIndex()
    index.add_all(unpack_burns(pack_burns(_burn(n, n + 1) for n in range(100))))
    index.add_all(unpack_burns(b""))
    for n in range(100, 150):
        index.add(_burn(n, n + 1))
    for n in range(150):
        burn = _burn(n)
        assert index.find(burn.serial, burn.request) == (n + 1, burn.digest)
        assert index.find(burn.request, burn.serial) is None
        assert index.burned[burn.serial] == n + 1
    assert index.find(_burn(150).serial, _burn(150).request) is None
    assert index.count == 150


def test_totals_make_the_round_trip() -> None:
    totals = {bytes([n]) * 16: (1 << 40) - n for n in range(5)}
    assert unpack_totals(pack_totals(totals) + b"rest") == (totals, b"rest")
    assert unpack_totals(pack_totals({})) == ({}, b"")
