from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cenacle.attestation.claims import Claims, Evidence
from cenacle.attestation.event_log import Event, EventType
from cenacle.attestation.ima import (
    ALLOW_LIST,
    ImaAttester,
    ImaMonitor,
    ImaPolicy,
    ImaVerifier,
    judge_ima,
    pack_list,
    unpack_list,
)
from cenacle.attestation.ima_allow import AllowList
from cenacle.attestation.ima_list import ImaEntry, pack_entry
from cenacle.attestation.tpm_device import TpmDevice
from cenacle.documents.base import b64
from cenacle.documents.clauses import failed
from cenacle.errors import DocumentError, EvidenceError, UnavailableError
from tests.support.swtpm import LocalIssuer, Manufacturer, require_swtpm, run_swtpm

Machine = Any


def judged(machine: Machine, report: bytes, now: datetime, **changed: Any) -> Claims:
    claims = machine.verifier().authenticate(machine.evidence(**changed), report, now)
    assert isinstance(claims, Claims)
    return claims


def test_genuine_evidence(machine: Machine, report: bytes, now: datetime) -> None:
    claims = judged(machine, report, now)
    registers = machine.registers()
    assert claims.measurements == {
        **{f"pcr{n}": f"sha256:{registers[n].hex()}" for n in range(10)},
        "ek": claims.measurements["ek"],
        ALLOW_LIST: machine.allow_list.digest,
    }
    assert claims.properties["ima_entries"] == 3
    assert claims.properties["ima_violations"] == claims.properties["ima_replaced"] == []
    assert claims.properties["boot"]["events"] == len(machine.events)
    assert claims.kind == "ima"


def test_a_software_tpm_is_simulated(machine: Machine, report: bytes, now: datetime) -> None:
    genuine = machine.verifier()
    assert genuine.protection == genuine.authenticate(machine.evidence(), report, now).protection
    assert genuine.protection == "measured"
    software = ImaVerifier(
        genuine.issuers, (), [machine.root], allow_lists=genuine.allow_lists.values()
    )
    assert software.protection == "simulated"
    assert software.authenticate(machine.evidence(), report, now).protection == "simulated"
    assert ImaMonitor(software).follow(machine.evidence(), report, now).protection == "simulated"


def test_entries_after_the_quote_are_not_vouched_for(
    machine: Machine, report: bytes, now: datetime, make_entry: Callable[..., ImaEntry]
) -> None:
    later = [*machine.entries, make_entry("/tmp/evil", b"evil")]
    claims = judged(machine, report, now, entries=later)
    assert claims.properties["ima_entries"] == 3


def test_one_unlisted_program_is_named(machine: Machine, report: bytes, now: datetime) -> None:
    machine.run("/tmp/evil", b"evil")
    with pytest.raises(EvidenceError, match="/tmp/evil, unknown"):
        judged(machine, report, now)


def test_one_changed_file_is_named(machine: Machine, report: bytes, now: datetime) -> None:
    machine.run("/usr/bin/agent", b"another agent")
    with pytest.raises(EvidenceError, match="/usr/bin/agent with other content"):
        judged(machine, report, now)


def test_nothing_that_ran_can_be_left_out(machine: Machine, report: bytes, now: datetime) -> None:
    machine.run("/tmp/evil", b"evil")
    machine.run("/usr/bin/agent", b"agent")
    innocent = [entry for entry in machine.entries if b"evil" not in entry.name]
    for entries in (innocent, innocent[:3], machine.entries[:3], []):
        with pytest.raises(EvidenceError, match="does not replay"):
            judged(machine, report, now, entries=entries)


def test_a_kernel_that_does_not_measure_is_refused(
    make_machine: Callable[..., Machine], report: bytes, now: datetime
) -> None:
    machine = make_machine()
    machine.entries = machine.entries[:1]
    with pytest.raises(EvidenceError, match="lacks files"):
        judged(machine, report, now)
    machine.entries = []
    with pytest.raises(EvidenceError, match="boot aggregate"):
        judged(machine, report, now)


def test_the_list_is_of_this_boot(
    make_machine: Callable[..., Machine],
    make_entry: Callable[..., ImaEntry],
    report: bytes,
    now: datetime,
) -> None:
    """A boot aggregate over other registers: the list began under another firmware or kernel."""
    machine = make_machine()
    machine.entries[0] = make_entry("boot_aggregate", digest=bytes(32))
    with pytest.raises(EvidenceError, match="boot_aggregate of other registers"):
        judged(machine, report, now)


