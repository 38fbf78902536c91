"""The agent's side of a program job, against a process on the other end that lies."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from cenacle.documents.contract import Output, ProgramJob
from cenacle.enclave.frames import read_frame, send_frame
from cenacle.enclave.outputs import check_outputs
from cenacle.enclave.program_job import run_program
from cenacle.errors import EnclaveError

Send = Callable[..., None]
_NO_KEYS: Any = SimpleNamespace()
CANARY = "patient-0042-hiv-positive"

OUTPUTS = {"weights": "model", "numbers": "metrics", "rows": "table", "report": "file"}


def _opened() -> Any:
    return SimpleNamespace(
        contract=SimpleNamespace(
            job=ProgramJob(program="program", parameters={"k": 3}),
            outputs=tuple(
                Output.from_fields({"name": name, "kind": kind, "recipient": "clinic"})
                for name, kind in OUTPUTS.items()
            ),
        ),
        assets={},
    )


def _talk(lines: Callable[[Send], None], *, ready: bool = True) -> Any:
    """Run the agent's side against ``lines``; returns (values, progress)."""
    ours, theirs = socket.socketpair()
    seen: list[tuple[int, int]] = []

    def other() -> None:
        def send(header: dict[str, Any], payload: bytes = b"") -> None:
            send_frame(theirs, header, payload)

        with theirs:
            try:
                if ready:
                    send({"kind": "ready"})
                    read_frame(theirs)
                lines(send)
            except EnclaveError:
                return  # the agent hung up

    thread = threading.Thread(target=other)
    thread.start()
    try:
        with ours:
            values = run_program(
                _opened(), _NO_KEYS, ours, lambda done, total: seen.append((done, total))
            )
    finally:
        thread.join()
    return values, seen


def _table() -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.table({"x": [1, 2]})
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


GOOD: dict[str, bytes] = {
    "weights": safetensors.numpy.save({"w": np.arange(6, dtype=np.float32).reshape(2, 3)}),
    "numbers": b'{"rows":2}',
    "rows": _table(),
    "report": b"%PDF",
}


def test_all_kinds_of_output_and_progress_arrive() -> None:
    def lines(send: Send) -> None:
        send({"kind": "progress", "done": 1, "total": 2})
        for name, payload in GOOD.items():
            send({"kind": "output", "name": name}, payload)
        send({"kind": "progress", "done": 2, "total": 2})
        send({"kind": "done"})

    values, seen = _talk(lines)
    assert seen == [(1, 2), (2, 2)]
    assert values["weights"] == GOOD["weights"]
    assert values["numbers"] == {"rows": 2}
    assert values["rows"].to_pydict() == {"x": [1, 2]}
    assert values["report"] == b"%PDF"
    check_outputs(_opened().contract.outputs, values)


@pytest.mark.parametrize(
    ("message", "payload"),
    [
        ({"kind": "output", "name": "other"}, b""),
        ({"kind": "output", "name": ["numbers"]}, b""),
        ({"kind": "output"}, b""),
        ({"kind": CANARY}, b""),
        ({}, b""),
        ({"kind": "progress", "done": 1}, b""),
        ({"kind": "progress", "done": "1", "total": 2}, b""),
        ({"kind": "progress", "done": 1, "total": 0}, b""),
        ({"kind": "progress", "done": 1, "total": -3}, b""),
        ({"kind": "progress", "done": 0.5, "total": 1}, b""),
        ({"kind": "failed"}, b""),
        ({"kind": "failed", "class": 7, "phase": "running"}, b""),
        ({"kind": "failed", "class": "ValueError", "phase": CANARY}, b""),
        ({"kind": "ready"}, b""),
        ({"kind": "output", "name": "numbers"}, f'["{CANARY}"]'.encode()),
        ({"kind": "output", "name": "numbers"}, b'{"x":NaN}'),
        ({"kind": "output", "name": "numbers"}, f'{{"{CANARY}":1,"{CANARY}":2}}'.encode()),
        ({"kind": "output", "name": "numbers"}, f'{{"{CANARY}":{2**60}}}'.encode()),
        ({"kind": "output", "name": "numbers"}, b'{"x":' + b"[" * 5000 + b"]" * 5000 + b"}"),
        ({"kind": "output", "name": "numbers"}, b"{" + b" " * (5 << 20) + b"}"),
        ({"kind": "output", "name": "numbers"}, CANARY.encode()),
        ({"kind": "output", "name": "rows"}, CANARY.encode()),
        ({"kind": "output", "name": "rows"}, b""),
        ({"kind": "output", "name": "rows"}, GOOD["rows"][:-40]),
        ({"kind": "output", "name": "weights"}, CANARY.encode()),
        ({"kind": "output", "name": "weights"}, b""),
        ({"kind": "output", "name": "weights"}, GOOD["weights"][:-1]),
        ({"kind": "output", "name": "weights"}, GOOD["weights"] + b"x"),
        ({"kind": "output", "name": "weights"}, b"\xff" * 64),
    ],
)
def test_a_wrong_message_ends_the_job_and_none_of_it_is_told(
    message: dict[str, Any], payload: bytes
) -> None:
    with pytest.raises(EnclaveError, match="broke the protocol") as caught:
        _talk(lambda send: send(message, payload))
    assert CANARY not in str(caught.value.to_dict())


