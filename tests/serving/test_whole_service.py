"""Whole services with real enclaves: canaries, tickets, reload, death.

The operator of a server finds nothing of a sealed query, and no parameter, anywhere: values that
nothing else has are planted in a query, in what crosses, in the answer and in the model's
confidential part. After queries to a real enclave, through the real server, they are looked for
in everything that the operator can see: each file, each stream, the metrics, the bytes on the
unix socket to the enclave and those on the wire to the client.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from typer.testing import CliRunner

from cenacle.broker.http import bind
from cenacle.broker.tls import client_context
from cenacle.cli.main import app
from cenacle.cli.run import Choice
from cenacle.cli.serve_operator import Operator
from cenacle.crypto import SigningKey
from cenacle.documents.base import b64
from cenacle.documents.dsse import Envelope
from cenacle.documents.ticket import Ticket, new_request, new_serial
from cenacle.errors import CenacleError, InputError, RefusedError
from cenacle.serving.answers import Limits
from cenacle.serving.app import ServingApp
from cenacle.serving.client import Client, SealedClient
from cenacle.serving.open_inference import encode_request
from cenacle.serving.reload import Plan, Switch
from cenacle.serving.server import Listening
from tests.support.house import House
from tests.support.serving_house import Model, Service, agree_to_serve, make_model, seal_tail
from tests.support.serving_world import Loop

pytestmark = pytest.mark.processes

X = np.linspace(271.828125, 314.15625, 8, dtype=np.float32)[None, :]


class Recorder:
    """A relay in front of a socket that keeps all that passes, both ways."""

    def __init__(self, listener: socket.socket, connect: Any) -> None:
        self.seen = bytearray()
        self._listener = listener
        self._connect = connect
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = self._connect()
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pass, args=(source, sink), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                self.seen += data
                sink.sendall(data)
        except OSError:
            pass
        finally:
            for end in (source, sink):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()

    def close(self) -> None:
        self._listener.close()


@dataclass
class Scene:
    """A service whose every byte is on record."""

    house: House
    model: Model
    digest: str
    url: str = ""
    out: Path = Path()
    enclave_wire: Recorder | None = None
    wire: Recorder | None = None
    words: list[str] = field(default_factory=list)


def _unix(path: Path) -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    made.connect(str(path))
    return made


def _watched(scene: Scene, plan: Plan) -> Plan:
    """The plan, with a recorder between the enclave and the server."""

    def launch(server: Path) -> Any:
        place = server.with_name("r")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(place))
        listener.listen(1)
        scene.enclave_wire = Recorder(listener, lambda: _unix(server))
        return plan.launch(place)

    return Plan(plan.served, plan.front, launch, plan.threads, plan.answer_s)


@pytest.fixture(scope="module")
def scene(house: House) -> Iterator[Scene]:
    model = make_model(house.folder / "lab" / "model")
    tail = seal_tail(house, model)
    made = Scene(house, model, agree_to_serve(house, model, tail))
    made.out = house.folder / "operator" / "out"
    choice = Choice("process", None, None, (), "contract", None, None)
    operator = Operator(
        house.operator,
        house.client,
        [tail.path],
        [model.front],
        made.out,
        None,
        "contract",
        choice,
        1,
        1,
        Limits(),
    )
    loop = Loop()

    async def begin() -> tuple[Switch, Listening, Any]:
        service = ServingApp()
        switch = Switch(service, made.words.append)
        plan = await asyncio.to_thread(operator.plan, made.digest, made.out, resume=False)
        await switch.serve(_watched(made, plan))
        server = Listening(service, bind("127.0.0.1", 0, "a test"), None, Limits())
        return switch, server, asyncio.create_task(server.run_until_told())

    switch, server, task = loop.run(begin(), 120)
    made.wire = Recorder(
        socket.create_server(("127.0.0.1", 0)),
        lambda: socket.create_connection(("127.0.0.1", server.port)),
    )
    made.url = f"http://127.0.0.1:{made.wire._listener.getsockname()[1]}"
    yield made

    async def end() -> None:
        server.should_exit = True
        await task
        await switch.stop()

    try:
        loop.run(end(), 120)
        assert (made.out / "receipt.json").is_file()
    finally:
        made.wire.close()
        assert made.enclave_wire is not None
        made.enclave_wire.close()
        loop.close()


def _forms(values: np.ndarray[Any, Any]) -> Iterator[bytes]:
    """Every form in which two neighbouring values could turn up."""
    flat = values.ravel()
    for index in range(0, flat.size - 1, 2):
        pair = flat[index : index + 2]
        raw = pair.astype("<f4").tobytes()
        if not pair.all():
            continue  # zeros are everywhere
        yield raw
        yield pair.astype(">f4").tobytes()
        yield pair.astype("<f8").tobytes()
        yield raw.hex().encode()
        yield raw.hex().upper().encode()
        for shift in range(3):
            # What of base64 does not depend on the neighbours.
            yield base64.b64encode(bytes(shift) + raw)[(8 * shift + 5) // 6 + 1 : -3]
    for value in flat[flat != 0]:
        for text in (repr(float(value)), f"{value:.4f}", str(value)):
            if len(text) >= 7:
                yield text.encode()


def _found(forms: list[bytes], scene: Scene, streams: str) -> list[str]:
    assert scene.wire is not None
    assert scene.enclave_wire is not None
    places: dict[str, bytes] = {
        "the wire to the client": bytes(scene.wire.seen),
        "the wire to the enclave": bytes(scene.enclave_wire.seen),
        "the streams": streams.encode(),
        "the metrics": httpx.get(f"{scene.url}/metrics").content,
    }
    own = scene.house.folder / "lab" / "model"
    for folder, _, names in os.walk(scene.house.folder):
        for name in names:
            path = Path(folder) / name
            if path.is_file() and not path.is_relative_to(own):
                places[str(path)] = path.read_bytes()
    return [
        f"{form!r} in {place}" for place, data in places.items() for form in forms if form in data
    ]


def test_sealed_queries_leave_nothing(scene: Scene, capfd: pytest.CaptureFixture[str]) -> None:
    with SealedClient(scene.url, scene.digest, front=scene.model.front, development=True) as client:
        for _ in range(3):
            answer = client.infer({"x": X})["y"]
        np.testing.assert_allclose(answer, scene.model.outputs(X), rtol=1e-5)
        with pytest.raises(InputError, match="fails on this input"):
            client.infer({"x": np.concatenate([X, X[:, :1]], axis=1)})
    crossing = np.maximum(X @ scene.model.public, 0)
    forms = [form for values in (X, crossing, answer) for form in _forms(values)]
    assert len(forms) > 60
    assert _found(forms, scene, "".join(capfd.readouterr()) + "".join(scene.words)) == []


def test_the_example_asks_sealed(scene: Scene) -> None:
    script = Path(__file__).parents[2] / "examples" / "serving_client.py"
    certificate = scene.house.folder / "broker" / "tls.crt"  # any: this service speaks plain HTTP
    command = [sys.executable, script, scene.url, scene.digest, scene.model.front, certificate]
    done = subprocess.run(
        [*map(str, command), "--development"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    row = np.linspace(-1, 1, 8, dtype=np.float32)[None, :]
    name, values = done.stdout.split(" ", 1)
    assert name == "y"
    np.testing.assert_allclose(json.loads(values), scene.model.outputs(row), rtol=1e-5)


def test_the_command_asks_in_plain_and_sealed(scene: Scene, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"x": X.tolist()}))
    np.save(tmp_path / "x.npy", X)
    sealed = ("--sealed", "--contract", scene.digest, "--front", str(scene.model.front))
    for file, options in (
        ("x.json", ("--model", "net")),
        ("x.npy", (*sealed, "--development", "--out", str(tmp_path / "y.npz"))),
    ):
        arguments = ["infer", scene.url, "--input", str(tmp_path / file), *options, "--json"]
        done = CliRunner().invoke(app, arguments, env={"CENACLE_HOME": str(tmp_path)})
        assert done.exit_code == 0, done.stdout
        found = json.loads(done.stdout)["outputs"]["y"]
        np.testing.assert_allclose(found, scene.model.outputs(X), rtol=1e-5)
    np.testing.assert_allclose(np.load(tmp_path / "y.npz")["y"], scene.model.outputs(X), rtol=1e-5)
    arguments = ["infer", scene.url, "--input", str(tmp_path / "x.npy"), *sealed, "--json"]
    done = CliRunner().invoke(app, arguments, env={"CENACLE_HOME": str(tmp_path)})
    assert done.exit_code == 3
    assert "does not accept" in json.loads(done.stdout)["what"]


def test_the_parameters_are_nowhere_whatever_is_asked(
    scene: Scene, capfd: pytest.CaptureFixture[str]
) -> None:
    with Client(scene.url, "net") as client:
        answer = client.infer({"x": X + 1})["y"]
    # The watch sees: a query in plain is found on both wires, and in no file.
    assert scene.wire is not None
    assert scene.enclave_wire is not None
    assert (X + 1).astype("<f4").tobytes() in scene.wire.seen
    assert answer.astype("<f4").tobytes() in scene.enclave_wire.seen
    plain = [form for values in (X + 1, answer) for form in _forms(values)]
    streams = "".join(capfd.readouterr()) + "".join(scene.words)
    places = _found(plain, scene, streams)
    assert all("the wire to" in place for place in places)
    secret = [form for row in scene.model.weights for form in _forms(row)]
    secret.append(struct.pack("<4f", *scene.model.weights[0]))
    assert _found(secret, scene, streams) == []


# ---------------------------------------------------------------------------- `cenacle serve`


def _pinned(ready: dict[str, Any]) -> dict[str, Any]:
    return {"certificate": Path(ready["certificate"])}


def _children(process: int) -> list[int]:
    """Every process below this one."""
    found: list[int] = []
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *_children(child)]
    return found


@pytest.mark.slow
def test_no_request_fails_while_the_contract_is_replaced(house: House, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", seed=1)
    tail = seal_tail(house, model)
    first = agree_to_serve(house, model, tail)
    out = tmp_path / "out"
    stop = threading.Event()
    x = np.ones((2, 8), np.float32)
    wanted = model.outputs(x)
    failed: list[BaseException] = []
    answered = [0] * 4

    with Service(house, first, model, tail.path, out) as service:
        ready = service.until("ready")
        assert ready["contract"] == first

        def ask(number: int) -> None:
            try:
                with Client(ready["url"], "net", **_pinned(ready)) as client:
                    while not stop.is_set():
                        np.testing.assert_allclose(client.infer({"x": x})["y"], wanted, rtol=1e-5)
                        answered[number] += 1
            except BaseException as error:
                failed.append(error)

        def ask_once() -> None:
            # Without a second attempt: a refusal during the change would show.
            try:
                body, headers = encode_request({"x": x})
                url = f"{ready['url']}/v2/models/net/infer"
                context = client_context(Path(ready["certificate"]).read_text())
                with httpx.Client(verify=context) as client:
                    while not stop.is_set():
                        answer = client.post(url, content=body, headers=headers, timeout=60)
                        assert answer.status_code == 200, answer.text
                        answered[3] += 1
            except BaseException as error:
                failed.append(error)

        asking = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
        asking.append(threading.Thread(target=ask_once))
        for thread in asking:
            thread.start()
        service.process.send_signal(signal.SIGHUP)
        assert service.until("current")["contract"] == first
        second = agree_to_serve(house, model, tail, replaces=first, max_batch=16)
        service.process.send_signal(signal.SIGHUP)
        moved = service.until("reloaded")
        assert moved["contract"] == second
        assert Path(service.until("receipt")["receipt"]) == out / "receipt.json"
        before = sum(answered)
        while sum(answered) < before + 20 and not failed:
            time.sleep(0.01)
        with Client(ready["url"], "net", **_pinned(ready)) as client:
            assert client.metadata()["versions"] == [second]
        stop.set()
        for thread in asking:
            thread.join()
        assert failed == []
        assert all(answered)
        assert service.stop() == 0
    for receipt, digest in (
        (out / "receipt.json", first),
        (Path(moved["out"]) / "receipt.json", second),
    ):
        found = house.verify(receipt).receipt
        assert found.contract == digest
        assert found.serving is not None
        assert found.serving.queries > 0


@pytest.mark.slow
def test_tickets_are_burned_once_even_if_the_enclave_dies(house: House, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", seed=2)
    tail = seal_tail(house, model, serving={"outputs": {"form": "scores"}, "tickets": True})
    digest = agree_to_serve(house, model, tail, tickets="lab")
    out = tmp_path / "out"
    key = SigningKey.generate()
    terms = {
        "issuer": "lab",
        "contract": digest,
        "serial": new_serial(),
        "client": b64(key.verify_key.raw),
        "queries": 5,
        "not_before": "2020-01-01T00:00:00Z",
        "expires": "2099-01-01T00:00:00Z",
    }
    ticket = Envelope.sign(Ticket.from_fields(terms), house.parties["lab"].signing_key)
    paid: dict[str, Any] = {"ticket": ticket, "key": key}
    x = np.ones((2, 8), np.float32)
    lost = new_request()

    with Service(house, digest, model, tail.path, out) as service:
        ready = service.until("ready")
        unpaid = Client(ready["url"], "net", **_pinned(ready))
        with unpaid, pytest.raises(RefusedError, match="needs a ticket"):
            unpaid.infer({"x": x})
        plain = Client(ready["url"], "net", **_pinned(ready), **paid)
        sealed = SealedClient(
            ready["url"], digest, front=model.front, development=True, **_pinned(ready), **paid
        )
        with plain, sealed:
            first = plain.infer({"x": x}, request=lost)["y"]  # 2 of 5
            again = plain.infer({"x": x}, request=lost)["y"]  # nothing more
            assert first.tobytes() == again.tobytes()
            with pytest.raises(CenacleError):
                plain.infer({"x": x + 1}, request=lost)  # another input under the same name
            sealed.infer({"x": x})  # 4 of 5
            with pytest.raises(RefusedError):
                sealed.infer({"x": x})
        for child in _children(service.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        assert service.process.wait(60) == 7
        assert service.process.stdout is not None
        last = json.loads(service.process.stdout.read().splitlines()[-1])
        assert "cenacle serve ... --resume" in last["remedy"]

    with Service(house, digest, model, tail.path, out, "--resume") as service:
        ready = service.until("ready")
        plain = Client(ready["url"], "net", **_pinned(ready), **paid)
        with plain:
            assert plain.infer({"x": x}, request=lost)["y"].tobytes() == first.tobytes()
            with pytest.raises(RefusedError):
                plain.infer({"x": x})
            plain.infer({"x": x[:1]})  # 5 of 5
            with pytest.raises(RefusedError):
                plain.infer({"x": x[:1]})
        assert service.stop() == 0
    assert house.verify(out / "receipt.json").receipt.resumed == 1
