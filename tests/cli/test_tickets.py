"""``cenacle ticket``: keys for clients, tickets for their queries, by commands alone."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from cenacle.cli.ticket import read_client_key, read_public_key
from cenacle.documents.base import b64
from cenacle.documents.dsse import Envelope
from cenacle.documents.ticket import Ticket, new_request, open_ticket, sign_use
from cenacle.errors import InputError
from tests.support.house import TERMS, House

Command = Callable[..., Any]


# ------------------------------------------------------------------ keys


def test_a_clients_key(alone: Command, tmp_path: Path) -> None:
    file = tmp_path / "client.key"
    answer = alone("ticket", "key", "new", file, "--json")
    assert answer.code == 0
    key = read_client_key(file)
    assert answer.json == {
        "key": str(file),
        "public": f"{file}.pub",
        "client": b64(key.verify_key.raw),
    }
    assert read_public_key(Path(f"{file}.pub")) == key.verify_key
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    shown = alone("ticket", "key", "new", tmp_path / "other").out
    for path in (file, tmp_path / "other"):
        secret = path.read_bytes()
        for spelling in (secret.hex(), b64(secret), b64(secret).rstrip("=")):
            assert spelling not in answer.out + shown


@pytest.mark.parametrize("taken", ["client.key", "client.key.pub"])
def test_a_key_is_never_overwritten(alone: Command, tmp_path: Path, taken: str) -> None:
    (tmp_path / taken).write_bytes(b"mine")
    answer = alone("ticket", "key", "new", tmp_path / "client.key", "--json")
    assert answer.code == 5
    assert (tmp_path / taken).read_bytes() == b"mine"
    assert {path.name for path in tmp_path.iterdir()} <= {taken, "home"}


def test_a_folder_that_is_not_there(alone: Command, tmp_path: Path) -> None:
    answer = alone("ticket", "key", "new", tmp_path / "none" / "client.key", "--json")
    assert answer.code == 2
    assert "check the path" in answer.json["remedy"]


def test_a_key_that_others_can_read(alone: Command, tmp_path: Path) -> None:
    file = tmp_path / "client.key"
    alone("ticket", "key", "new", file)
    file.chmod(0o640)
    with pytest.raises(InputError, match=r"can be read by others; found .* with mode 0640"):
        read_client_key(file)


@pytest.mark.parametrize("content", [b"", b"x" * 31, b"x" * 33, b"x" * 100_000])
def test_what_is_no_key(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "file"
    file.write_bytes(content)
    file.chmod(0o600)
    with pytest.raises(InputError):
        read_client_key(file)
    with pytest.raises(InputError):
        read_public_key(file)


def test_a_private_key_is_not_taken_for_the_public_one(alone: Command, tmp_path: Path) -> None:
    alone("ticket", "key", "new", tmp_path / "client.key")
    with pytest.raises(InputError, match="private key was given") as refusal:
        read_public_key(tmp_path / "client.key")
    assert "client.key.pub" in str(refusal.value)


# ------------------------------------------------------------------ tickets


@pytest.fixture(scope="module")
def client_key(cli: Command, house: House) -> Path:
    """A client's private key; ``.pub`` lies beside it."""
    file = house.path("client.key")
    assert cli("operator", "ticket", "key", "new", file).code == 0
    return file


@pytest.fixture(scope="module")
def propose(cli: Command, house: House) -> Callable[..., str]:
    """``propose(**job)``: a proposed contract that serves hospital-a's model."""
    folder = house.folder / "hospital-a"
    save_file({"weight": np.zeros((2, 2), np.float32)}, folder / "net.safetensors")
    terms = {**TERMS, "serving": {"outputs": {"form": "label"}}}
    (folder / "net-terms.yaml").write_text(yaml.safe_dump(terms))
    sealed = cli(
        "hospital-a",
        *("seal", folder / "net.safetensors", "--terms", folder / "net-terms.yaml"),
        *("--as", "hospital-a", "--json"),
    )
    assert sealed.code == 0, sealed.out

    def make(**job: Any) -> str:
        source, target = house.path("job.yaml"), house.path("contract.yaml")
        fields = {
            "name": house.fresh("shop"),
            "purpose": "research",
            "parties": ["hospital-a", "clinic"],
            "assets": {"net": sealed.json["manifest"]},
            "job": {"type": "serve", "model": "net", "outputs": {"form": "label"}, **job},
            "enclave": {
                "reference": {"simulated": {"package": ["sha256:" + "1" * 64]}},
                "layers": ["process"],
            },
            "outputs": [{"name": "usage", "kind": "metrics", "recipient": "clinic"}],
            "approval": {"all_of": ["hospital-a"]},
            "expires": "2036-12-31",
        }
        source.write_text(yaml.safe_dump(fields))
        drafted = cli("operator", "draft", source, "--out", target, "--json")
        assert drafted.code == 0, drafted.out
        return str(cli("clinic", "propose", target, "--as", "clinic", "--json").json["contract"])

    return make


@pytest.fixture(scope="module")
def contract(propose: Callable[..., str]) -> str:
    """A contract whose tickets hospital-a issues."""
    return propose(tickets="hospital-a")


def _new(contract: str, client_key: Path, out: Path, *more: object) -> tuple[object, ...]:
    return (
        *("ticket", "new", contract, "--client", f"{client_key}.pub"),
        *("--as", "hospital-a", "--out", out, "--json", *more),
    )


