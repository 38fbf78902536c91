"""Offload plans in plain words, the choice of accelerators, and the demonstration's pictures."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter

from cenacle.cli.demo_data import load_pictures
from cenacle.cli.offload import plan_in_words
from cenacle.cli.receipt import accelerators_in_words
from cenacle.cli.run import choose_accelerators
from cenacle.documents.offload import OffloadPlan
from cenacle.documents.offload_profile import PROFILE_FILE
from cenacle.documents.receipt import OffloadRecord
from cenacle.errors import DataError, InputError

Fields = dict[str, Any]
_PLAN: TypeAdapter[Any] = TypeAdapter(OffloadPlan)


def _contract(plan: Fields) -> Any:
    """A contract, to what reads its plan alone."""
    return SimpleNamespace(offload=_PLAN.validate_python(plan), privacy=None)


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
            ["for 3 accelerators (cuda or ray)", "a worker that lies is dropped", "in plain"],
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


# ------------------------------------------------------------------ profiles

COSTS: Fields = {
    "format": "cenacle-offload-profile/1",
    "layers": [
        {
            "layer": "conv1", "enclave_seconds": 0.25, "accelerator_seconds": 1.5,
            "wait_seconds": 1.0, "bytes_sent": 2_000_000, "bytes_received": 500_000,
            "products": 3,
        },
        {
            "layer": "[red]fc[/]\u001b[2J", "enclave_seconds": 0.5, "accelerator_seconds": 0.0,
            "wait_seconds": 0.0, "bytes_sent": 0, "bytes_received": 0, "products": 0,
        },
    ],
    "events_left_out": 0,
}  # fmt: skip


def _trace(folder: Path, **changes: Any) -> Path:
    path = folder / PROFILE_FILE
    path.write_text(json.dumps({"traceEvents": [], "otherData": {**COSTS, **changes}}))
    return path


def test_a_profile_is_a_table_for_people(alone: Any, tmp_path: Path) -> None:
    _trace(tmp_path, events_left_out=1234)
    answer = alone("offload", "profile", tmp_path)  # the folder of the results
    assert answer.code == 0
    for word in ("conv1", "250.0", "1,500.0", "1,000.0", "2.0", "0.5", "750.0", "1,234 spans"):
        assert word in answer.out
    assert "[red]fc[/]" in answer.out  # as it is: no colour, and nothing that clears the screen
    assert "\x1b" not in answer.out


def test_a_profile_is_an_object_for_programs(alone: Any, tmp_path: Path) -> None:
    answer = alone("offload", "profile", _trace(tmp_path), "--json")
    assert answer.code == 0
    fields = answer.json
    total = fields.pop("total")
    assert fields == COSTS
    assert (total["layer"], total["products"], total["enclave_seconds"]) == ("all", 3, 0.75)


def test_what_a_session_wrote_can_be_shown(alone: Any, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from cenacle.offload import Profile  # noqa: PLC0415

    profile = Profile()
    with profile.span("conv1", "forward"):
        profile.sent("conv1", 3_000_000)
    profile.write_trace(tmp_path / "trace.json")
    answer = alone("offload", "profile", tmp_path / "trace.json")
    assert answer.code == 0
    assert "3.0" in answer.out


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file"),
        (b"", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"{}", "no trace of an offloaded job"),
        (b'{"traceEvents": []}', "no trace of an offloaded job"),
        (b'{"otherData": {"layers": [{"layer": "a", "products": -1}]}}', "products"),
        (b'{"otherData": {"layers": [{"layer": "a", "wait_seconds": NaN}]}}', "JSON cannot hold"),
    ],
)
def test_other_files_are_refused_in_words(
    content: bytes | None, words: str, alone: Any, tmp_path: Path
) -> None:
    path = tmp_path / "trace.json"
    if content is not None:
        path.write_bytes(content)
    answer = alone("offload", "profile", path)
    assert answer.code == 2
    assert words in answer.err
    assert "Traceback" not in answer.err


def test_a_folder_without_a_profile_says_when_there_is_one(alone: Any, tmp_path: Path) -> None:
    answer = alone("offload", "profile", tmp_path)
    assert answer.code == 2
    assert "written by jobs whose contract sends algebra" in answer.err


def test_a_trace_that_is_too_large_is_not_read(
    alone: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cenacle.cli.offload._MAX_TRACE", 100)
    answer = alone("offload", "profile", _trace(tmp_path))
    assert answer.code == 2
    assert "too large" in answer.err


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
    with pytest.raises(InputError, match="no such folder"):
        load_pictures(tmp_path / "none", 3)


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
