"""Every place in a JSON document, for tests that alter each in turn."""

from __future__ import annotations

import copy
from typing import Any

__all__ = ["Place", "at", "leaves", "replaced"]

Place = tuple[Any, ...]


def leaves(value: Any, here: Place = ()) -> list[Place]:
    """The places of all values that are neither objects nor lists."""
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in leaves(item, (*here, key))]
    if isinstance(value, list):
        return [leaf for i, item in enumerate(value) for leaf in leaves(item, (*here, i))]
    return [here]


def at(value: Any, place: Place) -> Any:
    """What is at a place."""
    for step in place:
        value = value[step]
    return value


def replaced(value: Any, place: Place, new: Any) -> Any:
    """A copy with another value at a place."""
    altered = copy.deepcopy(value)
    at(altered, place[:-1])[place[-1]] = new
    return altered
