"""Evidence of real machines, signed by Intel; skipped where the samples are not."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from cenacle.attestation.cc_event_log import compact_log, events_of
from cenacle.attestation.claims import Evidence
from cenacle.attestation.dcap import VerifiedQuote, verify_quote
from cenacle.attestation.dcap_chain import check_pck_chain, parse_chain, parse_pck_extension
from cenacle.attestation.dcap_collateral import Collateral
from cenacle.attestation.dcap_quote import TdReport, parse_quote
from cenacle.attestation.intel_roots import intel_roots
from cenacle.attestation.registry import Verifier
from cenacle.attestation.sgx import SgxPolicy, SgxVerifier, judge_sgx
from cenacle.attestation.tdx import TdxPolicy, TdxVerifier, judge_tdx
from cenacle.documents.base import parse_time
from cenacle.documents.clauses import all_met, failed
from cenacle.errors import EvidenceError


@dataclass(frozen=True)
class Sample:
    quote: bytes
    collateral: bytes

    @property
    def fields(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.collateral)
        return found

    @property
    def now(self) -> datetime:
        """An hour after the collateral was issued."""
        return parse_time(json.loads(self.fields["tcb_info"])["issueDate"]) + timedelta(hours=1)

    def evidence(self, verifier: Verifier) -> Evidence:
        return Evidence(kind=verifier.kind, body=verifier.body_of(self.quote, self.collateral))

    def verify(self, quote: bytes | None = None, **changed: str) -> VerifiedQuote:
        collateral = Collateral.of({**self.fields, **changed})
        shown = parse_quote(self.quote if quote is None else quote)
        return verify_quote(shown, collateral, intel_roots(), self.now)


Samples = dict[str, Sample]


@pytest.fixture(scope="module")
def samples(evidence_folder: Path) -> Samples:
    folder = evidence_folder / "dcap"
    return {
        name: Sample(
            (folder / name).read_bytes(), (folder / f"{name}_collateral.json").read_bytes()
        )
        for name in ("sgx_quote", "tdx_quote", "tdx_quote_outdated")
    }


def test_an_enclave_that_needs_configuration_is_genuine_and_not_good_enough(
    samples: Samples,
) -> None:
    sample, verifier = samples["sgx_quote"], SgxVerifier()
    claims, bound = verifier.inspect(sample.evidence(verifier), sample.now)
    assert claims.properties["tcb_status"] == "ConfigurationAndSWHardeningNeeded"
    assert claims.properties["advisories"] == ["INTEL-SA-00289", "INTEL-SA-00615"]
    assert claims.properties["tcb_evaluation_data_number"] == 17
    assert claims.measurements["mrenclave"].startswith("sha256:33d8736db756ed49")
    assert bound.rstrip(b"\0") == b"Hello, world!"
    assert {c.name for c in failed(judge_sgx(claims, SgxPolicy()))} == {
        "sgx TCB status",
        "sgx TCB status of what runs now",
        "sgx advisories",
    }
    known = SgxPolicy.from_fields(
        {
            "tcb_status": ["UpToDate", "ConfigurationAndSWHardeningNeeded"],
            "advisories": ["INTEL-SA-00289", "INTEL-SA-00615"],
        }
    )
    assert all_met(judge_sgx(claims, known))


def test_a_domain_on_an_up_to_date_platform_is_accepted(samples: Samples) -> None:
    sample, verifier = samples["tdx_quote"], TdxVerifier()
    claims, _ = verifier.inspect(sample.evidence(verifier), sample.now)
    assert claims.properties["tcb_status"] == "UpToDate"
    assert claims.properties["advisories"] == []
    assert claims.properties["confirmed_by"] == "dcap-qvl"
    assert claims.measurements["mrtd"].startswith("sha384:91eb2b44d141d4ec")
    assert all_met(judge_tdx(claims, TdxPolicy()))


def test_a_domain_on_a_platform_below_every_level_is_refused(samples: Samples) -> None:
    sample, verifier = samples["tdx_quote_outdated"], TdxVerifier()
    with pytest.raises(EvidenceError, match="no TCB level of Intel's matches"):
        verifier.inspect(sample.evidence(verifier), sample.now)


@pytest.mark.parametrize("name", ["sgx_quote", "tdx_quote", "tdx_quote_outdated"])
@pytest.mark.parametrize(
    ("at", "reason"),
    [
        (datetime(2026, 11, 22, tzinfo=UTC), "expired"),
        (datetime(2060, 1, 1, tzinfo=UTC), "expired"),
        (datetime(2000, 1, 1, tzinfo=UTC), "of the future"),
    ],
)
def test_at_another_time_the_evidence_is_worth_nothing(
    samples: Samples, name: str, at: datetime, reason: str
) -> None:
    verifier: Verifier = SgxVerifier() if name == "sgx_quote" else TdxVerifier()
    with pytest.raises(EvidenceError, match=reason):
        verifier.inspect(samples[name].evidence(verifier), at)


def test_report_data_of_others_is_refused(samples: Samples) -> None:
    sample, verifier = samples["tdx_quote"], TdxVerifier()
    evidence = sample.evidence(verifier)
    bound = verifier.inspect(evidence, sample.now).bound
    assert verifier.authenticate(evidence, bound, sample.now).kind == "tdx"
    with pytest.raises(EvidenceError, match="bound to another nonce"):
        verifier.authenticate(evidence, bytes(64), sample.now)


def test_an_enclave_is_no_domain(samples: Samples) -> None:
    for name, verifier in (("sgx_quote", TdxVerifier()), ("tdx_quote", SgxVerifier())):
        with pytest.raises(EvidenceError, match="another kind of enclave"):
            verifier.inspect(samples[name].evidence(verifier), samples[name].now)


def test_collateral_of_another_platform_is_refused(samples: Samples) -> None:
    for name, other in (("sgx_quote", "tdx_quote"), ("tdx_quote", "sgx_quote")):
        mixed = Sample(samples[name].quote, samples[other].collateral)
        with pytest.raises(EvidenceError):
            mixed.verify()
        for field, value in samples[other].fields.items():
            if value != samples[name].fields[field]:
                with pytest.raises(EvidenceError):
                    samples[name].verify(**{field: value})


def _with_chain(quote: bytes, chain: bytes) -> bytes:
    """A quote of version 3 or 4 with another certification chain, lengths adjusted."""
    parsed = parse_quote(quote)
    start = len(parsed.signed)
    auth = bytearray(parsed.raw[start + 4 : -len(parsed.certification_data) - 4])
    grown = len(chain) - len(parsed.certification_data)
    if parsed.header.version > 3:
        (size,) = struct.unpack_from("<I", auth, 130)
        struct.pack_into("<I", auth, 130, size + grown)
    body = bytes(auth) + struct.pack("<I", len(chain)) + chain
    return parsed.signed + struct.pack("<I", len(body)) + body


def test_certificates_of_another_platform_are_refused(samples: Samples) -> None:
    quotes = {name: samples[name].quote for name in ("sgx_quote", "tdx_quote")}
    chains = {name: parse_quote(quote).certification_data for name, quote in quotes.items()}
    for name, other in (("sgx_quote", "tdx_quote"), ("tdx_quote", "sgx_quote")):
        samples[name].verify(_with_chain(quotes[name], chains[name]))
        with pytest.raises(EvidenceError, match="quoting enclave's report is not genuine"):
            samples[name].verify(_with_chain(quotes[name], chains[other]))


def _quote_flips(sample: Sample, step: int) -> list[int]:
    """Places in the quote where another byte goes unnoticed.

    Looks at every byte up to the certificates, and at each ``step``-th of those and of the padding.
    """
    collateral, now, roots = Collateral.of(sample.fields), sample.now, intel_roots()
    quote = bytearray(sample.quote)
    certificates = quote.index(b"-----BEGIN")
    accepted = []
    for place in (*range(certificates), *range(certificates, len(quote), step)):
        quote[place] ^= 0x01
        try:
            verify_quote(parse_quote(bytes(quote)), collateral, roots, now)
            accepted.append(place)
        except EvidenceError:
            pass
        quote[place] ^= 0x01
    return accepted


@pytest.mark.parametrize("name", ["sgx_quote", "tdx_quote"])
def test_bytes_of_a_quote_count(samples: Samples, name: str) -> None:
    assert _quote_flips(samples[name], 13) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sgx_quote", "tdx_quote"])
def test_every_byte_of_a_quote_counts(samples: Samples, name: str) -> None:
    assert _quote_flips(samples[name], 1) == []


def _collateral_flips(sample: Sample, step: int) -> list[tuple[str, int]]:
    """Places in the collateral where another character goes unnoticed."""
    quote, now, roots = parse_quote(sample.quote), sample.now, intel_roots()
    whole = Collateral.of(sample.fields).model_dump()
    accepted = []
    count = 0
    for field, text in whole.items():
        for place in range(len(text or "")):
            count += 1
            if count % step:
                continue
            altered = text[:place] + chr(ord(text[place]) ^ 0x01) + text[place + 1 :]
            try:
                verify_quote(quote, Collateral.of({**sample.fields, field: altered}), roots, now)
                accepted.append((field, place))
            except EvidenceError:
                pass
    return accepted


@pytest.mark.parametrize("name", ["sgx_quote", "tdx_quote"])
def test_characters_of_the_collateral_count(samples: Samples, name: str) -> None:
    assert _collateral_flips(samples[name], 131) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sgx_quote", "tdx_quote"])
def test_every_character_of_the_collateral_counts(samples: Samples, name: str) -> None:
    assert _collateral_flips(samples[name], 1) == []


# A CC event log and the quote that was taken with it, without collateral.

Rtmrs = tuple[bytes, bytes, bytes, bytes]


@pytest.fixture(scope="module")
def cos(evidence_folder: Path) -> tuple[bytes, Rtmrs, bytes]:
    folder = evidence_folder / "tdx-ccel"
    raw = (folder / "cos-113-tdx-quote.dat").read_bytes()
    report = parse_quote(raw).report
    assert isinstance(report, TdReport)
    rtmrs = (report.rtmr0, report.rtmr1, report.rtmr2, report.rtmr3)
    return (folder / "ccel_data.dat").read_bytes(), rtmrs, raw


def test_a_machines_log_replays_to_its_quote(cos: tuple[bytes, Rtmrs, bytes]) -> None:
    raw, rtmrs, _ = cos
    shown = events_of(raw, rtmrs)
    assert len(shown["events"]) == 43
    assert shown["secure_boot"] is False
    said = [event.get("says", "") for event in shown["events"] if event["register"] == 2]
    assert any(text.startswith("/syslinux/vmlinuz.A init=") for text in said)
    assert {event["register"] for event in shown["events"]} == {0, 1, 2}
    assert events_of(compact_log(raw), rtmrs) == shown


def test_bytes_of_a_machines_log_are_proven_or_without_effect(
    cos: tuple[bytes, Rtmrs, bytes],
) -> None:
    raw, rtmrs, _ = cos
    log = bytearray(compact_log(raw))
    true = [(e["register"], e["digest"]) for e in events_of(bytes(log), rtmrs)["events"]]
    said = {e.get("says") for e in events_of(bytes(log), rtmrs)["events"]} | {None}
    for place in range(0, len(log), 149):
        log[place] ^= 0x01
        try:
            shown = events_of(bytes(log), rtmrs)["events"]
        except EvidenceError:
            pass
        else:
            assert [(e["register"], e["digest"]) for e in shown] == true
            assert {e.get("says") for e in shown} <= said
        log[place] ^= 0x01


def test_a_machines_platform_certificate_is_intels(cos: tuple[bytes, Rtmrs, bytes]) -> None:
    _, _, raw = cos
    quote = parse_quote(raw)
    chain = check_pck_chain(
        parse_chain(quote.certification_data.decode(), "a chain"),
        intel_roots(),
        datetime(2024, 9, 1, tzinfo=UTC),
    )
    extension = parse_pck_extension(chain.leaf)
    assert extension.fmspc.hex() == "00806f050000"
    assert extension.flags["dynamic"] is True
