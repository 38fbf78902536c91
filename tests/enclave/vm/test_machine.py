"""Real machines: started, measured, tampered with, killed."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cenacle.attestation.boot_claims import differences
from cenacle.attestation.event_log import parse_event_log
from cenacle.attestation.golden import DirectBoot, golden_log
from cenacle.attestation.ima_allow import AllowList
from cenacle.attestation.ima_list import parse_ima_list, replay
from cenacle.attestation.ovmf import read_ovmf
from cenacle.cli.image_measure import measure_image
from cenacle.documents.base import parse_json
from cenacle.enclave.launcher import LaunchRequest, RunningEnclave
from cenacle.enclave.sandbox import SandboxPlan
from cenacle.enclave.vm import qemu
from cenacle.enclave.vm.guest import COMMANDS
from cenacle.enclave.vm.guest_registers import EVENT_LOG_FILE, IMA_LIST_FILE, REGISTERS_FILE
from cenacle.enclave.vm.image import ARGUMENTS, ImagePlan, write_image
from cenacle.enclave.vm.launcher import VmLauncher
from cenacle.enclave.vm.manifest import MANIFEST_FILE, ImageFile, ImageManifest, file_digest
from cenacle.enclave.vm.tree import Tree
from cenacle.errors import EnclaveError
from tests.support.processes import alive, descendants

pytestmark = [
    pytest.mark.processes,
    pytest.mark.usefixtures("machine_programs"),
]

Rebuild = Callable[..., ImageManifest]


def _request(outputs: Path, **fields: Any) -> LaunchRequest:
    outputs.mkdir(exist_ok=True)
    return LaunchRequest(
        broker=("127.0.0.1", 9),
        plan=SandboxPlan({}),
        writable={"outputs": outputs},
        argv=COMMANDS["registers"],
        **fields,
    )


def _start(image: Path, tpm: Path, outputs: Path) -> RunningEnclave:
    return VmLauncher(image, tpm=tpm).launch(_request(outputs))


def _registers(image: Path, tpm: Path, outputs: Path) -> dict[str, str]:
    with _start(image, tpm, outputs) as enclave:
        enclave.wait(280)
    found = parse_json((outputs / REGISTERS_FILE).read_bytes())
    assert isinstance(found, dict)
    return {str(number): str(value) for number, value in found.items()}


def _alter(image: Path, **fields: Any) -> None:
    """Change the manifest, as a host may that hopes for a guest that does not look."""
    manifest = ImageManifest.load(image, check=False)
    changed = manifest.model_copy(update=fields)
    (image / MANIFEST_FILE).write_bytes(changed.canonical_bytes())


def _emulator(enclave: RunningEnclave) -> int:
    """The emulator's process, once it runs."""
    while alive({enclave.pid}):
        for pid in descendants(enclave.pid):
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/comm").read_text().startswith("qemu"):
                    return pid
    raise AssertionError("the machine's process ended before there was an emulator")


# ---------------------------------------------------------------------- without a guest


@pytest.fixture
def dead(write: Rebuild, tpm_identity: Path, tmp_path: Path) -> Callable[[], RunningEnclave]:
    """Starts a machine whose kernel is none, so that it runs and never answers."""
    write(tmp_path / "image")
    return lambda: _start(tmp_path / "image", tpm_identity, tmp_path / "outputs")


def test_a_machine_whose_emulator_is_killed_is_noticed(dead: Callable[[], RunningEnclave]) -> None:
    with dead() as enclave:
        os.kill(_emulator(enclave), signal.SIGKILL)
        with pytest.raises(EnclaveError, match="killed by a signal") as error:
            enclave.wait(60)
        assert error.value.found == "SIGKILL"


