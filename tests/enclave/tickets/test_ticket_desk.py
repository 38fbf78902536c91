"""What the desk admits and refuses, whatever clients, host and counter do."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from cenacle.crypto import SigningKey
from cenacle.documents.base import b64, format_time
from cenacle.documents.dsse import Envelope
from cenacle.documents.ticket import Ticket, new_request
from cenacle.enclave import tickets
from cenacle.enclave.tickets import Presented
from cenacle.errors import (
    CenacleError,
    ConflictError,
    DocumentError,
    EvidenceError,
    RefusedError,
    SealError,
    SignatureError,
    UnavailableError,
)


def _serial(ticket: Any) -> str:
    return str(ticket.peek(Ticket).serial)


# ------------------------------------------------------------------ what is admitted


def test_a_ticket_is_burned_to_its_last_query(shop: Any) -> None:
    ticket = shop.ticket(queries=10)
    with shop.desk() as desk:
        for rows in (1, 4, 4):
            shop.admit_one(desk, shop.present(ticket, rows))
        with pytest.raises(RefusedError, match=r"not enough queries left; found 1 of 10"):
            shop.admit_one(desk, shop.present(ticket, 2))
        shop.admit_one(desk, shop.present(ticket, 1))
        with pytest.raises(RefusedError, match="found 0 of 10"):
            shop.admit_one(desk, shop.present(ticket, 1))
        assert desk.report()["burned"] == {_serial(ticket): 10}


def test_a_batch_shares_one_advance(shop: Any) -> None:
    ticket, other = shop.ticket(queries=3), shop.ticket(queries=10)
    with shop.desk() as desk:
        before = shop.counter.advances
        answers = desk.admit([shop.present(ticket) for _ in range(5)] + [shop.present(other, 7)])
        assert [shop.outcome(a) for a in answers] == (
            ["admitted"] * 3 + ["RefusedError"] * 2 + ["admitted"]
        )
        assert shop.counter.advances == before + 1
        assert desk.admit([]) == []
        assert shop.counter.advances == before + 1


def test_a_large_batch_is_split(shop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tickets, "_AT_ONCE", 3)
    ticket = shop.ticket(queries=7)
    with shop.desk() as desk:
        answers = desk.admit([shop.present(ticket) for _ in range(8)])
        assert [shop.outcome(a) for a in answers] == ["admitted"] * 7 + ["RefusedError"]


def test_the_same_request_is_answered_again_and_burned_once(shop: Any) -> None:
    ticket = shop.ticket(queries=5)
    request = new_request()
    asked = shop.present(ticket, 5, request=request)
    with shop.desk() as desk:
        assert desk.admit([asked, asked]) == [None, None]
        assert desk.admit([asked]) == [None]
        assert desk.report()["burned"] == {_serial(ticket): 5}
        for other in (
            shop.present(ticket, 5, "y", request=request),
            shop.present(ticket, 4, request=request),
        ):
            with pytest.raises(ConflictError, match="another input"):
                shop.admit_one(desk, other)
    with shop.desk() as desk:
        assert desk.admit([asked]) == [None]
        with pytest.raises(ConflictError, match="another input"):
            shop.admit_one(desk, shop.present(ticket, 5, "y", request=request))
        assert desk.report()["burned"] == {_serial(ticket): 5}


def test_one_request_with_two_inputs_in_one_batch(shop: Any) -> None:
    ticket, request = shop.ticket(), new_request()
    with shop.desk() as desk:
        answers = desk.admit([shop.present(ticket, 1, d, request=request) for d in "xyx"])
        assert [shop.outcome(a) for a in answers] == ["admitted", "ConflictError", "admitted"]


def test_a_plain_use_is_bound_to_what_the_enclave_saw(shop: Any) -> None:
    """The client signs no digest; an operator must not repeat the use with inputs of its own."""
    ticket, request = shop.ticket(), new_request()
    use = shop.use(ticket, request=request, sealed=False)
    seen = shop.present(ticket, data="x").input
    other = shop.present(ticket, data="y").input
    with shop.desk() as desk:
        shop.admit_one(desk, Presented(use, 1, seen))
        shop.admit_one(desk, Presented(use, 1, seen))
        with pytest.raises(ConflictError, match="another input"):
            shop.admit_one(desk, Presented(use, 1, other))


def test_tickets_of_one_serial_share_their_queries(shop: Any) -> None:
    one = shop.terms(queries=4)
    more = shop.ticket(serial=one.serial, queries=6)
    with shop.desk() as desk:
        shop.admit_one(desk, shop.present(shop.ticket(serial=one.serial, queries=4), 4))
        with pytest.raises(RefusedError, match="found 2 of 6"):
            shop.admit_one(desk, shop.present(more, 3))
        shop.admit_one(desk, shop.present(more, 2))


# ------------------------------------------------------------------ what is refused


def _stranger(shop: Any) -> Any:
    return shop.present(shop.ticket(SigningKey.generate()))


def _unsigned(shop: Any) -> Any:
    ticket = shop.ticket()
    return shop.present(type(ticket)(ticket.payload, ticket.payload_type, {}))


def _raised(shop: Any) -> Any:
    """A ticket whose count was altered under the vendor's signature."""
    cheap, dear = shop.ticket(queries=1), shop.terms(queries=1000)
    return shop.present(type(cheap)(dear.canonical_bytes(), cheap.payload_type, cheap.signatures))


