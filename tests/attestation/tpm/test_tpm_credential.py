from __future__ import annotations

import dataclasses
import importlib
import shutil
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from cenacle.attestation.tpm_credential import (
    CERTIFICATE_LIFETIME,
    AttestationKeyCertificate,
    Credential,
    certify_key,
    check_attestation_key,
    check_endorsement_key,
    make_credential,
    open_certificate,
)
from cenacle.attestation.tpm_device import ATTESTATION_KEY, LoadedKey, TpmDevice
from cenacle.attestation.tpm_endorsement import Endorsement, key_digest
from cenacle.attestation.tpm_keys import (
    EccParameters,
    ObjectAttributes,
    Public,
    Scheme,
    Symmetric,
)
from cenacle.attestation.tpm_structures import tpm2b
from cenacle.crypto import SecretBytes, SigningKey
from cenacle.documents.base import b64, sha256_digest
from cenacle.documents.dsse import Envelope
from cenacle.errors import EvidenceError, UnavailableError
from tests.support.swtpm import Tpm

SECRET = bytes(range(32))
NOW = datetime(2027, 2, 1, 10, tzinfo=UTC)
A: type[ObjectAttributes] = ObjectAttributes


def template(name: str) -> Any:
    """An EK template of the TCG's profile, whether or not the TPM has a certificate for it."""
    utils = importlib.import_module("tpm2_pytss.utils")
    asked: list[int] = []

    def read(index: int) -> bytes:
        if not asked:
            asked.append(index)
            return b"certificate"
        raise utils.NoSuchIndex(index)

    made: Any = utils.create_ek_template(name, read)[1]
    return made


@pytest.mark.parametrize("name", ["L-1", "L-2", "H-2", "H-3"])
def test_a_real_tpm_decrypts_the_credential(device: TpmDevice, name: str) -> None:
    """RSA, P-256 and P-384 endorsement keys; SHA-256 with AES-128, SHA-384 with AES-256."""
    with device.attestation_key() as ak, device.primary(template(name)) as ek:
        credential = make_credential(ek.public, ak.public.name, SECRET)
        assert device.activate(ak, ek, credential) == SECRET
        for value in (b"\x00", b"short", SECRET):
            made = make_credential(ek.public, ak.public.name, value)
            assert device.activate(ak, ek, made) == value


def test_two_credentials_of_one_secret_differ(device: TpmDevice) -> None:
    with device.primary(template("L-1")) as ek:
        one, two = (make_credential(ek.public, b"\x00\x0b" + bytes(32), SECRET) for _ in "12")
    assert one.blob != two.blob
    assert one.secret != two.secret


def test_tpm2_tools_make_the_same_structures(device: TpmDevice, tmp_path: Path) -> None:
    if shutil.which("tpm2_makecredential") is None:
        pytest.skip("needs tpm2_makecredential: install Debian's package tpm2-tools")
    with device.attestation_key() as ak, device.primary(template("L-1")) as ek:
        (tmp_path / "ek").write_bytes(tpm2b(ek.public.pack()))
        (tmp_path / "secret").write_bytes(SECRET)
        command = ["tpm2_makecredential", "-T", "none", "-u", "ek", "-s", "secret", "-o", "out"]
        command += ["-n", ak.public.name.hex()]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
        made = (tmp_path / "out").read_bytes()
        assert made[:8].hex() == "badcc0de00000001"
        size = 2 + int.from_bytes(made[8:10], "big")
        theirs = Credential(made[8 : 8 + size], made[8 + size :])
        assert device.activate(ak, ek, theirs) == SECRET
        ours = make_credential(ek.public, ak.public.name, SECRET)
        assert [len(part) for part in ours] == [len(part) for part in theirs]


def test_only_the_named_key_of_the_same_tpm_reads_it(
    device: TpmDevice, other_tpm: Tpm, opened: Callable[[Tpm], Any]
) -> None:
    with device.attestation_key() as ak, device.primary(template("L-1")) as ek:
        credential = make_credential(ek.public, ak.public.name, SECRET)
        stranger = make_credential(ek.public, b"\x00\x0b" + bytes(32), SECRET)
        with pytest.raises(UnavailableError, match="activate the credential"):
            device.activate(ak, ek, stranger)
        with (
            opened(other_tpm) as other,
            other.attestation_key() as mine,
            other.primary(template("L-1")) as theirs,
            pytest.raises(UnavailableError, match="activate the credential"),
        ):
            other.activate(mine, theirs, credential)
        assert device.activate(ak, ek, credential) == SECRET


