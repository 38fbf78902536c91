"""``cenacle party``: identities."""

from __future__ import annotations

from typing import Annotated

import typer

from cenacle.cli.home import Home
from cenacle.cli.options import BrokerOption
from cenacle.cli.output import JsonOption, errors_in_words, finish, line

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True,
    help="Make and register identities.",
    epilog="Example: cenacle party new hospital-a",
)

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Lower-case letters, digits, -.")]


@app.command(epilog="Example: cenacle party new hospital-a")
def new(name: NameArgument, json_: JsonOption = False) -> None:
    """Make a party: an Ed25519 signing key and a post-quantum hybrid HPKE key."""
    with errors_in_words(json_):
        keys = Home.default().new_party(name)
        fields = {"party": name, "digest": keys.party.digest}
        finish(fields, json_, lambda: line(f"made party {name}: {keys.party.digest}"))


@app.command(
    epilog="Example: cenacle party register hospital-a --token 3kD... (the token is the broker's "
    "owner's to give: `cenacle broker invite`)"
)
def register(
    name: NameArgument,
    token: Annotated[
        str, typer.Option(help="One-time token; `-` reads it from standard input.", prompt=True)
    ],
    broker: BrokerOption = "default",
    json_: JsonOption = False,
) -> None:
    """Register a party at a broker with a one-time token."""
    with errors_in_words(json_):
        piped = token == "-"  # noqa: S105 - a dash stands for standard input
        secret = typer.get_text_stream("stdin").readline().strip() if piped else token
        with Home.default().client_as(name, broker) as (keys, client):
            client.check_identity()
            digest = client.register(keys.envelope, secret)
        finish(
            {"party": name, "digest": digest},
            json_,
            lambda: line(f"registered {name} at {client.identity.origin}"),
        )


@app.command(epilog="Example: cenacle party show hospital-a --json")
def show(name: NameArgument, json_: JsonOption = False) -> None:
    """Show a party's public document."""
    with errors_in_words(json_):
        party = Home.default().party(name).party
        finish(
            {**party.to_fields(), "digest": party.digest},
            json_,
            lambda: line(
                f"party    {party.name}\ndigest   {party.digest}\nkey id   {party.verify_key.keyid}"
                f"\nsuite    {party.hpke_suite}\ncreated  {party.created}"
            ),
        )


@app.command("list", epilog="Example: cenacle party list")
def list_(json_: JsonOption = False) -> None:
    """List the parties whose keys are here."""
    with errors_in_words(json_):
        names = Home.default().parties()
        finish({"parties": names}, json_, lambda: line("\n".join(names) or "none yet"))
