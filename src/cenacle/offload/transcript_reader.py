"""Reading transcripts that somebody else may have made: everything is checked, nothing trusted.

Records come one at a time, in the order in which they were recorded, so a transcript may be
larger than memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

import torch
from safetensors import SafetensorError, safe_open

from cenacle.errors import DataError, UnavailableError
from cenacle.offload.transcript import FORMAT, LINES_FILE

__all__ = ["Called", "Put", "read_transcript"]

_LINE_BYTES: Final = 1 << 20
_MOST_DIMS: Final = 64
_FILE: Final = re.compile(r"tensors-[0-9]{4,9}\.safetensors")
_ROLES: Final = frozenset({"inputs", "activations", "weights", "gradients"})
_DTYPES: Final[Mapping[str, torch.dtype]] = {
    name: getattr(torch, name)
    for name in (
        "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2",
        "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8",
        "bool", "complex64",
    )
}  # fmt: skip


@dataclass(frozen=True)
class Put:
    """A tensor that a worker received.

    Attributes:
        number: of the event, from 0.
        value: what the worker received, element by element.
    """

    number: int
    worker: str
    layer: str
    role: str
    handle: int
    value: torch.Tensor


@dataclass(frozen=True)
class Called:
    """An operation that a worker was asked for; ``operands`` are handles that it had."""

    number: int
    worker: str
    layer: str
    operation: str
    attributes: Mapping[str, Any]
    result: int
    operands: tuple[int, ...]


def read_transcript(folder: Path, *, partial: bool = False) -> Iterator[Put | Called]:
    """All events of a transcript, in their order.

    Args:
        folder: as :class:`~cenacle.offload.transcript.Transcript` wrote it.
        partial: accept one without its end mark: of a session that did not end in good order.

    Raises:
        DataError: a line or tensor file is not as the format says, a tensor is missing or
            superfluous, or an operation speaks of a tensor that its worker never had.
        UnavailableError: the folder cannot be read.
    """
    return _Reader(folder, partial).events()


class _Reader:
    def __init__(self, folder: Path, partial: bool) -> None:
        self._folder = folder
        self._partial = partial
        self._line = 0
        self._handles: set[tuple[str, int]] = set()
        self._used: dict[str, set[str]] = {}
        self._counts = {"put": 0, "call": 0}
        self._open: tuple[str, Any, ExitStack] | None = None

    def events(self) -> Iterator[Put | Called]:
        try:
            with (self._folder / LINES_FILE).open("rb") as file:
                try:
                    yield from self._events(file)
                finally:
                    self._close()
        except OSError as error:
            raise UnavailableError(
                "a transcript cannot be read", found=f"{self._folder}: {error.strerror}"
            ) from None

    def _events(self, file: Any) -> Iterator[Put | Called]:
        if self._parse(file.readline(_LINE_BYTES + 1)) != {"event": "begin", "format": FORMAT}:
            self._bad("does not begin as a transcript", expected=FORMAT)
        ended = False
        while raw := file.readline(_LINE_BYTES + 1):
            if ended:
                self._bad("goes on after its end mark")
            if self._partial and not raw.endswith(b"\n") and len(raw) <= _LINE_BYTES:
                break  # cut off while it was written
            line = self._parse(raw)
            number = sum(self._counts.values())
            event = line.pop("event", None)
            if event == "put":
                yield self._put(number, line)
            elif event == "call":
                yield self._call(number, line)
            elif event == "end":
                ended = True
                if line != self._counts:
                    self._bad("counts other events than it has", found=line)
                continue
            else:
                self._bad("has an event of an unknown kind", expected="put, call, end")
            self._counts[event] += 1
        if not ended and not self._partial:
            self._bad("ends without its end mark", remedy="pass partial=True to read what there is")
        self._superfluous()

    def _parse(self, raw: bytes) -> dict[str, Any]:
        self._line += 1
        if len(raw) > _LINE_BYTES:
            self._bad("has a line that is too long", expected=f"at most {_LINE_BYTES} bytes")
        if not raw.endswith(b"\n"):
            self._bad("has a line that was cut off")
        try:
            line = json.loads(raw, object_pairs_hook=_unique, parse_constant=_refuse)
        except (ValueError, RecursionError):
            self._bad("has a line that is not JSON")
        if not isinstance(line, dict):
            self._bad("has a line that is no object")
        return line

    def _put(self, number: int, line: dict[str, Any]) -> Put:
        texts = self._fields(
            line, ("worker", "layer", "role", "dtype", "file", "tensor"), ("handle", "shape")
        )
        shape = line["shape"]
        if (
            texts["role"] not in _ROLES
            or texts["dtype"] not in _DTYPES
            or not _FILE.fullmatch(texts["file"])
            or texts["tensor"] != str(number)
            or not isinstance(shape, list)
            or len(shape) > _MOST_DIMS
            or not all(_is_count(size) for size in shape)
        ):
            self._bad("has a put event with a value out of range")
        handle = self._new(texts["worker"], line["handle"])
        value = self._tensor(texts["file"], texts["tensor"])
        if list(value.shape) != shape or value.dtype != _DTYPES[texts["dtype"]]:
            self._bad(
                "has a tensor of another form than its line says",
                found=f"{list(value.shape)} {value.dtype}",
                expected=f"{shape} {texts['dtype']}",
            )
        return Put(number, texts["worker"], texts["layer"], texts["role"], handle, value)

    def _call(self, number: int, line: dict[str, Any]) -> Called:
        texts = self._fields(
            line, ("worker", "layer", "operation"), ("attributes", "result", "operands")
        )
        worker, operands = texts["worker"], line["operands"]
        if not isinstance(line["attributes"], dict) or not isinstance(operands, list):
            self._bad("has a call event with a value out of range")
        for operand in operands:
            if not _is_count(operand) or (worker, operand) not in self._handles:
                self._bad("has an operation on a tensor that the worker never had")
        result = self._new(worker, line["result"])
        attributes, operation = line["attributes"], texts["operation"]
        return Called(
            number, worker, texts["layer"], operation, attributes, result, tuple(operands)
        )

    def _fields(
        self, line: dict[str, Any], texts: tuple[str, ...], others: tuple[str, ...]
    ) -> dict[str, str]:
        if set(line) != {*texts, *others} or not all(isinstance(line[t], str) for t in texts):
            self._bad("has an event with other fields than the format says")
        return {name: line[name] for name in texts}

    def _new(self, worker: str, handle: object) -> int:
        if not _is_count(handle) or (worker, handle) in self._handles:
            self._bad("has a handle that is no number or was given twice")
        assert isinstance(handle, int)
        self._handles.add((worker, handle))
        return handle

    # ------------------------------------------------------------------ tensor files

    def _tensor(self, file: str, name: str) -> torch.Tensor:
        self._used.setdefault(file, set()).add(name)
        try:
            if self._open is None or self._open[0] != file:
                self._close()
                self._open = self._opened(file)
            value: torch.Tensor = self._open[1].get_tensor(name)
        except (SafetensorError, OSError) as error:
            self._bad("speaks of a tensor that cannot be read", found=f"{file}: {error}")
        return value

    def _opened(self, file: str) -> tuple[str, Any, ExitStack]:
        path = self._folder / file
        if path.is_symlink() or not path.is_file():
            self._bad("speaks of a tensor file that is not there", found=file)
        stack = ExitStack()
        return file, stack.enter_context(safe_open(path, framework="pt")), stack

    def _close(self) -> None:
        if self._open is not None:
            self._open[2].close()
            self._open = None

    def _superfluous(self) -> None:
        """Tensors that no line names would be on record without having been sent."""
        self._close()
        for path in sorted(self._folder.glob("tensors-*.safetensors")):
            used = self._used.get(path.name)
            if used is None and self._partial:
                continue  # written just before the lines that would have named it
            try:
                with safe_open(path, framework="pt") as file:
                    names = set(file.keys())
            except SafetensorError as error:
                self._bad("has a tensor file that cannot be read", found=f"{path.name}: {error}")
            if names != (used or set()) and not self._partial:
                self._bad("has tensors that no line names", found=path.name)

    def _bad(self, what: str, **details: Any) -> NoReturn:
        raise DataError(f"the transcript in {self._folder} {what} (line {self._line})", **details)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name twice")
    return found


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)
