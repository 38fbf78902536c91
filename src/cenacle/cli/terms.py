"""``cenacle terms``: a template to start from, and what terms say in plain words."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cenacle.cli.home import write_file
from cenacle.cli.options import OutOption
from cenacle.cli.output import JsonOption, errors_in_words, finish, line
from cenacle.documents.protection import Protection, ProtectionByUse
from cenacle.documents.terms import PrivacyBudget, Terms

__all__ = ["TEMPLATE", "app", "in_words"]

app = typer.Typer(
    no_args_is_help=True,
    help="State what may be done with an asset.",
    epilog="Example: cenacle terms new --out terms.yaml",
)

TEMPLATE = """\
# What may be done with an asset. A field left out means the safe default; [] means none.
kind: terms
protection: tee          # tee | measured | simulated: the weakest that is acceptable; or for each
                         # use, e.g. {training: measured, inference: tee}
recipes: []              # model types (logistic, mlp, cnn, graph) or digests of whole recipes
programs: []             # digests of programs that may run (sha256:...)
offload: [enclave]       # schemes under which algebra may leave the enclave for accelerators that
                         # nobody trusts; enclave: it may not. `cenacle offload schemes` says what
                         # each leaks; permuted-public-base: permuted although others may know the
                         # weights that training starts from, which then protects nothing
privacy: {epsilon: 0.0, delta: 0.0}   # what all jobs ever may tell of one record, composed;
                         # `unbounded`: no differential privacy needed
recipients: []           # who may receive outputs: names, or name@sha256:...
outputs: []              # kinds that may leave: model, metrics, table, file
purposes: []             # purposes that a contract may state
uses: 1                  # runs in all
# serving: {outputs: {form: label}, tickets: true}   # for a model: how it may be served. What a
                         # query may be told (label | top-k | scores, decimals), and whether it
                         # needs a ticket that you signed; left out, the model is not served
expires: 2027-12-31
approval: owner          # owner: you sign each contract | terms: meeting these terms suffices
# price: {amount: 5000, currency: EUR}   # in cents, for each use
"""


@app.command(epilog="Example: cenacle terms new --out terms.yaml")
def new(out: OutOption = None, json_: JsonOption = False) -> None:
    """Write a commented template that allows nothing yet."""
    with errors_in_words(json_):
        if out is not None:
            write_file(out, TEMPLATE.encode())
        finish(
            {"terms": None if out is None else str(out), "template": TEMPLATE},
            json_,
            lambda: line(TEMPLATE if out is None else f"wrote {out}"),
        )


@app.command(epilog="Example: cenacle terms check terms.yaml")
def check(
    file: Annotated[Path, typer.Argument(help="Terms as YAML.")], json_: JsonOption = False
) -> None:
    """Check terms and say in plain words what they allow."""
    with errors_in_words(json_):
        terms = Terms.from_yaml(file.read_bytes())
        finish(
            {"digest": terms.digest, **terms.to_fields()},
            json_,
            lambda: line("\n".join(in_words(terms))),
        )


_PLACES = {
    "tee": "inside trusted hardware that keeps the machine's owner out",
    "measured": "on a machine whose software was measured; its owner could still read memory",
    "simulated": "in a SIMULATED enclave, which protects from nobody with root",
}


def _protection_in_words(demand: Protection | ProtectionByUse) -> str:
    if not isinstance(demand, ProtectionByUse):
        return f"Plaintext may exist {_PLACES[demand]}, or anything stronger."
    return (
        f"Plaintext may exist, for training, {_PLACES[demand.training]}; for inference, "
        f"{_PLACES[demand.inference]}; or in anything stronger."
    )


def in_words(terms: Terms, owner: str = "the owner") -> list[str]:
    """One sentence a clause, for someone who must decide."""

    def some(items: tuple[str, ...]) -> str:
        return ", ".join(items) or "nothing"

    budget = terms.privacy
    recipients = (owner,) if terms.recipients is None else terms.recipients
    return [
        _protection_in_words(terms.protection),
        f"Recipes that may run: {some(terms.recipes)}. Programs: {some(terms.programs)}.",
        f"Offload schemes: {some(terms.offload)}.",
        "Outputs need no differential privacy: they may reveal single records."
        if not isinstance(budget, PrivacyBudget)
        else f"All jobs ever may spend epsilon {budget.epsilon} at delta {budget.delta}, composed; "
        "a job without a privacy plan may not run.",
        f"What may leave: {some(terms.outputs)}; to: {some(recipients)}.",
        f"Purposes: {some(terms.purposes)}.",
        f"Uses in all: {terms.uses}, until {terms.expires}.",
        "It may not be served." if terms.serving is None else terms.serving.in_words(),
        "Price: none."
        if terms.price is None
        else f"Price of a use: {terms.price.amount / 100:.2f} {terms.price.currency}.",
        "Each contract needs the owner's signature."
        if terms.approval == "owner"
        else "A contract that meets these terms needs no signature of the owner.",
    ]
