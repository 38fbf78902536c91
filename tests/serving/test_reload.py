"""From one contract to the next: what is served when enclaves begin, end, die or never come."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cenacle.cut.specs import TensorSpec
from cenacle.enclave.channel import Failed, Finished, Message, Stage
from cenacle.enclave.launcher import RunningEnclave
from cenacle.enclave.serving_messages import Drain, Infer, Ready, Result
from cenacle.enclave.serving_wire import Decoder, encode
from cenacle.errors import EnclaveError, RefusedError, UnavailableError, VerificationError
from cenacle.serving.app import ServingApp
from cenacle.serving.open_inference import InferRequest
from cenacle.serving.reload import Plan, Switch
from tests.support.serving_world import served

X = {"x": np.ones((1, 4), np.float32)}


class Enclave(RunningEnclave):
    """An enclave played by a thread: answers with its own number, and ends as it is told."""

    def __init__(self, path: Path, contract: str, number: float, *, mute: bool = False) -> None:
        self.contract, self.number = contract, number
        self.told: queue.Queue[Message | Exception] = queue.Queue()
        self.answered = 0
        self.killed = False
        self.hold = threading.Event()
        self.hold.set()
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self.told.put(Stage("starting"))
        if not mute:
            threading.Thread(target=self._serve, daemon=True).start()

    @property
    def pid(self) -> int:
        return 0

    def _send(self, message: Any) -> None:
        self._socket.sendall(b"".join(bytes(part) for part in encode(message)))

    def _serve(self) -> None:
        spec = (TensorSpec("x", "F32", (None, 4)),)
        outputs = (TensorSpec("y", "F32", (None, 4)),)
        decoder = Decoder("to-enclave", 1 << 20)
        try:
            self._send(Ready(self.contract, spec, outputs, b"", b"", 8, 1 << 20, 64))
            while data := self._socket.recv(1 << 16):
                for message in decoder.feed(data):
                    if isinstance(message, Infer):
                        self.hold.wait(20)
                        self.answered += 1
                        self._send(
                            Result(
                                message.id, {"y": message.tensors["x"] * np.float32(self.number)}
                            )
                        )
                    elif isinstance(message, Drain):
                        self._socket.close()
                        self.told.put(Finished(()))
                        return
        except OSError:
            pass
        finally:
            self._socket.close()

    def messages(self) -> Iterator[Message]:
        while True:
            message = self.told.get()
            if isinstance(message, Exception):
                raise message
            yield message
            if isinstance(message, Finished | Failed):
                return

    def wait(self, timeout: float | None = None) -> Finished:
        del timeout
        return Finished(())

    def kill(self) -> None:
        self.killed = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self.told.put(EnclaveError("the enclave was killed"))

    def die(self) -> None:
        self.kill()


class Scene:
    """An application, its switch, and the enclaves that were launched."""

    def __init__(self) -> None:
        self.app = ServingApp()
        self.words: list[str] = []
        self.switch = Switch(self.app, self.words.append)
        self.enclaves: list[Enclave] = []

    def plan(
        self, number: int, launch: Callable[[Path, str], RunningEnclave] | None = None
    ) -> Plan:
        contract = "sha256:" + f"{number:02x}" * 32

        def begin(path: Path) -> RunningEnclave:
            if launch is not None:
                return launch(path, contract)
            self.enclaves.append(Enclave(path, contract, float(number)))
            return self.enclaves[-1]

        return Plan(served(contract), None, begin)

    async def ask(self) -> float:
        current = self.app.current
        assert current is not None
        with current.entered():
            outputs = await current.infer(InferRequest(X))
        return float(outputs["y"][0, 0])


def _run(scene: Callable[[Scene], Coroutine[Any, Any, None]]) -> None:
    async def scenes() -> None:
        await asyncio.wait_for(scene(Scene()), 30)

    asyncio.run(scenes())


def test_requests_go_to_the_new_enclave_and_the_old_one_finishes_its_own() -> None:
    async def play(scene: Scene) -> None:
        await scene.switch.serve(scene.plan(1))
        assert await scene.ask() == 1
        old = scene.enclaves[0]
        old.hold.clear()
        held = asyncio.create_task(scene.ask())
        await asyncio.sleep(0.05)
        await scene.switch.serve(scene.plan(2))
        assert await scene.ask() == 2
        assert not held.done()
        assert old.told.empty()
        old.hold.set()
        assert await held == 1
        await scene.switch.drained()
        assert await scene.ask() == 2
        assert scene.switch.served is not None
        assert scene.switch.served.contract.endswith("02")
        await scene.switch.stop()
        assert scene.app.current is None
        assert not any(enclave.killed for enclave in scene.enclaves)
        assert scene.words == ["starting", "starting"]

    _run(play)


def _refused(path: Path, contract: str) -> RunningEnclave:
    raise UnavailableError("no sandbox")


def _failing(path: Path, contract: str) -> RunningEnclave:
    made = Enclave(path, contract, 0.0, mute=True)
    made._socket.close()
    made.told.put(Failed(RefusedError("the broker refuses").to_dict()))
    return made


def _other_contract(path: Path, contract: str) -> RunningEnclave:
    return Enclave(path, "sha256:" + "ff" * 32, 0.0)


def _vanishing(path: Path, contract: str) -> RunningEnclave:
    made = Enclave(path, contract, 0.0, mute=True)
    made.kill()
    return made


@pytest.mark.parametrize(
    ("launch", "error"),
    [
        (_refused, UnavailableError),
        (_failing, RefusedError),
        (_other_contract, VerificationError),
        (_vanishing, EnclaveError),
    ],
)
def test_what_was_served_is_served_on_if_the_new_enclave_does_not_come(
    launch: Callable[[Path, str], RunningEnclave], error: type[Exception]
) -> None:
    async def play(scene: Scene) -> None:
        await scene.switch.serve(scene.plan(1))
        with pytest.raises(error):
            await scene.switch.serve(scene.plan(2, launch))
        assert await scene.ask() == 1
        assert not scene.switch.failed.done()
        await scene.switch.serve(scene.plan(3))
        assert await scene.ask() == 3
        await scene.switch.stop()

    _run(play)


def test_the_death_of_the_enclave_is_told_and_nothing_is_served() -> None:
    async def play(scene: Scene) -> None:
        await scene.switch.serve(scene.plan(1))
        scene.enclaves[0].die()
        with pytest.raises(EnclaveError, match="killed"):
            await scene.switch.failed
        assert scene.app.current is None
        assert scene.switch.served is None
        await scene.switch.stop()

    _run(play)


def test_the_end_of_the_job_unasked_is_told() -> None:
    async def play(scene: Scene) -> None:
        await scene.switch.serve(scene.plan(1))
        scene.enclaves[0].told.put(Finished(()))
        with pytest.raises(EnclaveError, match="unasked"):
            await scene.switch.failed

    _run(play)


def test_an_old_enclave_that_dies_while_it_drains_does_not_stop_the_new_one() -> None:
    async def play(scene: Scene) -> None:
        await scene.switch.serve(scene.plan(1))
        old = scene.enclaves[0]
        old.hold.clear()
        held = asyncio.create_task(scene.ask())
        await asyncio.sleep(0.05)
        await scene.switch.serve(scene.plan(2))
        old.die()
        with pytest.raises(Exception, match="gone"):
            await held
        with pytest.raises(EnclaveError, match="killed"):
            await scene.switch.drained()
        assert await scene.ask() == 2
        assert not scene.switch.failed.done()
        old.hold.set()
        await scene.switch.stop()

    _run(play)


def test_everything_can_be_ended_at_once() -> None:
    async def play(scene: Scene) -> None:
        await scene.switch.serve(scene.plan(1))
        scene.enclaves[0].hold.clear()
        held = asyncio.create_task(scene.ask())
        await asyncio.sleep(0.05)
        stopping = asyncio.create_task(scene.switch.stop())
        await asyncio.sleep(0.05)
        await scene.switch.kill()
        with pytest.raises(Exception, match="gone"):
            await held
        with pytest.raises(EnclaveError):
            await stopping
        assert scene.enclaves[0].killed
        scene.enclaves[0].hold.set()

    _run(play)
