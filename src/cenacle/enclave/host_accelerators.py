"""Accelerators of an enclave: processes of the host's, started outside of its sandbox.

They are not trusted. Each confines itself, gets no key and no file, and has one Unix socket,
whose other end the enclave inherits; over that the enclave hands it descriptors of memory to
share. The launcher starts them, keeps no end of the sockets, and ends them with the enclave.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cenacle.accelerators.child import WORKER, Child, worker_environment
from cenacle.errors import UnavailableError

__all__ = ["HostAccelerators"]


class HostAccelerators:
    """The workers of one enclave.

    Args:
        kinds: of each worker, as in :data:`~cenacle.documents.offload.AcceleratorKind`.
        threads: for all of them together; each has one at least.

    Raises:
        UnavailableError: a kind cannot be used by an enclave here.
    """

    def __init__(self, kinds: Sequence[str], threads: int) -> None:
        self._kinds = tuple(kinds)
        self._threads = max(1, threads // max(1, len(self._kinds)))
        self._devices = [_device(kind, number) for number, kind in enumerate(kinds)]
        self._children: list[Child] = []

    def described(self) -> list[dict[str, Any]]:
        """What the enclave is told of each."""
        return [
            {"name": f"{kind}-{number}", "kind": kind, "threads": self._threads}
            for number, kind in enumerate(self._kinds, 1)
        ]

    def start(self) -> None:
        """Start all of them. Raises AcceleratorError."""
        for device in self._devices:
            environment = worker_environment(self._threads, device)
            self._children.append(Child(WORKER, (device, str(self._threads)), environment))

    @property
    def descriptors(self) -> tuple[int, ...]:
        """Of the sockets that the enclave inherits, in the order of :meth:`described`."""
        return tuple(child.socket.fileno() for child in self._children)

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(child.pid for child in self._children)

    def handed_over(self) -> None:
        """The enclave has inherited the sockets: keep none of them here."""
        for child in self._children:
            child.socket.close()

    def close(self) -> None:
        """End all of them. Safe to call twice."""
        for child in self._children:
            child.kill()
        self._children.clear()


def _device(kind: str, number: int) -> str:
    if kind == "process":
        return "cpu"
    if kind == "cuda":
        found = len(list(Path("/dev").glob("nvidia[0-9]*")))
        if found:
            return f"cuda:{number % found}"
        raise UnavailableError(
            "there is no CUDA device for an accelerator",
            found="no /dev/nvidia0",
            remedy="take `--accelerators process` if the contract allows it",
        )
    raise UnavailableError(
        "an enclave on this machine cannot reach accelerators of this kind",
        found=kind,
        expected="process or cuda",
        remedy="draft the contract for one of these: its enclave has no way to a cluster",
    )