def _stolen(shop: Any) -> Presented:
    """Somebody else's ticket, used with a key of one's own."""
    thief = SigningKey.generate()
    mine = shop.ticket(client=b64(thief.verify_key.raw))
    use = shop.use(mine, key=thief)
    return Presented(
        use.model_copy(update={"ticket": shop.ticket().to_fields()}), 1, use.input or ""
    )


def _altered(**changes: Any) -> Any:
    def make(shop: Any) -> Presented:
        one = shop.present(shop.ticket())
        use = one.use.model_copy(update=changes)
        return Presented(use, use.rows, use.input or one.input)

    return make


def _other_document(shop: Any) -> Presented:
    one = shop.present(shop.ticket())
    envelope = Envelope.sign(shop.issuer, shop.signing)
    return Presented(one.use.model_copy(update={"ticket": envelope.to_fields()}), 1, one.input)


def _other_rows(shop: Any) -> Presented:
    one = shop.present(shop.ticket())
    return Presented(one.use, 2, one.input)


def _other_input(shop: Any) -> Presented:
    one = shop.present(shop.ticket())
    return Presented(one.use, 1, shop.present(shop.ticket(), data="y").input)


REFUSALS = {
    "signed by a stranger": (_stranger, SignatureError, "a signature is missing"),
    "not signed": (_unsigned, SignatureError, "a signature is missing"),
    "its count altered": (_raised, SignatureError, "does not verify"),
    "another's ticket": (_stolen, SignatureError, "not signed by its client"),
    "rows altered": (_altered(rows=2), SignatureError, "not signed by its client"),
    "request altered": (_altered(request=b64(b"r" * 16)), SignatureError, "not signed by its"),
    "input altered": (
        _altered(input="sha256:" + "0" * 64),
        SignatureError,
        "not signed by its client",
    ),
    "input removed": (_altered(input=None), SignatureError, "not signed by its client"),
    "no envelope": (_altered(ticket={"a": 1}), DocumentError, "envelope is not valid"),
    "another document": (_other_document, DocumentError, "another kind of document"),
    "other rows than came": (_other_rows, RefusedError, "another number of rows"),
    "another input than came": (_other_input, RefusedError, "signed for another input"),
    "another contract": (
        lambda shop: shop.present(shop.ticket(contract="sha256:" + "1" * 64)),
        RefusedError,
        "for another contract",
    ),
    "another issuer": (
        lambda shop: shop.present(shop.ticket(issuer="somebody")),
        SignatureError,
        "names another issuer",
    ),
    "more rows than queries": (
        lambda shop: shop.present(shop.ticket(queries=3), 4),
        RefusedError,
        "found 3 of 3; expected 4",
    ),
    "expired": (
        lambda shop: shop.present(
            shop.ticket(not_before="2026-01-01T00:00:00Z", expires="2027-01-31T12:00:00Z")
        ),
        RefusedError,
        "a ticket has expired",
    ),
    "not valid yet": (
        lambda shop: shop.present(shop.ticket(not_before="2027-01-31T12:00:01Z")),
        RefusedError,
        "not valid yet",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_burn_nothing(shop: Any, case: str) -> None:
    make, kind, words = REFUSALS[case]
    with shop.desk() as desk:
        before = shop.counter.state
        with pytest.raises(kind, match=words):
            shop.admit_one(desk, make(shop))
        assert desk.report()["burned"] == {}
        assert shop.counter.state == before


# ------------------------------------------------------------------ time


def test_time_is_the_counters(shop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's clock set back or forward a year has no effect."""
    ticket = shop.ticket()
    for jump in (-3e7, 3e7):
        monkeypatch.setattr(time, "time", lambda jump=jump: 1.8e9 + jump)
        with shop.desk() as desk:
            shop.admit_one(desk, shop.present(ticket))
    shop.counter.now += timedelta(days=31)
    with shop.desk() as desk, pytest.raises(RefusedError, match="expired"):
        shop.admit_one(desk, shop.present(ticket))


def test_a_ticket_that_expired_since_the_last_burn_is_refused(shop: Any) -> None:
    """What the counter tells with the burn itself decides, not what it told an hour before."""
    ticket = shop.ticket()
    with shop.desk() as desk:
        shop.counter.now += timedelta(days=30)
        with pytest.raises(RefusedError, match="expired"):
            shop.admit_one(desk, shop.present(ticket))


def test_time_never_goes_back(shop: Any) -> None:
    ticket = shop.ticket(expires=format_time(shop.counter.now + timedelta(hours=1)))
    with shop.desk() as desk:
        shop.counter.now += timedelta(hours=1)
        with pytest.raises(RefusedError, match="expired"):
            shop.admit_one(desk, shop.present(ticket))
        shop.counter.now -= timedelta(hours=1)
        shop.admit_one(desk, shop.present(shop.ticket()))
        assert desk.report()["time"] == "2027-01-31T13:00:00Z"
        with pytest.raises(RefusedError, match="expired"):
            shop.admit_one(desk, shop.present(ticket))


def test_a_ticket_that_began_since_is_admitted(shop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ticket = shop.ticket(not_before="2027-01-31T12:00:30Z")
    with shop.desk() as desk:
        shop.counter.now += timedelta(minutes=1)
        with pytest.raises(RefusedError, match="not valid yet"):
            shop.admit_one(desk, shop.present(ticket))  # asked less than a second ago
        monkeypatch.setattr(tickets, "_ASK_TIME_S", 0.0)
        shop.admit_one(desk, shop.present(ticket))
        assert desk.report()["burned"] == {_serial(ticket): 1}


# ------------------------------------------------------------------ two at once


def test_two_clients_race_for_the_last_query(shop: Any) -> None:
    ticket = shop.ticket(queries=21)
    with shop.desk() as desk:
        shop.admit_one(desk, shop.present(ticket, 20))
        barrier = threading.Barrier(8)

        def ask(_: int) -> str:
            one = shop.present(ticket)
            barrier.wait()
            return str(shop.outcome(desk.admit([one])[0]))

        with ThreadPoolExecutor(8) as pool:
            assert sorted(pool.map(ask, range(8))) == ["RefusedError"] * 7 + ["admitted"]
        assert desk.report()["burned"] == {_serial(ticket): 21}


def test_threads_share_batches(shop: Any) -> None:
    """While one batch is on its way, the uses of all other threads gather for the next."""
    ticket = shop.ticket(queries=100)
    with shop.desk() as desk:
        under_way, go_on = threading.Event(), threading.Event()
        advance = desk._counter.advance

        def slow(*states: Any) -> Any:
            under_way.set()
            assert go_on.wait(10)
            return advance(*states)

        desk._counter.advance = slow
        before = shop.counter.advances
        with ThreadPoolExecutor(9) as pool:
            first = pool.submit(desk.admit, [shop.present(ticket)])
            assert under_way.wait(10)
            rest = [pool.submit(desk.admit, [shop.present(ticket)]) for _ in range(8)]
            deadline = time.monotonic() + 10
            while len(desk._queue) < 8 and time.monotonic() < deadline:
                threading.Event().wait(0.001)
            go_on.set()
            assert [f.result() for f in (first, *rest)] == [[None]] * 9
        assert shop.counter.advances == before + 2


def test_two_desks_in_one_folder(shop: Any) -> None:
    with shop.desk(), pytest.raises(ConflictError, match="in use by another process"):
        shop.desk()
    shop.desk().close()


def test_two_desks_on_copies_of_the_folder(shop: Any, tmp_path: Path) -> None:
    """The counter goes on with the one that opened last; the other burns nothing any more."""
    ticket = shop.ticket(queries=1)
    with shop.desk() as first:
        shutil.copytree(shop.folder, tmp_path / "copy")
        with shop.desk(tmp_path / "copy") as second:
            one, two = shop.present(ticket), shop.present(ticket)
            for _ in range(2):
                with pytest.raises(ConflictError):
                    shop.admit_one(first, one)
            shop.admit_one(second, two)
    with pytest.raises(SealError, match="an old copy"):
        shop.desk()
    with shop.desk(tmp_path / "copy") as desk, pytest.raises(RefusedError, match="found 0 of 1"):
        shop.admit_one(desk, shop.present(ticket))


def test_a_fork_of_the_same_length_is_refused(shop: Any, tmp_path: Path) -> None:
    """Both wrote as many batches; the counter knows those of one."""
    ticket = shop.ticket()
    with shop.desk() as first:
        shutil.copytree(shop.folder, tmp_path / "copy")
        with shop.desk(tmp_path / "copy") as second:
            shop.admit_one(second, shop.present(ticket))
            first._journal.append(0, b"")
            first._journal.append(0, b"")
    with pytest.raises(SealError, match="another history"):
        shop.desk()
    shop.desk(tmp_path / "copy").close()


def test_a_copy_from_before_is_refused(shop: Any, tmp_path: Path) -> None:
    """Even if nothing was burned since: opening itself is recorded."""
    shop.desk().close()
    shutil.copytree(shop.folder, tmp_path / "copy")
    shop.desk().close()
    with pytest.raises(SealError, match="an old copy"):
        shop.desk(tmp_path / "copy")


# ------------------------------------------------------------------ a counter that fails


@pytest.mark.parametrize("fault", ["before", "after"])
def test_an_answer_that_is_lost(shop: Any, fault: str) -> None:
    """Nothing is admitted until the counter is known to know; nothing is burned twice then."""
    ticket = shop.ticket(queries=2)
    one, two = shop.present(ticket), shop.present(ticket)
    with shop.desk() as desk:
        shop.counter.faults = [fault]
        with pytest.raises(UnavailableError):
            shop.admit_one(desk, one)
        shop.counter.faults = [fault]
        with pytest.raises(UnavailableError):
            shop.admit_one(desk, two)  # the first batch comes first
        shop.admit_one(desk, one)
        shop.admit_one(desk, two)
        with pytest.raises(RefusedError, match="found 0 of 2"):
            shop.admit_one(desk, shop.present(ticket))
    with shop.desk() as desk:
        assert desk.report()["burned"] == {_serial(ticket): 2}


@pytest.mark.parametrize("fault", ["before", "after"])
def test_a_crash_before_the_answer(shop: Any, fault: str) -> None:
    ticket = shop.ticket(queries=1)
    one = shop.present(ticket)
    desk = shop.desk()
    shop.counter.faults = [fault]
    with pytest.raises(UnavailableError):
        shop.admit_one(desk, one)
    desk.close()
    with shop.desk() as desk:
        shop.admit_one(desk, one)
        with pytest.raises(RefusedError, match="found 0 of 1"):
            shop.admit_one(desk, shop.present(ticket))
        assert desk.report()["burned"] == {_serial(ticket): 1}


@pytest.mark.parametrize("fault", ["before", "after"])
def test_a_counter_that_is_away_at_opening(shop: Any, fault: str) -> None:
    shop.counter.faults = [fault]
    with pytest.raises(UnavailableError):
        shop.desk()
    with shop.desk() as desk:
        shop.admit_one(desk, shop.present(shop.ticket()))


def test_a_counter_that_refuses_is_final(shop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ticket = shop.ticket()
    one = shop.present(ticket)
    with shop.desk() as desk:
        shop.admit_one(desk, one)

        def refuse(*_: Any) -> Any:
            raise EvidenceError("the run was revoked")

        assert desk.failure is None

        monkeypatch.setattr(desk._counter, "advance", refuse)
        for _ in range(2):
            answers = desk.admit([one, shop.present(ticket)])
            assert shop.outcome(answers[1]) == "EvidenceError"
        monkeypatch.undo()
        assert [shop.outcome(a) for a in desk.admit([one])] == ["EvidenceError"]
        assert isinstance(desk.failure, EvidenceError)


def test_a_broker_that_fails_unforeseen_is_asked_again(
    shop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = shop.present(shop.ticket())
    with shop.desk() as desk:

        def fail(*_: Any) -> Any:
            raise CenacleError("the broker failed (KeyError)")

        with monkeypatch.context() as patch:
            patch.setattr(desk._counter, "advance", fail)
            with pytest.raises(CenacleError, match="the broker failed"):
                shop.admit_one(desk, one)
        shop.admit_one(desk, one)


def test_a_fault_of_ours_admits_nobody(shop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ticket = shop.ticket(queries=1)
    one = shop.present(ticket)
    with shop.desk() as desk:
        with monkeypatch.context() as patch:
            patch.setattr(tickets, "pack_burns", lambda _: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                desk.admit([one])
        shop.admit_one(desk, one)


def test_a_closed_desk_admits_nothing(shop: Any) -> None:
    one = shop.present(shop.ticket())
    desk = shop.desk()
    shop.admit_one(desk, one)
    desk.close()
    desk.close()
    with pytest.raises(UnavailableError, match="closed"):
        shop.admit_one(desk, one)


# ------------------------------------------------------------------ a disk that fails


@pytest.mark.parametrize("step", ["write", "part of it", "sync"])
@pytest.mark.parametrize("truncates", [True, False])
def test_a_full_disk_burns_nothing_and_the_desk_goes_on(
    shop: Any, monkeypatch: pytest.MonkeyPatch, step: str, truncates: bool
) -> None:
    ticket = shop.ticket(queries=3)
    early, late = shop.present(ticket), shop.present(ticket, 2)
    real = os.pwrite

    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def partly(fd: int, data: Any, offset: int) -> int:
        if len(data) < 40:
            full()
        return real(fd, bytes(data)[: len(data) // 2], offset)

    with shop.desk() as desk:
        shop.admit_one(desk, early)
        state = shop.counter.state
        with monkeypatch.context() as patch:
            if step == "sync":
                patch.setattr(os, "fdatasync", full)
            else:
                patch.setattr(os, "pwrite", full if step == "write" else partly)
            if not truncates:
                patch.setattr(os, "ftruncate", full)
            answers = desk.admit([late, early])
            assert [shop.outcome(a) for a in answers] == ["UnavailableError", "admitted"]
            assert "no room" in str(answers[0])
        assert shop.counter.state == state
        assert desk.report()["burned"] == {_serial(ticket): 1}
        shop.admit_one(desk, late)
    with shop.desk() as desk:
        assert desk.report()["burned"] == {_serial(ticket): 3}
        shop.admit_one(desk, late)
