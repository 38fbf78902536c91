"""A miniature of Intel's world: root, CAs, TCB signing, platforms, quoting enclaves, quotes.

Every part is a field that a test may change before the evidence is made, and everything is
signed with test keys, so that the verifiers run exactly as with Intel's.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.x509.oid import NameOID

from cenacle.attestation.configfs_tsm import TsmReporter
from cenacle.attestation.gramine import GramineQuoter
from cenacle.attestation.sgx import SgxAttester
from cenacle.attestation.tdx import TdxAttester

NOW = datetime(2027, 2, 1, 10, 0, 0, tzinfo=UTC)
INTEL_VENDOR = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")
SGX_EXTENSION = "1.2.840.113741.1.13.1"
FMSPC = "00906ED50000"


def p256() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def raw_signature(key: ec.EllipticCurvePrivateKey, data: bytes) -> bytes:
    r, s = decode_dss_signature(key.sign(data, ec.ECDSA(hashes.SHA256())))
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def raw_public(key: ec.EllipticCurvePrivateKey) -> bytes:
    numbers = key.public_key().public_numbers()
    return numbers.x.to_bytes(32, "big") + numbers.y.to_bytes(32, "big")


def _der(tag: int, content: bytes) -> bytes:
    size = len(content)
    if size < 128:
        return bytes([tag, size]) + content
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(length)]) + length + content


def _oid(dotted: str) -> bytes:
    first, second, *rest = (int(part) for part in dotted.split("."))
    out = bytearray([40 * first + second])
    for part in rest:
        digits = [part & 0x7F]
        while part := part >> 7:
            digits.append(0x80 | (part & 0x7F))
        out += bytes(reversed(digits))
    return _der(6, bytes(out))


def _int(value: int) -> bytes:
    return _der(2, value.to_bytes(value.bit_length() // 8 + 1, "big"))


def _item(suffix: str, value: bytes) -> bytes:
    return _der(0x30, _oid(f"{SGX_EXTENSION}.{suffix}") + value)


@dataclass
class Platform:
    """What Intel certified about one machine (the SGX extension of its PCK certificate)."""

    cpu_svn: bytes = bytes([5] * 8 + [0] * 8)
    pce_svn: int = 13
    fmspc: str = FMSPC
    pce_id: str = "0000"
    ppid: bytes = b"p" * 16
    sgx_type: int = 1
    instance: bytes = b"i" * 16
    dynamic: bool = True
    cached_keys: bool = True
    smt: bool = True

    def extension(self) -> bytes:
        tcb = b"".join(_item(f"2.{i + 1}", _int(svn)) for i, svn in enumerate(self.cpu_svn))
        tcb += _item("2.17", _int(self.pce_svn)) + _item("2.18", _der(4, self.cpu_svn))
        items = _item("1", _der(4, self.ppid)) + _item("2", _der(0x30, tcb))
        items += _item("3", _der(4, bytes.fromhex(self.pce_id)))
        items += _item("4", _der(4, bytes.fromhex(self.fmspc)))
        items += _item("5", _der(10, bytes([self.sgx_type])))
        if self.sgx_type == 1:
            items += _item("6", _der(4, self.instance))
            flags = (self.dynamic, self.cached_keys, self.smt)
            configuration = b"".join(
                _item(f"7.{i + 1}", _der(1, b"\xff" if flag else b"\0"))
                for i, flag in enumerate(flags)
            )
            items += _item("7", _der(0x30, configuration))
        return _der(0x30, items)


def _name(common: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, common),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Intel Corporation"),
            x509.NameAttribute(NameOID.COUNTRY_NAME, "US"),
        ]
    )


@dataclass
class Pki:
    """Keys and certificates; ``names`` and ``validity`` may be changed before use."""

    root_key: ec.EllipticCurvePrivateKey = field(default_factory=p256)
    ca_key: ec.EllipticCurvePrivateKey = field(default_factory=p256)
    pck_key: ec.EllipticCurvePrivateKey = field(default_factory=p256)
    signer_key: ec.EllipticCurvePrivateKey = field(default_factory=p256)
    root_name: str = "Intel SGX Root CA"
    ca_name: str = "Intel SGX PCK Platform CA"
    pck_name: str = "Intel SGX PCK Certificate"
    signer_name: str = "Intel SGX TCB Signing"
    ca_is_ca: bool = True
    pck_not_after: datetime = NOW + timedelta(days=2000)
    signer_not_after: datetime = NOW + timedelta(days=2000)
    ca_not_after: datetime = NOW + timedelta(days=2000)
    cache: dict[tuple[Any, ...], x509.Certificate] = field(default_factory=dict)

    def certificate(
        self,
        subject: str,
        issuer: str,
        key: ec.EllipticCurvePrivateKey,
        issuer_key: ec.EllipticCurvePrivateKey,
        *,
        ca: int | None = None,
        serial: int = 7,
        not_after: datetime = NOW + timedelta(days=2000),
        sgx: bytes | None = None,
    ) -> x509.Certificate:
        made = (subject, issuer, id(key), id(issuer_key), ca, serial, not_after, sgx)
        if made in self.cache:  # a second signature of the same would be another certificate
            return self.cache[made]
        builder = (
            x509.CertificateBuilder()
            .subject_name(_name(subject))
            .issuer_name(_name(issuer))
            .public_key(key.public_key())
            .serial_number(serial)
            .not_valid_before(datetime(2018, 1, 1, tzinfo=UTC))
            .not_valid_after(not_after)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), False
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
            .add_extension(
                x509.CRLDistributionPoints(
                    [
                        x509.DistributionPoint(
                            [x509.UniformResourceIdentifier("https://example.org/a.crl")],
                            None,
                            None,
                            None,
                        )
                    ]
                ),
                False,
            )
            .add_extension(
                x509.KeyUsage(
                    digital_signature=ca is None,
                    content_commitment=ca is None,
                    key_encipherment=False,
                    data_encipherment=False,
                    key_agreement=False,
                    key_cert_sign=ca is not None,
                    crl_sign=ca is not None,
                    encipher_only=False,
                    decipher_only=False,
                ),
                True,
            )
            .add_extension(x509.BasicConstraints(ca is not None, ca), True)
        )
        if sgx is not None:
            oid = x509.ObjectIdentifier(SGX_EXTENSION)
            builder = builder.add_extension(x509.UnrecognizedExtension(oid, sgx), False)
        self.cache[made] = builder.sign(issuer_key, hashes.SHA256())
        return self.cache[made]

    def root(self) -> x509.Certificate:
        return self.certificate(
            self.root_name, self.root_name, self.root_key, self.root_key, ca=1, serial=1
        )

    def ca(self) -> x509.Certificate:
        return self.certificate(
            self.ca_name,
            self.root_name,
            self.ca_key,
            self.root_key,
            ca=0 if self.ca_is_ca else None,
            serial=2,
            not_after=self.ca_not_after,
        )

    def pck(self, platform: Platform) -> x509.Certificate:
        return self.certificate(
            self.pck_name,
            self.ca_name,
            self.pck_key,
            self.ca_key,
            serial=3,
            not_after=self.pck_not_after,
            sgx=platform.extension(),
        )

    def signer(self) -> x509.Certificate:
        return self.certificate(
            self.signer_name,
            self.root_name,
            self.signer_key,
            self.root_key,
            serial=4,
            not_after=self.signer_not_after,
        )

    def crl(
        self,
        issuer: str,
        key: ec.EllipticCurvePrivateKey,
        revoked: tuple[int, ...],
        next_update: datetime,
    ) -> bytes:
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(_name(issuer))
            .last_update(NOW - timedelta(days=1))
            .next_update(next_update)
            .add_extension(x509.CRLNumber(1), False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), False
            )
        )
        for serial in revoked:
            entry = (
                x509.RevokedCertificateBuilder()
                .serial_number(serial)
                .revocation_date(NOW - timedelta(days=2))
                .build()
            )
            builder = builder.add_revoked_certificate(entry)
        return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def pem(*certificates: x509.Certificate) -> str:
    return "".join(c.public_bytes(serialization.Encoding.PEM).decode() for c in certificates)


def stamp(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def level(
    sgx: bytes, pce: int, status: str, advisories: tuple[str, ...] = (), tdx: bytes = b""
) -> dict[str, Any]:
    tcb: dict[str, Any] = {"sgxtcbcomponents": [{"svn": svn} for svn in sgx], "pcesvn": pce}
    if tdx:
        tcb["tdxtcbcomponents"] = [{"svn": svn} for svn in tdx]
    out = {"tcb": tcb, "tcbDate": "2026-11-12T00:00:00Z", "tcbStatus": status}
    return {**out, "advisoryIDs": list(advisories)} if advisories else out


def isv_level(svn: int, status: str, advisories: tuple[str, ...] = ()) -> dict[str, Any]:
    out = {"tcb": {"isvsvn": svn}, "tcbDate": "2026-11-12T00:00:00Z", "tcbStatus": status}
    return {**out, "advisoryIDs": list(advisories)} if advisories else out


QE_SIGNER = bytes([0xA1]) * 32


def enclave_report(**changed: Any) -> bytes:
    """384 bytes; Intel SDM vol. 3D, table 37-21 (REPORT, its MACed part)."""
    f: dict[str, Any] = {
        "cpu_svn": b"\x05" * 16,
        "misc_select": 0,
        "cet": 0,
        "isv_ext_prod_id": bytes(16),
        "attributes": bytes.fromhex("0500000000000000e700000000000000"),
        "mr_enclave": b"\xe1" * 32,
        "mr_signer": b"\x51" * 32,
        "config_id": bytes(64),
        "isv_prod_id": 3,
        "isv_svn": 9,
        "config_svn": 0,
        "isv_family_id": bytes(16),
        "report_data": bytes(range(64)),
        **changed,
    }
    head = f["cpu_svn"] + struct.pack("<IB11x", f["misc_select"], f["cet"]) + f["isv_ext_prod_id"]
    head += f["attributes"] + f["mr_enclave"] + bytes(32) + f["mr_signer"] + bytes(32)
    head += f["config_id"] + struct.pack("<HHH", f["isv_prod_id"], f["isv_svn"], f["config_svn"])
    out: bytes = head + bytes(42) + f["isv_family_id"] + f["report_data"]
    assert len(out) == 384
    return out


TD_FIELDS: tuple[tuple[str, int], ...] = (
    ("tee_tcb_svn", 16),
    ("mr_seam", 48),
    ("mr_signer_seam", 48),
    ("seam_attributes", 8),
    ("td_attributes", 8),
    ("xfam", 8),
    ("mr_td", 48),
    ("mr_config_id", 48),
    ("mr_owner", 48),
    ("mr_owner_config", 48),
    ("rtmr0", 48),
    ("rtmr1", 48),
    ("rtmr2", 48),
    ("rtmr3", 48),
    ("report_data", 64),
)
TD15_FIELDS = (("tee_tcb_svn2", 16), ("mr_service_td", 48))


def td_report(version: str = "1.0", **changed: bytes) -> bytes:
    """584 (1.0) or 648 (1.5) bytes."""
    f = {
        "tee_tcb_svn": bytes([7, 1, 3] + [0] * 13),
        "tee_tcb_svn2": bytes([7, 1, 3] + [0] * 13),
        "mr_seam": b"\x5e" * 48,
        "td_attributes": bytes([0, 0, 0, 0x10, 0, 0, 0, 0]),
        "xfam": bytes.fromhex("e702060000000000"),
        "mr_td": b"\xd1" * 48,
        "rtmr0": b"\x00\x01" * 24,
        "rtmr1": b"\x01\x01" * 24,
        "rtmr2": b"\x02\x01" * 24,
        "report_data": bytes(range(64)),
        **changed,
    }
    names = TD_FIELDS + (TD15_FIELDS if version == "1.5" else ())
    out = b"".join(f.get(name, bytes(size)) for name, size in names)
    assert len(out) == (648 if version == "1.5" else 584)
    return out


@dataclass
class World:
    """One platform and its collateral. Change fields, then call :meth:`sgx` or :meth:`tdx`."""

    pki: Pki = field(default_factory=Pki)
    platform: Platform = field(default_factory=Platform)
    attestation_key: ec.EllipticCurvePrivateKey = field(default_factory=p256)
    tee: str = "sgx"
    issued: datetime = NOW - timedelta(days=1)
    next_update: datetime = NOW + timedelta(days=29)
    crl_next_update: datetime = NOW + timedelta(days=29)
    revoked_by_root: tuple[int, ...] = ()
    revoked_by_ca: tuple[int, ...] = ()
    tcb_info: dict[str, Any] = field(default_factory=dict)
    qe_identity: dict[str, Any] = field(default_factory=dict)
    levels: list[dict[str, Any]] | None = None
    modules: list[dict[str, Any]] | None = None
    qe_levels: list[dict[str, Any]] | None = None
    qe: dict[str, Any] = field(default_factory=dict)
    qe_auth_data: bytes = bytes(range(32))
    certification_type: int = 5
    chain: str | None = None
    signed_by: ec.EllipticCurvePrivateKey | None = None
    padding: bytes = b""
    attached: dict[str, Any] = field(default_factory=dict)

    @property
    def root_pem(self) -> str:
        return pem(self.root)

    @property
    def root(self) -> x509.Certificate:
        return self.pki.root()

    def pck_chain(self) -> str:
        if self.chain is not None:
            return self.chain
        return pem(self.pki.pck(self.platform), self.pki.ca(), self.root)

    def tcb_info_text(self) -> str:
        svn = self.platform.cpu_svn
        old = bytes(max(0, b - 1) for b in svn)
        tdx = self.tee == "tdx"
        current, before = bytes([5, 0, 3] + [0] * 13), bytes([4, 0, 2] + [0] * 13)
        levels = self.levels or [
            level(svn, 13, "UpToDate", (), current if tdx else b""),
            level(old, 11, "OutOfDate", ("INTEL-SA-01036",), before if tdx else b""),
        ]
        fields: dict[str, Any] = {
            "id": "TDX" if tdx else "SGX",
            "version": 3,
            "issueDate": stamp(self.issued),
            "nextUpdate": stamp(self.next_update),
            "fmspc": self.platform.fmspc,
            "pceId": self.platform.pce_id,
            "tcbType": 0,
            "tcbEvaluationDataNumber": 18,
        }
        if tdx:
            any_module = {
                "mrsigner": "00" * 48,
                "attributes": "00" * 8,
                "attributesMask": "FF" * 8,
            }
            fields["tdxModule"] = any_module
            fields["tdxModuleIdentities"] = (
                self.modules
                if self.modules is not None
                else [
                    {
                        "id": "TDX_01",
                        **any_module,
                        "tcbLevels": [
                            isv_level(6, "UpToDate"),
                            isv_level(2, "OutOfDate", ("INTEL-SA-01099",)),
                        ],
                    }
                ]
            )
        fields["tcbLevels"] = levels
        return json.dumps({**fields, **self.tcb_info}, separators=(",", ":"))

    def qe_identity_text(self) -> str:
        fields = {
            "id": "TD_QE" if self.tee == "tdx" else "QE",
            "version": 2,
            "issueDate": stamp(self.issued),
            "nextUpdate": stamp(self.next_update),
            "tcbEvaluationDataNumber": 18,
            "miscselect": "00000000",
            "miscselectMask": "FFFFFFFF",
            "attributes": "11000000000000000000000000000000",
            "attributesMask": "FBFFFFFFFFFFFFFF0000000000000000",
            "mrsigner": QE_SIGNER.hex().upper(),
            "isvprodid": 1,
            "tcbLevels": self.qe_levels
            or [isv_level(8, "UpToDate"), isv_level(6, "OutOfDate", ("INTEL-SA-00615",))],
        }
        return json.dumps({**fields, **self.qe_identity}, separators=(",", ":"))

    def collateral(self) -> dict[str, Any]:
        tcb, qe = self.tcb_info_text(), self.qe_identity_text()
        signer = self.pki.signer()
        issuers = pem(signer, self.root)
        return {
            "pck_crl_issuer_chain": pem(self.pki.ca(), self.root),
            "root_ca_crl": self.pki.crl(
                self.pki.root_name, self.pki.root_key, self.revoked_by_root, self.crl_next_update
            ).hex(),
            "pck_crl": self.pki.crl(
                self.pki.ca_name, self.pki.ca_key, self.revoked_by_ca, self.crl_next_update
            ).hex(),
            "tcb_info_issuer_chain": issuers,
            "tcb_info": tcb,
            "tcb_info_signature": raw_signature(self.pki.signer_key, tcb.encode()).hex(),
            "qe_identity_issuer_chain": issuers,
            "qe_identity": qe,
            "qe_identity_signature": raw_signature(self.pki.signer_key, qe.encode()).hex(),
            **self.attached,
        }

    def quote(self, version: int, body: bytes) -> bytes:
        tee_type = 0x81 if self.tee == "tdx" else 0
        signed = struct.pack("<HHIHH", version, 2, tee_type, 8, 13) + INTEL_VENDOR + bytes(20)
        if version == 5:
            kind = {384: 1, 584: 2, 648: 3}[len(body)]
            signed += struct.pack("<HI", kind, len(body))
        signed += body
        key = raw_public(self.attestation_key)
        qe_fields = {
            "mr_signer": QE_SIGNER,
            "mr_enclave": b"\x9e" * 32,
            "attributes": bytes.fromhex("1500000000000000e700000000000000"),
            "isv_prod_id": 1,
            "isv_svn": 8,
            "report_data": hashlib.sha256(key + self.qe_auth_data).digest() + bytes(32),
            **self.qe,
        }
        report = enclave_report(**qe_fields)
        qe = report + raw_signature(self.pki.pck_key, report)
        qe += struct.pack("<H", len(self.qe_auth_data)) + self.qe_auth_data
        chain = self.pck_chain().encode() + b"\0"
        qe += struct.pack("<HI", self.certification_type, len(chain)) + chain
        if version >= 4:
            qe = struct.pack("<HI", 6, len(qe)) + qe
        auth = raw_signature(self.signed_by or self.attestation_key, signed) + key + qe
        return signed + struct.pack("<I", len(auth)) + auth + self.padding

    def body(self, quote: bytes, **more: Any) -> dict[str, Any]:
        """The evidence body of kind ``sgx`` or ``tdx``."""
        return {
            "quote": base64.b64encode(quote).decode(),
            "collateral": self.collateral(),
            **more,
        }

    def sgx(self, version: int = 3, **report: Any) -> dict[str, Any]:
        self.tee = "sgx"
        return self.body(self.quote(version, enclave_report(**report)))

    def tdx(self, version: int = 4, td: str = "1.0", **report: bytes) -> dict[str, Any]:
        self.tee = "tdx"
        return self.body(self.quote(version, td_report(td, **report)))


@pytest.fixture(scope="session")
def _keys() -> Pki:
    return Pki()


@pytest.fixture
def world(_keys: Pki) -> World:
    """A fresh world (keys are shared by the session, everything else may be changed)."""
    keys = Pki(_keys.root_key, _keys.ca_key, _keys.pck_key, _keys.signer_key)
    keys.cache = _keys.cache
    return World(keys)


@pytest.fixture
def now() -> datetime:
    return NOW


@pytest.fixture
def sgx_report() -> Callable[..., bytes]:
    return enclave_report


@pytest.fixture(name="td_report")
def _td_report() -> Callable[..., bytes]:
    return td_report


@pytest.fixture
def tcb_level() -> Callable[..., dict[str, Any]]:
    return level


@pytest.fixture
def svn_level() -> Callable[..., dict[str, Any]]:
    return isv_level


@pytest.fixture
def pem_of() -> Callable[..., str]:
    return pem


class QuotingQuoter(GramineQuoter):
    """Gramine's files in a folder; like Gramine it makes the quote of what was written."""

    def __init__(self, folder: Path, make: Callable[[bytes], bytes]) -> None:
        super().__init__(folder)
        self.folder = folder
        self.make = make

    def quote(self, report_data: bytes) -> bytes:
        if len(report_data) == 64:
            (self.folder / "quote").write_bytes(self.make(report_data))
        return super().quote(report_data)


