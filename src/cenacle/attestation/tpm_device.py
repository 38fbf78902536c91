"""A TPM 2.0 behind any TCTI: its endorsement key, an attestation key, quotes and registers.

Input and output only; whether to believe what a TPM says is decided in
:mod:`cenacle.attestation.tpm`. ``tpm2-pytss`` is imported when a TPM is first opened.

A TPM has as few as three slots for loaded keys, and only some resource managers clean up, so
whatever is loaded here is flushed again.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Final, NamedTuple, Self, TypeVar

from cenacle.attestation.tpm_credential import Credential
from cenacle.attestation.tpm_keys import EccParameters, ObjectAttributes, Public, Scheme
from cenacle.attestation.tpm_structures import PcrSelection, hasher, unpack_tpm2b
from cenacle.errors import EvidenceError, UnavailableError

__all__ = ["ATTESTATION_KEY", "EndorsementKey", "LoadedKey", "TpmDevice"]

T = TypeVar("T")

# The TCG's templates (EK Credential Profile 2.5, annex B), the most common first.
_TEMPLATES: Final = ("L-1", "L-2", "H-1", "H-2", "H-3", "H-6")
_CERTIFICATES: Final = (0x01C00002, 0x01C0000A, 0x01C00012, 0x01C00014, 0x01C00016, 0x01C0001C)
_CHAIN: Final = range(0x01C00100, 0x01C00200)  # 2.2.1.5.2: authorities' certificates
_PERSISTENT: Final = range(0x81010000, 0x81020000)  # where vendors leave endorsement keys
_HANDLES: Final = 254
_AT_ONCE: Final = 8  # registers that TPM2_PCR_Read gives in one answer

ATTESTATION_KEY: Final = Public(
    name_alg=0x000B,
    attributes=ObjectAttributes.FIXED_TPM
    | ObjectAttributes.FIXED_PARENT
    | ObjectAttributes.SENSITIVE_DATA_ORIGIN
    | ObjectAttributes.USER_WITH_AUTH
    | ObjectAttributes.NO_DA
    | ObjectAttributes.RESTRICTED
    | ObjectAttributes.SIGN,
    auth_policy=b"",
    symmetric=None,
    scheme=Scheme(0x0018, 0x000B),  # ECDSA with SHA-256
    key=EccParameters(0x0003, None, b"", b""),  # P-256
)
"""Template of attestation keys. A primary key: the same TPM makes the same key from it again."""


class LoadedKey(NamedTuple):
    """A key in one of the TPM's slots."""

    handle: Any
    public: Public


class EndorsementKey(NamedTuple):
    """The endorsement key's certificate, those of its authorities, and how to make the key.

    Attributes:
        certificates: DER, the key's own first.
    """

    certificates: tuple[bytes, ...]
    template: Any


