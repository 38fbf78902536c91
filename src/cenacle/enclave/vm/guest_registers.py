"""What a machine measured of itself, without a job: registers, event log and IMA list.

The reference values of an image are computed without starting it, but for the firmware's own
volume, into which it writes facts of the machine before it measures itself. One start of the
image in this mode brings them, and everything to compare the computed values with. There is no
quote: nobody but the machine's owner learns anything from this.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Final

from cenacle.enclave.channel import Channel
from cenacle.enclave.vm.guest_system import EVENT_LOG, IMA_LIST
from cenacle.errors import UnavailableError

__all__ = ["EVENT_LOG_FILE", "IMA_LIST_FILE", "REGISTERS_FILE", "main", "read_registers"]

REGISTERS_FILE: Final = "registers.json"
EVENT_LOG_FILE: Final = "event-log"
IMA_LIST_FILE: Final = "ima-list"

_REGISTERS: Final = Path("/sys/class/tpm/tpm0/pcr-sha256")


def read_registers(folder: Path = _REGISTERS) -> dict[str, str]:
    """Register number to its value in hexadecimal, as the kernel shows them.

    Raises:
        UnavailableError: there is no TPM with a SHA-256 bank.
    """
    try:
        return {
            path.name: path.read_text("ascii").strip().lower()
            for path in sorted(folder.iterdir(), key=lambda path: int(path.name))
        }
    except (OSError, ValueError):
        raise UnavailableError(
            "this machine has no TPM with a SHA-256 bank", found=str(folder)
        ) from None


def main() -> None:
    """Write the files and end."""
    with Channel(int(sys.argv[1])) as channel:
        try:
            with os.fdopen(0, "rb") as file:
                file.seek(0)
                outputs = Path(json.loads(file.read())["paths"]["outputs"])
            for name, path in ((EVENT_LOG_FILE, EVENT_LOG), (IMA_LIST_FILE, IMA_LIST)):
                (outputs / name).write_bytes(path.read_bytes() if path.exists() else b"")
            # Last, as nothing that these lines execute may be measured after it.
            registers = json.dumps(read_registers())
            (outputs / REGISTERS_FILE).write_text(registers, "ascii")
            channel.finished()
        except BaseException as error:
            channel.failed(error)


if __name__ == "__main__":
    main()
