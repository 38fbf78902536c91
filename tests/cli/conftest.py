"""Run commands as their users would: in this process, with a home of their own each."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from typer.testing import CliRunner

from cenacle.cli import output
from cenacle.cli.main import app
from tests.support.house import House


@dataclass(frozen=True)
class Answer:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The object on the last line of the output."""
        found = json.loads(self.out.splitlines()[-1])
        assert isinstance(found, dict)
        return found


def invoke(home: Path, arguments: tuple[object, ...], fed: str | None = None) -> Answer:
    """One command with its home folder."""
    # Wide, so that words are found in one piece; narrow terminals have a test of their own.
    output.console.width = output._errors.width = 200
    environment = {"CENACLE_HOME": str(home)}
    result = CliRunner().invoke(app, [str(a) for a in arguments], input=fed, env=environment)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Answer(result.exit_code, result.stdout, result.stderr)


Command = Callable[..., Answer]


@pytest.fixture(scope="module")
def cli(house: House) -> Command:
    """``cli(actor, *arguments, fed=None)``: a command of one of the house's actors."""

    def run(actor: str, *arguments: object, fed: str | None = None) -> Answer:
        return invoke(house.folder / actor / "home", arguments, fed)

    return run


@pytest.fixture
def alone(tmp_path: Path) -> Command:
    """``alone(*arguments)``: a command in an empty home, without any broker."""

    def run(*arguments: object, fed: str | None = None) -> Answer:
        return invoke(tmp_path / "home", arguments, fed)

    return run


@pytest.fixture
def root_pem(tmp_path: Path) -> Path:
    """The root certificate of some maker of TPMs."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a maker of TPMs")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    path = tmp_path / "root.pem"
    path.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    return path
