"""Nothing is answered before it is durable: batches, failures, full disks, kill -9, two at once."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from cenacle.broker import merkle
from cenacle.broker.ledger import Budget, Charge, LedgerView
from cenacle.broker.log import parse_and_verify_head, verify_consistency
from cenacle.broker.store import Outcome, Place, Store, Transaction
from cenacle.broker.store import writer as writer_module
from cenacle.crypto.memory import SecretBytes
from cenacle.crypto.signing import SigningKey
from cenacle.errors import ConflictError, EvidenceError, RefusedError, UnavailableError

TIME = "2027-01-31T12:00:00Z"
NOTE = b'{"kind":"note"}'
ASSET = "sha256:" + "1" * 64
Furnish = Callable[..., None]


def note(tx: Transaction) -> int:
    return tx.append_entry("note", NOTE)


def put(tx: Transaction, key: str, value: str) -> int:
    tx.set_meta(key, value)
    return note(tx)


@contextmanager
def held(store: Store) -> Iterator[threading.Event]:
    """Keep the committer busy, so that what is submitted inside becomes one batch."""
    running, release = threading.Event(), threading.Event()

    def wait(_: Transaction) -> None:
        running.set()
        assert release.wait(30)

    blocker = store.submit(wait)
    assert running.wait(30)
    try:
        yield release
    finally:
        release.set()
        blocker.exception(30)


def batch(store: Store, *closures: Callable[[Transaction], Any]) -> list[Future[Any]]:
    with held(store):
        return [store.submit(closure) for closure in closures]


def together(store: Store, *closures: Callable[[Transaction], Any]) -> list[Outcome]:
    """What a group of closures is answered."""
    answered: Future[list[Outcome]] = Future()
    store.committer.together(closures, answered.set_result)
    return answered.result(30)


def test_a_group_is_answered_together(store: Store) -> None:
    """In the calling thread or in the committer's, each closure succeeds or fails alone."""

    def fail(tx: Transaction) -> None:
        put(tx, "failed", "x")
        raise KeyError("its own")

    for busy in (False, True):
        with held(store) if busy else nullcontext():
            answered: Future[list[Outcome]] = Future()
            store.committer.together(
                [note, fail, lambda tx: put(tx, "kept", "x")], answered.set_result
            )
        first, failed, last = answered.result(30)
        assert isinstance(failed.failure, KeyError)
        assert (first.failure, last.failure) == (None, None)
        assert last.result == first.result + 1
    with store.read() as tx:
        assert (tx.meta("failed"), tx.meta("kept"), tx.log_size()) == (None, "x", 4)
    _check_tree(store)


def test_a_group_is_answered_after_its_commit(store: Store, monkeypatch: Any) -> None:
    """Neither what succeeded nor what failed is told before the disk has it; or the loss is."""
    answered: list[list[Outcome]] = []
    commit, done = store.committer._writer.commit, threading.Event()

    def look_then_commit() -> None:
        assert not answered
        commit()
        done.set()

    monkeypatch.setattr(store.committer._writer, "commit", look_then_commit)
    store.committer.together([note, note], answered.append)
    assert done.wait(30)
    monkeypatch.undo()
    assert store.run(note) == 2
    assert answered == [[Outcome(0, None), Outcome(1, None)]]

    def lose() -> None:
        raise UnavailableError("no disk")

    monkeypatch.setattr(store.committer._writer, "commit", lose)
    assert [type(outcome.failure) for outcome in together(store, note, note)] == [
        UnavailableError,
        UnavailableError,
    ]
    monkeypatch.undo()
    assert store.run(note) == 3


def test_a_closed_committer_takes_no_group(store_target: str) -> None:
    with Store.open(store_target) as store:
        committer = store.committer
    with pytest.raises(UnavailableError, match="shutting down"):
        committer.together([note], lambda _: None)


CONTRACTS = ["sha256:" + digit * 64 for digit in "def"]


def _begin(run: str, contract: str, nonce: bytes) -> Callable[[Transaction], Place]:
    """What a release changes."""

    def change(tx: Transaction) -> Place:
        tx.consume_nonce(nonce, TIME)
        tx.create_run(run, contract, TIME, enclave_key=b"k" * 32)
        tx.reserve_all(run, {ASSET: Charge(1)})
        return tx.place(note(tx))

    return change


