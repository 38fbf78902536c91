"""Enclaves in measured virtual machines: the launcher ``vm``."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import cenacle
from cenacle.enclave.channel import Finished, Message
from cenacle.enclave.host_accelerators import HostAccelerators
from cenacle.enclave.launcher import (
    Launcher,
    LaunchRequest,
    RunningEnclave,
    check_serving,
    register_launcher,
)
from cenacle.enclave.relay import Relay
from cenacle.enclave.sandbox import layer
from cenacle.enclave.sandbox.base import OuterLayer
from cenacle.enclave.sandbox.watch import ProcessWatch
from cenacle.enclave.vm import qemu
from cenacle.enclave.vm.guest import COMMANDS
from cenacle.enclave.vm.guest_plan import GUEST_LAYERS
from cenacle.enclave.vm.host import files_below
from cenacle.enclave.vm.manifest import ImageManifest
from cenacle.enclave.vm.tpm import TpmIdentity
from cenacle.errors import InputError, UnavailableError

__all__ = ["VmLauncher", "default_image", "default_tpm"]

_MIB: Final = 1 << 20
_END_S: Final = 10.0
_PAUSE_S: Final = 0.01
_FOR_FILES: Final = 3  # a third of the machine's memory, at most
_ENVIRONMENT: Final = ("HOME", "LANG", "PATH", "TMPDIR", "XDG_CACHE_HOME", "XDG_DATA_HOME")


def default_image() -> Path:
    """Where ``cenacle image build`` puts an image, and the launcher looks for one."""
    return _data() / "image"


def default_tpm() -> Path:
    """Where the identity of this host's software TPMs is kept."""
    return _data() / "tpm"


def _data() -> Path:
    home = os.environ.get("XDG_DATA_HOME")
    return Path(home if home else Path("~/.local/share").expanduser()) / "cenacle"


class VmLauncher(Launcher):
    """Enclaves in virtual machines of one image.

    Args:
        image: its folder; by default :func:`default_image`.
        accelerator: how instructions are executed; by default what works here.
        confidential: keep the machine's memory from this host, on hardware that can.
        tpm: folder of the software TPM's identity, by default :func:`default_tpm`.
    """

    name = "vm"

    def __init__(
        self,
        image: Path | None = None,
        *,
        accelerator: qemu.Accelerator | None = None,
        confidential: qemu.Confidential | None = None,
        tpm: Path | None = None,
    ) -> None:
        self._image = image
        self._accelerator = accelerator
        self._confidential = confidential
        self._tpm = tpm

    @property
    def image(self) -> Path:
        """The folder of the image."""
        return (default_image() if self._image is None else self._image).resolve()

    def launch(self, job: LaunchRequest) -> RunningEnclave:
        mode = _mode(job.argv)
        _check_layers(job.plan.layers)
        if job.accelerators or job.plan.accelerators:
            raise UnavailableError(
                "an enclave in a virtual machine cannot reach accelerators",
                found=", ".join(job.accelerators) or "a plan with accelerators",
                expected="none",
                remedy="run this contract in a process enclave, or draft it without offloading",
            )
        if job.platform is not None:
            raise InputError(
                "an enclave in a virtual machine makes evidence with the machine's own hardware",
                found="an attester of this host",
                expected="none",
            )
        check_serving(job)
        if missing := qemu.missing_programs():
            raise UnavailableError(
                "a virtual machine cannot be started here",
                found="no " + ", ".join(missing),
                remedy="install the Debian packages " + " ".join(missing),
            )
        manifest = ImageManifest.load(self.image)
        read_only = _resolved(job.read_only, folders=False)
        writable = _resolved(job.writable, folders=True)
        if same := set(read_only) & set(writable):
            raise InputError("two mounts have the same name", found=", ".join(sorted(same)))
        _check_size(files_below({**read_only, **writable}), manifest.memory)
        machine = qemu.Machine(
            image=self.image,
            memory=manifest.memory,
            processors=manifest.processors,
            accelerator=self._accelerator or qemu.accelerator(),
            confidential=self._confidential,
        )
        relay = Relay(job.broker).start()
        try:
            tpm = None if self._confidential else self._tpm or default_tpm()
            if tpm is not None:
                TpmIdentity(tpm).prepare()
            fields = {
                "machine": {**dataclasses.asdict(machine), "image": str(machine.image)},
                "cmdline": manifest.cmdline,
                "tpm": None if tpm is None else str(tpm.resolve()),
                # The relay removes its folder at the end, and the machine's state with it.
                "folder": str(relay.path.parent / "machine"),
                "broker": str(relay.path),
                "serving": None if job.serving is None else str(Path(job.serving).resolve()),
                "job": {
                    "mode": mode,
                    "job": dict(job.config),
                    "sandbox": job.plan.to_dict(),
                    "threads": job.threads or manifest.processors,
                    "platform": _platform(job, manifest),
                },
                "read_only": {name: str(path) for name, path in read_only.items()},
                "writable": {name: str(path) for name, path in writable.items()},
            }
            try:
                document = json.dumps(fields, allow_nan=False).encode()
            except (TypeError, ValueError):
                raise InputError("the configuration of an enclave must be JSON") from None

            def command(channel: int) -> list[str]:
                return [sys.executable, "-s", "-P", "-m", "cenacle.enclave.vm", str(channel)]

            none = HostAccelerators((), 1)
            return _VmEnclave(
                ProcessWatch(command, _environment(), document, [relay], none, wrapped=True)
            )
        except BaseException:
            relay.close()
            raise


