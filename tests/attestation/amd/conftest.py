"""Synthetic SNP evidence under test roots, written from the specifications' tables.

Offsets and encodings are stated here anew, not taken from the code under test.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from asn1crypto import core, crl, x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cenacle.attestation.amd_roots import Product, ProductRoots
from cenacle.attestation.claims import Evidence
from cenacle.attestation.snp import SnpVerifier
from cenacle.attestation.snp_report import Signer
from cenacle.documents.base import b64
from cenacle.errors import EvidenceError

NOW = datetime(2027, 2, 1, 10, 0, 0, tzinfo=UTC)
AMD = "1.3.6.1.4.1.3704.1."
FAMILY_MODEL: dict[str, tuple[int, int]] = {
    "Milan": (0x19, 0x01),
    "Genoa": (0x19, 0x11),
    "Turin": (0x1A, 0x02),
}
# Extension numbers under AMD's arc for each byte of a TCB_VERSION (publication 57230, table 8).
TCB_EXTENSIONS = {
    "Milan": (1, 2, 4, 5, 6, 7, 3, 8),
    "Genoa": (1, 2, 4, 5, 6, 7, 3, 8),
    "Turin": (9, 1, 2, 3, 5, 6, 7, 8),
}
TCBS = {
    "Milan": bytes([4, 1, 0, 0, 0, 0, 24, 219]),
    "Genoa": bytes([10, 2, 0, 0, 0, 0, 23, 84]),
    "Turin": bytes([3, 5, 2, 9, 0, 0, 0, 71]),
}


@cache
def rsa_key(which: str) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


@cache
def vek_key(which: str = "vek") -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP384R1())


def name(common: str) -> x509.Name:
    return x509.Name.build({"common_name": common, "organization_name": "Test Micro Devices"})


PSS = x509.SignedDigestAlgorithm(
    {
        "algorithm": "rsassa_pss",
        "parameters": {
            "hash_algorithm": {"algorithm": "sha384"},
            "mask_gen_algorithm": {"algorithm": "mgf1", "parameters": {"algorithm": "sha384"}},
            "salt_length": 48,
        },
    }
)


def sign(tbs: bytes, key: rsa.RSAPrivateKey) -> bytes:
    return key.sign(tbs, padding.PSS(padding.MGF1(hashes.SHA384()), 48), hashes.SHA384())


def integer(value: int) -> bytes:
    return core.Integer(value).dump()  # type: ignore[no-any-return]


def extension(oid: str, value: bytes, critical: bool = False) -> dict[str, Any]:
    return {"extn_id": oid, "critical": critical, "extn_value": core.ParsableOctetString(value)}


@dataclass
class Card:
    """A certificate to be: change a field, then :meth:`der`."""

    subject: str
    issuer: str
    key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey
    signing: rsa.RSAPrivateKey
    serial: int = 0
    not_before: datetime = NOW - timedelta(days=30)
    not_after: datetime = NOW + timedelta(days=30)
    extensions: list[dict[str, Any]] = field(default_factory=list)
    algorithm: Any = PSS

    def der(self) -> bytes:
        public = self.key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        tbs = x509.TbsCertificate(
            {
                "version": "v3",
                "serial_number": self.serial,
                "signature": self.algorithm,
                "issuer": name(self.issuer),
                "validity": {
                    "not_before": x509.Time({"utc_time": self.not_before}),
                    "not_after": x509.Time({"utc_time": self.not_after}),
                },
                "subject": name(self.subject),
                "subject_public_key_info": x509.PublicKeyInfo.load(public),
                "extensions": self.extensions,
            }
        )
        return x509.Certificate(  # type: ignore[no-any-return]
            {
                "tbs_certificate": tbs,
                "signature_algorithm": self.algorithm,
                "signature_value": sign(tbs.dump(), self.signing),
            }
        ).dump()


CA = [
    extension("2.5.29.19", bytes.fromhex("30060101ff020100"), critical=True),
    extension("2.5.29.15", bytes.fromhex("03020104"), critical=True),
]


def authority(subject: str, issuer: str, key: str, signing: str, **changes: Any) -> Card:
    card = Card(subject, issuer, rsa_key(key), rsa_key(signing), serial=65537, extensions=list(CA))
    return replace(card, **changes)


def ark(product: str) -> Card:
    return authority(f"ARK-{product}", f"ARK-{product}", "ark", "ark", serial=65536)


def ask(product: str, **changes: Any) -> Card:
    return authority(f"SEV-{product}", f"ARK-{product}", "ask", "ark", **changes)


def ask_on_curve() -> bytes:
    return replace(ask("Milan"), key=vek_key()).der()


def asvk(product: str, **changes: Any) -> Card:
    return authority(f"SEV-VLEK-{product}", f"ARK-{product}", "asvk", "ark", **changes)


@cache
def roots() -> dict[str, ProductRoots]:
    return {
        product: ProductRoots(ark(product).der(), ask(product).der(), asvk(product).der())
        for product in FAMILY_MODEL
    }


def hwid(product: str) -> bytes:
    return bytes(range(1, 9)) if product == "Turin" else bytes(range(1, 65))


def leaf(product: str, signer: str = "VCEK", tcb: bytes | None = None) -> Card:
    vlek = signer == "VLEK"
    tcb = TCBS[product] if tcb is None else tcb
    of_key = (
        extension(f"{AMD}5", core.IA5String("CN=cc-test.example.com").dump())
        if vlek
        else extension(f"{AMD}4", hwid(product))
    )
    return Card(
        f"SEV-{signer}",
        f"SEV-VLEK-{product}" if vlek else f"SEV-{product}",
        vek_key(),
        rsa_key("asvk" if vlek else "ask"),
        extensions=[
            extension(f"{AMD}1", integer(int(product == "Turin"))),
            extension(f"{AMD}2", core.IA5String(f"{product}-B1").dump()),
            *(
                extension(f"{AMD}3.{number}", integer(value))
                for number, value in zip(TCB_EXTENSIONS[product], tcb, strict=True)
            ),
            of_key,
        ],
    )


def leaf_by(issuer: str, key: str = "ask") -> bytes:
    """A Milan VCEK that another authority signed, or that was signed with another key."""
    card = leaf("Milan")
    card.issuer, card.signing = issuer, rsa_key(key)
    return card.der()


GUIDS = {
    "VCEK": "63da758d-e664-4564-adc5-f4b93be8accd",
    "VLEK": "a8074bc2-a25a-483e-aae6-39c045a0b8a1",
    "ASK": "4ab7b379-bbac-4fe4-a02f-05aef327c782",
    "ARK": "c0b406a4-a803-4952-9743-3fb6014cd0ae",
    "other": "ecae0c0f-9502-43b1-afa2-0ae2e0d565b6",
}


def make_table(entries: dict[str, bytes]) -> bytes:
    """The certificate table of the GHCB specification."""
    at = (len(entries) + 1) * 24
    header, data = b"", b""
    for which, value in entries.items():
        place = (at + len(data)).to_bytes(4, "little") + len(value).to_bytes(4, "little")
        header += bytes.fromhex(GUIDS[which].replace("-", "")) + place
        data += value
    return header + bytes(24) + data


def revocation_list(product: str, serials: tuple[int, ...] = (), **changes: Any) -> bytes:
    tbs = crl.TbsCertList(
        {
            "version": "v2",
            "signature": PSS,
            "issuer": name(f"ARK-{product}"),
            "this_update": x509.Time({"utc_time": NOW - timedelta(days=1)}),
            "next_update": x509.Time({"utc_time": NOW + timedelta(days=1)}),
            "revoked_certificates": [
                {
                    "user_certificate": serial,
                    "revocation_date": x509.Time({"utc_time": NOW - timedelta(days=2)}),
                }
                for serial in serials
            ],
            **changes,
        }
    )
    return crl.CertificateList(  # type: ignore[no-any-return]
        {
            "tbs_cert_list": tbs,
            "signature_algorithm": PSS,
            "signature": sign(tbs.dump(), rsa_key("ark")),
        }
    ).dump()


def sign_report(report: bytearray, key: ec.EllipticCurvePrivateKey) -> bytes:
    signature = key.sign(bytes(report[:0x2A0]), ec.ECDSA(hashes.SHA384()))
    r, s = decode_dss_signature(signature)
    report[0x2A0:0x2E8] = r.to_bytes(72, "little")
    report[0x2E8:0x330] = s.to_bytes(72, "little")
    return bytes(report)


@dataclass
class Guest:
    """An SNP guest on some machine: change a field or bytes of the report, then :meth:`evidence`.

    Attributes:
        put: bytes to write into the report, by offset, before it is signed.
    """

    product: Product = "Milan"
    version: int = 3
    signer: Signer = "VCEK"
    policy: int = 1 << 17 | 0x0137  # ABI 1.55
    platform: int = 1 << 5
    vmpl: int = 0
    guest_svn: int = 0
    key_info: int = 0
    report_data: bytes = bytes(range(64))
    measurement: bytes = b"\x4d" * 48
    chip_id: bytes | None = None
    reported_tcb: bytes | None = None
    launch_tcb: bytes | None = None
    put: dict[int, bytes] = field(default_factory=dict)
    card: Card | None = None
    authorities: tuple[bytes, ...] = ()
    crl: bytes | None = None
    key: ec.EllipticCurvePrivateKey = field(default_factory=vek_key)

    def report(self) -> bytes:
        tcb = self.reported_tcb or TCBS[self.product]
        chip = hwid(self.product) if self.signer == "VCEK" else b""
        report = bytearray(0x4A0)
        for at, data in {
            0x00: self.version.to_bytes(4, "little"),
            0x04: self.guest_svn.to_bytes(4, "little"),
            0x08: self.policy.to_bytes(8, "little"),
            0x30: self.vmpl.to_bytes(4, "little"),
            0x34: (1).to_bytes(4, "little"),
            0x38: tcb,
            0x40: self.platform.to_bytes(8, "little"),
            0x48: (self.key_info | (4 if self.signer == "VLEK" else 0)).to_bytes(4, "little"),
            0x50: self.report_data,
            0x90: self.measurement,
            0x140: b"\x1d" * 32,
            0x160: b"\xff" * 32,
            0x180: tcb,
            0x188: bytes([*FAMILY_MODEL[self.product], 1]) if self.version > 2 else b"",
            0x1A0: self.chip_id if self.chip_id is not None else chip,
            0x1E0: tcb,
            0x1E8: bytes([29, 55, 1, 0, 29, 55, 1, 0]),
            0x1F0: self.launch_tcb or tcb,
            **self.put,
        }.items():
            report[at : at + len(data)] = data
        return sign_report(report, self.key)

    def leaf(self) -> bytes:
        return (self.card or leaf(self.product, self.signer)).der()

    def body(self) -> dict[str, Any]:
        certificates = [b64(der) for der in (self.leaf(), *self.authorities)]
        body: dict[str, Any] = {"report": b64(self.report()), "certificates": certificates}
        return body if self.crl is None else {**body, "crl": b64(self.crl)}

    def evidence(self) -> Evidence:
        return Evidence(kind="snp", body=self.body())


def b64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def jwk(key: rsa.RSAPrivateKey, kid: str = "HCLAkPub", **changes: Any) -> dict[str, Any]:
    numbers = key.public_key().public_numbers()
    n = numbers.n.to_bytes((numbers.n.bit_length() + 7) // 8, "big")
    e = numbers.e.to_bytes(3, "big")
    key_ops = ["sign"] if kid == "HCLAkPub" else ["encrypt"]
    fields = {"kid": kid, "key_ops": key_ops, "kty": "RSA", "e": b64url(e), "n": b64url(n)}
    return {**fields, **changes}


def make_hcl_report(report: bytes, runtime: bytes, **changes: int) -> bytes:
    """OpenHCL's ATTESTATION_REPORT, padded to the NV index."""
    fields = {"version": 1, "request": 2, "status": 0, "data_version": 1, "type": 2, "hash": 1}
    fields |= {"size": 32 + 1184 + 20 + len(runtime), "data_size": 20 + len(runtime)}
    fields |= {"length": len(runtime), **changes}
    header = struct.pack(
        "<4s4I12x", b"HCLA", *(fields[n] for n in ("version", "size", "request", "status"))
    )
    names = ("data_size", "data_version", "type", "hash", "length")
    return header + report + struct.pack("<5I", *(fields[n] for n in names)) + runtime + bytes(9)