def test_a_laxer_list_is_another_measurement(
    machine: Machine, report: bytes, now: datetime
) -> None:
    machine.run("/tmp/evil", b"evil")
    lax = AllowList.merged(machine.allow_list, AllowList({"/tmp/evil": [b"\0" * 32]}))
    lax = lax.merged(AllowList({"/tmp/evil": [machine.entries[-1].digest]}))
    verifier = machine.verifier(machine.allow_list, lax)
    evidence = machine.evidence(fields={ALLOW_LIST: lax.digest})
    claims = verifier.authenticate(evidence, report, now)
    assert claims.measurements[ALLOW_LIST] == lax.digest
    reference = {name: (value,) for name, value in claims.measurements.items()}
    assert verifier.verify(evidence, reference, report, now)
    reference[ALLOW_LIST] = (machine.allow_list.digest,)
    with pytest.raises(EvidenceError, match="allow-list"):
        verifier.verify(evidence, reference, report, now)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"unknown": 1}, "unknown fields"),
        ({ALLOW_LIST: "sha256:" + "0" * 64}, "allow-list that the verifier does not have"),
        ({ALLOW_LIST: None}, "allow-list that the verifier does not have"),
        ({ALLOW_LIST: ["x"]}, "allow-list that the verifier does not have"),
        ({"list": None}, "does not unpack"),
        ({"list": "not base64!"}, "does not unpack"),
        ({"list": b64(b"not zlib")}, "does not unpack"),
        ({"list": b64(zlib.compress(b"x")[:-1])}, "too large or cut off"),
        ({"list": b64(zlib.compress(b"x") + b"y")}, "too large or cut off"),
        ({"list": b64(zlib.compress(b"\xff" * 99))}, "does not begin with a register"),
        ({"log": "not base64!"}, "does not decode"),
        ({"log": 7}, "does not decode"),
        ({"log": b64(b"no log")}, "ends inside the header"),
        ({"quote": None}, "malformed"),
        ({"quote": {}}, "malformed"),
        ({"first": 1}, "continues at another entry"),
        ({"first": None}, "continues at another entry"),
        ({"first": -1}, "continues at another entry"),
    ],
)
def test_bodies_that_are_none(
    machine: Machine, report: bytes, now: datetime, changed: dict[str, Any], reason: str
) -> None:
    with pytest.raises(EvidenceError, match=reason):
        judged(machine, report, now, fields=changed)


def test_a_list_that_unpacks_without_end() -> None:
    bomb = b64(zlib.compress(bytes(33 * 1024 * 1024), 1))
    with pytest.raises(EvidenceError, match="too large"):
        unpack_list(bomb)


@pytest.mark.parametrize("missing", range(11))
def test_every_register_of_the_boot_must_be_quoted(
    machine: Machine, report: bytes, now: datetime, missing: int
) -> None:
    machine.quoted = tuple(n for n in range(11) if n != missing)
    with pytest.raises(EvidenceError, match=f"lacks registers; found without {missing};"):
        judged(machine, report, now)


def test_the_boot_log_must_be_of_the_quoted_registers(
    machine: Machine, report: bytes, now: datetime
) -> None:
    evidence = machine.evidence()
    machine.events = machine.events[1:]
    log = machine.evidence().body["log"]
    with pytest.raises(EvidenceError, match="does not replay to the quoted register 4"):
        machine.verifier().authenticate(
            Evidence(kind="ima", body={**evidence.body, "log": log}), report, now
        )
    without = {name: value for name, value in evidence.body.items() if name != "log"}
    claims = machine.verifier().authenticate(Evidence(kind="ima", body=without), report, now)
    assert "boot" not in claims.properties


def test_other_report_data_time_and_machine(
    machine: Machine, make_machine: Callable[..., Machine], report: bytes, now: datetime
) -> None:
    verifier, evidence = machine.verifier(), machine.evidence()
    with pytest.raises(EvidenceError, match="bound to another nonce"):
        verifier.authenticate(evidence, bytes(64), now)
    with pytest.raises(EvidenceError, match="not valid now"):
        verifier.authenticate(evidence, report, now + timedelta(days=30))
    with pytest.raises(EvidenceError, match="root that is not trusted"):
        make_machine(seed=2).verifier().authenticate(evidence, report, now)
    with pytest.raises(EvidenceError, match="another kind"):
        verifier.authenticate(Evidence(kind="tpm", body=evidence.body), report, now)