class TpmDevice:
    """One connection to a TPM.

    Args:
        tcti: as the tpm2-tools take it: ``device:/dev/tpmrm0``, ``swtpm:path=/run/tpm.sock``.

    Raises (every method): :class:`UnavailableError` when the TPM refuses, or is not there.
    """

    def __init__(self, tcti: str) -> None:
        # What the library would print at each refusal is in our own error.
        os.environ.setdefault("TSS2_LOG", "all+NONE")
        try:
            self._tss: Any = importlib.import_module("tpm2_pytss")
        except (ImportError, OSError) as error:
            raise UnavailableError(
                "the TPM library is not installed",
                found=type(error).__name__,
                expected="tpm2-pytss and the TPM2 Software Stack",
                remedy="run: pip install 'cenacle[tpm]' (it needs Debian's libtss2-dev)",
            ) from None
        self.tcti = tcti
        self._esapi = self.attempt("open it", self._tss.ESAPI, tcti)

    def close(self) -> None:
        self._esapi.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def esapi(self) -> Any:
        """The ``tpm2_pytss.ESAPI`` itself."""
        return self._esapi

    def attempt(self, what: str, call: Callable[..., T], *given: Any) -> T:
        """``call(*given)``; ``what`` completes the sentence of the error if the TPM refuses."""
        try:
            return call(*given)
        except (self._tss.TSS2_Exception, ValueError) as error:
            raise UnavailableError(
                f"the TPM does not let this process {what}",
                found=f"{error} at {self.tcti}"[:200],
                expected="a TPM 2.0",
                remedy="check the TCTI, and that this user may open the device (group tss)",
            ) from None

    @contextmanager
    def loaded(self, what: str, call: Callable[..., Any], *given: Any) -> Iterator[Any]:
        """The handle that ``call`` returns, flushed in the end."""
        handle = self.attempt(what, call, *given)
        with self._flushed(handle):
            yield handle

    # ------------------------------------------------------------------ keys

    @contextmanager
    def _flushed(self, handle: Any) -> Iterator[Any]:
        try:
            yield handle
        finally:
            self.attempt("flush a handle", self._esapi.flush_context, handle)

    @contextmanager
    def primary(self, template: Any, hierarchy: str = "ENDORSEMENT") -> Iterator[LoadedKey]:
        """A primary key, loaded for as long as the context lasts.

        Args:
            template: a :class:`Public` or a ``TPM2B_PUBLIC``.
        """
        tss = self._tss
        if isinstance(template, Public):
            area, _ = tss.TPMT_PUBLIC.unmarshal(template.pack())
            template = tss.TPM2B_PUBLIC(publicArea=area)
        make = partial(self._esapi.create_primary, primary_handle=getattr(tss.ESYS_TR, hierarchy))
        handle, public, *_ = self.attempt("make a primary key", make, None, template)
        with self._flushed(handle):
            yield LoadedKey(handle, Public.parse(public.publicArea.marshal()))

    def attestation_key(self) -> Any:
        """Context manager of a :class:`LoadedKey` made from :data:`ATTESTATION_KEY`."""
        return self.primary(ATTESTATION_KEY)

    def endorsement_key(self) -> EndorsementKey:
        """The first endorsement key that the TPM holds a certificate for."""
        tss = self._tss
        utils = importlib.import_module("tpm2_pytss.utils")
        present = self._handles(tss.TPM2_HR.NV_INDEX)

        def read(index: int) -> bytes:
            if index not in present:
                raise utils.NoSuchIndex(index)
            return self._read_nv(index)

        for name, index in zip(_TEMPLATES, _CERTIFICATES, strict=True):
            if index in present:
                certificate, template = self.attempt(
                    "read its endorsement certificate", utils.create_ek_template, name, read
                )
                stored = b"".join(self._read_nv(i) for i in _CHAIN if i in present)
                return EndorsementKey(tuple(_split(certificate)[:1] + _split(stored)), template)
        raise UnavailableError(
            "the TPM holds no endorsement certificate",
            found=f"{len(present)} indices of other use",
            expected="one that its vendor, or swtpm_setup --create-ek-cert, stored there",
            remedy="use a TPM whose vendor certified it",
        )

    @contextmanager
    def load_endorsement_key(self, key: EndorsementKey) -> Iterator[LoadedKey]:
        """The endorsement key, where the vendor left it if it did; made anew otherwise."""
        wanted = Public.parse(key.template.publicArea.marshal())
        for index in sorted(self._handles(self._tss.TPM2_HR.PERSISTENT)):
            if index not in _PERSISTENT:
                continue
            handle = self.attempt("find a key", self._esapi.tr_from_tpmpublic, index)
            area, *_ = self.attempt("read a key", self._esapi.read_public, handle)
            try:
                public = Public.parse(area.publicArea.marshal())
            except EvidenceError:
                continue  # another key, of a type that cannot endorse
            if _same_template(public, wanted):
                yield LoadedKey(handle, public)
                return
        with self.primary(key.template) as made:
            yield made

    def activate(self, ak: LoadedKey, ek: LoadedKey, credential: Credential) -> bytes:
        """TPM2_ActivateCredential: the secret, if both keys are this TPM's.

        Raises:
            UnavailableError: the credential is for another key or another TPM.
        """
        tss, esapi = self._tss, self._esapi
        blob, _ = tss.TPM2B_ID_OBJECT.unmarshal(credential.blob)
        secret, _ = tss.TPM2B_ENCRYPTED_SECRET.unmarshal(credential.secret)

        def run(session: Any) -> bytes:
            return bytes(
                esapi.activate_credential(
                    ak.handle, ek.handle, blob, secret, tss.ESYS_TR.PASSWORD, session
                )
            )

        def activate() -> bytes:
            if ek.public.attributes & ObjectAttributes.USER_WITH_AUTH:
                return run(tss.ESYS_TR.PASSWORD)
            with self.policy_session() as session:
                esapi.policy_secret(tss.ESYS_TR.ENDORSEMENT, session)
                return run(session)

        return self.attempt("activate the credential", activate)

    @contextmanager
    def policy_session(self, *, trial: bool = False) -> Iterator[Any]:
        """A policy session, or a trial one that only computes a policy's digest."""
        tss = self._tss
        handle = self.attempt(
            "start a session",
            self._esapi.start_auth_session,
            tss.ESYS_TR.NONE,
            tss.ESYS_TR.NONE,
            tss.TPM2_SE.TRIAL if trial else tss.TPM2_SE.POLICY,
            tss.TPMT_SYM_DEF(algorithm=tss.TPM2_ALG.NULL),
            tss.TPM2_ALG.SHA256,
        )
        try:
            yield handle
        finally:
            with suppress(tss.TSS2_Exception):  # gone already if it authorized its one command
                self._esapi.flush_context(handle)

    # ------------------------------------------------------------------ registers

    def quote(self, ak: LoadedKey, selection: PcrSelection, data: bytes) -> tuple[bytes, bytes]:
        """TPM2_Quote: TPMS_ATTEST and TPMT_SIGNATURE."""
        chosen = self.selection(selection)
        qualifying = self._tss.TPM2B_DATA(buffer=data)
        attest, signature = self.attempt(
            "sign a quote", self._esapi.quote, ak.handle, chosen, qualifying
        )
        return unpack_tpm2b(attest.marshal(), "a quote"), signature.marshal()

    def registers(self, selection: PcrSelection) -> dict[int, bytes]:
        """The registers' values now, by number."""
        values: dict[int, bytes] = {}
        for start in range(0, len(selection.registers), _AT_ONCE):
            wanted = selection.registers[start : start + _AT_ONCE]
            part = self.selection(PcrSelection(selection.algorithm, wanted))
            _, _, found = self.attempt("read registers", self._esapi.pcr_read, part)
            digests = [bytes(digest) for digest in found]
            if len(digests) != len(wanted):
                raise UnavailableError(
                    "the TPM does not have these registers",
                    found=f"{len(digests)} values",
                    expected=f"{len(wanted)} of the {hasher(selection.algorithm).name} bank",
                    remedy="activate the bank in the firmware's settings",
                )
            values.update(zip(wanted, digests, strict=True))
        return values

    def extend(self, register: int, algorithm: int, digest: bytes) -> None:
        """TPM2_PCR_Extend of one bank."""
        tss = self._tss
        packed = algorithm.to_bytes(2, "big") + digest
        values, _ = tss.TPML_DIGEST_VALUES.unmarshal((1).to_bytes(4, "big") + packed)
        self.attempt("extend a register", self._esapi.pcr_extend, tss.ESYS_TR(register), values)

    def selection(self, selection: PcrSelection) -> Any:
        """A ``TPML_PCR_SELECTION``."""
        packed = (1).to_bytes(4, "big") + selection.pack()
        return self._tss.TPML_PCR_SELECTION.unmarshal(packed)[0]

    # ------------------------------------------------------------------ what is stored

    def _handles(self, first: int) -> frozenset[int]:
        tss = self._tss
        kind = tss.TPM2_CAP.HANDLES
        _, found = self.attempt(
            "list what it holds", self._esapi.get_capability, kind, first, _HANDLES
        )
        return frozenset(int(handle) for handle in found.data.handles)

    def _read_nv(self, index: int) -> bytes:
        utils = importlib.import_module("tpm2_pytss.utils")
        owner = self._tss.ESYS_TR.OWNER

        def read() -> bytes:
            return bytes(utils.NVReadEK(self._esapi, auth_handle=owner)(index))

        return self.attempt("read a certificate", read)


def _same_template(found: Public, wanted: Public) -> bool:
    return (found.name_alg, found.attributes, found.auth_policy, found.symmetric) == (
        wanted.name_alg,
        wanted.attributes,
        wanted.auth_policy,
        wanted.symmetric,
    ) and type(found.key) is type(wanted.key)


def _split(data: bytes) -> list[bytes]:
    """Certificates in DER, one after another; what an index is padded with is dropped."""
    found = []
    while len(data) > 4 and data[0] == 0x30 and data[1] in {0x81, 0x82}:
        octets = data[1] & 0x0F
        size = 2 + octets + int.from_bytes(data[2 : 2 + octets], "big")
        if size > len(data):
            break
        found.append(data[:size])
        data = data[size:]
    return found
