"""What each worker received, written down for audits.

``transcript.jsonl`` has one JSON object a line: tensors that were put (``put``: worker, layer,
role, handle, shape, dtype, and the file and name under which its bytes lie) and operations
that were asked for (``call``: worker, layer, operation, attributes, result, operands). The
tensors lie in ``tensors-NNNN.safetensors``, named by their line. See ``docs/transcript.md``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file

from cenacle.accelerators.protocol import Operation
from cenacle.errors import ConflictError

__all__ = ["Transcript"]

_FILE_BYTES: Final = 256 * 1024 * 1024


class Transcript:
    """Records into a folder, or (without one) into memory.

    Attributes:
        lines: what was recorded, as in the file; ``tensors`` by line number.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.lines: list[dict[str, Any]] = []
        self.tensors: dict[int, torch.Tensor] = {}
        self._folder = folder
        self._waiting: dict[str, torch.Tensor] = {}
        self._bytes = 0
        self._file = 0
        if folder is not None:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if (folder / "transcript.jsonl").exists():
                raise ConflictError(
                    "a transcript is there already",
                    found=str(folder),
                    remedy="record into another folder",
                )

    def put(self, worker: str, site: str, role: str, handle: int, value: torch.Tensor) -> None:
        """A tensor goes to a worker."""
        number = len(self.lines)
        line: dict[str, Any] = {
            "event": "put",
            "worker": worker,
            "layer": site,
            "role": role,
            "handle": handle,
            "shape": list(value.shape),
            "dtype": str(value.dtype).removeprefix("torch."),
        }
        if self._folder is None:
            self.tensors[number] = value.clone()
        else:
            line["file"], line["tensor"] = f"tensors-{self._file:04d}.safetensors", str(number)
            self._waiting[str(number)] = value.clone()
            self._bytes += value.nbytes
        self.lines.append(line)
        if self._bytes >= _FILE_BYTES:
            self.flush()

    def call(
        self, worker: str, site: str, operation: Operation, result: int, operands: Sequence[int]
    ) -> None:
        """A worker is asked to compute."""
        self.lines.append(
            {
                "event": "call",
                "worker": worker,
                "layer": site,
                "operation": operation.name,
                "attributes": dict(operation.attributes),
                "result": result,
                "operands": list(operands),
            }
        )

    def flush(self) -> None:
        """Write what waits; a no-op in memory."""
        if self._folder is None:
            return
        if self._waiting:
            save_file(self._waiting, self._folder / f"tensors-{self._file:04d}.safetensors")
            self._waiting, self._bytes, self._file = {}, 0, self._file + 1
        text = "".join(json.dumps(line) + "\n" for line in self.lines)
        (self._folder / "transcript.jsonl").write_text(text)

    def close(self) -> None:
        self.flush()
