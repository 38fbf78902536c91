"""``ctx.offload``: the program's side and the agent's, over a socket, and a side that lies."""

from __future__ import annotations

import copy
import json
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="offloading needs torch (pip: cenacle[train])")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from torch import nn
from torch.nn import functional

from cenacle.accelerators import InlineAccelerator
from cenacle.accelerators.protocol import Operation
from cenacle.documents.offload import OffloadPlan
from cenacle.enclave.context import JobContext
from cenacle.enclave.frames import read_frame, send_frame
from cenacle.enclave.program_products import ProgramProducts
from cenacle.enclave.program_scheme import program_offload
from cenacle.enclave.program_wire import pack, unpack
from cenacle.enclave.rehearsal import rehearse
from cenacle.errors import EnclaveError, InputError, RefusedError
from cenacle.offload import Offload
from cenacle.training.offloading import Offloading
from cenacle.training.privacy import make_private

CANARY = "patient-0042-hiv-positive"
PLANS: dict[str, dict[str, Any]] = {
    "measured": {},
    "lowrank": {"options": {"ranks": 1, "guard": 1.0}},
    "permuted": {},
    "masked-training": {},
}


def _plan(scheme: str, **fields: Any) -> Any:
    plan = {"scheme": scheme, "accelerators": {"count": 2}, **PLANS.get(scheme, {}), **fields}
    return TypeAdapter(OffloadPlan).validate_python(plan)


def _offloading(
    scheme: str, kind: type[InlineAccelerator] = InlineAccelerator, **fields: Any
) -> Offloading:
    members = [kind("one"), InlineAccelerator("two")]
    kinds = {one.name: "process" for one in members}
    return Offloading(_plan(scheme, **fields), members, kinds, secret="aa")


class Link:
    """An agent that answers in a thread, and what a program would be given."""

    def __init__(self, offloading: Offloading) -> None:
        self.offloading = offloading
        self._ours, self._theirs = socket.socketpair()
        self.error: EnclaveError | None = None
        self._products = ProgramProducts(offloading)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        told = {
            "plan": offloading.plan.model_dump(mode="json"),
            "secret": offloading.program_secret,
        }
        self.offload: Callable[[nn.Module], Offload] = program_offload(
            json.loads(json.dumps(told)), self.ask
        )

    def _serve(self) -> None:
        try:
            while True:
                header, payload = read_frame(self._ours)
                send_frame(self._ours, *self._products.answer(header, payload))
        except EnclaveError as error:
            self.error = error
        finally:
            self._products.close()
            self._ours.close()

    def ask(self, header: dict[str, Any], payload: bytes = b"") -> tuple[dict[str, Any], bytearray]:
        send_frame(self._theirs, header, payload)
        return read_frame(self._theirs)

    def close(self) -> None:
        self._theirs.close()
        self._thread.join()
        self.offloading.close()


@pytest.fixture
def link() -> Iterator[Callable[..., Link]]:
    made: list[Link] = []
    before = torch.default_generator.get_state()

    def make(*given: Any, **fields: Any) -> Link:
        made.append(Link(_offloading(*given, **fields)))
        return made[-1]

    yield make
    for one in made:
        one.close()
    torch.default_generator.set_state(before)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.turn = nn.Linear(8, 6)
        self.attend = nn.MultiheadAttention(6, 2, batch_first=True)
        self.last = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.norm(self.conv(x)))
        x = self.turn(x.flatten(2).mT)
        x = x + self.attend(x, x, x)[0]
        return self.last(x.mean(1))  # type: ignore[no-any-return]


def _made() -> tuple[Net, torch.Tensor, torch.Tensor]:
    torch.manual_seed(7)
    return Net(), torch.randn(6, 4, 8, 8), torch.randint(0, 3, (6,))