def _furnished(store: Store, furnish: Furnish) -> None:
    furnish(store)

    def propose(tx: Transaction) -> None:
        for number, contract in enumerate(CONTRACTS):
            tx.add_contract(contract, f"c{number}", "{}", "bob", TIME)

    store.run(propose)


@pytest.mark.parametrize("taken", ["nonce", "contract", "run"])
@pytest.mark.parametrize("where", ["same batch", "same batch, looked at", "database"])
def test_what_is_inserted_together_is_refused_alone(
    store: Store, furnish: Furnish, taken: str, where: str
) -> None:
    """A second use of a nonce, contract or run takes back the second alone, wherever the first."""
    _furnished(store, furnish)
    first = _begin("a", CONTRACTS[0], b"a")
    second = {
        "nonce": _begin("b", CONTRACTS[1], b"a"),
        "contract": _begin("b", CONTRACTS[0], b"b"),
        "run": _begin("a", CONTRACTS[1], b"b"),
    }[taken]
    other = _begin("c", CONTRACTS[2], b"c")
    if where == "database":
        store.run(first)
        outcomes = [Outcome(None, None), *together(store, second, other)]
    elif where == "same batch":
        outcomes = together(store, first, second, other)
    else:  # a closure between them reads what waits, so that it is written first
        outcomes = together(store, first, lambda tx: tx.run("a"), second, other)
        assert outcomes.pop(1).result.contract == CONTRACTS[0]
    refused = EvidenceError if taken == "nonce" else ConflictError
    assert [type(outcome.failure) for outcome in outcomes] == [type(None), refused, type(None)]
    with store.read() as tx:
        assert [run.id for c in CONTRACTS for run in tx.runs(c)] == ["a", "c"]
        assert tx.ledger(ASSET).uses == 2
        assert tx.ledger(ASSET) == LedgerView.of(tx.reservations_of_asset(ASSET))
        assert tx.log_size() == 2
    _check_tree(store)
    # Nothing of the refused change is left: its own nonce, contract and run are free.
    free = _begin("d", CONTRACTS[1], b"d" if taken == "nonce" else b"b")
    assert together(store, free)[0].failure is None


def test_places_hold_in_the_tree_that_the_batch_leaves(store: Store, furnish: Furnish) -> None:
    _furnished(store, furnish)
    store.run(note)
    closures = [_begin(str(n), c, str(n).encode()) for n, c in enumerate(CONTRACTS)]

    def fail(tx: Transaction) -> None:
        tx.place(note(tx))
        raise KeyError

    outcomes = together(store, closures[0], fail, *closures[1:])
    places = [outcome.result for outcome in outcomes if outcome.failure is None]
    with store.read() as tx:
        for index, place in enumerate(places, 1):
            assert (place.index, place.size, place.root) == (index, 4, tx.log_root())
            merkle.verify_inclusion(merkle.leaf_hash(NOTE), index, 4, place.path, place.root)


def test_dossiers_looked_up_are_forgotten_with_a_change(store: Store, furnish: Furnish) -> None:
    """What was read for a whole batch never hides what a closure of it changed."""
    _furnished(store, furnish)
    digest, unknown = CONTRACTS[0], "sha256:" + "9" * 64

    def signed(tx: Transaction) -> Any:
        found = tx.dossier(digest)
        assert found is not None
        assert found == (tx.contract(digest), tx.signatures(digest), tx.vetoes(digest))
        return [row.party for row in found[1]], [row.party for row in found[2]]

    def sign(tx: Transaction) -> None:
        tx.add_signature(digest, "bob", "k", b"s", TIME)
        assert signed(tx) == (["bob"], [])

    def fail(tx: Transaction) -> None:
        sign(tx)
        raise KeyError

    outcomes = together(
        store,
        lambda tx: tx.look_up([*CONTRACTS, unknown, digest]),
        signed,
        fail,
        signed,
        sign,
        lambda tx: tx.add_veto(digest, "bob", "{}"),
        signed,
        lambda tx: tx.dossier(unknown),
    )
    assert [outcome.result for outcome in outcomes] == [
        None,
        ([], []),
        None,
        ([], []),
        None,
        None,
        (["bob"], ["bob"]),
        None,
    ]
    assert [type(outcome.failure) for outcome in outcomes].count(KeyError) == 1
    assert [outcome.failure for outcome in outcomes].count(None) == 7


