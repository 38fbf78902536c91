"""The files of a cut: the front for anybody, the tail to be sealed, and what belongs together."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Final

from cenacle.cut.cutting import Cut
from cenacle.cut.onnx_model import OnnxModel
from cenacle.cut.tail_file import SEGMENT_BYTES, write_tail
from cenacle.errors import ConflictError
from cenacle.sealing.disk import AtomicFile, disk_errors, pwrite_all

__all__ = ["CUT_FILE", "FRONT_FILE", "TAIL_FILE", "describe_cut", "write_cut"]

FRONT_FILE: Final = "front.onnx"
TAIL_FILE: Final = "tail.safetensors"
CUT_FILE: Final = "cut.json"
_WEIGHTS_FILE: Final = f"{FRONT_FILE}.data"


def describe_cut(model: OnnxModel, cut: Cut | None) -> dict[str, Any]:
    """What a cut gives away and what it hides, as JSON: names, sizes and shapes, no values.

    Args:
        cut: ``None`` if the whole model is the tail.
    """
    crossing = model.inputs if cut is None else cut.crossing
    public = () if cut is None else cut.public_parameters
    secret = model.parameters if cut is None else cut.secret_parameters
    return {
        "format": "cenacle.cut/1",
        "layer": None if cut is None else cut.layer,
        "inputs": [spec.to_fields() for spec in model.inputs],
        "crossing": [spec.to_fields() for spec in crossing],
        "outputs": [spec.to_fields() for spec in model.outputs],
        "public": _weights(model, public),
        "secret": _weights(model, secret),
    }


def _weights(model: OnnxModel, names: tuple[str, ...]) -> dict[str, Any]:
    weights = [model.index.weights[name] for name in names]
    return {
        "numbers": sum(weight.elements for weight in weights),
        "bytes": sum(weight.size for weight in weights),
        "names": list(names),
    }


def write_cut(
    model: OnnxModel,
    cut: Cut | None,
    folder: Path,
    *,
    force: bool = False,
    segment_bytes: int = SEGMENT_BYTES,
) -> dict[str, Any]:
    """Write ``front.onnx``, ``tail.safetensors`` and ``cut.json``, which names their digests.

    All files are complete before the first gets its name, and ``cut.json`` appears last: a folder
    that has one has the files that it names.

    Args:
        cut: ``None`` to write the whole model as a tail, without a front.
        folder: is made if it is not there.
        force: replace files of an earlier cut.

    Returns:
        the content of ``cut.json``.

    Raises:
        ConflictError: the folder holds a cut already.
        InputError, DataError, UnavailableError: the files cannot be written; nothing is left.
    """
    names = (CUT_FILE, FRONT_FILE, _WEIGHTS_FILE, TAIL_FILE)
    there = [name for name in names if (folder / name).exists()]
    if there and not force:
        raise ConflictError(
            "the folder holds files of a cut already",
            found=", ".join(str(folder / name) for name in there),
            remedy="choose another --out, or --force to replace them",
        )
    with contextlib.ExitStack() as stack:
        with disk_errors(f"write into {folder}"):
            if not folder.exists():
                folder.mkdir(parents=True)
                stack.callback(_remove_empty, folder)
            # 0700, as the tail is secret before it is sealed.
            work = Path(tempfile.mkdtemp(prefix=".cenacle-", suffix=".partial", dir=folder))
        stack.callback(shutil.rmtree, work, ignore_errors=True)
        described = describe_cut(model, cut)
        tail = model if cut is None else cut.tail
        front = None if cut is None else cut.front.save(work / FRONT_FILE)
        described["front"] = None if front is None else {"file": FRONT_FILE, "digest": front}
        digest = write_tail(tail, work / TAIL_FILE, segment_bytes=segment_bytes)
        described["tail"] = {"file": TAIL_FILE, "digest": digest}
        content = json.dumps(described, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        with AtomicFile(work / CUT_FILE) as file:
            with disk_errors(f"write {folder / CUT_FILE}"):
                pwrite_all(file.fd, content.encode(), 0)
            file.commit()
        with disk_errors(f"write into {folder}"):
            # The tail is secret until it is sealed; what others may read is the owner's choice.
            (work / TAIL_FILE).chmod(0o600)
            (folder / CUT_FILE).unlink(missing_ok=True)
            for name in (_WEIGHTS_FILE, FRONT_FILE, TAIL_FILE, CUT_FILE):
                if (work / name).exists():
                    (work / name).replace(folder / name)
                else:
                    (folder / name).unlink(missing_ok=True)
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
    return described


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()
