"""What a ``.pt2`` file may contain, and a clean copy of its program.

``torch.export.load`` of PyTorch 2.13 unpickles the sample inputs in an archive (falling back to
full unpickling where safe unpickling fails), weights and constants that their table calls
pickled, TorchScript and opaque objects; it evaluates the text of symbolic sizes as Python, looks
operators up anywhere below ``torch``, and compiles names of nodes into Python source. Nothing of
this may come from a stranger. So the archive is never handed to it: here the program is rebuilt,
value by value, from JSON against a list of what an inference graph needs; sample inputs are left
alone, and tensors are made from raw bytes.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cenacle.cut.pt2_program import (
    check_weight_name,
    clean_program,
    fields,
    get,
    refused,
    stored_meta,
)
from cenacle.errors import InputError

__all__ = ["Archive", "Table", "read_archive"]

_MODEL: Final = "models/model.json"
_WEIGHTS: Final = "data/weights/model_weights_config.json"
_CONSTANTS: Final = "data/constants/model_constants_config.json"
_IGNORED: Final = re.compile(
    r"archive_format|archive_version|byteorder|\.data/(?:version|serialization_id)"
    # Sample inputs are a pickle, and stay one.
    r"|data/sample_inputs/model\.pt|extra/[\w./-]{1,200}"
)
_TENSOR: Final = re.compile(r"data/(?:weights/weight|constants/tensor)_\d{1,9}")
_MAX_JSON: Final = 256 << 20


@dataclass(frozen=True)
class Table:
    """Where tensors lie: for each its file, and the fields of its ``TensorMeta``."""

    tensors: Mapping[str, tuple[str, Mapping[str, Any]]]


@dataclass(frozen=True)
class Archive:
    """The parts of an archive that are used."""

    program: dict[str, Any]
    weights: Table
    constants: Table
    read: Callable[[str], bytes]


def read_archive(path: Path) -> Archive:
    """The parts of a ``.pt2`` file, of which nothing has been run or unpickled.

    Raises:
        InputError: no such file.
        DataError: no archive of ``torch.export.save``, or one with parts that would be unpickled
            or compiled; the sentence names the part.
    """
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = _entries(archive)
            parts = [_json(archive, entries[name]) for name in (_MODEL, _WEIGHTS, _CONSTANTS)]
            order = entries.get("byteorder")
            if order is not None and archive.read(order) != b"little":
                raise refused("tensors in another byte order", "big")
    except (zipfile.BadZipFile, zipfile.LargeZipFile, EOFError, NotImplementedError) as error:
        raise refused("no archive", error) from error

    def read(name: str) -> bytes:
        with zipfile.ZipFile(path) as archive:
            return archive.read(_entries(archive)[name])

    program, weights, constants = parts
    return Archive(
        clean_program(program),
        _table(weights, "data/weights/", entries),
        _table(constants, "data/constants/", entries),
        read,
    )


def _entries(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    found: dict[str, zipfile.ZipInfo] = {}
    tops = set()
    for entry in archive.infolist():
        top, _, name = entry.filename.partition("/")
        tops.add(top)
        known = name in {_MODEL, _WEIGHTS, _CONSTANTS} or _TENSOR.fullmatch(name)
        if not known and _IGNORED.fullmatch(name) is None:
            raise refused("a part that would be unpickled or run, or is unknown", name)
        if name in found or ".." in name.split("/"):
            raise refused("a part twice, or outside of it", name)
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 0x1:
            raise refused("a compressed or encrypted part", name)
        found[name] = entry
    for name in (_MODEL, _WEIGHTS, _CONSTANTS):
        if name not in found:
            raise refused("no program that is named 'model' with its weights", f"no {name}")
    if len(tops) != 1:
        raise refused("parts in several folders", len(tops))
    return found


def _json(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Any:
    if entry.file_size > _MAX_JSON:
        raise refused("a description that is too long", f"{entry.file_size} bytes")
    try:
        return json.loads(archive.read(entry))
    except (ValueError, RecursionError) as error:
        raise refused("a description that is no JSON", error) from error


def _table(value: Any, folder: str, entries: Mapping[str, Any]) -> Table:
    tensors: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for name, payload in fields(get(value, "config")).items():
        check_weight_name(name)
        if get(payload, "use_pickle") is not False:
            raise refused("a pickled tensor or object", name)
        file = f"{folder}{get(payload, 'path_name')}"
        if _TENSOR.fullmatch(file) is None or file not in entries:
            raise refused("an object that is no tensor", name)
        tensors[name] = (file, stored_meta(get(payload, "tensor_meta")))
    return Table(tensors)
