"""Rehearsing a program: the same readers and rules as in an enclave, and every error in full."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cenacle.enclave.context import JobContext
from cenacle.enclave.rehearsal import rehearse
from cenacle.errors import DataError, EnclaveError, InputError


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "t.csv").write_text("x,y\n1,2\n3,4\n")
    np.savez(tmp_path / "a.npz", w=np.arange(4.0))
    (tmp_path / "note.txt").write_bytes(b"a note")
    return {"t": tmp_path / "t.csv", "a": tmp_path / "a.npz", "n": tmp_path / "note.txt"}


def test_a_program_gets_readers_parameters_and_gives_outputs(files: dict[str, Path]) -> None:
    steps: list[tuple[int, int]] = []

    def run(ctx: JobContext) -> None:
        assets: Any = ctx.assets
        ctx.progress(1, 2)
        ctx.output(
            "numbers",
            {
                "x": assets["t"].read(["x"]).column("x").to_pylist(),
                "w": assets["a"].read("w").tolist(),
                "n": assets["n"].read_range(0, 6).decode(),
                "parameters": ctx.parameters,
                "outputs": ctx.outputs,
            },
        )

    found = rehearse(
        run,
        files,
        {"numbers": "metrics"},
        {"pair": (1, 2)},
        progress=lambda done, total: steps.append((done, total)),
    )
    assert found["numbers"] == {
        "x": [1, 3],
        "w": [0.0, 1.0, 2.0, 3.0],
        "n": "a note",
        "parameters": {"pair": [1, 2]},  # as JSON, like a contract's
        "outputs": {"numbers": "metrics"},
    }
    assert steps == [(1, 2)]


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("other", {}, "expects no such output"),
        ("numbers", [1], "wrong type"),
        ("numbers", {"x": float("nan")}, "canonical JSON"),
    ],
)
def test_the_rules_for_outputs_are_the_enclaves(
    files: dict[str, Path], name: str, value: Any, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        rehearse(lambda ctx: ctx.output(name, value), files, {"numbers": "metrics"})


def test_outputs_that_are_missing_are_named(files: dict[str, Path]) -> None:
    with pytest.raises(EnclaveError, match=r"Call ctx\.output for report"):
        rehearse(lambda ctx: None, files, {"report": "file"})


def test_errors_of_the_program_and_of_the_data_are_shown_in_full(
    files: dict[str, Path], tmp_path: Path
) -> None:
    def run(ctx: JobContext) -> None:
        raise LookupError("all of it")

    with pytest.raises(LookupError, match="all of it"):
        rehearse(run, files, {})
    (tmp_path / "bad.csv").write_text("x\n\n,\n")
    with pytest.raises(DataError):
        rehearse(run, {"t": tmp_path / "bad.csv"}, {})
