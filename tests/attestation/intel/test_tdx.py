from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cenacle.attestation.claims import Claims, Evidence, compare
from cenacle.attestation.event_log import Event, EventLog, EventType
from cenacle.attestation.registry import Shown
from cenacle.attestation.tdx import TdxPolicy, TdxVerifier, judge_tdx, tdx_identity
from cenacle.documents.base import b64
from cenacle.documents.clauses import all_met, failed
from cenacle.errors import DocumentError, EvidenceError

World = Any  # of conftest, which tests cannot import

Inspect = Callable[..., Shown]
NONCE = bytes(range(64))


@pytest.fixture
def inspect(world: World, now: Any) -> Inspect:
    def run(fields: dict[str, Any]) -> Shown:
        return TdxVerifier([world.root]).inspect(Evidence(kind="tdx", body=fields), now)

    return run


def attributes(*bits: int) -> bytes:
    return sum(1 << bit for bit in {28, *bits}).to_bytes(8, "little")


@pytest.mark.parametrize(("version", "td"), [(4, "1.0"), (5, "1.0"), (5, "1.5")])
def test_what_identifies_a_domain_is_measured(
    world: World, inspect: Inspect, now: Any, version: int, td: str
) -> None:
    claims, bound = inspect(world.tdx(version, td))
    assert (claims.kind, claims.protection, claims.issued) == ("tdx", "tee", now)
    assert claims.measurements == {
        "mrtd": "sha384:" + "d1" * 48,
        "rtmr0": "sha384:" + "0001" * 24,
        "rtmr1": "sha384:" + "0101" * 24,
        "rtmr2": "sha384:" + "0201" * 24,
        "rtmr3": "sha384:" + "00" * 48,
    }
    assert claims.properties["td_report"] == td
    assert claims.properties["td_attributes"] == ["SEPT_VE_DISABLE"]
    assert claims.properties["xfam"] == "00000000000602e7"
    assert claims.properties["mr_seam"] == "5e" * 48
    assert ("tee_tcb_svn2" in claims.properties) is (td == "1.5")
    assert bound == NONCE


@pytest.mark.parametrize(
    ("field", "name"),
    [
        ("mr_config_id", "mrconfigid"),
        ("mr_owner", "mrowner"),
        ("mr_owner_config", "mrownerconfig"),
    ],
)
def test_what_the_host_configured_is_measured_where_it_is_not_zero(
    world: World, inspect: Inspect, field: str, name: str
) -> None:
    shown = inspect(world.tdx(4, **{field: b"\x07" * 48})).claims.measurements
    assert shown[name] == "hex:" + "07" * 48
    assert len(shown) == 6


@pytest.mark.parametrize("bit", range(8))
@pytest.mark.parametrize(("version", "td"), [(4, "1.0"), (5, "1.5")])
def test_domains_under_debug_are_refused(
    world: World, inspect: Inspect, bit: int, version: int, td: str
) -> None:
    with pytest.raises(EvidenceError, match="under debug"):
        inspect(world.tdx(version, td, td_attributes=attributes(bit)))


@pytest.mark.parametrize(
    ("bit", "name"),
    [(8, "bit 8"), (16, "ICSSD"), (17, "SERVTD_EXT"), (26, "bit 26"), (29, "MIGRATABLE"),
     (40, "bit 40")],
)  # fmt: skip
def test_attributes_that_weaken_a_domain_are_refused_by_policy(
    world: World, inspect: Inspect, bit: int, name: str
) -> None:
    claims = inspect(world.tdx(4, td_attributes=attributes(bit))).claims
    assert name in claims.properties["td_attributes"]
    (clause,) = failed(judge_tdx(claims, TdxPolicy()))
    assert (clause.name, clause.found) == ("tdx TD attributes", name)
    if not name.startswith("bit"):
        known = TdxPolicy.from_fields({"td_attributes": ["SEPT_VE_DISABLE", name]})
        assert all_met(judge_tdx(claims, known))


