"""Gramine's files, answered by real files in a directory and by a machine that makes quotes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cenacle.attestation.gramine import GramineQuoter
from cenacle.attestation.sgx import SgxAttester
from cenacle.errors import InputError, UnavailableError

World = Any  # of conftest, which tests cannot import

NONCE = bytes(range(64))


def test_the_recorded_exchange(world: World, gramine: Callable[..., Any], now: Any) -> None:
    attester, folder = gramine(world)
    body = attester.collect(NONCE, now)
    assert set(body) == {"quote", "collateral"}
    assert (folder / "user_report_data").read_bytes() == NONCE


def test_outside_of_gramine_nothing_is_attested(tmp_path: Path, now: Any) -> None:
    quoter = GramineQuoter(tmp_path)
    assert not quoter.available
    with pytest.raises(UnavailableError, match="does not run in an SGX enclave"):
        SgxAttester(tmp_path / "c", quoter).collect(NONCE, now)


@pytest.mark.parametrize("kind", ["none", "epid", ""])
def test_only_dcap_is_asked_for(
    world: World, gramine: Callable[..., Any], now: Any, kind: str
) -> None:
    attester, folder = gramine(world)
    (folder / "attestation_type").write_text(kind)
    with pytest.raises(UnavailableError, match="not told to make DCAP quotes"):
        attester.collect(NONCE, now)


@pytest.mark.parametrize("quote", [b"", b"x" * 70_000])
def test_a_quote_of_impossible_size_is_refused(
    world: World, gramine: Callable[..., Any], now: Any, quote: bytes
) -> None:
    attester, _ = gramine(world, quote)
    with pytest.raises(UnavailableError, match="impossible size"):
        attester.collect(NONCE, now)


def test_a_quote_of_something_else_is_refused(
    world: World, gramine: Callable[..., Any], now: Any, sgx_report: Callable[..., bytes]
) -> None:
    attester, _ = gramine(world, world.quote(3, sgx_report(report_data=bytes(64))))
    with pytest.raises(UnavailableError, match="quote of something else"):
        attester.collect(NONCE, now)
    attester, _ = gramine(world, b"noise")
    with pytest.raises(UnavailableError, match="not understood"):
        attester.collect(NONCE, now)


@pytest.mark.parametrize("content", [None, b"", b"{}", b"[1]", b"\xff"])
def test_without_collateral_nothing_is_sent(
    world: World, gramine: Callable[..., Any], now: Any, content: bytes | None
) -> None:
    attester, folder = gramine(world)
    path = folder.parent / "collateral.json"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(UnavailableError, match="no collateral to send"):
        attester.collect(NONCE, now)


def test_report_data_has_one_length(world: World, gramine: Callable[..., Any]) -> None:
    _, folder = gramine(world)
    with pytest.raises(InputError, match="wrong length"):
        GramineQuoter(folder).quote(b"short")


def test_a_file_that_cannot_be_written_is_an_answer(
    world: World, gramine: Callable[..., Any], now: Any
) -> None:
    attester, folder = gramine(world)
    (folder / "user_report_data").unlink()
    (folder / "user_report_data").mkdir()
    with pytest.raises(UnavailableError, match="makes no quote"):
        attester.collect(NONCE, now)


def test_the_collateral_is_sent_as_it_was_fetched(
    world: World, gramine: Callable[..., Any], now: Any
) -> None:
    attester, folder = gramine(world)
    fetched = json.loads((folder.parent / "collateral.json").read_text())
    assert attester.collect(NONCE, now)["collateral"] == fetched
