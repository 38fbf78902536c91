"""Identities on disk: private, whole or absent, and never printed."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cenacle.documents.base import b64
from cenacle.documents.dsse import Envelope
from cenacle.documents.party import Party

Command = Callable[..., Any]


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_party_is_made_shown_and_listed(alone: Command, tmp_path: Path) -> None:
    made = alone("party", "new", "clinic", "--json").json
    shown = alone("party", "show", "clinic", "--json").json
    assert shown["digest"] == made["digest"]
    assert shown["name"] == made["party"] == "clinic"
    assert alone("party", "list", "--json").json == {"parties": ["clinic"]}
    assert made["digest"] in alone("party", "show", "clinic").out
    envelope = Envelope.from_json((tmp_path / "home/parties/clinic/party.json").read_bytes())
    party = envelope.open(Party, envelope.peek(Party).verify_key)
    assert party.digest == made["digest"]


def test_keys_are_private_and_nobody_is_told_them(alone: Command, tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        told = alone("party", "new", "clinic").out + alone("party", "show", "clinic", "--json").out
    finally:
        os.umask(old)
    home = tmp_path / "home"
    keys = (home / "parties/clinic/keys").read_bytes()
    assert len(keys) == 128
    for part in (keys[:32], keys[32:96], keys[96:]):
        assert part.hex() not in told
        assert b64(part) not in told
    assert _mode(home) == _mode(home / "parties") == _mode(home / "parties/clinic") == 0o700
    assert _mode(home / "parties/clinic/keys") == 0o600


def test_a_name_is_used_once(alone: Command, tmp_path: Path) -> None:
    alone("party", "new", "clinic")
    keys = (tmp_path / "home/parties/clinic/keys").read_bytes()
    again = alone("party", "new", "clinic")
    assert again.code == 5
    assert "exists here already" in again.err
    assert (tmp_path / "home/parties/clinic/keys").read_bytes() == keys
    assert sorted(p.name for p in (tmp_path / "home/parties").iterdir()) == ["clinic"]


@pytest.mark.parametrize(
    "name", ["Clinic", "a b", "", ".", "..", "../x", "-x", "a" * 64, "ä", "a/b"]
)
def test_a_name_that_cannot_be_one_is_refused(alone: Command, tmp_path: Path, name: str) -> None:
    answer = alone("party", "new", "--json", "--", name)
    assert answer.code == 2
    assert answer.json["error"] == "DocumentError"
    assert not list((tmp_path / "home").rglob("keys"))


@pytest.mark.parametrize("name", ["nobody", "..", ".", "", "a/b", "../parties/clinic"])
def test_a_party_that_is_not_here_is_named_with_those_that_are(alone: Command, name: str) -> None:
    alone("party", "new", "clinic")
    answer = alone("party", "show", "--json", "--", name)
    assert answer.code == 2
    assert answer.json["found"] == name
    assert answer.json["expected"] == "clinic"


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o602, 0o660])
def test_keys_that_others_can_read_are_not_used(alone: Command, tmp_path: Path, mode: int) -> None:
    alone("party", "new", "clinic")
    keys = tmp_path / "home/parties/clinic/keys"
    keys.chmod(mode)
    answer = alone("party", "show", "clinic")
    assert answer.code == 2
    assert f"with mode {mode:04o}" in answer.err
    assert f"chmod 600 {keys}" in answer.err


@pytest.mark.parametrize("size", [0, 32, 127, 129])
def test_a_damaged_key_file_is_named(alone: Command, tmp_path: Path, size: int) -> None:
    alone("party", "new", "clinic")
    keys = tmp_path / "home/parties/clinic/keys"
    keys.write_bytes(os.urandom(size))
    answer = alone("party", "show", "clinic")
    assert answer.code == 2
    assert f"{size} bytes in {keys}" in answer.err


def test_keys_of_another_party_are_found_out(alone: Command, tmp_path: Path) -> None:
    for name in ("clinic", "other"):
        alone("party", "new", name)
    parties = tmp_path / "home/parties"
    (parties / "clinic/keys").write_bytes((parties / "other/keys").read_bytes())
    answer = alone("party", "show", "clinic", "--json")
    assert answer.code == 3
    assert answer.json["error"] == "SignatureError"


def test_a_swapped_encryption_key_is_found_out(alone: Command, tmp_path: Path) -> None:
    """The right signing key with another's HPKE key would seal nothing that can be opened."""
    for name in ("clinic", "other"):
        alone("party", "new", name)
    parties = tmp_path / "home/parties"
    mine, theirs = ((parties / name / "keys").read_bytes() for name in ("clinic", "other"))
    (parties / "clinic/keys").write_bytes(mine[:32] + theirs[32:])
    answer = alone("party", "show", "clinic", "--json")
    assert answer.code == 2
    assert "damaged" in answer.json["what"]


