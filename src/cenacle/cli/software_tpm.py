"""A TPM in software for demonstrations: the real protocol, and nothing that is protected."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import Final, Self

from cenacle.attestation.measure import measure_package
from cenacle.attestation.tpm_device import TpmDevice
from cenacle.enclave.vm.qemu import program
from cenacle.enclave.vm.tpm import TpmIdentity

__all__ = ["SoftwareTpm"]

_BOOT_LOADER: Final = 8  # the register of what a boot loader starts
_SHA256: Final = 0x000B  # TPM_ALG_SHA256


class SoftwareTpm:
    """One ``swtpm`` process that listens on a unix socket; use as a context manager.

    Args:
        identity: folder of its endorsement key, certificate and authority; made if absent.

    Raises:
        UnavailableError: swtpm is not installed, naming the Debian package.
    """

    def __init__(self, identity: Path) -> None:
        self._identity = TpmIdentity(identity)
        self._folder: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def root(self) -> Path:
        """The authority's certificate (PEM), for those who choose to trust this TPM."""
        return self._identity.authority

    @property
    def tcti(self) -> str:
        """Where it answers; raises RuntimeError unless it is running."""
        if self._folder is None:
            raise RuntimeError("the software TPM is not running")
        return f"swtpm:path={self._folder}/tpm"

    def __enter__(self) -> Self:
        binary = program("swtpm")
        self._identity.prepare()
        folder = Path(tempfile.mkdtemp(prefix="cenacle-tpm-", dir="/tmp"))  # sun_path is short
        try:
            state = folder / "state"
            state.mkdir(mode=0o700)
            self._identity.copy_to(state)
            # Sockets that listen already: whoever connects early waits in their queue.
            with _listening(folder / "tpm") as server, _listening(folder / "tpm.ctrl") as control:
                self._process = subprocess.Popen(
                    [
                        *(binary, "socket", "--tpm2", "--tpmstate", f"dir={state}"),
                        *("--server", f"type=unixio,fd={server.fileno()}"),
                        *("--ctrl", f"type=unixio,fd={control.fileno()}"),
                        *("--flags", "not-need-init,startup-clear"),
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    pass_fds=(server.fileno(), control.fileno()),
                )
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self._folder = folder
        self._boot()
        return self

    def _boot(self) -> None:
        """Measure this package, in place of a firmware that would have measured what it starts."""
        os.environ.setdefault("TSS2_LOG", "all+none")
        digest = bytes.fromhex(measure_package().removeprefix("sha256:"))
        with TpmDevice(self.tcti) as device:
            device.extend(_BOOT_LOADER, _SHA256, digest)

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


def _listening(path: Path) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    made.bind(str(path))
    made.listen(8)
    return made
