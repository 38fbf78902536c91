"""Miniatures of AWS's and NVIDIA's worlds: certificate paths, enclaves, GPUs, their evidence.

Every part is a field that a test may change before the evidence is made, and everything is
signed with test keys, so that the verifiers run exactly as with the vendors'.
"""

from __future__ import annotations

import functools
import hashlib
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import cbor2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from cenacle.attestation.claims import Evidence
from cenacle.attestation.nitro import NitroVerifier
from cenacle.attestation.nvidia import NvidiaVerifier
from cenacle.documents.base import b64

NOW = datetime(2027, 2, 1, 10, 0, 0, tzinfo=UTC)
BOUND = bytes(range(64))
FWID = b"\x0f" * 48


def key(name: str, curve: str = "secp384r1") -> ec.EllipticCurvePrivateKey:
    """The one key of this name and curve."""
    return _key(name, curve)


@functools.cache
def _key(name: str, curve: str) -> ec.EllipticCurvePrivateKey:
    del name
    return ec.generate_private_key(ec.SECP384R1() if curve == "secp384r1" else ec.SECP256R1())


def sign(signer: ec.EllipticCurvePrivateKey, data: bytes) -> bytes:
    r, s = decode_dss_signature(
        signer.sign(data, ec.ECDSA(hashes.SHA384(), deterministic_signing=True))
    )
    return r.to_bytes(48, "big") + s.to_bytes(48, "big")


def named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


_ISSUED: dict[tuple[str, str, str], bytes] = {}


@dataclass
class Link:
    """One certificate of a path, as its maker wants it."""

    name: str
    ca: bool | None = True
    path_length: int | None = None
    signs_data: bool = False
    signs_certificates: bool = True
    usage: bool = True
    curve: str = "secp384r1"
    algorithm: type[hashes.SHA384 | hashes.SHA256] = hashes.SHA384
    since: datetime = NOW - timedelta(hours=1)
    until: datetime = NOW + timedelta(hours=2)
    issuer_name: str | None = None
    signer: str | None = None
    extensions: tuple[tuple[x509.ExtensionType, bool], ...] = ()

    def issue(self, issuer: Link) -> bytes:
        """DER; the same again for the same wishes, since signatures are deterministic."""
        wishes = (repr(self), issuer.name, issuer.curve)
        if wishes not in _ISSUED:
            _ISSUED[wishes] = self._make(issuer)
        return _ISSUED[wishes]

    def _make(self, issuer: Link) -> bytes:
        signer = key(self.signer or issuer.name, issuer.curve)
        builder = (
            x509.CertificateBuilder()
            .subject_name(named(self.name))
            .issuer_name(named(self.issuer_name or issuer.name))
            .public_key(key(self.name, self.curve).public_key())
            .serial_number(7)
            .not_valid_before(self.since)
            .not_valid_after(self.until)
        )
        if self.ca is not None:
            constraints = x509.BasicConstraints(ca=self.ca, path_length=self.path_length)
            builder = builder.add_extension(constraints, critical=True)
        if self.usage:
            usage = x509.KeyUsage(
                digital_signature=self.signs_data,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                key_cert_sign=self.signs_certificates,
                crl_sign=False,
                encipher_only=False,
                decipher_only=False,
            )
            builder = builder.add_extension(usage, critical=True)
        for extension, critical in self.extensions:
            builder = builder.add_extension(extension, critical=critical)
        made = builder.sign(signer, self.algorithm(), ecdsa_deterministic=True)
        return made.public_bytes(Encoding.DER)


def device_link(name: str, *extensions: x509.ExtensionType) -> Link:
    return Link(
        name,
        ca=None,
        signs_data=True,
        signs_certificates=False,
        extensions=tuple((extension, False) for extension in extensions),
    )


def issue_path(links: list[Link]) -> list[bytes]:
    """DER, in the order of the links, the last of which signs itself."""
    return [link.issue(above) for link, above in zip(links, [*links[1:], links[-1]], strict=True)]


