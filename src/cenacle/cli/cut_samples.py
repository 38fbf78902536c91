"""Samples for commands about cuts: files of tensors, their labels, and what feeds which input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cenacle.errors import DataError, InputError

__all__ = ["parse_classes", "parse_feeds", "read_tensors"]


def parse_classes(text: str) -> list[int]:
    """``0-9`` or ``0,1,5`` as labels.

    Raises:
        InputError: neither, or fewer than two.
    """
    labels: list[int] = []
    try:
        for part in text.split(","):
            first, dash, last = part.strip().partition("-")
            low = int(first)
            labels += range(low, int(last) + 1) if dash and first else [low]
    except ValueError:
        labels = []
    if len(labels) < 2 or len(set(labels)) < len(labels) or len(labels) > 10_000:
        raise InputError(
            "the classes cannot be used",
            found=repr(text[:80]),
            expected="two labels or more, such as 0-9 or 0,1,5",
        )
    return labels


def read_tensors(path: Path) -> dict[str, Any]:
    """All tensors of a .npz or .safetensors file.

    Raises:
        InputError: no such file, or another kind.
        DataError: it is damaged, or would run code.
    """
    import numpy as np
    import safetensors
    import safetensors.numpy

    if path.suffix.lower() not in (".npz", ".safetensors") or not path.is_file():
        raise InputError(
            "the samples cannot be read",
            found=str(path),
            expected="an existing file that ends in .npz or .safetensors",
        )
    try:
        if path.suffix.lower() == ".safetensors":
            return dict(safetensors.numpy.load_file(path))
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (ValueError, KeyError, OSError, EOFError, safetensors.SafetensorError) as error:
        raise DataError(f"{path.name} is damaged", found=type(error).__name__) from None


def parse_feeds(texts: list[str] | None) -> dict[str, str]:
    """``attention_mask=mask`` as an input of a front and the tensor that feeds it.

    Raises:
        InputError: another form.
    """
    found = {}
    for text in texts or ():
        name, equals, tensor = text.partition("=")
        if not equals or not name or not tensor:
            raise InputError(
                "an input's tensor is not said",
                found=repr(text[:80]),
                expected="INPUT=TENSOR, such as attention_mask=mask",
            )
        found[name] = tensor
    return found