def test_a_transaction_that_ended_keeps_nothing_waiting(store: Store) -> None:
    kept: list[Transaction] = []
    together(store, kept.append)
    with pytest.raises(RuntimeError, match="ended"):
        kept[0].consume_nonce(b"late", TIME)
    store.run(lambda tx: tx.consume_nonce(b"late", TIME))


def test_a_batch_runs_in_order_with_one_commit(sqlite_store: Store) -> None:
    statements: list[str] = []

    def watch(tx: Transaction) -> int:
        tx._session._cursor.connection.set_trace_callback(statements.append)
        return note(tx)

    futures = batch(sqlite_store, watch, *[note] * 50)
    assert [future.result(30) for future in futures] == list(range(51))
    assert statements.count("COMMIT") == 1
    assert not any(statement.startswith("BEGIN") for statement in statements)


def test_a_batch_is_one_transaction_of_postgresql(postgres_url: str) -> None:
    def where(tx: Transaction) -> tuple[Any, ...] | None:
        note(tx)
        return tx._session.one("SELECT CAST(pg_current_xact_id() AS text)")

    with Store.open(postgres_url) as store:
        futures = batch(store, *[where] * 50)
        assert len({future.result(30) for future in futures}) == 1


def test_one_failure_takes_back_its_own_changes_alone(store: Store) -> None:
    def fail(tx: Transaction) -> None:
        tx.set_meta("b", "from the failed one")
        assert note(tx) == 1
        assert note(tx) == 2
        assert tx.log_size() == 3
        raise KeyError("of the caller's own")

    def conflict(tx: Transaction) -> None:
        note(tx)
        tx.add_meta("a", "again")

    futures = batch(
        store,
        lambda tx: put(tx, "a", "1"),
        fail,
        conflict,
        lambda tx: put(tx, "c", tx.meta("b") or "none"),
    )
    assert futures[0].result(30) == 0
    assert isinstance(futures[1].exception(30), KeyError)
    assert isinstance(futures[2].exception(30), ConflictError)
    assert futures[3].result(30) == 1
    with store.read() as tx:
        assert (tx.meta("a"), tx.meta("b"), tx.meta("c")) == ("1", None, "none")
        assert tx.log_size() == 2
        assert tx.log_root() == merkle.node_hash(merkle.leaf_hash(NOTE), merkle.leaf_hash(NOTE))


def test_a_failure_that_opens_the_log_leaves_it_usable(store: Store) -> None:
    """The first closure of a batch to touch the log fails; the next still counts from zero."""

    def fail(tx: Transaction) -> None:
        note(tx)
        raise ValueError

    futures = batch(store, fail, note, fail, note)
    assert isinstance(futures[0].exception(30), ValueError)
    assert futures[1].result(30) == 0
    assert futures[3].result(30) == 1
    _check_tree(store)


@pytest.mark.parametrize("error", [SystemExit(1), KeyboardInterrupt(), GeneratorExit()])
def test_no_exception_ends_the_committer(sqlite_store: Store, error: BaseException) -> None:
    def leave(_: Transaction) -> None:
        raise error

    assert sqlite_store.submit(leave).exception(30) is error
    assert sqlite_store.run(note) == 0


def test_a_database_error_inside_a_closure_stays_its_own(store: Store) -> None:
    """A statement that PostgreSQL refuses aborts a transaction unless it is rolled back to."""

    def bad(tx: Transaction) -> None:
        tx.set_meta("bad", "x")
        tx.add_contract("sha256:" + "c" * 64, "x", "{}", "nobody", TIME)

    futures = batch(store, note, bad, note)
    assert isinstance(futures[1].exception(30), ConflictError)
    assert (futures[0].result(30), futures[2].result(30)) == (0, 1)
    with store.read() as tx:
        assert tx.meta("bad") is None


