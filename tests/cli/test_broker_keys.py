"""``cenacle broker keys``, and a broker that starts from sealed keys, with a real software TPM."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cenacle.attestation.tpm_device import TpmDevice
from cenacle.broker.identity import BrokerKeys
from cenacle.broker.sealed_keys import open_keys
from tests.support.swtpm import Manufacturer, Tpm, require_swtpm, run_swtpm

Command = Callable[..., Any]

pytestmark = pytest.mark.processes


@pytest.fixture
def tpm(tmp_path: Path) -> Iterator[Tpm]:
    require_swtpm()
    manufacturer = Manufacturer(tmp_path)
    with run_swtpm(manufacturer, manufacturer.make_plain("tpm")) as running:
        yield running


@pytest.fixture
def sealed(tmp_path: Path, alone: Command, tpm: Tpm) -> tuple[Path, list[Path], str]:
    """A broker's folder with sealed keys, its shares, and the digest of its keys."""
    folder = tmp_path / "broker"
    digest = BrokerKeys.create(folder, "test/broker").identity.digest
    shares = [tmp_path / f"{name}.share" for name in "abc"]
    given = [part for share in shares for part in ("--share", share)]
    answer = alone("broker", "keys", "seal", "--dir", folder, "--tcti", tpm.tcti, *given, "--json")
    assert answer.code == 0, answer.out
    assert answer.json["threshold"] == 2
    return folder, shares, digest


def _announced(folder: Path) -> dict[str, Any]:
    """What ``cenacle broker start`` says as a process; it is stopped then."""
    command = ["broker", "start", "--dir", str(folder), "--name", "test/broker", "--port", "0"]
    with subprocess.Popen(
        [sys.executable, "-m", "cenacle", *command, "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "CENACLE_HOME": str(folder / "home")},
    ) as process:
        try:
            assert process.stdout is not None
            found: dict[str, Any] = json.loads(process.stdout.readline())
        finally:
            process.terminate()
    return found


def test_a_broker_starts_from_sealed_keys_until_its_machine_changes(
    sealed: tuple[Path, list[Path], str], alone: Command, tpm: Tpm
) -> None:
    folder, shares, digest = sealed
    assert all(stat.S_IMODE(share.stat().st_mode) == 0o600 for share in shares)
    assert _announced(folder)["digest"] == digest

    with TpmDevice(tpm.tcti) as device:
        device.extend(4, 0x000B, b"\x01" * 32)
    start = ("broker", "start", "--dir", folder, "--name", "test/broker", "--port", "0")
    refused = alone(*start)
    assert refused.code == 3
    assert "found other values in PCR 4" in refused.err

    few = alone("broker", "keys", "recover", shares[0], "--dir", folder)
    assert few.code == 2
    assert "too few recovery shares" in few.err
    answer = alone("broker", "keys", "recover", shares[0], shares[2], "--dir", folder, "--json")
    assert answer.json == {"digest": digest}
    assert open_keys(folder, "test/broker").identity.digest == digest


def test_new_shares_recover_too(
    sealed: tuple[Path, list[Path], str], alone: Command, tmp_path: Path
) -> None:
    folder, _, digest = sealed
    fresh = [tmp_path / "d.share", tmp_path / "e.share"]
    given = [part for share in fresh for part in ("--share", share)]
    answer = alone("broker", "keys", "share", "--dir", folder, *given)
    assert answer.code == 0
    assert "any 2 of these recover them" in answer.out
    assert fresh[0].read_text("ascii").strip() not in answer.out
    again = alone("broker", "keys", "recover", *fresh, "--dir", folder, "--registers", "0,7")
    assert digest in again.out


def test_refusals_leave_everything(
    sealed: tuple[Path, list[Path], str], alone: Command, tmp_path: Path
) -> None:
    folder, shares, _ = sealed
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    seal = ("broker", "keys", "seal", "--dir", folder, "--share")
    for arguments, words in (
        ((*seal, shares[0], "--share", tmp_path / "new"), "a recovery share cannot be written"),
        ((*seal, tmp_path / "no" / "x", "--share", tmp_path / "new"), "cannot be written"),
        ((*seal, tmp_path / "new", "--share", tmp_path / "new"), "into one file"),
        ((*seal, tmp_path / "x", "--share", tmp_path / "y", "--registers", "0,x"), "as numbers"),
        (("broker", "keys", "recover", folder, shares[0], "--dir", folder), "cannot read"),
        (
            ("broker", "keys", "recover", folder / "broker.sealed", shares[0], "--dir", folder),
            "a recovery share cannot be read",
        ),
    ):
        answer = alone(*arguments)
        assert answer.code == 2, answer.err
        assert words in answer.err
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before
    assert not (tmp_path / "new").exists()
