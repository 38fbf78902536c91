"""Transcripts: what was sent and nothing else, whatever happens, and hostile ones are refused."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from cenacle.accelerators import InlineAccelerator, Operation
from cenacle.errors import CenacleError, ConflictError, DataError, InputError, UnavailableError
from cenacle.offload import offload
from cenacle.offload.transcript import Transcript
from cenacle.offload.transcript_reader import Called, Put, read_transcript

MATMUL = Operation("matmul", {"transpose_b": True})


def record(folder: Path | None, **options: Any) -> Transcript:
    made = Transcript(folder, **options)
    made.put("w0", "conv1", "inputs", 1, torch.arange(6.0).view(2, 3))
    made.put("w0", "conv1", "weights", 2, torch.ones(4, 3))
    made.call("w0", "conv1", MATMUL, 3, [1, 2])
    return made


def test_what_was_recorded_is_read_back(tmp_path: Path) -> None:
    record(tmp_path / "t").close()
    first, second, call = read_transcript(tmp_path / "t")
    assert isinstance(first, Put)
    assert isinstance(second, Put)
    assert torch.equal(first.value, torch.arange(6.0).view(2, 3))
    assert (first.number, first.worker, first.layer, first.role, first.handle) == (
        0, "w0", "conv1", "inputs", 1,
    )  # fmt: skip
    assert second.role == "weights"
    assert call == Called(2, "w0", "conv1", "matmul", {"transpose_b": True}, 3, (1, 2))


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
        torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.bool,
    ],
)  # fmt: skip
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 4), (2, 3, 1)])
def test_all_types_and_shapes(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    value = torch.randint(0, 2, shape).to(dtype)
    made = Transcript(tmp_path / "t")
    made.put("w", "l", "gradients", 7, value)
    made.close()
    (found,) = read_transcript(tmp_path / "t")
    assert isinstance(found, Put)
    assert found.value.dtype == dtype
    assert torch.equal(found.value, value)


def test_without_a_folder_it_stays_in_memory() -> None:
    made = record(None)
    made.flush()
    made.close()
    assert [line["event"] for line in made.lines] == ["put", "put", "call"]
    assert torch.equal(made.tensors[1], torch.ones(4, 3))
    assert 2 not in made.tensors


def test_files_hold_nothing_that_was_not_sent(tmp_path: Path) -> None:
    """A view's storage has more than the view; a later change is not what was sent."""
    storage = torch.full((1000,), 1234.5)
    view = storage[10:13]
    view[:] = torch.tensor([1.0, 2.0, 3.0])
    made = Transcript(tmp_path / "t")
    made.put("w", "l", "inputs", 1, view)
    view[0] = 1234.5
    made.close()
    (file,) = (tmp_path / "t").glob("*.safetensors")
    assert load_file(file)["0"].tolist() == [1.0, 2.0, 3.0]
    marker = torch.tensor([1234.5]).numpy().tobytes()
    for path in (tmp_path / "t").iterdir():
        assert marker not in path.read_bytes()


def test_nobody_else_can_read_it(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        record(tmp_path / "t").close()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "t").stat().st_mode) == 0o700
    for path in (tmp_path / "t").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_memory_is_bounded_by_writing_in_pieces(tmp_path: Path) -> None:
    made = Transcript(tmp_path / "t", file_bytes=4000)
    for number in range(20):
        made.put("w", "l", "inputs", number + 1, torch.full((250,), float(number)))
        assert made._writer is not None
        assert made._writer._bytes < 4000
    assert not made.lines
    assert len(list((tmp_path / "t").glob("*.safetensors"))) == 5
    made.close()
    found = [e.value[0].item() for e in read_transcript(tmp_path / "t") if isinstance(e, Put)]
    assert found == list(range(20))


def test_a_transcript_is_never_overwritten(tmp_path: Path) -> None:
    record(tmp_path / "t").close()
    with pytest.raises(ConflictError, match="a transcript is there already"):
        Transcript(tmp_path / "t")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ConflictError):
        Transcript(tmp_path / "other")
    (tmp_path / "file").write_text("")
    with pytest.raises(UnavailableError, match="folder cannot be made"):
        Transcript(tmp_path / "file")


