"""What a contract demands of SNP evidence, one clause each; the defaults refuse what weakens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from cenacle.attestation.az_snp_vtpm import AzSnpVtpmVerifier
from cenacle.attestation.claims import Claims
from cenacle.attestation.snp import SnpVerifier
from cenacle.attestation.snp_policy import (
    AzSnpVtpmPolicy,
    SnpPolicy,
    judge_az_snp_vtpm,
    judge_snp,
)
from cenacle.documents.clauses import all_met, failed
from cenacle.errors import DocumentError

FLOORS = {
    "Milan": {"bootloader": 4, "tee": 1, "snp": 24, "microcode": 219},
    "Genoa": {"bootloader": 10, "tee": 2, "snp": 23, "microcode": 84},
    "Turin": {"fmc": 3, "bootloader": 5, "tee": 2, "snp": 9, "microcode": 71},
}
CHIP = bytes(range(1, 65)).hex()
KEY, AUTHOR = "sha384:" + "6b" * 48, "sha384:" + "61" * 48
VM_ID = "26F8BC30-774E-4290-8E7A-535F3B672AEE"
BASE = 1 << 17 | 0x0137


@pytest.fixture
def judged(amd: Any, verifier: SnpVerifier) -> Callable[..., dict[str, str]]:
    """Clauses that failed, by name, with what was found and demanded."""

    def judge(guest: Any, **policy: Any) -> dict[str, str]:
        claims = verifier.inspect(guest.evidence(), amd.NOW).claims
        fields = {"minimum_tcb": FLOORS, **policy}
        clauses = judge_snp(claims, SnpPolicy.from_fields(fields))
        assert clauses
        assert all(clause.remedy for clause in failed(clauses))
        return {c.name: f"{c.found}; {c.demanded}" for c in failed(clauses)}

    return judge


@pytest.mark.parametrize("product", list(FLOORS))
@pytest.mark.parametrize("version", [2, 3, 5])
def test_a_hardened_guest_meets_the_defaults(
    amd: Any, judged: Callable[..., dict[str, str]], product: str, version: int
) -> None:
    assert judged(amd.Guest(product=product, version=version)) == {}


def test_a_policy_without_a_floor_accepts_no_machine(
    amd: Any, judged: Callable[..., dict[str, str]]
) -> None:
    assert judged(amd.Guest(), minimum_tcb={}) == {
        "minimum TCB": "Milan; a floor for each accepted line"
    }
    genoa = {"Genoa": FLOORS["Genoa"]}
    assert judged(amd.Guest(), minimum_tcb=genoa) == {"minimum TCB": "Milan; a floor for Genoa"}


@pytest.mark.parametrize(
    ("product", "part"), [(product, part) for product, floor in FLOORS.items() for part in floor]
)
def test_every_part_of_the_floor_counts(
    amd: Any, judged: Callable[..., dict[str, str]], product: str, part: str
) -> None:
    floor = {**FLOORS[product], part: FLOORS[product][part] + 1}
    below = judged(amd.Guest(product=product), minimum_tcb={product: floor})
    assert set(below) == {"reported TCB", "committed TCB", "current TCB", "launch TCB"}
    assert f"at least {', '.join(f'{n} {v}' for n, v in floor.items())}" in below["launch TCB"]


@pytest.mark.parametrize(
    ("at", "name"), [(0x38, "current TCB"), (0x1E0, "committed TCB"), (0x1F0, "launch TCB")]
)
def test_every_tcb_of_the_report_counts(
    amd: Any, judged: Callable[..., dict[str, str]], at: int, name: str
) -> None:
    old = bytes([3, 1, 0, 0, 0, 0, 24, 219])
    assert set(judged(amd.Guest(put={at: old}))) == {name}


@pytest.mark.parametrize(
    ("guest", "name", "allow"),
    [
        ({"policy": BASE | 1 << 16, "platform": 0b100001}, "SMT", {"allow_smt": True}),
        ({"policy": BASE | 1 << 18}, "migration agent", {"allow_migration_agent": True}),
        ({"policy": BASE | 1 << 21}, "CXL memory", {"allow_cxl": True}),
        ({"platform": 0b10100000}, "SEV-TIO", {"allow_tio": True}),
        ({"platform": 0}, "alias check", {"require_alias_check": False}),
        ({"vmpl": 1}, "VMPL", {"vmpls": [1]}),
        ({"signer": "VLEK"}, "VLEK", {"vlek_csp_ids": ["CN=cc-test.example.com"]}),
    ],
)
def test_what_weakens_a_guest_is_refused_unless_allowed(
    amd: Any,
    judged: Callable[..., dict[str, str]],
    guest: dict[str, Any],
    name: str,
    allow: dict[str, Any],
) -> None:
    assert set(judged(amd.Guest(**guest))) == {name}
    assert judged(amd.Guest(**guest), **allow) == {}


def test_smt_that_is_off_may_be_allowed_to_the_guest_unless_it_moves(
    amd: Any, judged: Callable[..., dict[str, str]]
) -> None:
    assert judged(amd.Guest(policy=BASE | 1 << 16)) == {}
    moving = amd.Guest(policy=BASE | 1 << 16 | 1 << 18)
    assert set(judged(moving, allow_migration_agent=True)) == {"SMT"}


@pytest.mark.parametrize(
    ("demand", "name", "has"),
    [
        ("require_single_socket", "single socket", [{"policy": BASE | 1 << 20}]),
        ("require_aes_256_xts", "AES-256-XTS", [{"policy": BASE | 1 << 22}]),
        (
            "require_rapl_disabled",
            "RAPL disabled",
            [{"policy": BASE | 1 << 23}, {"platform": 0b101000}],
        ),
        (
            "require_ciphertext_hiding",
            "ciphertext hiding",
            [{"policy": BASE | 1 << 24}, {"platform": 0b110000}],
        ),
        ("require_page_swap_disabled", "page swaps disabled", [{"policy": BASE | 1 << 25}]),
        ("require_ecc", "ECC memory", [{"platform": 0b100100}]),
    ],
)
def test_what_only_some_machines_have_is_demanded_on_request(
    amd: Any, judged: Callable[..., dict[str, str]], demand: str, name: str, has: list[Any]
) -> None:
    assert judged(amd.Guest(), **{demand: True}) == {name: "no; yes"}
    for guest in has:
        assert judged(amd.Guest(**guest), **{demand: True}) == {}


@pytest.mark.parametrize(
    ("demand", "name", "platform"),
    [
        ("require_rapl_disabled", "RAPL disabled", 0b101000),
        ("require_ciphertext_hiding", "ciphertext hiding", 0b110000),
    ],
)
def test_what_the_machine_has_on_does_not_move_with_the_guest(
    amd: Any, judged: Callable[..., dict[str, str]], demand: str, name: str, platform: int
) -> None:
    guest = amd.Guest(policy=BASE | 1 << 18, platform=platform)
    assert set(judged(guest, allow_migration_agent=True, **{demand: True})) == {name}


@pytest.mark.parametrize(
    ("guest", "policy", "name"),
    [
        ({}, {"chip_ids": []}, "chip"),
        ({}, {"chip_ids": ["ab" * 64]}, "chip"),
        (
            {"signer": "VLEK"},
            {"chip_ids": [CHIP], "vlek_csp_ids": ["CN=cc-test.example.com"]},
            "chip",
        ),
        ({"signer": "VLEK"}, {"vlek_csp_ids": ["CN=cc-other.example.com"]}, "VLEK"),
        ({}, {"vmpls": []}, "VMPL"),
        ({}, {"id_key_digests": [KEY]}, "ID key"),
        ({"put": {0xE0: b"x" * 48}}, {"id_key_digests": [KEY]}, "ID key"),
        ({"put": {0xE0: b"k" * 48}}, {"id_key_digests": []}, "ID key"),
        ({}, {"author_key_digests": [AUTHOR]}, "author key"),
        ({"put": {0x110: b"a" * 48}}, {"author_key_digests": [AUTHOR]}, "author key"),
        (
            {"put": {0xE0: b"k" * 48}},
            {"id_key_digests": [KEY], "family_id": "66" * 16},
            "family ID",
        ),
        (
            {"put": {0xE0: b"k" * 48}},
            {"id_key_digests": [KEY], "image_id": "69" * 16},
            "image ID",
        ),
        (
            {"put": {0xE0: b"k" * 48}, "guest_svn": 4},
            {"id_key_digests": [KEY], "minimum_guest_svn": 5},
            "guest SVN",
        ),
        ({}, {"required_mitigations": 1}, "mitigations"),
        ({"version": 5}, {"required_mitigations": 1}, "mitigations"),
        (
            {"version": 5, "put": {0x1F8: b"\x01", 0x200: b"\x03"}},
            {"required_mitigations": 2},
            "mitigations",
        ),
        ({}, {"require_crl": True}, "revocation list"),
    ],
    ids=range(17),
)
def test_demands_that_are_not_met(
    amd: Any,
    judged: Callable[..., dict[str, str]],
    guest: dict[str, Any],
    policy: dict[str, Any],
    name: str,
) -> None:
    assert set(judged(amd.Guest(**guest), **policy)) == {name}


def test_demands_that_are_met(amd: Any, judged: Callable[..., dict[str, str]]) -> None:
    guest = amd.Guest(
        version=5,
        guest_svn=5,
        key_info=1,
        crl=amd.revocation_list("Milan"),
        put={
            0x10: b"f" * 16,
            0x20: b"i" * 16,
            0xE0: b"k" * 48,
            0x110: b"a" * 48,
            0x1F8: b"\x03",
            0x200: b"\x07",
        },
    )
    policy = {
        "chip_ids": ["ab" * 64, CHIP],
        "id_key_digests": [KEY],
        "author_key_digests": [AUTHOR],
        "family_id": "66" * 16,
        "image_id": "69" * 16,
        "minimum_guest_svn": 5,
        "required_mitigations": 3,
        "require_crl": True,
    }
    assert judged(guest, **policy) == {}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"minimum_tcb": {"Milan": {**FLOORS["Milan"], "fmc": 1}}}, "fmc is of Turin"),
        ({"minimum_tcb": {"Turin": FLOORS["Milan"]}}, "fmc is of Turin"),
        ({"minimum_tcb": {"Rome": FLOORS["Milan"]}}, "minimum_tcb"),
        ({"minimum_tcb": {"Milan": {"snp": 24}}}, "missing"),
        ({"minimum_tcb": {"Milan": {**FLOORS["Milan"], "tee": 256}}}, "tee"),
        ({"minimum_tcb": {"Milan": {**FLOORS["Milan"], "tee": -1}}}, "tee"),
        ({"minimum_guest_svn": 1}, "anybody can sign an identity block"),
        ({"family_id": "66" * 16}, "anybody can sign an identity block"),
        ({"image_id": "66" * 16}, "anybody can sign an identity block"),
        ({"vmpls": [4]}, "vmpls"),
        ({"chip_ids": ["AB" * 64]}, "chip_ids"),
        ({"chip_ids": ["ab" * 32]}, "chip_ids"),
        ({"id_key_digests": ["6b" * 48]}, "id_key_digests"),
        ({"allow_smt": "yes"}, "allow_smt"),
        ({"allow_debug": True}, "unknown field"),
        ({"require_debug": False}, "unknown field"),
    ],
    ids=range(16),
)
def test_a_policy_that_cannot_be_meant_is_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(DocumentError, match=reason):
        SnpPolicy.from_fields(fields)


def test_claims_of_another_kind_fail(amd: Any) -> None:
    claims = Claims(
        kind="snp", protection="tee", measurements={}, layers=(), issued=amd.NOW, properties={}
    )
    (clause,) = judge_snp(claims, SnpPolicy())
    assert (clause.name, clause.verdict) == ("snp properties", "failed")
    assert not all_met(judge_az_snp_vtpm(claims, AzSnpVtpmPolicy()))


# Azure


@pytest.fixture
def judged_vm(amd: Any) -> Callable[..., dict[str, str]]:
    def judge(configuration: dict[str, Any], **policy: Any) -> dict[str, str]:
        vm = amd.AzureVm()
        vm.runtime["vm-configuration"] = configuration
        claims = AzSnpVtpmVerifier(amd.roots()).inspect(vm.evidence(), amd.NOW).claims
        fields = {"minimum_tcb": FLOORS, **policy}
        clauses = judge_az_snp_vtpm(claims, AzSnpVtpmPolicy.from_fields(fields))
        return {c.name: f"{c.found}; {c.demanded}" for c in failed(clauses)}

    return judge


GOOD_VM = {"secure-boot": True, "console-enabled": False, "vmUniqueId": VM_ID}


@pytest.mark.parametrize(
    ("configuration", "policy", "found"),
    [
        ({}, {}, {}),
        ({}, {"vm_ids": [VM_ID]}, {}),
        ({}, {"vm_ids": []}, {"VM": f"{VM_ID}; none is accepted"}),
        ({}, {"minimum_tcb": {}}, {"minimum TCB": "Milan; a floor for each accepted line"}),
        ({"secure-boot": False}, {}, {"secure boot": "False; on"}),
        ({"secure-boot": None}, {}, {"secure boot": "not stated; on"}),
        ({"secure-boot": "true"}, {}, {"secure boot": "true; on"}),
        ({"secure-boot": 1}, {}, {"secure boot": "1; on"}),
        ({"secure-boot": False}, {"require_secure_boot": False}, {}),
        ({"console-enabled": True}, {}, {"console": "True; disconnected"}),
        ({"console-enabled": None}, {}, {"console": "not stated; disconnected"}),
        ({"console-enabled": 0}, {}, {"console": "0; disconnected"}),
        ({"console-enabled": True}, {"allow_console": True}, {}),
        ({"vmUniqueId": None}, {"vm_ids": [VM_ID]}, {"VM": f"not stated; {VM_ID}"}),
    ],
    ids=range(14),
)
def test_what_the_paravisor_says_is_judged(
    judged_vm: Callable[..., dict[str, str]],
    configuration: dict[str, Any],
    policy: dict[str, Any],
    found: dict[str, str],
) -> None:
    assert judged_vm({**GOOD_VM, **configuration}, **policy) == found