def test_every_byte_of_a_credential_counts(device: TpmDevice) -> None:
    with device.attestation_key() as ak, device.primary(template("L-2")) as ek:
        credential = make_credential(ek.public, ak.public.name, SECRET)
        for name, whole in credential._asdict().items():
            step = 1 if name == "blob" else 3
            for at in range(2, len(whole), step):  # the first two bytes are the length
                raw = bytearray(whole)
                raw[at] ^= 1
                with pytest.raises((UnavailableError, ValueError)):
                    device.activate(ak, ek, credential._replace(**{name: bytes(raw)}))
        assert device.activate(ak, ek, credential) == SECRET


def _public(**changes: Any) -> Public:
    x = bytes.fromhex("6b17d1f2e12c4247f8bce6e563a440f277037d812deb33a0f4a13945d898c296")
    y = bytes.fromhex("4fe342e2fe1a7f9b8ee7eb4a7c0f9e162bce33576b315ececbb6406837bf51f5")
    key = EccParameters(0x0003, None, x, y)  # the generator of P-256
    return dataclasses.replace(ATTESTATION_KEY, key=key, **changes)


EK = _public(
    attributes=A.FIXED_TPM | A.FIXED_PARENT | A.SENSITIVE_DATA_ORIGIN | A.RESTRICTED | A.DECRYPT,
    scheme=None,
    symmetric=Symmetric(0x0006, 128, 0x0043),
)


@pytest.mark.parametrize("length", [0, 33, 64])
def test_a_secret_fits_the_key(length: int) -> None:
    with pytest.raises(EvidenceError, match="wrong length"):
        make_credential(EK, b"name", bytes(length))


@pytest.mark.parametrize(
    "symmetric",
    [None, Symmetric(0x0013, 128, 0x0043), Symmetric(6, 128, 0x0044), Symmetric(6, 64, 0x0043)],
)
def test_other_ciphers_are_refused(symmetric: Symmetric | None) -> None:
    with pytest.raises(EvidenceError, match="unknown cipher"):
        make_credential(dataclasses.replace(EK, symmetric=symmetric), b"name", SECRET)


NEEDED = ("FIXED_TPM", "FIXED_PARENT", "SENSITIVE_DATA_ORIGIN", "RESTRICTED")


@pytest.mark.parametrize("missing", [*NEEDED, "SIGN"])
def test_an_attestation_key_needs_its_attributes(missing: str) -> None:
    check_attestation_key(_public())
    key = _public(attributes=ATTESTATION_KEY.attributes & ~getattr(A, missing))
    with pytest.raises(EvidenceError, match=f"without {missing.lower().replace('_', '-')}"):
        check_attestation_key(key)


def test_an_attestation_key_only_signs() -> None:
    with pytest.raises(EvidenceError, match="may do more than it should; found decrypt"):
        check_attestation_key(_public(attributes=ATTESTATION_KEY.attributes | A.DECRYPT))


@pytest.mark.parametrize(
    ("scheme", "said"),
    [
        (None, "no signing scheme"),
        (Scheme(0x1C, 0x0B), "no signing scheme"),
        (Scheme(0x18, 0x04), "SHA-1"),
        (Scheme(0x18, 0x12), "unknown"),
    ],
)
def test_an_attestation_key_has_one_strong_scheme(scheme: Scheme | None, said: str) -> None:
    with pytest.raises(EvidenceError, match=said):
        check_attestation_key(_public(scheme=scheme))


def _endorsement(public: Public) -> Endorsement:
    key, root = public.public_key(), sha256_digest(b"root")
    return Endorsement(key, key_digest(key), root, "id:49465800", "SLB9672", "id:000f0010")


@pytest.mark.parametrize("missing", [*NEEDED, "DECRYPT"])
def test_an_endorsement_key_needs_its_attributes(missing: str) -> None:
    check_endorsement_key(EK, _endorsement(EK))
    key = dataclasses.replace(EK, attributes=EK.attributes & ~getattr(A, missing))
    with pytest.raises(EvidenceError, match="other attributes"):
        check_endorsement_key(key, _endorsement(EK))


