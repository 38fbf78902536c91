"""What an enclave that serves a model and its host say to each other.

Host to enclave: :class:`Infer`, :class:`Sealed`, :class:`Attest`, :class:`Drain`. Enclave to
host: :class:`Ready` first, then :class:`Result`, :class:`SealedResult`, :class:`Evidence` and
:class:`Failure`, each with the number that the host gave its request, in any order. How they
travel: :mod:`cenacle.enclave.serving_wire`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

from cenacle.cut.specs import TensorSpec
from cenacle.documents.base import b64
from cenacle.enclave.tensor_bytes import Parts, Tensors, pack_tensors
from cenacle.errors import CenacleError, DataError

__all__ = [
    "ERROR_FIELDS",
    "MAX_TEXT",
    "NONCE_BYTES",
    "Attest",
    "Direction",
    "Drain",
    "Evidence",
    "Failure",
    "FailureCode",
    "FromEnclave",
    "Infer",
    "Malformed",
    "Message",
    "Ready",
    "Result",
    "Sealed",
    "SealedResult",
    "ToEnclave",
]

NONCE_BYTES: Final = 32
MAX_TEXT: Final = 2000
ERROR_FIELDS: Final = ("error", "what", "found", "expected", "remedy")
"""What of an error crosses, each at most ``MAX_TEXT`` characters."""

FailureCode = Literal[
    "malformed",  # no frame, or no sealed query, that this enclave can read
    "input",  # tensors that the model does not take
    "too-large",
    "busy",  # more waits than may wait; ask again later
    "draining",  # the service ends
    "sealed-only",
    "ticket",  # no use of a ticket that the issuer allows
    "failed",  # the model failed on this input
]


@dataclass(frozen=True, slots=True)
class Infer:
    """Tensors in plain, and the use of a ticket if the contract asks for one."""

    id: int
    tensors: Tensors
    ticket: Mapping[str, Any] | None = None

    def frame(self) -> tuple[dict[str, Any], Parts]:
        headers, parts = pack_tensors(self.tensors)
        use = {} if self.ticket is None else {"ticket": dict(self.ticket)}
        return {"type": "infer", "id": self.id, "tensors": headers, **use}, parts


@dataclass(frozen=True, slots=True)
class Sealed:
    """A query that only the enclave opens: see :mod:`cenacle.enclave.sealed_query`."""

    id: int
    query: bytes | bytearray | memoryview

    def frame(self) -> tuple[dict[str, Any], Parts]:
        return {"type": "sealed", "id": self.id}, [memoryview(self.query)]


@dataclass(frozen=True, slots=True)
class Attest:
    """A client's challenge: 32 bytes that it drew."""

    id: int
    nonce: bytes

    def frame(self) -> tuple[dict[str, Any], Parts]:
        return {"type": "attest", "id": self.id, "nonce": b64(self.nonce)}, []


@dataclass(frozen=True, slots=True)
class Drain:
    """Take no more queries, answer those that wait, and end the job."""

    def frame(self) -> tuple[dict[str, Any], Parts]:
        return {"type": "drain"}, []


@dataclass(frozen=True, slots=True)
class Ready:
    """The enclave serves.

    Attributes:
        contract: digest of the contract that it serves under.
        inputs: what :class:`Infer` must hold.
        outputs: what :class:`Result` will hold, after the contract's output policy.
        hpke_key: whom clients seal queries to; the enclave's evidence vouches for it.
        signing_key: of the same evidence.
        max_batch: rows that one query may have at most.
        max_payload: bytes that may follow the header of a frame to the enclave.
        max_waiting: queries that may be in flight; one more is told ``busy``.
    """

    contract: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    hpke_key: bytes
    signing_key: bytes
    max_batch: int
    max_payload: int
    max_waiting: int

    def frame(self) -> tuple[dict[str, Any], Parts]:
        return {
            "type": "ready",
            "contract": self.contract,
            "inputs": [spec.to_fields() for spec in self.inputs],
            "outputs": [spec.to_fields() for spec in self.outputs],
            "hpke_key": b64(self.hpke_key),
            "signing_key": b64(self.signing_key),
            "max_batch": self.max_batch,
            "max_payload": self.max_payload,
            "max_waiting": self.max_waiting,
        }, []


@dataclass(frozen=True, slots=True)
class Result:
    """The answer to :class:`Infer`."""

    id: int
    tensors: Tensors

    def frame(self) -> tuple[dict[str, Any], Parts]:
        headers, parts = pack_tensors(self.tensors)
        return {"type": "result", "id": self.id, "tensors": headers}, parts


@dataclass(frozen=True, slots=True)
class SealedResult:
    """The answer to :class:`Sealed`, errors of the query included, for its client alone."""

    id: int
    answer: bytes | bytearray | memoryview

    def frame(self) -> tuple[dict[str, Any], Parts]:
        return {"type": "sealed-result", "id": self.id}, [memoryview(self.answer)]


@dataclass(frozen=True, slots=True)
class Evidence:
    """The answer to :class:`Attest`: a :mod:`cenacle.enclave.client_evidence` document, JSON."""

    id: int
    document: bytes | bytearray | memoryview

    def frame(self) -> tuple[dict[str, Any], Parts]:
        return {"type": "evidence", "id": self.id}, [memoryview(self.document)]


@dataclass(frozen=True, slots=True)
class Failure:
    """A request that has no answer; ``id`` is None where its number could not be read."""

    id: int | None
    code: FailureCode
    error: CenacleError

    def frame(self) -> tuple[dict[str, Any], Parts]:
        told = {
            name: value[:MAX_TEXT]
            for name, value in self.error.to_dict().items()
            if name in ERROR_FIELDS and value is not None
        }
        return {"type": "failure", "id": self.id, "code": self.code, "error": told}, []


@dataclass(frozen=True, slots=True)
class Malformed:
    """A frame that arrived whole and says nothing that its direction allows.

    Attributes:
        id: of the request, where it could be read.
        error: what is wrong, without quoting what was sent.
    """

    id: int | None
    error: DataError


ToEnclave: TypeAlias = Infer | Sealed | Attest | Drain
FromEnclave: TypeAlias = Ready | Result | SealedResult | Evidence | Failure
Message: TypeAlias = ToEnclave | FromEnclave
Direction = Literal["to-enclave", "from-enclave"]
