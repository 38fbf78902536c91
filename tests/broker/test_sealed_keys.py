"""A broker's keys, sealed to a TPM: in the clear nowhere, lost never."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cenacle.attestation.tpm_device import TpmDevice
from cenacle.broker import sealed_keys
from cenacle.broker.identity import KEY_FILE, SEALED_FILE, BrokerKeys
from cenacle.broker.sealed_keys import new_shares, open_keys, recover_keys, seal_keys
from cenacle.crypto import SecretBytes
from cenacle.crypto.shamir import recovery_shares
from cenacle.documents.base import canonical_json, parse_json
from cenacle.errors import CenacleError, InputError, SealError, UnavailableError
from tests.support.swtpm import Manufacturer, Tpm, require_swtpm, run_swtpm

ORIGIN = "hospitals.example/broker"
REGISTERS = (0, 4, 7)
SHA256 = 0x000B


@pytest.fixture(scope="module")
def manufacturer(tmp_path_factory: pytest.TempPathFactory) -> Manufacturer:
    require_swtpm()
    made = Manufacturer(tmp_path_factory.mktemp("manufacturer"))
    for name in ("one", "two"):
        made.make_plain(name)
    return made


@pytest.fixture
def tpm(manufacturer: Manufacturer) -> Iterator[Tpm]:
    with run_swtpm(manufacturer, manufacturer.folder / "one") as running:
        yield running


@pytest.fixture
def other_tpm(manufacturer: Manufacturer) -> Iterator[Tpm]:
    with run_swtpm(manufacturer, manufacturer.folder / "two") as running:
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "broker"
    BrokerKeys.create(made, ORIGIN)
    return made


def extend(tpm: Tpm, register: int) -> None:
    with TpmDevice(tpm.tcti) as device:
        device.extend(register, SHA256, b"\x01" * 32)


def test_without_a_seal_nothing_changes(tmp_path: Path) -> None:
    made = open_keys(tmp_path / "new", ORIGIN)
    assert open_keys(tmp_path / "new", ORIGIN).identity == made.identity


def test_sealed_keys_open_on_their_machine(folder: Path, tpm: Tpm) -> None:
    before = BrokerKeys.load(folder)
    shares = seal_keys(folder, tpm.tcti, REGISTERS, 2, 3)
    assert len(shares) == 3
    again = open_keys(folder, ORIGIN)
    assert again.to_file() == before.to_file()
    assert [path.name for path in folder.iterdir()] == [SEALED_FILE]
    assert stat.S_IMODE((folder / SEALED_FILE).stat().st_mode) == 0o600


def test_nothing_secret_is_left_on_the_disk(folder: Path, tpm: Tpm) -> None:
    keys = BrokerKeys.load(folder)
    shares = seal_keys(folder, tpm.tcti, REGISTERS, 2, 3)
    written = b"".join(path.read_bytes() for path in folder.rglob("*"))
    fields = parse_json(keys.to_file())
    for secret in (fields["signing_seed"], fields["hpke_seed"][:40]):
        assert secret.encode() not in written
    for share in shares:
        assert share.value not in written
        assert share.to_text().encode() not in written


def test_a_machine_that_changed_does_not_open_them(folder: Path, tpm: Tpm) -> None:
    seal_keys(folder, tpm.tcti, REGISTERS, 2, 3)
    extend(tpm, 4)
    with pytest.raises(SealError, match="other values in PCR 4"):
        open_keys(folder, ORIGIN)


def test_a_stolen_disk_does_not_open_elsewhere(folder: Path, tpm: Tpm, other_tpm: Tpm) -> None:
    seal_keys(folder, tpm.tcti, REGISTERS, 2, 3)
    with pytest.raises(SealError, match="sealed by another TPM"):
        open_keys(folder, ORIGIN, other_tpm.tcti)


def test_the_holders_lead_through_an_update(folder: Path, tpm: Tpm) -> None:
    before = BrokerKeys.load(folder).to_file()
    shares = seal_keys(folder, tpm.tcti, REGISTERS, 2, 3)
    for number in range(2):  # the same shares serve again and again
        extend(tpm, 4)
        with pytest.raises(SealError):
            open_keys(folder, ORIGIN)
        keys = recover_keys(folder, shares[number : number + 2])
        assert keys.to_file() == before
        assert open_keys(folder, ORIGIN).to_file() == before


def test_the_holders_lead_to_another_machine(folder: Path, tpm: Tpm, other_tpm: Tpm) -> None:
    before = BrokerKeys.load(folder).to_file()
    shares = seal_keys(folder, tpm.tcti, REGISTERS, 2, 3)
    recover_keys(folder, shares[:2], REGISTERS, other_tpm.tcti)
    assert open_keys(folder, ORIGIN).to_file() == before


def test_wrong_shares_change_nothing(folder: Path, tpm: Tpm) -> None:
    shares = seal_keys(folder, tpm.tcti, REGISTERS, 2, 3)
    written = (folder / SEALED_FILE).read_bytes()
    others = recovery_shares(SecretBytes(bytes(32)), 2, 3)
    for wrong, error in (
        (shares[:1], InputError),
        ((shares[0], others[1]), InputError),
        (others[:2], SealError),
    ):
        with pytest.raises(error):
            recover_keys(folder, wrong, REGISTERS)
    assert (folder / SEALED_FILE).read_bytes() == written


def test_shares_that_were_lost_are_made_anew(folder: Path, tpm: Tpm) -> None:
    before = BrokerKeys.load(folder).to_file()
    seal_keys(folder, tpm.tcti, REGISTERS, 2, 3)
    fresh = new_shares(folder, 3, 5)
    extend(tpm, 0)
    with pytest.raises(SealError):
        new_shares(folder, 3, 5)
    assert recover_keys(folder, fresh[2:], REGISTERS).to_file() == before


def test_an_interrupted_sealing_is_completed(
    folder: Path, tpm: Tpm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the sealed file is durable, before the clear one is removed."""

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    before = BrokerKeys.load(folder)
    with monkeypatch.context() as patch:
        patch.setattr(sealed_keys, "_remove_clear", killed)
        with pytest.raises(KeyboardInterrupt):
            seal_keys(folder, tpm.tcti, REGISTERS, 2, 3)
    assert {path.name for path in folder.iterdir()} == {KEY_FILE, SEALED_FILE}
    assert open_keys(folder, ORIGIN).to_file() == before.to_file()
    assert [path.name for path in folder.iterdir()] == [SEALED_FILE]


