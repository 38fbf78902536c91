"""``cenacle infer``: query a model that is served, in plain or sealed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from cenacle.cli.home import Home
from cenacle.cli.options import BrokerOption
from cenacle.cli.output import JsonOption, errors_in_words, finish, line
from cenacle.cli.trust import read_small, read_trust
from cenacle.documents.base import parse_json
from cenacle.documents.dsse import Envelope
from cenacle.errors import CenacleError, InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from cenacle.crypto import SigningKey
    from cenacle.serving.client import Client, SealedClient

__all__ = ["infer"]

_SHOWN: Final = 8


def infer(
    url: Annotated[str, typer.Argument(help="The service, e.g. https://127.0.0.1:8443.")],
    given: Annotated[
        Path,
        typer.Option(
            "--input",
            metavar="FILE",
            help="One input as .npy, several as .npz, or .json: lists by the input's name.",
        ),
    ],
    model: Annotated[
        str | None, typer.Option(help="The model's name: its alias in the contract.")
    ] = None,
    sealed: Annotated[
        bool,
        typer.Option("--sealed", help="Seal the query to the enclave, once it proved what it is."),
    ] = False,
    contract: Annotated[
        str | None, typer.Option(metavar="DIGEST", help="The contract, for --sealed.")
    ] = None,
    front: Annotated[
        Path | None, typer.Option(help="The model's public front, which runs here; for --sealed.")
    ] = None,
    ticket: Annotated[Path | None, typer.Option(help="A signed ticket.")] = None,
    key: Annotated[Path | None, typer.Option(help="The client's key, for --ticket.")] = None,
    certificate: Annotated[
        Path | None,
        typer.Option(help="PEM of the server's certificate, if no authority vouches for it."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the outputs to this .npz file.")
    ] = None,
    development: Annotated[
        bool,
        typer.Option(
            "--development",
            help="Accept SIMULATED evidence, which protects from nobody with root there.",
        ),
    ] = False,
    timeout: Annotated[float, typer.Option(help="Seconds, all attempts together.")] = 60.0,
    broker: BrokerOption = "default",
    json_: JsonOption = False,
) -> None:
    """Query a model. With --sealed the server learns sizes and times, and nothing else."""
    with errors_in_words(json_):
        _check(sealed, model, contract, front)
        paid: dict[str, Any] = {
            "certificate": certificate,
            "timeout": timeout,
            "ticket": None if ticket is None else Envelope.from_json(read_small(ticket)),
            "key": None if key is None else _key(key),
        }
        with _client(url, model, contract, front, development, broker, paid) as client:
            outputs = client.infer(_inputs(given, client))
        if out is not None:
            _save(out, outputs)
        fields = {
            "outputs": {name: array.tolist() for name, array in outputs.items()},
            "file": None if out is None else str(out),
        }
        finish(_finite(fields), json_, lambda: _show(outputs, out))


def _check(sealed: bool, model: str | None, contract: str | None, front: Path | None) -> None:
    if sealed and contract is None:
        raise typer.BadParameter("--sealed needs --contract, which judges the enclave")
    if not sealed and (contract is not None or front is not None):
        raise typer.BadParameter("--contract and --front are for --sealed")
    if not sealed and model is None:
        raise typer.BadParameter("--model names what to query")


def _client(
    url: str,
    model: str | None,
    contract: str | None,
    front: Path | None,
    development: bool,
    broker: str,
    paid: dict[str, Any],
) -> Client | SealedClient:
    from cenacle.serving.client import Client, SealedClient

    if contract is None:
        assert model is not None
        return Client(url, model, **paid)
    home = Home.default()
    try:
        issuers = (home.broker(broker).verify_key,)
    except CenacleError:
        issuers = ()  # type: ignore[assignment]  # no broker is needed but for TPMs' certificates
    trust = read_trust(home.folder, issuers)
    return SealedClient(url, contract, front=front, trust=trust, development=development, **paid)


def _key(path: Path) -> SigningKey:
    from cenacle.cli.ticket import read_client_key

    return read_client_key(path)


def _inputs(path: Path, client: Client | SealedClient) -> dict[str, NDArray[Any]]:
    """Arrays by name, of the types that the model takes."""
    import numpy as np

    from cenacle.serving.tensors import DATATYPES

    takes = {
        tensor["name"]: DATATYPES[tensor["datatype"]] for tensor in client.metadata()["inputs"]
    }
    names = ", ".join(takes)
    if path.suffix == ".json":
        fields = parse_json(read_small(path))
        found = fields if isinstance(fields, dict) else dict.fromkeys(list(takes)[:1], fields)
    else:
        read_small(path)  # that it is a file of a sensible size
        try:
            loaded = np.load(path, allow_pickle=False)
        except (ValueError, OSError, EOFError):
            raise InputError(
                "an input cannot be read", found=str(path), expected=".npy, .npz or .json"
            ) from None
        found = dict.fromkeys(list(takes)[:1], loaded) if path.suffix == ".npy" else dict(loaded)
    if set(found) != set(takes) or (len(takes) > 1 and path.suffix == ".npy"):
        raise InputError(
            "the inputs are not those of the model", found=", ".join(found), expected=names
        )
    try:
        return {name: np.asarray(value, dtype=takes[name]) for name, value in found.items()}
    except (ValueError, TypeError, OverflowError):
        raise InputError("an input is not of the model's type", found=str(path)) from None


def _save(path: Path, outputs: dict[str, NDArray[Any]]) -> None:
    import io

    import numpy as np

    from cenacle.cli.home import write_file

    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **outputs)
    write_file(path, buffer.getvalue())


def _finite(fields: Any) -> Any:
    """JSON has no NaN: it becomes null."""
    return json.loads(json.dumps(fields), parse_constant=lambda _: None)


def _show(outputs: dict[str, NDArray[Any]], out: Path | None) -> None:
    for name, array in outputs.items():
        flat = array.reshape(-1)
        more = " ..." if flat.size > _SHOWN else ""
        values = " ".join(f"{value:.6g}" for value in flat[:_SHOWN].tolist())
        line(f"{name} {list(array.shape)}  {values}{more}")
    if out is not None:
        line(f"wrote {out}")
