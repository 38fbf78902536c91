"""PyTorch state dicts, loaded without unpickling code (``weights_only=True``)."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import IO, Any, Final

from cenacle.errors import CenacleError, DataError, InputError
from cenacle.sealing.disk import disk_errors, open_source
from cenacle.sealing.importers.registry import Options, importer
from cenacle.sealing.safetensors_format import build_header
from cenacle.sealing.tensors import tensors_schema
from cenacle.sealing.writer import SealedWriter

__all__ = ["import_torch"]

_REMEDY: Final = (
    "save the model with torch.save(model.state_dict(), path), or with safetensors.torch.save_file"
)


def _refused(found: str) -> DataError:
    return DataError(
        "a PyTorch file is not a plain state dict",
        found=found,
        expected="a dictionary of tensors in the zip format of torch 1.6 or later",
        remedy=_REMEDY,
    )


def _is_zip(file: IO[bytes]) -> bool:
    try:
        return zipfile.is_zipfile(file)
    except (zipfile.BadZipFile, ValueError):
        return False


@importer("PyTorch state dict", "tensors", (".pt", ".pth"))
def import_torch(path: Path, writer: SealedWriter, options: Options) -> dict[str, Any]:
    """Every tensor of the dictionary under its key; anything else is refused.

    Raises:
        DataError: an old or foreign pickle, a whole module, nested or sparse content.
        InputError: torch is not installed.
    """
    fd = open_source(path)
    with os.fdopen(fd, "rb") as file, disk_errors(f"read {path}"):
        # The format before torch 1.6 is a bare pickle stream; it is not even tried.
        if not _is_zip(file):
            raise _refused("a file that is no zip archive")
    try:
        import torch  # noqa: PLC0415  (optional, and slow to import)
    except ImportError:
        raise InputError(
            "torch is needed to read this file",
            found="not installed",
            expected="torch",
            remedy="run pip install 'cenacle[train]', or convert the file to safetensors",
        ) from None
    names: dict[torch.dtype, str] = {
        torch.bool: "BOOL",
        torch.uint8: "U8",
        torch.int8: "I8",
        torch.int16: "I16",
        torch.int32: "I32",
        torch.int64: "I64",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.float32: "F32",
        torch.float64: "F64",
        torch.complex64: "C64",
    }
    try:
        with disk_errors(f"read {path}"):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except CenacleError:
        raise
    except Exception:
        # On damaged files torch's restricted unpickler fails in every way Python knows.
        raise _refused("content that loads only by running code, or a damaged file") from None
    if not isinstance(state, dict) or not state:
        raise _refused("no dictionary, or an empty one")
    specs: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise _refused("an entry that is not a tensor under a text key")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.dtype not in names:
            raise _refused(f"tensor {name[:80]!r} that is sparse, quantized or of an odd type")
        specs[name] = (names[tensor.dtype], tuple(tensor.shape))
    header, order = build_header(specs)
    writer.write(header)
    for number, name in enumerate(order, 1):
        plain = state[name].detach().contiguous().reshape(-1)
        if plain.numel():
            writer.write(plain.view(torch.uint8).numpy().data)
        if options.progress is not None:
            options.progress(number, len(order))
    return tensors_schema(specs)
