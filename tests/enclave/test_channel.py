"""The channel carries few words out of an enclave, and the host believes none of them blindly."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cenacle.enclave.channel import (
    MAX_LINE,
    MAX_OUTPUTS,
    MAX_STEPS,
    STAGES,
    Channel,
    Failed,
    Finished,
    Message,
    OutputFile,
    Progress,
    Stage,
    public_error,
    read_messages,
)
from cenacle.errors import DataError, EnclaveError, InputError, RefusedError

DIGEST = "sha256:" + "ab" * 32


@pytest.fixture
def pipe() -> Iterator[tuple[int, Channel]]:
    reader, writer = os.pipe()
    with Channel(writer) as channel:
        yield reader, channel
    os.close(reader)


def _host(raw: bytes) -> list[Message]:
    reader, writer = os.pipe()

    def feed() -> None:
        with os.fdopen(writer, "wb") as file:
            try:
                file.write(raw)
            except BrokenPipeError:
                return

    thread = threading.Thread(target=feed)
    thread.start()
    try:
        return list(read_messages(reader))
    finally:
        os.close(reader)
        thread.join()


def _line(**fields: Any) -> bytes:
    return json.dumps(fields).encode() + b"\n"


def test_every_message_arrives_as_it_was_sent(pipe: tuple[int, Channel]) -> None:
    reader, channel = pipe
    channel.stage("starting")
    channel.progress(1, 3)
    channel.stage("running")
    channel.progress(0, 1)
    channel.finished([OutputFile("model.sealed", DIGEST)], OutputFile("receipt.json", DIGEST))
    channel.close()
    assert list(read_messages(reader)) == [
        Stage("starting"),
        Progress(1, 3),
        Stage("running"),
        Progress(0, 1),
        Finished((OutputFile("model.sealed", DIGEST),), OutputFile("receipt.json", DIGEST)),
    ]
    assert channel.ended


@settings(max_examples=30, deadline=None)
@given(total=st.integers(1, 10**9), reports=st.lists(st.integers(-5, 10**9), max_size=40))
def test_progress_leaves_in_at_most_a_thousand_rising_steps(total: int, reports: list[int]) -> None:
    reader, writer = os.pipe()
    with Channel(writer) as channel:
        for done in reports:
            channel.progress(done, total)
    seen = [m for m in read_messages(reader) if isinstance(m, Progress)]
    os.close(reader)
    assert all(0 <= m.done <= m.total <= MAX_STEPS for m in seen)
    assert [m.done for m in seen] == sorted({m.done for m in seen})


def test_a_million_reports_make_a_thousand_and_one_messages(pipe: tuple[int, Channel]) -> None:
    reader, channel = pipe
    got: list[Message] = []
    thread = threading.Thread(target=lambda: got.extend(read_messages(reader)))
    thread.start()
    for done in range(0, 1_000_001, 50):
        channel.progress(done, 1_000_000)
    channel.close()
    thread.join()
    assert len(got) == MAX_STEPS + 1


def test_a_stage_comes_once_and_in_order(pipe: tuple[int, Channel]) -> None:
    _, channel = pipe
    channel.stage("running")
    for name in ("running", "starting"):
        with pytest.raises(EnclaveError, match="in order"):
            channel.stage(name)  # type: ignore[arg-type,unused-ignore]
    with pytest.raises(EnclaveError, match="in order"):
        channel.stage("patient 17 is ill")  # type: ignore[arg-type,unused-ignore]


@pytest.mark.parametrize(
    "file",
    [
        OutputFile("../escape", DIGEST),
        OutputFile("", DIGEST),
        OutputFile(".hidden", DIGEST),
        OutputFile("a/b", DIGEST),
        OutputFile("x" * 129, DIGEST),
        OutputFile("good", "sha256:short"),
        OutputFile("good\n", DIGEST),
    ],
)
def test_an_output_needs_a_plain_name_and_a_digest(
    pipe: tuple[int, Channel], file: OutputFile
) -> None:
    with pytest.raises(EnclaveError, match="no usable name or digest"):
        pipe[1].finished([file])
    with pytest.raises(EnclaveError, match="broke the protocol"):
        _host(_line(kind="finished", outputs=[[file.name, file.digest]], receipt=None))


HOSTILE = [
    (b"not json\n", "not JSON"),
    (b"\xff\xfe\n", "not JSON"),
    (b"\n", "not JSON"),
    (b"[" * 60_000 + b"\n", "not JSON"),
    (b'{"kind":"progress","done":' + b"9" * 5000 + b',"total":10}\n', "not JSON"),
    (b"7\n", "not an object"),
    (_line(kind="shell", command="rm"), "unknown kind"),
    (_line(kind="stage", name="patient 17"), "unknown kind"),
    (_line(kind="stage", name=["running"]), "unknown kind"),
    (_line(kind="stage", name="running", more=1), "unknown kind"),
    (_line(kind=["stage"], name="running"), "unknown kind"),
    (_line(kind="progress", done=1, total=1001), "out of range"),
    (_line(kind="progress", done=3, total=2), "out of range"),
    (_line(kind="progress", done=-1, total=2), "out of range"),
    (_line(kind="progress", done=0, total=0), "out of range"),
    (_line(kind="progress", done=True, total=2), "out of range"),
    (_line(kind="progress", done=0.5, total=2), "unknown kind"),
    (_line(kind="finished", outputs=[["a", DIGEST]] * (MAX_OUTPUTS + 1), receipt=None), "too many"),
    (_line(kind="finished", outputs=[["a"]], receipt=None), "without a proper name"),
    (_line(kind="finished", outputs=[], receipt="r"), "without a proper name"),
    (_line(kind="finished", outputs={}, receipt=None), "unknown kind"),
    (_line(kind="failed", error={"what": 7}), "another form"),
    (_line(kind="failed", error={}), "another form"),
    (_line(kind="failed", error={"what": "x", "data": "y"}), "another form"),
    (_line(kind="failed", error={"what": "x" * 2001}), "another form"),
    (_line(kind="failed", error={"what": "x", "clauses": "all"}), "another form"),
    (_line(kind="failed", error={"what": "x", "clauses": [["nested"]]}), "clause"),
    (_line(kind="stage", name="running") * 2, "out of order"),
    (_line(kind="stage", name="running") + _line(kind="stage", name="keys"), "out of order"),
    (_line(kind="progress", done=2, total=3) + _line(kind="progress", done=1, total=3), "order"),
    (_line(kind="progress", done=1, total=3) + _line(kind="progress", done=2, total=4), "order"),
    (
        _line(kind="finished", outputs=[], receipt=None) + _line(kind="stage", name="receipt"),
        "out of order",
    ),
    (b'{"kind":"stage","name":"running"}', "without an end"),
    (b"x" * (MAX_LINE + 1), "too long"),
    (b"x" * (4 * MAX_LINE) + b"\n", "too long"),
]


@pytest.mark.parametrize(("raw", "found"), HOSTILE, ids=range(len(HOSTILE)))
def test_the_host_refuses_what_the_protocol_does_not_allow(raw: bytes, found: str) -> None:
    with pytest.raises(EnclaveError, match="broke the protocol") as caught:
        _host(raw)
    assert found in str(caught.value.found)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300))
def test_no_bytes_make_the_host_fail_in_another_way(raw: bytes) -> None:
    try:
        _host(raw)
    except EnclaveError:
        return


def test_the_enclave_cannot_write_on_the_hosts_terminal() -> None:
    raw = _line(
        kind="failed", error={"error": "DataError", "what": "bad\x1b[2J\nFORGED", "found": "\x07"}
    )
    (message,) = _host(raw)
    assert isinstance(message, Failed)
    error = message.to_error()
    assert isinstance(error, DataError)
    assert str(error).isprintable()


def test_messages_before_a_violation_are_kept() -> None:
    reader, writer = os.pipe()
    os.write(writer, _line(kind="stage", name="keys") + b"junk\n")
    os.close(writer)
    stream = read_messages(reader)
    assert next(stream) == Stage("keys")
    with pytest.raises(EnclaveError):
        next(stream)
    os.close(reader)


SECRET = "patient 17: positive"


def _raise(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


class PatientSeventeenIsPositive(ValueError):
    pass


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (ValueError(SECRET), "ValueError"),
        (KeyError(SECRET), "KeyError"),
        (PatientSeventeenIsPositive(SECRET), "ValueError"),
        (UnicodeDecodeError("utf-8", SECRET.encode(), 0, 1, SECRET), "UnicodeDecodeError"),
        # A class of ours, but raised by a program that chose the words.
        (DataError(SECRET, found=SECRET), "DataError"),
        (RefusedError(SECRET, clauses=[{"found": SECRET}]), "RefusedError"),
        (SystemExit(SECRET), "SystemExit"),
        (KeyboardInterrupt(SECRET), "KeyboardInterrupt"),
    ],
)
def test_an_exception_leaves_with_its_class_and_never_its_words(
    error: BaseException, found: str
) -> None:
    fields = public_error(_raise(error))
    assert fields["found"] == found
    assert "patient" not in json.dumps(fields).lower()


def test_an_exception_with_a_cause_leaves_without_it() -> None:
    error = RuntimeError("second")
    error.__cause__ = ValueError(SECRET)
    error.add_note(SECRET)
    assert "patient" not in json.dumps(public_error(_raise(error)))


def test_an_error_of_our_own_code_leaves_whole(pipe: tuple[int, Channel]) -> None:
    with pytest.raises(EnclaveError) as caught:
        pipe[1].progress(0, 0)
    assert public_error(caught.value) == caught.value.to_dict()


def test_running_out_of_memory_is_said_in_words() -> None:
    assert "out of memory" in public_error(_raise(MemoryError(SECRET)))["what"]


def test_failing_twice_or_to_a_dead_host_is_silent() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with Channel(writer) as channel:
        channel.failed(InputError("one"))
        channel.failed(InputError("two"))
        assert channel.ended
        channel.close()


def test_there_are_few_stages() -> None:
    # Their number bounds what an enclave can say: stages * (steps + 1) messages.
    assert len(STAGES) == len(set(STAGES)) <= 10
