"""``cenacle log``: the broker's transparency log, checked against what was seen before."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.table import Table

from cenacle.broker import merkle
from cenacle.cli.home import Home
from cenacle.cli.options import BrokerOption
from cenacle.cli.output import JsonOption, cell, console, errors_in_words, finish, line
from cenacle.documents.base import short
from cenacle.errors import ProofError

__all__ = ["log"]

_KEEP = "keep the last head (in the folder heads of your home) as proof, and ask the broker's owner"


def log(
    limit: Annotated[int, typer.Option(help="How many of the newest entries to show.")] = 30,
    broker: BrokerOption = "default",
    json_: JsonOption = False,
) -> None:
    """Show the log, recompute its root from all entries, and prove that it only grew.

    The signed head is compared with the last one seen by this user; a broker
    that rewrote or shortened its log is found out here.
    """
    with errors_in_words(json_):
        home = Home.default()
        with home.client(broker) as client:
            before = home.last_head(client.identity)
            _, now = client.head()
            if before is not None and now.size < before.size:
                raise ProofError(
                    "the broker's log is shorter than when you last looked",
                    found=f"{now.size} entries",
                    expected=f"{before.size} or more",
                    remedy=_KEEP,
                )
            text, head = client.head(before)
            bodies = client.entries(head.size)
        tree = merkle.Frontier()
        for body in bodies:
            tree, _ = tree.append(merkle.leaf_hash(body))
        if tree.root() != head.root:
            raise ProofError(
                "the log's entries do not give its signed root",
                found=tree.root().hex(),
                expected=head.root.hex(),
                remedy=_KEEP,
            )
        home.remember_head(client.identity, text)
        entries = [json.loads(body) for body in bodies]
        grown = head.size - (before.size if before else 0)

        def show() -> None:
            table = Table("entry", "time", "kind", "about", "digest")
            for index, entry in list(enumerate(entries))[-limit:]:
                about = entry.get("party") or entry.get("owner") or entry.get("proposer") or ""
                if entry["kind"] == "revocation":
                    about = f"{entry.get('reason')}: {entry.get('found')}"
                digest = entry.get("contract") or entry.get("asset") or entry.get("document") or ""
                texts = (entry["time"], entry["kind"], about, short(digest))
                table.add_row(str(index), *map(cell, texts))
            console.print(table)
            seen = "never seen before" if before is None else f"{grown} new since your last look"
            line(
                f"{head.size} entries, {seen}; root and consistency verified "
                f"({head.origin}, {head.timestamp})"
            )

        fields = {
            "size": head.size,
            "root": head.root.hex(),
            "new": grown,
            "entries": entries[-limit:],
        }
        finish(fields, json_, show)
