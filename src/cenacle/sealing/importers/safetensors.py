"""safetensors files: checked strictly, then sealed byte for byte."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from cenacle.sealing.disk import disk_errors, open_source
from cenacle.sealing.importers.registry import Options, importer
from cenacle.sealing.safetensors_format import header_bytes, parse_header
from cenacle.sealing.tensors import tensors_schema
from cenacle.sealing.writer import SealedWriter

__all__ = ["import_safetensors"]


@importer("safetensors", "tensors", (".safetensors",))
def import_safetensors(path: Path, writer: SealedWriter, options: Options) -> dict[str, Any]:
    """The file's bytes, after its header was validated."""
    fd = open_source(path)
    try:
        with disk_errors(f"read {path}"):
            total = os.fstat(fd).st_size
            length = os.pread(fd, 8, 0)
            header = os.pread(fd, header_bytes(length, total), 8)
        specs = parse_header(length, header, total)
        writer.write_file(fd, total, options.progress)
    finally:
        os.close(fd)
    return tensors_schema({name: (spec.dtype, spec.shape) for name, spec in specs.items()})
