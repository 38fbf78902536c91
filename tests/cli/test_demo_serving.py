"""The serving demonstration: what it plays with, and (slowly) the whole play."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cenacle.cli.demo_triage import ROUTINE, URGENT
from cenacle.errors import CenacleError, DataError, InputError, UnavailableError

pytest.importorskip("torch", reason="recipes need torch (pip: cenacle[train])")

from cenacle.cli.demo_serving_models import TOKENS, material


def test_triage_notes_are_many_short_and_each_once() -> None:
    notes = (*URGENT, *ROUTINE)
    assert len(URGENT) == len(ROUTINE) == 100
    assert len(set(notes)) == 200
    assert all(10 < len(note) < 80 and note == note.strip() for note in notes)


def test_digits_fit_pixels_whatever_their_source() -> None:
    pytest.importorskip("sklearn", reason="digits come with scikit-learn (pip: cenacle[demo])")
    found = material("digits", None)
    pixels = found.tensors["picture"]
    assert pixels.dtype == np.uint8
    assert pixels.shape[1] == 1
    assert pixels.max() == 255
    assert len(found.classes) == 10
    sizes = ",".join(str(size) for size in pixels.shape[1:])
    assert found.inputs == (f"picture=F32[N,{sizes}]",)


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Two classes of four, of several sizes and modes."""
    image = pytest.importorskip("PIL.Image", reason="photographs need Pillow")
    generator = np.random.Generator(np.random.Philox(key=1))
    for name, level in (("dark", 40), ("light", 200)):
        (tmp_path / name).mkdir()
        for number in range(4):
            pixels = generator.integers(level - 20, level + 20, (60 + number, 90, 3))
            mode = image.fromarray(pixels.astype(np.uint8)).convert("RGB" if number else "L")
            mode.save(tmp_path / name / f"{number}.{'png' if number % 2 else 'jpg'}")
    return tmp_path


def test_photographs_are_read_by_class(photographs: Path) -> None:
    found = material("photos", photographs)
    assert found.classes == ("dark", "light")
    assert found.tensors["picture"].shape == (8, 3, 96, 96)
    means = found.tensors["picture"].mean(axis=(1, 2, 3))
    np.testing.assert_array_equal(means > 128, found.tensors["labels"] == 1)


@pytest.mark.parametrize("fault", ["damaged", "few", "one class", "no folder", "code"])
def test_photographs_that_cannot_be_used_are_refused(photographs: Path, fault: str) -> None:
    victim = photographs / "dark" / "1.png"
    folder = photographs
    match fault:
        case "damaged":
            victim.write_bytes(victim.read_bytes()[:200])
        case "few":
            victim.unlink()
        case "one class":
            for path in (photographs / "light").iterdir():
                path.unlink()
            (photographs / "light").rmdir()
        case "no folder":
            folder = photographs / "nowhere"
        case "code":
            victim.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n(rm) run\n")
    with pytest.raises(CenacleError) as raised:
        material("photos", folder)
    expected = DataError if fault in ("damaged", "code") else InputError
    assert isinstance(raised.value, expected)


def test_without_pillow_photographs_are_refused_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr("cenacle.cli.demo_serving_models.importlib.import_module", missing)
    with pytest.raises(UnavailableError, match="Pillow") as raised:
        material("photos", tmp_path)
    assert "pip install pillow" in str(raised.value.remedy)


def test_notes_are_tokens_of_one_length() -> None:
    pytest.importorskip("tokenizers", reason="texts need tokenizers")
    try:
        found = material("notes", None)
    except UnavailableError as missing:
        pytest.skip(str(missing))
    assert found.tensors["input_ids"].shape == (200, TOKENS)
    mask = found.tensors["attention_mask"]
    assert mask.sum(axis=1).max() < TOKENS, "no note was cut off"
    assert found.tensors["labels"].sum() == 100


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("kind", ["digits", "text"])
def test_the_demonstration_plays(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("onnxruntime", reason="tails run in ONNX Runtime")
    command = [sys.executable, "-m", "cenacle", "demo", "serving", "--json"]
    played = subprocess.run(
        [*command, "--dir", str(tmp_path / "demo"), *(["--text"] if kind == "text" else [])],
        capture_output=True,
        text=True,
        check=False,
        env={n: v for n, v in os.environ.items() if n not in ("CENACLE_HOME", "CENACLE_DATA")},
        cwd=tmp_path,
    )
    if "are not installed" in played.stdout or "is not installed" in played.stdout:
        pytest.skip(played.stdout[-200:])
    assert played.returncode == 0, played.stderr[-3000:]
    figures = json.loads(played.stdout.splitlines()[-1])
    assert figures["accuracy"] > 0.85
    assert figures["served_accuracy"] > 0.75
    assert figures["same_answers"] is True
    assert figures["refused_when_used_up"] is True
    assert figures["usage"]["sealed"] > 1
    assert "Traceback" not in played.stderr