class _VmEnclave(RunningEnclave):
    def __init__(self, watch: ProcessWatch) -> None:
        self._watch = watch

    @property
    def pid(self) -> int:
        return self._watch.pid

    def messages(self) -> Iterator[Message]:
        return self._watch.messages()

    def wait(self, timeout: float | None = None) -> Finished:
        return self._watch.wait(timeout)

    def kill(self) -> None:
        self._watch.kill()
        # The emulator has the same signal, but lets go of its memory in its own time.
        deadline = time.monotonic() + _END_S
        while _group_lives(self.pid) and time.monotonic() < deadline:
            time.sleep(_PAUSE_S)


register_launcher(VmLauncher())


def _group_lives(group: int) -> bool:
    """Whether a process of this group still runs; one that only waits to be reaped does not."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                fields = (entry / "stat").read_text("utf-8").rpartition(")")[2].split()
                if int(fields[2]) == group and fields[0] not in {"Z", "X"}:
                    return True
    return False


def _platform(job: LaunchRequest, manifest: ImageManifest) -> dict[str, object] | None:
    """What the guest needs to make evidence with its own hardware."""
    if not job.plan.platform:
        return None
    return {
        "kind": str(job.config.get("evidence")),
        "allow_list": manifest.files["listing"].digest,
        # The authority that signed the TPM's certificate is what a broker trusts, or not.
        "authorities": [],
    }


def _mode(argv: tuple[str, ...]) -> str:
    """Which of the guest's commands a request means: it runs no others."""
    for mode, command in COMMANDS.items():
        if argv == command:
            return mode
    raise InputError(
        "a virtual machine runs only the agent of its image",
        found=" ".join(argv),
        expected=" or ".join(" ".join(command) for command in COMMANDS.values()),
    )


def _check_layers(layers: tuple[str, ...]) -> None:
    outer = [name for name in layers if isinstance(layer(name), OuterLayer)]
    if outer:
        raise InputError(
            "a sandbox layer has no place inside a virtual machine",
            found=", ".join(outer),
            expected=", ".join(GUEST_LAYERS),
            remedy="demand in the contract only layers that the virtual machine has",
        )


def _resolved(given: Mapping[str, Path], *, folders: bool) -> dict[str, Path]:
    mounts = {}
    for name, path in sorted(given.items()):
        source = Path(path).resolve()
        if folders and not source.is_dir():
            raise InputError("a writable mount must be an existing folder", found=path)
        if not (source.is_dir() or source.is_file()):
            raise InputError("a read-only mount must be an existing file or folder", found=path)
        mounts[name] = source
    return mounts


def _check_size(files: Iterator[tuple[str, str, Path]], memory: int) -> None:
    size = sum(path.stat().st_size for *_, path in files)
    if size > memory * _MIB // _FOR_FILES:
        raise UnavailableError(
            "the files of a job do not fit into the virtual machine's memory",
            found=f"{-(-size // _MIB)} MiB",
            expected=f"at most {memory // _FOR_FILES} MiB in a machine of {memory} MiB",
            remedy="build the image with more --memory",
        )


def _environment() -> dict[str, str]:
    kept = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    source = Path(cenacle.__file__).parent.parent
    if not any(source.is_relative_to(p) for p in (Path(sys.prefix), Path(sys.base_prefix))):
        kept["PYTHONPATH"] = str(source)
    return kept
