"""Profiles: whose seconds they are, on a clock that the test holds."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from cenacle.accelerators import InlineAccelerator
from cenacle.documents.offload_profile import OffloadProfile
from cenacle.errors import InputError, UnavailableError
from cenacle.offload import Profile, offload
from cenacle.offload.fleet import Fleet
from cenacle.offload.integrity import Verifier
from cenacle.offload.maps import Dense
from cenacle.offload.profile import Cost


class Clock:
    """Stands still until it is told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("time.perf_counter", made)
    return made


class _Remote(InlineAccelerator):
    kind = "process"


def test_a_span_is_the_enclaves_but_for_waiting(clock: Clock) -> None:
    profile = Profile()
    worker = _Remote("gpu")
    with profile.span("conv1", "forward"):
        clock.pass_(1)
        with profile.calling(worker):
            clock.pass_(2)  # asking another process is the enclave's own time
        begin = clock()
        clock.pass_(4)
        profile.waited("conv1", worker, begin, 3.5, 800)
        clock.pass_(8)
    assert profile.layers == {
        "conv1": Cost(
            enclave_seconds=11, accelerator_seconds=3.5, wait_seconds=4,
            bytes_received=800, products=1,
        )
    }  # fmt: skip


def test_a_worker_within_the_process_is_no_enclave_time(clock: Clock) -> None:
    profile = Profile()
    with profile.span("fc", "backward"):
        clock.pass_(1)
        with profile.calling(InlineAccelerator("a")):
            clock.pass_(16)
        clock.pass_(2)
    assert profile.cost("fc").enclave_seconds == 3


def test_spans_nest_and_count_once(clock: Clock) -> None:
    profile = Profile()
    with profile.span("outer", "forward"):
        clock.pass_(1)
        with profile.span("inner", "forward"):
            clock.pass_(2)
        clock.pass_(4)
    assert profile.cost("outer").enclave_seconds == 5
    assert profile.cost("inner").enclave_seconds == 2
    assert profile.total.enclave_seconds == 7


def test_a_span_that_fails_is_counted(clock: Clock) -> None:
    profile = Profile()

    def fail() -> None:
        with profile.span("fc", "forward"):
            clock.pass_(3)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert profile.cost("fc").enclave_seconds == 3


def test_costs_add_up_by_layer(clock: Clock) -> None:
    profile = Profile()
    for number in range(3):
        with profile.span("a" if number else "b", "forward"):
            clock.pass_(number)
        profile.sent("a", 10)
    assert [row["layer"] for row in profile.rows()] == ["b", "a"]
    assert profile.total.bytes_sent == 30
    assert profile.rows()[1] == {
        "layer": "a", "enclave_seconds": 3, "accelerator_seconds": 0, "wait_seconds": 0,
        "bytes_sent": 30, "bytes_received": 0, "products": 0,
    }  # fmt: skip
    profile.reset()
    assert profile.rows() == []
    assert profile.total == Cost()


def test_checking_is_the_enclaves_time(clock: Clock) -> None:
    """What the verifier does is on the enclave's account, not on the wait's."""

    def entropy(size: int) -> bytes:
        clock.pass_(5)
        return b"\x01" * size

    fleet = Fleet([_Remote("a")], verifier=Verifier(entropy=entropy))
    with fleet.profile.span("fc", "forward"):
        parcels = [fleet.send(torch.ones(2, 3), "activations", "fc") for _ in range(2)]
        fleet.product(Dense().forward(), *parcels, site="fc").result()
    cost = fleet.profile.cost("fc")
    assert cost.enclave_seconds == 5
    assert cost.wait_seconds == 0


def check_trace(trace: object) -> list[dict[str, object]]:
    """The Trace Event Format: https://chromium.googlesource.com, "Trace Event Format", 2016."""
    assert isinstance(trace, dict)
    assert set(trace) == {"traceEvents", "displayTimeUnit", "otherData"}
    assert trace["displayTimeUnit"] in {"ms", "ns"}
    events = trace["traceEvents"]
    assert isinstance(events, list)
    named = set()
    for event in events:
        assert isinstance(event["name"], str)
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        if event["ph"] == "M":
            assert event["name"] == "thread_name"
            assert isinstance(event["args"]["name"], str)
            named.add(event["tid"])
        else:
            assert event["ph"] == "X"
            assert isinstance(event["cat"], str)
            assert isinstance(event["ts"], float)
            assert isinstance(event["dur"], float)
            assert event["ts"] >= 0
            assert event["dur"] >= 0
            assert event["tid"] in named
    return events


