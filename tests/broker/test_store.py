"""The store on SQLite and PostgreSQL: what it keeps, what it refuses, how it opens."""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cenacle.broker.ledger import Charge, LedgerView
from cenacle.broker.store import ReadTransaction, Store, Transaction, connect, migrate
from cenacle.broker.store.connect import make_engine, parse_url
from cenacle.errors import (
    CenacleError,
    ConflictError,
    EvidenceError,
    InputError,
    ProofError,
    RefusedError,
    UnavailableError,
)

TIME = "2027-01-31T12:00:00Z"
LATER = "2027-01-31T13:00:00Z"
ASSET = "sha256:" + "1" * 64
CONTRACT = "sha256:" + "c" * 64
NEXT = "sha256:" + "d" * 64
OTHER = "sha256:" + "e" * 64
Furnish = Callable[..., None]


# ---------------------------------------------------------------- what it keeps


def test_rows_come_back_as_they_went_in(store: Store, furnish: Furnish) -> None:
    furnish(store)

    def change(tx: Transaction) -> None:
        tx.add_invitation("hash", TIME, LATER)
        tx.add_signature(CONTRACT, "alice", "key", b"\x00\xff signature", TIME)
        tx.add_veto(CONTRACT, "bob", '{"reason": "\u00e9\U0001f512"}')
        tx.set_meta("owner", "alice")

    store.run(change)
    with store.read() as tx:
        alice = tx.party("alice")
        assert alice is not None
        assert (alice.digest, alice.registered_at) == ("sha256:" + "a" * 64, TIME)
        assert [p.name for p in tx.parties()] == ["alice", "bob"]
        asset = tx.asset(ASSET)
        assert asset is not None
        assert (asset.name, asset.owner, asset.wrapped_key) == ("scans", "alice", b"wrapped")
        assert type(asset.wrapped_key) is bytes
        assert tx.assets() == tx.assets_of("alice") == [asset]
        assert tx.assets_of("bob") == []
        contract = tx.contract(CONTRACT)
        assert contract is not None
        assert (contract.proposer, contract.replaces, contract.replaced_by) == ("bob", None, None)
        assert tx.contracts() == [contract]
        assert [s.signature for s in tx.signatures(CONTRACT)] == [b"\x00\xff signature"]
        assert [v.envelope for v in tx.vetoes(CONTRACT)] == ['{"reason": "\u00e9\U0001f512"}']
        run = tx.run("run-1")
        assert run is not None
        assert (run.state, run.releases, run.enclave_key) == ("open", 0, None)
        assert (run.job_secret_wrapped, run.checkpoint_version) == (b"secret", 0)
        assert tx.open_run(CONTRACT) == run
        assert tx.runs(CONTRACT) == [run]
        invitation = tx.invitation("hash")
        assert invitation is not None
        assert invitation.used_by is None
        assert (tx.meta("owner"), tx.meta("other")) == ("alice", None)


def test_what_is_not_there_is_none(store: Store) -> None:
    with store.read() as tx:
        for found in (
            tx.party("x"),
            tx.asset(ASSET),
            tx.contract(CONTRACT),
            tx.run("x"),
            tx.open_run(CONTRACT),
            tx.invitation("x"),
            tx.reservation("x", ASSET),
            tx.entry(0),
            tx.entry(-1),
        ):
            assert found is None
        assert tx.log_size() == 0
        assert tx.entries(0, 10) == []
        with pytest.raises(InputError, match="not registered"):
            tx.ledger(ASSET)


def test_what_is_stored_survives_reopening(store_target: str, furnish: Furnish) -> None:
    with Store.open(store_target) as store:
        furnish(store)
        store.run(lambda tx: tx.append_entry("note", b'{"kind":"note"}'))
        with store.read() as tx:
            before = (tx.party("alice"), tx.run("run-1"), tx.log_root(), tx.entry(0))
    with Store.open(store_target) as store, store.read() as tx:
        assert (tx.party("alice"), tx.run("run-1"), tx.log_root(), tx.entry(0)) == before


# ---------------------------------------------------------------- what it refuses


