"""``cenacle broker``: run one, pin one, invite parties to one."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from cenacle.attestation.registry import Attester
from cenacle.broker.identity import BrokerIdentity
from cenacle.cli.home import Home, write_file
from cenacle.cli.options import AsOption, BrokerOption, OutOption
from cenacle.cli.output import JsonOption, console, errors_in_words, finish, line
from cenacle.cli.trust import read_requirements, read_trust, user_verifiers
from cenacle.documents.base import canonical_json, parse_json
from cenacle.errors import InputError

__all__ = ["app"]

_INSTALLATION = "installation.key"

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
    trust: Annotated[
        Path | None,
        typer.Option(
            help="Folder of `cenacle attest trust --dir`: roots and lists of files beside the "
            "vendors' roots; default: the broker's folder."
        ),
    ] = None,
    evidence: Annotated[
        str | None,
        typer.Option(
            help="Kind of evidence with which the broker itself attests; default: simulated with "
            "--development, else none."
        ),
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Serve a broker until interrupted.

    Writes its public identity to DIR/identity.json for parties to pin. The
    first start prints a one-time owner token: whoever registers with it may
    invite the other parties.
    """
    from cenacle.attestation.verifiers import hardware_verifiers
    from cenacle.broker.attestation import SelfAttestation
    from cenacle.broker.sealed_keys import open_keys
    from cenacle.broker.server import bind, serve
    from cenacle.broker.service import Broker
    from cenacle.broker.store import Store
    from cenacle.broker.tls import ensure_certificate, given_certificate

    with errors_in_words(json_):
        if (certificate is None) != (key is None):
            raise typer.BadParameter("--certificate and --key go together")
        keys = open_keys(folder, name)
        names = tuple(public_name or ()) + (() if host in {"0.0.0.0", "::"} else (host,))  # noqa: S104
        files = (
            given_certificate(certificate, key)
            if certificate is not None and key is not None
            else ensure_certificate(folder, names)
        )
        with Store.open(store or folder / "broker.db") as opened:
            make = Broker.development if development else Broker.production
            known = read_trust(trust or folder, (keys.identity.verify_key,))
            broker = make(opened, keys, *hardware_verifiers(known))
            kind = evidence or ("simulated" if development else None)
            if kind is not None:
                broker.attestation = SelfAttestation(_own_attester(kind, folder, development))
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
                "attests": kind,
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


def _own_attester(kind: str, folder: Path, development: bool) -> Attester:
    from cenacle.attestation.platforms import platform_attester
    from cenacle.attestation.simulated import InstallationKey, SimulatedAttester

    if kind != "simulated":
        return platform_attester(kind)
    if not development:
        raise InputError(
            "a production broker does not attest with simulated evidence",
            found=kind,
            expected="real hardware, or --development",
        )
    return SimulatedAttester(InstallationKey.load_or_create(folder / _INSTALLATION))


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
    reference: Annotated[
        Path | None,
        typer.Option(
            help="What it must prove before it gets a key: an enclave field (YAML or JSON), e.g. "
            "from `cenacle broker measure`."
        ),
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Remember a broker's keys and certificate; nothing else will be accepted as this broker.

    With --reference, `cenacle seal` has the broker prove what it runs before
    it hands over any key.
    """
    with errors_in_words(json_):
        found = BrokerIdentity.from_fields(parse_json(identity.read_bytes()))
        if digest is not None:
            found.require_digest(digest)
        wanted = None if reference is None else read_requirements(reference)
        home = Home.default()
        home.pin(found, alias)
        if wanted is not None:
            home.pin_reference(wanted, found)
        fields = {
            "alias": alias,
            "digest": found.digest,
            "url": found.url,
            "evidence": None if wanted is None else list(wanted.reference),
        }

        def show() -> None:
            line(f"pinned {found.origin} as {alias}: {found.digest}")
            if wanted is not None:
                line(f"it must attest with {' or '.join(wanted.reference)} before it gets a key")

        finish(fields, json_, show)


@app.command(epilog="Example: cenacle broker measure --dir broker --out reference.json")
def measure(
    folder: Annotated[
        Path | None,
        typer.Option("--dir", help="The broker's folder, for its installation's simulated key."),
    ] = None,
    out: OutOption = None,
    json_: JsonOption = False,
) -> None:
    """Measure the broker that this installation would start: reference values to pin.

    For a broker that somebody else runs, measure your own installation of the
    same version, and add the measurements of its hardware.
    """
    from cenacle.attestation.measure import measure_enclave
    from cenacle.attestation.simulated import InstallationKey

    with errors_in_words(json_):
        values = {name: [value] for name, value in measure_enclave().items()}
        if folder is not None:
            key = InstallationKey.load_or_create(folder / _INSTALLATION)
            values["installation"] = [key.measurement]
        fields = {"reference": {"simulated": values}}
        if out is not None:
            write_file(out, canonical_json(fields))
        finish(
            {**fields, "file": None if out is None else str(out)},
            json_,
            lambda: line("\n".join(f"{name:14}{found[0]}" for name, found in values.items())),
        )


@app.command(epilog="Example: cenacle broker attest --reference reference.json")
def attest(
    reference: Annotated[
        Path | None,
        typer.Option(help="Reference values; default: those pinned with the broker."),
    ] = None,
    broker: BrokerOption = "default",
    json_: JsonOption = False,
) -> None:
    """Have a broker prove what it runs, now and on this connection; exit code 3 if it cannot.

    Without reference values its evidence is shown, and compared with nothing.
    """
    import secrets
    from datetime import UTC, datetime

    from cenacle.broker.attestation import NONCE_BYTES, broker_report_data, verify_broker
    from cenacle.cli.attest import show_claims

    with errors_in_words(json_):
        home = Home.default()
        wanted = (
            home.broker_reference(home.broker(broker))
            if reference is None
            else read_requirements(reference)
        )
        with home.client(broker) as client:
            identity, nonce = client.identity, secrets.token_bytes(NONCE_BYTES)
            evidence, now = client.evidence(nonce), datetime.now(UTC)
        verifiers = user_verifiers(home.folder, identity.verify_key)
        if wanted is not None:
            claims = verify_broker(evidence, nonce, identity, wanted, verifiers, now)
        else:
            bound = broker_report_data(nonce, identity)
            claims = verifiers.for_kind(evidence.kind).authenticate(evidence, bound, now)
        fields = {"verified": wanted is not None, "claims": claims.to_fields()}
        finish(fields, json_, lambda: show_claims(claims, compared=wanted is not None))


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