def test_an_endorsement_key_never_signs() -> None:
    key = dataclasses.replace(EK, attributes=EK.attributes | A.SIGN)
    with pytest.raises(EvidenceError, match="more than it should"):
        check_endorsement_key(key, _endorsement(EK))


def test_an_endorsement_certificate_is_for_the_key_shown(device: TpmDevice) -> None:
    with device.primary(template("L-2")) as ek:
        with pytest.raises(EvidenceError, match="is for another key"):
            check_endorsement_key(ek.public, _endorsement(EK))
        check_endorsement_key(ek.public, _endorsement(ek.public))


ISSUER = SigningKey.from_seed(SecretBytes(b"i" * 32))
STRANGER = SigningKey.from_seed(SecretBytes(b"s" * 32))


def _certified(signer: SigningKey = ISSUER) -> Envelope:
    return certify_key(_public(), _endorsement(EK), signer, NOW)


def _open(fields: Any, now: datetime = NOW) -> AttestationKeyCertificate:
    return open_certificate(fields, [ISSUER.verify_key], now)


def test_a_certificate_says_which_key_is_in_which_tpm() -> None:
    found = _open(_certified().to_fields())
    assert found.key_name == _public().name.hex()
    assert found.ek == key_digest(EK.public_key())
    assert (found.manufacturer, found.model) == ("id:49465800", "SLB9672")


@pytest.mark.parametrize("shift", [timedelta(minutes=-5), timedelta(0), CERTIFICATE_LIFETIME])
def test_a_certificate_counts_for_a_day(shift: timedelta) -> None:
    _open(_certified().to_fields(), NOW + shift)


@pytest.mark.parametrize(
    "shift", [timedelta(minutes=-6), CERTIFICATE_LIFETIME + timedelta(seconds=1)]
)
def test_before_and_after_it_does_not(shift: timedelta) -> None:
    with pytest.raises(EvidenceError, match="not valid now"):
        _open(_certified().to_fields(), NOW + shift)


def test_a_certificate_of_more_than_a_day_is_refused() -> None:
    certificate = _certified().peek(AttestationKeyCertificate)
    longer = certificate.model_copy(update={"expires": "2027-02-03T10:00:00Z"})
    with pytest.raises(EvidenceError, match="at most a day"):
        _open(Envelope.sign(longer, ISSUER).to_fields())


def test_another_issuer_does_not_count() -> None:
    with pytest.raises(EvidenceError, match="not by a trusted issuer"):
        _open(_certified(STRANGER).to_fields())
    with pytest.raises(EvidenceError, match="not by a trusted issuer"):
        _open(_certified().signed_by(STRANGER).to_fields())
    with pytest.raises(EvidenceError, match="expected one by an issuer"):
        open_certificate(_certified().to_fields(), [], NOW)


def test_another_document_by_the_issuer_is_no_certificate() -> None:
    envelope = _certified()
    other = Envelope(envelope.payload, "application/vnd.cenacle.party+json", {})
    with pytest.raises(EvidenceError, match="not genuine"):
        _open(other.signed_by(ISSUER).to_fields())


@pytest.mark.parametrize("fields", [None, 1, "text", [], {}, {"payload": 1}])
def test_what_is_no_envelope_is_refused(fields: Any) -> None:
    with pytest.raises(EvidenceError):
        _open(fields)


def test_every_character_of_a_certificate_counts() -> None:
    fields = _certified().to_fields()
    [signature] = fields["signatures"]
    for name, text in (("payload", fields["payload"]), ("payloadType", fields["payloadType"])):
        for at in range(len(text)):
            with pytest.raises(EvidenceError):
                _open({**fields, name: text[:at] + chr(ord(text[at]) ^ 1) + text[at + 1 :]})
    for name, text in signature.items():
        for at in range(len(text)):
            for mask in (1, 0x20):
                wrong = text[:at] + chr(ord(text[at]) ^ mask) + text[at + 1 :]
                with pytest.raises(EvidenceError):
                    _open({**fields, "signatures": [{**signature, name: wrong}]})


def test_a_loaded_key_can_be_spelled_out(device: TpmDevice) -> None:
    with device.attestation_key() as ak:
        assert isinstance(ak, LoadedKey)
        assert Public.parse(ak.public.pack()) == ak.public
        assert b64(ak.public.pack())
