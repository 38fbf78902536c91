"""Chains to AMD's roots: whose certificate, for which chip and TCB, when, and revoked or not."""

from __future__ import annotations

import hashlib
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from asn1crypto import core, pem, x509
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from cenacle.attestation import amd_roots
from cenacle.attestation.amd_roots import AMD_ROOTS
from cenacle.attestation.snp_certificates import Certificate, RevocationList
from cenacle.attestation.snp_chain import certificate_table, endorse
from cenacle.errors import EvidenceError

PRODUCTS = ("Milan", "Genoa", "Turin")
VCEK_GUID = bytes.fromhex("63da758de6644564adc5f4b93be8accd")


def test_the_pinned_certificates_are_the_ones_that_the_comments_name() -> None:
    source = Path(amd_roots.__file__).read_text("utf-8")
    for product, roots in AMD_ROOTS.items():
        for name, der in (
            (f"ARK-{product}", roots.ark),
            (f"SEV-{product}", roots.ask),
            (f"SEV-VLEK-{product}", roots.asvk),
        ):
            assert f"# {name}, SHA-256 {hashlib.sha256(der).hexdigest()}\n" in source


@pytest.mark.parametrize("product", PRODUCTS)
def test_the_pinned_authorities_are_signed_by_the_pinned_root(product: str) -> None:
    roots = AMD_ROOTS[product]
    ark = Certificate.parse(roots.ark)
    ark.check_issued_by(ark)
    assert ark.name == f"ARK-{product}"
    for der, name in ((roots.ask, f"SEV-{product}"), (roots.asvk, f"SEV-VLEK-{product}")):
        authority = Certificate.parse(der)
        authority.check_issued_by(ark)
        assert (authority.name, authority.signs_certificates) == (name, True)


def test_the_genuine_chain_of_milan_is_the_pinned_one(evidence_folder: Path) -> None:
    data = (evidence_folder / "snp" / "ask_ark_milan.pem").read_bytes()
    ask, ark = (der for _, _, der in pem.unarmor(data, multiple=True))
    assert (AMD_ROOTS["Milan"].ask, AMD_ROOTS["Milan"].ark) == (ask, ark)


@pytest.mark.parametrize("product", PRODUCTS)
def test_a_vcek_is_for_a_chip_and_its_tcb(amd: Any, product: str) -> None:
    found = endorse([amd.leaf(product).der()], "VCEK", amd.NOW, amd.roots())
    assert (found.product, found.product_name) == (product, f"{product}-B1")
    assert found.tcb == amd.TCBS[product]
    assert (found.hwid, found.csp_id, found.revocations) == (amd.hwid(product), None, None)


@pytest.mark.parametrize("product", PRODUCTS)
def test_a_vlek_is_for_a_cloud_provider(amd: Any, product: str) -> None:
    found = endorse([amd.leaf(product, "VLEK").der()], "VLEK", amd.NOW, amd.roots())
    assert (found.hwid, found.csp_id) == (None, "CN=cc-test.example.com")
    assert found.tcb == amd.TCBS[product]


def test_a_chip_id_in_an_octet_string_is_read_too(amd: Any) -> None:
    card = amd.leaf("Milan")
    card.extensions[-1] = amd.extension(f"{amd.AMD}4", core.OctetString(amd.hwid("Milan")).dump())
    assert endorse([card.der()], "VCEK", amd.NOW, amd.roots()).hwid == amd.hwid("Milan")


@pytest.mark.parametrize("name", ["Genoa", "Genoa-B0", "Bergamo-A0", "Siena"])
def test_genoas_root_is_also_that_of_its_kin(amd: Any, name: str) -> None:
    card = amd.leaf("Genoa")
    card.extensions[1] = amd.extension(f"{amd.AMD}2", core.IA5String(name).dump())
    found = endorse([card.der()], "VCEK", amd.NOW, amd.roots())
    assert (found.product, found.product_name) == ("Genoa", name)


def test_the_chain_may_come_along_in_any_order(amd: Any) -> None:
    roots = amd.roots()["Milan"]
    leaf = amd.leaf("Milan").der()
    newer = amd.ask("Milan", serial=65599).der()
    for given_ in (
        [roots.ask, roots.ark],
        [roots.ark, roots.ask],
        [roots.ark],
        [roots.ask],
        [newer],
    ):
        assert endorse([leaf, *given_], "VCEK", amd.NOW, amd.roots()).product == "Milan"


