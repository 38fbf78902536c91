"""Workers on the machines of a Ray cluster.

Ray places them: it knows which machine has a processor or a GPU to spare. It does no more than
that, for a reason: ``ray.get`` unpickles what an actor returns, a process that joins a cluster
takes code from it, and unpickling what a hostile worker wrote means running it. So Ray is never
imported here. A helper process (:mod:`~cenacle.accelerators.ray_driver`) joins the cluster,
has actors placed, connects to each, and hands the connections over as descriptors; the enclave
then speaks the protocol of :mod:`~cenacle.accelerators.remote` over them and nothing else.

Needs ``pip install cenacle[ray]``, and cenacle with torch on the cluster's machines.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final

from cenacle.accelerators.child import Child
from cenacle.accelerators.remote import RemoteAccelerator
from cenacle.accelerators.wire import MAX_ANSWER, clean, read_frame
from cenacle.errors import AcceleratorError, InputError

__all__ = ["RayAccelerator", "ray_workers"]

_DRIVER: Final = (sys.executable, "-s", "-P", "-B", "-m", "cenacle.accelerators.ray_driver")
_END_S: Final = 20.0
_GRACE_S: Final = 5.0  # so that the helper's own words come before our impatience


class _Driver:
    """The helper; it leaves the cluster when the last worker is closed."""

    def __init__(self, config: Mapping[str, Any], workers: int, timeout: float) -> None:
        self._child = Child(_DRIVER, [json.dumps(config)], _environment())
        self._child.socket.settimeout(timeout + _GRACE_S)
        self._left = workers
        self._lock = threading.Lock()

    def connection(self) -> tuple[socket.socket, str]:
        """The next worker's stream and where it is, as the helper says."""
        descriptors: list[int] = []
        try:
            head, descriptors, _, _ = socket.recv_fds(self._child.socket, 4, 1)
            for descriptor in descriptors:
                os.set_inheritable(descriptor, False)
            message = read_frame(self._child.socket, MAX_ANSWER, head)
            if not isinstance(message, dict):
                raise ValueError("no object")
            if isinstance(reason := message.get("error"), str):
                raise AcceleratorError("Ray could not place a worker", found=clean(reason))
            node = message.get("node")
            if message.keys() != {"node"} or not isinstance(node, str) or len(descriptors) != 1:
                raise ValueError("no connection")
            found = socket.socket(fileno=descriptors[0])
            descriptors = []
            if found.type != socket.SOCK_STREAM:
                found.close()
                raise ValueError("no stream")
        except (ValueError, EOFError, OSError) as error:
            raise AcceleratorError(
                "the helper that speaks to Ray failed",
                found=clean(str(error)) or self._child.end(),
                remedy="install cenacle[ray], and see that the cluster's address is right",
            ) from None
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return found, clean(node)[:100]

    def release(self) -> None:
        """One worker fewer."""
        with self._lock:
            self._left -= 1
            if self._left > 0:
                return
        self.end()

    def end(self) -> None:
        with self._child.socket as channel:
            try:
                channel.settimeout(_END_S)
                channel.shutdown(socket.SHUT_WR)
                channel.recv(1)  # until it has let its actors go, and ended
            except OSError:
                pass
        self._child.kill()


def _environment() -> dict[str, str]:
    """Ray needs programs of the system; the cluster's address may be in its variables."""
    kept = {name: value for name, value in os.environ.items() if name.startswith("RAY_")}
    return {"PATH": "/usr/local/bin:/usr/bin:/bin", "LC_ALL": "C.UTF-8", "HOME": "/tmp", **kept}  # noqa: S108


class RayAccelerator(RemoteAccelerator):
    """One worker of :func:`ray_workers`."""

    kind: ClassVar[str] = "ray"

    def __init__(self, name: str, driver: _Driver, start_timeout: float) -> None:
        connection, self.node = driver.connection()
        super().__init__(name, connection, start_timeout=start_timeout, ended=driver.release)

    def describe(self) -> str:
        return f"{super().describe()}, on {self.node}"


def ray_workers(
    names: Sequence[str],
    *,
    address: str = "auto",
    device: str = "cpu",
    threads: int = 1,
    resources: Mapping[str, float] | None = None,
    start_timeout: float = 120.0,
) -> list[RayAccelerator]:
    """Have workers placed on a cluster, spread over its machines where it can.

    Args:
        names: of the workers, distinct.
        address: the cluster's, as for ``ray.init``; ``auto`` finds the one of this machine.
        device: ``cpu`` or ``cuda``: then each worker gets a GPU of its own.
        threads: processors for each.
        resources: further demands of Ray, e.g. ``{"hospital_dmz": 1}``.
        start_timeout: seconds for placing a worker, and again for its start.

    Raises:
        InputError: there are no names, they are not distinct, or the device is none.
        AcceleratorError: Ray is not installed, the cluster is not there or has no room.
    """
    if not names or len(set(names)) != len(names):
        raise InputError("workers need distinct names", found=", ".join(names) or "none")
    if device not in {"cpu", "cuda"}:
        raise InputError("a worker's device is not known", found=device, expected="cpu or cuda")
    config = {
        "address": address,
        "workers": len(names),
        "device": device,
        "threads": threads,
        "resources": dict(resources or {}),
        "timeout": start_timeout,
    }
    driver = _Driver(config, len(names), start_timeout)
    made: list[RayAccelerator] = []
    try:
        for name in names:
            made.append(RayAccelerator(name, driver, start_timeout))  # noqa: PERF401
    except BaseException:
        for accelerator in made:
            accelerator.close()
        driver.end()
        raise
    return made
