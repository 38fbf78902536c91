"""``cenacle broker``: run one, pin one, invite parties to one."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from cenacle.broker.identity import BrokerIdentity
from cenacle.cli.home import Home, write_file
from cenacle.cli.options import AsOption, BrokerOption
from cenacle.cli.output import JsonOption, console, errors_in_words, finish, line
from cenacle.documents.base import canonical_json, parse_json

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True,
    help="Run a broker, pin one, invite parties.",
    epilog="Example: cenacle broker pin broker/identity.json",
)


@app.command(
    epilog="Examples:\n\ncenacle broker start --dir broker --name demo/broker --development\n\n"
    "cenacle broker start --dir broker --name acme/broker --host 10.0.0.5 "
    "--store postgresql:///cenacle"
)
def start(
    folder: Annotated[Path, typer.Option("--dir", help="The broker's private folder.")],
    name: Annotated[str, typer.Option(help="The name of its log, e.g. acme.example/broker.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 8443,
    store: Annotated[
        str | None, typer.Option(help="PostgreSQL URL; default: SQLite in the folder.")
    ] = None,
    public_name: Annotated[
        list[str] | None, typer.Option(help="Host name or address that parties use; repeatable.")
    ] = None,
    certificate: Annotated[Path | None, typer.Option(help="PEM; default: self-made.")] = None,
    key: Annotated[Path | None, typer.Option(help="PEM key of --certificate.")] = None,
    development: Annotated[
        bool,
        typer.Option(
            "--development",
            help="Also hold a verifier of SIMULATED evidence, which protects from nobody with "
            "root. A broker made without this option has no such verifier.",
        ),
    ] = False,
    json_: JsonOption = False,
) -> None:
    """Serve a broker until interrupted.

    Writes its public identity to DIR/identity.json for parties to pin. The
    first start prints a one-time owner token: whoever registers with it may
    invite the other parties.
    """
    from cenacle.broker.identity import BrokerKeys
    from cenacle.broker.server import bind, serve
    from cenacle.broker.service import Broker
    from cenacle.broker.store import Store
    from cenacle.broker.tls import ensure_certificate, given_certificate

    with errors_in_words(json_):
        if (certificate is None) != (key is None):
            raise typer.BadParameter("--certificate and --key go together")
        keys = BrokerKeys.open(folder, name)
        names = tuple(public_name or ()) + (() if host in {"0.0.0.0", "::"} else (host,))  # noqa: S104
        files = (
            given_certificate(certificate, key)
            if certificate is not None and key is not None
            else ensure_certificate(folder, names)
        )
        with Store.open(store or folder / "broker.db") as opened:
            make = Broker.development if development else Broker.production
            broker = make(opened, keys)
            listener = bind(host, port)
            bound = listener.getsockname()[1]
            shown = names[0] if names else "127.0.0.1"
            shown = f"[{shown}]" if ":" in shown else shown
            identity = keys.published_at(f"https://{shown}:{bound}", files.certificate_pem)
            path = folder / "identity.json"
            write_file(path, canonical_json(identity.to_fields()))
            token = broker.owner_token()
            broker.tidy()
            fields = {
                "url": identity.url,
                "digest": identity.digest,
                "identity": str(path),
                "owner_token": token,
                "evidence": list(broker.verifiers.kinds),
            }
            # The server finishes its requests, then gives the signal back to us.
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            with contextlib.suppress(KeyboardInterrupt):
                if json_:
                    sys.stdout.write(json.dumps(fields) + "\n")
                    sys.stdout.flush()
                else:
                    _announce(identity, path, token, broker.verifiers.kinds)
                serve(broker, listener, files)


def _announce(
    identity: BrokerIdentity, path: Path, token: str | None, kinds: tuple[str, ...]
) -> None:
    line(f"broker   {identity.origin} at {identity.url}")
    line(f"digest   {identity.digest}  (parties compare this)")
    line(f"identity {path}  (parties pin this file)")
    line(f"evidence {', '.join(kinds) or 'none: no verifier is registered'}")
    if "simulated" in kinds:
        console.print(
            "[yellow]warning[/]  simulated evidence protects from nobody with root",
            soft_wrap=True,
        )
    if token is not None:
        line(f"owner's one-time token: {token}")


@app.command(epilog="Example: cenacle broker pin broker/identity.json")
def pin(
    identity: Annotated[Path, typer.Argument(help="The broker's identity file.")],
    alias: Annotated[str, typer.Option(help="Name to remember it by.")] = "default",
    digest: Annotated[
        str | None, typer.Option(help="Digest told by the owner over another channel.")
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Remember a broker's keys and certificate; nothing else will be accepted as this broker."""
    with errors_in_words(json_):
        found = BrokerIdentity.from_fields(parse_json(identity.read_bytes()))
        if digest is not None:
            found.require_digest(digest)
        Home.default().pin(found, alias)
        finish(
            {"alias": alias, "digest": found.digest, "url": found.url},
            json_,
            lambda: line(f"pinned {found.origin} as {alias}: {found.digest}"),
        )


@app.command(epilog="Example: cenacle broker invite --as hospital-a")
def invite(as_: AsOption, broker: BrokerOption = "default", json_: JsonOption = False) -> None:
    """Get a one-time token for one more party (for the broker's owner)."""
    with errors_in_words(json_):
        with Home.default().client_as(as_, broker) as (keys, client):
            invitation = client.invite(keys.signing_key, as_)
        finish(
            invitation.to_fields(),
            json_,
            lambda: line(f"{invitation.token}\n(once, until {invitation.expires})"),
        )


@app.command(epilog="Example: cenacle broker show")
def show(broker: BrokerOption = "default", json_: JsonOption = False) -> None:
    """Show a pinned broker and check that it answers with the pinned keys."""
    with errors_in_words(json_):
        home = Home.default()
        with home.client(broker) as client:
            client.check_identity()
            identity = client.identity
        fields = {"origin": identity.origin, "url": identity.url, "digest": identity.digest}
        finish(
            fields,
            json_,
            lambda: line("\n".join(f"{k:8} {v}" for k, v in fields.items())),
        )