@dataclass
class Enclave:
    """A Nitro enclave, with the hypervisor that signs its documents."""

    links: list[Link] = field(
        default_factory=lambda: [
            device_link("enclave"),
            Link("instance", path_length=0),
            Link("zone", path_length=1),
            Link("region", path_length=2),
            Link("aws"),
        ]
    )
    pcrs: dict[Any, Any] = field(
        default_factory=lambda: {
            **{index: bytes(48) for index in range(16)},
            0: b"\x10" * 48,
            1: b"\x11" * 48,
            2: b"\x12" * 48,
            3: b"\x13" * 48,
            4: b"\x14" * 48,
            8: b"\x18" * 48,
        }
    )
    module_id: Any = "i-1234567890abcdef0-enc9876543210abcde"
    digest: Any = "SHA384"
    issued: datetime = NOW
    user_data: Any = BOUND
    fields: dict[Any, Any] = field(default_factory=dict)
    protected: dict[Any, Any] = field(default_factory=lambda: {1: -35})
    unprotected: dict[Any, Any] = field(default_factory=dict)
    signer: str = "enclave"

    @property
    def roots(self) -> list[bytes]:
        return [issue_path(self.links)[-1]]

    def payload(self) -> dict[Any, Any]:
        leaf, *above = issue_path(self.links)
        return {
            "module_id": self.module_id,
            "digest": self.digest,
            "timestamp": int(self.issued.timestamp() * 1000),
            "pcrs": self.pcrs,
            "certificate": leaf,
            "cabundle": above[::-1],
            "public_key": None,
            "user_data": self.user_data,
            "nonce": None,
            **self.fields,
        }

    def document(self, payload: bytes | None = None) -> bytes:
        if payload is None:
            pairs = self.payload().items()
            inside = b"".join(cbor2.dumps(name) + cbor2.dumps(value) for name, value in pairs)
            payload = b"\xbf" + inside + b"\xff"
        protected = cbor2.dumps(self.protected)
        signed = cbor2.dumps(["Signature1", protected, b"", payload])
        signature = sign(key(self.signer), signed)
        return cbor2.dumps([protected, self.unprotected, payload, signature])

    def evidence(self, document: bytes | None = None) -> Evidence:
        data = self.document() if document is None else document
        return Evidence(kind="nitro", body={"document": b64(data)})

    def verifier(self) -> NitroVerifier:
        return NitroVerifier(self.roots)


def der(tag: int, content: bytes) -> bytes:
    length = len(content)
    size = bytes([length]) if length < 0x80 else bytes([0x81, length])
    return bytes([tag]) + size + content


def device_name(text: str) -> x509.SubjectAlternativeName:
    value = der(0x0C, text.encode())
    other = x509.OtherName(x509.ObjectIdentifier("1.3.6.1.4.1.412.274.1"), value)
    return x509.SubjectAlternativeName([other])


def fwid_sequence(fwid: bytes) -> bytes:
    return der(0x30, der(0x06, bytes.fromhex("608648016503040202")) + der(0x04, fwid))


def hopper_dice(fwid: bytes = FWID) -> x509.UnrecognizedExtension:
    spki = der(0x30, b"\x05\x00")
    content = der(0x02, b"\x01") + spki + fwid_sequence(fwid)
    oid = x509.ObjectIdentifier("2.23.133.5.4.1")
    return x509.UnrecognizedExtension(oid, der(0x30, content))


def blackwell_dice(
    fwid: bytes = FWID, flags: bytes = b"\x80\x00\x00\x01"
) -> x509.UnrecognizedExtension:
    content = (
        der(0x80, b"NVIDIA")
        + der(0x83, b"\x01")
        + der(0xA6, fwid_sequence(fwid) + fwid_sequence(bytes(48)))
        + der(0x87, b"\x00" + flags)
        + der(0x89, b"\x00")
    )
    oid = x509.ObjectIdentifier("2.23.133.5.4.1.1")
    return x509.UnrecognizedExtension(oid, der(0x30, content))


