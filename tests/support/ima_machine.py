"""A machine with a TPM of a made-up vendor and a kernel that measures, in this process."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.x509.oid import NameOID

from cenacle.attestation.claims import Evidence
from cenacle.attestation.event_log import Event, EventLog, EventType, extend
from cenacle.attestation.ima import ALLOW_LIST, ImaVerifier, pack_list
from cenacle.attestation.ima_allow import AllowList
from cenacle.attestation.ima_list import ImaEntry, replay
from cenacle.attestation.tpm import qualifying_data
from cenacle.attestation.tpm_attester import BOOT_REGISTERS
from cenacle.attestation.tpm_credential import certify_key
from cenacle.attestation.tpm_device import ATTESTATION_KEY
from cenacle.attestation.tpm_endorsement import Endorsement, certificate_digest, key_digest
from cenacle.attestation.tpm_keys import EccParameters, Public, Signature
from cenacle.attestation.tpm_structures import (
    Attest,
    ClockInfo,
    PcrSelection,
    QuoteInfo,
    digest_of,
    pcr_composite,
)
from cenacle.crypto import SecretBytes, SigningKey
from cenacle.documents.base import b64

__all__ = ["NOW", "REPORT", "Machine", "entry"]

NOW = datetime(2027, 2, 1, 10, 0, 0, tzinfo=UTC)
REPORT = bytes(range(64))
_SHA256 = 0x000B
_ENDORSEMENT = (0x4000000B).to_bytes(4, "big")


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def entry(
    name: str | bytes,
    content: bytes = b"",
    template: bytes = b"ima-sig",
    *,
    digest: bytes | None = None,
    algorithm: str = "sha256",
    extra: tuple[bytes, ...] | None = None,
    violation: bool = False,
    register: int = 10,
) -> ImaEntry:
    """An entry as the kernel makes it."""
    path = name.encode() if isinstance(name, str) else name
    found = hashlib.new(algorithm, content).digest() if digest is None else digest
    found = bytes(len(found)) if violation else found
    if extra is None:
        extra = {b"ima-ng": (), b"ima-buf": (content,)}.get(template, (b"",))
    fields = (algorithm.encode() + b":\0" + found, path + b"\0", *extra)
    data = b"".join(len(part).to_bytes(4, "little") + part for part in fields)
    return ImaEntry(register, template, algorithm, found, path, data, extra, violation)


@dataclass
class Machine:
    """A machine with a TPM of a made-up vendor, in this process; tests change a part."""

    files: dict[str, bytes] = field(
        default_factory=lambda: {"/sbin/init": b"init", "/usr/bin/agent": b"agent"}
    )
    entries: list[ImaEntry] = field(default_factory=list)
    events: tuple[Event, ...] = (
        Event.measuring(4, EventType.EV_EFI_ACTION, b"Calling EFI Application", ("sha256",)),
        *[Event.measuring(n, EventType.EV_SEPARATOR, bytes(4), ("sha256",)) for n in range(8)],
    )
    resets: int = 7
    restarts: int = 1
    clock: int = 1000
    quoted: tuple[int, ...] = (*BOOT_REGISTERS, 10)
    changed: dict[int, bytes] = field(default_factory=dict)
    seed: int = 1

    def __post_init__(self) -> None:
        self._key = ec.derive_private_key(1000 + self.seed, ec.SECP256R1())
        self._issuer = SigningKey.from_seed(SecretBytes(b"b" * 32))
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a vendor of TPMs")])
        self.root = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .serial_number(1)
            .public_key(self._key.public_key())
            .not_valid_before(NOW - timedelta(days=1))
            .not_valid_after(NOW + timedelta(days=1))
            .sign(self._key, hashes.SHA256())
        )
        if not self.entries:
            self.entries = [entry("boot_aggregate", digest=self.aggregate())]
            self.entries += [entry(name, content) for name, content in self.files.items()]

    def boot_registers(self) -> dict[int, bytes]:
        log = EventLog(("sha256",), self.events)
        return {n: bytes(32) for n in range(24)} | log.replay("sha256") | self.changed

    def aggregate(self) -> bytes:
        return sha256(b"".join(self.boot_registers()[n] for n in range(10)))

    def registers(self) -> dict[int, bytes]:
        return {**self.boot_registers(), 10: replay(self.entries), **self.changed}

    @property
    def allow_list(self) -> AllowList:
        return AllowList({name: [sha256(content)] for name, content in self.files.items()})

    def run(self, name: str, content: bytes = b"") -> None:
        """The kernel measures one more file."""
        self.entries.append(entry(name, content))
        self.clock += 1000

    def quote(self, bound: bytes) -> dict[str, Any]:
        numbers = self._key.public_key().public_numbers()
        point = (n.to_bytes(32, "big") for n in (numbers.x, numbers.y))
        public = Public(
            _SHA256,
            ATTESTATION_KEY.attributes,
            b"",
            None,
            ATTESTATION_KEY.scheme,
            EccParameters(0x0003, None, *point),
        )
        shown = {n: self.registers()[n] for n in self.quoted}
        selection = PcrSelection(_SHA256, tuple(sorted(shown)))
        attest = Attest(
            _SHA256.to_bytes(2, "big") + digest_of(_SHA256, _ENDORSEMENT + public.name),
            qualifying_data(bound),
            ClockInfo(self.clock, self.resets, self.restarts, True),
            0x0001000200030004,
            QuoteInfo((selection,), pcr_composite(_SHA256, shown)),
        ).pack()
        r, s = decode_dss_signature(self._key.sign(attest, ec.ECDSA(hashes.SHA256())))
        signature = Signature(0x0018, _SHA256, r.to_bytes(32, "big"), s.to_bytes(32, "big"))
        endorsement = Endorsement(
            self._key.public_key(),
            key_digest(self._key.public_key()),
            certificate_digest(self.root),
            "id:49465800",
            "a model",
            "id:00070055",
        )
        return {
            "certificate": certify_key(public, endorsement, self._issuer, NOW).to_fields(),
            "key": b64(public.pack()),
            "attest": b64(attest),
            "signature": b64(signature.pack()),
            "registers": {str(n): value.hex() for n, value in shown.items()},
        }

    def evidence(
        self,
        bound: bytes = REPORT,
        *,
        first: int = 0,
        entries: Iterable[ImaEntry] | None = None,
        log: bool = True,
        fields: Mapping[str, Any] | None = None,
    ) -> Evidence:
        """Evidence of this moment; ``fields`` replaces some of its body."""
        listed = self.entries[first:] if entries is None else entries
        body: dict[str, Any] = {"quote": self.quote(bound), "list": pack_list(listed)}
        body |= {ALLOW_LIST: self.allow_list.digest}
        if first:
            body["first"] = first
        if log:
            body["log"] = b64(EventLog(("sha256",), self.events).to_bytes())
        return Evidence(kind="ima", body={**body, **(fields or {})})

    def verifier(self, *lists: AllowList) -> ImaVerifier:
        return ImaVerifier(
            [self._issuer.verify_key], [self.root], allow_lists=lists or [self.allow_list]
        )

    def after(self, register: bytes, digest: bytes) -> bytes:
        return extend("sha256", register, digest)
