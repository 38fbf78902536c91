"""A real enclave that serves a tiny model, and a host that speaks to it by hand."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from cenacle.cut.onnx_model import OnnxModel
from cenacle.cut.tail_file import write_tail
from cenacle.enclave.channel import Failed
from cenacle.enclave.launcher import ProcessLauncher
from cenacle.enclave.sandbox import SandboxPlan, plan
from cenacle.enclave.serving_messages import Drain, Malformed, Message, Ready
from cenacle.enclave.serving_wire import Decoder, encode
from cenacle.errors import CenacleError
from tests.support.house import House, Outcome, Sealed

__all__ = ["CLASSES", "WIDTH", "Host", "ServedEnclave", "serving_plan", "tiny_tail", "weights"]

WIDTH, CLASSES = 4, 3


def weights() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The tail's secret: what a canary test looks for."""
    random = np.random.default_rng(7)
    return (
        random.normal(size=(WIDTH, CLASSES)).astype(np.float32),
        random.normal(size=CLASSES).astype(np.float32),
    )


def tiny_tail(path: Path) -> Path:
    """``y = softmax(x W + b)`` as `cenacle cut` writes a tail."""
    matrix, bias = weights()
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "W"], ["h"], name="dense/mul"),
            helper.make_node("Add", ["h", "b"], ["z"], name="dense/add"),
            helper.make_node("Softmax", ["z"], ["y"], name="softmax", axis=-1),
        ],
        "tail",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", CLASSES])],
        [numpy_helper.from_array(matrix, "W"), numpy_helper.from_array(bias, "b")],
    )
    opset = [helper.make_opsetid("", 18)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=9)
    write_tail(OnnxModel.from_proto(model), path)
    return path


def serving_plan() -> SandboxPlan:
    return plan(serving=True)


class Host:
    """The host's end of one connection, for tests: blocking, and in the order of arrival."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        connection.settimeout(30)
        self._decoder = Decoder("from-enclave", 1 << 26)
        self._found: list[Message | Malformed] = []
        ready = self.receive()
        assert isinstance(ready, Ready)
        self.ready = ready

    def send(self, *messages: Message) -> None:
        self.send_raw(b"".join(bytes(part) for m in messages for part in encode(m)))

    def send_raw(self, data: bytes) -> None:
        self._socket.sendall(data)

    def receive(self) -> Message | Malformed | None:
        """The next message; None once the enclave closed the connection."""
        while not self._found:
            data = self._socket.recv(1 << 16)
            if not data:
                return None
            self._found += self._decoder.feed(data)
        return self._found.pop(0)

    def ask(self, message: Message) -> Any:
        """Send one message and take the next answer."""
        self.send(message)
        return self.receive()

    def answers(self, count: int) -> dict[int | None, Any]:
        found = [self.receive() for _ in range(count)]
        return {one.id: one for one in found if one is not None and hasattr(one, "id")}

    def close(self) -> None:
        self._socket.close()


class ServedEnclave:
    """An enclave that was launched for a contract, and its host."""

    def __init__(self, host: Host, watcher: threading.Thread, outcome: Outcome) -> None:
        self.host, self._watcher, self.outcome = host, watcher, outcome

    def end(self, *, drain: bool = True) -> Outcome:
        """End the service and wait for what the job says."""
        if drain:
            self.host.send(Drain())
            assert self.host.receive() is None
        self.host.close()
        self._watcher.join(60)
        return self.outcome

    @classmethod
    @contextlib.contextmanager
    def launched(
        cls,
        house: House,
        digest: str,
        assets: Mapping[str, Sealed],
        *,
        out: Path | None = None,
        tickets: Path | None = None,
        resume: str | None = None,
    ) -> Iterator[ServedEnclave]:
        """Launch it and wait until it is ready; raises what it failed with before."""
        folder = Path(tempfile.mkdtemp(prefix="cenacle-"))  # short: sun_path
        outcome = Outcome(out or house.path("results"))
        files = {alias: sealed.path for alias, sealed in assets.items()}
        request = house.request(digest, files, outcome.out, resume=resume, chosen=serving_plan())
        writable = dict(request.writable) | ({"tickets": tickets} if tickets else {})
        path = folder / "serving.sock"
        with contextlib.ExitStack() as stack:
            stack.callback(shutil.rmtree, folder)
            listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            listener.bind(str(path))
            listener.listen(1)
            listener.settimeout(60)
            request = dataclasses.replace(request, serving=path, writable=writable)
            enclave = stack.enter_context(ProcessLauncher().launch(request))

            def watch() -> None:
                try:
                    for message in enclave.messages():
                        outcome.messages.append(message)
                        if isinstance(message, Failed):
                            outcome.error = message.to_error()
                    if outcome.error is None:
                        enclave.wait(30)
                except CenacleError as error:
                    outcome.error = error
                finally:  # nobody will connect any more
                    with contextlib.suppress(OSError):
                        listener.shutdown(socket.SHUT_RDWR)

            watcher = threading.Thread(target=watch)
            watcher.start()
            stack.callback(watcher.join)
            stack.callback(enclave.kill)
            try:
                connection, _ = listener.accept()
            except OSError:
                watcher.join()
                assert outcome.error is not None
                raise outcome.error from None
            with connection:
                yield cls(Host(connection), watcher, outcome)