ONE = ("--queries", 50, "--expires", "2036-03-07")


def test_a_ticket_is_sold(
    cli: Command, house: House, contract: str, client_key: Path, tmp_path: Path
) -> None:
    out = tmp_path / "ticket.json"
    more = (*ONE, "--not-before", "2036-03-01")
    answer = cli("hospital-a", *_new(contract, client_key, out, *more))
    assert answer.code == 0, answer.out
    signed = Envelope.from_json(out.read_bytes())
    ticket = open_ticket(signed, house.parties["hospital-a"].party, contract)
    assert (ticket.queries, ticket.not_before, ticket.expires) == (
        50,
        "2036-03-01T00:00:00Z",
        "2036-03-07T23:59:59Z",
    )
    assert answer.json["serial"] == ticket.serial
    sign_use(signed, read_client_key(client_key), request=new_request(), rows=3).verify(ticket)

    shown = cli("clinic", "ticket", "show", out, "--verify", "--json")
    assert shown.json["verified"] is True
    assert {**shown.json, "ticket": str(out)} == {**answer.json, "verified": True}
    assert cli("clinic", "ticket", "show", out, "--json").json["verified"] is False
    words = cli("clinic", "ticket", "show", out).out
    assert "signature not checked" in words
    assert "(not yet)" in words

    again = cli("hospital-a", *_new(contract, client_key, out, *ONE))
    assert again.code == 5
    assert Envelope.from_json(out.read_bytes()).digest == signed.digest


def test_a_ticket_begins_now_and_gets_a_name_of_its_own(
    cli: Command, contract: str, client_key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [a for a in _new(contract, client_key, tmp_path, *ONE) if a not in {"--json"}]
    arguments.remove("--out")
    arguments.remove(tmp_path)
    answer = cli("hospital-a", *arguments)
    assert answer.code == 0, answer.err
    [made] = tmp_path.glob("ticket-*.json")
    assert f"{made.name}: 50 queries until 2036-03-07 23:59 UTC" in answer.out
    ticket = Envelope.from_json(made.read_bytes()).peek(Ticket)
    assert ticket.serial_bytes.hex().startswith(made.stem.removeprefix("ticket-"))
    assert "(expired)" not in cli("clinic", "ticket", "show", made).out


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (("--queries", 0, "--expires", "2036-12-31"), 2, "queries"),
        (("--queries", 1 << 41, "--expires", "2036-12-31"), 2, "queries"),
        (("--queries", 1, "--expires", "soon"), 2, "expires"),
        (("--queries", 1, "--expires", "2020-12-31"), 2, "expires after it begins"),
        (("--queries", 1, "--expires", "2036-12-31", "--not-before", "never"), 2, "not_before"),
    ],
    ids=["none", "too many", "no time", "expired", "no beginning"],
)
def test_terms_that_cannot_be(
    cli: Command,
    contract: str,
    client_key: Path,
    tmp_path: Path,
    more: tuple[object, ...],
    code: int,
    words: str,
) -> None:
    out = tmp_path / "ticket.json"
    answer = cli("hospital-a", *_new(contract, client_key, out, *more))
    assert answer.code == code
    assert words in json.dumps(answer.json)
    assert not out.exists()


def test_who_may_not_sell(
    cli: Command, propose: Callable[..., str], client_key: Path, tmp_path: Path
) -> None:
    out = tmp_path / "ticket.json"
    by_clinic = propose(tickets="clinic")
    answer = cli("hospital-a", *_new(by_clinic, client_key, out, *ONE))
    assert answer.code == 4
    assert answer.json["what"] == "the contract lets somebody else issue its tickets"
    free = propose()
    answer = cli("hospital-a", *_new(free, client_key, out, *ONE))
    assert (answer.code, answer.json["what"]) == (4, "the contract takes no tickets")
    answer = cli("hospital-a", *_new("sha256:" + "0" * 64, client_key, out, *ONE))
    assert answer.code == 2
    assert not out.exists()


def test_a_ticket_that_was_altered_or_is_another_issuers(
    cli: Command, house: House, contract: str, client_key: Path, tmp_path: Path
) -> None:
    out = tmp_path / "ticket.json"
    cli("hospital-a", *_new(contract, client_key, out, *ONE))
    signed = Envelope.from_json(out.read_bytes())
    more = Ticket.from_fields({**signed.peek(Ticket).to_fields(), "queries": 5000})
    out.write_text(
        Envelope(more.canonical_bytes(), signed.payload_type, signed.signatures).to_json()
    )
    assert cli("clinic", "ticket", "show", out, "--json").json["queries"] == 5000
    answer = cli("clinic", "ticket", "show", out, "--verify", "--json")
    assert (answer.code, answer.json["what"]) == (3, "a signature does not verify")
    other = Ticket.from_fields({**more.to_fields(), "issuer": "clinic"})
    out.write_text(Envelope.sign(other, house.parties["clinic"].signing_key).to_json())
    answer = cli("clinic", "ticket", "show", out, "--verify", "--json")
    assert (answer.code, answer.json["found"]) == (4, "clinic")
    out.write_text(house.parties["clinic"].envelope.to_json())
    assert cli("clinic", "ticket", "show", out, "--json").code == 2
    assert cli("clinic", "ticket", "show", tmp_path / "none", "--json").code == 2
