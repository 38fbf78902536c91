"""Starts processes that burn tickets, to be killed: each is a fork of this one.

Reads one JSON order a line and answers with the process id. A process takes the desk of a
contract over, then asks again what it is told to, then burns until the ticket is used up. What it
asks and what is admitted go to the order's log, line by line. A ``fault`` such as
``["append", 3]`` makes it kill itself, as ``kill -9`` would, at that step of the third burn.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cenacle.broker.client import BrokerClient
from cenacle.broker.identity import BrokerIdentity
from cenacle.broker.messages import ReleaseResponse
from cenacle.crypto import SecretBytes, SigningKey
from cenacle.documents.base import b64, sha256_digest, unb64
from cenacle.documents.dsse import Envelope
from cenacle.documents.party import Party
from cenacle.documents.ticket import new_request, sign_use
from cenacle.enclave.session import Session
from cenacle.enclave.ticket_counter import BrokerStateCounter
from cenacle.enclave.tickets import Presented, TicketDesk
from cenacle.errors import CenacleError, RefusedError, UnavailableError

INPUT = sha256_digest(b"input")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(desk: TicketDesk, step: str, number: int) -> None:
    """Kill this process at a step of the given burn, counted from here on."""
    write, sync, advance = os.pwrite, os.fdatasync, desk._counter.advance
    seen = 0

    def begun() -> bool:
        nonlocal seen
        seen += 1
        return seen == number

    def pwrite(fd: int, data: Any, offset: int) -> int:
        now = begun()
        if now and step == "before":
            die()
        if now and step == "half":
            write(fd, bytes(data)[: len(data) // 2], offset)
            die()
        return write(fd, data, offset)

    def fdatasync(fd: int) -> None:
        if seen == number and step == "written":
            die()
        sync(fd)
        if seen == number and step == "synced":
            die()

    def advanced(*states: Any) -> Any:
        told = advance(*states)
        if seen == number and step == "advanced":
            die()
        return told

    os.pwrite, os.fdatasync = pwrite, fdatasync  # type: ignore[assignment]
    desk._counter.advance = advanced  # type: ignore[method-assign,assignment]


def session(order: dict[str, Any], client: BrokerClient) -> Session:
    """Of a release that the test has asked for."""
    nothing: Any = SimpleNamespace()
    return Session(
        contract=order["contract"],
        client=client,
        signing_key=SigningKey.from_seed(SecretBytes(bytearray(unb64(order["signing"])))),
        binding=nothing,
        evidence=nothing,
        measurements={},
        release=ReleaseResponse.from_fields(order["release"]),
        asset_keys={},
        job_secret=SecretBytes(bytearray(32)),
    )


def run(order: dict[str, Any]) -> None:
    """One process, until it is killed or the ticket is used up."""
    log = os.open(order["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def say(*words: str) -> None:
        os.write(log, (" ".join(words) + "\n").encode())

    ticket = Envelope.from_json(order["ticket"])
    key = SigningKey.from_seed(SecretBytes(bytearray(unb64(order["client"]))))
    issuer = Party.from_fields(order["issuer"])
    client = BrokerClient(BrokerIdentity.from_fields(order["identity"]), timeout=30)
    counter = BrokerStateCounter(session(order, client), patience=order["patience"])
    try:
        secret = SecretBytes(bytearray(32))
        desk = TicketDesk(Path(order["folder"]), counter, issuer, order["contract"], secret)
    except CenacleError as error:
        say("refused", type(error).__name__, error.what.replace(" ", "-"))
        return
    say("opened")
    if order["fault"] is not None:
        arm(desk, *order["fault"])

    def ask(requests: list[str], rows: int) -> list[CenacleError | None]:
        uses = [
            sign_use(ticket, key, request=unb64(r), rows=rows, input_digest=INPUT) for r in requests
        ]
        answers = desk.admit([Presented(use, rows, INPUT) for use in uses])
        for request, problem in zip(requests, answers, strict=True):
            say("answered" if problem is None else type(problem).__name__, request)
        return answers

    for request in order["again"]:
        while isinstance(ask([request], order["rows"])[0], UnavailableError):
            pass
    while True:
        requests = [b64(new_request()) for _ in range(order["batch"])]
        for request in requests:
            say("asked", request)
        while True:
            answers = ask(requests, order["rows"])
            if not any(isinstance(problem, UnavailableError) for problem in answers):
                break
        if any(isinstance(problem, RefusedError) for problem in answers):
            break
        if any(answers):
            return  # another enclave took over
    burned = desk.report()["burned"]
    say("done", str(sum(burned.values())))


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the dead are not waited for
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.close(0)
            run(order)
            os._exit(0)
        os.write(1, f"{pid}\n".encode())


if __name__ == "__main__":
    main()