def test_nothing_is_answered_before_it_is_durable(store: Store) -> None:
    """Whoever holds a result can read it back through another connection."""
    failures: list[BaseException] = []

    def work(name: str) -> None:
        try:
            for n in range(25):
                index = store.run(lambda tx, n=n: put(tx, f"{name}/{n}", "x"))  # type: ignore[misc]
                with store.read() as tx:
                    assert tx.meta(f"{name}/{n}") == "x"
                    assert tx.log_size() > index
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(f"t{n}",)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    with store.read() as tx:
        assert tx.log_size() == 200
    _check_tree(store)


def test_a_cancelled_closure_never_runs(sqlite_store: Store) -> None:
    with held(sqlite_store):
        first, second = sqlite_store.submit(note), sqlite_store.submit(note)
        assert first.cancel()
    assert second.result(30) == 0
    with pytest.raises(CancelledError):
        first.result(30)


def test_closing_finishes_what_waits(store_target: str) -> None:
    store = Store.open(store_target)
    with held(store):
        futures = [store.submit(note) for _ in range(600)]  # more than one batch
    store.close()
    assert [future.result(0) for future in futures] == list(range(600))
    with pytest.raises(UnavailableError, match="shutting down"):
        store.submit(note)
    store.close()


def _check_tree(store: Store) -> None:
    """Every stored entry hashes to its place in a tree built anew."""
    with store.read() as tx:
        frontier = merkle.Frontier()
        for entry in tx.entries(0, 2**62):
            assert entry.index == frontier.size
            frontier, created = frontier.append(entry.leaf_hash)
            for node in created:
                assert tx.get(node.level, node.index) == node.hash
        assert (tx.log_size(), tx.log_root()) == (frontier.size, frontier.root())


def test_a_failed_charge_is_taken_back(store: Store, furnish: Furnish) -> None:
    """Totals that wait for the commit, and rows remembered, follow the savepoints."""
    furnish(store)
    other = "sha256:" + "2" * 64

    def charge(tx: Transaction) -> None:
        tx.reserve("run-1", ASSET, Charge(1, 0.5, 0.0))

    def fail(tx: Transaction) -> None:
        tx.add_asset(other, "x", "bob", "{}", b"k", replaces=None)
        tx.reserve("run-1", other, Charge(7))
        tx.settle("run-1", ASSET, 0.25, 0.0)
        assert tx.ledger(ASSET).epsilon == 0.25
        assert tx.asset(other) is not None
        raise KeyError

    def look(tx: Transaction) -> tuple[float, Any]:
        return tx.ledger(ASSET).epsilon, tx.asset(other)

    futures = batch(store, look, charge, fail, look, fail, look)
    assert [futures[n].result(30) for n in (0, 3, 5)] == [(0.0, None), (0.5, None), (0.5, None)]
    with store.read() as tx:
        assert tx.ledger(ASSET).epsilon == 0.5
        assert tx.ledger(ASSET) == LedgerView.of(tx.reservations_of_asset(ASSET))


# ---------------------------------------------------------------- the last of a budget


def _try_to_spend(store: Store, number: int) -> bool:
    contract = f"sha256:{number:064x}"

    def change(tx: Transaction) -> None:
        tx.ledger(ASSET).require(Budget(uses=5, epsilon=0.5, delta=1.0), Charge(1, 0.1, 1e-6))
        tx.add_contract(contract, "study", "{}", "bob", TIME)
        tx.create_run(f"run/{number}", contract, TIME)
        tx.reserve(f"run/{number}", ASSET, Charge(1, 0.1, 1e-6))

    try:
        store.run(change)
    except RefusedError:
        return False
    return True


