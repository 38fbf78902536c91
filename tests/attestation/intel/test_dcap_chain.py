from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cenacle.attestation.dcap_chain import (
    check_crl,
    check_pck_chain,
    check_signature,
    check_signer_chain,
    parse_chain,
    parse_pck_extension,
)
from cenacle.attestation.dcap_collateral import Collateral
from cenacle.attestation.dcap_tcb import QeIdentity, TcbInfo
from cenacle.errors import EvidenceError

World = Any  # of conftest, which tests cannot import


@pytest.mark.parametrize(
    "spelled",
    [
        lambda t: t,
        lambda t: t.replace("\n", "\r\n"),
        lambda t: t + "\0",
        lambda t: t + "\n\n",
        lambda t: t.rstrip("\n"),
    ],
)
def test_chains_are_read_as_they_are_published(world: World, spelled: Any) -> None:
    certificates = parse_chain(spelled(world.pck_chain()), "a chain")
    assert len(certificates) == 3
    assert certificates[2] == world.root


@pytest.mark.parametrize(
    ("spelled", "reason"),
    [
        (lambda t: "", "not a chain"),
        (lambda t: " " + t, "not a chain"),
        (lambda t: t + "x", "not a chain"),
        (lambda t: "# a remark\n" + t, "not a chain"),
        (lambda t: t.replace("CERTIFICATE", "PUBLIC KEY"), "not a chain"),
        (lambda t: t[:-60], "not a chain"),
        (lambda t: t * 2, "not a chain"),
        (lambda t: t.replace("MII", "MI="), "base64"),
        (lambda t: t.replace("MII", "AAA", 1), "certificate 1 of a chain cannot be read"),
    ],
)
def test_anything_else_is_refused(world: World, spelled: Any, reason: str) -> None:
    with pytest.raises(EvidenceError, match=reason):
        parse_chain(spelled(world.pck_chain()), "a chain")


def test_certificates_in_another_order_are_refused(world: World, now: Any) -> None:
    pck, ca, root = parse_chain(world.pck_chain(), "a chain")
    for order in [(ca, pck, root), (pck, root, ca), (pck, ca, ca), (pck, ca), (root,), ()]:
        with pytest.raises(EvidenceError, match=r"another role|another length"):
            check_pck_chain(order, [world.root], now)
    with pytest.raises(EvidenceError, match="another role"):
        check_signer_chain((pck, root), "a chain", [world.root], now)


@pytest.mark.parametrize("sgx_type", [0, 1, 2])
def test_the_platforms_extension_is_read(world: World, sgx_type: int) -> None:
    world.platform.sgx_type = sgx_type
    world.platform.cpu_svn = bytes([255, 128, 127, 1] + [0] * 12)
    world.platform.smt = False
    found = parse_pck_extension(world.pki.pck(world.platform))
    assert found.components == world.platform.cpu_svn
    assert (found.pce_svn, found.sgx_type) == (13, sgx_type)
    assert (found.fmspc.hex().upper(), found.pce_id) == (world.platform.fmspc, b"\0\0")
    assert found.ppid == b"p" * 16
    if sgx_type == 1:
        assert found.flags == {"dynamic": True, "cached_keys": True, "smt": False}
        assert found.instance == b"i" * 16


def _certificate(world: World, extension: bytes | None) -> x509.Certificate:
    pki = world.pki
    made: x509.Certificate = pki.certificate(
        pki.pck_name, pki.ca_name, pki.pck_key, pki.ca_key, sgx=extension
    )
    return made


def test_a_certificate_without_the_extension_is_refused(world: World) -> None:
    with pytest.raises(EvidenceError, match="says nothing that can be read"):
        parse_pck_extension(_certificate(world, None))


def test_every_damaged_extension_is_refused_or_read_as_written(world: World) -> None:
    """No byte of an extension's structure may be changed without notice."""
    whole = world.platform.extension()
    true = parse_pck_extension(_certificate(world, whole))
    for place in range(0, len(whole), 3):
        damaged = whole[:place] + bytes([whole[place] ^ 0x40]) + whole[place + 1 :]
        try:
            found = parse_pck_extension(_certificate(world, damaged))
        except EvidenceError:
            continue
        assert found != true or _is_value_of_cpusvn(whole, place)
    for size in range(0, len(whole), 7):
        with pytest.raises(EvidenceError):
            parse_pck_extension(_certificate(world, whole[:size]))


