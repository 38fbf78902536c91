"""What the service needs of an enclave: a seam, so that the service can be tested without one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from cenacle.enclave.serving_messages import FailureCode, Ready
from cenacle.enclave.tensor_bytes import Tensors
from cenacle.errors import CenacleError, UnavailableError

__all__ = ["QueryError", "QueryErrorCode", "Tail", "enclave_gone"]

QueryErrorCode: TypeAlias = FailureCode | Literal["gone", "late"]
"""Why a query has no answer: what an enclave says, or that it is gone or does not answer."""


class QueryError(Exception):
    """A query without an answer: why, for the status and the metrics, and in words."""

    def __init__(self, code: QueryErrorCode, error: CenacleError) -> None:
        super().__init__(code)
        self.code: QueryErrorCode = code
        self.error = error


def enclave_gone() -> QueryError:
    """What every request gets whose enclave died, or that comes when none is there."""
    error = UnavailableError(
        "the enclave that answers is not there", remedy="send the request again in a while"
    )
    return QueryError("gone", error)


class Tail(ABC):
    """An enclave that serves. Each method raises :class:`QueryError`, and never waits for ever."""

    @property
    @abstractmethod
    def ready(self) -> Ready:
        """What it takes, gives and allows."""

    @property
    @abstractmethod
    def waiting(self) -> int:
        """Queries that it was sent and has not answered."""

    @abstractmethod
    async def infer(self, tensors: Tensors, ticket: Mapping[str, Any] | None = None) -> Tensors:
        """Outputs for crossing tensors in plain."""

    @abstractmethod
    async def sealed(self, query: bytes) -> bytes | bytearray | memoryview:
        """The sealed answer to a sealed query."""

    @abstractmethod
    async def attest(self, nonce: bytes) -> bytes | bytearray | memoryview:
        """The enclave's evidence for a client's nonce of 32 bytes, as JSON."""

    @abstractmethod
    async def drain(self) -> None:
        """Have it answer what waits, and end its job; returns when its connection is closed."""
