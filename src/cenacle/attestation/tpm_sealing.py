"""A 32-byte key sealed to a TPM: it comes out only while the machine is what it was.

The key is sealed under the TPM's storage root key with a policy over register values
(TPM2_PolicyPCR), so another kernel, firmware or boot setting keeps it in. Two ways lead through
an update of the machine:

- *recovery shares* (:mod:`cenacle.crypto.shamir`): enough parties together recover the key, and
  it is sealed anew;
- an *approver*: sealed with an approver's public key (TPM2_PolicyAuthorize), the key also comes
  out for later register values that the approver signed (:func:`approve_registers`).

What passes between processor and TPM is encrypted and authenticated by a session salted to the
storage root key, whose Name is kept with the sealed key, so that nobody on the bus reads along or
stands between. TPM 2.0 Part 1, sections 19.7 and 21; Part 3, sections 23.7 and 23.16.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, Final, Literal

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import (
    Prehashed,
    decode_dss_signature,
)
from pydantic import Field, StringConstraints

from cenacle.attestation.tpm_device import LoadedKey, TpmDevice
from cenacle.attestation.tpm_keys import (
    EccParameters,
    ObjectAttributes,
    Public,
    Scheme,
    Signature,
    Symmetric,
)
from cenacle.attestation.tpm_structures import (
    PcrSelection,
    digest_of,
    pack_selections,
    pcr_composite,
    tpm2b,
)
from cenacle.crypto import SecretBytes
from cenacle.documents.base import Base64, Frozen, b64, unb64
from cenacle.errors import InputError, SealError, UnavailableError

__all__ = [
    "Approval",
    "SealedKey",
    "approve_registers",
    "seal_master_key",
    "unseal_master_key",
]

_KEY: Final = 32
_SHA256: Final = 0x000B
_ECDSA, _P256 = 0x0018, 0x0003
_CC_POLICY_AUTHORIZE, _CC_POLICY_PCR = 0x016A, 0x017F
_REFERENCE: Final = b"cenacle/sealed-key/v1"

_STORAGE_ROOT: Final = Public(
    name_alg=_SHA256,
    attributes=ObjectAttributes.FIXED_TPM
    | ObjectAttributes.FIXED_PARENT
    | ObjectAttributes.SENSITIVE_DATA_ORIGIN
    | ObjectAttributes.USER_WITH_AUTH
    | ObjectAttributes.NO_DA
    | ObjectAttributes.RESTRICTED
    | ObjectAttributes.DECRYPT,
    auth_policy=b"",
    symmetric=Symmetric(0x0006, 128, 0x0043),
    scheme=None,
    key=EccParameters(_P256, None, b"", b""),
)

_Hex = Annotated[str, StringConstraints(pattern=r"^(?:[0-9a-f]{2}){32}$")]
_Register = Annotated[str, StringConstraints(pattern=r"^(?:[0-9]|1[0-9]|2[0-3])$")]


class SealedKey(Frozen):
    """What is kept beside the machine's disk; of no use without this TPM in this state.

    Attributes:
        registers: values of the SHA-256 bank when the key was sealed, by number.
        parent: Name of the storage root key, hexadecimal.
        public: TPM2B_PUBLIC of the sealed object.
        private: TPM2B_PRIVATE of it, encrypted by the TPM.
        approver: TPMT_PUBLIC of the key whose approvals count; None: only these registers do.
    """

    format: Literal["cenacle-tpm-sealed-key-v1"] = "cenacle-tpm-sealed-key-v1"
    registers: Annotated[dict[_Register, _Hex], Field(min_length=1, max_length=24)]
    parent: Annotated[str, StringConstraints(pattern=r"^000b[0-9a-f]{64}$")]
    public: Base64
    private: Base64
    approver: Base64 | None = None

    @property
    def values(self) -> dict[int, bytes]:
        return {int(n): bytes.fromhex(value) for n, value in sorted(self.registers.items())}


class Approval(Frozen):
    """An approver's signature over register values; ``signature`` is a TPMT_SIGNATURE."""

    registers: Annotated[dict[_Register, _Hex], Field(min_length=1, max_length=24)]
    signature: Base64


def _selection(registers: Mapping[int, bytes]) -> PcrSelection:
    return PcrSelection(_SHA256, tuple(sorted(registers)))


def _policy_pcr(registers: Mapping[int, bytes]) -> bytes:
    """The digest of a policy of TPM2_PolicyPCR alone (Part 3, 23.7.1)."""
    packed = pack_selections((_selection(registers),))
    code = _CC_POLICY_PCR.to_bytes(4, "big")
    return digest_of(_SHA256, bytes(32), code, packed, pcr_composite(_SHA256, registers))


def _policy_authorize(approver: Public) -> bytes:
    """The digest of a policy of TPM2_PolicyAuthorize alone (Part 3, 23.16.1)."""
    code = _CC_POLICY_AUTHORIZE.to_bytes(4, "big")
    return digest_of(_SHA256, digest_of(_SHA256, bytes(32), code, approver.name), _REFERENCE)