def _table() -> dict[str, Any]:
    """Name of an attack: the certificates to show, and the reason of the refusal."""
    return {
        "none": (lambda a: [], "wrong number of certificates"),
        "four": (lambda a: [a.leaf("Milan").der()] * 4, "wrong number of certificates"),
        "empty": (lambda a: [b""], "the VCEK cannot be read"),
        "not DER": (lambda a: [b"-----BEGIN"], "the VCEK cannot be read"),
        "too large": (lambda a: [b"\x30" * 9000], "the VCEK is too large"),
        "trailing byte": (lambda a: [a.leaf("Milan").der() + b"\0"], "cannot be read"),
        "truncated": (lambda a: [a.leaf("Milan").der()[:-1]], "cannot be read"),
        "VLEK for VCEK": (lambda a: [a.leaf("Milan", "VLEK").der()], "found SEV-VLEK"),
        "ASK for VCEK": (lambda a: [a.ask("Milan").der()], "found SEV-Milan"),
        "ARK for VCEK": (lambda a: [a.ark("Milan").der()], "found ARK-Milan"),
        "unknown line": (lambda a: [a.leaf_by("SEV-Rome")], "not issued by AMD.*found SEV-Rome"),
        "issued by ASVK": (lambda a: [a.leaf_by("SEV-VLEK-Milan")], "not issued by AMD"),
        "issued by ARK": (lambda a: [a.leaf_by("ARK-Milan")], "not issued by AMD"),
        "other line's name": (lambda a: [a.leaf_by("SEV-Genoa")], "for another line.*Milan-B1"),
        "signed by ASVK": (lambda a: [a.leaf_by("SEV-Milan", "asvk")], "does not verify"),
        "signed by nobody": (lambda a: [a.leaf_by("SEV-Milan", "other")], "does not verify"),
        "ASK of another root": (
            lambda a: [
                a.leaf("Milan").der(),
                a.authority("SEV-Milan", "ARK-Milan", "ask", "other").der(),
            ],
            "signature of SEV-Milan does not verify",
        ),
        "ASK of another line": (
            lambda a: [a.leaf("Milan").der(), a.roots()["Genoa"].ask],
            "not in its chain.*found SEV-Genoa",
        ),
        "ASVK as ASK": (
            lambda a: [a.leaf("Milan").der(), a.roots()["Milan"].asvk],
            "not in its chain.*found SEV-VLEK-Milan",
        ),
        "another ARK": (
            lambda a: [
                a.leaf("Milan").der(),
                a.roots()["Milan"].ask,
                a.authority("ARK-Milan", "ARK-Milan", "other", "other").der(),
            ],
            "not in its chain",
        ),
        "only another ARK": (
            lambda a: [
                a.leaf("Milan").der(),
                a.authority("ARK-Milan", "ARK-Milan", "other", "other").der(),
            ],
            "not in its chain.*found ARK-Milan",
        ),
        "the same twice": (lambda a: [a.leaf("Milan").der()] * 2, "not in its chain"),
        "ASK that is no authority": (
            lambda a: [a.leaf("Milan").der(), a.ask("Milan", extensions=[]).der()],
            "SEV-Milan may not sign certificates",
        ),
        "ASK on a curve": (
            lambda a: [a.leaf("Milan").der(), a.ask_on_curve()],
            "SEV-Milan may not sign certificates",
        ),
    }


@pytest.mark.parametrize("name", _table())
def test_a_wrong_chain_is_refused(amd: Any, name: str) -> None:
    certificates, reason = _table()[name]
    with pytest.raises(EvidenceError, match=reason):
        endorse(certificates(amd), "VCEK", amd.NOW, amd.roots())


def test_a_line_without_a_trusted_root_is_refused(amd: Any) -> None:
    only = {"Genoa": amd.roots()["Genoa"]}
    with pytest.raises(EvidenceError, match=r"no root certificate is trusted.*found Milan"):
        endorse([amd.leaf("Milan").der()], "VCEK", amd.NOW, only)


def test_test_certificates_mean_nothing_to_amds_roots(amd: Any) -> None:
    with pytest.raises(EvidenceError, match=r"issued by another authority|does not verify"):
        endorse([amd.leaf("Milan").der()], "VCEK", amd.NOW, AMD_ROOTS)


