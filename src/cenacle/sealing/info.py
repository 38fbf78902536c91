"""What sealing tells its caller: everything a manifest needs, and no plaintext."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["SealedInfo"]


@dataclass(frozen=True, slots=True)
class SealedInfo:
    """A sealed container, as its manifest describes it.

    Attributes:
        kind: ``file``, ``table``, ``tensors`` or ``package``.
        header_digest: ``sha256:`` of the header; it pins the file key.
        digest: ``sha256:`` content digest; it pins every byte of the container.
        size: bytes of the container.
        plaintext_bytes: bytes of the plaintext.
        schema: for a table ``{"columns": [{"name", "type"}], "rows": n}``; for tensors
            ``{"tensors": {name: {"dtype", "shape"}}}``; for a package ``{"package":
            digest, "files": [paths]}``; empty for a file.
    """

    kind: str
    header_digest: str
    digest: str
    size: int
    plaintext_bytes: int
    schema: dict[str, Any] = field(default_factory=dict)
