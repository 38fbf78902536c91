"""Asset keys in the clear, for as long as it takes to seal them to enclaves.

Releases that were committed together are sealed together, and often ask for the same assets. So
what several of them need is unwrapped once, into locked memory, and wiped when all are sealed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

from cenacle.broker.store import AssetRow
from cenacle.crypto import HpkePrivateKey, SecretBytes
from cenacle.documents.asset import Asset

__all__ = ["UnwrappedKeys"]


class UnwrappedKeys:
    """A context manager; what it opened is wiped at its end.

    Args:
        key: the broker's, to which asset keys are wrapped.
    """

    def __init__(self, key: HpkePrivateKey) -> None:
        self._key = key
        self._opened: dict[tuple[bytes, ...], SecretBytes] = {}

    def of(
        self, assets: Mapping[str, Asset], rows: Mapping[str, AssetRow]
    ) -> dict[str, SecretBytes]:
        """The keys of ``assets`` by alias; they are not the caller's to wipe.

        Args:
            rows: by alias, what the broker stores of each asset.

        Raises:
            SealError: a wrapped key does not open, or was wrapped for another manifest.
        """
        return {
            alias: self._open(rows[alias].wrapped_key, *asset.wrapping_context())
            for alias, asset in assets.items()
        }

    def _open(self, *wrapped_and_context: bytes) -> SecretBytes:
        # The same only for the very same bytes under the very same context.
        opened = self._opened.get(wrapped_and_context)
        if opened is None:
            opened = self._opened[wrapped_and_context] = self._key.open(*wrapped_and_context)
        return opened

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for opened in self._opened.values():
            opened.wipe()
        self._opened.clear()
