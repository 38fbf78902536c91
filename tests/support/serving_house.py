"""A cut model in a house of tests: its parts, sealed and agreed, and ``cenacle serve`` for it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from cenacle.cut import OnnxModel, cut
from cenacle.cut.tail_file import write_tail
from cenacle.documents.contract import Contract
from cenacle.enclave.sandbox import plan
from tests.support.house import House, Sealed

__all__ = ["Model", "Service", "agree_to_serve", "make_model", "seal_tail"]

WIDTH, HIDDEN, CLASSES = 8, 16, 4


@dataclass(frozen=True)
class Model:
    """A small model, whole and cut.

    Attributes:
        weights: of the tail's product, ``[HIDDEN, CLASSES]``.
    """

    front: Path
    front_digest: str
    tail: Path
    whole: Path
    public: NDArray[np.float32]
    weights: NDArray[np.float32]

    def outputs(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """What the whole model gives."""
        return np.asarray(np.maximum(x @ self.public, 0) @ self.weights)


def make_model(folder: Path, seed: int = 7) -> Model:
    """``relu(x @ public) @ secret``, cut after the first product."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    public = rng.normal(size=(WIDTH, HIDDEN)).astype(np.float32)
    secret = rng.normal(size=(HIDDEN, CLASSES)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"], name="body/product"),
        helper.make_node("Relu", ["a"], ["b"], name="body/relu"),
        helper.make_node("MatMul", ["b", "w2"], ["y"], name="head/product"),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", CLASSES])],
        [numpy_helper.from_array(public, "w1"), numpy_helper.from_array(secret, "w2")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    model = OnnxModel.from_proto(proto)
    parts = cut(model, "body/relu")
    front = folder / "front.onnx"
    digest = parts.front.save(front)
    tail, whole = folder / "tail.safetensors", folder / "whole.onnx"
    write_tail(parts.tail, tail)
    model.save(whole)
    return Model(front, digest, tail, whole, public, secret)


def seal_tail(house: House, model: Model, **terms: Any) -> Sealed:
    """The tail, sealed by the lab as a model that may be served without tickets."""
    serving = {"outputs": {"form": "scores"}, "tickets": False}
    stated = {"recipes": [], "serving": serving, **terms}
    return house.seal("lab", model.tail, type_="model", **stated)


def agree_to_serve(
    house: House, model: Model, tail: Sealed, *, replaces: str | None = None, **job: Any
) -> str:
    """A contract that serves the tail, proposed and signed; its digest."""
    chosen: dict[str, Any] = {
        "type": "serve",
        "model": "net",
        "front": model.front_digest,
        "outputs": {"form": "scores"},
        **job,
    }
    fields: dict[str, Any] = {} if replaces is None else {"replaces": replaces}
    contract: Contract = house.contract(
        {"net": tail},
        chosen,
        {"usage": "metrics"},
        enclave=house.enclave(plan(serving=True)),
        **fields,
    )
    return house.agree(contract)


class Service:
    """``cenacle serve`` as a process of its own; killed at the end of the block."""

    def __init__(
        self, house: House, digest: str, model: Model, tail: Path, out: Path, *options: object
    ) -> None:
        self.out = out
        self.events: list[dict[str, Any]] = []
        command = [
            *(sys.executable, "-m", "cenacle", "serve", digest, "--data", tail),
            *("--front", model.front, "--out", out, "--listen", "127.0.0.1:0", "--json"),
            *("--threads", "1", "--front-threads", "1", *options),
        ]
        self.process = subprocess.Popen(
            [str(part) for part in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "CENACLE_HOME": str(house.operator.folder)},
            text=True,
        )

    def until(self, event: str) -> dict[str, Any]:
        """The next event of this name; fails if the process ends before."""
        assert self.process.stdout is not None
        for text in self.process.stdout:
            found: dict[str, Any] = json.loads(text)
            self.events.append(found)
            if found.get("event") == event:
                return found
        self.process.wait(30)
        assert self.process.stderr is not None
        raise AssertionError((self.events[-3:], self.process.stderr.read()[-2000:]))

    def stop(self) -> int:
        """Have it drain; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.stdout is not None
        self.events += [json.loads(text) for text in self.process.stdout]
        return self.process.wait(60)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()