REFUSED: dict[str, tuple[Callable[[Transaction], Any], type[CenacleError]]] = {
    "a party twice": (
        lambda tx: tx.add_party("alice", "sha256:" + "f" * 64, "{}", TIME),
        ConflictError,
    ),
    "a document under two names": (
        lambda tx: tx.add_party("carol", "sha256:" + "a" * 64, "{}", TIME),
        ConflictError,
    ),
    "an asset twice": (lambda tx: tx.add_asset(ASSET, "x", "alice", "{}", b""), ConflictError),
    "an asset of nobody": (
        lambda tx: tx.add_asset(OTHER, "x", "nobody", "{}", b""),
        ConflictError,
    ),
    "a successor of no asset": (
        lambda tx: tx.add_asset(OTHER, "x", "alice", "{}", b"", replaces=NEXT),
        ConflictError,
    ),
    "a successor of another's asset": (
        lambda tx: tx.add_asset(OTHER, "x", "bob", "{}", b"", replaces=ASSET),
        ConflictError,
    ),
    "an asset that replaces itself": (
        lambda tx: tx.add_asset(OTHER, "x", "alice", "{}", b"", replaces=OTHER),
        ConflictError,
    ),
    "a contract twice": (
        lambda tx: tx.add_contract(CONTRACT, "x", "{}", "bob", TIME),
        ConflictError,
    ),
    "a contract of nobody": (
        lambda tx: tx.add_contract(NEXT, "x", "{}", "nobody", TIME),
        ConflictError,
    ),
    "a successor of no contract": (
        lambda tx: tx.add_contract(NEXT, "x", "{}", "bob", TIME, replaces=OTHER),
        ConflictError,
    ),
    "a signature of nothing": (
        lambda tx: tx.add_signature(OTHER, "bob", "k", b"s", TIME),
        ConflictError,
    ),
    "a signature by nobody": (
        lambda tx: tx.add_signature(CONTRACT, "nobody", "k", b"s", TIME),
        ConflictError,
    ),
    "a veto of nothing": (lambda tx: tx.add_veto(OTHER, "bob", "{}"), ConflictError),
    "a second open run": (lambda tx: tx.create_run("run-2", CONTRACT, TIME), ConflictError),
    "a run twice": (lambda tx: tx.create_run("run-1", CONTRACT, TIME), ConflictError),
    "a run of no contract": (lambda tx: tx.create_run("run-2", OTHER, TIME), ConflictError),
    "a second secret": (lambda tx: tx.set_job_secret("run-1", b"x"), ConflictError),
    "a release to no run": (lambda tx: tx.record_release("run-2", bytes(32)), ConflictError),
    "a checkpoint of no run": (lambda tx: tx.advance_checkpoint("run-2", 1, ASSET), ConflictError),
    "a settlement of no run": (lambda tx: tx.settle_run("run-2", TIME), ConflictError),
    "a reservation by no run": (lambda tx: tx.reserve("run-2", ASSET, Charge(1)), ConflictError),
    "reservations of which one is of no asset": (
        lambda tx: tx.reserve_all("run-1", {ASSET: Charge(1), OTHER: Charge(1)}),
        ConflictError,
    ),
    "a reservation of no asset": (lambda tx: tx.reserve("run-1", OTHER, Charge(1)), ConflictError),
    "a settled nothing": (lambda tx: tx.settle("run-1", ASSET), InputError),
    "a key for no asset": (lambda tx: tx.set_wrapped_key(OTHER, b"x"), InputError),
    "an unknown invitation": (lambda tx: tx.use_invitation("x", "carol", TIME), RefusedError),
    "a text with NUL or a half character": (
        lambda tx: tx.set_meta("\ud800", "x"),
        InputError,
    ),
    "a number beyond 64 bits": (
        lambda tx: tx.advance_checkpoint("run-1", 2**64, ASSET),
        InputError,
    ),
    "an entry without its kind": (lambda tx: tx.append_entry("note", b"{}"), InputError),
    "an entry of another kind": (
        lambda tx: tx.append_entry("note", b'{"kind":"release"}'),
        InputError,
    ),
    "an entry that is no JSON": (lambda tx: tx.append_entry("note", b"\xff"), InputError),
    "an entry that is a list": (lambda tx: tx.append_entry("note", b'["kind"]'), InputError),
    "an entry with an empty kind": (lambda tx: tx.append_entry("", b'{"kind":""}'), InputError),
}


def _contents(store: Store) -> list[Any]:
    with store.read() as tx:
        return [
            tx.parties(),
            tx.assets(),
            tx.contracts(),
            tx.runs(CONTRACT),
            tx.reservations_of_run("run-1"),
            tx.signatures(CONTRACT),
            tx.ledger(ASSET),
            tx.log_size(),
        ]