def _train(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        loss = functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("scheme", PLANS)
def test_a_model_trains_as_without_and_the_agent_has_the_account(scheme: str, link: Any) -> None:
    agent = link(scheme)
    model, x, y = _made()
    plain = copy.deepcopy(model)
    wanted = _train(plain, x, y)
    with agent.offload(model) as session:
        found = _train(model, x, y)
        assert session.leakage == agent.offloading.leakage
        assert session.profile.total.bytes_sent == 0  # nothing leaves this process
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-3, atol=1e-4)
    told = agent.offloading.record()
    assert min(told.products, told.bytes_sent, told.bytes_received) > 0
    assert told.checked == (0 if scheme == "measured" else told.products)
    assert told.dropped == told.kept_inside == ()
    assert told.seconds_inside > 0
    assert all(not one._kept for one in agent.offloading.accelerators)
    layers = set(agent.offloading.profile.layers)
    assert layers <= {f"{kind}-{n}" for kind in ("weight", "product") for n in range(1, 9)}
    assert agent.error is None


class Counting(InlineAccelerator):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.put_shapes: list[tuple[int, ...]] = []

    def put(self, handle: int, value: torch.Tensor) -> None:
        self.put_shapes.append(tuple(value.shape))
        super().put(handle, value)


def test_weights_cross_once_for_each_of_their_values(link: Any) -> None:
    agent = link("measured", Counting)
    model, x, _ = _made()
    with agent.offload(model), torch.no_grad():
        for _ in range(3):
            model(x)
        first = agent.offloading.accelerators[0]
        assert isinstance(first, Counting)
        assert first.put_shapes.count((8, 4, 3, 3)) == 1
        model.conv.weight.mul_(2)
        model(x)
        assert first.put_shapes.count((8, 4, 3, 3)) == 2


def test_one_session_after_the_other_and_never_two(link: Any) -> None:
    agent = link("permuted")
    model, x, y = _made()
    for _ in range(2):
        with agent.offload(model):
            _train(model, x, y)
    other = copy.deepcopy(model)
    with agent.offload(model):
        with pytest.raises(InputError, match="one offload session at a time"), agent.offload(other):
            pass
        _train(model, x, y)
    assert agent.error is None


class Lying(InlineAccelerator):
    def call(self, operation: Operation, result: int, operands: Sequence[int]) -> None:
        super().call(operation, result, operands)
        self._kept[result] = self._kept[result] * 1.5


def test_an_accelerator_that_lies_to_the_agent_is_dropped_and_changes_nothing(link: Any) -> None:
    agent = link("permuted", Lying)
    model, x, y = _made()
    wanted = _train(copy.deepcopy(model), x, y)
    with agent.offload(model):
        np.testing.assert_allclose(_train(model, x, y), wanted, rtol=1e-4)
    (dropped,) = agent.offloading.record().dropped
    assert (dropped.name, dropped.layer) == ("one", "weight-1")


def test_a_program_may_take_private_steps(link: Any) -> None:
    agent = link("permuted")
    model, x, y = _made()

    def step(of: nn.Module) -> list[torch.Tensor]:
        private = make_private(of, clip=0.3, noise_multiplier=0.0, expected_batch=6)
        private.backward(lambda x, y: functional.cross_entropy(of(x), y, reduction="none"), x, y)
        return [p.grad for p in of.parameters() if p.grad is not None]

    wanted = step(copy.deepcopy(model))
    with agent.offload(model):
        for found, one in zip(step(model), wanted, strict=True):
            torch.testing.assert_close(found, one, rtol=1e-4, atol=1e-6)
    unchecked = link("permuted", check=False)
    with unchecked.offload(model), pytest.raises(InputError, match="checked results"):
        step(model)


def test_first_weights_are_drawn_from_a_secret_of_the_run(link: Any) -> None:
    link("permuted")
    one = nn.Linear(4, 4).weight
    link("permuted")
    two = nn.Linear(4, 4).weight
    assert torch.equal(one, two)  # the same run
    other = Offloading(
        _plan("permuted"), [InlineAccelerator("one")], {"one": "process"}, secret="b"
    )
    assert other.program_secret != _offloading("permuted").program_secret
    assert "aa" not in _offloading("permuted").program_secret[:2]


def test_a_public_base_is_refused_before_anything_is_asked(link: Any) -> None:
    agent = link("permuted")
    model, *_ = _made()
    model.config = type("Config", (), {"_name_or_path": "some/public-model"})()
    with pytest.raises(RefusedError, match="public checkpoint"), agent.offload(model):
        pass


