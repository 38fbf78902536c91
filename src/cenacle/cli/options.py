"""Options that many commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["AsOption", "BrokerOption", "ContractArgument", "OutOption"]

AsOption = Annotated[
    str, typer.Option("--as", metavar="PARTY", help="Your party, as named by `cenacle party new`.")
]
BrokerOption = Annotated[
    str,
    typer.Option(
        "--broker",
        metavar="ALIAS",
        envvar="CENACLE_BROKER",
        help="A pinned broker's alias, or the path of its identity file.",
    ),
]
ContractArgument = Annotated[
    str, typer.Argument(metavar="CONTRACT", help="The contract's digest (sha256:...).")
]
OutOption = Annotated[
    Path | None, typer.Option("--out", "-o", metavar="PATH", help="Where to write the result.")
]
