"""Fixtures that more than one package's tests use."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# No test reports its use to the maker of ONNX Runtime, whatever imports it.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

# Under --import-mode=importlib nothing makes tests/support importable unless pytest was
# started with ``python -m pytest`` from the repository's root.
_ROOT = str(Path(__file__).parent.parent)
if _ROOT not in sys.path:
    sys.path.append(_ROOT)

from cenacle.enclave.sandbox import probe  # noqa: E402
from tests.support.house import House, Sealed, Trap, house_at, patient_rows  # noqa: E402

# A busy machine is no failure: nothing here asserts how long a thing takes.
settings.register_profile("cenacle", deadline=None)
settings.load_profile("cenacle")


def pytest_make_parametrize_id(config: pytest.Config, val: object, argname: str) -> str | None:
    """Names long byte strings by their argument: pytest would put the bytes into the test's name.

    A key, a signature or a compressed body differs from process to process, and xdist refuses
    workers that collected tests of different names.
    """
    return argname if isinstance(val, bytes) and len(val) > 16 else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with whole processes first: with several workers the longest must not come last."""
    first = {item.path for item in items if item.get_closest_marker("processes")}
    items.sort(key=lambda item: item.path not in first)


@pytest.fixture(scope="session")
def program_layers() -> None:
    """Skips where the sandbox cannot confine a program."""
    needed = [status for status in probe() if status.name in {"landlock", "seccomp"}]
    if missing := [f"{status.name}: {status.missing}" for status in needed if status.missing]:
        pytest.skip("programs need the layers landlock and seccomp; " + "; ".join(missing))


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """A served broker with two hospitals, a lab and a clinic; one for each test module."""
    with house_at(tmp_path_factory.mktemp("house")) as made:
        yield made


@pytest.fixture(scope="module")
def patients(house: House) -> dict[str, Sealed]:
    """The two hospitals' sealed tables, by alias, for recipes."""
    sealed = {}
    for seed, alias in enumerate(("a", "b"), 1):
        source = house.folder / f"patients-{alias}.csv"
        source.write_text(patient_rows(60, seed=seed))
        sealed[alias] = house.seal(f"hospital-{alias}", source)
    return sealed


@pytest.fixture
def trap(house: House) -> Iterator[Trap]:
    """Kills the enclave at a chosen request to the broker."""
    house.trap = Trap()
    yield house.trap
    house.trap = None


@pytest.fixture
def mnist() -> Path:
    """The folder of the MNIST files; skips where they are not."""
    default = Path(_ROOT).parent / "shared" / "datasets"
    folder = Path(os.environ.get("CENACLE_DATA", default)) / "mnist"
    if not folder.is_dir():
        pytest.skip(f"no MNIST files in {folder}; set CENACLE_DATA to the folder that has mnist/")
    return folder
