"""configfs-tsm, answered by a simulation that keeps the kernel's rules, and by real files."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cenacle.attestation.configfs_tsm import TsmDirectory, TsmReporter
from cenacle.attestation.tdx import TdxAttester
from cenacle.errors import InputError, UnavailableError

World = Any  # of conftest, which tests cannot import
Kernel = Any

NONCE = bytes(range(64))


def test_the_recorded_exchange(kernel: Kernel) -> None:
    report = TsmReporter(kernel).report(NONCE, provider="tdx_guest")
    assert (report.provider, report.auxblob) == ("tdx_guest", b"")
    assert report.outblob == b"report of " + NONCE
    steps = [(what, attribute) for what, _, attribute in kernel.calls]
    assert steps == [
        ("make", ""),
        ("read", "provider"),
        ("read", "generation"),
        ("write", "inblob"),
        ("read", "outblob"),
        ("read", "auxblob"),
        ("read", "generation"),
        ("remove", ""),
    ]
    assert kernel.reports == {}


def test_every_report_has_a_directory_of_its_own(kernel: Kernel) -> None:
    reporter = TsmReporter(kernel)
    for _ in range(3):
        reporter.report(NONCE, provider="tdx_guest")
    names = {name for what, name, _ in kernel.calls if what == "make"}
    assert len(names) == 3


def test_a_report_of_sev_has_a_privilege_level_and_certificates(kernel: Kernel) -> None:
    kernel.provider = "sev_guest"
    kernel.aux = b"certificates"
    report = TsmReporter(kernel).report(NONCE, provider="sev_guest", privlevel=1)
    assert report.auxblob == b"certificates"
    assert kernel.levels == ["1"]


def test_a_race_that_is_over_is_tried_again(kernel: Kernel) -> None:
    kernel.races = 2
    assert TsmReporter(kernel).report(NONCE, provider="tdx_guest").outblob.endswith(NONCE)
    assert sum(1 for call in kernel.calls if call[::2] == ("write", "inblob")) == 3


@pytest.mark.parametrize("quiet", [True, False])
def test_a_race_that_goes_on_is_refused(kernel: Kernel, quiet: bool) -> None:
    """Whether the kernel answers EWOULDBLOCK, or hands out a report of others' options."""
    kernel.races = 99
    kernel.quiet = quiet
    with pytest.raises(UnavailableError, match="others kept changing"):
        TsmReporter(kernel).report(NONCE, provider="tdx_guest")
    assert kernel.reports == {}


def test_another_driver_is_refused(kernel: Kernel) -> None:
    kernel.provider = "sev_guest"
    with pytest.raises(UnavailableError, match="reports of another kind; found sev_guest"):
        TsmReporter(kernel).report(NONCE, provider="tdx_guest")
    assert kernel.reports == {}


@pytest.mark.parametrize("code", [errno.EACCES, errno.ETIMEDOUT, errno.EIO])
@pytest.mark.parametrize("step", ["make", "inblob", "outblob", "auxblob", "generation"])
def test_a_driver_that_fails_is_an_answer(kernel: Kernel, step: str, code: int) -> None:
    kernel.failures[step] = code
    with pytest.raises(UnavailableError, match="the kernel does not make a report"):
        TsmReporter(kernel).report(NONCE, provider="tdx_guest")
    assert kernel.reports == {}


def test_an_interrupted_call_is_tried_again(kernel: Kernel) -> None:
    kernel.failures["outblob"] = errno.EINTR
    with pytest.raises(UnavailableError, match="others kept changing"):
        TsmReporter(kernel).report(NONCE, provider="tdx_guest")
    assert sum(1 for call in kernel.calls if call[::2] == ("read", "outblob")) == 4


@pytest.mark.parametrize("size", [0, 1024 * 1024 + 1])
def test_a_report_of_impossible_size_is_refused(kernel: Kernel, size: int) -> None:
    kernel.make_report = lambda inblob: bytes(size)
    with pytest.raises(UnavailableError, match="impossible size"):
        TsmReporter(kernel).report(NONCE, provider="tdx_guest")


def test_a_machine_without_reports_says_so(kernel: Kernel, tmp_path: Path) -> None:
    kernel.available = False
    for directory in (kernel, TsmDirectory(tmp_path / "none")):
        assert not TsmReporter(directory).available
        with pytest.raises(UnavailableError, match="offers no hardware reports"):
            TsmReporter(directory).report(NONCE, provider="tdx_guest")


@pytest.mark.parametrize("size", [0, 63, 65])
def test_report_data_has_one_length(kernel: Kernel, size: int) -> None:
    with pytest.raises(InputError, match="wrong length"):
        TsmReporter(kernel).report(bytes(size), provider="tdx_guest")
    assert kernel.calls == []


class Files(TsmDirectory):
    """Real files: a directory that is made gets its attributes, as configfs gives them."""

    def make(self, name: str) -> None:
        super().make(name)
        folder = self._root / name
        for attribute, content in (
            ("provider", b"tdx_guest\n"),
            ("generation", b"0\n"),
            ("inblob", b""),
        ):
            (folder / attribute).write_bytes(content)

    def write(self, name: str, attribute: str, data: bytes) -> None:
        super().write(name, attribute, data)
        folder = self._root / name
        (folder / "outblob").write_bytes(b"of " + (folder / "inblob").read_bytes())
        count = int((folder / "generation").read_text()) + 1
        (folder / "generation").write_text(f"{count}\n")

    def remove(self, name: str) -> None:
        for path in (self._root / name).iterdir():
            path.unlink()
        super().remove(name)


def test_real_files_are_read_and_written(tmp_path: Path) -> None:
    reporter = TsmReporter(Files(tmp_path))
    assert reporter.available
    report = reporter.report(NONCE, provider="tdx_guest")
    assert report.outblob == b"of " + NONCE
    assert report.auxblob == b""  # no such file: a driver without certificates
    assert list(tmp_path.iterdir()) == []


def test_a_quote_of_something_else_is_refused(
    world: World, tdx_guest: Callable[..., Any], now: Any, td_report: Callable[..., bytes]
) -> None:
    attester, simulated = tdx_guest(world)
    simulated.make_report = lambda inblob: world.quote(4, td_report(report_data=bytes(64)))
    with pytest.raises(UnavailableError, match="a quote of something else"):
        attester.collect(NONCE, now)


def test_without_a_table_no_log_is_sent(
    world: World, tdx_guest: Callable[..., Any], now: Any, tmp_path: Path
) -> None:
    attester, simulated = tdx_guest(world, None, tmp_path / "none")
    assert "event_log" not in attester.collect(NONCE, now)
    table = tmp_path / "CCEL"
    table.write_bytes(b"noise")
    attester, _ = tdx_guest(world, None, table)
    with pytest.raises(UnavailableError, match="event log cannot be read"):
        attester.collect(NONCE, now)
    reporter = TsmReporter(simulated)
    silent = TdxAttester(tmp_path / "collateral.json", reporter, event_log=None)
    assert "event_log" not in silent.collect(NONCE, now)