@pytest.mark.parametrize("bit", [27, 30, 31, 62, 63])
def test_attributes_that_do_not_weaken_a_domain_are_accepted(
    world: World, inspect: Inspect, bit: int
) -> None:
    claims = inspect(world.tdx(5, "1.5", td_attributes=attributes(bit))).claims
    assert claims.properties["confirmed_by"] == "dcap-qvl"
    assert all_met(judge_tdx(claims, TdxPolicy()))


def test_a_domain_under_a_paravisor_is_a_matter_of_policy(world: World, inspect: Inspect) -> None:
    """As Azure's: genuine, but not for Linux by itself."""
    claims = inspect(world.tdx(4, td_attributes=bytes(8))).claims
    assert claims.properties["td_attributes"] == []
    assert "confirmed_by" not in claims.properties
    assert [c.name for c in failed(judge_tdx(claims, TdxPolicy()))] == [
        "tdx required TD attributes"
    ]
    assert all_met(judge_tdx(claims, TdxPolicy.from_fields({"required_td_attributes": []})))


def test_a_domain_that_dcap_qvl_does_not_judge_is_judged_no_less(
    world: World, inspect: Inspect
) -> None:
    world.signed_by = world.pki.pck_key
    with pytest.raises(EvidenceError, match="the quote is not genuine"):
        inspect(world.tdx(4, td_attributes=bytes(8)))
    world.signed_by = None
    world.qe_auth_data = b"z" * 16  # dcap-qvl looks at this first
    with pytest.raises(EvidenceError, match="refused by dcap-qvl"):
        inspect(world.tdx(4, td_attributes=bytes(8)))


def test_a_bound_service_domain_is_a_measurement(world: World, inspect: Inspect) -> None:
    claims = inspect(world.tdx(5, "1.5", mr_service_td=b"\x09" * 48)).claims
    assert claims.measurements["mrservicetd"] == "hex:" + "09" * 48


def test_evidence_of_an_enclave_is_refused(world: World, inspect: Inspect) -> None:
    with pytest.raises(EvidenceError, match="the quote is of another kind of enclave"):
        inspect(world.sgx())


def test_test_roots_are_not_trusted_by_default(world: World, now: Any) -> None:
    with pytest.raises(EvidenceError, match="does not end in a root that is trusted"):
        TdxVerifier().inspect(Evidence(kind="tdx", body=world.tdx()), now)


# Events.

KERNEL = b"kernel image"
EVENTS = (
    Event.measuring(1, EventType.EV_EFI_HANDOFF_TABLES2, b"tables", ("sha384",), b"acpi"),
    Event.measuring(1, EventType.EV_SEPARATOR, bytes(4), ("sha384",)),
    Event.measuring(2, EventType.EV_EFI_BOOT_SERVICES_APPLICATION, b"path", ("sha384",), KERNEL),
    Event.measuring(2, EventType.EV_EFI_ACTION, b"Exit Boot Services Invocation", ("sha384",)),
    Event.measuring(3, EventType.EV_IPL, b"kernel_cmdline: quiet", ("sha384",), b"quiet"),
    Event.measuring(1, EventType.EV_NO_ACTION, b"a remark", ("sha384",)),
)


def log_of(*events: Event) -> EventLog:
    return EventLog(("sha384",), events, header_register=1)


def registers(log: EventLog) -> dict[str, bytes]:
    after = log.replay("sha384")
    return {f"rtmr{register - 1}": value for register, value in after.items()}


def with_log(world: World, log: EventLog, raw: bytes | None = None) -> dict[str, Any]:
    values = {f"rtmr{i}": bytes(48) for i in range(4)} | registers(log)
    fields: dict[str, Any] = world.tdx(5, "1.5", **values)
    return {**fields, "event_log": b64(log.to_bytes() if raw is None else raw)}


def digest(event: Event) -> str:
    return "sha384:" + event.digests["sha384"].hex()


def test_a_log_that_replays_tells_its_events(world: World, inspect: Inspect) -> None:
    shown = inspect(with_log(world, log_of(*EVENTS))).claims.properties
    assert [(e["register"], e["type"], e["digest"]) for e in shown["events"]] == [
        (e.register - 1, e.type_name, digest(e)) for e in EVENTS if e.extends
    ]
    says = {e["type"]: e.get("says") for e in shown["events"]}
    assert "says" not in shown["events"][0]
    assert "says" not in shown["events"][2]
    assert says["EV_EFI_ACTION"] == "Exit Boot Services Invocation"
    assert says["EV_IPL"] == "quiet"
    assert says["EV_SEPARATOR"] == "00000000"
    assert "secure_boot" not in shown


