"""Workers that die, hang or fail in the middle of a step, and memory that is given back."""

from __future__ import annotations

import functools
import gc
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from cenacle.accelerators import (
    Accelerator,
    InlineAccelerator,
    Operation,
    ProcessAccelerator,
    SharedStaging,
)
from cenacle.accelerators.protocol import HeapStaging
from cenacle.errors import AcceleratorError, InputError, IntegrityError
from cenacle.offload import Offload, offload
from cenacle.offload.fleet import Fleet, Parcel
from cenacle.offload.maps import Dense, Product

_SEED = 7
_IN_STEP_TWO = 13  # a call to each worker in the backward pass of the second step


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 6, 3, stride=2, bias=False)
        self.last = nn.Linear(6 * 3 * 3, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = functional.relu(self.second(functional.relu(self.first(x))))
        found: torch.Tensor = self.last(hidden.flatten(1))
        return found


def _train(
    accelerators: Sequence[Accelerator], *, steps: int = 3, rows: int = 7, **options: Any
) -> tuple[dict[str, torch.Tensor], Offload]:
    torch.manual_seed(_SEED)
    model = Cnn()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with offload(model, "measured", accelerators, **options) as session:
        for _ in range(steps):
            x, y = torch.randn(rows, 1, 8, 8), torch.randint(0, 5, (rows,))
            optimizer.zero_grad()
            loss: torch.Tensor = functional.cross_entropy(model(x), y)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return {name: value.clone() for name, value in model.state_dict().items()}, session


@functools.cache
def _undisturbed(workers: int) -> dict[str, torch.Tensor]:
    weights, session = _train([InlineAccelerator(f"calm-{i}") for i in range(workers)])
    assert session.losses == ()
    return weights


def _same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(found[name], value) for name, value in expected.items())


class Doomed(ProcessAccelerator):
    """At its n-th call, something happens to its process."""

    def __init__(self, name: str, fate: str, at: int = _IN_STEP_TWO) -> None:
        super().__init__(name)
        self._fate, self._calls = fate, at

    def _request(self, *request: Any) -> None:
        if request[0] == "call":
            self._calls -= 1
            if self._calls == 0 and self._fate == "fails":
                request = ("call", "nonsense", *request[2:])
            elif self._calls == 0:
                fates = {"is killed": signal.SIGKILL, "is stopped": signal.SIGSTOP}
                os.kill(self.pid, fates[self._fate])
        super()._request(*request)


Hire = Callable[..., list[Accelerator]]


@pytest.fixture
def hire() -> Iterator[Hire]:
    """Starts workers, some of them with a fate: two processes, or of three the doomed one."""
    made: list[Accelerator] = []

    def start(workers: int, fates: dict[int, str]) -> list[Accelerator]:
        honest = ProcessAccelerator if workers == 2 else InlineAccelerator
        for i in range(workers):
            name = f"worker-{i}"
            made.append(Doomed(name, fates[i]) if i in fates else honest(name))
        return made

    yield start
    for accelerator in made:
        accelerator.close()


# ---------------------------------------------------------------------- losses


@pytest.mark.processes
@pytest.mark.parametrize(
    ("workers", "fates", "reasons"),
    [
        pytest.param(2, {}, {}, id="calm"),
        pytest.param(2, {1: "is killed"}, {"worker-1": "SIGKILL"}, id="killed-of-2"),
        pytest.param(3, {0: "is killed"}, {"worker-0": "SIGKILL"}, id="first-killed-of-3"),
        pytest.param(3, {2: "is stopped"}, {"worker-2": "does not answer"}, id="stopped-of-3"),
        pytest.param(3, {1: "fails"}, {"worker-1": "nonsense"}, id="failing-of-3"),
        pytest.param(
            2,
            {0: "is killed", 1: "fails"},
            {"worker-0": "SIGKILL", "worker-1": "nonsense"},
            id="all-lost",
        ),
    ],
)
def test_a_lost_worker_is_named_and_training_goes_on_to_the_same_bits(
    hire: Hire, workers: int, fates: dict[int, str], reasons: dict[str, str]
) -> None:
    found, session = _train(hire(workers, fates), timeout=5.0)
    assert {loss.name for loss in session.losses} == set(reasons)
    for loss in session.losses:
        assert reasons[loss.name] in loss.reason
        assert loss.site in {"first", "second", "last"}
    assert _same(found, _undisturbed(workers))


