"""Offload plans in plain words, the choice of accelerators, and the demonstration's pictures."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter

from cenacle.cli.demo_data import download, load_pictures
from cenacle.cli.offload import plan_in_words
from cenacle.cli.receipt import accelerators_in_words
from cenacle.cli.run import choose_accelerators
from cenacle.documents.offload import OffloadPlan
from cenacle.documents.receipt import OffloadRecord
from cenacle.errors import DataError, InputError

Fields = dict[str, Any]
_PLAN: TypeAdapter[Any] = TypeAdapter(OffloadPlan)


def _contract(plan: Fields) -> Any:
    """A contract, to what reads its plan alone."""
    return SimpleNamespace(offload=_PLAN.validate_python(plan))


# ------------------------------------------------------------------ words


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({"scheme": "enclave"}, ["Nothing is sent to accelerators."]),
        (
            {"scheme": "measured"},
            ["scheme measured, for one accelerator (process)", "not checked", "in plain"],
        ),
        (
            {"scheme": "lowrank", "accelerators": {"count": 3, "kinds": ("cuda", "ray")}},
            ["for 3 accelerators (cuda or ray)", "a worker that lies is dropped", "in part"],
        ),
        ({"scheme": "lowrank", "check": False}, ["NOT checked"]),
        ({"scheme": "permuted"}, ["disguised, and recovered by known attacks"]),
        ({"scheme": "permuted", "allow_public_base": True}, ["sees EVERYTHING in plain"]),
        (
            {"scheme": "masked-training", "accelerators": {"count": 2}},
            ["Accelerators see nothing", "Hidden from them: inputs, weights"],
        ),
    ],
)
def test_a_plan_is_said_in_plain_words(plan: Fields, words: list[str]) -> None:
    pytest.importorskip("torch")
    said = "\n".join(plan_in_words(_contract(plan)))
    for word in words:
        assert word in said


def test_a_receipts_account_names_whoever_was_dropped() -> None:
    told = OffloadRecord.from_fields(
        {
            "accelerators": [{"name": "process-1", "kind": "process", "description": "cpu"}],
            "dropped": [{"name": "process-1", "layer": "conv1", "reason": "it lied"}],
            "bytes_sent": 1234567,
            "bytes_received": 89,
            "products": 12,
            "checked": 12,
            "seconds_inside": 0.5,
            "seconds_outside": 0.25,
            "kept_inside": ["lstm"],
        }
    )
    said = accelerators_in_words(told)
    for word in ("process-1: cpu", "1,234,567", "12 of them", "dropped process-1 at conv1", "lstm"):
        assert word in said


# ------------------------------------------------------------------ accelerators


@pytest.mark.parametrize(
    ("plan", "wanted", "chosen"),
    [
        ({"scheme": "enclave"}, "contract", ()),
        ({"scheme": "measured"}, "contract", ("process",)),
        (
            {"scheme": "measured", "accelerators": {"count": 2, "kinds": ("cuda", "process")}},
            "contract",
            ("cuda", "cuda"),
        ),
        (
            {"scheme": "measured", "accelerators": {"count": 2, "kinds": ("cuda", "process")}},
            "process",
            ("process", "process"),
        ),
    ],
)
def test_the_operator_starts_what_the_contract_allows(
    plan: Fields, wanted: str, chosen: tuple[str, ...]
) -> None:
    assert choose_accelerators(_PLAN.validate_python(plan), wanted) == chosen


@pytest.mark.parametrize(
    ("plan", "wanted"), [({"scheme": "enclave"}, "process"), ({"scheme": "measured"}, "cuda")]
)
def test_the_operator_starts_nothing_else(plan: Fields, wanted: str) -> None:
    with pytest.raises(InputError):
        choose_accelerators(_PLAN.validate_python(plan), wanted)


# ------------------------------------------------------------------ pictures


def _idx(dimensions: int, *sizes: int, items: bytes = b"", kind: int = 8) -> bytes:
    return struct.pack(f">HBB{len(sizes)}I", 0, kind, dimensions, *sizes) + items


IMAGES = _idx(3, 3, 2, 2, items=bytes(range(12)))
LABELS = _idx(1, 3, items=bytes([7, 1, 9]))


def _folder(folder: Path, images: bytes = IMAGES, labels: bytes = LABELS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
    (folder / "train-labels.idx1-ubyte").write_bytes(labels)
    return folder


@pytest.mark.parametrize("inner", ["", "mnist"])
def test_idx_files_are_read_packed_or_not(inner: str, tmp_path: Path) -> None:
    _folder(tmp_path / inner)
    found = load_pictures(tmp_path, 2)
    assert found.source == "MNIST"
    assert np.array_equal(found.images, np.arange(8, dtype=np.uint8).reshape(2, 2, 2))
    assert list(found.labels) == [7, 1]
    assert len(load_pictures(tmp_path, 100).images) == 3


def test_a_variable_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _folder(tmp_path / "mnist")
    monkeypatch.setenv("CENACLE_DATA", str(tmp_path))
    assert load_pictures(None, 3).source == "MNIST"


def test_without_a_folder_there_are_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setenv("CENACLE_DATA", str(tmp_path))
    found = load_pictures(None, 50)
    assert found.images.shape == (50, 8, 8)
    assert found.images.max() * found.scale == 1.0


def test_a_folder_without_the_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no MNIST files"):
        load_pictures(tmp_path, 3)


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (IMAGES[:-1], LABELS),
        (IMAGES[:7], LABELS),
        (b"", LABELS),
        (_idx(3, 0, 2, 2), LABELS),
        (_idx(3, 3, 2**31, 2**31, items=bytes(12)), LABELS),
        (_idx(3, 3, 2, 2, items=bytes(12), kind=0x0D), LABELS),
        (LABELS, LABELS),
        (IMAGES, LABELS[:-1]),
        (IMAGES, _idx(1, 2, items=bytes(2))),
    ],
)
def test_malformed_files_are_named(images: bytes, labels: bytes, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        load_pictures(_folder(tmp_path, images, labels), 3)


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    _folder(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-16])
    with pytest.raises(DataError, match="malformed"):
        load_pictures(tmp_path, 100)


@pytest.mark.parametrize("url", ["http://example.org/mnist", "ftp://x", "/etc", ""])
def test_downloads_need_https(url: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="HTTPS"):
        download(url, tmp_path)