def _approver(key: ec.EllipticCurvePublicKey) -> Public:
    if not isinstance(key.curve, ec.SECP256R1):
        raise InputError(
            "an approver's key is of an unknown kind", found=key.curve.name, expected="P-256"
        )
    numbers = key.public_numbers()
    x, y = numbers.x.to_bytes(32, "big"), numbers.y.to_bytes(32, "big")
    attributes = ObjectAttributes.SIGN | ObjectAttributes.USER_WITH_AUTH
    parameters = EccParameters(_P256, None, x, y)
    return Public(_SHA256, attributes, b"", None, Scheme(_ECDSA, _SHA256), parameters)


def approve_registers(
    registers: Mapping[int, bytes], approver: ec.EllipticCurvePrivateKey
) -> Approval:
    """Sign that keys sealed with this approver may come out at these SHA-256 register values."""
    approved = digest_of(_SHA256, _policy_pcr(registers), _REFERENCE)
    r, s = decode_dss_signature(approver.sign(approved, ec.ECDSA(Prehashed(hashes.SHA256()))))
    parts = (number.to_bytes(32, "big") for number in (r, s))
    return Approval(
        registers={str(n): value.hex() for n, value in sorted(registers.items())},
        signature=b64(Signature(_ECDSA, _SHA256, *parts).pack()),
    )


def seal_master_key(
    device: TpmDevice,
    key: SecretBytes,
    registers: tuple[int, ...],
    approver: ec.EllipticCurvePublicKey | None = None,
) -> SealedKey:
    """Seal ``key`` (32 bytes) to this TPM and the present values of ``registers``.

    Args:
        registers: of the SHA-256 bank.
        approver: P-256; see the module. Whoever holds its private half and this machine can
            read the key, so it belongs to whoever may decide on updates.

    Raises:
        InputError: the key has another length, or no register is given.
        UnavailableError: the TPM refuses.
    """
    if len(key) != _KEY or not registers:
        raise InputError(
            "a key cannot be sealed in this way",
            found=f"{len(key)} bytes to {len(registers)} registers",
            expected="32 bytes to at least one register",
        )
    tss = importlib.import_module("tpm2_pytss")
    values = device.registers(PcrSelection(_SHA256, tuple(sorted(set(registers)))))
    trusted = None if approver is None else _approver(approver)
    policy = _policy_pcr(values) if trusted is None else _policy_authorize(trusted)
    template = tss.TPM2B_PUBLIC(
        publicArea=tss.TPMT_PUBLIC(
            type=tss.TPM2_ALG.KEYEDHASH,
            nameAlg=tss.TPM2_ALG.SHA256,
            objectAttributes=tss.TPMA_OBJECT.FIXEDTPM
            | tss.TPMA_OBJECT.FIXEDPARENT
            | tss.TPMA_OBJECT.ADMINWITHPOLICY
            | tss.TPMA_OBJECT.NODA,
            authPolicy=tss.TPM2B_DIGEST(buffer=policy),
            parameters=tss.TPMU_PUBLIC_PARMS(
                keyedHashDetail=tss.TPMS_KEYEDHASH_PARMS(
                    scheme=tss.TPMT_KEYEDHASH_SCHEME(scheme=tss.TPM2_ALG.NULL)
                )
            ),
        )
    )
    with device.primary(_STORAGE_ROOT, "OWNER") as root, key.view() as view:
        secret = tss.TPM2B_SENSITIVE_CREATE(
            sensitive=tss.TPMS_SENSITIVE_CREATE(data=tss.TPM2B_SENSITIVE_DATA(buffer=bytes(view)))
        )
        with _session(device, root, "HMAC", "DECRYPT") as session:
            private, public, *_ = device.attempt(
                "seal a key",
                device.esapi.create,
                root.handle,
                secret,
                template,
                b"",
                tss.TPML_PCR_SELECTION(),
                tss.ESYS_TR.PASSWORD,
                session,
            )
    return SealedKey(
        registers={str(n): value.hex() for n, value in values.items()},
        parent=root.public.name.hex(),
        public=b64(public.marshal()),
        private=b64(private.marshal()),
        approver=None if trusted is None else b64(trusted.pack()),
    )