def test_refusals_change_nothing(store: Store, furnish: Furnish) -> None:
    furnish(store)
    before = _contents(store)
    for name, (change, kind) in REFUSED.items():
        with pytest.raises(kind) as caught:
            store.run(change)
        assert caught.value.diagnostics(), name
        assert _contents(store) == before, name


def test_a_contract_has_one_successor(store: Store, furnish: Furnish) -> None:
    """No lost update: of two replacements, the second is told about the first."""
    furnish(store)
    store.run(lambda tx: tx.add_contract(NEXT, "study", "{}", "alice", TIME, replaces=CONTRACT))
    with pytest.raises(ConflictError, match="replaced already"):
        store.run(lambda tx: tx.add_contract(OTHER, "study", "{}", "bob", TIME, replaces=CONTRACT))
    with store.read() as tx:
        old, new = tx.contract(CONTRACT), tx.contract(NEXT)
        assert old is not None
        assert new is not None
        assert (old.replaced_by, new.replaces) == (NEXT, CONTRACT)
        assert tx.contract(OTHER) is None


def test_an_asset_has_one_successor(store: Store, furnish: Furnish) -> None:
    furnish(store)
    store.run(lambda tx: tx.add_asset(NEXT, "scans", "alice", "{}", b"k", replaces=ASSET))
    with pytest.raises(ConflictError, match="cannot be replaced"):
        store.run(lambda tx: tx.add_asset(OTHER, "scans", "alice", "{}", b"k", replaces=ASSET))
    with store.read() as tx:
        assert tx.asset(OTHER) is None
        old = tx.asset(ASSET)
        assert old is not None
        assert old.replaced_by == NEXT


def test_signatures_and_vetoes_count_once(store: Store, furnish: Furnish) -> None:
    furnish(store)
    store.run(lambda tx: tx.add_signature(CONTRACT, "bob", "k", b"1", TIME))
    store.run(lambda tx: tx.add_veto(CONTRACT, "bob", "{}"))
    with pytest.raises(ConflictError):
        store.run(lambda tx: tx.add_signature(CONTRACT, "bob", "k2", b"2", TIME))
    with pytest.raises(ConflictError):
        store.run(lambda tx: tx.add_veto(CONTRACT, "bob", "[]"))
    with store.read() as tx:
        assert [s.signature for s in tx.signatures(CONTRACT)] == [b"1"]


def test_a_nonce_is_used_once(store: Store) -> None:
    store.run(lambda tx: tx.consume_nonce(b"n" * 32, TIME))
    for _ in range(2):
        with pytest.raises(EvidenceError, match="shown before"):
            store.run(lambda tx: tx.consume_nonce(b"n" * 32, LATER))
    assert store.run(lambda tx: tx.forget_nonces(TIME)) == 0
    assert store.run(lambda tx: tx.forget_nonces(LATER)) == 1


def test_an_invitation_is_used_once_and_in_time(store: Store) -> None:
    store.run(lambda tx: tx.add_invitation("a", TIME, LATER))
    store.run(lambda tx: tx.add_invitation("b", TIME, LATER))
    with pytest.raises(RefusedError, match="expired"):
        store.run(lambda tx: tx.use_invitation("a", "carol", "2027-01-31T13:00:01Z"))
    store.run(lambda tx: tx.use_invitation("a", "carol", LATER))
    with pytest.raises(ConflictError, match="used by carol"):
        store.run(lambda tx: tx.use_invitation("a", "mallory", TIME))
    with pytest.raises(ConflictError):
        store.run(lambda tx: tx.add_invitation("b", TIME, LATER))


def test_checkpoints_only_advance(store: Store, furnish: Furnish) -> None:
    """An old checkpoint never becomes the newest again."""
    furnish(store)
    store.run(lambda tx: tx.advance_checkpoint("run-1", 1, ASSET))
    store.run(lambda tx: tx.advance_checkpoint("run-1", 5, NEXT))
    for version in (-1, 0, 1, 4, 5):
        with pytest.raises(ConflictError, match="not newer"):
            store.run(lambda tx, v=version: tx.advance_checkpoint("run-1", v, OTHER))  # type: ignore[misc]
    with store.read() as tx:
        run = tx.run("run-1")
        assert run is not None
        assert (run.checkpoint_version, run.checkpoint_digest) == (5, NEXT)


