from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID, ObjectIdentifier
from hypothesis import given, settings
from hypothesis import strategies as st

from cenacle.attestation.tpm_endorsement import (
    Endorsement,
    certificate_digest,
    key_digest,
    load_certificate,
    vendor_of,
    verify_endorsement,
)
from cenacle.attestation.tpm_roots import VENDOR_ROOTS, vendor_roots
from cenacle.errors import EvidenceError
from tests.support.swtpm import Manufacturer, Tpm

NOW = datetime(2027, 2, 1, 10, tzinfo=UTC)
DAY = timedelta(days=1)
ROOT_KEY, ISSUER_KEY, EK_KEY, OTHER_KEY = (ec.generate_private_key(ec.SECP256R1()) for _ in "1234")
RSA_KEY = rsa.generate_private_key(65537, 2048)
SHORT_KEY = rsa.generate_private_key(65537, 1024)
EK_PURPOSE = "2.23.133.8.1"


def name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)] if text else [])


def usage(**on: bool) -> x509.KeyUsage:
    kinds = "digital_signature content_commitment key_encipherment data_encipherment "
    kinds += "key_agreement key_cert_sign crl_sign encipher_only decipher_only"
    return x509.KeyUsage(**{kind: on.get(kind, False) for kind in kinds.split()})


def identity(
    manufacturer: str | None = "id:49465800", model: str = "SLB9672", version: str = "id:0010"
) -> x509.SubjectAlternativeName:
    values = ((1, manufacturer), (2, model), (3, version))
    return x509.SubjectAlternativeName(
        [
            x509.DirectoryName(
                x509.Name(
                    x509.NameAttribute(ObjectIdentifier(f"2.23.133.2.{n}"), value)
                    for n, value in values
                    if value
                )
            )
        ]
    )


@dataclass
class Certificate:
    """A certificate to be; tests change a part."""

    subject: str
    issuer: str
    key: Any
    signer: Any
    extensions: dict[str, tuple[x509.ExtensionType, bool]] = field(default_factory=dict)
    start: datetime = NOW - DAY
    end: datetime = NOW + DAY

    def without(self, kind: str) -> Certificate:
        return replace(self, extensions={k: v for k, v in self.extensions.items() if k != kind})

    def having(self, kind: str, value: x509.ExtensionType, critical: bool = True) -> Certificate:
        return replace(self, extensions={**self.extensions, kind: (value, critical)})

    def build(self) -> x509.Certificate:
        builder = x509.CertificateBuilder(
            name(self.issuer), name(self.subject), self.key.public_key(), 7, self.start, self.end
        )
        for value, critical in self.extensions.values():
            builder = builder.add_extension(value, critical)
        return builder.sign(self.signer, hashes.SHA256())


def authority(subject: str, issuer: str, key: Any, signer: Any, length: int | None = None) -> Any:
    return Certificate(
        subject,
        issuer,
        key,
        signer,
        {
            "constraints": (x509.BasicConstraints(True, length), True),
            "usage": (usage(key_cert_sign=True, crl_sign=True), True),
        },
    )


ROOT = authority("root", "root", ROOT_KEY, ROOT_KEY)
ISSUER = authority("issuer", "root", ISSUER_KEY, ROOT_KEY)
EK = Certificate(
    "",
    "issuer",
    EK_KEY,
    ISSUER_KEY,
    {
        "identity": (identity(), True),
        "constraints": (x509.BasicConstraints(False, None), True),
        "usage": (usage(key_agreement=True), True),
        "purpose": (x509.ExtendedKeyUsage([ObjectIdentifier(EK_PURPOSE)]), False),
    },
)


def der(certificate: Certificate) -> bytes:
    return certificate.build().public_bytes(Encoding.DER)


def verify(
    ek: Certificate = EK,
    issuer: Certificate | None = ISSUER,
    root: Certificate = ROOT,
    now: datetime = NOW,
) -> Endorsement:
    chain = [der(ek)] + ([] if issuer is None else [der(issuer)])
    return verify_endorsement(chain, [root.build()], now)