def unseal_master_key(
    device: TpmDevice, sealed: SealedKey, approval: Approval | None = None
) -> SecretBytes:
    """The key again, if this is the TPM that sealed it and its registers allow it.

    Args:
        approval: for register values other than those the key was sealed to; only of use if it
            was sealed with an approver. Such a key always needs an approval, its first values'
            too.

    Raises:
        SealError: another TPM, other registers (each is named), or a wrong approval.
        UnavailableError: the TPM cannot be used.
    """
    with device.primary(_STORAGE_ROOT, "OWNER") as root:
        if root.public.name.hex() != sealed.parent:
            raise SealError(
                "a key was sealed by another TPM, or this one was cleared",
                found=root.public.name.hex()[:16],
                expected=sealed.parent[:16],
                remedy="recover the key from its shares, and seal it anew",
            )
        if (sealed.approver is None) != (approval is None):
            raise SealError(
                "a sealed key and its approval do not belong together",
                found="no approval" if approval is None else "an approval",
                expected="an approval of the present registers"
                if approval is None
                else "none: the key was sealed without an approver",
            )
        allowed = sealed.values if approval is None else _approved(approval)
        _check_registers(device, allowed)
        return _unseal(device, root, sealed, approval, allowed)


def _approved(approval: Approval) -> dict[int, bytes]:
    return {int(n): bytes.fromhex(value) for n, value in sorted(approval.registers.items())}


def _check_registers(device: TpmDevice, allowed: Mapping[int, bytes]) -> None:
    """Names what changed; the TPM decides, whatever this says."""
    present = device.registers(_selection(allowed))
    changed = [number for number, value in allowed.items() if present[number] != value]
    if changed:
        raise SealError(
            "the machine is not what it was when the key was sealed",
            found=f"other values in PCR {', '.join(map(str, changed))}",
            expected=f"the values of PCR {', '.join(map(str, allowed))} at that time",
            remedy="if the machine was updated, recover the key from its shares and seal it anew",
        )


def _unseal(
    device: TpmDevice,
    root: LoadedKey,
    sealed: SealedKey,
    approval: Approval | None,
    allowed: Mapping[int, bytes],
) -> SecretBytes:
    tss, esapi = importlib.import_module("tpm2_pytss"), device.esapi
    try:
        public, _ = tss.TPM2B_PUBLIC.unmarshal(unb64(sealed.public))
        private, _ = tss.TPM2B_PRIVATE.unmarshal(unb64(sealed.private))
        with (
            device.loaded("load a sealed key", esapi.load, root.handle, private, public) as handle,
            _session(device, root, "POLICY", "ENCRYPT") as session,
        ):
            chosen = device.selection(_selection(allowed))
            device.attempt("check its registers", esapi.policy_pcr, session, b"", chosen)
            if approval is not None:
                _authorize(device, sealed, approval, allowed, session)
            found = device.attempt("unseal a key", esapi.unseal, handle, session)
            return SecretBytes(bytearray(bytes(found)))
    except (UnavailableError, tss.TSS2_Exception) as error:
        raise SealError(
            "the TPM does not give the sealed key",
            found=(error.found if isinstance(error, UnavailableError) else None)
            or str(error)[:200],
            expected="the file and the machine as they were when it was sealed",
            remedy="recover the key from its shares, and seal it anew",
        ) from None


def _authorize(
    device: TpmDevice,
    sealed: SealedKey,
    approval: Approval,
    allowed: Mapping[int, bytes],
    session: Any,
) -> None:
    tss, esapi = importlib.import_module("tpm2_pytss"), device.esapi
    approver = Public.parse(unb64(sealed.approver or ""))
    area, _ = tss.TPMT_PUBLIC.unmarshal(approver.pack())
    policy = _policy_pcr(allowed)
    signature, _ = tss.TPMT_SIGNATURE.unmarshal(unb64(approval.signature))
    digest = digest_of(_SHA256, policy, _REFERENCE)
    with device.loaded(
        "load the approver's key",
        esapi.load_external,
        tss.TPM2B_PUBLIC(publicArea=area),
        None,
        tss.ESYS_TR.OWNER,
    ) as key:
        ticket = device.attempt("check an approval", esapi.verify_signature, key, digest, signature)
    name = tss.TPM2B_NAME.unmarshal(tpm2b(approver.name))[0]
    device.attempt(
        "use an approval", esapi.policy_authorize, session, policy, name, ticket, _REFERENCE
    )


@contextmanager
def _session(device: TpmDevice, root: LoadedKey, kind: str, protects: str) -> Iterator[Any]:
    """A session salted to the storage root key; its first parameter is encrypted."""
    tss = importlib.import_module("tpm2_pytss")
    cipher = tss.TPMT_SYM_DEF(
        algorithm=tss.TPM2_ALG.AES,
        keyBits=tss.TPMU_SYM_KEY_BITS(sym=128),
        mode=tss.TPMU_SYM_MODE(sym=tss.TPM2_ALG.CFB),
    )
    with device.loaded(
        "start a session",
        device.esapi.start_auth_session,
        root.handle,
        tss.ESYS_TR.NONE,
        getattr(tss.TPM2_SE, kind),
        cipher,
        tss.TPM2_ALG.SHA256,
    ) as session:
        attributes = getattr(tss.TPMA_SESSION, protects) | tss.TPMA_SESSION.CONTINUESESSION
        device.esapi.trsess_set_attributes(session, attributes)
        yield session
