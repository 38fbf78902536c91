"""Batches of the public front, requests under tickets, and what belongs together."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from cenacle.errors import DataError, EnclaveError, InputError, VerificationError
from cenacle.serving.backend import QueryError
from cenacle.serving.batching import Arrays, Batcher
from cenacle.serving.deployment import Deployment
from cenacle.serving.front import Front, front_digest
from cenacle.serving.metrics import Metrics
from cenacle.serving.open_inference import InferRequest
from tests.support.serving_world import FakeTail, served


def _rows(*values: float) -> dict[str, Any]:
    return {"x": np.array(values, np.float32)[:, None]}


async def _same(arrays: Arrays) -> Arrays:
    return arrays


class Gate:
    """A step that waits, and remembers what it was given."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []
        self.open = asyncio.Event()

    async def __call__(self, arrays: Arrays) -> Arrays:
        self.seen.append(arrays["x"][:, 0].tolist())
        await self.open.wait()
        if 13.0 in self.seen[-1]:
            raise InputError("thirteen")
        return arrays


def test_what_waits_is_joined_and_taken_apart() -> None:
    async def scene() -> None:
        gate, sizes = Gate(), list[int]()
        batcher = Batcher(gate, _same, 4, sizes.append)
        sent = [(1.0,), (2.0, 3.0), (4.0,), (5.0, 6.0), (7.0,)]
        asked = [
            asyncio.create_task(batcher.submit(_rows(*values), len(values))) for values in sent
        ]
        while not gate.seen:
            await asyncio.sleep(0)
        for _ in range(5):
            await asyncio.sleep(0)
        gate.open.set()
        found = [(await task)["x"][:, 0].tolist() for task in asked]
        assert found == [list(values) for values in sent]
        assert gate.seen == [[1, 2, 3, 4], [5, 6, 7]]
        assert sizes == [4, 3]

    asyncio.run(scene())


def test_requests_of_other_forms_are_not_joined() -> None:
    async def scene() -> None:
        gate = Gate()
        batcher = Batcher(gate, _same, 8)
        forms = [
            _rows(1.0),
            _rows(2.0),
            {"x": np.zeros((1, 2), np.float32)},
            {"x": np.zeros((1, 1))},
            _rows(3.0),
        ]
        asked = [asyncio.create_task(batcher.submit(form, 1)) for form in forms]
        while not gate.seen:
            await asyncio.sleep(0)
        gate.open.set()
        found = [await task for task in asked]
        for form, outputs in zip(forms, found, strict=True):
            np.testing.assert_array_equal(outputs["x"], form["x"])
        assert gate.seen[0] == [1, 2, 3]
        assert len(gate.seen) == 3

    asyncio.run(scene())


@pytest.mark.parametrize("step", ["front", "tail"])
def test_one_request_that_fails_fails_alone(step: str) -> None:
    async def scene() -> None:
        gate = Gate()
        batcher = Batcher(gate, _same, 8) if step == "front" else Batcher(_same, gate, 8)
        asked = [
            asyncio.create_task(batcher.submit(_rows(value), 1)) for value in (0.0, 1.0, 13.0, 2.0)
        ]
        while not gate.seen:
            await asyncio.sleep(0)
        gate.open.set()
        found = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(one) for one in found] == [dict, dict, InputError, dict]

    asyncio.run(scene())


def test_a_request_that_was_given_up_harms_nobody() -> None:
    async def scene() -> None:
        gate = Gate()
        batcher = Batcher(gate, _same, 8)
        asked = [asyncio.create_task(batcher.submit(_rows(float(i)), 1)) for i in range(3)]
        while not gate.seen:
            await asyncio.sleep(0)
        asked[1].cancel()
        gate.open.set()
        assert (await asked[2])["x"].tolist() == [[2.0]]
        assert (await batcher.submit(_rows(9.0), 1))["x"].tolist() == [[9.0]]

    asyncio.run(scene())


# ---------------------------------------------------------------------------- the front


def _front_bytes(external: bool = False, rows: str | int = "batch") -> bytes:
    weight = numpy_helper.from_array(np.full((2, 4), 3.0, np.float32), "w")
    if external:
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        weight.external_data.add(key="location", value="../../../../etc/passwd")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["i", "w"], ["x"])],
        "front",
        [helper.make_tensor_value_info("i", TensorProto.FLOAT, [rows, 2])],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, 4])],
        [weight],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return bytes(proto.SerializeToString())


@pytest.fixture(scope="module")
def front() -> Front:
    return Front(_front_bytes(), threads=1)


