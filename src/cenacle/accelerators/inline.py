"""A worker within this process: on the CPU, or on a CUDA device.

On the CPU it protects nothing and speeds up nothing; it is for tests, for measuring what a
scheme itself costs, and for the enclave's own share when no worker is left. A CUDA device is
a real accelerator: what is put there leaves the enclave.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import ClassVar

import torch

from cenacle.accelerators.operations import execute
from cenacle.accelerators.protocol import Accelerator, HeapStaging, Operation, Pending
from cenacle.errors import AcceleratorError, InputError

__all__ = ["InlineAccelerator"]


class _PinnedStaging:
    """Page-locked memory, from which a device copies by itself."""

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)


class _Ready(Pending):
    def __init__(self, value: torch.Tensor, seconds: float) -> None:
        self._value = value
        self.seconds = seconds

    def wait(self, timeout: float | None = None) -> torch.Tensor:  # noqa: ARG002
        return self._value


class _Copying(Pending):
    def __init__(self, value: torch.Tensor, start: torch.Event, owner: str) -> None:
        self._host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        self._host.copy_(value, non_blocking=True)
        self._start, self._end = start, torch.Event("cuda", enable_timing=True)
        self._end.record()
        self._owner = owner

    def wait(self, timeout: float | None = None) -> torch.Tensor:  # noqa: ARG002
        try:
            self._end.synchronize()
        except RuntimeError as error:
            raise _failed(self._owner, error) from None
        self.seconds = self._start.elapsed_time(self._end) / 1e3
        return self._host


def _failed(name: str, error: Exception) -> AcceleratorError:
    return AcceleratorError(
        f"accelerator {name} failed",
        found=f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}",
    )


class InlineAccelerator(Accelerator):
    """Computes in this process when it is asked.

    Args:
        name: unique in a fleet.
        device: ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        InputError: torch knows no such device.
    """

    kind: ClassVar[str] = "inline"

    def __init__(self, name: str = "inline", device: str = "cpu") -> None:
        self.name = name
        self.device = torch.device(device)
        if self.device.type not in {"cpu", "cuda"} or (
            self.device.type == "cuda" and not torch.cuda.is_available()
        ):
            raise InputError(
                "an accelerator's device is not there",
                found=device,
                expected="cpu" + (" or cuda" if torch.cuda.is_available() else ""),
            )
        if self.device.type == "cuda":
            # TF32 rounds to 11 bits, and the fastest algorithms differ from run to run.
            torch.backends.cuda.matmul.allow_tf32 = False
            torch.backends.cudnn.allow_tf32 = False
            torch.backends.cudnn.deterministic = True
        self.staging = HeapStaging() if self.device.type == "cpu" else _PinnedStaging()
        self._kept: dict[int, torch.Tensor] = {}
        self._seconds = 0.0
        self._since: torch.Event | None = None

    def put(self, handle: int, value: torch.Tensor) -> None:
        if self.device.type == "cpu":
            self._kept[handle] = value
            return
        self._start()
        self._kept[handle] = value.to(self.device, non_blocking=True)

    def call(self, operation: Operation, result: int, operands: Sequence[int]) -> None:
        self._start()
        begin = time.perf_counter()
        try:
            self._kept[result] = execute(operation, [self._kept[one] for one in operands])
        except (RuntimeError, KeyError, ValueError, TypeError) as error:
            raise _failed(self.name, error) from None
        self._seconds += time.perf_counter() - begin

    def get(self, handle: int) -> Pending:
        value = self._kept.get(handle)
        if value is None:
            raise AcceleratorError(f"accelerator {self.name} lost a tensor")
        if self.device.type == "cpu":
            seconds, self._seconds = self._seconds, 0.0
            return _Ready(value, seconds)
        self._start()
        assert self._since is not None
        since, self._since = self._since, None
        return _Copying(value, since, self.name)

    def drop(self, handles: Sequence[int]) -> None:
        for handle in handles:
            self._kept.pop(handle, None)

    def close(self) -> None:
        self._kept.clear()

    def describe(self) -> str:
        if self.device.type == "cuda":
            return f"inline, {torch.cuda.get_device_name(self.device)}"
        return "inline, cpu of the enclave's own process"

    def _start(self) -> None:
        if self.device.type == "cuda" and self._since is None:
            self._since = torch.Event("cuda", enable_timing=True)
            self._since.record()