def test_a_genuine_chain() -> None:
    root = ROOT.build()
    found = verify_endorsement([der(EK), der(ISSUER)], [root], NOW)
    assert found.digest == key_digest(EK_KEY.public_key())
    assert found.root == certificate_digest(root)
    assert (found.manufacturer, found.model, found.version) == (
        "id:49465800",
        "SLB9672",
        "id:0010",
    )


def test_the_root_itself_and_other_certificates_may_be_sent_too_in_any_order() -> None:
    stranger = authority("other", "root", OTHER_KEY, ROOT_KEY)
    chain = [der(EK), der(ROOT), der(stranger), der(ISSUER)]
    verify_endorsement(chain, [OTHER.build(), ROOT.build()], NOW)


OTHER = authority("other root", "other root", OTHER_KEY, OTHER_KEY)


def test_a_root_may_certify_an_endorsement_key_itself() -> None:
    verify(replace(EK, issuer="root", signer=ROOT_KEY), None)


def test_an_rsa_endorsement_key() -> None:
    key = replace(EK, key=RSA_KEY)
    verify(key.having("usage", usage(key_encipherment=True)))


def test_a_certificate_without_a_purpose_counts() -> None:
    verify(EK.without("purpose"))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: verify(root=OTHER), "does not lead to a trusted root; found issued by CN=root"),
        (lambda: verify(issuer=None), "does not lead to a trusted root; found issued by CN=issuer"),
        (lambda: verify_endorsement([der(EK), der(ISSUER)], [], NOW), "expected a root"),
        (lambda: verify(replace(EK, signer=OTHER_KEY)), "does not lead to a trusted root"),
        (lambda: verify(issuer=replace(ISSUER, signer=OTHER_KEY)), "does not lead"),
        (lambda: verify(root=replace(ROOT, key=OTHER_KEY, signer=OTHER_KEY)), "does not lead"),
        (lambda: verify(now=NOW + 2 * DAY), "is not valid now"),
        (lambda: verify(now=NOW - 2 * DAY), "is not valid now"),
        (lambda: verify(replace(EK, end=NOW - timedelta(seconds=1))), "is not valid now"),
        (lambda: verify(issuer=replace(ISSUER, end=NOW - DAY / 2)), "not valid now.*CN=issuer"),
        (lambda: verify(root=replace(ROOT, end=NOW - DAY / 2)), "not valid now.*CN=root"),
        (lambda: verify(issuer=ISSUER.without("constraints")), "issued by no authority"),
        (
            lambda: verify(issuer=ISSUER.having("constraints", x509.BasicConstraints(False, None))),
            "issued by no authority",
        ),
        (lambda: verify(issuer=ISSUER.without("usage")), "may not sign certificates"),
        (
            lambda: verify(issuer=ISSUER.having("usage", usage(key_agreement=True))),
            "may not sign certificates",
        ),
        (
            lambda: verify(root=ROOT.having("constraints", x509.BasicConstraints(True, 0))),
            "too far above",
        ),
        (
            lambda: verify(
                issuer=ISSUER.having("limits", x509.NameConstraints([x509.DNSName("a")], None))
            ),
            "critical extension that is not understood",
        ),
        (lambda: verify(EK.having("odd", x509.OCSPNoCheck())), "is not understood"),
        (lambda: verify(EK.without("usage")), "does not say what its key is for"),
        (lambda: verify(EK.having("usage", usage(digital_signature=True))), "not for an endors"),
        (lambda: verify(EK.having("usage", usage(key_encipherment=True))), "not for an endors"),
        (
            lambda: verify(EK.having("usage", usage(key_agreement=True, key_cert_sign=True))),
            "is not for an endorsement key",
        ),
        (lambda: verify(replace(EK, key=RSA_KEY)), "not for an endorsement key"),
        (lambda: verify(EK.having("constraints", x509.BasicConstraints(True, None))), "authority"),
        (
            lambda: verify(
                EK.having(
                    "purpose", x509.ExtendedKeyUsage([x509.oid.ExtendedKeyUsageOID.SERVER_AUTH])
                )
            ),
            "is for something else; found 1.3.6.1.5.5.7.3.1",
        ),
        (lambda: verify(EK.without("identity")), "does not name one TPM"),
        (lambda: verify(EK.having("identity", identity(None))), "does not name one TPM"),
        (lambda: verify(EK.having("identity", identity(model="a\x07"))), "does not name one TPM"),
        (
            lambda: verify(
                EK.having("identity", x509.SubjectAlternativeName([x509.DNSName("host")]))
            ),
            "does not name one TPM",
        ),
        (
            lambda: verify(
                EK.having("identity", x509.SubjectAlternativeName([*identity(), *identity("id:1")]))
            ),
            "does not name one TPM; found 2, 2, 2 values",
        ),
        (lambda: verify(replace(EK, key=ed25519.Ed25519PrivateKey.generate())), "unknown key"),
        (lambda: verify(replace(EK, key=SHORT_KEY)), "unknown key"),
        (lambda: verify(replace(EK, key=ec.generate_private_key(ec.SECP256K1()))), "unknown key"),
        (lambda: verify_endorsement([], [ROOT.build()], NOW), "wrong length; found 0"),
        (lambda: verify_endorsement([der(EK)] * 9, [ROOT.build()], NOW), "wrong length; found 9"),
        (lambda: verify_endorsement([b""], [ROOT.build()], NOW), "does not parse"),
        (lambda: verify_endorsement([der(EK)[:-1]], [ROOT.build()], NOW), "does not parse"),
    ],
)
def test_refused(make: Callable[[], object], said: str) -> None:
    with pytest.raises(EvidenceError, match=said):
        make()


