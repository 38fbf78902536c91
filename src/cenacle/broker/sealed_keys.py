"""A broker's keys on disk, sealed to its machine's TPM, with shares for when the machine changes.

``broker.sealed`` takes the place of ``broker.key``: the same content, encrypted with AES-256-GCM
under a master key that only the TPM gives out, and only while the machine's registers are what
they were. A stolen disk or backup is then worth nothing, and neither is the machine booted into
something else. The master key is also shared among holders (parties of the broker, say): after an
update enough of them recover it, and it is sealed to the machine as it is now. Shares stay valid
through that; new ones void none.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, Literal

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cenacle.attestation.tpm_device import TpmDevice
from cenacle.attestation.tpm_sealing import SealedKey, seal_master_key, unseal_master_key
from cenacle.broker.identity import (
    KEY_FILE,
    SEALED_FILE,
    BrokerKeys,
    private_folder,
    read_private,
    write_private,
)
from cenacle.crypto import SecretBytes, derive_key
from cenacle.crypto.kdf import encode_fields
from cenacle.crypto.shamir import RecoveryShare, recover, recovery_shares
from cenacle.documents.base import Base64, Frozen, NonEmpty, b64, canonical_json, parse_json, unb64
from cenacle.errors import CenacleError, InputError, SealError
from cenacle.sealing.disk import disk_errors

__all__ = ["SealedFile", "new_shares", "open_keys", "recover_keys", "seal_keys"]

_NONCE: Final = 12
_LABEL: Final = "broker/sealed-keys"


class SealedFile(Frozen):
    """The content of ``broker.sealed``.

    Attributes:
        tcti: where the TPM is.
        master: the master key, sealed.
        nonce: of AES-256-GCM, 12 bytes.
        keys: the content of ``broker.key``, encrypted.
    """

    format: Literal["cenacle-broker-sealed-v1"] = "cenacle-broker-sealed-v1"
    origin: NonEmpty
    tcti: NonEmpty
    master: SealedKey
    nonce: Base64
    keys: Base64

    def decrypt(self, master: SecretBytes, path: Path) -> BrokerKeys:
        """The broker's keys; :class:`SealError` under another master key."""
        try:
            with derive_key(master, _LABEL) as key, key.view() as view:
                data = AESGCM(bytes(view)).decrypt(
                    unb64(self.nonce), unb64(self.keys), _bound(self.origin)
                )
        except (InvalidTag, ValueError):
            raise SealError(
                "a broker's sealed keys do not open",
                found=f"{path}, altered or of another broker",
                expected="the file that was sealed with this master key",
                remedy="restore it from a backup",
            ) from None
        return BrokerKeys.from_file(data, path)


def _bound(origin: str) -> bytes:
    return encode_fields(b"cenacle/broker-sealed/v1", origin.encode())


def _read(folder: Path) -> SealedFile:
    path = folder / SEALED_FILE
    try:
        return SealedFile.from_fields(parse_json(read_private(path)))
    except CenacleError as error:
        raise InputError(
            "a broker's sealed keys cannot be read",
            found=error.diagnostics(),
            expected=f"{path}, as it was written",
            remedy="restore it from a backup; do not make new keys in its place",
        ) from None


def open_keys(folder: Path, origin: str, tcti: str | None = None) -> BrokerKeys:
    """A broker's keys, from the TPM if they are sealed; otherwise :meth:`BrokerKeys.open`.

    Args:
        tcti: where the TPM is now, if it moved.

    Raises:
        SealError: the machine is not what it was; names the registers that changed.
        InputError: the folder is of another broker, or the file is damaged.
        UnavailableError: the TPM cannot be used.
    """
    if not os.path.lexists(folder / SEALED_FILE):
        return BrokerKeys.open(folder, origin)
    with private_folder(folder):
        file = _read(folder)
        if file.origin != origin:
            raise InputError(
                "a broker's folder is of another broker", found=file.origin, expected=origin
            )
        with TpmDevice(tcti or file.tcti) as device:
            master = unseal_master_key(device, file.master)
        with master:
            keys = file.decrypt(master, folder / SEALED_FILE)
        if os.path.lexists(folder / KEY_FILE):
            _remove_clear(folder, keys)  # sealing was interrupted before it did
        return keys


