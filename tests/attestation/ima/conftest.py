from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from cenacle.attestation.ima_list import ImaEntry
from tests.support.ima_machine import NOW, REPORT, Machine, entry


@pytest.fixture(scope="session")
def make_entry() -> Callable[..., ImaEntry]:
    return entry


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.fixture
def make_machine() -> Callable[..., Machine]:
    return Machine


@pytest.fixture(scope="session")
def now() -> datetime:
    return NOW


@pytest.fixture(scope="session")
def report() -> bytes:
    return REPORT


@pytest.fixture(scope="session")
def real_boot() -> dict[str, Any]:
    """A recorded boot of a virtual machine, with its list and registers."""
    path = Path(__file__).parent.parent / "boot" / "debian12.json"
    fields: dict[str, Any] = json.loads(path.read_text())
    return fields
