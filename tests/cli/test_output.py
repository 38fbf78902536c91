"""How commands speak when something is odd: bugs, full pipes, hostile text, narrow screens."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from rich.console import Console

from cenacle.cli import output
from cenacle.documents.clauses import Clause
from cenacle.errors import ConflictError, EnclaveError, RefusedError

HOSTILE = "\x1b[2K\x1b[1Aall is well\r\n[bold]:skull: \u202e"


@pytest.fixture
def screens(monkeypatch: pytest.MonkeyPatch) -> tuple[io.StringIO, io.StringIO]:
    """Output and error stream as terminals of 40 columns."""
    out, err = io.StringIO(), io.StringIO()
    for name, stream in (("console", out), ("_errors", err)):
        console = Console(file=stream, width=40, force_terminal=True, highlight=False, emoji=False)
        monkeypatch.setattr(output, name, console)
    return out, err


def test_text_of_others_cannot_steer_the_terminal(
    screens: tuple[io.StringIO, io.StringIO],
) -> None:
    clause = Clause(subject=HOSTILE, name="purpose", found=HOSTILE, demanded="x", verdict="failed")
    output.line(HOSTILE)
    output.say(HOSTILE)
    output.console.print(output.clause_table([clause], "clauses"))
    output.report_error(ConflictError(HOSTILE, found=HOSTILE), False)
    output.report_error(RefusedError(HOSTILE, clauses=[clause.to_fields()]), False)
    for stream in screens:
        shown = stream.getvalue()
        assert "\x1b[2K" not in shown
        assert "\x1b[1A" not in shown
        assert "\r" not in shown
        assert "\u202e" not in shown
        assert ":skull:" in shown.replace("\n", "")
        assert "[bold]" in shown.replace("\n", "")


def test_a_digest_is_never_cut_off_or_broken_in_a_file() -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=20, highlight=False)
    digest = "sha256:" + "ab" * 32
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output, "console", console)
        output.line(f"made party clinic: {digest}")
    assert digest in stream.getvalue()


def test_bars_are_for_terminals(screens: tuple[io.StringIO, io.StringIO]) -> None:
    with output.progress_bar("starting") as bar:
        bar.step("running")
        bar.report(1, 2)
        bar.report(2, 2)
        bar.step("sealing")
    shown = screens[1].getvalue()
    assert "\u2501" in shown
    for label in ("starting", "running", "sealing"):
        assert label in shown


def test_elsewhere_a_step_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(output, "_errors", Console(file=stream, width=40, highlight=False))
    with output.progress_bar("starting") as bar:
        bar.step("running the job")
        bar.report(1, 2)
    assert stream.getvalue() == "starting\nrunning the job\n"


def test_nothing_is_shown_if_so_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(output, "_errors", Console(file=stream, width=40, force_terminal=True))
    with output.progress_bar("starting", shown=False) as bar:
        bar.step("running")
        bar.report(1, 2)
    assert stream.getvalue() == ""


@pytest.mark.parametrize("as_json", [False, True])
def test_a_bug_is_one_sentence_without_its_message(
    as_json: bool, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CENACLE_TRACEBACK", raising=False)
    with pytest.raises(typer.Exit) as caught, output.errors_in_words(as_json):
        raise KeyError("a secret")
    assert caught.value.exit_code == 1
    captured = capfd.readouterr()
    told = captured.out if as_json else captured.err
    assert "KeyError at test_output.py" in told.replace("\n", " ")
    assert "secret" not in told.replace("no secret", "")
    assert "Traceback" not in captured.out + captured.err


def test_a_developer_can_ask_for_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CENACLE_TRACEBACK", "1")
    with pytest.raises(KeyError), output.errors_in_words(False):
        raise KeyError("x")


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (EnclaveError("it failed"), 7, "it failed"),
        (FileNotFoundError(2, "No such file or directory", "x.yaml"), 2, "x.yaml"),
        (PermissionError(13, "Permission denied", "y"), 2, "Permission denied"),
        (OSError("odd"), 2, "a file cannot be used"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_every_error_has_its_code_and_one_json_object(
    error: BaseException, code: int, words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as caught, output.errors_in_words(True):
        raise error
    assert caught.value.exit_code == code
    fields = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert words in json.dumps(fields)


def _cenacle(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "cenacle", *arguments]


@pytest.mark.processes
@pytest.mark.parametrize("arguments", [("terms", "new"), ("terms", "new", "--json")])
def test_a_reader_that_closes_the_pipe_is_no_error(
    arguments: tuple[str, ...], tmp_path: Path
) -> None:
    process = subprocess.Popen(
        _cenacle(*arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "CENACLE_HOME": str(tmp_path)},
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    told = process.stderr.read()
    process.stderr.close()
    assert process.wait(30) == 0
    assert told == b""


@pytest.mark.processes
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["party", "show", "--json"], "Missing argument"),
        (["nonsense", "--json"], "No such command 'nonsense'"),
        (["party", "new", "x", "--nonsense", "--json"], "No such option"),
        (["log", "--limit", "many", "--json"], "Invalid value for '--limit'"),
    ],
)
def test_unusable_arguments_are_json_too(arguments: list[str], words: str, tmp_path: Path) -> None:
    done = subprocess.run(
        _cenacle(*arguments),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "CENACLE_HOME": str(tmp_path)},
    )
    assert done.returncode == 2
    fields = json.loads(done.stdout.splitlines()[-1])
    assert fields["error"] == "InputError"
    assert words in fields["what"]
    assert "Traceback" not in done.stderr