@dataclass
class AzureVm:
    """A confidential VM in Azure: change a part, then :meth:`evidence`.

    Attributes:
        runtime: the paravisor's JSON; :meth:`runtime_data` gives its bytes.
        registers: of the SHA-256 bank.
        selection: TPML_PCR_SELECTION of the quote.
        kind: TPM_ST of what the vTPM signs.
    """

    guest: Guest = field(default_factory=Guest)
    nonce: bytes = hashlib.sha256(bytes(range(64))).digest()
    registers: dict[int, bytes] = field(
        default_factory=lambda: {n: bytes([n]) * 32 for n in range(24)}
    )
    selection: bytes = bytes.fromhex("00000001000b03ffffff")
    kind: int = 0x8018
    magic: bytes = b"\xffTCG"
    signing: rsa.RSAPrivateKey | None = None
    runtime: dict[str, Any] = field(
        default_factory=lambda: {
            "keys": [jwk(rsa_key("ak")), jwk(rsa_key("other"), "HCLEkPub")],
            "vm-configuration": {
                "console-enabled": False,
                "secure-boot": True,
                "tpm-enabled": True,
                "vmUniqueId": "26F8BC30-774E-4290-8E7A-535F3B672AEE",
            },
            "user-data": "00" * 64,
        }
    )
    text: bytes | None = None
    unused: bytes = bytes(32)

    def runtime_data(self) -> bytes:
        return json.dumps(self.runtime).encode() if self.text is None else self.text

    def report(self) -> bytes:
        data = hashlib.sha256(self.runtime_data()).digest() + self.unused
        return replace(self.guest, report_data=data).report()

    def attest(self) -> bytes:
        def sized(data: bytes) -> bytes:
            return len(data).to_bytes(2, "big") + data

        digest = hashlib.sha256(b"".join(self.registers.values())).digest()
        return (
            self.magic
            + self.kind.to_bytes(2, "big")
            + sized(b"\x00\x0b" + b"s" * 32)
            + sized(self.nonce)
            + struct.pack(">QIIB", 3513262, 2, 0, 1)
            + struct.pack(">Q", 0x2020031200120003)
            + self.selection
            + sized(digest)
        )

    def signature(self) -> bytes:
        """Without the header of a TPMT_SIGNATURE."""
        key = self.signing or rsa_key("ak")
        return key.sign(self.attest(), padding.PKCS1v15(), hashes.SHA256())

    def body(self) -> dict[str, Any]:
        body = self.guest.body()
        signature = self.signature()
        return {
            **body,
            "report": b64(self.report()),
            "runtime_data": b64(self.runtime_data()),
            "attest": b64(self.attest()),
            "signature": b64(struct.pack(">HHH", 0x14, 0x0B, len(signature)) + signature),
            "registers": {str(n): value.hex() for n, value in self.registers.items()},
        }

    def evidence(self) -> Evidence:
        return Evidence(kind="az-snp-vtpm", body=self.body())

    def trustee(self) -> dict[str, Any]:
        """As the Confidential Containers project writes it, version 1."""
        hcl = make_hcl_report(self.report(), self.runtime_data())
        return {
            "version": 1,
            "hcl_report": base64.urlsafe_b64encode(hcl).decode(),
            "vcek": base64.urlsafe_b64encode(self.guest.leaf()).decode(),
            "tpm_quote": {
                "message": self.attest().hex(),
                "signature": self.signature().hex(),
                "pcrs": [value.hex() for value in self.registers.values()],
            },
        }


@pytest.fixture
def amd() -> Any:
    """Everything above, as one namespace: ``amd.Guest(product="Turin").evidence()``."""
    return sys.modules[__name__]


@pytest.fixture
def verifier() -> SnpVerifier:
    return SnpVerifier(roots())


@pytest.fixture
def refused(verifier: SnpVerifier) -> Callable[..., str]:
    """The reason for which evidence is refused; fails if it is accepted."""

    def refuse(evidence: Evidence, by: Any = verifier, now: datetime = NOW) -> str:
        with pytest.raises(EvidenceError) as caught:
            by.inspect(evidence, now)
        return caught.value.diagnostics()

    return refuse


@pytest.fixture(scope="session")
def evidence_folder() -> Path:
    """Genuine samples, which are no part of the repository."""
    default = Path(__file__).parents[3].parent / "shared" / "evidence"
    folder = Path(os.environ.get("CENACLE_EVIDENCE", default))
    if not folder.is_dir():
        pytest.skip(f"no genuine evidence in {folder} (set CENACLE_EVIDENCE)")
    return folder
