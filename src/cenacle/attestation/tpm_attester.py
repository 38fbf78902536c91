"""The attester of TPM evidence: certify an attestation key once a day, then quote.

The key is a primary key, so the same TPM makes the same key again and its certificate can be
kept for as long as it is valid.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, Final, Protocol

from cenacle.attestation.registry import Attester
from cenacle.attestation.tpm import RESETTABLE, qualifying_data
from cenacle.attestation.tpm_credential import (
    AttestationKeyAnswer,
    AttestationKeyCertificate,
    AttestationKeyChallenge,
    AttestationKeyRequest,
    Credential,
)
from cenacle.attestation.tpm_device import LoadedKey, TpmDevice
from cenacle.attestation.tpm_structures import (
    HASHES,
    Attest,
    PcrSelection,
    QuoteInfo,
    hash_name,
    pcr_composite,
)
from cenacle.documents.base import b64, parse_time, unb64
from cenacle.documents.dsse import Envelope
from cenacle.errors import CenacleError, InputError, UnavailableError

__all__ = ["BOOT_REGISTERS", "KeyIssuer", "TpmAttester", "certify_attestation_key", "make_quote"]

BOOT_REGISTERS: Final = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)
"""What firmware and boot loader measure: their code and settings, kernel, initrd, arguments."""

_BANKS: Final = {hash_name(number): number for number in HASHES}
_ATTEMPTS: Final = 16
_MARGIN: Final = timedelta(minutes=10)


class KeyIssuer(Protocol):
    """Who certifies attestation keys: a broker, or a client that speaks to one."""

    def challenge_attestation_key(
        self, request: AttestationKeyRequest
    ) -> AttestationKeyChallenge: ...

    def certify_attestation_key(self, answer: AttestationKeyAnswer) -> Envelope: ...


def certify_attestation_key(
    device: TpmDevice,
    ak: LoadedKey,
    issuer: KeyIssuer,
    authorities: Sequence[bytes] = (),
) -> Envelope:
    """Have the issuer certify ``ak`` by the endorsement key of the same TPM.

    Args:
        authorities: certificates (DER) between the endorsement key's and its root, where the
            TPM does not hold them itself.

    Raises:
        EvidenceError: the issuer does not accept the endorsement or the key.
        UnavailableError: the TPM has no endorsement certificate, or cannot solve the challenge.
    """
    endorsement = device.endorsement_key()
    with device.load_endorsement_key(endorsement) as ek:
        request = AttestationKeyRequest(
            certificates=tuple(b64(der) for der in (*endorsement.certificates, *authorities)),
            endorsement_key=b64(ek.public.pack()),
            attestation_key=b64(ak.public.pack()),
        )
        challenge = issuer.challenge_attestation_key(request)
        credential = Credential(unb64(challenge.credential), unb64(challenge.secret))
        secret = device.activate(ak, ek, credential)
    answer = AttestationKeyAnswer(
        request=request, challenge=challenge.challenge, secret=b64(secret)
    )
    return issuer.certify_attestation_key(answer)


def make_quote(
    device: TpmDevice,
    ak: LoadedKey,
    certificate: Envelope,
    selection: PcrSelection,
    data: bytes,
) -> dict[str, Any]:
    """The fields of a :class:`~cenacle.attestation.tpm.QuoteFields`.

    Registers are read again until they are the quoted ones: the kernel may extend some at any
    moment.

    Args:
        data: qualifying data, at most 32 bytes.

    Raises:
        UnavailableError: the registers keep changing, or the TPM refuses.
    """
    for _ in range(_ATTEMPTS):
        attest, signature = device.quote(ak, selection, data)
        values = device.registers(selection)
        quoted = Attest.parse(attest).attested
        scheme = ak.public.scheme
        assert isinstance(quoted, QuoteInfo)
        assert scheme is not None
        if pcr_composite(scheme.hash, values) == quoted.digest:
            return {
                "certificate": certificate.to_fields(),
                "key": b64(ak.public.pack()),
                "attest": b64(attest),
                "signature": b64(signature),
                "registers": {str(number): value.hex() for number, value in values.items()},
            }
    raise UnavailableError(
        "the TPM's registers keep changing",
        found=f"another value at each of {_ATTEMPTS} attempts",
        expected="registers that hold still for a moment",
        remedy="quote fewer registers, or try again when the machine is idle",
    )


class TpmAttester(Attester):
    """Quotes registers of one bank.

    Args:
        tcti: where the TPM is, see :class:`~cenacle.attestation.tpm_device.TpmDevice`.
        registers: those that the contract has reference values for.
        bank: ``sha256``, ``sha384`` or ``sha512``.
        certificate: of this TPM's attestation key, if it was certified before.
        issuer: who certifies the key when there is no certificate, or it is about to expire.
        authorities: certificates between the endorsement key's and its root, DER.
    """

    kind = "tpm"

    def __init__(
        self,
        tcti: str,
        registers: Sequence[int] = BOOT_REGISTERS,
        *,
        bank: str = "sha256",
        certificate: Envelope | None = None,
        issuer: KeyIssuer | None = None,
        authorities: Sequence[bytes] = (),
    ) -> None:
        chosen = tuple(sorted(set(registers)))
        allowed = [n for n in range(24) if n not in RESETTABLE]
        if not chosen or not set(chosen) <= set(allowed) or bank not in _BANKS:
            raise InputError(
                "a TPM cannot vouch with these registers",
                found=f"{', '.join(map(str, chosen)) or 'none'} of {bank}",
                expected=f"some of {', '.join(map(str, allowed))} of {' or '.join(_BANKS)}",
            )
        self.tcti = tcti
        self.selection = PcrSelection(_BANKS[bank], chosen)
        self.certificate = certificate
        self._issuer = issuer
        self._authorities = tuple(authorities)

    def collect(self, bound: bytes, now: datetime) -> dict[str, Any]:
        with TpmDevice(self.tcti) as device, device.attestation_key() as ak:
            return {"quote": self.quote(device, ak, bound, now)}

    def quote(
        self, device: TpmDevice, ak: LoadedKey, bound: bytes, now: datetime
    ) -> dict[str, Any]:
        """A quote that carries ``bound``, its key certified first if that is needed."""
        if self.certificate is None or not _serves(self.certificate, ak, now + _MARGIN):
            if self._issuer is None:
                raise UnavailableError(
                    "the TPM's attestation key has no valid certificate",
                    found="none, one of another key, or one that expires within minutes",
                    expected="a broker's certificate of the last day",
                    remedy="have the key certified by the broker that the job is for",
                )
            self.certificate = certify_attestation_key(device, ak, self._issuer, self._authorities)
        return make_quote(device, ak, self.certificate, self.selection, qualifying_data(bound))


def _serves(envelope: Envelope, ak: LoadedKey, until: datetime) -> bool:
    try:
        certificate = envelope.peek(AttestationKeyCertificate)
    except CenacleError as error:
        raise InputError(
            "an attestation key's certificate is malformed", found=error.diagnostics()
        ) from None
    same = certificate.key_name == ak.public.name.hex()
    return same and parse_time(certificate.expires) >= until