def test_a_circle_of_authorities_ends() -> None:
    one = authority("one", "two", ISSUER_KEY, OTHER_KEY)
    two = authority("two", "one", OTHER_KEY, ISSUER_KEY)
    chain = [der(replace(EK, issuer="one")), der(one), der(two)]
    with pytest.raises(EvidenceError, match="does not end"):
        verify_endorsement(chain, [ROOT.build()], NOW)


def test_every_byte_of_the_certificate_counts() -> None:
    genuine, issuer, roots = der(EK), der(ISSUER), [ROOT.build()]
    verify_endorsement([genuine, issuer], roots, NOW)
    for at in range(len(genuine)):
        raw = bytearray(genuine)
        raw[at] ^= 1
        with pytest.raises(EvidenceError):
            verify_endorsement([bytes(raw), issuer], roots, NOW)


@settings(max_examples=60)
@given(st.data())
def test_hostile_bytes_are_refused_with_a_reason(data: Any) -> None:
    raw = bytearray(SAMPLE)
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    for candidate in (bytes(raw), data.draw(st.binary(max_size=80))):
        try:
            load_certificate(candidate)
            verify_endorsement([candidate, der(ISSUER)], [ROOT.build()], NOW)
        except EvidenceError:
            continue
        assert candidate == SAMPLE


SAMPLE = der(EK)


def test_a_real_software_tpms_chain(manufacturer: Manufacturer, tpm: Tpm, device: Any) -> None:
    endorsement = device.endorsement_key()
    chain = [*endorsement.certificates, *tpm.authorities]
    found = verify_endorsement(chain, [manufacturer.root], datetime.now(UTC) + DAY)
    assert (found.manufacturer, found.model) == ("id:00001014", "swtpm")
    with pytest.raises(EvidenceError, match="does not lead to a trusted root"):
        verify_endorsement(chain, vendor_roots(), datetime.now(UTC) + DAY)


def test_pinned_roots_are_what_their_digests_say() -> None:
    assert len({root.digest for root in VENDOR_ROOTS}) == len(VENDOR_ROOTS)
    for pinned, root in zip(VENDOR_ROOTS, vendor_roots(), strict=True):
        whole = root.public_bytes(Encoding.DER)
        assert pinned.digest == "sha256:" + hashlib.sha256(whole).hexdigest()
        assert pinned.origin.startswith("https://")
        assert vendor_of(pinned.digest) == pinned.vendor
        assert root.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        assert root.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
        assert root.not_valid_after_utc > NOW
    assert vendor_of("sha256:" + "0" * 64) is None
