from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from cenacle.attestation.event_log import EventLog
from cenacle.attestation.golden import DirectBoot, golden_log, golden_pcrs
from cenacle.attestation.ima_allow import AllowList
from cenacle.attestation.ovmf import Firmware
from cenacle.cli import image_measure
from cenacle.documents.base import sha256_digest
from cenacle.enclave.vm.manifest import FILES, ImageFile, ImageManifest, VerityFields

FIRMWARE = Firmware(b"pei", b"dxe", bytes(range(16)))
ALLOWED = AllowList({"/usr/bin/python3.11": [bytes(32)]})
LINE = "console=ttyS0 ima_policy=tcb ima_hash=sha256"


@pytest.fixture
def image(tmp_path: Path, kernel: bytes) -> Path:
    """An image folder with a made-up kernel."""
    folder = tmp_path / "image"
    folder.mkdir()
    contents = {
        "cmdline": LINE.encode(),
        "initrd": b"initrd",
        "kernel": kernel,
        "listing": ALLOWED.serialized,
        "root": b"root",
    }
    for kind, content in contents.items():
        (folder / FILES[kind]).write_bytes(content)
    manifest = ImageManifest(
        kernel_release="6.1",
        cmdline=LINE,
        memory=1024,
        processors=2,
        source_date=0,
        files={
            kind: ImageFile(name=FILES[kind], digest=sha256_digest(content), size=len(content))
            for kind, content in contents.items()
        },
        verity=VerityFields(root_hash="00" * 32, salt="", data_blocks=1, hash_start=1),
        packages=(),
        distributions=(),
    )
    (folder / "manifest.json").write_bytes(manifest.canonical_bytes())
    return folder


@pytest.fixture
def boot(kernel: bytes) -> DirectBoot:
    return DirectBoot(kernel, b"initrd", LINE, 1024 << 20, firmware=FIRMWARE)


@pytest.fixture(autouse=True)
def firmware(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A firmware that unpacks to :data:`FIRMWARE`, with two places for facts of the machine."""
    path = tmp_path / "OVMF_CODE.fd"
    path.write_bytes(b"firmware")
    monkeypatch.setattr("cenacle.attestation.ovmf.read_ovmf", lambda raw: FIRMWARE)
    monkeypatch.setattr(
        "cenacle.attestation.ovmf.pei_digests", lambda *given: (b"\x01" * 32, b"\x02" * 32)
    )
    return path


def run(*arguments: object) -> Any:
    app = typer.Typer()
    app.command(epilog=image_measure.EPILOG)(image_measure.measure)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def values(boot: DirectBoot, volume: int) -> dict[str, str]:
    found = golden_pcrs(replace(boot, pei_digest=bytes([volume]) * 32))
    return {f"pcr{n}": f"sha256:{value.hex()}" for n, value in found.items()}


def test_reference_values_follow_from_the_image(
    image: Path, firmware: Path, boot: DirectBoot, tmp_path: Path
) -> None:
    output = tmp_path / "reference.yaml"
    result = run(image, "--firmware", firmware, "--output", output, "--json")
    assert result.exit_code == 0, result.output
    fields = json.loads(result.stdout.splitlines()[-1])
    one, two = values(boot, 1), values(boot, 2)
    assert fields["reference"] == {
        **{name: [value] for name, value in one.items()},
        "pcr0": [one["pcr0"], two["pcr0"]],
        "allow-list": [ALLOWED.digest],
    }
    assert (fields["memory"], fields["processors"], fields["missing"]) == (1024, 2, [])
    assert fields["firmware_computed"] is True
    assert yaml.safe_load(output.read_text()) == {"reference": {"ima": fields["reference"]}}
    shown = run(image, "--firmware", firmware).output
    assert "one of 2" in shown
    assert "Secure Boot off" in shown


def log_of(boot: DirectBoot, volume: int) -> EventLog:
    return golden_log(replace(boot, pei_digest=bytes([volume]) * 32))


@pytest.mark.parametrize(("volume", "computed"), [(2, True), (9, False)])
def test_the_log_of_a_boot_tells_the_firmwares_register(
    image: Path, firmware: Path, boot: DirectBoot, tmp_path: Path, volume: int, computed: bool
) -> None:
    log = tmp_path / "log"
    log.write_bytes(log_of(boot, volume).to_bytes())
    arguments = (image, "--firmware", firmware, "--event-log", log)
    fields = json.loads(run(*arguments, "--json").stdout.splitlines()[-1])
    assert fields["reference"]["pcr0"] == [values(boot, volume)["pcr0"]]
    assert fields["firmware_computed"] is computed
    assert ("log's word alone" in run(*arguments).output) is not computed


def test_the_log_of_another_boot_is_refused(
    image: Path, firmware: Path, boot: DirectBoot, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    other = replace(boot, command_line=LINE + " init=/bin/sh")
    genuine = log_of(boot, 1)
    cases: tuple[tuple[bytes, str], ...] = (
        (log_of(other, 1).to_bytes(), "kernel command line differs"),
        (replace(genuine, events=genuine.events[3:]).to_bytes(), "shows no firmware"),
        (b"no log", "ends inside the header"),
    )
    for raw, reason in cases:
        log.write_bytes(raw)
        result = run(image, "--firmware", firmware, "--event-log", log)
        assert result.exit_code == 3
        assert reason in " ".join(result.output.split())


def test_an_unknown_firmware_leaves_the_register_open(
    image: Path, firmware: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cenacle.attestation.ovmf.pei_digests", lambda *given: ())
    result = run(image, "--firmware", firmware, "--json")
    fields = json.loads(result.stdout.splitlines()[-1])
    assert fields["missing"] == ["pcr0"]
    assert "pcr0" not in fields["reference"]
    assert "Register 0 is open" in run(image, "--firmware", firmware).output


def test_what_cannot_be_measured(image: Path, firmware: Path, tmp_path: Path) -> None:
    assert run(tmp_path / "absent", "--firmware", firmware).exit_code == 2
    assert run(image, "--firmware", tmp_path / "absent").exit_code == 2
    (image / FILES["initrd"]).write_bytes(b"another")
    assert run(image, "--firmware", firmware).exit_code == 2