def test_killing_the_enclave_leaves_no_process_and_no_file(
    dead: Callable[[], RunningEnclave], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    temporary = tmp_path / "t"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    enclave = dead()
    _emulator(enclave)
    everybody = {enclave.pid, *descendants(enclave.pid)}
    assert len(everybody) >= 3  # the process between, the emulator, the TPM
    enclave.kill()
    enclave.kill()
    assert not alive(everybody)
    assert list(temporary.iterdir()) == []
    with pytest.raises(EnclaveError, match="stopped"):
        enclave.wait()


def test_the_emulator_does_not_outlive_the_process_that_watches_it(
    dead: Callable[[], RunningEnclave],
) -> None:
    with dead() as enclave:
        _emulator(enclave)
        everybody = {enclave.pid, *descendants(enclave.pid)}
        os.kill(enclave.pid, signal.SIGKILL)
        with pytest.raises(EnclaveError, match="killed by a signal"):
            enclave.wait(60)
        enclave.kill()
        assert not alive(everybody)


# ---------------------------------------------------------------------- with one


@pytest.fixture(scope="module")
def booted(image: Path, tpm_identity: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one start of the small image measured."""
    outputs = tmp_path_factory.mktemp("booted")
    _registers(image, tpm_identity, outputs)
    return outputs


def _boot(image: Path) -> DirectBoot:
    manifest = ImageManifest.load(image, check=False)
    return DirectBoot(
        kernel=(image / "vmlinuz").read_bytes(),
        initrd=(image / "initrd").read_bytes(),
        command_line=manifest.cmdline,
        memory=manifest.memory << 20,
        firmware=read_ovmf(qemu.firmware()[0].read_bytes()),
    )


@pytest.mark.slow
def test_the_registers_of_a_machine_are_those_computed_without_it(
    image: Path, booted: Path
) -> None:
    registers = parse_json((booted / REGISTERS_FILE).read_bytes())
    computed = measure_image(image, None, booted / EVENT_LOG_FILE)["reference"]
    for number in range(10):
        assert f"sha256:{registers[str(number)]}" in computed[f"pcr{number}"], number


@pytest.mark.slow
def test_everything_that_the_guest_executed_is_on_the_images_list(
    image: Path, booted: Path
) -> None:
    registers = parse_json((booted / REGISTERS_FILE).read_bytes())
    entries = parse_ima_list((booted / IMA_LIST_FILE).read_bytes())
    assert replay(entries, "sha256").hex() == registers["10"]
    listed = AllowList.parse((image / "allow-list.jsonl").read_bytes())
    names = {entry.name.decode() for entry in entries} - {"boot_aggregate"}
    assert "/usr/bin/python3.11" in names
    assert names <= set(listed.files)
    assert all(
        entry.digest in listed.files[entry.name.decode()]
        for entry in entries
        if entry.name != b"boot_aggregate"
    )


@pytest.mark.slow
def test_an_argument_that_the_host_adds_is_named(
    image: Path, booted: Path, tpm_identity: Path, tmp_path: Path
) -> None:
    altered = tmp_path / "image"
    shutil.copytree(image, altered)
    manifest = ImageManifest.load(image, check=False)
    _alter(altered, cmdline=manifest.cmdline + " debug")
    _registers(altered, tpm_identity, tmp_path / "outputs")
    log = parse_event_log((tmp_path / "outputs" / EVENT_LOG_FILE).read_bytes())
    first = parse_event_log((booted / EVENT_LOG_FILE).read_bytes())
    volume = first.of(0)[1].digests["sha256"]
    golden = golden_log(replace(_boot(image), pei_digest=volume))
    assert differences(first, golden, "sha256") == []
    found = differences(log, golden, "sha256")
    assert len(found) == 1
    assert "command line" in found[0]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["data", "tree", "hash"])
def test_a_root_that_was_tampered_with_does_not_start(
    what: str, image: Path, tpm_identity: Path, tmp_path: Path
) -> None:
    altered = tmp_path / "image"
    shutil.copytree(image, altered)
    manifest = ImageManifest.load(image)
    if what == "hash":
        digit = "0" if manifest.verity.root_hash[0] != "0" else "1"
        other = digit + manifest.verity.root_hash[1:]
        _alter(altered, cmdline=manifest.cmdline.replace(manifest.verity.root_hash, other))
    else:
        block = 0 if what == "data" else manifest.verity.hash_start
        with (altered / "root.img").open("rb+") as file:
            file.seek(block * 4096 + 2000)
            file.write(b"tampered")
        _alter(altered, files=_with_digest(manifest, altered))
    with (
        _start(altered, tpm_identity, tmp_path / "outputs") as enclave,
        pytest.raises(EnclaveError, match="virtual machine ended before") as error,
    ):
        enclave.wait(280)
    assert "panic" in str(error.value.found) or "cenacle: the root" in str(error.value.found)
    assert list((tmp_path / "outputs").iterdir()) == []


def _with_digest(manifest: ImageManifest, folder: Path) -> dict[str, ImageFile]:
    path = folder / "root.img"
    made = ImageFile(name=path.name, digest=file_digest(path), size=path.stat().st_size)
    return {**manifest.files, "root": made}


@pytest.mark.slow
def test_two_builds_from_debian_packages_are_one_image(
    image: Path,
    rebuild: Rebuild,
    assemble: Callable[[], tuple[Tree, Tree, Tree]],
    tmp_path: Path,
) -> None:
    root, first, modules = assemble()
    again = write_image(tmp_path / "again", ImagePlan(), root=root, packages=first, kernel=modules)
    assert again == ImageManifest.load(image)

    def change(root: Tree) -> None:
        root.add_file("usr/lib/python3.11/this.pyc", b"another")

    other = rebuild(tmp_path / "other", None, change)
    plan = ImagePlan(arguments=(*ARGUMENTS, "debug"))
    longer = rebuild(tmp_path / "longer", plan)
    values = [
        measure_image(folder, None, None)["reference"]["pcr9"]
        for folder in (image, tmp_path / "other", tmp_path / "longer")
    ]
    assert len({value for (value,) in values}) == 3
    assert len({again.digest, other.digest, longer.digest}) == 3
