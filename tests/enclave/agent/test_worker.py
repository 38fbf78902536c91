"""The program's process, from inside: loading, running, and what crosses when it goes wrong.

Here it runs in a thread and unconfined; its confinement is tested in ``test_programs.py``.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import safetensors.numpy

from cenacle.crypto import SecretBytes
from cenacle.documents.base import b64
from cenacle.enclave.frames import read_frame, send_frame
from cenacle.enclave.program_runner import encode_value
from cenacle.enclave.sandbox import SandboxPlan
from cenacle.enclave.worker import work
from cenacle.errors import DataError, DocumentError, InputError
from cenacle.sealing import seal_path

Frame = tuple[dict[str, Any], bytes]
Play = Callable[..., list[Frame]]

ZERO = "sha256:" + "0" * 64


@pytest.fixture
def play(tmp_path: Path) -> Play:
    """``play(source, entry="main:run", ...)`` -> the frames that the process sent."""

    def run(
        source: str,
        *,
        entry: str = "main:run",
        package: str | None = None,
        spoil: Callable[[dict[str, Any]], None] = lambda job: None,
    ) -> list[Frame]:
        folder = tmp_path / "program"
        folder.mkdir()
        (folder / "main.py").write_text(source)
        (tmp_path / "data.csv").write_text("x\n1\n2\n3\n")
        assets: list[dict[str, Any]] = []
        for alias, path in (("table", tmp_path / "data.csv"), ("program", folder)):
            sealed = tmp_path / f"{alias}.sealed"
            key = SecretBytes.random(32)
            info = seal_path(path, sealed, key)
            manifest = {
                "kind": "asset",
                "name": alias,
                "owner": "lab",
                "owner_digest": ZERO,
                "type": "program" if path.is_dir() else "dataset",
                "content": info.kind,
                "container": {
                    "header": info.header_digest,
                    "digest": info.digest,
                    "size": info.size,
                    "plaintext_bytes": info.plaintext_bytes,
                },
                "package": (package or info.schema["package"]) if path.is_dir() else None,
                "broker": ZERO,
                "terms": {"expires": "2036-01-01"},
                "created": "2027-01-01T00:00:00Z",
            }
            assets.append(
                {
                    "alias": alias,
                    "mount": f"asset-{len(assets)}",
                    "manifest": manifest,
                    "key": b64(bytes(key.view())),
                }
            )
        job = {
            "program": "program",
            "entry": entry,
            "parameters": {"k": 2},
            "outputs": {"report": "file", "numbers": "metrics"},
            "assets": assets,
        }
        spoil(job)
        paths = {"asset-0": tmp_path / "table.sealed", "asset-1": tmp_path / "program.sealed"}
        ours, theirs = socket.socketpair()
        thread = threading.Thread(target=work, args=(theirs, SandboxPlan({}), paths))
        frames: list[Frame] = []
        with ours, theirs:
            thread.start()
            ready, _ = read_frame(ours)
            assert ready == {"kind": "ready"}
            send_frame(ours, {"kind": "job"}, json.dumps(job).encode())
            while not frames or frames[-1][0]["kind"] not in {"done", "failed"}:
                header, payload = read_frame(ours)
                frames.append((header, bytes(payload)))
        thread.join()
        return frames

    return run


def test_a_program_runs_to_its_end(play: Play) -> None:
    source = """
def run(ctx):
    ctx.progress(1, 2)
    ctx.output("numbers", {"rows": ctx.assets["table"].num_rows, "k": ctx.parameters["k"]})
    ctx.output("report", memoryview(b"text"))
"""
    assert play(source) == [
        ({"kind": "progress", "done": 1, "total": 2}, b""),
        ({"kind": "output", "name": "numbers"}, b'{"k":2,"rows":3}'),
        ({"kind": "output", "name": "report"}, b"text"),
        ({"kind": "done"}, b""),
    ]


_FAILURES = [
    ("x = (", "loading", "SyntaxError"),
    ("import no_such_module", "loading", "ModuleNotFoundError"),
    ("def other(ctx): pass", "loading", "AttributeError"),
    ("raise RuntimeError('canary')", "loading", "RuntimeError"),
    ("def run(): pass", "running", "TypeError"),
    ("run = 3", "running", "TypeError"),
    ("def run(ctx): raise ValueError('canary')", "running", "ValueError"),
    ("def run(ctx): raise SystemExit('canary')", "running", "SystemExit"),
    ("def run(ctx): raise KeyboardInterrupt", "running", "KeyboardInterrupt"),
    ("def run(ctx): ctx.assets['other']", "running", "KeyError"),
    ("def run(ctx): ctx.output('other', b'')", "running", "InputError"),
    ("def run(ctx): ctx.output('report', 'text')", "running", "InputError"),
    ("def run(ctx): ctx.output('numbers', {'x': float('nan')})", "running", "DocumentError"),
    ("def run(ctx): ctx.output('numbers', {'x': object()})", "running", "DocumentError"),
    ("def run(ctx): [ctx.output('report', b'') for _ in 'ab']", "running", "InputError"),
    ("def run(ctx): ctx.progress('canary', 1)", "running", "ValueError"),
    ("class Canary(Exception): pass\ndef run(ctx): raise Canary('x')", "running", "Canary"),
]


@pytest.mark.parametrize(
    ("source", "phase", "name"), _FAILURES, ids=[f"{n} {p}" for _, p, n in _FAILURES]
)
def test_of_a_failure_only_phase_and_class_cross(
    play: Play, source: str, phase: str, name: str
) -> None:
    frames = play(source)
    assert frames[-1] == ({"kind": "failed", "class": name, "phase": phase}, b"")
    assert b"canary" not in json.dumps(frames[-1][0]).encode()


def test_a_value_that_cannot_be_sent_leaves_its_output_to_be_given_again(play: Play) -> None:
    source = """
