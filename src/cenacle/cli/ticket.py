"""``cenacle ticket``: sell queries of a served model, and the keys that use them."""

from __future__ import annotations

import re
import stat
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cenacle.cli.home import Home, write_file
from cenacle.cli.options import AsOption, BrokerOption, ContractArgument, OutOption
from cenacle.cli.output import JsonOption, errors_in_words, finish, line
from cenacle.crypto import SecretBytes, SigningKey, VerifyKey
from cenacle.documents.base import b64, format_time, minutes, parse_time, unb64
from cenacle.documents.dsse import Envelope
from cenacle.documents.ticket import Ticket, new_serial, open_ticket
from cenacle.errors import CenacleError, ConflictError, InputError, RefusedError
from cenacle.sealing.disk import disk_errors

if TYPE_CHECKING:
    from cenacle.broker.receipts import OpenedContract
    from cenacle.documents.party import Party

__all__ = ["app", "read_client_key", "read_public_key"]

app = typer.Typer(
    no_args_is_help=True,
    help="Sell queries of a served model, and make the keys that use them.",
    epilog="Example: cenacle ticket new sha256:4be1... --client client.key.pub --queries 1000 "
    "--expires 2027-12-31 --as vendor --out ticket.json",
)
keys = typer.Typer(
    no_args_is_help=True,
    help="Make a client's key.",
    epilog="Example: cenacle ticket key new client.key",
)
app.add_typer(keys, name="key")

_DAY = re.compile(r"\d{4}-\d{2}-\d{2}", re.ASCII)
_SEED = 32
_MAX_BYTES = 1 << 16

FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="A signed ticket.")]


def _read(path: Path) -> bytes:
    """A small file."""
    with disk_errors(f"read {path}"), path.open("rb") as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise InputError("a file is too large for a ticket or a key", found=str(path))
    return data


def read_client_key(path: Path) -> SigningKey:
    """A client's private key, as ``cenacle ticket key new`` wrote it.

    Raises:
        InputError: it is no such file, or others can read it.
    """
    with disk_errors(f"read {path}"):
        mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise InputError(
            "a client's key can be read by others",
            found=f"{path} with mode {mode:04o}",
            expected="mode 0600",
            remedy=f"run: chmod 600 {path}",
        )
    data = bytearray(_read(path))
    if len(data) != _SEED:
        raise InputError(
            "a file is not a client's key",
            found=f"{len(data)} bytes in {path}",
            expected=f"{_SEED} bytes",
            remedy="make one with `cenacle ticket key new`",
        )
    return SigningKey.from_seed(SecretBytes(data))


def read_public_key(path: Path) -> VerifyKey:
    """A client's public key, as ``cenacle ticket key new`` wrote it beside the private one.

    Raises:
        InputError: it is no such file.
    """
    data = _read(path)
    if len(data) == _SEED:
        raise InputError(
            "a client's private key was given",
            found=str(path),
            expected=f"its public key, {path}.pub",
            remedy="the private key stays with the client; ask for the .pub file alone",
        )
    try:
        return VerifyKey(unb64(data.decode("ascii").strip()))
    except (CenacleError, UnicodeDecodeError):
        raise InputError(
            "a file is not a client's public key",
            found=str(path),
            expected="the .pub file that `cenacle ticket key new` wrote",
        ) from None


@keys.command("new", epilog="Example: cenacle ticket key new client.key")
def key_new(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write the key.")],
    json_: JsonOption = False,
) -> None:
    """Make a client's key: FILE stays with the client, FILE.pub goes to who sells tickets."""
    with errors_in_words(json_):
        public = file.with_name(file.name + ".pub")
        for path in (file, public):
            if path.exists() or path.is_symlink():
                raise ConflictError(
                    "a key would be overwritten",
                    found=str(path),
                    expected="a new name",
                    remedy="choose another name; tickets of a key that is lost cannot be used",
                )
        key = SigningKey.generate()
        text = b64(key.verify_key.raw)
        with key.seed().view() as seed:
            write_file(file, bytes(seed), 0o600)
        write_file(public, f"{text}\n".encode())
        fields = {"key": str(file), "public": str(public), "client": text}
        finish(
            fields, json_, lambda: line(f"made {file}, which stays with you, and {public}: {text}")
        )


def _issuer(opened: OpenedContract, party: Party, contract: str) -> None:
    """Raises unless the contract lets ``party`` sell its queries."""
    wanted = getattr(opened.contract.job, "tickets", None)
    if wanted is None:
        raise RefusedError(
            "the contract takes no tickets",
            found=contract,
            expected="a job of type serve that names who issues its tickets",
        )
    if wanted != party.name or opened.parties[wanted].digest != party.digest:
        raise RefusedError(
            "the contract lets somebody else issue its tickets",
            found=party.name,
            expected=wanted,
            remedy=f"ask {wanted} for the ticket",
        )