@pytest.mark.parametrize("end", ["settled", "abandoned"])
def test_a_closed_run_stays_closed(store: Store, furnish: Furnish, end: str) -> None:
    furnish(store)
    assert store.run(lambda tx: tx.record_release("run-1", b"k" * 32)) == 1
    assert store.run(lambda tx: tx.record_release("run-1", b"l" * 32)) == 2
    if end == "settled":
        store.run(lambda tx: tx.settle_run("run-1", LATER, OTHER))
    else:
        store.run(lambda tx: tx.abandon_run("run-1", LATER))
    changes: list[Callable[[Transaction], Any]] = [
        lambda tx: tx.record_release("run-1", b"m" * 32),
        lambda tx: tx.advance_checkpoint("run-1", 9, ASSET),
        lambda tx: tx.settle_run("run-1", LATER, NEXT),
        lambda tx: tx.abandon_run("run-1", LATER),
        lambda tx: tx.set_job_secret("run-1", b"x"),
        lambda tx: tx.reserve("run-1", ASSET, Charge(1)),
    ]
    for change in changes:
        with pytest.raises(ConflictError):
            store.run(change)
    with store.read() as tx:
        run = tx.run("run-1")
        assert run is not None
        assert (run.state, run.releases, run.enclave_key) == (end, 2, b"l" * 32)
        assert run.receipt_digest == (OTHER if end == "settled" else None)
        assert tx.open_run(CONTRACT) is None
    store.run(lambda tx: tx.create_run("run-2", CONTRACT, LATER))


# ---------------------------------------------------------------- the ledger


def test_reservations_are_charged_settled_and_kept(store: Store, furnish: Furnish) -> None:
    furnish(store)
    store.run(lambda tx: tx.reserve("run-1", ASSET, Charge(1, 1.0, 1e-5), '{"sigma":1}'))
    with pytest.raises(ConflictError, match="reserved this asset already"):
        store.run(lambda tx: tx.reserve("run-1", ASSET, Charge(1)))
    with store.read() as tx:
        assert (tx.ledger(ASSET).uses, tx.ledger(ASSET).epsilon) == (1, 1.0)
    with pytest.raises(RefusedError, match="more privacy loss"):
        store.run(lambda tx: tx.settle("run-1", ASSET, 1.5, 1e-5))
    assert store.run(lambda tx: tx.settle("run-1", ASSET, 0.5, 1e-6)) == Charge(1, 0.5, 1e-6)
    with pytest.raises(ConflictError, match="settled already"):
        store.run(lambda tx: tx.settle("run-1", ASSET, 0.1, 0.0))
    with store.read() as tx:
        view = tx.ledger(ASSET)
        assert (view.uses, view.uses_settled, view.epsilon, view.delta) == (1, 1, 0.5, 1e-6)
        (kept,) = tx.reservations_of_asset(ASSET)
        assert (kept.event, kept.state, kept.epsilon) == ('{"sigma":1}', "settled", 0.5)


def test_several_assets_are_reserved_together(store: Store, furnish: Furnish) -> None:
    furnish(store)
    store.run(lambda tx: tx.add_asset(NEXT, "labels", "bob", "{}", b"k"))
    store.run(lambda tx: tx.reserve_all("run-1", {}))
    store.run(lambda tx: tx.reserve_all("run-1", {ASSET: Charge(1), NEXT: Charge(1, 0.5, 0.0)}))
    with pytest.raises(ConflictError, match="reserved this asset already"):
        store.run(lambda tx: tx.reserve_all("run-1", {NEXT: Charge(1)}))
    with store.read() as tx:
        assert [r.asset for r in tx.reservations_of_run("run-1")] == [ASSET, NEXT]
        assert (tx.ledger(ASSET).uses, tx.ledger(NEXT).epsilon) == (1, 0.5)


def test_more_assets_than_one_statement_takes(store: Store, furnish: Furnish) -> None:
    furnish(store)
    many = {f"sha256:{number:064x}": Charge(1) for number in range(70)}

    def deposit(tx: Transaction) -> None:
        for asset in many:
            tx.add_asset(asset, "x", "bob", "{}", b"k")

    store.run(deposit)
    store.run(lambda tx: tx.reserve_all("run-1", many))
    with store.read() as tx:
        assert {r.asset for r in tx.reservations_of_run("run-1")} == set(many)
        assert all(tx.ledger(asset).uses == 1 for asset in many)
    store.run(lambda tx: tx.settle_run("run-1", LATER))
    with pytest.raises(ConflictError, match="not open"):
        store.run(lambda tx: tx.reserve_all("run-1", {ASSET: Charge(1)}))