def _is_value_of_cpusvn(whole: bytes, place: int) -> bool:
    """The raw CPUSVN (18th item of the TCB), and the truth values of the flags, have no effect."""
    start = whole.index(bytes([2, 18])) + 2  # after the end of its identifier
    return start <= place < start + 18 or whole[place] == 0xFF


def test_a_revocation_list_for_some_purposes_is_refused(world: World, now: Any) -> None:
    from cryptography.hazmat.primitives import hashes  # noqa: PLC0415

    der = bytes.fromhex(world.collateral()["pck_crl"])
    ca, pck = world.pki.ca(), world.pki.pck(world.platform)
    check_crl(der, ca, [pck], now)
    listed = x509.load_der_x509_crl(der)
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(listed.issuer)
        .last_update(listed.last_update_utc)
        .next_update(listed.next_update_utc or now)
        .add_extension(
            x509.IssuingDistributionPoint(None, None, False, True, None, False, False), True
        )
    )
    partial = builder.sign(world.pki.ca_key, hashes.SHA256()).public_bytes(Encoding.DER)
    with pytest.raises(EvidenceError, match="not complete"):
        check_crl(partial, ca, [pck], now)


def test_a_revocation_list_of_another_is_refused(world: World, now: Any) -> None:
    fields = world.collateral()
    ca, pck = world.pki.ca(), world.pki.pck(world.platform)
    with pytest.raises(EvidenceError, match="not genuine"):
        check_crl(bytes.fromhex(fields["root_ca_crl"]), ca, [pck], now)
    other = type(world.pki)()
    der = other.crl(world.pki.ca_name, other.ca_key, (), world.crl_next_update)
    with pytest.raises(EvidenceError, match="not genuine"):
        check_crl(der, ca, [pck], now)
    for noise in (b"", b"\x30", b"\x30\x80" * 20):
        with pytest.raises(EvidenceError, match="cannot be read"):
            check_crl(noise, ca, [pck], now)


@pytest.mark.parametrize("size", [0, 63, 65])
def test_a_signature_has_one_size(world: World, size: int) -> None:
    key = world.pki.ca().public_key()
    with pytest.raises(EvidenceError, match="another size"):
        check_signature(key, bytes(size), b"data", "a document")
    with pytest.raises(EvidenceError, match="a document is not genuine"):
        check_signature(key, bytes(64), b"data", "a document")


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_hostile_collateral_is_refused_in_words(world: World, data: st.DataObject) -> None:
    fields = world.collateral()
    noise = st.one_of(st.text(max_size=40), st.binary(max_size=40), st.integers(), st.none())
    name = data.draw(st.sampled_from(sorted(fields)))
    fields[name] = data.draw(noise)
    try:
        Collateral.of(fields)
    except EvidenceError:
        return
    assert isinstance(fields[name], str)


LEAVES = st.one_of(st.none(), st.booleans(), st.integers(-2, 70_000), st.text(max_size=8))


@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), about=st.sampled_from([TcbInfo, QeIdentity]))
def test_what_is_signed_and_has_another_form_is_refused_in_words(
    world: World, data: st.DataObject, about: Callable[..., Any]
) -> None:
    """Any one value anywhere in Intel's documents replaced by another."""
    import json  # noqa: PLC0415

    world.tee = "tdx"
    text = world.tcb_info_text() if about is TcbInfo else world.qe_identity_text()
    document = json.loads(text)
    node: Any = document
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(node[key], dict | list) or not node[key] or data.draw(st.booleans()):
            break
        node = node[key]
    node[key] = data.draw(LEAVES)
    reader: Any = about
    try:
        reader.read(json.dumps(document), "a document").check_dates(world.issued, "a document")
    except EvidenceError:
        return