def run(ctx):
    try:
        ctx.output("report", 7)
    except Exception:
        ctx.output("report", b"7")
"""
    assert play(source)[-2:] == [
        ({"kind": "output", "name": "report"}, b"7"),
        ({"kind": "done"}, b""),
    ]


def test_a_package_other_than_the_approved_one_is_not_loaded(play: Play) -> None:
    frames = play("def run(ctx): ctx.output('report', b'ran')", package="sha256:" + "1" * 64)
    assert frames == [({"kind": "failed", "class": "DataError", "phase": "loading"}, b"")]


def test_a_wrong_key_opens_nothing(play: Play) -> None:
    def spoil(job: dict[str, Any]) -> None:
        job["assets"][1]["key"] = b64(bytes(32))

    frames = play("def run(ctx): pass", spoil=spoil)
    assert frames == [({"kind": "failed", "class": "SealError", "phase": "loading"}, b"")]


def test_another_file_under_an_assets_name_is_not_read(play: Play) -> None:
    def spoil(job: dict[str, Any]) -> None:
        job["assets"][0]["mount"] = "asset-1"

    frames = play("def run(ctx): pass", spoil=spoil)
    assert frames == [({"kind": "failed", "class": "SealError", "phase": "loading"}, b"")]


@pytest.mark.parametrize("entry", ["main:missing", "other:run", "main:run.inner"])
def test_an_entry_point_that_is_not_there_fails_while_loading(play: Play, entry: str) -> None:
    (header, _) = play("def run(ctx): pass", entry=entry)[-1]
    assert header["kind"] == "failed"
    assert header["phase"] == "loading"


# ---------------------------------------------------------------------- values


@pytest.mark.parametrize(
    "array",
    [
        np.float32(1.5),
        np.zeros((0, 3), dtype=np.int64),
        np.arange(12).reshape(3, 4).T,
        np.arange(12)[::-2],
        np.array([1, 2], dtype=">i4"),
        np.array([True, False]),
        np.asfortranarray(np.arange(6, dtype=np.float16).reshape(2, 3)),
    ],
    ids=["scalar", "empty", "turned", "stride", "big endian", "bool", "fortran"],
)
def test_arrays_of_every_layout_arrive_as_they_were(array: Any) -> None:
    loaded = safetensors.numpy.load(encode_value("m", "model", {"a": array}))["a"]
    assert loaded.shape == np.shape(array)
    assert np.array_equal(loaded, array)


@pytest.mark.parametrize(
    ("kind", "value", "error"),
    [
        ("model", {}, InputError),
        ("model", [np.zeros(2)], InputError),
        ("model", {"": np.zeros(2)}, DataError),
        ("model", {"__metadata__": np.zeros(2)}, DataError),
        ("model", {"a\x00": np.zeros(2)}, DataError),
        ("metrics", [1], InputError),
        ("metrics", {"x": float("inf")}, DocumentError),
        ("table", {"x": [1]}, InputError),
        ("table", pa.record_batch({"x": [1]}), InputError),
        ("file", "text", InputError),
        ("file", None, InputError),
    ],
)
def test_values_of_the_wrong_type_are_refused(
    kind: str, value: Any, error: type[Exception]
) -> None:
    with pytest.raises(error):
        encode_value("m", kind, value)


@pytest.mark.parametrize("array", [np.array(["text"]), np.array([object()])])
def test_arrays_that_hold_no_numbers_are_refused(array: Any) -> None:
    with pytest.raises(InputError, match="holds no numbers"):
        encode_value("m", "model", {"a": array})


def test_names_of_tensors_are_text() -> None:
    with pytest.raises(InputError, match="name is not text"):
        encode_value("m", "model", {1: np.zeros(2)})
