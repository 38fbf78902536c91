"""What an untrusted worker can be asked, and how it answers.

A worker keeps tensors under numbers (handles) and computes new ones from them. It gets
whatever a scheme sends; it may read, keep and falsify all of it. So nothing here is trusted:
results are checked by :mod:`cenacle.offload.integrity`, and read once.

Requests to one worker are carried out in the order in which they were made. Only
:meth:`Pending.wait` waits; everything else returns at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch

from cenacle.accelerators.buffers import Buffers

__all__ = ["Accelerator", "HeapStaging", "Operation", "Pending", "Staging"]


@dataclass(frozen=True, slots=True)
class Operation:
    """One kind of algebra with its constants, e.g. a convolution with its stride.

    Attributes:
        name: a key of :data:`cenacle.accelerators.operations.OPERATIONS`.
        attributes: JSON values only; they cross to the worker as JSON.
    """

    name: str
    attributes: Mapping[str, Any] = field(default_factory=dict)


class Staging(Protocol):
    """Where the enclave writes what it is about to send, so that sending it copies nothing.

    It may be shared memory, which workers read while it is written: write nothing there that
    is not blinded yet. Many of torch's functions with ``out=`` (``addmm``, ``baddbmm``) first
    copy an operand there as it is.
    """

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor with undefined content, given back when nobody refers to it."""
        ...


class HeapStaging:
    """Ordinary memory, used again."""

    def __init__(self) -> None:
        self._buffers = Buffers()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return self._buffers.empty(shape, dtype)


class Pending(ABC):
    """A result under way."""

    seconds: float = 0.0
    """What the worker says that computing took; known after :meth:`wait`, and not trusted."""

    @abstractmethod
    def wait(self, timeout: float | None = None) -> torch.Tensor:
        """The result, on the CPU.

        It may lie in memory that the worker can still write: read every element once, into
        memory of the enclave, and check what was read.

        Raises:
            AcceleratorError: the worker died, failed, answered with something else than a
                tensor of the promised form, or took longer than ``timeout`` seconds.
        """


class Accelerator(ABC):
    """One worker.

    Attributes:
        name: unique in a fleet; errors and receipts name it.
        staging: where tensors for it are best written.
    """

    kind: ClassVar[str]
    name: str
    staging: Staging

    @abstractmethod
    def put(self, handle: int, value: torch.Tensor) -> None:
        """Give the worker a tensor. ``value`` must not change until the handle is dropped."""

    @abstractmethod
    def call(self, operation: Operation, result: int, operands: Sequence[int]) -> None:
        """Compute ``operation`` on kept tensors and keep the result."""

    @abstractmethod
    def get(self, handle: int) -> Pending:
        """Ask for a kept tensor."""

    @abstractmethod
    def drop(self, handles: Sequence[int]) -> None:
        """Forget tensors. Unknown handles are ignored."""

    @abstractmethod
    def close(self) -> None:
        """Let the worker go. Safe to call twice; everything it keeps is lost."""

    def describe(self) -> str:
        """For receipts and tables: the kind, and what it runs on as far as it says."""
        return self.kind