def test_two_sets_of_keys_are_not_mixed(folder: Path, tpm: Tpm, tmp_path: Path) -> None:
    seal_keys(folder, tpm.tcti, REGISTERS, 2, 3)
    BrokerKeys.create(tmp_path / "other", ORIGIN)
    (tmp_path / "other" / KEY_FILE).rename(folder / KEY_FILE)
    with pytest.raises(InputError, match="two different sets of keys"):
        open_keys(folder, ORIGIN)
    assert (folder / KEY_FILE).exists()


def test_keys_are_sealed_once_and_never_made_anew(folder: Path, tpm: Tpm) -> None:
    seal_keys(folder, tpm.tcti, REGISTERS, 2, 3)
    with pytest.raises(InputError, match="are sealed already"):
        seal_keys(folder, tpm.tcti, REGISTERS, 2, 3)
    with pytest.raises(InputError, match="has keys already"):
        BrokerKeys.create(folder, ORIGIN)
    for read in (BrokerKeys.load, lambda at: BrokerKeys.open(at, ORIGIN)):
        with pytest.raises(InputError, match="sealed to its machine's TPM"):
            read(folder)


def test_another_brokers_folder_is_refused(folder: Path, tpm: Tpm) -> None:
    seal_keys(folder, tpm.tcti, REGISTERS, 2, 3)
    with pytest.raises(InputError, match="is of another broker"):
        open_keys(folder, "elsewhere.example/broker")


@pytest.mark.parametrize("numbers", [(1, 3), (4, 3), (2, 17)])
def test_a_refused_sealing_leaves_the_keys(
    folder: Path, tpm: Tpm, numbers: tuple[int, int]
) -> None:
    with pytest.raises(InputError, match="cannot be shared"):
        seal_keys(folder, tpm.tcti, REGISTERS, *numbers)
    with pytest.raises(InputError, match="cannot be sealed"):
        seal_keys(folder, tpm.tcti, (), 2, 3)
    with pytest.raises(UnavailableError):
        seal_keys(folder, "swtpm:path=/nowhere", REGISTERS, 2, 3)
    assert open_keys(folder, ORIGIN).identity.origin == ORIGIN
    assert [path.name for path in folder.iterdir()] == [KEY_FILE]


def test_an_altered_file_is_refused(folder: Path, tpm: Tpm) -> None:
    seal_keys(folder, tpm.tcti, REGISTERS, 2, 3)
    path = folder / SEALED_FILE
    genuine = path.read_bytes()
    fields = parse_json(genuine)
    changes: list[dict[str, Any]] = [
        {"keys": fields["nonce"]},
        {"nonce": "AAAAAAAAAAAAAAAA"},
        {"nonce": "AA=="},
        {"format": "v0"},
        {"more": 1},
        {"master": {**fields["master"], "private": fields["nonce"]}},
    ]
    for change in changes:
        path.write_bytes(canonical_json({**fields, **change}))
        with pytest.raises(CenacleError) as refused:
            open_keys(folder, ORIGIN)
        assert isinstance(refused.value, (InputError, SealError))
    for raw in (b"", genuine[:-1], b"{}"):
        path.write_bytes(raw)
        with pytest.raises(InputError, match="cannot be read"):
            open_keys(folder, ORIGIN)
    path.write_bytes(genuine)
    path.chmod(0o644)
    with pytest.raises(InputError, match="by others"):
        open_keys(folder, ORIGIN)
