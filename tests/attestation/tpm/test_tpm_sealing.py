from __future__ import annotations

import contextlib
import socket
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from cenacle.attestation.tpm_device import TpmDevice
from cenacle.attestation.tpm_sealing import (
    Approval,
    SealedKey,
    approve_registers,
    seal_master_key,
    unseal_master_key,
)
from cenacle.attestation.tpm_structures import PcrSelection
from cenacle.crypto import SecretBytes
from cenacle.crypto.shamir import recover, recovery_shares
from cenacle.documents.base import b64, unb64
from cenacle.errors import CenacleError, InputError, SealError
from tests.support.swtpm import Tpm

KEY = bytes(range(32))
SHA256 = 0x000B
REGISTERS = (0, 4, 7)
APPROVER, STRANGER = (ec.generate_private_key(ec.SECP256R1()) for _ in "12")
Opened = Callable[[Tpm], Any]


def seal(device: TpmDevice, **more: Any) -> SealedKey:
    return seal_master_key(device, SecretBytes(KEY), REGISTERS, **more)


def unsealed(device: TpmDevice, sealed: SealedKey, approval: Approval | None = None) -> bytes:
    with unseal_master_key(device, sealed, approval) as key, key.view() as view:
        return bytes(view)


def present(device: TpmDevice) -> dict[int, bytes]:
    return device.registers(PcrSelection(SHA256, REGISTERS))


def test_a_key_comes_out_while_the_machine_is_what_it_was(tpm: Tpm, opened: Opened) -> None:
    with opened(tpm) as device:
        sealed = seal(device)
    kept = sealed.to_fields()
    for _ in range(4):  # in other processes' connections; no slot stays occupied
        with opened(tpm) as device:
            assert unsealed(device, SealedKey.from_fields(kept)) == KEY


def test_the_key_does_not_stand_in_the_file(device: TpmDevice) -> None:
    fields = seal(device).to_fields()
    assert KEY not in b"".join(unb64(fields[name]) for name in ("public", "private"))
    assert KEY.hex() not in str(fields)


@pytest.mark.parametrize("register", REGISTERS)
def test_a_changed_register_keeps_it_in(device: TpmDevice, register: int) -> None:
    sealed = seal(device)
    device.extend(register, SHA256, b"\x01" * 32)
    with pytest.raises(SealError, match=f"other values in PCR {register};"):
        unseal_master_key(device, sealed)


def test_the_tpm_itself_refuses_whatever_the_file_says(device: TpmDevice) -> None:
    """Without our own look at the registers: they are written into the file as they are now."""
    sealed = seal(device)
    device.extend(4, SHA256, b"\x01" * 32)
    values = {str(n): value.hex() for n, value in present(device).items()}
    for registers in (values, {"0": values["0"]}, {"9": "00" * 32}):
        forged = sealed.model_copy(update={"registers": registers})
        with pytest.raises(SealError, match="does not give the sealed key"):
            unseal_master_key(device, forged)


def test_another_register_may_change(device: TpmDevice) -> None:
    sealed = seal(device)
    device.extend(10, SHA256, b"\x01" * 32)
    assert unsealed(device, sealed) == KEY


def test_another_tpm_does_not_open_it(device: TpmDevice, other_tpm: Tpm, opened: Opened) -> None:
    sealed = seal(device)
    with opened(other_tpm) as other:
        with pytest.raises(SealError, match="sealed by another TPM"):
            unseal_master_key(other, sealed)
        parent = seal(other).parent
        with pytest.raises(SealError, match="does not give the sealed key"):
            unseal_master_key(other, sealed.model_copy(update={"parent": parent}))
    assert unsealed(device, sealed) == KEY


def test_recovery_shares_lead_through_an_update(device: TpmDevice) -> None:
    key = SecretBytes(KEY)
    sealed, shares = seal(device), recovery_shares(key, 2, 3)
    device.extend(4, SHA256, b"\x01" * 32)  # a new kernel
    with pytest.raises(SealError):
        unseal_master_key(device, sealed)
    again = seal_master_key(device, recover(shares[1:]), REGISTERS)
    assert unsealed(device, again) == KEY


def test_an_approved_update_needs_no_shares(device: TpmDevice) -> None:
    sealed = seal(device, approver=APPROVER.public_key())
    before = approve_registers(present(device), APPROVER)
    assert unsealed(device, sealed, before) == KEY
    device.extend(4, SHA256, b"\x01" * 32)
    with pytest.raises(SealError, match="other values in PCR 4"):
        unseal_master_key(device, sealed, before)
    after = Approval.from_fields(approve_registers(present(device), APPROVER).to_fields())
    assert unsealed(device, sealed, after) == KEY