def test_padding_of_the_table_does_not_matter(world: World, inspect: Inspect) -> None:
    log = log_of(*EVENTS)
    plain = inspect(with_log(world, log)).claims
    for fill in (b"\xff", b"\0"):
        padded = with_log(world, log, log.to_bytes() + fill * 500)
        assert inspect(padded).claims == plain


@pytest.mark.parametrize(
    ("change", "register"),
    [
        (lambda e: e[1:], 0),
        (lambda e: e[:-2], 2),
        (lambda e: (e[1], e[0], *e[2:]), 0),
        (lambda e: (*e, e[2]), 1),
        (lambda e: (*e, Event.measuring(4, EventType.EV_IPL, b"more", ("sha384",))), 3),
        (lambda e: (), 0),
        (lambda e: (*e[:2], e[3], *e[3:]), 1),
    ],
)
def test_a_log_that_does_not_replay_is_refused(
    world: World, inspect: Inspect, change: Callable[[Any], Any], register: int
) -> None:
    fields = with_log(world, log_of(*EVENTS))
    fields["event_log"] = b64(log_of(*change(EVENTS)).to_bytes())
    with pytest.raises(EvidenceError, match=f"RTMR {register} differs"):
        inspect(fields)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "ends inside"),
        (b"\xff" * 64, "crypto-agile|odd|ends inside"),
        (log_of(*EVENTS).to_bytes()[:-3], "ends inside"),
        (log_of(*EVENTS).to_bytes() + b"\x01" * 9, "ends inside|register|odd"),
        (EventLog(("sha256",), ()).to_bytes(), "no such bank"),
        (
            log_of(Event.measuring(0, EventType.EV_IPL, b"x", ("sha384",))).to_bytes(),
            "no event may extend",
        ),
        (
            log_of(Event.measuring(5, EventType.EV_IPL, b"x", ("sha384",))).to_bytes(),
            "no event may extend",
        ),
    ],
)
def test_what_is_not_exactly_a_log_is_refused(
    world: World, inspect: Inspect, raw: bytes, reason: str
) -> None:
    with pytest.raises(EvidenceError, match=reason):
        inspect(with_log(world, log_of(*EVENTS), raw))


def test_a_separator_that_reports_an_error_is_refused(world: World, inspect: Inspect) -> None:
    bad = Event.measuring(1, EventType.EV_SEPARATOR, b"\x01\0\0\0", ("sha384",))
    with pytest.raises(EvidenceError, match="reports an error of the firmware"):
        inspect(with_log(world, log_of(bad)))


def test_every_byte_of_a_log_is_proven_or_without_effect(world: World, inspect: Inspect) -> None:
    """Labels and remarks are not proven by any register; they never change what is proven."""
    log = log_of(*EVENTS)
    fields = with_log(world, log)
    raw = log.to_bytes()
    true = inspect(fields).claims

    def proven(claims: Claims) -> Any:
        events = claims.properties["events"]
        return claims.measurements, [(e["register"], e["digest"]) for e in events]

    accepted = 0
    from cenacle.attestation.cc_event_log import events_of  # noqa: PLC0415

    rtmrs = tuple(registers(log).get(f"rtmr{i}", bytes(48)) for i in range(4))
    for place in range(len(raw)):
        altered = raw[:place] + bytes([raw[place] ^ 0x01]) + raw[place + 1 :]
        try:
            shown = events_of(altered, rtmrs)  # type: ignore[arg-type]
        except EvidenceError:
            continue
        accepted += 1
        properties = {**true.properties, **shown}
        assert proven(true.model_copy(update={"properties": properties})) == proven(true)
        said = {e.get("says") for e in true.properties["events"]} | {None}
        assert {e.get("says") for e in shown["events"]} <= said
    assert accepted < 0.3 * len(raw)


