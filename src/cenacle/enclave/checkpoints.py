"""Sealed checkpoints whose newest version only the broker can name.

A checkpoint is a sealed file ``checkpoint-RUN-N.sealed`` under a key that only enclaves of the
same run can derive; other runs may keep theirs in the same folder. After it is durable its
version and content digest are registered with the broker, and from then on every older one is
void: whoever puts an old file back, or the whole folder, is caught because the broker's record
differs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cenacle.documents.base import canonical_json
from cenacle.enclave.session import Session
from cenacle.errors import CenacleError, SealError
from cenacle.sealing import open_tensors, seal_tensors
from cenacle.sealing.disk import disk_errors
from cenacle.training import Checkpoint

__all__ = ["SealedCheckpoints"]

_META = "__cenacle_meta__"


class SealedCheckpoints:
    """A :class:`cenacle.training.CheckpointSink` in a folder of the host's."""

    def __init__(self, folder: Path, session: Session) -> None:
        self._folder = folder
        self._session = session
        # A digest, because the broker chose the run's name and could put a path into it.
        run = hashlib.sha256(session.release.run.encode()).hexdigest()[:12]
        self._prefix = f"checkpoint-{run}-"

    def _path(self, version: int) -> Path:
        return self._folder / f"{self._prefix}{version}.sealed"

    def save(
        self, version: int, tensors: Mapping[str, NDArray[Any]], meta: Mapping[str, Any]
    ) -> None:
        """Seal, make durable, register, and only then drop the one before."""
        text = np.frombuffer(canonical_json(dict(meta)), dtype=np.uint8)
        with self._session.checkpoint_key(version) as key:
            info = seal_tensors({**tensors, _META: text}, self._path(version), key)
        self._session.register_checkpoint(version, info.digest)
        self._remove(keep=self._path(version))

    def discard(self) -> None:
        """Remove the run's checkpoints, which are of no use once it is settled."""
        self._remove(keep=None)

    def _remove(self, keep: Path | None) -> None:
        with disk_errors(f"remove old checkpoints in {self._folder}"):
            for path in self._folder.glob(f"{self._prefix}*.sealed"):
                if path != keep:
                    path.unlink(missing_ok=True)

    def load(self) -> Checkpoint | None:
        """The checkpoint that the broker named at the release, or None if it named none.

        Raises:
            SealError: the file is missing, older, altered or of another run.
        """
        version = self._session.release.checkpoint_version
        expected = self._session.release.checkpoint_digest
        if version == 0 or expected is None:
            return None
        try:
            with self._session.checkpoint_key(version) as key:
                tensors = dict(open_tensors(self._path(version), key, expected_digest=expected))
        except CenacleError as error:
            raise SealError(
                f"the newest checkpoint (version {version}) is not in the folder",
                found=error.diagnostics(),
                expected=f"the sealed file with digest {expected}",
                remedy="put the newest checkpoint back, or abandon the run and start a new one",
            ) from None
        meta = json.loads(tensors.pop(_META).tobytes())
        return Checkpoint(version, tensors, meta)