@dataclass
class Gpu:
    """A GPU in confidential-computing mode, as its firmware and driver make its reports."""

    serial: str = "48B02D0000000001"
    chip: str = "GH100"
    dice: x509.ExtensionType = field(default_factory=hopper_dice)
    links: list[Link] = field(default_factory=list)
    measurements: dict[int, bytes] = field(
        default_factory=lambda: {1: bytes(48), 2: b"\x22" * 48, 3: b"\x23" * 48}
    )
    kinds: dict[int, int] = field(default_factory=dict)
    opaque: dict[int, bytes] = field(
        default_factory=lambda: {
            6: bytes.fromhex("009f009601000000"),
            11: b"\x55",
            15: b"882\x00\x00",
            17: b"1010\x00",
            18: b"0200\x00",
            3: b"550.90.07\x00",
            20: FWID,
            21: b"\x55",
        }
    )
    request: bytes = bytes.fromhex("11e001ff")
    response: bytes = bytes.fromhex("11600000")
    slot: int = 0
    specification: int = 1
    signer: str = "gpu"
    tail: bytes = b""

    def __post_init__(self) -> None:
        far = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)
        name = device_name(f"NVIDIA:{self.chip}:{self.serial}")
        self.links = self.links or [
            replace(device_link("gpu", name, self.dice), until=far),
            Link("gpu identity", until=far),
            Link("provisioner", until=far),
            Link("chip", until=far),
            Link("nvidia", until=far),
        ]

    @property
    def roots(self) -> list[bytes]:
        return [issue_path(self.links)[-1]]

    def record(self) -> bytes:
        return b"".join(
            struct.pack(
                "<BBHBH",
                index,
                self.specification,
                len(value) + 3,
                self.kinds.get(index, 1),
                len(value),
            )
            + value
            for index, value in self.measurements.items()
        )

    def signed(self, nonce: bytes) -> bytes:
        record = self.record()
        opaque = b"".join(
            struct.pack("<HH", kind, len(data)) + data for kind, data in self.opaque.items()
        )
        return (
            self.request
            + nonce
            + bytes([self.slot])
            + self.response
            + bytes([len(self.measurements)])
            + len(record).to_bytes(3, "little")
            + record
            + b"\xee" * 32
            + len(opaque).to_bytes(2, "little")
            + opaque
        )

    def report(self, nonce: bytes = b"\x01" * 32) -> bytes:
        signed = self.signed(nonce)
        return signed + sign(key(self.signer), signed) + self.tail

    def body(self, report: bytes | None = None, nonce: bytes = b"\x01" * 32) -> dict[str, Any]:
        return {
            "report": b64(self.report(nonce) if report is None else report),
            "certificates": [b64(certificate) for certificate in issue_path(self.links)],
        }

    def evidence(self, report: bytes | None = None) -> Evidence:
        return Evidence(kind="nvidia", body=self.body(report))

    def pem(self) -> bytes:
        return b"".join(
            x509.load_der_x509_certificate(certificate).public_bytes(Encoding.PEM)
            for certificate in issue_path(self.links)
        )

    def verifier(self) -> NvidiaVerifier:
        return NvidiaVerifier(self.roots)


SWID = "http://standards.iso.org/iso/19770/-2/2015/schema.xsd"
DSIG = "http://www.w3.org/2000/09/xmldsig#"
BEFORE_DS = f'xmlns="{SWID}"'
AFTER_DS = f'xmlns:ns0="{SWID}" xmlns:ns2="http://www.w3.org/2001/04/xmlenc#sha384"'
SIGNED_INFO = (
    '<ds:CanonicalizationMethod Algorithm="http://www.w3.org/2006/12/xml-c14n11">'
    "</ds:CanonicalizationMethod>"
    '<ds:SignatureMethod Algorithm="http://www.w3.org/2001/04/xmldsig-more#ecdsa-sha384">'
    '</ds:SignatureMethod><ds:Reference URI=""><ds:Transforms>'
    '<ds:Transform Algorithm="http://www.w3.org/2000/09/xmldsig#enveloped-signature">'
    '</ds:Transform><ds:Transform Algorithm="http://www.w3.org/2006/12/xml-c14n11">'
    "</ds:Transform></ds:Transforms>"
    '<ds:DigestMethod Algorithm="http://www.w3.org/2001/04/xmldsig-more#sha384">'
    "</ds:DigestMethod><ds:DigestValue>DIGEST</ds:DigestValue></ds:Reference>"
)


