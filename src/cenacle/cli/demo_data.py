"""Pictures of handwritten digits for demonstrations: MNIST's own files, or scikit-learn's digits.

MNIST: LeCun, Cortes and Burges, http://yann.lecun.com/exdb/mnist/ (four gzipped IDX files).
"""

from __future__ import annotations

import gzip
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cenacle.errors import DataError, InputError, UnavailableError

__all__ = ["Pictures", "load_pictures", "read_idx"]

_IMAGES: Final = "train-images-idx3-ubyte"
_LABELS: Final = "train-labels-idx1-ubyte"
_UNSIGNED_BYTES: Final = 0x08


@dataclass(frozen=True)
class Pictures:
    """Grey pictures with the digit that each shows.

    Attributes:
        source: where they come from, for people.
        images: (count, height, width), uint8.
        labels: (count,), uint8.
        scale: brings a pixel to between 0 and 1.
    """

    source: str
    images: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    scale: float


def load_pictures(folder: Path | None, count: int) -> Pictures:
    """The first ``count`` training pictures of MNIST in ``folder``, or scikit-learn's digits.

    Args:
        folder: with MNIST's files, or with a folder ``mnist`` of them. ``None``: what the
            variable CENACLE_DATA names, if there are such files; else the digits.

    Raises:
        InputError: the folder has no such files.
        DataError: a file is malformed.
        UnavailableError: there is no folder, and scikit-learn is not installed.
    """
    named = os.environ.get("CENACLE_DATA")
    if folder is not None:
        found = _mnist_folder(folder)
        if found is None:
            raise InputError(
                "the folder has no MNIST files" if folder.is_dir() else "there is no such folder",
                found=str(folder),
                expected=f"{_IMAGES}.gz and {_LABELS}.gz, or unpacked",
            )
        return _mnist(found, count)
    if named and (found := _mnist_folder(Path(named))) is not None:
        return _mnist(found, count)
    return _digits(count)


def _file(folder: Path, stem: str) -> Path | None:
    names = (stem, f"{stem}.gz", stem.replace("-idx", ".idx"))
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _mnist_folder(folder: Path) -> Path | None:
    for place in (folder, folder / "mnist"):
        if _file(place, _IMAGES) and _file(place, _LABELS):
            return place
    return None


def _mnist(folder: Path, count: int) -> Pictures:
    files = [_file(folder, stem) for stem in (_IMAGES, _LABELS)]
    assert files[0] is not None
    assert files[1] is not None
    images, labels = read_idx(files[0], 3, count), read_idx(files[1], 1, count)
    if len(images) != len(labels):
        raise DataError("pictures and labels differ in number", found=str(folder))
    return Pictures("MNIST", images, labels, 1 / 255)


def read_idx(path: Path, dimensions: int, count: int) -> NDArray[np.uint8]:
    """The first ``count`` items of an IDX file of bytes, plain or gzipped.

    Returns:
        As many as there are, with ``dimensions`` dimensions.

    Raises:
        DataError: the file is malformed.
    """
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            file: Any = gzip.GzipFile(fileobj=raw) if packed else raw
            head = file.read(4 + 4 * dimensions)
            magic, *sizes = struct.unpack(f">{1 + dimensions}I", head)
            if magic != (_UNSIGNED_BYTES << 8) | dimensions or not all(sizes):
                raise ValueError
            taken = min(count, sizes[0])
            if (item := int(np.prod(sizes[1:], dtype=object))) > 1 << 20:
                raise ValueError
            data = file.read(taken * item)
        return np.frombuffer(data, np.uint8).reshape(taken, *sizes[1:])
    except (ValueError, struct.error, EOFError, gzip.BadGzipFile, zlib.error):
        raise DataError(
            "an IDX file is malformed",
            found=path.name,
            expected=f"unsigned bytes in {dimensions} dimensions",
            remedy="fetch the file again from its source",
        ) from None


def _digits(count: int) -> Pictures:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UnavailableError(
            "the demonstration's pictures are not here",
            found="no MNIST files and no scikit-learn",
            remedy="pip install 'cenacle[demo]', or name a folder with MNIST's files by --data",
        ) from None
    data = load_digits()
    images = data.images[:count].astype(np.uint8)
    return Pictures("scikit-learn's digits", images, data.target[:count].astype(np.uint8), 1 / 16)
