"""The helper that joins a Ray cluster: ``python -m cenacle.accelerators.ray_driver ...``.

It is not part of the enclave and holds nothing of it. It has actors placed, connects to each,
hands the connections to its parent, and lives until the parent has no use for them.
"""

from __future__ import annotations

import contextlib
import hmac
import importlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
from typing import Any, Final

from cenacle.accelerators.child import worker_environment
from cenacle.accelerators.confine import die_with
from cenacle.accelerators.wire import clean, frame, read_exactly

__all__ = ["Host"]

_TOKEN_BYTES: Final = 32
_WORKER: Final = (sys.executable, "-s", "-P", "-B", "-m", "cenacle.accelerators.remote_worker")


class Host:
    """The actor: waits for one connection that knows the token, and starts a worker on it.

    The worker is a process of its own, which confines itself as on the enclave's machine.
    """

    def __init__(self, token: bytes, device: str, threads: int, timeout: float) -> None:
        self._token = token
        self._arguments = [device, str(threads)]
        self._environment = worker_environment(threads, device)
        self._listener = socket.create_server(("", 0))
        self._listener.settimeout(timeout)
        threading.Thread(target=self._serve, daemon=True).start()

    def where(self) -> list[Any]:
        """The node's address and the port."""
        ray: Any = importlib.import_module("ray")
        return [ray.util.get_node_ip_address(), self._listener.getsockname()[1]]

    def _serve(self) -> None:
        connection = self._accept()
        with connection:
            connection.settimeout(None)
            process = subprocess.Popen(
                [*_WORKER, str(connection.fileno()), str(os.getpid()), *self._arguments],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(connection.fileno(),),
                cwd="/",
            )
        # This thread made it and must outlive it, or the kernel ends it (PR_SET_PDEATHSIG).
        process.wait()

    def _accept(self) -> socket.socket:
        with self._listener:
            while True:
                connection, _ = self._listener.accept()
                said = bytearray(_TOKEN_BYTES)
                with contextlib.suppress(OSError, EOFError):
                    connection.settimeout(10)
                    read_exactly(connection, memoryview(said))
                    if hmac.compare_digest(bytes(said), self._token):
                        return connection
                connection.close()


def _place(ray: Any, config: dict[str, Any], parent: socket.socket) -> list[Any]:
    actor = ray.remote(Host).options(
        num_cpus=config["threads"],
        num_gpus=1 if config["device"] == "cuda" else 0,
        resources=config["resources"],
        scheduling_strategy="SPREAD",
    )
    token = secrets.token_bytes(_TOKEN_BYTES)
    timeout = config["timeout"]
    arguments = (token, config["device"], config["threads"], timeout)
    actors = [actor.remote(*arguments) for _ in range(config["workers"])]
    for one in actors:
        host, port = ray.get(one.where.remote(), timeout=timeout)
        with socket.create_connection((host, port), timeout=timeout) as connection:
            connection.sendall(token)
            connection.settimeout(None)
            message = frame({"node": clean(str(host))})
            socket.send_fds(parent, [message], [connection.fileno()])
    return actors


def _main(arguments: list[str]) -> int:
    parent = socket.socket(fileno=int(arguments[0]))
    die_with(int(arguments[1]))
    config = json.loads(arguments[2])
    try:
        ray: Any = importlib.import_module("ray")  # only this process ever imports it
        address = None if config["address"] == "local" else config["address"]
        ray.init(address=address, log_to_driver=False, include_dashboard=False)
    except Exception as error:
        parent.sendall(frame({"error": clean(f"{type(error).__name__}: {error}")}))
        return 1
    try:
        actors = _place(ray, config, parent)
        parent.recv(1)  # until the enclave shuts its side
        for actor in actors:
            ray.kill(actor)
    except Exception as error:
        with contextlib.suppress(OSError):
            parent.sendall(frame({"error": clean(f"{type(error).__name__}: {error}")}))
        return 1
    finally:
        ray.shutdown()
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the enclave decides when this ends
    sys.exit(_main(sys.argv[1:]))