def test_every_byte_of_the_list_counts(machine: Machine, report: bytes, now: datetime) -> None:
    verifier, evidence = machine.verifier(), machine.evidence()
    raw = b"".join(map(pack_entry, machine.entries))
    for place in range(0, len(raw), 5):
        altered = bytearray(raw)
        altered[place] ^= 0x01
        body = {**evidence.body, "list": b64(zlib.compress(bytes(altered)))}
        with pytest.raises(EvidenceError):
            verifier.authenticate(Evidence(kind="ima", body=body), report, now)


def clauses_of(claims: Claims, **policy: Any) -> list[str]:
    fields = {"roots": (claims.properties["ek_root"],), **policy}
    return [clause.name for clause in failed(judge_ima(claims, ImaPolicy(**fields)))]


def test_the_policy(
    machine: Machine, report: bytes, now: datetime, make_entry: Callable[..., ImaEntry]
) -> None:
    claims = judged(machine, report, now)
    assert clauses_of(claims) == []
    assert clauses_of(claims, roots=()) == ["TPM root"]
    machine.entries.append(make_entry("/var/log/x", violation=True))
    violated = judged(machine, report, now)
    assert clauses_of(violated) == ["IMA violations"]
    assert clauses_of(violated, violations=True) == []
    replaced = claims.model_copy(
        update={"properties": {**claims.properties, "ima_replaced": ["/usr/bin/agent"]}}
    )
    assert clauses_of(replaced) == ["IMA replaced files"]
    assert clauses_of(replaced, replaced=True) == []


def test_a_policy_reads_only_what_the_evidence_shows(
    machine: Machine, report: bytes, now: datetime
) -> None:
    claims = judged(machine, report, now)
    bare = {n: v for n, v in claims.properties.items() if not n.startswith("ima_")}
    empty = claims.model_copy(update={"properties": bare})
    names = ["IMA violations", "IMA replaced files"]
    assert clauses_of(empty, violations=True, replaced=True) == names
    with pytest.raises(DocumentError, match="unknown field"):
        ImaPolicy.from_fields({"violation": True})


@pytest.mark.parametrize("value", [b"\x01", b"\0"], ids=["on", "off"])
def test_secure_boot_is_judged_from_the_log(
    make_machine: Callable[..., Machine], report: bytes, now: datetime, value: bytes
) -> None:
    name = "SecureBoot"
    variable = bytes.fromhex("61dfe48bca93d211aa0d00e098032b8c") + len(name).to_bytes(8, "little")
    variable += b"\x01" + bytes(7) + name.encode("utf-16-le") + value
    kind = EventType.EV_EFI_VARIABLE_DRIVER_CONFIG
    first = Event.measuring(7, kind, variable, ("sha256",))
    machine = make_machine(events=(first, *make_machine().events))
    claims = judged(machine, report, now)
    state = value == b"\x01"
    assert clauses_of(claims, secure_boot=state) == []
    assert clauses_of(claims, secure_boot=not state) == ["Secure Boot"]
    unlogged = judged(machine, report, now, log=False)
    assert clauses_of(unlogged, secure_boot=False) == ["Secure Boot"]
    assert clauses_of(unlogged, secure_boot=True) == ["Secure Boot"]


def test_a_monitor_takes_only_what_is_new(machine: Machine, report: bytes, now: datetime) -> None:
    monitor = ImaMonitor(machine.verifier())
    assert monitor.follow(machine.evidence(), report, now).properties["ima_entries"] == 3
    machine.run("/sbin/init", b"init")
    evidence = machine.evidence(first=monitor.entries)
    assert len(unpack_list(evidence.body["list"])) == 1
    assert monitor.follow(evidence, report, now).properties["ima_entries"] == 4
    assert monitor.entries == 4
    assert monitor.follow(machine.evidence(first=4), report, now).properties["ima_entries"] == 4


def test_drift_names_the_file_and_leaves_the_position(
    machine: Machine, report: bytes, now: datetime
) -> None:
    monitor = ImaMonitor(machine.verifier())
    monitor.follow(machine.evidence(), report, now)
    machine.run("/tmp/evil", b"evil")
    for _ in range(2):
        with pytest.raises(EvidenceError, match="/tmp/evil, unknown"):
            monitor.follow(machine.evidence(first=3), report, now)
        assert monitor.entries == 3
    with pytest.raises(EvidenceError, match="does not replay"):
        monitor.follow(machine.evidence(entries=[], first=3), report, now)
    with pytest.raises(EvidenceError, match="continues at another entry"):
        monitor.follow(machine.evidence(), report, now)
    stale = {"quote": _quote_before(machine)}
    evidence = machine.evidence(entries=[], first=3, fields=stale)
    with pytest.raises(EvidenceError, match="bound to another nonce"):
        monitor.follow(evidence, report, now)
    assert monitor.entries == 3