def _arrow(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


@pytest.mark.parametrize(
    "table",
    [
        pa.table({CANARY: pa.array([{"a": 1}])}),
        pa.table({CANARY: pa.array(["x"]).dictionary_encode()}),
        pa.table([pa.array([1]), pa.array([2])], names=[CANARY, CANARY]),
        pa.table({CANARY + "x" * 2000: [1]}),
        pa.table({"": [1]}),
        pa.table({}),
    ],
    ids=["struct", "dictionary", "same name", "long name", "no name", "no columns"],
)
def test_a_table_that_cannot_be_sealed_is_refused_without_its_column_names(
    table: pa.Table,
) -> None:
    with pytest.raises(EnclaveError, match="broke the protocol") as caught:
        _talk(lambda send: send({"kind": "output", "name": "rows"}, _arrow(table)))
    assert CANARY not in str(caught.value.to_dict())


def test_an_output_given_twice_is_refused() -> None:
    def lines(send: Send) -> None:
        send({"kind": "output", "name": "report"}, b"1")
        send({"kind": "output", "name": "report"}, b"2")

    with pytest.raises(EnclaveError, match="given twice"):
        _talk(lines)


def test_outputs_left_out_are_named() -> None:
    def lines(send: Send) -> None:
        send({"kind": "output", "name": "report"}, b"1")
        send({"kind": "done"})

    values, _ = _talk(lines)
    with pytest.raises(EnclaveError, match="found report; expected numbers, report, rows, weig"):
        check_outputs(_opened().contract.outputs, values)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("ValueError", "ValueError"),
        ("ModuleNotFoundError", "ModuleNotFoundError"),
        ("DataError", "DataError"),
        ("MemoryError", "MemoryError"),
        ("SystemExit", "an error of its own"),
        (CANARY, "an error of its own"),
        ("", "an error of its own"),
        ("E" * 500_000, "an error of its own"),
    ],
)
@pytest.mark.parametrize("phase", ["loading", "running"])
def test_of_an_error_only_a_known_class_is_told(name: str, told: str, phase: str) -> None:
    with pytest.raises(EnclaveError, match="the program failed while it") as caught:
        _talk(lambda send: send({"kind": "failed", "class": name, "phase": phase}))
    assert caught.value.found == told
    assert CANARY not in str(caught.value.to_dict())


def test_a_process_that_does_not_get_ready_gets_no_job() -> None:
    got = []

    def lines(send: Send) -> None:
        send({"kind": "progress", "done": 1, "total": 1})
        got.append(True)

    with pytest.raises(EnclaveError, match="no ready message"):
        _talk(lines, ready=False)
    assert got


def test_a_process_that_ends_is_named() -> None:
    with pytest.raises(EnclaveError, match="ended without a result"):
        _talk(lambda send: None)
    with pytest.raises(EnclaveError, match="ended without a result"):
        _talk(lambda send: None, ready=False)


names = st.sampled_from([*OUTPUTS, "other", CANARY])
messages = st.one_of(
    st.fixed_dictionaries(
        {"kind": st.just("progress"), "done": st.integers(), "total": st.integers()}
    ),
    st.fixed_dictionaries({"kind": st.just("output"), "name": names}),
    st.fixed_dictionaries(
        {"kind": st.just("failed"), "class": st.text(max_size=12), "phase": st.just("running")}
    ),
    st.fixed_dictionaries({"kind": st.sampled_from(["done", "ready", "job", ""])}),
    st.dictionaries(st.sampled_from(["kind", "name", "done"]), st.none() | st.text(max_size=4)),
)
payloads = st.one_of(
    st.binary(max_size=60),
    st.sampled_from(list(GOOD.values())),
    st.sampled_from(list(GOOD.values())).flatmap(
        lambda good: st.integers(0, len(good) - 1).map(
            lambda at: good[:at] + bytes([good[at] ^ 0x41]) + good[at + 1 :]
        )
    ),
)


@settings(max_examples=120, deadline=None)
@given(st.lists(st.tuples(messages, payloads), max_size=6))
def test_whatever_a_process_sends_the_agent_gets_values_of_the_right_kinds_or_an_error(
    script: list[tuple[dict[str, Any], bytes]],
) -> None:
    def lines(send: Send) -> None:
        for header, payload in script:
            send(header, payload)

    try:
        values, _ = _talk(lines)
    except EnclaveError:
        return
    assert set(values) <= set(OUTPUTS)
    wanted = tuple(o for o in _opened().contract.outputs if o.name in values)
    check_outputs(wanted, values)


def test_a_job_with_a_thousand_assets_fits() -> None:
    """The description of a job is larger than a header may be."""
    opened = _opened()
    layout = {"columns": [{"name": f"column-{i}", "type": "double"} for i in range(100)]}
    opened.assets = {
        f"asset-{i}": SimpleNamespace(to_fields=lambda: {"layout": layout}) for i in range(1000)
    }
    session: Any = SimpleNamespace(asset_key=lambda alias: SimpleNamespace(view=lambda: b"k" * 32))
    ours, theirs = socket.socketpair()
    received: list[Any] = []

    def other() -> None:
        with theirs:
            send_frame(theirs, {"kind": "ready"})
            received.append(json.loads(read_frame(theirs)[1]))
            send_frame(theirs, {"kind": "done"})

    thread = threading.Thread(target=other)
    thread.start()
    with ours:
        assert run_program(opened, session, ours, lambda done, total: None) == {}
    thread.join()
    assert len(received[0]["assets"]) == 1000
