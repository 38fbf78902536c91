"""A virtual machine is booted, and holds what was computed before."""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cenacle.attestation.boot_claims import authenticate_log, boot_properties, differences
from cenacle.attestation.event_log import parse_event_log
from cenacle.attestation.golden import DirectBoot, golden_log, golden_pcrs
from cenacle.attestation.ima_list import boot_aggregates, match_prefix, parse_ima_list
from cenacle.attestation.ovmf import pei_digests, read_ovmf
from cenacle.enclave.vm.cpio import write_cpio
from cenacle.enclave.vm.image import default_cache
from cenacle.enclave.vm.kernel import find_kernel
from cenacle.enclave.vm.packages import PackageCache, kernel_package, resolve, unpack
from cenacle.enclave.vm.tree import Tree
from cenacle.errors import UnavailableError

pytestmark = [pytest.mark.slow, pytest.mark.processes]

MEMORY, PROCESSORS = 640, 2
LINE = "console=ttyS0 quiet panic=-1 ima_policy=tcb|critical_data ima_hash=sha256"
OVMF = Path("/usr/share/OVMF")
INIT = """#!/usr/bin/busybox sh
b=/usr/bin/busybox
$b mount -t proc proc /proc; $b mount -t sysfs sys /sys; $b mount -t devtmpfs dev /dev
$b mount -t securityfs sec /sys/kernel/security
for n in 0 1 2 3 4 5 6 7 8 9 10; do
  echo "PCR $n $($b cat /sys/class/tpm/tpm0/pcr-sha256/$n)"
done
echo LOG; $b base64 /sys/kernel/security/tpm0/binary_bios_measurements; echo END
echo IMA; $b base64 /sys/kernel/security/ima/binary_runtime_measurements; echo END
$b poweroff -f
"""


@dataclass(frozen=True)
class Booted:
    """What a machine told of itself, and what it was started with."""

    text: str
    kernel: bytes
    initrd: bytes

    def file(self, name: str) -> bytes:
        found = re.search(rf"^{name}$\n(.*?)^END$", self.text, re.MULTILINE | re.DOTALL)
        assert found is not None, self.text[-2000:]
        return base64.b64decode(found[1])

    @property
    def registers(self) -> dict[int, bytes]:
        found = re.findall(r"^PCR (\d+) ([0-9A-F]{64})$", self.text, re.MULTILINE)
        return {int(number): bytes.fromhex(value) for number, value in found}


@pytest.fixture(scope="module")
def booted() -> Iterator[Booted]:
    for name, package in (("qemu-system-x86_64", "qemu-system-x86"), ("swtpm", "swtpm")):
        if shutil.which(name) is None:
            pytest.skip(f"needs {name}: install Debian's package {package}")
    if not (OVMF / "OVMF_CODE_4M.fd").is_file():
        pytest.skip("needs OVMF: install Debian's package ovmf")
    try:
        packages = [kernel_package(), *resolve(["busybox-static"])]
        cache = PackageCache(default_cache())
        cache.fetch(packages)
    except UnavailableError as error:
        pytest.skip(f"needs Debian's packages: {error.diagnostics()}")
    everything, root = Tree(), Tree()
    for wanted in packages:
        unpack(cache.path(wanted), everything, lambda path: True)
    _, kernel = find_kernel(everything)
    busybox = next(node for path, node in everything.entries() if path.endswith("bin/busybox"))
    root.add_file("usr/bin/busybox", busybox.read(), 0o755)
    root.add_file("init", INIT.encode(), 0o755)
    for folder in ("dev", "proc", "sys"):
        root.add_folder(folder)
    work = Path(tempfile.mkdtemp(prefix="boot-"))  # socket names must be short
    try:
        with (work / "initrd").open("wb") as file:
            write_cpio(root, file)
        (work / "kernel").write_bytes(kernel)
        shutil.copyfile(OVMF / "OVMF_VARS_4M.fd", work / "vars.fd")
        yield Booted(_boot(work), kernel, (work / "initrd").read_bytes())
    finally:
        shutil.rmtree(work)


def _boot(work: Path) -> str:
    control = f"type=unixio,path={work}/tpm"
    tpm = ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={work}", "--ctrl", control]
    with subprocess.Popen([*tpm, "--terminate"], stdout=subprocess.DEVNULL) as process:
        while not (work / "tpm").exists():
            assert process.poll() is None
        flash = "if=pflash,format=raw"
        subprocess.run(
            [
                "qemu-system-x86_64",
                *("-machine", "q35,accel=tcg", "-cpu", "Nehalem,+aes,+pclmulqdq"),
                *("-m", str(MEMORY), "-smp", str(PROCESSORS)),
                *("-nodefaults", "-display", "none", "-no-reboot"),
                *("-drive", f"{flash},unit=0,readonly=on,file={OVMF}/OVMF_CODE_4M.fd"),
                *("-drive", f"{flash},unit=1,file={work}/vars.fd"),
                *("-kernel", f"{work}/kernel", "-initrd", f"{work}/initrd", "-append", LINE),
                *("-chardev", f"socket,id=tpm,path={work}/tpm"),
                *("-tpmdev", "emulator,id=tpm0,chardev=tpm", "-device", "tpm-tis,tpmdev=tpm0"),
                *("-serial", f"file:{work}/console"),
            ],
            check=True,
            timeout=300,
        )
    return (work / "console").read_text(errors="replace").replace("\r", "")


@pytest.fixture(scope="module")
def computed(booted: Booted) -> DirectBoot:
    firmware = read_ovmf((OVMF / "OVMF_CODE_4M.fd").read_bytes())
    return DirectBoot(booted.kernel, booted.initrd, LINE, MEMORY << 20, firmware=firmware)


def test_every_register_is_as_computed(booted: Booted, computed: DirectBoot) -> None:
    found = booted.registers
    expected = golden_pcrs(computed)
    assert sorted(expected) == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert {n: found[n] for n in expected} == expected


def test_the_firmwares_register_is_one_of_those_computed(
    booted: Booted, computed: DirectBoot
) -> None:
    assert computed.firmware is not None
    volumes = pei_digests(computed.firmware, computed.memory, PROCESSORS)
    possible = [
        golden_pcrs(
            DirectBoot(
                computed.kernel,
                computed.initrd,
                LINE,
                computed.memory,
                firmware=computed.firmware,
                pei_digest=volume,
            )
        )[0]
        for volume in volumes
    ]
    assert booted.registers[0] in possible


def test_the_log_is_authentic_and_as_computed(booted: Booted, computed: DirectBoot) -> None:
    log = parse_event_log(booted.file("LOG"))
    genuine = authenticate_log(log, "sha256", booted.registers)
    assert boot_properties(genuine, "sha256")["secure_boot"] is False
    assert differences(log, golden_log(computed), "sha256") == []


def test_the_kernels_list_is_authentic(booted: Booted) -> None:
    entries = parse_ima_list(booted.file("IMA"))
    found = booted.registers
    assert match_prefix(entries, found[10], "sha256") == len(entries)
    assert [entry.name for entry in entries] == [b"boot_aggregate", b"kernel_version"]
    assert entries[0].digest in boot_aggregates(found, "sha256")
