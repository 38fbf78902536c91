"""Models and samples of ``cenacle demo serving``.

The builders are named to ``cenacle cut retrain`` as any user names a function of theirs, such as
``cenacle.cli.demo_serving_models:digits``.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from cenacle.cli.demo_data import load_pictures
from cenacle.cli.demo_lite0 import load_lite0
from cenacle.cli.demo_minilm import SentenceTokenizer, load_minilm
from cenacle.cli.demo_triage import ROUTINE, URGENT
from cenacle.errors import DataError, InputError, UnavailableError

__all__ = ["TOKENS", "Material", "digits", "material", "notes", "photos"]

Kind = Literal["digits", "photos", "notes"]

TOKENS: Final = 32  # of a triage note; all are shorter
_DIGITS: Final = 3000
_PHOTOS: Final = 4000
_GREY_SIDE: Final = 64
_PHOTO_SIDE: Final = 96
_LEAST_PHOTOS: Final = 4
_MAX_PIXELS: Final = 50_000_000
_ENDINGS: Final = (".png", ".jpg", ".jpeg")


class _Prepare(nn.Module):
    """Pixels of 0 to 255, grey or in colour, as EfficientNet-Lite0 was trained on them."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        size = (self.side, self.side)
        resized = functional.interpolate(pixels, size, mode="bilinear", align_corners=False)
        return ((resized - 127.0) / 128.0).expand(-1, 3, -1, -1)


class _Pictures(nn.Module):
    """EfficientNet-Lite0 on pictures of any size."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.prepare = _Prepare(side)
        self.network = load_lite0()

    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.network(self.prepare(picture))
        return scores


class _Notes(nn.Module):
    """all-MiniLM-L6-v2 with a layer for two classes, which is not trained yet."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = load_minilm()
        self.head = nn.Linear(384, 2)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.head(self.encoder(input_ids, attention_mask))
        return scores


def digits() -> nn.Module:
    """ImageNet's EfficientNet-Lite0 for small grey pictures."""
    return _Pictures(_GREY_SIDE)


def photos() -> nn.Module:
    """ImageNet's EfficientNet-Lite0 for photographs of 96 x 96."""
    return _Pictures(_PHOTO_SIDE)


def notes() -> nn.Module:
    """all-MiniLM-L6-v2 for short texts."""
    return _Notes()


@dataclass(frozen=True)
class Material:
    """What a demonstration plays with.

    Attributes:
        source: of the samples, for people.
        network: of the public front, for people.
        inputs: descriptions of the model's inputs for ``--input``.
        at: the last public layer.
        samples: name of the tensor of samples.
        feeds: further inputs of the front, each with its tensor.
        tensors: samples and ``labels``.
        classes: what each label means.
    """

    kind: Kind
    source: str
    network: str
    inputs: tuple[str, ...]
    at: str
    samples: str
    feeds: dict[str, str]
    tensors: dict[str, NDArray[Any]]
    classes: tuple[str, ...]

    @property
    def builder(self) -> str:
        """What ``cenacle cut retrain`` calls for the model."""
        return f"{__name__}:{self.kind}"


def material(kind: Kind, folder: Path | None) -> Material:
    """Samples and the model for them.

    Args:
        folder: of MNIST's files, or of photographs, one subfolder a class.

    Raises:
        InputError: the folder cannot be used.
        DataError: a file in it is malformed.
        UnavailableError: weights, or a library that reads the samples, are not installed.
    """
    if kind == "digits":
        return _digits(folder)
    if kind == "photos":
        assert folder is not None
        return _photos(folder)
    return _notes()


def _digits(folder: Path | None) -> Material:
    found = load_pictures(folder, _DIGITS)
    # scikit-learn's digits have other units than MNIST.
    scaled = np.round(found.images * (found.scale * 255)).astype(np.uint8)
    height, width = scaled.shape[1:]
    return Material(
        "digits",
        found.source,
        "EfficientNet-Lite0 (ImageNet)",
        (f"picture=F32[N,1,{height},{width}]",),
        "network.blocks.7",
        "picture",
        {},
        {"picture": scaled[:, None], "labels": found.labels.astype(np.int64)},
        tuple(str(digit) for digit in range(10)),
    )


def _photos(folder: Path) -> Material:
    try:
        library = importlib.import_module("PIL.Image")
    except ImportError:
        raise UnavailableError(
            "photographs cannot be read: Pillow is not installed",
            expected="the package pillow, which reads PNG and JPEG",
            remedy="pip install pillow, or play with digits",
        ) from None
    classes = (
        sorted(one.name for one in folder.iterdir() if one.is_dir()) if folder.is_dir() else []
    )
    images: list[NDArray[np.uint8]] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        files = sorted(p for p in (folder / name).iterdir() if p.suffix.lower() in _ENDINGS)
        for path in files[: _PHOTOS // len(classes)]:
            images.append(_photo(library, path))
            labels.append(label)
        if len(files) < _LEAST_PHOTOS:
            raise InputError(
                f"the class {name!r} has too few photographs",
                found=f"{len(files)} files that end in {', '.join(_ENDINGS)}",
                expected=f"{_LEAST_PHOTOS} or more",
            )
    if len(classes) < 2:
        raise InputError(
            "the folder has no classes to tell apart",
            found=f"{len(classes)} subfolders in {folder}",
            expected="one subfolder a class, two or more",
        )
    order = np.random.Generator(np.random.Philox(key=3)).permutation(len(images))
    return Material(
        "photos",
        f"{len(images)} photographs of {folder.name}",
        "EfficientNet-Lite0 (ImageNet)",
        (f"picture=F32[N,3,{_PHOTO_SIDE},{_PHOTO_SIDE}]",),
        "network.blocks.10",
        "picture",
        {},
        {"picture": np.stack(images)[order], "labels": np.array(labels, np.int64)[order]},
        tuple(classes),
    )


def _photo(library: Any, path: Path) -> NDArray[np.uint8]:
    """The middle square, (3, side, side)."""
    try:
        with library.open(path, formats=("PNG", "JPEG")) as image:
            if image.width * image.height > _MAX_PIXELS:
                raise ValueError("too large")
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            box = (left, top, left + side, top + side)
            small = image.convert("RGB").resize((_PHOTO_SIDE, _PHOTO_SIDE), box=box)
            return np.asarray(small, np.uint8).transpose(2, 0, 1)
    except (OSError, ValueError, SyntaxError, library.DecompressionBombError):
        raise DataError(
            "a photograph cannot be read",
            found=path.name,
            expected=f"PNG or JPEG of at most {_MAX_PIXELS // 1_000_000} million pixels",
        ) from None


def _notes() -> Material:
    texts = (*ROUTINE, *URGENT)
    labels = np.array([0] * len(ROUTINE) + [1] * len(URGENT), np.int64)
    encoded = SentenceTokenizer()(texts)
    order = np.random.Generator(np.random.Philox(key=3)).permutation(len(texts))
    tensors: dict[str, NDArray[Any]] = {
        name: array[:, :TOKENS][order] for name, array in encoded.items()
    }
    return Material(
        "notes",
        f"{len(texts)} synthetic triage notes",
        "all-MiniLM-L6-v2",
        (f"input_ids=I64[N,{TOKENS}]", f"attention_mask=I64[N,{TOKENS}]"),
        "encoder",
        "input_ids",
        {"attention_mask": "attention_mask"},
        {**tensors, "labels": labels[order]},
        ("routine", "urgent"),
    )