def _secure_boot(state: int, register: int = 1) -> Event:
    vendor = bytes.fromhex("61dfe48bca93d211aa0d00e098032b8c")
    name = "SecureBoot".encode("utf-16-le")
    data = vendor + struct.pack("<QQ", 10, 1) + name + bytes([state])
    return Event.measuring(register, EventType.EV_EFI_VARIABLE_DRIVER_CONFIG, data, ("sha384",))


def _separator(register: int = 1) -> Event:
    return Event.measuring(register, EventType.EV_SEPARATOR, bytes(4), ("sha384",))


def _relabelled(event: Event) -> Event:
    return replace(event, type=EventType.EV_PLATFORM_CONFIG_FLAGS, data=b"nothing to see")


@pytest.mark.parametrize(
    ("events", "state"),
    [
        pytest.param([_secure_boot(1), _separator()], True, id="on"),
        pytest.param([_secure_boot(0), _separator()], False, id="off"),
        pytest.param([_separator()], None, id="not-measured"),
        pytest.param([_secure_boot(0), _secure_boot(1), _separator()], None, id="both"),
        # A system without Secure Boot runs, extends what it likes, and hides what was measured.
        pytest.param(
            [_relabelled(_secure_boot(0)), _separator(), _secure_boot(1)], None, id="late"
        ),
        pytest.param(
            [_relabelled(_secure_boot(0)), _separator(), _secure_boot(1, 4)], None, id="elsewhere"
        ),
        pytest.param(
            [_secure_boot(0), replace(_separator(), type=EventType.EV_IPL), _secure_boot(1)],
            False,
            id="hidden-separator",
        ),
    ],
)
def test_secure_boot_is_what_the_firmware_measured(
    world: World, inspect: Inspect, events: list[Event], state: bool | None
) -> None:
    claims = inspect(with_log(world, log_of(*events))).claims
    assert claims.properties.get("secure_boot") is state
    clauses = judge_tdx(claims, TdxPolicy.from_fields({"secure_boot": True}))
    assert all_met(clauses) is (state is True)


def rules(*events: Event, **more: Any) -> dict[str, Any]:
    allowed: dict[str, list[str]] = {}
    for event in events:
        if event.extends:
            allowed.setdefault(event.type_name, []).append(digest(event))
    return {"registers": [0, 1, 2], "allowed": allowed, **more}


def test_registers_may_be_judged_by_their_events(world: World, inspect: Inspect) -> None:
    claims = inspect(with_log(world, log_of(*EVENTS))).claims
    policy = TdxPolicy.from_fields({"events": rules(*EVENTS, required=[digest(EVENTS[2])])})
    assert all_met(judge_tdx(claims, policy))
    seen = tdx_identity(claims, policy)
    reference = {
        "mrtd": (claims.measurements["mrtd"],),
        "rtmr3": (claims.measurements["rtmr3"],),
    }
    assert all_met(compare(seen, reference))
    assert not all_met(compare(claims, reference))
    assert seen.properties["rtmr0"] == claims.measurements["rtmr0"]


@pytest.mark.parametrize("left_out", [0, 2, 4])
def test_an_event_that_is_not_allowed_is_named(
    world: World, inspect: Inspect, left_out: int
) -> None:
    claims = inspect(with_log(world, log_of(*EVENTS))).claims
    allowed = [event for event in EVENTS if event is not EVENTS[left_out]]
    policy = TdxPolicy.from_fields({"events": rules(*allowed)})
    (clause,) = failed(judge_tdx(claims, policy))
    assert clause.name == "tdx events"
    assert EVENTS[left_out].type_name in clause.found
    assert digest(EVENTS[left_out])[7:19] in clause.found


def test_an_allowed_digest_counts_for_its_type_only(world: World, inspect: Inspect) -> None:
    claims = inspect(with_log(world, log_of(*EVENTS))).claims
    fields = rules(*EVENTS)
    fields["allowed"]["EV_ACTION"] = fields["allowed"].pop("EV_EFI_ACTION")
    (clause,) = failed(judge_tdx(claims, TdxPolicy.from_fields({"events": fields})))
    assert "EV_EFI_ACTION" in clause.found


