"""Fixtures of the service's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.serving_world import World


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """A service whose tail doubles what it gets; one for each test module."""
    with World.opened() as made:
        yield made
