"""Asset: a sealed dataset, model or program, named by its signed manifest."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from cenacle.documents.base import Digest, Document, Frozen, JsonObject, Name, Natural, Timestamp
from cenacle.documents.terms import Terms

__all__ = ["Asset", "AssetType", "Container", "ContentKind"]

AssetType = Literal["dataset", "model", "program"]
ContentKind = Literal["table", "tensors", "file", "package"]


class Container(Frozen):
    """The ciphertext that the manifest speaks of.

    Attributes:
        header: digest of the container's header: pins the very file, cheaply.
        digest: content digest over every byte of ciphertext.
        size: bytes of ciphertext.
        plaintext_bytes: bytes of plaintext.
    """

    header: Digest
    digest: Digest
    size: Natural
    plaintext_bytes: Natural


class Asset(Document):
    """The manifest, signed by the owner. Its digest names the asset and its terms together.

    ``layout`` is public: column names and types with the number of rows, or tensor names,
    dtypes and shapes. An owner who must hide those seals a ``file`` (``cenacle seal --opaque``).
    """

    media_type = "application/vnd.cenacle.asset+json"

    kind: Literal["asset"] = "asset"
    version: Literal[1] = 1
    name: Name
    owner: Name
    owner_digest: Digest
    type: AssetType
    content: ContentKind
    container: Container
    layout: JsonObject = Field(default_factory=dict)
    package: Digest | None = None
    broker: Digest
    terms: Terms
    replaces: Digest | None = None
    created: Timestamp

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.type == "program") != (self.content == "package"):
            raise ValueError("a program is sealed as a package, and only a program is")
        if (self.package is None) != (self.type != "program"):
            raise ValueError("a program names the digest of its package, and only a program does")
        return self

    def wrapping_context(self) -> tuple[bytes, ...]:
        """What the wrapped asset key is bound to: this manifest, hence these very terms."""
        return (b"cenacle/asset-key", self.digest.encode())