def test_the_trace_opens_in_viewers(clock: Clock, tmp_path: Path) -> None:
    profile = Profile()
    worker = _Remote("gpu")
    clock.pass_(0.5)
    with profile.span("conv1", "forward"):
        begin = clock()
        clock.pass_(0.25)
        profile.waited("conv1", worker, begin, 0.125, 8)
    profile.write_trace(tmp_path / "trace.json")
    events = check_trace(json.loads((tmp_path / "trace.json").read_text()))
    spans = {(e["tid"], e["name"]): (e["ts"], e["dur"]) for e in events if e["ph"] == "X"}
    tracks = {e["args"]["name"]: e["tid"] for e in events if e["ph"] == "M"}  # type: ignore[index]
    assert set(tracks) == {"enclave", "gpu"}
    assert spans[tracks["enclave"], "conv1 forward"] == (500_000, 250_000)
    assert spans[tracks["enclave"], "conv1 wait"] == (500_000, 250_000)
    assert spans[tracks["gpu"], "conv1"] == (625_000, 125_000)
    assert [e["args"] for e in events if e["name"] == "conv1"] == [{"bytes_received": 8}]


def test_a_traces_metadata_are_the_costs(clock: Clock, tmp_path: Path) -> None:
    profile = Profile()
    for layer in ("conv1", "fc"):
        with profile.span(layer, "forward"):
            clock.pass_(0.25)
        profile.sent(layer, 10)
    profile.write_trace(tmp_path / "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text())
    found = OffloadProfile.from_trace(trace)
    assert found == profile.document()
    assert [one.layer for one in found.layers] == ["conv1", "fc"]
    assert (found.total.bytes_sent, found.total.enclave_seconds) == (20, 0.5)
    assert profile.table() == found.table()


def test_the_timeline_keeps_the_last_and_costs_keep_all(clock: Clock) -> None:
    profile = Profile(events=3)
    for number in range(5):
        with profile.span(f"layer{number}", "forward"):
            clock.pass_(1)
    events = check_trace(profile.trace())
    assert [e["name"] for e in events if e["ph"] == "X"] == [
        f"layer{number} forward" for number in (2, 3, 4)
    ]
    assert profile.document().events_left_out == 2
    assert profile.total.enclave_seconds == 5
    profile.reset()
    assert profile.document() == OffloadProfile()


@pytest.mark.parametrize("seconds", [1e6, 1e300])
def test_a_worker_that_says_it_took_longer_than_the_session(clock: Clock, seconds: float) -> None:
    profile = Profile()
    clock.pass_(1)
    profile.waited("fc", _Remote("gpu"), clock(), seconds, 8)
    compute = check_trace(profile.trace())[-1]
    assert (compute["ts"], compute["dur"]) == (0, 1_000_000)
    assert profile.document().layers[0].accelerator_seconds == min(seconds, 1e9)


def test_a_trace_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "trace.json"
    path.write_text("before")
    monkeypatch.setattr("cenacle.sealing.disk.pwrite_all", full)
    with pytest.raises(UnavailableError, match="no room"):
        Profile().write_trace(path)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_trace_cannot_be_written_to_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot write"):
        Profile().write_trace(tmp_path / "none" / "trace.json")


def test_a_session_fills_its_profile() -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    with offload(net, "measured", [InlineAccelerator("a")]) as session:
        net(torch.ones(3, 4)).sum().backward()
    rows = {row["layer"]: row for row in session.profile.rows()}
    assert len(rows) == 2
    first, second = rows.values()
    assert first["products"] == 2  # no gradient of the input was needed
    assert second["products"] == 3
    assert first["bytes_received"] == 4 * (3 * 5 + 5 * 4)
    assert session.profile.total.enclave_seconds > 0
    check_trace(session.profile.trace())


def test_an_empty_profile_is_an_empty_trace() -> None:
    assert check_trace(Profile().trace()) == []


def test_a_model_that_is_one_layer_has_a_name_in_its_profile() -> None:
    with offload(nn.Linear(2, 2), "measured", [InlineAccelerator("a")]) as session:
        session.model(torch.ones(1, 2))
    (layer,) = session.profile.document().layers
    assert layer.layer
    assert layer.products == 1
