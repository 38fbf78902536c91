"""Burning tickets: signatures, journal, disk, and the broker's word, before an answer leaves.

``python -m benchmarks.tickets [--json] [--quick] [--burns N]``

A real broker process serves over HTTPS on SQLite; this process is the enclave: it takes a
contract's keys, opens the desk and admits uses of one ticket, of one row each, batch by batch.

``burns_per_second``: by rows admitted together. ``batch_ms``: the median batch, which is what a
query waits for its ticket. ``alone_*``: every part of it by itself: ``check_us`` a use's signature
and the rest that is known without the journal, on one core; ``journal_ms`` one batch of 32
appended and on the disk; ``advance_ms`` one state recorded by the broker, over one connection.
``threads_*``: 16 threads that present one use at a time, and share batches as they come.
``states_per_second``: enclaves of 16 contracts that advance their states at once, from one process;
``state_cpu_ms``: the broker's processor time for each.
``open_*``: opening a journal of so many burns in batches of 1 and of 32, without the broker, and
once more after the snapshot; ``index_mb``: memory of what must be remembered of them.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import secrets
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from benchmarks._release_world import LAYERS, prepare
from benchmarks._report import report
from benchmarks.release import _broker, _cpu_seconds
from cenacle.attestation.simulated import InstallationKey, SimulatedAttester
from cenacle.broker.client import BrokerClient
from cenacle.broker.identity import BrokerIdentity
from cenacle.crypto import HpkePrivateKey, SecretBytes, SigningKey
from cenacle.documents.base import b64, sha256_digest
from cenacle.documents.dsse import Envelope
from cenacle.documents.party import Party
from cenacle.documents.ticket import Ticket, new_request, new_serial, sign_use
from cenacle.enclave.session import Session
from cenacle.enclave.ticket_counter import BrokerStateCounter
from cenacle.enclave.ticket_index import Burn, pack_burns
from cenacle.enclave.ticket_journal import NOTHING, Journal, State
from cenacle.enclave.tickets import Presented, TicketDesk

BATCHES: Final = (1, 8, 32, 128, 512)
THREADS: Final = 16
INPUT: Final = sha256_digest(b"input")
VENDOR: Final = SigningKey.generate()
CLIENT: Final = SigningKey.generate()


def _issuer() -> Party:
    return Party(
        name="vendor",
        signing_key=b64(VENDOR.verify_key.raw),
        hpke_key=b64(HpkePrivateKey.generate().public_key.raw),
        created="2027-01-01T00:00:00Z",
    )


def _ticket(contract: str) -> Envelope:
    ticket = Ticket(
        issuer="vendor",
        contract=contract,
        serial=new_serial(),
        client=b64(CLIENT.verify_key.raw),
        queries=1 << 40,
        not_before="2020-01-01T00:00:00Z",
        expires="2099-01-01T00:00:00Z",
    )
    return Envelope.sign(ticket, VENDOR)


def _uses(ticket: Envelope, count: int) -> list[Presented]:
    return [
        Presented(
            sign_use(ticket, CLIENT, request=new_request(), rows=1, input_digest=INPUT), 1, INPUT
        )
        for _ in range(count)
    ]


def _key() -> SecretBytes:
    return SecretBytes(bytearray(32))


def _times(work: Callable[[Any], object], inputs: list[Any]) -> list[float]:
    found = []
    for one in inputs:
        start = time.perf_counter()
        work(one)
        found.append(time.perf_counter() - start)
    return found


def _admit(desk: TicketDesk, batch: list[Presented]) -> None:
    if any(desk.admit(batch)):
        raise RuntimeError("a use was refused")


def _burning(desk: TicketDesk, ticket: Envelope, seconds: float) -> dict[str, Any]:
    """Batches of each size, interleaved."""
    spent: dict[int, list[float]] = {size: [] for size in BATCHES}
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for size in BATCHES:
            batch = _uses(ticket, size)
            spent[size] += _times(lambda batch: _admit(desk, batch), [batch])
    return {
        "burns_per_second": {str(n): round(n * len(t) / sum(t)) for n, t in spent.items()},
        "batch_ms": {str(n): round(statistics.median(t) * 1e3, 2) for n, t in spent.items()},
    }


def _apart(desk: TicketDesk, ticket: Envelope, folder: Path, contract: str) -> dict[str, float]:
    uses = _uses(ticket, 300)
    start = time.thread_time()
    for one in uses:
        desk._check(one)
    check = (time.thread_time() - start) / len(uses)
    with Journal(folder, contract, _key()) as journal:
        list(journal.replay(NOTHING))
        plain = pack_burns(_burns(32))
        appended = _times(lambda _: journal.append(32, plain), list(range(50)))
    state, previous = desk._journal.state, desk._journal.previous
    advanced = _times(lambda _: desk._counter.advance(state, previous), list(range(50)))
    return {
        "alone_check_us": check * 1e6,
        "alone_journal_ms": statistics.median(appended) * 1e3,
        "alone_advance_ms": statistics.median(advanced) * 1e3,
    }


def _together(desk: TicketDesk, ticket: Envelope, each: int) -> dict[str, float]:
    waiting = [_uses(ticket, each) for _ in range(THREADS)]
    before = desk._journal.state.number

    def ask(uses: list[Presented]) -> list[float]:
        return _times(lambda one: _admit(desk, [one]), uses)

    start = time.perf_counter()
    with ThreadPoolExecutor(THREADS) as pool:
        taken = sorted(t for times in pool.map(ask, waiting) for t in times)
    wall = time.perf_counter() - start
    return {
        "threads_per_second": len(taken) / wall,
        "threads_p50_ms": taken[len(taken) // 2] * 1e3,
        "threads_p99_ms": taken[int(len(taken) * 0.99)] * 1e3,
        "threads_a_batch": len(taken) / (desk._journal.state.number - before),
    }


def _states(sessions: list[Session], pid: int, each: int) -> dict[str, float]:
    def advance(session: Session) -> None:
        counter, state = BrokerStateCounter(session), NOTHING
        for number in range(1, each + 1):
            newer = State(number, sha256_digest(str(number).encode()))
            counter.advance(newer, state)
            state = newer

    cpu, start = _cpu_seconds(pid), time.perf_counter()
    with ThreadPoolExecutor(len(sessions)) as pool:
        list(pool.map(advance, sessions))
    count = each * len(sessions)
    return {
        "states_per_second": count / (time.perf_counter() - start),
        "state_cpu_ms": (_cpu_seconds(pid) - cpu) * 1e3 / count,
    }


@contextlib.contextmanager
def _sessions(
    identity: BrokerIdentity, contracts: tuple[str, ...], installation: SigningKey, shown: Any
) -> Iterator[list[Session]]:
    attester = SimulatedAttester(InstallationKey(installation))
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(BrokerClient(identity)) for _ in contracts]
        yield [
            Session.open(client, contract, attester, shown, LAYERS, None)
            for client, contract in zip(clients, contracts, strict=True)
        ]


def _served(*, quick: bool) -> dict[str, Any]:
    installation = SigningKey.generate()
    with tempfile.TemporaryDirectory(prefix="cenacle-tickets-") as name:
        folder, target = Path(name), f"sqlite:///{name}/broker.db"
        prepared = prepare(folder / "broker", target, THREADS + 1, installation)
        with _broker(folder / "broker", target) as (pid, fields):
            identity = BrokerIdentity.from_fields(fields)
            with _sessions(
                identity, prepared.contracts, installation, prepared.measurements
            ) as sessions:
                first, *others = sessions
                ticket = _ticket(first.contract)
                counter = BrokerStateCounter(first)
                with TicketDesk(
                    folder / "tickets", counter, _issuer(), first.contract, _key()
                ) as desk:
                    _admit(desk, _uses(ticket, 8))
                    found = _burning(desk, ticket, 4 if quick else 15)
                    found |= _apart(desk, ticket, folder / "apart", first.contract)
                    found |= _together(desk, ticket, 20 if quick else 100)
                found |= _states(others, pid, 20 if quick else 100)
    return found


# ------------------------------------------------------------------ opening


class _Here:
    """A counter that costs nothing."""

    def __init__(self, state: State) -> None:
        self.state = state

    def newest(self) -> State:
        return self.state

    def advance(self, state: State, previous: State) -> datetime:
        del previous
        self.state = state
        return datetime.now(UTC)


def _burns(count: int) -> Iterator[Burn]:
    names = itertools.cycle([secrets.token_bytes(16) for _ in range(100)])
    for serial in itertools.islice(names, count):
        yield Burn(serial, os.urandom(16), 1, 4_000_000_000, os.urandom(32))


def _opening(burns: int) -> dict[str, float]:
    contract, found = sha256_digest(b"contract"), {}
    for size in (1, 32):
        with tempfile.TemporaryDirectory(prefix="cenacle-tickets-") as name:
            folder, sync = Path(name), os.fdatasync
            os.fdatasync = lambda _: None  # type: ignore[assignment]
            try:
                with Journal(folder, contract, _key()) as journal:
                    list(journal.replay(NOTHING))
                    for _ in range(burns // size):
                        journal.append(size, pack_burns(_burns(size)))
                    counter = _Here(journal.state)
            finally:
                os.fdatasync = sync
            for kind in (f"open_{size}", f"open_{size}_again"):
                start = time.process_time()
                with TicketDesk(folder, counter, _issuer(), contract, _key()) as desk:
                    found[f"{kind}_s"] = time.process_time() - start
                    index = desk._index
                    found["index_mb"] = (index._keys.nbytes + index._values.nbytes) / 1e6
                found[f"{kind}_mb"] = (folder / "journal").stat().st_size / 1e6
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="a JSON object on the last line")
    parser.add_argument("--quick", action="store_true", help="less of everything")
    parser.add_argument("--burns", type=int, help="of the journal that is opened")
    arguments = parser.parse_args()
    burns = arguments.burns or (50_000 if arguments.quick else 1_000_000)
    results: dict[str, Any] = {"load": round(os.getloadavg()[0], 2)}
    results |= _served(quick=arguments.quick)
    results |= {"journal_burns": burns, **_opening(burns)}
    report("tickets", results, as_json=arguments.json)


if __name__ == "__main__":
    main()
