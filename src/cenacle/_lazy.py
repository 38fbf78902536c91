"""Names of a package that are imported at their first use (PEP 562).

For packages whose modules need large libraries: a command that signs a contract should not
wait for pyarrow, nor a party that only seals install torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

__all__ = ["lazy_names"]


def lazy_names(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """A module ``__getattr__`` that imports each name from its home module.

    Args:
        package: the package's ``__name__``.
        homes: public name to the submodule that defines it.
    """

    def getattribute(name: str) -> Any:
        home = homes.get(name)
        if home is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f"{package}.{home}"), name)
        setattr(sys.modules[package], name, value)
        return value

    return getattribute