@app.command(
    epilog="Examples:\n\ncenacle ticket new sha256:4be1... --client client.key.pub --queries 1000 "
    "--expires 2027-12-31 --as vendor --out ticket.json\n\n"
    "cenacle ticket new sha256:4be1... --client client.key.pub --queries 50 "
    "--not-before 2027-03-01 --expires 2027-03-07 --as vendor --out week.json"
)
def new(
    contract: ContractArgument,
    client: Annotated[
        Path, typer.Option(metavar="FILE", help="The client's public key (FILE.pub).")
    ],
    queries: Annotated[int, typer.Option(help="How many rows may be answered.")],
    expires: Annotated[
        str, typer.Option(metavar="TIME", help="2027-12-31 (its end, UTC) or an RFC 3339 time.")
    ],
    party: AsOption,
    not_before: Annotated[
        str | None,
        typer.Option(
            metavar="TIME", help="From when on (a day: its beginning, UTC); by default now."
        ),
    ] = None,
    out: OutOption = None,
    broker: BrokerOption = "default",
    json_: JsonOption = False,
) -> None:
    """Sign a ticket: so many queries of a contract's model for one client, until a day.

    A query is one row of a batch. The contract must name your party as the issuer of its tickets.
    """
    with errors_in_words(json_):
        public = read_public_key(client)
        with Home.default().client_as(party, broker) as (mine, connection):
            opened = connection.contract(contract)
        _issuer(opened, mine.party, contract)
        ticket = Ticket.from_fields(
            {
                "issuer": mine.party.name,
                "contract": contract,
                "serial": new_serial(),
                "client": b64(public.raw),
                "queries": queries,
                "not_before": _begin(not_before),
                "expires": expires,
            }
        )
        target = out or Path(f"ticket-{ticket.serial_bytes.hex()[:12]}.json")
        if target.exists():
            raise ConflictError(
                "a file would be overwritten", found=str(target), remedy="choose another --out"
            )
        signed = Envelope.sign(ticket, mine.signing_key)
        write_file(target, signed.to_json().encode())
        finish(
            {**_fields(ticket), "ticket": str(target)},
            json_,
            lambda: line(f"{target}: {_in_words(ticket)}"),
        )


@app.command(
    epilog="Examples:\n\ncenacle ticket show ticket.json\n\n"
    "cenacle ticket show ticket.json --verify"
)
def show(
    file: FileArgument,
    verify: Annotated[
        bool,
        typer.Option(help="Ask the broker whose tickets the contract takes; check the signature."),
    ] = False,
    broker: BrokerOption = "default",
    json_: JsonOption = False,
) -> None:
    """Show a ticket. How many of its queries are left, the enclave alone knows."""
    with errors_in_words(json_):
        signed = Envelope.from_json(_read(file))
        ticket = signed.peek(Ticket)
        if verify:
            with Home.default().client(broker) as connection:
                opened = connection.contract(ticket.contract)
            issuer = opened.parties.get(ticket.issuer)
            if issuer is None or getattr(opened.contract.job, "tickets", None) != ticket.issuer:
                raise RefusedError(
                    "the contract does not take tickets of this issuer", found=ticket.issuer
                )
            open_ticket(signed, issuer, ticket.contract)
        checked = "checked" if verify else "not checked: use --verify"
        finish(
            {**_fields(ticket), "verified": verify},
            json_,
            lambda: line(
                f"ticket     {ticket.serial}\nissuer     {ticket.issuer} (signature {checked})\n"
                f"contract   {ticket.contract}\nqueries    {ticket.queries}\n"
                f"client     {ticket.client}\nvalid      {ticket.not_before} until "
                f"{ticket.expires}{_state(ticket)}"
            ),
        )


def _begin(text: str | None) -> str:
    """A day begins with its first second; in documents a bare day means its last."""
    if text is None:
        return format_time(datetime.now(UTC))
    return f"{text}T00:00:00Z" if _DAY.fullmatch(text) else text


def _state(ticket: Ticket) -> str:
    now = datetime.now(UTC)
    if now < parse_time(ticket.not_before):
        return " (not yet)"
    return " (expired)" if now >= parse_time(ticket.expires) else ""


def _fields(ticket: Ticket) -> dict[str, Any]:
    kept = ("serial", "issuer", "contract", "queries", "client", "not_before", "expires")
    return {name: getattr(ticket, name) for name in kept}


def _in_words(ticket: Ticket) -> str:
    plural = "query" if ticket.queries == 1 else "queries"
    return f"{ticket.queries} {plural} until {minutes(parse_time(ticket.expires))} UTC"
