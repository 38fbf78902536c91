"""A model that is served from an enclave and, by the same stack, in plain from the host."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from cenacle.broker.client import BrokerClient
from cenacle.broker.http import bind
from cenacle.broker.identity import BrokerKeys
from cenacle.broker.server import serving
from cenacle.broker.service import Broker
from cenacle.broker.store import Store
from cenacle.broker.tls import TlsFiles, ensure_certificate
from cenacle.cli.enclave import measure_here
from cenacle.cli.home import Home
from cenacle.cli.run import Choice
from cenacle.cli.seal import seal_asset
from cenacle.cli.serve_operator import Operator
from cenacle.cut import OnnxModel, cut
from cenacle.cut.tail_file import write_tail
from cenacle.documents.contract import Contract
from cenacle.documents.serving import ServeJob
from cenacle.documents.terms import Terms
from cenacle.enclave.serving_messages import Ready
from cenacle.enclave.tensor_bytes import Tensors
from cenacle.serving.answers import Limits
from cenacle.serving.app import ServingApp
from cenacle.serving.backend import Tail
from cenacle.serving.deployment import Deployment, Served
from cenacle.serving.front import Front
from cenacle.serving.reload import Switch
from cenacle.serving.server import Listening

__all__ = ["INPUTS", "World", "opened", "serve_both"]

INPUTS: Final = 784
_HIDDEN: Final = 2048
_CLASSES: Final = 10
_SERVING: Final = {"outputs": {"form": "scores"}, "tickets": False}
_TERMS: Final = {
    "protection": "simulated",
    "recipes": [],
    "privacy": "unbounded",
    "recipients": ["vendor"],
    "outputs": ["metrics"],
    "purposes": ["benchmark"],
    "uses": 1000,
    "expires": "2099-12-31",
    "serving": _SERVING,
}


@dataclass(frozen=True)
class World:
    """A contract that waits to be served.

    Attributes:
        parameters: of the front and of the tail.
    """

    operator: Operator
    contract: str
    whole: Path
    front: Path
    files: TlsFiles
    out: Path
    parameters: tuple[int, int]


class _Rest(Tail):
    """The enclave's place in a service that runs the whole model outside: hands through."""

    def __init__(self, contract: str, whole: Front, max_batch: int) -> None:
        specs = whole.outputs
        self._ready = Ready(contract, specs, specs, b"", b"", max_batch, 1 << 26, 1024)

    @property
    def ready(self) -> Ready:
        return self._ready

    @property
    def waiting(self) -> int:
        return 0

    async def infer(self, tensors: Tensors, _ticket: Mapping[str, Any] | None = None) -> Tensors:
        return tensors

    async def sealed(self, query: bytes) -> bytes:
        raise NotImplementedError

    async def attest(self, nonce: bytes) -> bytes:
        raise NotImplementedError

    async def drain(self) -> None:
        return


def _model(folder: Path) -> tuple[Path, Path, Path, str, tuple[int, int]]:
    """A perceptron of 784, three times 2048, and 10 units; cut after the first product."""
    rng = np.random.default_rng(0)
    sizes = [INPUTS, _HIDDEN, _HIDDEN, _HIDDEN, _CLASSES]
    nodes, weights, value = [], [], "x"
    for index, (rows, columns) in enumerate(itertools.pairwise(sizes)):
        scaled = rng.normal(size=(rows, columns)) / np.sqrt(rows)
        weights.append(numpy_helper.from_array(scaled.astype(np.float32), f"w{index}"))
        last = index == len(sizes) - 2
        product = "y" if last else f"p{index}"
        nodes.append(
            helper.make_node("MatMul", [value, f"w{index}"], [product], name=f"l{index}/product")
        )
        if not last:
            value = f"r{index}"
            nodes.append(helper.make_node("Relu", [product], [value], name=f"l{index}/relu"))
    graph = helper.make_graph(
        nodes,
        "perceptron",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", INPUTS])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", _CLASSES])],
        weights,
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    model = OnnxModel.from_proto(proto)
    parts = cut(model, "l0/relu")
    whole, front, tail = folder / "whole.onnx", folder / "front.onnx", folder / "tail.safetensors"
    model.save(whole)
    digest = parts.front.save(front)
    write_tail(parts.tail, tail)
    front_size = INPUTS * _HIDDEN
    return (
        whole,
        front,
        tail,
        digest,
        (front_size, sum(w.dims[0] * w.dims[1] for w in weights) - front_size),
    )


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[World]:
    """A broker, a vendor, a sealed tail and a contract that serves it."""
    keys = BrokerKeys.open(folder / "broker", "benchmark/broker")
    files = ensure_certificate(folder / "broker")
    home = Home(folder / "home")
    whole, front, tail, digest, sizes = _model(folder)
    with Store.open(folder / "broker" / "broker.db") as store:
        broker = Broker.development(store, keys)
        with serving(broker, files), BrokerClient(broker.identity) as client:
            home.pin(broker.identity)
            vendor = home.new_party("vendor")
            token = broker.owner_token()
            assert token is not None
            client.register(vendor.envelope, token)
            sealed = folder / "tail.sealed"
            asset = seal_asset(
                vendor, client, tail, sealed, Terms.from_fields(_TERMS), name="net", type_="model"
            ).asset
            job = {
                "type": "serve",
                "model": "net",
                "front": digest,
                "outputs": {"form": "scores"},
                "max_batch": 64,
            }
            contract = Contract.from_fields(
                {
                    "name": "serving",
                    "purpose": "benchmark",
                    "broker": broker.identity.digest,
                    "parties": {"vendor": vendor.party.digest},
                    "assets": {"net": {"digest": asset.digest, "owner": "vendor"}},
                    "job": job,
                    "enclave": measure_here(home, None, serving=True),
                    "outputs": [{"name": "usage", "kind": "metrics", "recipient": "vendor"}],
                    "approval": "vendor",
                    "expires": "2099-12-31",
                }
            )
            agreed = client.propose(contract, vendor.signing_key)
            client.sign(agreed, vendor.signing_key)
            choice = Choice("process", None, None, (), "contract", None, None)
            operator = Operator(
                home,
                client,
                [sealed],
                [front],
                folder / "out",
                None,
                "contract",
                choice,
                None,
                None,
                Limits(),
            )
            yield World(operator, agreed, whole, front, files, folder / "out", sizes)


@contextlib.asynccontextmanager
async def serve_both(world: World) -> AsyncIterator[dict[str, int]]:
    """Ports of ``plain`` (the whole model in the host) and ``enclave``, over HTTPS both."""
    plan = await asyncio.to_thread(world.operator.plan, world.contract, world.out, resume=False)
    apps = {"plain": ServingApp(), "enclave": ServingApp()}
    switch = Switch(apps["enclave"], lambda _: None)
    await switch.serve(plan)
    job: ServeJob = plan.served.job
    whole = Front(world.whole.read_bytes())
    served = Served(world.contract, job, plan.served.view)
    rest = _Rest(world.contract, whole, job.max_batch)
    apps["plain"].current = Deployment(served, rest, whole, apps["plain"].metrics)
    servers = {
        name: Listening(app, bind("127.0.0.1", 0, "a benchmark"), world.files, Limits())
        for name, app in apps.items()
    }
    tasks = [asyncio.create_task(server.run_until_told()) for server in servers.values()]
    try:
        yield {name: server.port for name, server in servers.items()}
    finally:
        for server in servers.values():
            server.should_exit = True
        await asyncio.gather(*tasks)
        await switch.stop()