def _leaf_changes() -> dict[str, Any]:
    arc = "1.3.6.1.4.1.3704.1."

    def without(number: str) -> Any:
        def change(a: Any, card: Any) -> None:
            card.extensions = [e for e in card.extensions if e["extn_id"] != arc + number]

        return change

    def put(number: str, value: bytes, critical: bool = False) -> Any:
        def change(a: Any, card: Any) -> None:
            without(number)(a, card)
            card.extensions.append(a.extension(arc + number, value, critical))

        return change

    def twice(a: Any, card: Any) -> None:
        card.extensions.append(card.extensions[-1])

    def key(maker: Any) -> Any:
        def change(a: Any, card: Any) -> None:
            card.key = maker(a)

        return change

    def authority(a: Any, card: Any) -> None:
        card.extensions.append(a.CA[0])

    def algorithm(changes: dict[str, Any]) -> Any:
        def change(a: Any, card: Any) -> None:
            fields = {
                "hash_algorithm": {"algorithm": "sha384"},
                "mask_gen_algorithm": {"algorithm": "mgf1", "parameters": {"algorithm": "sha384"}},
                "salt_length": 48,
                **changes,
            }
            card.algorithm = x509.SignedDigestAlgorithm(
                {"algorithm": "rsassa_pss", "parameters": fields}
            )

        return change

    def pkcs1(a: Any, card: Any) -> None:
        card.algorithm = x509.SignedDigestAlgorithm({"algorithm": "sha384_rsa"})

    ia5 = core.IA5String
    return {
        "no structure version": (without("1"), "lacks an extension"),
        "unknown structure": (put("1", b"\x02\x01\x02"), "structure that this version"),
        "no product": (without("2"), "lacks an extension"),
        "other product": (put("2", ia5("Genoa-B1").dump()), "another line.*found Genoa-B1"),
        "similar product": (put("2", ia5("Milano").dump()), "another line.*found Milano"),
        "product in UTF-8": (put("2", core.UTF8String("Milan").dump()), "malformed extension"),
        "product not ASCII": (put("2", b"\x16\x05Mil\xe4n"), "malformed extension"),
        "no SNP SPL": (without("3.3"), "lacks an extension.*3.3"),
        "no reserved SPL": (without("3.5"), "lacks an extension.*3.5"),
        "SPL too large": (put("3.1", b"\x02\x02\x01\x00"), "out of range"),
        "SPL negative": (put("3.1", b"\x02\x01\xff"), "out of range"),
        "SPL cut off": (put("3.1", b"\x02\x02\x01"), "malformed extension"),
        "SPL empty": (put("3.1", b"\x02\x00"), "malformed extension"),
        "SPL with more": (put("3.1", b"\x02\x01\x01\x00"), "malformed extension"),
        "no chip": (without("4"), "chip and a cloud provider wrongly"),
        "chip and provider": (put("5", ia5("CN=x").dump()), "chip and a cloud provider wrongly"),
        "short chip": (put("4", bytes(8)), "malformed extension"),
        "short chip, wrapped": (put("4", b"\x04\x08" + bytes(8)), "chip in another form"),
        "extension twice": (twice, "has an extension twice"),
        "unknown critical": (put("99", b"\x05\x00", True), "unknown critical extension"),
        "RSA key": (key(lambda a: a.rsa_key("ask")), "key of another type"),
        "other curve": (key(lambda a: ec.generate_private_key(ec.SECP256R1())), "another type"),
        "an authority": (authority, "is a certificate authority"),
        "PKCS1": (pkcs1, "signed in another way"),
        "SHA-256": (algorithm({"hash_algorithm": {"algorithm": "sha256"}}), "in another way"),
        "short salt": (algorithm({"salt_length": 32}), "signed in another way"),
    }


@pytest.mark.parametrize("name", _leaf_changes())
def test_a_wrong_vcek_is_refused(amd: Any, name: str) -> None:
    change, reason = _leaf_changes()[name]
    card = amd.leaf("Milan")
    change(amd, card)
    with pytest.raises(EvidenceError, match=reason):
        endorse([card.der()], "VCEK", amd.NOW, amd.roots())


@pytest.mark.parametrize("which", ["leaf", "ask"])
@pytest.mark.parametrize(("days", "reason"), [(-31, "not yet valid"), (31, "no longer valid")])
def test_dates_are_judged_by_the_given_clock(amd: Any, which: str, days: int, reason: str) -> None:
    long = {"not_before": amd.NOW - timedelta(days=99), "not_after": amd.NOW + timedelta(days=99)}
    leaf, ask = amd.leaf("Milan"), amd.ask("Milan", **(long if which == "leaf" else {}))
    if which == "ask":
        leaf.not_before, leaf.not_after = long["not_before"], long["not_after"]
    ark = amd.authority("ARK-Milan", "ARK-Milan", "ark", "ark", **long)
    roots = {"Milan": amd.ProductRoots(ark.der(), ask.der(), b"")}
    certificates = [leaf.der(), ask.der()]
    endorse(certificates, "VCEK", amd.NOW, roots)
    name = "SEV-VCEK" if which == "leaf" else "SEV-Milan"
    with pytest.raises(EvidenceError, match=f"{name} is {reason}"):
        endorse(certificates, "VCEK", amd.NOW + timedelta(days=days), roots)


def test_a_certificate_that_was_valid_is_not_remembered_as_valid(amd: Any) -> None:
    leaf = [amd.leaf("Milan").der()]
    endorse(leaf, "VCEK", amd.NOW, amd.roots())
    with pytest.raises(EvidenceError, match="no longer valid"):
        endorse(leaf, "VCEK", amd.NOW + timedelta(days=31), amd.roots())
    with pytest.raises(EvidenceError, match="was revoked"):
        endorse(leaf, "VCEK", amd.NOW, amd.roots(), amd.revocation_list("Milan", (65537,)))


