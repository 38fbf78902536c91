"""Importers: what a user's file is, and how its content goes into a container.

One file each, in a registry by suffix. An importer may refuse a file, never guess: what is
in no list is sealed as plain bytes (kind ``file``), and what could run code when it is
loaded is refused.
"""

from __future__ import annotations

from cenacle.sealing.importers import (
    arrays,
    csv,
    idx,
    parquet,
    plain,
    refused,
    safetensors,
    torch_state,
)
from cenacle.sealing.importers.registry import Importer, Options, find_importer, importer

__all__ = ["Importer", "Options", "find_importer", "importer"]

_REGISTERED = (arrays, csv, idx, parquet, plain, refused, safetensors, torch_state)
