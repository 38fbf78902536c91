"""Command lines of machines, what this host can do, and what the launcher refuses."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cenacle.enclave.launcher import LaunchRequest, launcher
from cenacle.enclave.sandbox import SandboxPlan
from cenacle.enclave.vm import qemu
from cenacle.enclave.vm.launcher import VmLauncher
from cenacle.enclave.vm.machine import MachineJob
from cenacle.enclave.vm.qemu import Machine
from cenacle.errors import InputError, UnavailableError

VARIABLES = Path("/state/vars.fd")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every program and firmware were here."""
    code = Path("/fw/code.fd"), Path("/fw/vars.fd")
    monkeypatch.setattr(qemu, "program", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(qemu, "firmware", lambda: code)
    monkeypatch.setattr(qemu, "_confidential_firmware", lambda kind: Path(f"/fw/{kind}.fd"))


def _options(line: list[str], name: str) -> list[str]:
    return [value for option, value in itertools.pairwise(line) if option == f"-{name}"]


@pytest.mark.usefixtures("installed")
def test_a_machine_has_a_disk_a_tpm_a_port_and_nothing_else() -> None:
    line = Machine(Path("/image")).command("console=ttyS0 a,b=c", 5, 6, VARIABLES)
    devices = [value.partition(",")[0] for value in _options(line, "device")]
    assert devices == ["virtio-blk-pci", "virtio-serial-pci", "virtserialport", "tpm-tis"]
    assert _options(line, "nic") == ["none"]
    assert {"-nodefaults", "-no-user-config", "-no-reboot"} <= set(line)
    assert _options(line, "monitor") == ["none"]
    assert _options(line, "append") == ["console=ttyS0 a,b=c"]
    assert _options(line, "chardev") == ["socket,id=link,fd=5", "socket,id=tpm,fd=6"]
    assert "spawn=deny" in _options(line, "sandbox")[0]
    disks = {d["node-name"]: d for d in map(json.loads, _options(line, "blockdev"))}
    assert disks["root"]["file"]["filename"] == "/image/root.img"
    assert disks["root"]["read-only"]
    assert disks["code"]["read-only"]
    assert not disks["vars"]["read-only"]


@pytest.mark.usefixtures("installed")
def test_a_path_cannot_add_options() -> None:
    line = Machine(Path("/a,readonly=off,b")).command("", 5, None, VARIABLES)
    disks = [json.loads(value) for value in _options(line, "blockdev")]
    assert disks[-1]["file"] == {"driver": "file", "filename": "/a,readonly=off,b/root.img"}


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("kind", ["sev-snp", "tdx"])
def test_a_confidential_machine_is_the_same_image_with_other_switches(kind: Any) -> None:
    plain = Machine(Path("/image"), accelerator="kvm").command("words", 5, None, VARIABLES)
    line = Machine(Path("/image"), accelerator="kvm", confidential=kind).command(
        "words", 5, None, VARIABLES
    )
    for option in ("kernel", "initrd", "append", "smp", "serial", "chardev", "nic"):
        assert _options(line, option) == _options(plain, option)
    assert "confidential-guest-support=cgs" in _options(line, "machine")[0]
    assert _options(line, "bios") == [f"/fw/{kind}.fd"]
    guest = _options(line, "object")[-1]
    if kind == "sev-snp":
        assert guest == "sev-snp-guest,id=cgs,cbitpos=51,reduced-phys-bits=1,kernel-hashes=on"
    else:
        assert guest == "tdx-guest,id=cgs"
        assert "kernel-irqchip=split" in _options(line, "machine")[0]
    for device in _options(line, "device")[:2]:
        assert "iommu_platform=on" in device
    assert not any("pflash" in word for word in line)


@pytest.mark.parametrize(
    "fields",
    [{"memory": 100}, {"processors": 0}, {"processors": 256}, {"confidential": "tdx"}],
    ids=str,
)
def test_a_machine_that_cannot_be_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Machine(Path("/image"), **fields)


@pytest.mark.parametrize("fields", [{}, {"machine": 7}, {"machine": {"image": "/x", "evil": 1}}])
def test_a_description_of_a_machine_that_does_not_parse_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        MachineJob.from_fields(fields)


def test_a_missing_program_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    monkeypatch.setattr(qemu, "_FIRMWARE", ())
    assert qemu.missing_programs() == ["qemu-system-x86", "swtpm", "swtpm-tools", "ovmf"]
    with pytest.raises(UnavailableError, match="Debian package swtpm-tools"):
        qemu.program("swtpm_setup")
    with pytest.raises(UnavailableError, match="Debian package ovmf"):
        qemu.firmware()


def test_the_payload_runs_under_emulation_and_a_dead_one_does_not(
    machine_programs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert qemu.payload_runs(("-machine", "pc,accel=tcg"), seconds=60)
    assert not qemu.payload_runs(("-machine", "pc,accel=nonsense"))
    monkeypatch.setattr(qemu, "probe_payload", lambda: b"\xf4" * 65536)  # halts
    started = time.monotonic()
    assert not qemu.payload_runs(("-machine", "pc,accel=tcg"), seconds=1)
    assert time.monotonic() - started < 30


def test_kvm_is_believed_only_if_it_runs_and_asked_once_a_boot(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda *_: True)
    asked: list[bool] = []
    for works in (False, True):

        def runs(*_: object, works: bool = works) -> bool:
            asked.append(works)
            return works

        monkeypatch.setattr(qemu, "payload_runs", runs)
        qemu.accelerator.cache_clear()
        assert qemu.accelerator() == "tcg"  # the second answer is the kept one
    assert len(asked) == 1
    (tmp_path / "cenacle" / "accelerator.json").write_text("{")
    qemu.accelerator.cache_clear()
    assert qemu.accelerator() == "kvm"
    monkeypatch.setattr(os, "access", lambda *_: False)
    qemu.accelerator.cache_clear()
    assert qemu.accelerator() == "tcg"
    qemu.accelerator.cache_clear()


# ---------------------------------------------------------------------- the launcher


def _request(**fields: Any) -> LaunchRequest:
    return LaunchRequest(broker=("127.0.0.1", 9), **{"plan": SandboxPlan({}), **fields})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"argv": ("-c", "import os")}, "only the agent of its image"),
        ({"argv": ("-m", "cenacle.enclave", "-c")}, "only the agent of its image"),
        ({"plan": SandboxPlan({"bubblewrap": {}})}, "no place inside"),
        ({"accelerators": ("process",)}, "cannot reach accelerators"),
        ({"plan": SandboxPlan({}, accelerators=True)}, "cannot reach accelerators"),
        ({"platform": object()}, "with the machine's own hardware"),
        ({"serving": Path("/nowhere")}, "differ in whether the enclave serves"),
        ({"plan": SandboxPlan({}, serving=True)}, "differ in whether the enclave serves"),
        (
            {"plan": SandboxPlan({}, serving=True), "serving": Path("/nowhere")},
            "server's socket does not exist",
        ),
    ],
    ids=[
        *("program", "argument", "layer", "accelerators", "plan", "platform"),
        *("server", "no server", "no socket"),
    ],
)
def test_what_a_machine_cannot_do_is_refused_at_once(fields: dict[str, Any], said: str) -> None:
    with pytest.raises((InputError, UnavailableError), match=said):
        VmLauncher(Path("/nowhere")).launch(_request(**fields))


def test_without_programs_or_an_image_the_remedy_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(qemu, "missing_programs", list)
    with pytest.raises(InputError, match="cenacle image build"):
        VmLauncher(tmp_path).launch(_request())
    monkeypatch.setattr(qemu, "missing_programs", lambda: ["swtpm", "ovmf"])
    with pytest.raises(UnavailableError, match="Debian packages swtpm ovmf"):
        VmLauncher(tmp_path).launch(_request())


def test_the_launcher_is_known_by_its_name() -> None:
    assert isinstance(launcher("vm"), VmLauncher)


def test_the_machines_own_process_refuses_to_be_anything_else(tmp_path: Path) -> None:
    (tmp_path / "description").write_text("{}")
    with (tmp_path / "description").open("rb") as description:
        done = subprocess.run(
            [sys.executable, "-m", "cenacle.enclave.vm", "1"],
            stdin=description,
            capture_output=True,
            check=False,
            env={"PYTHONPATH": str(Path(qemu.__file__).parents[3])},
        )
    assert done.returncode == 70
    assert json.loads(done.stdout)["error"]["error"] == "InputError"
