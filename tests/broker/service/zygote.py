"""Starts real broker processes quickly, to be killed: each is a fork of this one.

Reads one JSON order a line: ``{"folder", "target", "fault"}``; answers with the process id and
the broker's identity. A ``fault`` such as ``["before", 1]`` makes the process kill itself, as
``kill -9`` would, right before (or after) the given commit of its store, counted from the first
request on.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from cenacle.broker.identity import BrokerKeys
from cenacle.broker.server import bind, serve
from cenacle.broker.service import Broker
from cenacle.broker.store import Store
from cenacle.broker.tls import ensure_certificate

# Every process that composes losses would import it for seconds; here it is optional as there.
with contextlib.suppress(ImportError):
    import dp_accounting  # noqa: F401


def arm(store: Store, when: str, number: int) -> None:
    """Wrap the commit of the store's only writer."""
    writer = store.committer._writer
    commit, seen = writer.commit, 0

    def commit_or_die() -> None:
        nonlocal seen
        seen += 1
        if (when, number) == ("before", seen):
            os.kill(os.getpid(), signal.SIGKILL)
        commit()
        if (when, number) == ("after", seen):
            os.kill(os.getpid(), signal.SIGKILL)

    writer.commit = commit_or_die  # type: ignore[method-assign]


def run(order: dict[str, Any], answer: int) -> None:
    """One broker, until it is killed."""
    folder = Path(order["folder"])
    keys = BrokerKeys.open(folder, "test/broker")
    files = ensure_certificate(folder)
    listener = bind("127.0.0.1", order.get("port", 0))
    url = f"https://127.0.0.1:{listener.getsockname()[1]}"
    with Store.open(order["target"]) as store:
        broker = Broker.development(store, keys)
        identity = keys.published_at(url, files.certificate_pem)
        token = broker.owner_token()
        if order["fault"] is not None:
            arm(store, *order["fault"])
        started = {"pid": os.getpid(), "identity": identity.to_fields(), "token": token}
        os.write(answer, json.dumps(started).encode() + b"\n")
        serve(broker, listener, files)


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the dead are not waited for
    for line in sys.stdin:
        order = json.loads(line)
        if os.fork() == 0:
            os.close(0)
            run(order, 1)
            os._exit(0)


if __name__ == "__main__":
    main()
