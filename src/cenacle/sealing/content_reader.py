"""What readers of tables and of tensors share: the container beneath, and who closes it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Self

from cenacle.crypto import SecretBytes
from cenacle.errors import InputError
from cenacle.sealing.info import SealedInfo
from cenacle.sealing.reader import SealedReader, Source

__all__ = ["ContentReader"]


class ContentReader(ABC):
    """Reads content of one kind out of a sealed container.

    Args:
        source: a sealed file, a buffer that holds a container, or an opened reader (which
            stays the caller's to close).
        key: the asset key; ``None`` only with an opened reader.
        expected_header: the header digest the container must have.
        expected_digest: the content digest the container must have.
        threads: how many threads decrypt; by default one a core, at most 8.

    Raises:
        InputError, SealError: as :class:`SealedReader`.
        DataError: the content is not what its kind promises.
    """

    kind: ClassVar[str]

    def __init__(
        self,
        source: Source | SealedReader,
        key: SecretBytes | None = None,
        *,
        expected_header: str | None = None,
        expected_digest: str | None = None,
        threads: int | None = None,
    ) -> None:
        self._owned = not isinstance(source, SealedReader)
        if isinstance(source, SealedReader):
            self._reader = source
        elif key is None:
            raise InputError("no key was given", found="none", expected="the asset key")
        else:
            self._reader = SealedReader(
                source,
                key,
                expected_header=expected_header,
                expected_digest=expected_digest,
                kind=self.kind,
                threads=threads,
            )
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    @abstractmethod
    def _open(self) -> None:
        """Read and check what describes the content; raises DataError."""

    @property
    def info(self) -> SealedInfo:
        """As :attr:`SealedReader.info`."""
        return self._reader.info

    def close(self) -> None:
        if self._owned:
            self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