@pytest.mark.processes
def test_inference_goes_on_too(hire: Hire) -> None:
    torch.manual_seed(_SEED)
    model = Cnn().eval()
    batches = [torch.randn(5, 1, 8, 8) for _ in range(6)]
    workers = hire(2, {1: "is killed"})
    with torch.no_grad():
        with offload(model, "measured", [InlineAccelerator("a"), InlineAccelerator("b")]):
            expected = [model(x) for x in batches]
        with offload(model, "measured", workers) as session:
            found = [model(x) for x in batches]
    assert [loss.name for loss in session.losses] == ["worker-1"]
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_an_odd_number_of_workers_divides_otherwise() -> None:
    """So the tests above would see parts that are computed in another division."""
    assert not _same(_undisturbed(2), _undisturbed(3))


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_fewer_rows_than_workers(rows: int) -> None:
    many, session = _train([InlineAccelerator(f"w{i}") for i in range(4)], rows=rows)
    same, _ = _train([InlineAccelerator(f"w{i}") for i in range(rows)], rows=rows)
    assert session.losses == ()
    assert _same(many, same)


# ---------------------------------------------------------------------- one product


class Failing(InlineAccelerator):
    """Fails at each of the protocol's requests in turn."""

    def __init__(self, name: str, request: str) -> None:
        super().__init__(name)
        self._failing = request

    def _fail(self, request: str) -> None:
        if request == self._failing:
            raise AcceleratorError(f"accelerator {self.name} failed", found=request)

    def put(self, handle: int, value: torch.Tensor) -> None:
        self._fail("put")
        super().put(handle, value)

    def call(self, operation: Operation, result: int, operands: Sequence[int]) -> None:
        self._fail("call")
        super().call(operation, result, operands)

    def get(self, handle: int) -> Any:
        self._fail("get")
        return super().get(handle)


def _product(fleet: Fleet, rows: int = 6, check: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(_SEED)
    x, w = torch.randn(rows, 3), torch.randn(4, 3)
    sent = [fleet.send(x, "inputs", "site"), fleet.send(w, "weights", "site")]
    job = fleet.product(Dense().forward(), *sent, site="site")
    return job.result(check), x @ w.T


@pytest.mark.parametrize("request_", ["put", "call", "get"])
@pytest.mark.parametrize("healthy", [0, 1, 2])
def test_failures_at_each_request(request_: str, healthy: int) -> None:
    workers = [Failing("bad", request_), *(InlineAccelerator(f"w{i}") for i in range(healthy))]
    fleet = Fleet(workers)
    found, expected = _product(fleet)
    torch.testing.assert_close(found, expected)
    assert [(loss.name, loss.site) for loss in fleet.losses] == [("bad", "site")]
    assert fleet.alive == tuple(f"w{i}" for i in range(healthy))
    fleet.close()


def test_a_worker_whose_results_are_refused_is_dropped() -> None:
    refused: list[slice] = []

    def check(rows: slice, tensor: torch.Tensor) -> None:
        if rows.start and not refused:
            refused.append(rows)
            raise IntegrityError("a result is wrong", found="for the test")

    fleet = Fleet([InlineAccelerator("a"), InlineAccelerator("b")])
    found, expected = _product(fleet, check=check)
    torch.testing.assert_close(found, expected)
    assert refused == [slice(3, 6)]
    assert [loss.name for loss in fleet.losses] == ["b"]


def test_the_enclave_s_own_arithmetic_is_not_doubted_away() -> None:
    """A check that nothing passes is an error in the end, not an endless loop."""

    def check(rows: slice, tensor: torch.Tensor) -> None:
        raise IntegrityError("a result is wrong")

    fleet = Fleet([InlineAccelerator("a")])
    with pytest.raises(IntegrityError):
        _product(fleet, check=check)
    assert fleet.alive == ()


@pytest.mark.parametrize("names", [[], ["a", "a"], ["enclave"]])
def test_names_must_be_distinct(names: list[str]) -> None:
    with pytest.raises(InputError, match="distinct names"):
        Fleet([InlineAccelerator(name) for name in names])


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 5, 8, 9])
@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_rows_are_divided_evenly_and_whole(rows: int, workers: int) -> None:
    fleet = Fleet([InlineAccelerator(f"w{i}") for i in range(workers)])
    bounds = fleet.bounds(rows)
    assert [row for begin, end in bounds for row in range(begin, end)] == list(range(rows))
    sizes = [end - begin for begin, end in bounds]
    assert max(sizes) - min(sizes) <= 1
    fleet.lose(fleet.members[0], "site", AcceleratorError("gone"))
    assert fleet.bounds(rows) == bounds


# ---------------------------------------------------------------------- forgetting