def test_threads_cannot_share_the_last_of_a_budget(store: Store, furnish: Furnish) -> None:
    furnish(store)
    won: list[bool] = []
    threads = [
        threading.Thread(target=lambda n=n: won.append(_try_to_spend(store, n))) for n in range(24)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won.count(True) == 5
    assert len(won) == 24
    with store.read() as tx:
        assert (tx.ledger(ASSET).uses, tx.ledger(ASSET).epsilon) == (5, 0.5)
        assert tx.ledger(ASSET) == LedgerView.of(tx.reservations_of_asset(ASSET))


SPENDER = """
import sys
from cenacle.broker.ledger import Budget, Charge
from cenacle.broker.store import Store
from cenacle.errors import RefusedError
url, name, asset = sys.argv[1:]
won = 0
with Store.open(url) as store:
    print("ready", flush=True)
    sys.stdin.readline()
    def change(tx, n):
        contract = "sha256:" + (name + format(n, "x")).rjust(64, "0")
        tx.ledger(asset).require(Budget(uses=31), Charge(1))
        tx.add_contract(contract, "study", "{}", "bob", "2027-01-31T12:00:00Z")
        tx.create_run(f"{name}/{n}", contract, "2027-01-31T12:00:00Z")
        tx.reserve(f"{name}/{n}", asset, Charge(1))
        return tx.append_entry("note", b'{"kind":"note"}')
    futures = [store.submit(lambda tx, n=n: change(tx, n)) for n in range(40)]
    indexes = []
    for future in futures:
        try:
            indexes.append(future.result())
        except RefusedError:
            pass
print(*indexes)
"""


@pytest.mark.processes
def test_processes_cannot_share_the_last_of_a_budget(postgres_url: str, furnish: Furnish) -> None:
    with Store.open(postgres_url) as store:
        furnish(store)
        children = [
            subprocess.Popen(
                [sys.executable, "-c", SPENDER, postgres_url, name, ASSET],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for name in ("a", "b")
        ]
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
        indexes: list[int] = []
        for child in children:
            assert child.stdin is not None
            child.stdin.write("go\n")
            child.stdin.flush()
        for child in children:
            out, _ = child.communicate(timeout=60)
            assert child.returncode == 0
            indexes += [int(word) for word in out.split()]
        assert sorted(indexes) == list(range(31))
        with store.read() as tx:
            assert tx.ledger(ASSET).uses == 31
            assert tx.ledger(ASSET) == LedgerView.of(tx.reservations_of_asset(ASSET))
        assert store.run(note) == 31  # this process notices what the others appended
        _check_tree(store)


# ---------------------------------------------------------------- disks and connections


def test_a_full_database_answers_unavailable_and_recovers(sqlite_store: Store) -> None:
    sqlite_store.run(note)

    def limit(tx: Transaction, pages: int) -> int:
        row = tx._session.one(f"PRAGMA max_page_count = {pages}")
        assert row is not None
        return int(row[0])

    used = sqlite_store.run(lambda tx: limit(tx, 1))  # SQLite answers what is in use already
    sqlite_store.run(lambda tx: limit(tx, used + 2))
    futures = batch(
        sqlite_store,
        note,
        lambda tx: tx.set_meta("large", "x" * 100_000),
        note,
    )
    for future in futures:
        error = future.exception(30)
        assert isinstance(error, UnavailableError)
        assert "full" in (error.found or "")
    with sqlite_store.read() as tx:
        assert (tx.log_size(), tx.meta("large")) == (1, None)
    sqlite_store.run(lambda tx: limit(tx, 2**30))
    assert sqlite_store.run(note) == 1
    _check_tree(sqlite_store)


def test_a_log_that_does_not_fit_answers_unavailable(sqlite_store: Store) -> None:
    """The log is written just before the commit: that it fails there too must be seen."""
    sqlite_store.run(note)
    body = b'{"kind":"note","pad":"%s"}' % (b"x" * 200_000)

    def limit(tx: Transaction) -> None:
        row = tx._session.one("PRAGMA max_page_count = 1")
        assert row is not None
        tx._session.one(f"PRAGMA max_page_count = {int(row[0]) + 2}")

    sqlite_store.run(limit)
    futures = batch(sqlite_store, lambda tx: tx.append_entry("note", body), note)
    assert all(isinstance(future.exception(30), UnavailableError) for future in futures)
    sqlite_store.run(lambda tx: tx._session.one("PRAGMA max_page_count = 1073741823"))
    assert sqlite_store.run(note) == 1
    _check_tree(sqlite_store)


def test_a_disk_that_refuses_writes_answers_unavailable(
    sqlite_store: Store, sqlite_path: Path
) -> None:
    """A real write error of the operating system, under the write-ahead log."""
    sqlite_store.run(note)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    wal = sqlite_path.with_name(sqlite_path.name + "-wal")
    resource.setrlimit(resource.RLIMIT_FSIZE, (wal.stat().st_size + 100, hard))
    try:
        futures = batch(sqlite_store, note, lambda tx: tx.set_meta("a", "b" * 50_000))
        assert all(isinstance(future.exception(30), UnavailableError) for future in futures)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with sqlite_store.read() as tx:
        assert (tx.log_size(), tx.meta("a")) == (1, None)
    assert sqlite_store.run(note) == 1
    _check_tree(sqlite_store)


def test_a_closure_cannot_hide_that_the_disk_is_full(sqlite_store: Store) -> None:
    def swallow(tx: Transaction) -> str:
        try:
            tx._session.run("INSERT INTO meta (key, value) VALUES ('a', zeroblob(200000))")
        except UnavailableError:
            return "all is well"
        return "not full"

    def fill(tx: Transaction) -> None:
        tx._session.one("PRAGMA max_page_count = 1")

    sqlite_store.run(fill)
    with pytest.raises(UnavailableError):
        sqlite_store.run(swallow)


def _terminate(url: str) -> None:
    """End every other connection to the database, as a restart of the server does."""
    with Store.open(url) as other, other.read() as tx:
        tx._session.all(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )


def test_a_lost_connection_answers_unavailable_and_reconnects(postgres_url: str) -> None:
    with Store.open(postgres_url) as store:
        store.run(note)

        def cut(tx: Transaction) -> None:
            row = tx._session.one("SELECT pg_backend_pid()")
            assert row is not None
            with store.read() as other:
                other._session.one("SELECT pg_terminate_backend(:pid)", pid=row[0])
            note(tx)

        futures = batch(store, note, cut, note)
        assert all(isinstance(future.exception(30), UnavailableError) for future in futures)
        assert store.run(note) == 1
        _check_tree(store)


def test_idle_connections_may_die(postgres_url: str) -> None:
    with Store.open(postgres_url) as store:
        store.run(note)
        with store.read() as tx:
            assert tx.log_size() == 1
        _terminate(postgres_url)
        assert store.run(note) == 1
        with store.read() as tx:
            assert tx.log_size() == 2


class _CutAt:
    """A cursor whose connection is lost before or after the server commits."""

    def __init__(self, cursor: Any, connection: Any, *, after: bool) -> None:
        self._cursor = cursor
        self._connection = connection
        self._after = after

    def execute(self, statement: str, *arguments: Any, **options: Any) -> Any:
        if statement != "COMMIT":
            return self._cursor.execute(statement, *arguments, **options)
        if self._after:
            self._cursor.execute(statement)
        self._connection.driver_connection.close()
        return self._cursor.execute("SELECT 1")  # fails as the lost connection does

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cursor, name)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_commit_cut_off_is_answered_as_it_ended(postgres_url: str, after: bool) -> None:
    """The answer to COMMIT is lost: PostgreSQL is asked what became of the transaction."""
    with Store.open(postgres_url) as store:
        store.run(note)
        writer = store.committer._writer
        writer._cursor = _CutAt(writer._cursor, writer._connection, after=after)
        future = store.submit(note)
        if after:
            assert future.result(30) == 1
        else:
            assert isinstance(future.exception(30), UnavailableError)
        with store.read() as tx:
            assert tx.log_size() == (2 if after else 1)
        assert store.run(note) == (2 if after else 1)
        _check_tree(store)


def test_a_commit_whose_end_is_unknown_is_answered_so(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server stays away: neither success nor failure may be claimed."""
    monkeypatch.setattr(writer_module, "_OUTCOME_SECONDS", 0.3)
    with Store.open(postgres_url) as store:
        store.run(note)
        writer = store.committer._writer
        writer._cursor = _CutAt(writer._cursor, writer._connection, after=True)

        def gone() -> None:
            raise writer._dialect.dbapi.OperationalError("connection refused")

        with monkeypatch.context() as patch:
            patch.setattr(writer._engine, "raw_connection", gone)
            error = store.submit(note).exception(30)
            assert isinstance(error, UnavailableError)
            assert "not known whether the change happened" in (error.remedy or "")
            assert isinstance(store.submit(note).exception(30), UnavailableError)
        assert store.run(note) == 2
        _check_tree(store)


# ---------------------------------------------------------------- kill -9


SEED = bytes(range(32))
CHILD = """
import os, sys, threading
from cenacle.broker.log import TransparencyLog
from cenacle.broker.store import Store
from cenacle.crypto.memory import SecretBytes
from cenacle.crypto.signing import SigningKey
target, name = sys.argv[1:]
store = Store.open(target)
log = TransparencyLog("log.example", SigningKey.from_seed(SecretBytes(bytes(range(32)))))
def say(line):
    os.write(1, (line + "\\n").encode())  # one write: whole lines, whenever the kill comes
def work(thread):
    n = 0
    while True:
        key = f"{name}/{thread}/{n}"
        def change(tx):
            tx.set_meta(key, "x")
            tx.consume_nonce(key.encode(), "2027-01-31T12:00:00Z")
            index = tx.append_entry("note", b'{"kind":"note","key":"%s"}' % key.encode())
            return index, log.signed_head(tx)
        index, head = store.run(change)
        say(f"{key} {index} " + head.encode().hex())
        n += 1
for thread in range(6):
    threading.Thread(target=work, args=(thread,), daemon=True).start()
threading.Event().wait()
"""


@pytest.mark.processes
def test_kill_9_loses_nothing_that_was_answered(store_target: str) -> None:
    """The promise of the whole package, on a process killed at random moments."""
    key = SigningKey.from_seed(SecretBytes(SEED)).verify_key
    chance = random.Random(9162)
    answered: list[tuple[str, int, str]] = []
    for round_ in range(4):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, store_target, str(round_)], stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        wanted = chance.randint(1, 400)
        lines = [child.stdout.readline() for _ in range(wanted)]
        os.kill(child.pid, signal.SIGKILL)
        lines += child.stdout.readlines()
        child.stdout.close()
        assert child.wait() == -signal.SIGKILL
        for line in lines:
            name, place, text = line.decode().split()
            answered.append((name, int(place), bytes.fromhex(text).decode()))
    with Store.open(store_target) as store:
        _check_tree(store)
        with store.read() as tx:
            final = tx.log_size(), tx.log_root()
            assert len({index for _, index, _ in answered}) == len(answered)
            for name, index, _ in answered:
                entry = tx.entry(index)
                assert entry is not None
                assert entry.body == b'{"kind":"note","key":"%s"}' % name.encode()
                assert tx.meta(name) == "x"
            newest = None
            for _, _, text in answered[:: max(1, len(answered) // 200)]:
                head = parse_and_verify_head(text, "log.example", key)
                merkle.verify_consistency(
                    head.size, final[0], head.root, final[1], tx.consistency_path(head.size)
                )
                if newest is None or head.size > newest.size:
                    newest = head
            assert newest is not None
            oldest = parse_and_verify_head(answered[0][2], "log.example", key)
            if oldest.size <= newest.size:
                verify_consistency(oldest, newest, tx.consistency_path(oldest.size, newest.size))
            # What was not answered is there whole or not at all.
            for entry in tx.entries(0, 2**62):
                name = entry.body.split(b'"')[7].decode()
                assert tx.meta(name) == "x"
        assert store.run(note) == final[0]


def test_an_old_copy_put_back_is_seen(sqlite_path: Path) -> None:
    """A rolled-back store works, but cannot extend a head that somebody kept."""
    with Store.open(sqlite_path) as store:
        store.run(lambda tx: [note(tx) for _ in range(5)])
    old = sqlite_path.read_bytes()
    with Store.open(sqlite_path) as store:
        store.run(lambda tx: [note(tx) for _ in range(3)])
        with store.read() as tx:
            kept = tx.log_size(), tx.log_root()
    sqlite_path.write_bytes(old)
    with Store.open(sqlite_path) as store:
        with store.read() as tx:
            assert tx.log_size() == 5
            with pytest.raises(Exception, match="larger, later self"):
                tx.consistency_path(kept[0])
        other = b'{"kind":"note","n":1}'
        store.run(lambda tx: [tx.append_entry("note", other) for _ in range(4)])
        with store.read() as tx, pytest.raises(Exception, match="not an extension"):
            merkle.verify_consistency(
                kept[0], tx.log_size(), kept[1], tx.log_root(), tx.consistency_path(kept[0])
            )