def test_closing_twice_is_safe_and_recording_after_it_refused(tmp_path: Path) -> None:
    made = record(tmp_path / "t")
    made.close()
    made.close()
    with pytest.raises(InputError, match="closed already"):
        made.put("w", "l", "inputs", 9, torch.ones(1))
    assert len(list(read_transcript(tmp_path / "t"))) == 3


def test_what_was_sent_is_on_record_at_exit(tmp_path: Path) -> None:
    program = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from cenacle.offload.transcript import Transcript\n"
        "kept = Transcript(Path(sys.argv[1]))\n"
        "kept.put('w', 'l', 'inputs', 1, torch.ones(3))\n"
        "raise SystemExit(3)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "t")], check=False, timeout=120
    )
    assert done.returncode == 3
    with pytest.raises(DataError, match="without its end mark"):
        list(read_transcript(tmp_path / "t"))
    (found,) = read_transcript(tmp_path / "t", partial=True)
    assert isinstance(found, Put)
    assert torch.equal(found.value, torch.ones(3))


def test_forgetting_it_writes_what_waits(tmp_path: Path) -> None:
    made = record(tmp_path / "t")
    del made
    assert len(list(read_transcript(tmp_path / "t", partial=True))) == 3


@pytest.mark.parametrize("step", ["tensors", "lines", "sync"])
def test_a_full_disk_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Nothing is half-written, and nothing is recorded after a gap."""
    made = record(tmp_path / "t")
    made.flush()
    before = {p.name: p.read_bytes() for p in (tmp_path / "t").iterdir()}

    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(28, "No space left on device")

    if step == "tensors":

        def half(tensors: Any, path: Path) -> None:
            path.write_bytes(b"half")
            full()

        monkeypatch.setattr("cenacle.offload.transcript.save_file", half)
    elif step == "lines":
        real = os.write

        def short(fd: int, data: Any) -> int:
            if len(data) > 10:
                return real(fd, data[:10])
            return int(full())

        monkeypatch.setattr(os, "write", short)
    else:
        monkeypatch.setattr(os, "fsync", full)
    made.put("w0", "conv2", "inputs", 4, torch.ones(5))
    with pytest.raises(UnavailableError, match=r"nothing more is sent.*No space left"):
        made.flush()
    monkeypatch.undo()
    with pytest.raises(UnavailableError, match="nothing more is sent"):
        made.close()
    after = {p.name: p.read_bytes() for p in (tmp_path / "t").iterdir()}
    assert {name: after[name] for name in before} == before
    assert not [name for name in after if name.endswith(".partial")]
    assert len(list(read_transcript(tmp_path / "t", partial=True))) == 3


def test_a_full_disk_stops_the_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Transcript(tmp_path / "t", file_bytes=1)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cenacle.offload.transcript.save_file", full)
    net = nn.Linear(3, 2)
    with (
        pytest.raises(UnavailableError, match="cannot be written"),
        offload(net, "measured", [InlineAccelerator()], transcript=made),
    ):
        net(torch.ones(1, 3))


def test_a_session_records_all_that_its_workers_got(tmp_path: Path) -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    x = torch.randn(6, 4)
    workers = [InlineAccelerator("a"), InlineAccelerator("b")]
    with offload(net, "measured", workers, transcript=tmp_path / "t") as session:
        net(x).sum().backward()
        sent = session.profile.total.bytes_sent
    events = list(read_transcript(tmp_path / "t"))
    puts = [e for e in events if isinstance(e, Put)]
    calls = [e for e in events if isinstance(e, Called)]
    assert sum(p.value.nbytes for p in puts) == sent
    inputs = {p.worker: p.value for p in puts if p.role == "inputs"}
    assert torch.equal(torch.cat([inputs["a"], inputs["b"]]), x)
    assert {p.role for p in puts} == {"inputs", "activations", "weights", "gradients"}
    assert len(calls) == session.profile.total.products


# ---------------------------------------------------------------------- hostile transcripts


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "transcript.jsonl").read_text().splitlines()]


def write_lines(folder: Path, lines: list[Any]) -> None:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (folder / "transcript.jsonl").write_text(text)


def edited(number: int, **fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        lines = lines_of(folder)
        lines[number] |= fields
        write_lines(folder, lines)

    return change


def without(number: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        lines = lines_of(folder)
        del lines[number]
        write_lines(folder, lines)

    return change


def replaced(number: int, line: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        write_lines(folder, [*lines_of(folder)[:number], line, *lines_of(folder)[number + 1 :]])

    return change


def cut(folder: Path) -> None:
    path = folder / "transcript.jsonl"
    path.write_bytes(path.read_bytes()[:-3])


def cut_tensors(folder: Path) -> None:
    path = folder / "tensors-0000.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def extra_tensor(folder: Path) -> None:
    path = folder / "tensors-0000.safetensors"
    save_file({**load_file(path), "99": torch.ones(2)}, path)


def extra_file(folder: Path) -> None:
    save_file({"0": torch.ones(2)}, folder / "tensors-0001.safetensors")


def linked(folder: Path) -> None:
    path = folder / "tensors-0000.safetensors"
    path.rename(folder.parent / "elsewhere.safetensors")
    path.symlink_to(folder.parent / "elsewhere.safetensors")


HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut line": (cut, "cut off"),
    "cut tensors": (cut_tensors, "cannot be read"),
    "extra tensor": (extra_tensor, "tensors that no line names"),
    "extra file": (extra_file, "tensors that no line names"),
    "link": (linked, "not there"),
    "no begin": (without(0), "does not begin"),
    "other format": (edited(0, format="cenacle-transcript/2"), "does not begin"),
    "no end": (without(-1), "without its end mark"),
    "event missing": (without(3), "counts other events"),
    "tensor missing": (without(2), "never had"),
    "not JSON": (replaced(1, "{"), "not JSON"),
    "NaN": (replaced(3, '{"event": NaN}'), "not JSON"),
    "a name twice": (replaced(1, '{"event": "put", "event": "put"}'), "not JSON"),
    "no object": (replaced(1, []), "no object"),
    "deep": (replaced(1, "[" * 100_000), "not JSON"),
    "long": (replaced(1, '{"event": "' + "x" * (1 << 20) + '"}'), "too long"),
    "unknown event": (edited(1, event="drop"), "unknown kind"),
    "unknown field": (edited(1, more=1), "other fields"),
    "path": (edited(1, file="../../etc/passwd"), "out of range"),
    "another file": (edited(1, file="tensors-0007.safetensors"), "not there"),
    "another tensor": (edited(1, tensor="1"), "out of range"),
    "another shape": (edited(1, shape=[3, 2]), "another form"),
    "huge shape": (edited(1, shape=[1 << 70]), "out of range"),
    "another type": (edited(1, dtype="float64"), "another form"),
    "unknown type": (edited(1, dtype="Tensor"), "out of range"),
    "unknown role": (edited(1, role="labels"), "out of range"),
    "text as handle": (edited(1, handle="1"), "handle"),
    "truth as handle": (edited(1, handle=True), "handle"),
    "handle twice": (edited(2, handle=1), "handle"),
    "unknown operand": (edited(3, operands=[1, 9]), "never had"),
    "operand of another": (edited(3, worker="w1"), "never had"),
    "attributes": (edited(3, attributes=[]), "out of range"),
    "wrong counts": (edited(4, put=7), "counts other events"),
    "after the end": (replaced(4, '{"event":"end","put":2,"call":1}\n{}'), "after its end"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_transcripts_are_refused(tmp_path: Path, name: str) -> None:
    change, message = HOSTILE[name]
    record(tmp_path / "t").close()
    change(tmp_path / "t")
    with pytest.raises(DataError, match=message):
        list(read_transcript(tmp_path / "t"))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_refused_or_harmless(tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / f"t{len(list(tmp_path.iterdir()))}"
    record(folder).close()
    path = folder / data.draw(st.sampled_from(["transcript.jsonl", "tensors-0000.safetensors"]))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    partial = data.draw(st.booleans())
    with contextlib.suppress(CenacleError):
        list(read_transcript(folder, partial=partial))


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="cannot be read"):
        list(read_transcript(tmp_path / "none"))
