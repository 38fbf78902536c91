"""How long a measured virtual machine takes from power-on until its agent has the keys."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from cenacle.enclave.channel import Message, Stage
from cenacle.enclave.launcher import RunningEnclave
from cenacle.enclave.vm import qemu
from cenacle.enclave.vm.launcher import default_image
from cenacle.errors import UnavailableError
from tests.support.vm_world import vm_world

__all__ = ["vm_boot_to_key_s"]

_TICKS = os.sysconf("SC_CLK_TCK")


def vm_boot_to_key_s(image: Path | None = None) -> dict[str, Any]:
    """One start of one machine, beside whatever else this host does.

    ``vm_boot_to_key_s``: wall time from the launch until the broker's keys are in the agent's
    hands. ``vm_boot_to_key_cpu_s``: processor time of the emulator until then, which other load
    changes less; ``vm_stages_cpu_s``: until the agent entered each stage. ``vm_accelerator``:
    ``tcg`` where everything is emulated.

    Raises:
        UnavailableError: a program or the image is missing here.
    """
    folder = default_image() if image is None else image
    if missing := qemu.missing_programs():
        raise UnavailableError("needs the Debian packages " + " ".join(missing))
    if not (folder / "manifest.json").is_file():
        raise UnavailableError(
            "needs an image without PyTorch: cenacle image build --package tpm2-pytss",
            found=f"none in {folder}",
        )
    wall: dict[str, float] = {}
    taken: dict[str, float] = {}

    def watch(enclave: RunningEnclave, message: Message) -> None:
        if isinstance(message, Stage) and "running" not in taken:
            wall[message.name] = round(time.monotonic() - started, 1)
            taken[message.name] = round(_emulator_s(enclave.pid), 1)

    with tempfile.TemporaryDirectory(prefix="cenacle-boot-") as work:
        made = Path(work)
        with vm_world(made, folder, made / "tpm") as world:
            needed = world.requirements()
            started = time.monotonic()
            outcome = world.run(needed, watch=watch)
    if outcome.error is not None:
        raise outcome.error
    return {
        "vm_boot_to_key_s": wall["running"],
        "vm_boot_to_key_cpu_s": taken["running"],
        "vm_stages_cpu_s": taken,
        "vm_accelerator": qemu.accelerator(),
    }


def _emulator_s(group: int) -> float:
    """Processor time of the process group's emulator so far."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                name, _, rest = (entry / "stat").read_text("utf-8").rpartition(")")
                fields = rest.split()
                if int(fields[2]) == group and "(qemu" in name:
                    return (int(fields[11]) + int(fields[12])) / _TICKS
    return float("nan")