@pytest.fixture
def gramine(tmp_path: Path) -> Callable[..., tuple[SgxAttester, Path]]:
    """An attester on Gramine's files, and their folder; the collateral lies beside it."""

    def make(world: World, quote: bytes | None = None) -> tuple[SgxAttester, Path]:
        world.tee = "sgx"
        folder = tmp_path / "attestation"
        folder.mkdir(exist_ok=True)
        (folder / "attestation_type").write_text("dcap")
        (folder / "user_report_data").write_bytes(bytes(64))
        path = tmp_path / "collateral.json"
        path.write_text(json.dumps(world.collateral()))

        def answer(data: bytes) -> bytes:
            return world.quote(3, enclave_report(report_data=data)) if quote is None else quote

        return SgxAttester(path, QuotingQuoter(folder, answer)), folder

    return make


class Kernel:
    """configfs-tsm by its documented rules; stands where ``TsmDirectory`` does.

    Attributes:
        races: how many times another writer changes the options before the report is read.
        quiet: whether the kernel hands out the other's report instead of EWOULDBLOCK.
        failures: step or attribute to the error number of its failure.
    """

    def __init__(self) -> None:
        self.available = True
        self.provider = "tdx_guest"
        self.aux: bytes | None = None
        self.make_report: Callable[[bytes], bytes] = lambda inblob: b"report of " + inblob
        self.races = 0
        self.quiet = False
        self.failures: dict[str, int] = {}
        self.levels: list[str] = []
        self.calls: list[tuple[str, str, str]] = []
        self.reports: dict[str, dict[str, Any]] = {}

    def _fail(self, step: str) -> None:
        if (code := self.failures.get(step)) is not None:
            raise OSError(code, os.strerror(code))

    def make(self, name: str) -> None:
        self.calls.append(("make", name, ""))
        self._fail("make")
        if name in self.reports:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        self.reports[name] = {"inblob": b"", "generation": 0}

    def remove(self, name: str) -> None:
        self.calls.append(("remove", name, ""))
        del self.reports[name]

    def write(self, name: str, attribute: str, data: bytes) -> None:
        self.calls.append(("write", name, attribute))
        self._fail(attribute)
        report = self.reports[name]
        if attribute == "inblob":
            if not 1 <= len(data) <= 64:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            report["inblob"] = data
        elif attribute == "privlevel":
            self.levels.append(data.decode())
        else:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        report["generation"] += 1

    def read(self, name: str, attribute: str) -> bytes:
        self.calls.append(("read", name, attribute))
        self._fail(attribute)
        report = self.reports[name]
        if attribute == "provider":
            return f"{self.provider}\n".encode()
        if attribute == "generation":
            return f"{report['generation']}\n".encode()
        if attribute == "auxblob":
            if self.aux is None:
                raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
            return self.aux
        if attribute != "outblob" or not report["inblob"]:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        if self.races:
            self.races -= 1
            report["inblob"] = b"another"
            report["generation"] += 1
            if not self.quiet:
                raise OSError(errno.EWOULDBLOCK, os.strerror(errno.EWOULDBLOCK))
        return self.make_report(report["inblob"])


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