def test_a_revocation_list_that_does_not_name_the_ask_is_shown(amd: Any) -> None:
    crl = amd.revocation_list("Milan", (1, 2, 65536))
    found = endorse([amd.leaf("Milan").der()], "VCEK", amd.NOW, amd.roots(), crl)
    day = timedelta(days=1)
    assert found.revocations == (amd.NOW - day, amd.NOW + day)


@pytest.mark.parametrize(
    ("make", "days", "reason"),
    [
        (lambda a: a.revocation_list("Milan", (5, 65537)), 0, "SEV-Milan was revoked"),
        (lambda a: a.revocation_list("Genoa"), 0, "another authority"),
        (lambda a: a.revocation_list("Milan")[:-1], 0, "cannot be read"),
        (lambda a: a.revocation_list("Milan") + b"\0", 0, "cannot be read"),
        (lambda a: b"", 0, "cannot be read"),
        (lambda a: a.leaf("Milan").der(), 0, "cannot be read|not in DER"),
        (lambda a: bytes(1 << 21), 0, "too large"),
        (lambda a: a.revocation_list("Milan"), 2, "list is no longer valid"),
        (lambda a: a.revocation_list("Milan"), -2, "list is not yet valid"),
        (lambda a: a.revocation_list("Milan", next_update=None), 0, "never expires"),
        (
            lambda a: a.revocation_list(
                "Milan",
                crl_extensions=[
                    {
                        "extn_id": "2.5.29.28",
                        "critical": True,
                        "extn_value": core.ParsableOctetString(b"\x30\x00"),
                    }
                ],
            ),
            0,
            "critical extension",
        ),
    ],
    ids=range(11),
)
def test_a_revocation_list_that_is_not_good_is_refused(
    amd: Any, make: Any, days: int, reason: str
) -> None:
    with pytest.raises(EvidenceError, match=reason):
        endorse(
            [amd.leaf("Milan").der()],
            "VCEK",
            amd.NOW + timedelta(days=days),
            amd.roots(),
            make(amd),
        )


def test_every_byte_of_a_revocation_list_counts(amd: Any) -> None:
    crl, leaf = amd.revocation_list("Milan", (7,)), [amd.leaf("Milan").der()]
    for at in range(len(crl)):
        altered = bytearray(crl)
        altered[at] ^= 0x01
        with pytest.raises(EvidenceError):
            endorse(leaf, "VCEK", amd.NOW, amd.roots(), bytes(altered))


def test_the_hosts_table_is_read_by_guid(amd: Any) -> None:
    table = amd.make_table({"ARK": b"ark", "other": b"platform", "VCEK": b"vcek", "ASK": b""})
    assert certificate_table(table) == {"ARK": b"ark", "VCEK": b"vcek"}
    assert certificate_table(table + bytes(4000)) == {"ARK": b"ark", "VCEK": b"vcek"}
    assert certificate_table(b"") == {}
    assert certificate_table(bytes(24)) == {}


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        (bytes(23), "cut off"),
        (VCEK_GUID + bytes(7), "cut off"),
        (VCEK_GUID + b"\x30\0\0\0\x01\0\0\0" + bytes(20), "cut off"),
        (VCEK_GUID + b"\x30\0\0\0\x02\0\0\0" + bytes(24) + b"x", "points outside"),
        ((VCEK_GUID + b"\x48\0\0\0\x01\0\0\0") * 2 + bytes(25), "an entry twice"),
        (VCEK_GUID + b"\x00" * 4 + b"\x08\0\0\0" + bytes(24), "points outside"),
        (VCEK_GUID + b"\xff" * 8 + bytes(24), "points outside"),
        (VCEK_GUID * 400, "too long"),
    ],
    ids=range(8),
)
def test_a_malformed_table_is_refused(table: bytes, reason: str) -> None:
    with pytest.raises(EvidenceError, match=reason):
        certificate_table(table)


@settings(max_examples=80, deadline=None)
@given(st.binary(max_size=200))
def test_reading_any_table_raises_nothing_else(data: bytes) -> None:
    try:
        found = certificate_table(data)
    except EvidenceError:
        return
    assert all(value in data for value in found.values())


@settings(max_examples=70, deadline=None)
@given(st.data())
def test_reading_any_certificate_raises_nothing_else(data: st.DataObject) -> None:
    der = bytearray(AMD_ROOTS["Turin"].ask)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(der) - 1))
        end = data.draw(st.integers(at, min(at + 4, len(der))))
        der[at:end] = data.draw(st.binary(max_size=4))
    for parse in (Certificate.parse, RevocationList.parse):
        try:
            parse(bytes(der))
        except EvidenceError as error:
            assert error.what  # noqa: PT017 - either outcome is right, another exception is not
