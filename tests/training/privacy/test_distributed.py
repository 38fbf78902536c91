"""Two real processes: the step is that of one process with all examples, and noised once."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from cenacle.training.privacy import PrivacyError, Record, Sampling, make_private
from cenacle.training.privacy.record import Event
from cenacle.training.privacy.spending import spent

WORKER = Path(__file__).with_name("ranks_worker.py")

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch has no gloo here"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes says."""
    store = tmp_path_factory.mktemp("ranks") / "store"
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(store)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    out = []
    try:
        for process in running:
            said, complaint = process.communicate(timeout=120)
            assert process.returncode == 0, complaint
            out.append(json.loads(said.splitlines()[-1]))
    finally:
        for process in running:
            process.kill()
            process.wait()
    return out


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """The same by one process with all examples."""
    spec = importlib.util.spec_from_file_location("ranks_worker", WORKER)
    assert spec is not None
    assert spec.loader is not None
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    scenarios: dict[str, Any] = worker.scenarios(None)
    return scenarios


def _equal(one: list[list[float]], two: list[list[float]], rtol: float, atol: float) -> None:
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", ["plain", "layered", "empty", "noised", "adaptive"])
def test_two_processes_release_what_one_would(
    name: str, found: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    first, second = (one[name] for one in found)
    assert first == second
    # The first process's key makes the noise, and makes it once.
    _equal(first["gradients"], alone[name]["gradients"], rtol=1e-4, atol=1e-6)
    _equal(first["weights"], alone[name]["weights"], rtol=0, atol=0)
    assert first["clip"] == pytest.approx(alone[name]["clip"])
    for event, expected in zip(first["events"], alone[name]["events"], strict=True):
        assert event.pop("clip") == pytest.approx(expected.pop("clip"))
        assert event.pop("group_clips") == pytest.approx(expected.pop("group_clips"))
        assert event == expected


def test_sampling_of_the_parts_is_recorded_as_that_of_the_whole(
    found: list[dict[str, Any]],
) -> None:
    for one in found:
        (event,) = one["poisson"]["events"]
        assert event["sampling"] == {
            "kind": "poisson", "population": 8, "rate": 0.25, "batch_size": None, "secure": True,
        }  # fmt: skip
        assert event["noise_multiplier"] == 1.0
        assert event["secure"]
        sampling = Sampling(**event["sampling"])
        record = Record([Event(**(event | {"sampling": sampling, "group_clips": (0.8,)}))])
        (cost,) = spent(record)
        assert (cost.sampling_probability, cost.noise_multiplier, cost.steps) == (0.25, 1.0, 1)
        (shuffled,) = one["shuffled"]["events"]
        assert shuffled["sampling"]["population"] == 8
        assert shuffled["sampling"]["batch_size"] == 4
        (mixed,) = one["mixed"]["events"]
        assert mixed["sampling"]["kind"] == "unknown"


@pytest.mark.parametrize(
    ("name", "why"), [("other_clip", "the processes differ"), ("too_large", "nois")]
)
def test_every_process_refuses_alike(name: str, why: str, found: list[dict[str, Any]]) -> None:
    assert all(why in one[name]["refused"] for one in found)


def test_a_group_without_processes_is_refused() -> None:
    with pytest.raises(PrivacyError, match="init_process_group"):
        make_private(nn.Linear(2, 2), clip=1, noise_multiplier=1, expected_batch=1, group=object())


def test_wrappers_that_add_gradients_first_are_refused(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/s", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
        with pytest.raises(PrivacyError, match="plain module"):
            make_private(wrapped, clip=1, noise_multiplier=1, expected_batch=1)
    finally:
        dist.destroy_process_group()