class Slow(InlineAccelerator):
    """Keeps its results back, as a worker does that is busy."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.dropped: list[int] = []

    def drop(self, handles: Sequence[int]) -> None:
        self.dropped += handles
        super().drop(handles)


def _limbo(fleet: Fleet) -> list[torch.Tensor]:
    return [value for _, value in fleet._limbo if value is not None]


def test_memory_is_kept_until_all_have_read_it() -> None:
    workers = [Slow("a"), Slow("b")]
    fleet = Fleet(workers)
    product = Dense().forward()
    weight = fleet.send(torch.ones(2, 3), "weights", "site")
    first = fleet.send(torch.ones(4, 3), "inputs", "site")
    value = first.value
    abandoned = fleet.product(product, first, weight, site="site")
    del first, abandoned
    gc.collect()

    second = fleet.send(torch.ones(4, 3), "inputs", "site")
    job = fleet.product(product, second, weight, site="site")
    assert all(worker.dropped for worker in workers)
    assert any(kept is value for kept in _limbo(fleet)), "nothing says that it was read"
    seen: list[slice] = []

    def look(rows: slice, _: torch.Tensor) -> None:
        seen.append(rows)
        fleet._sweep()
        still = any(kept is value for kept in _limbo(fleet))
        assert still == (len(seen) < 2), "kept until both have gone past it"

    job.collect(look)
    assert len(seen) == 2


def test_a_lost_worker_reads_no_more() -> None:
    fleet = Fleet([Slow("a"), Slow("b")])
    weight = fleet.send(torch.ones(2, 3), "weights", "site")
    first = fleet.send(torch.ones(4, 3), "inputs", "site")
    fleet.product(Dense().forward(), first, weight, site="site")
    del first
    gc.collect()
    fleet._sweep()
    assert len(_limbo(fleet)) == 1
    for worker in fleet.members:
        fleet.lose(worker, "site", AcceleratorError("gone"))
    fleet._sweep()
    assert _limbo(fleet) == []


def test_a_parcel_is_put_once_for_each_worker_and_part() -> None:
    fleet = Fleet([Slow("a"), Slow("b")])
    weight = fleet.send(torch.ones(2, 3), "weights", "site")
    x = fleet.send(torch.ones(4, 3), "inputs", "site")
    for _ in range(3):
        fleet.product(Dense().forward(), x, weight, site="site").result()
    assert isinstance(x, Parcel)
    assert sorted(x._held) == [("a", 0), ("b", 1)]
    assert fleet.profile.cost("site").bytes_sent == x.value.nbytes + 2 * weight.value.nbytes


def test_staging_follows_the_living() -> None:
    first, second = SharedStaging(), HeapStaging()
    workers = [InlineAccelerator("a"), InlineAccelerator("b")]
    workers[0].staging, workers[1].staging = first, second
    fleet = Fleet(workers)
    assert first.arena.locate(fleet.empty(3)) is not None
    fleet.lose(workers[0], "site", AcceleratorError("gone"))
    assert first.arena.locate(fleet.empty(3)) is None
    first.close()


@pytest.mark.processes
def test_nothing_grows_over_fifty_steps(hire: Hire) -> None:
    workers = hire(2, {})
    torch.manual_seed(_SEED)
    model = Cnn()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    used: list[tuple[int, ...]] = []
    with offload(model, "measured", workers) as session:
        for _ in range(53):
            optimizer.zero_grad()
            model(torch.randn(7, 1, 8, 8)).square().sum().backward()
            optimizer.step()
            counts: list[int] = [len(session.fleet._limbo) // 100]
            for worker in workers:
                assert isinstance(worker, ProcessAccelerator)
                counts += [worker.staging.arena.bytes, worker._results.bytes]
                counts += [len(worker._forms) // 100, len(worker._leaving) // 100]
            used.append(tuple(counts))
    assert used[2] == used[-1]


def test_sums_are_added_in_the_order_of_the_parts() -> None:
    fleet = Fleet([InlineAccelerator(f"w{i}") for i in range(3)])
    torch.manual_seed(_SEED)
    gy, x = torch.randn(9, 4), torch.randn(9, 5)
    product: Product = Dense().weight_gradient((4, 5))
    sent = [fleet.send(gy, "gradients", "site"), fleet.send(x, "inputs", "site")]
    found = fleet.product(product, *sent, site="site").result()
    parts = [gy[i : i + 3].T @ x[i : i + 3] for i in (0, 3, 6)]
    assert torch.equal(found, parts[0] + parts[1] + parts[2])