def _remove_clear(folder: Path, keys: BrokerKeys) -> None:
    path = folder / KEY_FILE
    if read_private(path) != keys.to_file():
        raise InputError(
            "a broker's folder has two different sets of keys",
            found=f"{KEY_FILE} and {SEALED_FILE}",
            expected="one of them",
            remedy="find out where they come from, and move one away",
        )
    with disk_errors(f"remove {path}"):
        path.unlink()


def seal_keys(
    folder: Path, tcti: str, registers: Sequence[int], threshold: int, shares: int
) -> tuple[RecoveryShare, ...]:
    """Seal the keys of a folder to this machine and remove them in the clear.

    The clear file is removed only when the sealed one is durable and was opened again. Removing
    it does not wipe what the disk kept of it: seal before the first asset key is handed in.

    Returns:
        the recovery shares; hand each to its holder, and keep none on this machine.

    Raises:
        InputError: the folder has no keys, or sealed ones; not 2 <= threshold <= shares <= 16.
        UnavailableError: the TPM cannot be used, or the disk has no room.
    """
    with private_folder(folder), SecretBytes.random(32) as master, TpmDevice(tcti) as device:
        if os.path.lexists(folder / SEALED_FILE):
            raise InputError(
                "a broker's keys are sealed already",
                found=str(folder / SEALED_FILE),
                expected=f"only {KEY_FILE}",
                remedy="start the broker as it is, or make new recovery shares",
            )
        path = folder / KEY_FILE
        keys = BrokerKeys.from_file(read_private(path), path)
        made = recovery_shares(master, threshold, shares)
        origin, nonce = keys.identity.origin, secrets.token_bytes(_NONCE)
        with derive_key(master, _LABEL) as key, key.view() as view:
            encrypted = AESGCM(bytes(view)).encrypt(nonce, keys.to_file(), _bound(origin))
        file = SealedFile(
            origin=origin,
            tcti=tcti,
            master=seal_master_key(device, master, tuple(registers)),
            nonce=b64(nonce),
            keys=b64(encrypted),
        )
        _write(folder, file, device, keys)
        _remove_clear(folder, keys)
    return made


def _write(folder: Path, file: SealedFile, device: TpmDevice, keys: BrokerKeys) -> None:
    """Write the file only if what it says leads back to the keys."""
    path = folder / SEALED_FILE
    with unseal_master_key(device, file.master) as master:
        again = file.decrypt(master, path)
    if again.to_file() != keys.to_file():
        raise SealError("sealed keys are not what was sealed", expected="the same keys")
    write_private(path, canonical_json(file.to_fields()))


def recover_keys(
    folder: Path,
    shares: Iterable[RecoveryShare],
    registers: Sequence[int] | None = None,
    tcti: str | None = None,
) -> BrokerKeys:
    """Recover the master key from its shares, and seal it to this machine as it is now.

    Args:
        registers: of the SHA-256 bank; the same as before unless given.
        tcti: where the TPM is now, if it moved.

    Raises:
        InputError: too few shares, or of different sharings; the file is damaged.
        SealError: a share was altered, or they are not of this broker's key.
        UnavailableError: the TPM cannot be used, or the disk has no room.
    """
    with private_folder(folder):
        file = _read(folder)
        with recover(shares) as master, TpmDevice(tcti or file.tcti) as device:
            keys = file.decrypt(master, folder / SEALED_FILE)
            chosen = tuple(file.master.values) if registers is None else tuple(registers)
            sealed = seal_master_key(device, master, chosen)
            fresh = file.model_copy(update={"tcti": tcti or file.tcti, "master": sealed})
            _write(folder, fresh, device, keys)
        return keys


def new_shares(
    folder: Path, threshold: int, shares: int, tcti: str | None = None
) -> tuple[RecoveryShare, ...]:
    """Share the master key anew, on the machine that it is sealed to.

    Older shares stay valid among themselves: whoever must be shut out needs a new broker.

    Raises:
        SealError, InputError, UnavailableError: as :func:`open_keys` and :func:`seal_keys` do.
    """
    with private_folder(folder):
        file = _read(folder)
        with TpmDevice(tcti or file.tcti) as device:
            master = unseal_master_key(device, file.master)
        with master:
            return recovery_shares(master, threshold, shares)
