"""``cenacle image measure``: the reference values of a machine, computed without running it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.table import Table

from cenacle.cli.home import write_file
from cenacle.cli.output import JsonOption, cell, console, errors_in_words, finish, say
from cenacle.errors import EvidenceError, InputError

if TYPE_CHECKING:
    from cenacle.attestation.golden import DirectBoot

__all__ = ["EPILOG", "measure", "measure_image"]

EPILOG = "Example: cenacle image measure image --output reference.yaml"
_MIB = 1024 * 1024
_MAX_LOG = 4 * _MIB
_MAX_FIRMWARE = 64 * _MIB
_NAMES = {
    0: "firmware",
    1: "boot options",
    2: "option ROMs: none",
    3: "their settings: none",
    4: "kernel",
    5: "boot manager's actions",
    6: "vendor's: none",
    7: "Secure Boot off, no keys",
    8: "boot loader: none",
    9: "command line and initial RAM disk",
}


def measure(
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="FOLDER", help="An image; by default the one that `build` makes."),
    ] = None,
    firmware: Annotated[
        Path | None, typer.Option(help="OVMF's code; default: the installed one.")
    ] = None,
    event_log: Annotated[
        Path | None,
        typer.Option(help="Boot event log of such a machine, to check and for register 0."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Write the enclave field of a contract here (YAML).")
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Compute what a machine's TPM will hold after it booted an image.

    Everything follows from the image and the firmware. Register 0 holds the
    firmware as it is in memory, with facts of the machine in one place of it:
    where, is not known, so several values are listed. The log of a boot tells
    which; without a log, an OVMF of another layout than Debian 12's leaves
    register 0 open.
    """
    with errors_in_words(json_):
        fields = measure_image(folder, firmware, event_log)
        if output is not None:
            _write(output, fields)
        finish(fields, json_, lambda: _show(fields, output))


def measure_image(
    given: Path | None, firmware: Path | None, event_log: Path | None
) -> dict[str, Any]:
    """What the command prints: ``reference`` holds the accepted values of each measurement.

    Raises:
        InputError: a file is not what it should be.
        EvidenceError: the log is of another image, machine or firmware.
    """
    from cenacle.attestation.golden import DirectBoot, golden_pcrs
    from cenacle.attestation.ima_allow import AllowList
    from cenacle.attestation.ovmf import pei_digests, read_ovmf
    from cenacle.enclave.vm import qemu
    from cenacle.enclave.vm.launcher import default_image
    from cenacle.enclave.vm.manifest import FILES, ImageManifest

    folder = given or default_image()
    manifest = ImageManifest.load(folder)
    code = read_ovmf(_read(firmware or qemu.firmware()[0], _MAX_FIRMWARE))
    boot = DirectBoot(
        kernel=(folder / FILES["kernel"]).read_bytes(),
        initrd=(folder / FILES["initrd"]).read_bytes(),
        command_line=manifest.cmdline,
        memory=manifest.memory * _MIB,
        firmware=code,
    )
    computed = pei_digests(code, boot.memory, manifest.processors)
    volumes = computed
    if event_log is not None:
        volumes = (_from_log(boot, _read(event_log, _MAX_LOG)),)
    listed = AllowList.parse((folder / FILES["listing"]).read_bytes())
    reference: dict[str, list[str]] = {}
    for volume in volumes or (None,):
        for number, value in sorted(golden_pcrs(replace(boot, pei_digest=volume)).items()):
            accepted = reference.setdefault(f"pcr{number}", [])
            if (text := f"sha256:{value.hex()}") not in accepted:
                accepted.append(text)
    return {
        "image": manifest.digest,
        "memory": manifest.memory,
        "processors": manifest.processors,
        "reference": {**reference, "allow-list": [listed.digest]},
        "missing": [] if volumes else ["pcr0"],
        "firmware_computed": bool(volumes) and set(volumes) <= set(computed),
        "files": len(listed.files),
    }


def _from_log(boot: DirectBoot, raw: bytes) -> bytes:
    """The PEI volume's digest from a log that is otherwise as computed."""
    from cenacle.attestation.boot_claims import differences
    from cenacle.attestation.event_log import parse_event_log
    from cenacle.attestation.golden import golden_log

    log = parse_event_log(raw)
    log.check_data()
    firmware = log.of(0)
    if len(firmware) < 3 or "sha256" not in firmware[1].digests:
        raise EvidenceError(
            "the boot event log shows no firmware",
            found=f"{len(firmware)} events in register 0",
            expected="OVMF's version and two volumes, with SHA-256 digests",
        )
    volume = firmware[1].digests["sha256"]
    if wrong := differences(log, golden_log(replace(boot, pei_digest=volume)), "sha256"):
        raise EvidenceError(
            "the boot event log is of another image, machine or firmware",
            found="; ".join(wrong),
            expected="a boot of this image with this firmware",
            remedy="give the log of such a boot, or its firmware with --firmware",
        )
    return volume


def _read(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as file:
            raw = file.read(limit + 1)
    except OSError as error:
        raise InputError("a file cannot be read", found=f"{error.strerror}: {path}") from None
    if len(raw) > limit:
        raise InputError("a file is too large", found=path, expected=f"<= {limit} bytes")
    return raw


def _write(path: Path, fields: dict[str, Any]) -> None:
    text = yaml.safe_dump({"reference": {"ima": fields["reference"]}}, sort_keys=False)
    write_file(path, text.encode())


def _show(fields: dict[str, Any], output: Path | None) -> None:
    table = Table("measurement", "reference value", "what it holds")
    for name, values in fields["reference"].items():
        number = name.removeprefix("pcr")
        meaning = _NAMES[int(number)] if number.isdigit() else f"{fields['files']} files"
        value = values[0] if len(values) == 1 else f"one of {len(values)}"
        table.add_row(cell(name), cell(value), cell(meaning))
    console.print(table)
    if fields["missing"]:
        say("Register 0 is open: boot the machine once, and give its log with --event-log.")
    elif not fields["firmware_computed"]:
        say("Register 0 is the log's word alone: this firmware's layout is not known here.")
    if output is not None:
        say(f"Written to {output}; add the machine's ek to it.")