def test_a_front_says_what_it_takes_and_gives(front: Front) -> None:
    assert [(s.name, s.dtype, s.shape) for s in front.inputs] == [("i", "F32", (None, 2))]
    assert [(s.name, s.dtype, s.shape) for s in front.outputs] == [("x", "F32", (None, 4))]
    assert front.joinable
    found = front.run({"i": np.ones((3, 2), np.float32)})
    assert found["x"].tolist() == [[6.0] * 4] * 3
    with pytest.raises(InputError, match="fails on this input"):
        front.run({"i": np.ones((3, 3), np.float32)})
    assert not Front(_front_bytes(rows=1), threads=1).joinable


@pytest.mark.parametrize(
    "data", [b"", b"\x00" * 100, b"ORTM" + bytes(60), _front_bytes(external=True)]
)
def test_a_front_that_is_no_graph_or_reads_files_is_refused(data: bytes) -> None:
    with pytest.raises(DataError, match="a front cannot be run"):
        Front(data, threads=1)


def test_a_front_is_named_by_its_digest(tmp_path: Path) -> None:
    path = tmp_path / "front.onnx"
    path.write_bytes(_front_bytes())
    assert Front.open(path, front_digest(path)).joinable
    with pytest.raises(VerificationError, match="not the one that the contract names"):
        Front.open(path, "sha256:" + "00" * 32)


def _deployed(front: Front | None, tail: FakeTail, **job: Any) -> Deployment:
    return Deployment(served(front="sha256:" + "00" * 32, **job), tail, front, Metrics())


def _request(value: float, rows: int = 1, ticket: str | None = None) -> InferRequest:
    return InferRequest({"i": np.full((rows, 2), value, np.float32)}, ticket=ticket)


def test_the_front_runs_before_the_tail_in_batches(front: Front) -> None:
    async def scene() -> None:
        tail = FakeTail(max_batch=8)
        deployed = _deployed(front, tail)
        assert [spec.name for spec in deployed.inputs] == ["i"]
        asked = [deployed.infer(_request(float(value))) for value in range(20)]
        found = await asyncio.gather(*asked)
        for value, outputs in enumerate(found):
            assert outputs["y"].tolist() == [[12.0 * value] * 4]
        assert len(tail.sent) < 20
        assert max(len(sent["x"]) for sent, _ in tail.sent) > 1

    asyncio.run(scene())


def test_under_tickets_each_request_runs_alone_and_the_same_again(front: Front) -> None:
    async def scene() -> None:
        tail = FakeTail(max_batch=8)
        deployed = _deployed(front, tail, tickets="lab")
        for _ in range(2):
            asked = [
                deployed.infer(_request(value / 3, 2, f'{{"n": {value}}}')) for value in range(6)
            ]
            await asyncio.gather(*asked)
        seen: dict[int, list[bytes]] = {}
        for sent, ticket in tail.sent:
            assert ticket is not None
            assert sent["x"].shape == (2, 4)
            seen.setdefault(ticket["n"], []).append(sent["x"].tobytes())
        assert sorted(seen) == list(range(6))
        assert all(first == again for first, again in seen.values())
        with pytest.raises(QueryError) as caught:
            await deployed.infer(_request(1.0))
        assert caught.value.code == "ticket"

    asyncio.run(scene())


def test_enclave_front_and_contract_must_belong_together() -> None:
    async def scene() -> None:
        other = FakeTail(contract="sha256:" + "00" * 32)
        with pytest.raises(VerificationError, match="another contract"):
            Deployment(served(), other, None)
        with pytest.raises(VerificationError, match="not what the enclave takes"):
            _deployed(Front(_front_bytes(rows=1), threads=1), FakeTail())

    asyncio.run(scene())


def test_a_deployment_ends_after_its_requests(front: Front) -> None:
    async def scene() -> None:
        tail = FakeTail()
        deployed = _deployed(front, tail)
        tail.gate = asyncio.Event()
        with deployed.entered():
            asked = asyncio.create_task(deployed.infer(_request(1.0)))
            ending = asyncio.create_task(deployed.end())
            while not tail.sent:
                await asyncio.sleep(0.001)
            assert not tail.drained
            tail.gate.set()
            await asked
        await ending
        assert tail.drained

    asyncio.run(scene())


@pytest.mark.parametrize("outputs", [{}, {"y": np.zeros((1, 3), np.float16)}])
def test_the_enclaves_answer_must_be_what_it_announced(
    front: Front, outputs: Mapping[str, Any]
) -> None:
    async def scene() -> None:
        tail = FakeTail()
        tail.act = lambda _: dict(outputs)
        with pytest.raises(QueryError) as caught:
            await _deployed(front, tail).infer(_request(1.0))
        assert isinstance(caught.value.error, EnclaveError)

    asyncio.run(scene())