def test_a_run_begins_with_its_first_release(store: Store, furnish: Furnish) -> None:
    furnish(store)

    def begin(tx: Transaction) -> None:
        tx.settle_run("run-1", LATER)
        tx.create_run("run-2", CONTRACT, LATER, enclave_key=b"k" * 32)

    store.run(begin)
    with store.read() as tx:
        run = tx.run("run-2")
    assert run is not None
    assert (run.releases, run.enclave_key) == (1, b"k" * 32)
    assert store.run(lambda tx: tx.record_release("run-2", b"l" * 32)) == 2


def test_an_abandoned_run_stays_charged_in_full(store_target: str, furnish: Furnish) -> None:
    with Store.open(store_target) as store:
        furnish(store)
        store.run(lambda tx: tx.reserve("run-1", ASSET, Charge(1, 1.0, 1e-5)))
        store.run(lambda tx: tx.abandon_run("run-1", LATER))
    with Store.open(store_target) as store, store.read() as tx:
        assert (tx.ledger(ASSET).uses, tx.ledger(ASSET).epsilon) == (1, 1.0)


LOSSES = st.one_of(
    st.just((None, None)),
    st.tuples(st.floats(0, 10), st.floats(0, 1e-3)),
)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.tuples(st.integers(0, 3), LOSSES, st.none() | LOSSES), max_size=8))
def test_totals_are_the_sum_of_the_reservations(
    sqlite_store: Store, plan: list[tuple[int, Any, Any]]
) -> None:
    seen = []

    def change(tx: Transaction) -> None:
        first = len(tx.assets())
        name = f"p{first}"
        asset = f"sha256:{first:064x}"
        tx.add_party(name, f"sha256:{first + 2**64:064x}", "{}", TIME)
        tx.add_asset(asset, "x", name, "{}", b"k")
        for number, (uses, loss, spent) in enumerate(plan):
            digest = f"sha256:{first * 100 + number + 2**80:064x}"
            tx.add_contract(digest, "c", "{}", name, TIME)
            tx.create_run(f"{first}/{number}", digest, TIME)
            before = tx.ledger(asset)
            tx.reserve(f"{first}/{number}", asset, Charge(uses, *loss))
            assert tx.ledger(asset).epsilon >= before.epsilon
            if spent is not None:
                try:
                    tx.settle(f"{first}/{number}", asset, *spent)
                except RefusedError:
                    seen.append("refused")
            view = tx.ledger(asset)
            assert view == LedgerView.of(tx.reservations_of_asset(asset))
            assert view.uses == before.uses + uses

    sqlite_store.run(change)


def test_charges_beyond_counting_are_refused(store: Store, furnish: Furnish) -> None:
    furnish(store)
    store.run(lambda tx: tx.reserve("run-1", ASSET, Charge(2**62)))

    def more(tx: Transaction) -> None:
        tx.settle_run("run-1", LATER)
        tx.create_run("run-2", CONTRACT, TIME)
        tx.reserve("run-2", ASSET, Charge(1))

    with pytest.raises(RefusedError, match="beyond counting"):
        store.run(more)
    with store.read() as tx:
        assert tx.ledger(ASSET).uses == 2**62
        run = tx.run("run-1")
        assert run is not None
        assert run.state == "open"


# ---------------------------------------------------------------- reading


def test_a_reader_sees_one_moment(store: Store) -> None:
    store.run(lambda tx: tx.append_entry("note", b'{"kind":"note"}'))
    with store.read() as tx:
        assert tx.log_size() == 1
        store.run(lambda w: w.append_entry("note", b'{"kind":"note"}'))
        assert tx.log_size() == 1
        assert tx.entries(0, 10) == [tx.entry(0)]
    with store.read() as tx:
        assert tx.log_size() == 2


def test_a_transaction_ends(store: Store) -> None:
    kept: list[ReadTransaction] = []

    def change(tx: Transaction) -> None:
        kept.append(tx)
        tx.append_entry("note", b'{"kind":"note"}')

    store.run(change)
    with store.read() as tx:
        kept.append(tx)
    for tx in kept:
        with pytest.raises(RuntimeError, match="ended"):
            tx.party("alice")


def test_a_reader_cannot_write(store: Store) -> None:
    with store.read() as tx, pytest.raises(UnavailableError):
        tx._session.run("INSERT INTO meta (key, value) VALUES ('a', 'b')")
    with store.read() as tx:
        assert tx.meta("a") is None