def test_without_a_plan_there_is_nothing_to_offload_to() -> None:
    context = JobContext({}, {}, {}, lambda *_: None, lambda *_: None)
    with pytest.raises(InputError, match="sends nothing to accelerators"):
        context.offload(nn.Linear(2, 2))


def test_a_rehearsal_keeps_everything_inside() -> None:
    def run(ctx: JobContext) -> None:
        model, x, y = _made()
        wanted = _train(copy.deepcopy(model), x, y)
        with ctx.offload(model) as session:
            assert session.scheme.name == "enclave"
            np.testing.assert_allclose(_train(model, x, y), wanted, rtol=1e-5)
        ctx.output("report", b"done")

    assert rehearse(run, {}, {"report": "file"}) == {"report": b"done"}


# --- a program's process that lies ----------------------------------------------------------

SITE: dict[str, Any] = {
    "kind": "offload", "call": "forward", "name": "layer", "role": "activations", "weight": True,
    "trains": True, "learns": True, "private": False, "map": {"kind": "dense"}, "drop": [],
}  # fmt: skip
CONV = {"kind": "convolution", "stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1}


def _ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape)


LIES: dict[str, tuple[dict[str, Any], list[torch.Tensor | None]]] = {
    "no call": ({"call": None}, []),
    "unknown call": ({"call": CANARY}, []),
    "a second session": ({"call": "begin"}, []),
    "a role of its own": ({"role": "weights"}, [_ones(2, 3), _ones(4, 3), None]),
    "a name that is none": ({"name": [CANARY]}, [_ones(2, 3), _ones(4, 3), None]),
    "an endless name": ({"name": "n" * 2000}, [_ones(2, 3), _ones(4, 3), None]),
    "a weight that is none": ({"weight": 1}, [_ones(2, 3), _ones(4, 3), None]),
    "an unknown map": ({"map": {"kind": CANARY}}, [_ones(2, 3), _ones(4, 3), None]),
    "no map": ({"map": None}, [_ones(2, 3), _ones(4, 3), None]),
    "inner sizes": ({}, [_ones(2, 3), _ones(4, 5), None]),
    "dimensions": ({}, [_ones(2, 3, 1), _ones(4, 3), None]),
    "a bias too long": ({}, [_ones(2, 3), _ones(4, 3), _ones(5)]),
    "a bias of two dimensions": ({}, [_ones(2, 3), _ones(4, 3), _ones(4, 1)]),
    "other types": ({}, [_ones(2, 3), _ones(4, 3).double(), None]),
    "no weight": ({"name": "other"}, [_ones(2, 3), None, None]),
    "no input": ({}, [None, _ones(4, 3), None]),
    "too few": ({}, [_ones(2, 3), _ones(4, 3)]),
    "a product with a weight": (
        {"map": {"kind": "product"}}, [_ones(2, 3, 4), _ones(2, 4, 3), None],
    ),
    "a product with a bias": (
        {"map": {"kind": "product"}, "weight": False},
        [_ones(2, 3, 4), _ones(2, 4, 3), _ones(3)],
    ),
    "matrices that differ": (
        {"map": {"kind": "product"}, "weight": False}, [_ones(2, 3, 4), _ones(1, 4, 3), None],
    ),
    "a kernel too large": ({"map": CONV}, [_ones(2, 3, 4, 4), _ones(2, 3, 5, 5), None]),
    "channels": ({"map": CONV}, [_ones(2, 3, 4, 4), _ones(2, 2, 3, 3), None]),
    "groups": ({"map": {**CONV, "groups": 3}}, [_ones(2, 3, 4, 4), _ones(2, 1, 3, 3), None]),
    "no groups": ({"map": {**CONV, "groups": 0}}, [_ones(2, 3, 4, 4), _ones(2, 3, 3, 3), None]),
    "no stride": (
        {"map": {**CONV, "stride": [0, 1]}}, [_ones(2, 3, 4, 4), _ones(2, 3, 3, 3), None],
    ),
    "less padding": (
        {"map": {**CONV, "padding": [-1, 0]}}, [_ones(2, 3, 4, 4), _ones(2, 3, 3, 3), None],
    ),
    "endless padding": (
        {"map": {**CONV, "padding": [1 << 30, 1 << 30]}},
        [_ones(2, 3, 4, 4), _ones(2, 3, 3, 3), None],
    ),
    "one stride for two": (
        {"map": {**CONV, "stride": [1]}}, [_ones(2, 3, 4, 4), _ones(2, 3, 3, 3), None],
    ),
    "strides that are words": (
        {"map": {**CONV, "stride": CANARY}}, [_ones(2, 3, 4, 4), _ones(2, 3, 3, 3), None],
    ),
    "gradients of nothing": (
        {"call": "backward", "saved": 99, "needs": [True, True, False]}, [_ones(2, 4)],
    ),
    "needs that are words": (
        {"call": "backward", "saved": 2, "needs": [CANARY, True, True]}, [_ones(2, 4)],
    ),
    "a gradient of another shape": (
        {"call": "backward", "saved": 2, "needs": [True, True, False]}, [_ones(4, 2)],
    ),
    "a gradient of another type": (
        {"call": "backward", "saved": 2, "needs": [True, True, False]}, [_ones(2, 4).double()],
    ),
    "what to forget": ({"drop": CANARY}, [_ones(2, 3), _ones(4, 3), None]),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_malformed_request_ends_the_job_and_nothing_of_it_is_told(lie: str) -> None:
    offloading = _offloading("permuted")
    products = ProgramProducts(offloading)
    products.answer({"kind": "offload", "call": "begin"}, bytearray())
    described, data = pack([_ones(2, 3), _ones(4, 3), None])
    answer, _ = products.answer({**SITE, "tensors": described}, bytearray(data))
    assert answer["saved"] == 2
    changes, tensors = LIES[lie]
    described, data = pack(tensors)
    with pytest.raises(EnclaveError) as caught:
        products.answer({**SITE, **changes, "tensors": described}, bytearray(data))
    assert CANARY not in caught.value.diagnostics()
    assert "broke the protocol" in caught.value.what
    products.close()
    offloading.close()


@pytest.mark.parametrize(
    "described",
    [
        None, CANARY, [CANARY], [["f4"]], [["f2", 2]], [["f4", 0]], [["f4", -1]], [["f4", 2.0]],
        [["f4", True]], [["f4", 3]], [["f4", 1 << 40]], [["f4", *[1 << 30] * 5]], [["f4", 1]],
        [["f4", *[1] * 6]], [["f8", 2]], [[["f4"], 1]], [None] * 9, [],
    ],
    ids=str,
)  # fmt: skip
def test_tensors_that_are_not_in_the_frame(described: Any) -> None:
    with pytest.raises(InputError, match="malformed") as caught:
        unpack(described, bytearray(8))
    assert CANARY not in caught.value.diagnostics()


@given(
    shapes=st.lists(
        st.none() | st.lists(st.integers(1, 4), min_size=1, max_size=5), min_size=0, max_size=4
    ),
    double=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_tensors_cross_to_the_bit(shapes: list[list[int] | None], double: bool) -> None:
    kinds = [torch.float64 if double and n % 2 else torch.float32 for n in range(len(shapes))]
    given = [
        None if shape is None else torch.randn(shape, dtype=kind)
        for shape, kind in zip(shapes, kinds, strict=True)
    ]
    described, data = pack(given)
    found = unpack(json.loads(json.dumps(described)), bytearray(data))
    assert len(found) == len(given)
    for one, other in zip(found, given, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert one.dtype == other.dtype
            assert torch.equal(one, other)


def test_what_a_program_lets_go_is_forgotten_by_the_agent(link: Any) -> None:
    agent = link("permuted")
    model, x, y = _made()
    with agent.offload(model):
        for _ in range(4):
            _train(model, x, y)
        model(x[:1])
        # The last passes only: what they leave is dropped with the next request.
        assert len(agent._products._kept) <= 2 * 14
