"""Any file, as its bytes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from cenacle.sealing.disk import open_source
from cenacle.sealing.importers.registry import Options, importer
from cenacle.sealing.writer import SealedWriter

__all__ = ["import_plain"]


@importer("plain file", "file", ("",))
def import_plain(path: Path, writer: SealedWriter, options: Options) -> dict[str, Any]:
    """The file's bytes, unchanged."""
    fd = open_source(path)
    try:
        writer.write_file(fd, os.fstat(fd).st_size, options.progress)
    finally:
        os.close(fd)
    return {}