def test_many_threads_read(store: Store, furnish: Furnish) -> None:
    furnish(store)
    failures: list[BaseException] = []

    def look() -> None:
        try:
            for _ in range(20):
                with store.read() as tx:
                    assert tx.party("alice") is not None
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=look) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


INJECTIONS = ["'; DROP TABLE parties; --", '" OR 1=1', "%s %(name)s %%", ":name", "a\\'b", "\u2019"]


def test_hostile_text_is_only_text(store: Store) -> None:
    for number, text in enumerate(INJECTIONS):
        digest = f"sha256:{number:064x}"
        store.run(lambda tx, t=text, d=digest: tx.add_party(t, d, t, TIME))  # type: ignore[misc]
        with store.read() as tx:
            party = tx.party(text)
            assert party is not None
            assert (party.name, party.envelope) == (text, text)
            assert tx.party(text + "x") is None
            assert len(tx.parties()) == number + 1


def test_the_log_is_read_back_with_proofs(store: Store) -> None:
    bodies = [b'{"kind":"note","n":%d}' % n for n in range(11)]
    for start in (0, 4):
        store.run(
            lambda tx, s=start: [tx.append_entry("note", b) for b in bodies[s : s + 4]]  # type: ignore[misc]
        )

    def change(tx: Transaction) -> None:
        for body in bodies[8:]:
            tx.append_entry("note", body)
        # Stored and waiting entries, in one view.
        assert [e.body for e in tx.entries(0, 100)] == bodies
        assert [e.body for e in tx.entries(7, 9)] == bodies[7:9]
        assert [e.body for e in tx.entries(9, 11)] == bodies[9:]
        assert tx.entries(11, 12) == []
        roots.append(tx.log_root())
        paths.extend(tx.inclusion_path(index) for index in range(11))
        paths.append(tx.consistency_path(5))
        assert tx.log_root(5) == tx.log_root(5)

    roots: list[bytes] = []
    paths: list[tuple[bytes, ...]] = []
    store.run(change)
    with store.read() as tx:
        assert [e.body for e in tx.entries(0, 100)] == bodies
        assert [e.index for e in tx.entries(3, 6)] == [3, 4, 5]
        assert tx.log_root() == roots[0]
        assert [tx.inclusion_path(index) for index in range(11)] == paths[:11]
        assert tx.consistency_path(5) == paths[11]
        for size in (-1, 12):
            with pytest.raises(InputError, match="never had that size"):
                tx.log_root(size)


def test_a_transaction_sees_its_own_changes(store: Store, furnish: Furnish) -> None:
    """Rows that were read before are read again once their table has changed."""
    furnish(store)

    def change(tx: Transaction) -> None:
        assert tx.vetoes(CONTRACT) == []
        assert tx.signatures(CONTRACT) == []
        assert tx.party("carol") is None
        assert tx.meta("a") is None
        asset = tx.asset(ASSET)
        tx.add_veto(CONTRACT, "bob", "{}")
        tx.add_signature(CONTRACT, "bob", "k", b"s", TIME)
        tx.add_party("carol", OTHER, "{}", TIME)
        tx.set_meta("a", "b")
        tx.add_asset(NEXT, "scans", "alice", "{}", b"k", replaces=ASSET)
        tx.add_contract(OTHER, "x", "{}", "bob", TIME, replaces=CONTRACT)
        assert len(tx.vetoes(CONTRACT)) == len(tx.signatures(CONTRACT)) == 1
        assert tx.party("carol") is not None
        assert tx.meta("a") == "b"
        after, contract = tx.asset(ASSET), tx.contract(CONTRACT)
        assert asset is not None
        assert after is not None
        assert contract is not None
        assert (asset.replaced_by, after.replaced_by) == (None, NEXT)
        assert contract.replaced_by == OTHER

    store.run(change)


# ---------------------------------------------------------------- opening


def test_a_file_is_its_owners_alone(sqlite_path: Path) -> None:
    old = os.umask(0)
    try:
        with Store.open(sqlite_path) as store:
            store.run(lambda tx: tx.set_meta("a", "b"))
            for path in sqlite_path.parent.iterdir():
                assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    finally:
        os.umask(old)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
def test_a_file_that_others_can_read_is_refused(sqlite_path: Path, mode: int) -> None:
    Store.open(sqlite_path).close()
    sqlite_path.chmod(mode)
    with pytest.raises(InputError, match="chmod 600"):
        Store.open(sqlite_path)


