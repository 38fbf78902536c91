"""What the broker remembers: SQLite in one file, or PostgreSQL by URL.

::

    with Store.open("broker.db") as store:
        index = store.run(lambda tx: tx.append_entry("note", b'{"kind":"note"}'))  # durable
        with store.read() as tx:
            path = tx.inclusion_path(index)
"""

from cenacle.broker.store.committer import Committer, Outcome
from cenacle.broker.store.logbook import Place
from cenacle.broker.store.reads import ReadTransaction
from cenacle.broker.store.rows import (
    AssetRow,
    ContractRow,
    InvitationRow,
    LogEntry,
    PartyRow,
    Reservation,
    RunRow,
    RunState,
    SignatureRow,
    StateRow,
    VetoRow,
    WatchRow,
)
from cenacle.broker.store.store import Store
from cenacle.broker.store.writes import Transaction

__all__ = [
    "AssetRow",
    "Committer",
    "ContractRow",
    "InvitationRow",
    "LogEntry",
    "Outcome",
    "PartyRow",
    "Place",
    "ReadTransaction",
    "Reservation",
    "RunRow",
    "RunState",
    "SignatureRow",
    "StateRow",
    "Store",
    "Transaction",
    "VetoRow",
    "WatchRow",
]
