"""Workers that Ray places; skipped where Ray is not installed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cenacle.accelerators import Operation, ray_workers
from cenacle.errors import AcceleratorError, InputError

pytestmark = pytest.mark.processes
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="needs pip install cenacle[ray]"
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A cluster of one machine."""
    program = [sys.executable, "-m", "ray.scripts.scripts"]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}

    def ray(*arguments: str) -> None:
        subprocess.run(
            [*program, *arguments],
            env=environment,
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=120,
        )

    options = ("--head", "--port=6391", "--num-cpus=3", "--include-dashboard=false")
    ray("start", *options, "--disable-usage-stats", "--object-store-memory=80000000")
    yield "127.0.0.1:6391"
    ray("stop", "--force")


@needs_ray
@pytest.mark.slow
def test_workers_compute_and_leave_with_the_enclave(cluster: str) -> None:
    workers = ray_workers(["a", "b"], address=cluster)
    torch.manual_seed(0)
    x, w = torch.randn(40, 30), torch.randn(20, 30)
    for worker in workers:
        worker.put(1, x)
        worker.put(2, w)
        worker.call(Operation("matmul", {"transpose_b": True}), 3, [1, 2])
    for worker in workers:
        torch.testing.assert_close(worker.get(3).wait(120), x @ w.T)
        assert worker.describe().startswith("ray, cpu, confined by process")
        worker.close()
    # They gave their processors back: as many again can be placed.
    again = ray_workers(["c", "d", "e"], address=cluster)
    for worker in again:
        worker.close()


@needs_ray
@pytest.mark.slow
def test_a_cluster_without_room(cluster: str) -> None:
    with pytest.raises(AcceleratorError, match="could not place"):
        ray_workers(["a"], address=cluster, resources={"unobtainium": 1}, start_timeout=8)


@needs_ray
@pytest.mark.slow
def test_no_cluster() -> None:
    with pytest.raises(AcceleratorError, match=r"could not place|helper"):
        ray_workers(["a"], address="127.0.0.1:1", start_timeout=3)


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray() -> None:
    with pytest.raises(AcceleratorError, match="ray"):
        ray_workers(["a"])


@pytest.mark.parametrize("names", [[], ["a", "a"]])
def test_names_must_be_distinct(names: list[str]) -> None:
    with pytest.raises(InputError, match="distinct"):
        ray_workers(names)


def test_a_device_that_is_none() -> None:
    with pytest.raises(InputError, match="device"):
        ray_workers(["a"], device="tpu")


def test_the_enclave_never_imports_ray() -> None:
    program = (
        "import sys; from cenacle.accelerators import ray_workers; print('ray' in sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert run.stdout.strip() == "False"
    folder = Path(__file__).parent.parent.parent / "src" / "cenacle"
    words = ("import ray", "from ray", 'import_module("ray")')
    importing = {
        path.name
        for path in folder.rglob("*.py")
        if any(word in path.read_text("utf-8") for word in words)
    }
    assert importing == {"ray_driver.py"}