def test_a_link_is_not_followed(sqlite_path: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").touch(0o600)
    sqlite_path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CenacleError):
        Store.open(sqlite_path)


def test_two_brokers_cannot_share_a_file(sqlite_path: Path) -> None:
    with Store.open(sqlite_path):
        with pytest.raises(ConflictError, match="open already"):
            Store.open(sqlite_path)
        code = f"from cenacle.broker.store import Store; Store.open({str(sqlite_path)!r})"
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert other.returncode != 0
        assert "a broker has this store open already" in other.stderr
    Store.open(sqlite_path).close()


def test_two_brokers_share_postgresql(postgres_url: str) -> None:
    with Store.open(postgres_url) as one, Store.open(postgres_url) as two:
        for n in range(6):
            store = (one, two)[n % 2]
            assert store.run(lambda tx: tx.append_entry("note", b'{"kind":"note"}')) == n
        with one.read() as tx, two.read() as other:
            assert tx.log_root() == other.log_root()


@pytest.mark.parametrize(
    ("target", "word"),
    [
        ("mysql://host/db", "not supported"),
        ("sqlite://", "plain file"),
        ("sqlite:///:memory:", "plain file"),
        ("sqlite:///x.db?mode=ro", "plain file"),
        ("://", "cannot be read"),
        ("postgresql://host:port/db", "cannot be read"),
    ],
)
def test_urls_that_name_no_store(target: str, word: str) -> None:
    with pytest.raises(InputError, match=word):
        Store.open(target)


def test_an_unreachable_server_is_named_without_its_password(tmp_path: Path) -> None:
    pytest.importorskip("psycopg")
    with pytest.raises(UnavailableError) as caught:
        Store.open(f"postgresql://broker:hunter2@/db?host={tmp_path}")
    assert "hunter2" not in caught.value.diagnostics()


@pytest.mark.parametrize(
    "content", [b"x" * 5000, b"SQLite format 3\x00" + b"\xff" * 5000, b"\x00" * 4096]
)
def test_a_file_that_is_no_database_is_refused(sqlite_path: Path, content: bytes) -> None:
    sqlite_path.write_bytes(content)
    sqlite_path.chmod(0o600)
    with pytest.raises((InputError, UnavailableError)):
        Store.open(sqlite_path)
    assert sqlite_path.read_bytes() == content


def test_another_programs_database_is_refused(sqlite_path: Path) -> None:
    with sqlite3.connect(sqlite_path) as connection:
        connection.execute("CREATE TABLE recipes (name TEXT)")
    connection.close()
    sqlite_path.chmod(0o600)
    with pytest.raises(InputError, match="not a broker's store"):
        Store.open(sqlite_path)


class _Server:
    """A cursor on a server with the given settings."""

    def __init__(self, **settings: str) -> None:
        self.settings = settings
        self.executed: list[str] = []

    def execute(self, statement: str) -> _Server:
        self.executed.append(statement)
        return self

    def fetchall(self) -> list[tuple[str, str]]:
        return list(self.settings.items())


SETTINGS = {
    "fsync": "on",
    "synchronous_commit": "on",
    "server_encoding": "UTF8",
    "server_version_num": "150000",
}


@pytest.mark.parametrize(
    ("setting", "word"),
    [
        ({"fsync": "off"}, "fsync off"),
        ({"server_encoding": "SQL_ASCII"}, "SQL_ASCII"),
        ({"server_version_num": "120017"}, "too old"),
    ],
)
def test_a_server_that_keeps_no_promises_is_refused(setting: dict[str, str], word: str) -> None:
    with pytest.raises(InputError, match=word):
        connect._set_up_postgres(_Server(**{**SETTINGS, **setting}), False)


def test_lazy_commits_are_turned_off() -> None:
    server = _Server(**{**SETTINGS, "synchronous_commit": "off"})
    connect._set_up_postgres(server, False)
    assert "SET synchronous_commit = on" in server.executed


# Of seven entries, the peaks cover four, two and one.
DAMAGE = {
    "an entry": "UPDATE log_entries SET body = x'00' WHERE leaf_index = 6",
    "a leaf": "UPDATE log_entries SET leaf_hash = x'00' WHERE leaf_index = 6",
    "a peak": "DELETE FROM log_nodes WHERE level = 2",
}