@pytest.fixture
def tdx_guest(tmp_path: Path, kernel: Kernel) -> Callable[..., tuple[TdxAttester, Kernel]]:
    """An attester on a kernel that quotes a domain with some RTMRs, and an event log table."""

    def make(
        world: World, rtmrs: dict[str, bytes] | None = None, ccel: Path | None = None
    ) -> tuple[TdxAttester, Kernel]:
        world.tee = "tdx"
        values = {f"rtmr{i}": bytes(48) for i in range(4)} | (rtmrs or {})
        path = tmp_path / "collateral.json"
        path.write_text(json.dumps(world.collateral()))
        kernel.make_report = lambda inblob: world.quote(
            5, td_report("1.5", report_data=inblob, **values)
        )
        reporter = TsmReporter(kernel)  # type: ignore[arg-type]
        return TdxAttester(path, reporter, ccel or tmp_path / "no-CCEL"), kernel

    return make


@pytest.fixture(scope="session")
def evidence_folder() -> Path:
    """Genuine, vendor-signed samples; not a part of the repository."""
    given = os.environ.get("CENACLE_EVIDENCE")
    folder = Path(given) if given else Path(__file__).parents[4] / "shared" / "evidence"
    if not (folder / "dcap").is_dir():
        pytest.skip(f"genuine evidence is not here: {folder} (set CENACLE_EVIDENCE)")
    return folder
