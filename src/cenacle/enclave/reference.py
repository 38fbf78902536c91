"""Reference values: what an enclave on this machine would measure, measured in one.

Taken inside the very sandbox, because what a process sees decides what it runs: a file that
the sandbox hides is neither executed nor measured.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Final

from cenacle.attestation.measure import measure_enclave
from cenacle.documents.base import Digest, canonical_json, parse_json
from cenacle.enclave.channel import Channel
from cenacle.enclave.launcher import LaunchRequest, ProcessLauncher
from cenacle.enclave.sandbox import SandboxPlan
from cenacle.enclave.sandbox.entry import AgentConfig
from cenacle.errors import EnclaveError
from cenacle.sealing.disk import AtomicFile, pwrite_all

__all__ = ["measure_in_sandbox", "write_measurements"]

_FILE: Final = "measurements.json"
# The relay's address; nothing connects to it (port 9 is discard).
_NOWHERE: Final = ("127.0.0.1", 9)


def write_measurements(config: AgentConfig, channel: Channel) -> None:
    """An agent that only measures itself: no keys, no broker."""
    with AtomicFile(config.paths["outputs"] / _FILE) as file:
        pwrite_all(file.fd, canonical_json(measure_enclave()), 0)
        file.commit()
    channel.finished()


def measure_in_sandbox(plan: SandboxPlan) -> dict[str, Digest]:
    """Start an enclave with this sandbox, let it measure itself, and return the values.

    Raises:
        EnclaveError: it could not, or answered with something else.
    """
    with tempfile.TemporaryDirectory(prefix="cenacle-measure-") as folder:
        request = LaunchRequest(
            broker=_NOWHERE,
            plan=plan,
            writable={"outputs": Path(folder)},
            argv=("-m", "cenacle.enclave", "measure"),
        )
        with ProcessLauncher().launch(request) as enclave:
            enclave.wait(120)
        found = parse_json(Path(folder, _FILE).read_bytes())
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise EnclaveError("an enclave measured itself as something else than digests")
    return {**found, "sandbox": plan.digest}