@pytest.mark.parametrize("missing", ["keys", "party.json"])
def test_a_missing_file_of_a_party_is_named(alone: Command, tmp_path: Path, missing: str) -> None:
    alone("party", "new", "clinic")
    (tmp_path / "home/parties/clinic" / missing).unlink()
    answer = alone("party", "show", "clinic")
    assert answer.code == 2
    assert missing in answer.err


def test_what_an_interrupted_start_left_is_no_party(alone: Command, tmp_path: Path) -> None:
    (tmp_path / "home/parties/.clinic-x1y2").mkdir(parents=True)
    assert alone("party", "list", "--json").json == {"parties": []}
    assert alone("party", "new", "clinic").code == 0


def test_terms_are_explained_in_words(alone: Command, tmp_path: Path) -> None:
    template = tmp_path / "terms.yaml"
    assert alone("terms", "new", "--out", template).code == 0
    assert template.read_text() == alone("terms", "new").out.rstrip("\n") + "\n"
    words = alone("terms", "check", template).out
    for part in (
        "trusted hardware",
        "Recipes that may run: nothing. Programs: nothing.",
        "All jobs ever may spend epsilon 0.0",
        "What may leave: nothing; to: nothing.",
        "Uses in all: 1, until 2027-12-31T23:59:59Z.",
        "Each contract needs the owner's signature.",
    ):
        assert part in words
    template.write_text(
        "protection: simulated\nprivacy: unbounded\nrecipients: [clinic]\noutputs: [model]\n"
        "approval: terms\nexpires: 2030-01-01\nprice: {amount: 1234, currency: EUR}\n"
    )
    words = alone("terms", "check", template).out
    for part in (
        "SIMULATED enclave, which protects from nobody with root",
        "they may reveal single records",
        "What may leave: model; to: clinic.",
        "Price of a use: 12.34 EUR.",
        "needs no signature of the owner",
    ):
        assert part in words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "document"),
        ("expires: [", "YAML"),
        ("{}", "expires"),
        ("expires: 2030-01-01\nrecipient: [clinic]", "recipient"),
        ("expires: 2030-01-01\nuses: -1", "uses"),
        ("expires: 2030-01-01\nuses: 1\nuses: 2", "twice"),
        ("expires: 2030-01-01\nprotection: none", "protection"),
        ("expires: tomorrow", "expires"),
    ],
)
def test_terms_that_cannot_be_used_are_refused_with_the_field(
    alone: Command, tmp_path: Path, text: str, words: str
) -> None:
    path = tmp_path / "terms.yaml"
    path.write_text(text)
    answer = alone("terms", "check", path)
    assert answer.code == 2
    assert words in answer.err
    assert "Traceback" not in answer.err
    assert len(answer.err.strip().splitlines()) == 1


def test_a_missing_file_is_one_sentence(alone: Command, tmp_path: Path) -> None:
    answer = alone("terms", "check", tmp_path / "none.yaml")
    assert answer.code == 2
    assert answer.err.startswith("error: a file cannot be used; found No such file or directory")
    assert answer.out == ""


def test_the_home_is_where_the_environment_says(alone: Command, tmp_path: Path) -> None:
    alone("party", "new", "clinic")
    assert (tmp_path / "home/parties/clinic/keys").is_file()