@dataclass
class Manifest:
    """A reference manifest as NVIDIA signs them, written in canonical form from the start."""

    links: list[Link] = field(
        default_factory=lambda: [
            device_link("signer"),
            Link("rim ca"),
            Link("rim chip"),
            Link("rim root"),
        ]
    )
    version: str = "550.90.07"
    product: str = "GH100"
    resources: dict[int, list[str]] = field(default_factory=lambda: {1: ["22" * 48, "32" * 48]})
    size: int = 3
    entries: list[str] | None = None
    shown: int = 4

    @property
    def roots(self) -> list[bytes]:
        return [issue_path(self.links)[-1]]

    def entry(self, index: int) -> str:
        values = self.resources.get(index, ["00" * 48])
        listed = " ".join(f'ns2:Hash{n}="{value}"' for n, value in enumerate(values))
        return (
            f'<ns0:Resource active="{index in self.resources}" alternatives="{len(values)}" '
            f'index="{index}" name="Measurement_{index}" size="48" type="Measurement" {listed}>'
            "</ns0:Resource>"
        )

    def parts(self) -> tuple[str, str, str]:
        """Before the signature, the signature, and after it."""
        entries = self.entries or [self.entry(index) for index in range(self.size)]
        before = (
            f'<SoftwareIdentity {BEFORE_DS} {AFTER_DS} name="{self.product}">\n'
            f'<ns0:Meta colloquialVersion="{self.version}" product="{self.product}"></ns0:Meta>\n'
            f"<ns0:Payload>{''.join(entries)}</ns0:Payload>\n"
        )
        after = "</SoftwareIdentity>"
        digest = hashlib.sha384((before + after).encode()).digest()
        inside = SIGNED_INFO.replace("DIGEST", b64(digest))
        alone = f'<ds:SignedInfo {BEFORE_DS} xmlns:ds="{DSIG}" {AFTER_DS}>{inside}</ds:SignedInfo>'
        value = b64(sign(key(self.links[0].name), alone.encode()))
        chain = "".join(
            f"<ds:X509Certificate>{b64(certificate)}\n</ds:X509Certificate>"
            for certificate in issue_path(self.links)[: self.shown]
        )
        signature = (
            f'<ds:Signature xmlns:ds="{DSIG}"><ds:SignedInfo>{inside}</ds:SignedInfo>'
            f"<ds:SignatureValue>{value}</ds:SignatureValue>"
            f"<ds:KeyInfo><ds:X509Data>{chain}</ds:X509Data></ds:KeyInfo></ds:Signature>"
        )
        return before, signature, after

    def file(self) -> bytes:
        return "".join(self.parts()).encode()


@pytest.fixture
def manifest() -> Manifest:
    return Manifest()


@pytest.fixture
def make_manifest() -> Callable[..., Manifest]:
    return Manifest


@pytest.fixture
def enclave() -> Enclave:
    return Enclave()


@pytest.fixture
def gpu() -> Gpu:
    return Gpu()


@pytest.fixture
def make_gpu() -> Callable[..., Gpu]:
    return Gpu


@pytest.fixture
def dice() -> Callable[..., x509.ExtensionType]:
    return blackwell_dice


@pytest.fixture
def name_device() -> Callable[[str], x509.ExtensionType]:
    return device_name


@pytest.fixture
def make_link() -> type[Link]:
    return Link


@pytest.fixture(scope="session")
def evidence_folder() -> Path:
    """Genuine evidence, which is not part of the repository."""
    beside = Path(__file__).parents[4] / "shared" / "evidence"
    folder = Path(os.environ.get("CENACLE_EVIDENCE", beside))
    if not (folder / "nitro").is_dir() or not (folder / "nvidia").is_dir():
        pytest.skip(f"genuine evidence is not in {folder}; set CENACLE_EVIDENCE")
    return folder