@pytest.mark.parametrize("change", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_log_is_not_opened(sqlite_path: Path, change: str) -> None:
    with Store.open(sqlite_path) as store:
        store.run(lambda tx: [tx.append_entry("note", b'{"kind":"note"}') for _ in range(7)])
    Store.open(sqlite_path).close()
    with sqlite3.connect(sqlite_path) as connection:
        connection.execute(change)
    connection.close()
    with pytest.raises(ProofError, match="backup"):
        Store.open(sqlite_path)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Check the path"):
        Store.open(tmp_path / "none" / "broker.db")


# ---------------------------------------------------------------- migrations


MIGRATIONS = Path(migrate.__file__).parent / "migrations"
SECOND = """
import sqlalchemy as sa
from alembic import op
revision, down_revision, branch_labels, depends_on = "9999", "{newest}", None, None
def upgrade():
    op.create_table("later", sa.Column("a", sa.Integer, primary_key=True))
    op.add_column("meta", sa.Column("note", sa.Text))
    {after}
"""


def _folder(tmp_path: Path, after: str) -> Path:
    folder = tmp_path / "migrations"
    shutil.copytree(MIGRATIONS, folder)
    newest = max(path.name[1:5] for path in MIGRATIONS.glob("versions/r*.py"))
    later = SECOND.format(after=after, newest=newest)
    (folder / "versions" / "r9999_later.py").write_text(later)
    return folder


def _migrate(target: str, folder: Path) -> None:
    engine = make_engine(parse_url(target), read_only=False)
    try:
        with engine.connect() as connection:
            migrate.migrate(connection, folder)
    finally:
        engine.dispose()


def _tables(target: str) -> set[str]:
    engine = make_engine(parse_url(target), read_only=False)
    try:
        return set(sa.inspect(engine).get_table_names())
    finally:
        engine.dispose()


def test_an_older_store_is_brought_up_to_date(
    store_target: str, tmp_path: Path, furnish: Furnish
) -> None:
    with Store.open(store_target) as store:
        furnish(store)
    _migrate(store_target, _folder(tmp_path, "pass"))
    assert "later" in _tables(store_target)


def test_a_newer_store_is_refused(store_target: str, tmp_path: Path, furnish: Furnish) -> None:
    with Store.open(store_target) as store:
        furnish(store)
    _migrate(store_target, _folder(tmp_path, "pass"))
    with pytest.raises(InputError, match=r"newer version of Cenacle; found store version 9999"):
        Store.open(store_target)
    assert "later" in _tables(store_target)


def test_a_failed_migration_leaves_nothing(
    store_target: str, tmp_path: Path, furnish: Furnish
) -> None:
    with Store.open(store_target) as store:
        furnish(store)
    before = _tables(store_target)
    with pytest.raises(ZeroDivisionError):
        _migrate(store_target, _folder(tmp_path, "1 / 0"))
    assert _tables(store_target) == before
    with Store.open(store_target) as store, store.read() as tx:
        assert tx.party("alice") is not None


def test_a_first_migration_that_fails_leaves_an_empty_store(
    store_target: str, tmp_path: Path
) -> None:
    if store_target.startswith("sqlite"):
        Path(store_target.removeprefix("sqlite:///")).touch(0o600)
    with pytest.raises(ZeroDivisionError):
        _migrate(store_target, _folder(tmp_path, "1 / 0"))
    assert _tables(store_target) == set()
    Store.open(store_target).close()


def test_two_brokers_make_the_tables_once(postgres_url: str) -> None:
    code = "import sys; from cenacle.broker.store import Store; Store.open(sys.argv[1]).close()"
    both = [
        subprocess.Popen([sys.executable, "-c", code, postgres_url], stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    for process in both:
        _, errors = process.communicate()
        assert process.returncode == 0, errors.decode()


def test_a_store_is_durable(store: Store) -> None:
    """The settings on which every promise about crashes rests."""

    def settings_of(tx: Transaction) -> list[Any]:
        if store.url.startswith("sqlite"):
            names = ["journal_mode", "synchronous", "foreign_keys", "query_only"]
            rows = [tx._session.one(f"PRAGMA {name}") for name in names]
        else:
            names = ["fsync", "synchronous_commit", "lock_timeout"]
            rows = [tx._session.one(f"SHOW {name}") for name in names]
        return [row[0] for row in rows if row is not None]

    assert store.run(settings_of) in (["wal", 2, 1, 0], ["on", "on", "30s"])