def test_a_required_event_that_is_missing_is_named(world: World, inspect: Inspect) -> None:
    claims = inspect(with_log(world, log_of(EVENTS[0], EVENTS[1]))).claims
    policy = TdxPolicy.from_fields({"events": rules(*EVENTS, required=[digest(EVENTS[2])])})
    (clause,) = failed(judge_tdx(claims, policy))
    assert clause.name == "tdx required events"
    assert digest(EVENTS[2])[7:19] in clause.found


def test_rules_for_events_need_events(world: World, inspect: Inspect) -> None:
    policy = TdxPolicy.from_fields({"events": rules(*EVENTS)})
    without = inspect(world.tdx()).claims
    assert [clause.name for clause in failed(judge_tdx(without, policy))] == ["tdx events"]
    assert tdx_identity(without, policy) == without
    empty = inspect(with_log(world, log_of())).claims
    assert "tdx events" in [clause.name for clause in failed(judge_tdx(empty, policy))]


@pytest.mark.parametrize(
    ("policy", "properties", "clause"),
    [
        ({}, {"tcb_status": "TDRelaunchAdvised"}, "tdx TCB status"),
        ({}, {"td_attributes": ["SEPT_VE_DISABLE", "MIGRATABLE"]}, "tdx TD attributes"),
        ({}, {"td_attributes": ["PKS"]}, "tdx required TD attributes"),
        ({"xfam": ["0000000000000003"]}, {}, "tdx XFAM"),
        ({"mr_seam": ["00" * 48]}, {}, "tdx MRSEAM"),
        ({"secure_boot": True}, {}, "tdx Secure Boot"),
        ({"secure_boot": True}, {"secure_boot": False}, "tdx Secure Boot"),
    ],
)
def test_each_demand_has_a_clause_of_its_own(
    world: World, inspect: Inspect, policy: dict[str, Any], properties: dict[str, Any], clause: str
) -> None:
    claims = inspect(world.tdx()).claims
    assert all_met(judge_tdx(claims, TdxPolicy()))
    altered = claims.model_copy(update={"properties": {**claims.properties, **properties}})
    clauses = failed(judge_tdx(altered, TdxPolicy.from_fields(policy)))
    assert [c.name for c in clauses] == [clause]


@pytest.mark.parametrize(
    "fields",
    [
        {"events": {}},
        {"events": {"registers": [], "allowed": {"EV_IPL": ["sha384:" + "0" * 96]}}},
        {"events": {"registers": [4], "allowed": {"EV_IPL": ["sha384:" + "0" * 96]}}},
        {"events": {"registers": [0], "allowed": {}}},
        {"events": {"registers": [0], "allowed": {"EV_IPL": []}}},
        {"events": {"registers": [0], "allowed": {"EV_IPL": ["sha256:" + "0" * 64]}}},
        {
            "events": {
                "registers": [0],
                "allowed": {"EV_IPL": ["sha384:" + "0" * 96]},
                "required": ["sha384:" + "1" * 96],
            }
        },
        {"mr_seam": []},
        {"debug": True},
    ],
)
def test_a_policy_that_means_nothing_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(DocumentError):
        TdxPolicy.from_fields(fields)


def test_a_domain_attests_through_the_kernel(
    world: World, tdx_guest: Callable[..., Any], now: Any, tmp_path: Path
) -> None:
    log = log_of(*EVENTS)
    ccel = tmp_path / "CCEL"
    ccel.write_bytes(log.to_bytes() + b"\xff" * 4096)
    attester, _ = tdx_guest(world, registers(log), ccel)
    evidence = attester.attest(NONCE, {"program": "sha256:" + "ab" * 32}, (), now)
    assert evidence.body["event_log"] == b64(log.to_bytes())
    claims = TdxVerifier([world.root]).authenticate(evidence, NONCE, now)
    assert claims.measurements["program"] == "sha256:" + "ab" * 32
    assert len(claims.properties["events"]) == 5
    with pytest.raises(EvidenceError, match="bound to another nonce"):
        TdxVerifier([world.root]).authenticate(evidence, bytes(64), now)