def _quote_before(machine: Machine) -> dict[str, Any]:
    """A quote for other report data, of the register before the last entry."""
    last = machine.entries.pop()
    quote: dict[str, Any] = machine.quote(bytes(64))
    machine.entries.append(last)
    return quote


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [("resets", 8, "restarted.*reset_count 8"), ("restarts", 2, "restarted.*restart_count 2")],
)
def test_a_restart_is_drift(
    machine: Machine, report: bytes, now: datetime, name: str, value: int, told: str
) -> None:
    monitor = ImaMonitor(machine.verifier())
    monitor.follow(machine.evidence(), report, now)
    setattr(machine, name, value)
    with pytest.raises(EvidenceError, match=told):
        monitor.follow(machine.evidence(first=3), report, now)


def test_another_register_or_machine_is_drift(
    machine: Machine, make_machine: Callable[..., Machine], report: bytes, now: datetime
) -> None:
    monitor = ImaMonitor(machine.verifier())
    monitor.follow(machine.evidence(), report, now)
    machine.changed = {4: b"\x04" * 32}
    with pytest.raises(EvidenceError, match=r"changed since its last evidence \(pcr4\)"):
        monitor.follow(machine.evidence(first=3), report, now)
    machine.changed = {}
    machine.quoted = (*machine.quoted, 14)
    with pytest.raises(EvidenceError, match=r"changed since its last evidence \(pcr14\)"):
        monitor.follow(machine.evidence(first=3), report, now)
    other = make_machine(seed=2)
    both = ImaVerifier(
        machine.verifier().issuers, [machine.root, other.root], allow_lists=[machine.allow_list]
    )
    monitor = ImaMonitor(both)
    monitor.follow(machine.evidence(), report, now)
    with pytest.raises(EvidenceError, match="changed since its last evidence"):
        monitor.follow(other.evidence(first=3), report, now)


def test_what_is_packed_is_unpacked(machine: Machine) -> None:
    assert unpack_list(pack_list(machine.entries)) == machine.entries


@settings(max_examples=60)
@given(st.binary(max_size=60), st.booleans())
def test_hostile_lists_raise_evidence_errors_only(noise: bytes, packed: bool) -> None:
    with suppress(EvidenceError):
        unpack_list(b64(zlib.compress(noise) if packed else noise))


@pytest.mark.processes
def test_through_a_software_tpm(
    tmp_path_factory: pytest.TempPathFactory,
    machine: Machine,
    report: bytes,
    make_entry: Callable[..., ImaEntry],
) -> None:
    """The attester and a TPM as on hardware; the kernel's part is played by this test."""
    require_swtpm()
    now = datetime.now(machine.root.not_valid_before_utc.tzinfo).replace(microsecond=0)
    now += timedelta(hours=1)
    folder = tmp_path_factory.mktemp("ima")
    maker = Manufacturer(folder)
    state = maker.make("tpm")
    issuer = LocalIssuer(maker.root, now=now)
    measured = folder / "binary_runtime_measurements"
    machine = replace(machine, events=(), entries=[])
    listed = machine.allow_list
    with run_swtpm(maker, state) as tpm:

        def measure(entry: ImaEntry) -> None:
            with measured.open("ab") as file:
                file.write(pack_entry(entry))
            with TpmDevice(tpm.tcti) as device:
                device.extend(10, 0x000B, hashlib.sha256(entry.data).digest())

        def attest(first: int = 0) -> Evidence:
            return ImaAttester(
                tpm.tcti,
                allow_list=listed.digest,
                first=first,
                measurements=measured,
                log=None,
                issuer=issuer,
                authorities=tpm.authorities,
            ).attest(report, {}, (), now)

        for entry in machine.entries:
            measure(entry)
        verifier = ImaVerifier([issuer.key.verify_key], issuer.roots, allow_lists=[listed])
        monitor = ImaMonitor(verifier)
        claims = monitor.follow(attest(), report, now)
        assert claims.properties["ima_entries"] == 3
        measure(make_entry("/sbin/init", b"init"))
        evidence = attest(monitor.entries)
        assert evidence.body["first"] == 3
        assert monitor.follow(evidence, report, now).properties["ima_entries"] == 4
        measure(make_entry("/tmp/evil", b"evil"))
        with pytest.raises(EvidenceError, match="/tmp/evil, unknown"):
            monitor.follow(attest(monitor.entries), report, now)
        measured.unlink()
        with pytest.raises(UnavailableError, match="cannot be read"):
            attest()
