"""NVIDIA's reference manifests: signatures, contents, and the reference values made of them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes

from cenacle.attestation.claims import compare
from cenacle.attestation.nvidia_rim import read_rim, reference_values
from cenacle.attestation.nvidia_root import NVIDIA_RIM_ROOT, NVIDIA_RIM_ROOT_SHA256
from cenacle.documents.clauses import all_met, failed
from cenacle.errors import EvidenceError, InputError

NOW = datetime(2027, 2, 1, 10, 0, 0, tzinfo=UTC)
ZERO = "sha384:" + "00" * 48


def test_root_is_the_one_that_nvidia_publishes() -> None:
    root = x509.load_der_x509_certificate(NVIDIA_RIM_ROOT)
    assert root.fingerprint(hashes.SHA256()).hex() == NVIDIA_RIM_ROOT_SHA256
    assert root.subject.rfc4514_string() == "CN=NVIDIA CoRIM signing Root CA,O=NVIDIA,C=US"
    root.verify_directly_issued_by(root)


def test_contents(manifest: Any) -> None:
    rim = read_rim(manifest.file(), NOW, manifest.roots)
    assert (rim.product, rim.version, rim.size) == ("GH100", "550.90.07", 3)
    assert rim.accepted == {2: ("sha384:" + "22" * 48, "sha384:" + "32" * 48)}


def test_only_nvidias_root_is_trusted(manifest: Any) -> None:
    with pytest.raises(EvidenceError, match="root that is not trusted"):
        read_rim(manifest.file(), NOW)


def test_what_changes_no_content_changes_nothing(manifest: Any) -> None:
    before, signature, after = manifest.parts()
    spelled = before.replace("></ns0:Resource>", " />").replace('"48"', "'48'")
    file = f'<?xml version="1.0"?>\n{spelled}<!-- note -->{signature}{after}\n'.encode()
    assert read_rim(file, NOW, manifest.roots) == read_rim(manifest.file(), NOW, manifest.roots)


@pytest.mark.parametrize(
    ("spoil", "error", "why"),
    [
        pytest.param(lambda b, s, a: b.replace("22", "23") + s + a,
                     EvidenceError, "altered", id="other-value"),
        pytest.param(lambda b, s, a: b.replace('"False"', '"True"') + s + a,
                     EvidenceError, "altered", id="activated"),
        pytest.param(lambda b, s, a: b + " " + s + a, EvidenceError, "altered", id="white-space"),
        pytest.param(lambda b, s, a: b.replace("550", "551") + s + a,
                     EvidenceError, "altered", id="other-version"),
        pytest.param(lambda b, s, a: b + a, InputError, "0 elements Signature", id="unsigned"),
        pytest.param(lambda b, s, a: b + s + s + a,
                     InputError, "2 elements Signature", id="signed-twice"),
        pytest.param(lambda b, s, a: b.replace("</ns0:Payload>", s + "</ns0:Payload>") + a,
                     InputError, "0 elements Signature", id="signature-elsewhere"),
        pytest.param(lambda b, s, a: f"<x>{b}{s}{a}</x>",
                     InputError, "no NVIDIA RIM", id="wrapped"),
        pytest.param(lambda b, s, a: "<!DOCTYPE a>" + b + s + a,
                     InputError, "document type", id="doctype"),
        pytest.param(lambda b, s, a: b + s.replace("SignatureValue>", "SignatureValue>%", 1) + a,
                     InputError, "no base64", id="no-base64"),
        pytest.param(
            lambda b, s, a: b + s.replace("<ds:SignatureValue>", "<ds:SignatureValue>AAAA") + a,
            EvidenceError, "wrong length", id="long-signature"),
        pytest.param(lambda b, s, a: b + s.replace(' URI=""', ' URI="#x"') + a,
                     EvidenceError, "another way", id="other-reference"),
        pytest.param(lambda b, s, a: b + s.replace('<ds:Transform Algorithm="http://www.w3.org/2006/12'
                                                   '/xml-c14n11"></ds:Transform>', "") + a,
                     EvidenceError, "another way", id="one-transform"),
        pytest.param(lambda b, s, a: b + s.replace("ecdsa-sha384", "hmac-sha384") + a,
                     EvidenceError, "another way", id="hmac"),
        pytest.param(lambda b, s, a: b + s.replace("X509Data>", "X509Data><ds:X509SKI/>", 1) + a,
                     EvidenceError, "credible length", id="other-key-data"),
    ],
)  # fmt: skip
def test_spoiled_files_are_refused(
    manifest: Any, spoil: Callable[[str, str, str], str], error: type[Exception], why: str
) -> None:
    file = spoil(*manifest.parts()).encode()
    with pytest.raises(error, match=why):
        read_rim(file, NOW, manifest.roots)


def test_every_byte_counts(manifest: Any) -> None:
    """A flipped byte is refused, or (in the white space of markup) changes nothing."""
    file, roots = manifest.file(), manifest.roots
    whole = read_rim(file, NOW, roots)
    unchanged = 0
    for at in range(0, len(file), 8):
        altered = bytearray(file)
        altered[at] ^= 1 << at % 7
        try:
            assert read_rim(bytes(altered), NOW, roots) == whole
            unchanged += 1
        except (EvidenceError, InputError):
            pass
    assert unchanged < 10


@pytest.mark.parametrize("index", range(4))
def test_dates(manifest: Any, index: int) -> None:
    manifest.links[index].until = NOW - timedelta(minutes=1)
    with pytest.raises(EvidenceError, match=f"certificate {index + 1} of 4 .*expired"):
        read_rim(manifest.file(), NOW, manifest.roots)
    assert read_rim(manifest.file(), None, manifest.roots).size == 3


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        pytest.param(lambda m: setattr(m.links[1], "ca", False), "may not issue", id="no-ca"),
        pytest.param(lambda m: setattr(m.links[0], "ca", True), "may not sign", id="leaf-ca"),
        pytest.param(lambda m: setattr(m, "shown", 0), "number of certificates", id="none"),
        pytest.param(lambda m: setattr(m, "shown", 1), "number of certificates", id="one"),
        pytest.param(lambda m: setattr(m, "shown", 3), "not trusted", id="no-root"),
        pytest.param(lambda m: setattr(m.links[1], "signer", "x"), "not issued", id="forged"),
    ],
)
def test_spoiled_paths_are_refused(manifest: Any, spoil: Callable[[Any], object], why: str) -> None:
    roots = manifest.roots
    spoil(manifest)
    with pytest.raises(EvidenceError, match=why):
        read_rim(manifest.file(), NOW, roots)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        pytest.param(("index=", "indey="), "entry of an NVIDIA RIM is not", id="no-index"),
        pytest.param(('index="1"', 'index="0"'), "lists a measurement twice", id="twice"),
        pytest.param(('index="1"', 'index="9"'), "each index from 0 on", id="gap"),
        pytest.param(('index="1"', 'index="254"'), "is not as expected", id="far"),
        pytest.param(('index="1"', 'index="-1"'), "is not as expected", id="negative"),
        pytest.param(('index="1"', 'index="1_0"'), "is not as expected", id="underscore"),
        pytest.param(('alternatives="2"', 'alternatives="3"'), "no SHA-384", id="one-missing"),
        pytest.param(('alternatives="2"', 'alternatives="0"'), "not as expected", id="none"),
        pytest.param(('alternatives="2"', 'alternatives="65"'), "not as expected", id="many"),
        pytest.param(('active="True"', 'active="true"'), "not as expected", id="active"),
        pytest.param(('active="True"', 'active="False"'), "one of them active", id="inactive"),
        pytest.param(('size="48"', 'size="32"'), "no SHA-384", id="size"),
        pytest.param(("32" * 48, "32" * 47), "no SHA-384", id="short"),
        pytest.param(("32" * 48, "AB" * 48), "no SHA-384", id="capitals"),
        pytest.param(("ns2:Hash1", "ns2:Hush1"), "no SHA-384", id="other-name"),
        pytest.param(("Measurement", "File"), "not as expected", id="type"),
        pytest.param(("ns0:Resource", "ns0:File"), "not as expected", id="tag"),
    ],
)
def test_spoiled_contents_are_refused_though_signed(
    manifest: Any, change: tuple[str, str], why: str
) -> None:
    manifest.entries = [manifest.entry(index).replace(*change) for index in range(3)]
    with pytest.raises(InputError, match=why):
        read_rim(manifest.file(), NOW, manifest.roots)


def test_reference_values_accept_the_gpu(gpu: Any, manifest: Any, make_manifest: Any) -> None:
    vbios = make_manifest(version="96.00.9F.00.01", resources={0: ["00" * 48], 2: ["23" * 48]})
    rims = [read_rim(m.file(), NOW, m.roots) for m in (manifest, vbios)]
    claims = gpu.verifier().inspect(gpu.evidence(), NOW).claims
    references = reference_values(rims, prefix="")
    assert all_met(compare(claims, references))
    assert references["measurement-2"] == ("sha384:" + "22" * 48, "sha384:" + "32" * 48)
    assert set(reference_values(rims)) == {f"gpu.measurement-{index}" for index in (1, 2, 3)}
    gpu.measurements[1] = b"\x01" + bytes(47)
    claims = gpu.verifier().inspect(gpu.evidence(), NOW).claims
    (clause,) = failed(compare(claims, references))
    assert clause.name == "measurement measurement-1"


def test_what_no_manifest_decides_must_be_zero(manifest: Any) -> None:
    references = reference_values([read_rim(manifest.file(), NOW, manifest.roots)])
    assert references["gpu.measurement-1"] == references["gpu.measurement-3"] == (ZERO,)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"product": "GB100"}, "not of one GPU"),
        ({"size": 4}, "not of one GPU"),
        ({}, "two manifests decide one measurement"),
    ],
)
def test_manifests_that_do_not_go_together(
    manifest: Any, make_manifest: Any, change: dict[str, Any], why: str
) -> None:
    other = make_manifest(**change)
    rims = [read_rim(m.file(), NOW, m.roots) for m in (manifest, other)]
    with pytest.raises(InputError, match=why):
        reference_values(rims)


def test_no_manifest() -> None:
    with pytest.raises(InputError, match="not of one GPU"):
        reference_values([])