def test_only_the_approver_approves(device: TpmDevice) -> None:
    sealed = seal(device, approver=APPROVER.public_key())
    genuine = approve_registers(present(device), APPROVER)
    by_stranger = approve_registers(present(device), STRANGER)
    other = {**present(device), 4: b"\x07" * 32}
    stretched = genuine.model_copy(update={"registers": {"0": "00" * 32}})
    for wrong in (by_stranger, stretched):
        with pytest.raises(SealError, match="does not give the sealed key"):
            unseal_master_key(device, sealed, wrong)
    with pytest.raises(SealError, match="other values in PCR 4"):
        unseal_master_key(device, sealed, approve_registers(other, APPROVER))
    # The stranger's key in place of the approver's: the policy is bound to the approver's Name.
    from_stranger = seal(device, approver=STRANGER.public_key())
    forged = sealed.model_copy(update={"approver": from_stranger.approver})
    with pytest.raises(SealError, match="does not give the sealed key"):
        unseal_master_key(device, forged, by_stranger)


def test_an_approval_is_needed_exactly_where_there_is_an_approver(device: TpmDevice) -> None:
    approval = approve_registers(present(device), APPROVER)
    with pytest.raises(SealError, match="do not belong together; found an approval"):
        unseal_master_key(device, seal(device), approval)
    with pytest.raises(SealError, match="do not belong together; found no approval"):
        unseal_master_key(device, seal(device, approver=APPROVER.public_key()))


def test_every_byte_of_an_approval_counts(device: TpmDevice) -> None:
    sealed = seal(device, approver=APPROVER.public_key())
    approval = approve_registers(present(device), APPROVER)
    raw = unb64(approval.signature)
    for at in range(0, len(raw), 7):
        wrong = raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]
        with pytest.raises(SealError):
            unseal_master_key(device, sealed, approval.model_copy(update={"signature": b64(wrong)}))
    assert unsealed(device, sealed, approval) == KEY


def test_every_part_of_the_file_counts(device: TpmDevice) -> None:
    sealed = seal(device)
    for name in ("public", "private"):
        raw = unb64(getattr(sealed, name))
        for at in range(0, len(raw), 9):
            wrong = raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]
            with pytest.raises(SealError):
                unseal_master_key(device, sealed.model_copy(update={name: b64(wrong)}))
        for wrong in (b"", raw[:-1]):
            with pytest.raises(SealError):
                unseal_master_key(device, sealed.model_copy(update={name: b64(wrong)}))
    assert unsealed(device, sealed) == KEY


@pytest.mark.parametrize(
    "changes",
    [
        {"registers": {}},
        {"registers": {"24": "00" * 32}},
        {"registers": {"0": "00"}},
        {"parent": "000b"},
        {"format": "cenacle-tpm-sealed-key-v2"},
        {"public": "*"},
        {"extra": 1},
    ],
)
def test_a_malformed_file_is_refused(changes: dict[str, Any]) -> None:
    fields = {
        "format": "cenacle-tpm-sealed-key-v1",
        "registers": {"0": "00" * 32},
        "parent": "000b" + "00" * 32,
        "public": "AA==",
        "private": "AA==",
    }
    SealedKey.from_fields(fields)
    with pytest.raises(CenacleError):
        SealedKey.from_fields({**fields, **changes})


def test_only_whole_keys_are_sealed_to_something(device: TpmDevice) -> None:
    for key, registers in ((bytes(16), REGISTERS), (KEY, ())):
        with pytest.raises(InputError, match="cannot be sealed in this way"):
            seal_master_key(device, SecretBytes(key), registers)
    with pytest.raises(InputError, match="expected P-256"):
        seal(device, approver=ec.generate_private_key(ec.SECP384R1()).public_key())


class Bus:
    """Everything that passes between a TPM and whoever speaks to it."""

    def __init__(self, tpm: Tpm, folder: Path) -> None:
        self.seen = bytearray()
        self.tcti = f"swtpm:path={folder}/tpm"
        self._threads: list[threading.Thread] = []
        self._ends: list[socket.socket] = []
        target = tpm.tcti.removeprefix("swtpm:path=")
        for suffix in ("", ".ctrl"):
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(f"{folder}/tpm{suffix}")
            listener.listen(8)
            self._ends.append(listener)
            self._run(self._accept, listener, target + suffix)

    def _run(self, work: Callable[..., None], *given: Any) -> None:
        thread = threading.Thread(target=work, args=given)
        thread.start()
        self._threads.append(thread)

    def _accept(self, listener: socket.socket, target: str) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.socket(socket.AF_UNIX)
                far.connect(target)
                self._ends += [near, far]
                self._run(self._pass, near, far)
                self._run(self._pass, far, near)

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(4096):
                self.seen += data
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for end in self._ends:
            end.close()


def test_the_bus_carries_no_key(tpm: Tpm) -> None:
    """Without session encryption the key would pass between TPM and processor in the clear."""
    with tempfile.TemporaryDirectory(prefix="bus-") as folder:
        bus = Bus(tpm, Path(folder))
        try:
            with TpmDevice(bus.tcti) as device:
                assert unsealed(device, seal(device)) == KEY
        finally:
            bus.close()
    assert len(bus.seen) > 1000
    assert KEY not in bus.seen
    assert KEY[:8] not in bus.seen
