"""A broker's keys: made once, kept privately, never replaced in silence."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cenacle.broker.identity import KEY_FILE, BrokerIdentity, BrokerKeys, check_private_file
from cenacle.crypto.hpke import HpkePrivateKey
from cenacle.crypto.signing import SigningKey
from cenacle.documents.base import b64
from cenacle.errors import CenacleError, DocumentError, InputError, VerificationError

ORIGIN = "hospitals.example/broker"
PEM = "-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "broker"


def test_keys_are_made_once(folder: Path) -> None:
    made = BrokerKeys.open(folder, ORIGIN)
    again = BrokerKeys.open(folder, ORIGIN)
    loaded = BrokerKeys.load(folder)
    assert made.identity == again.identity == loaded.identity
    message = loaded.signing_key.sign(b"message")
    made.identity.verify_key.verify(message, b"message")
    sealed = made.identity.hpke_public.seal(b"asset key", b"context")
    with loaded.hpke_key.open(sealed, b"context") as opened:
        assert bytes(opened.view()) == b"asset key"


def test_everything_is_the_owners_alone(folder: Path) -> None:
    old = os.umask(0)
    try:
        BrokerKeys.create(folder, ORIGIN)
    finally:
        os.umask(old)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [path.name for path in folder.iterdir()] == [KEY_FILE]
    assert stat.S_IMODE((folder / KEY_FILE).stat().st_mode) == 0o600


def test_the_digest_names_the_keys_alone(folder: Path) -> None:
    keys = BrokerKeys.create(folder, ORIGIN)
    before = keys.identity
    after = keys.published_at("https://broker.example:8443", PEM)
    assert before.url is None
    assert after == keys.identity
    assert (after.url, after.tls_certificate) == ("https://broker.example:8443", PEM)
    assert after.digest == before.digest
    after.require_digest(before.digest)
    other = BrokerKeys(ORIGIN, SigningKey.generate(), keys.hpke_key)
    another = BrokerKeys(ORIGIN, keys.signing_key, HpkePrivateKey.generate())
    assert len({before.digest, other.identity.digest, another.identity.digest}) == 3
    with pytest.raises(VerificationError, match="not the one that was pinned"):
        other.identity.require_digest(before.digest)


def test_the_identity_holds_no_secret(folder: Path) -> None:
    keys = BrokerKeys.create(folder, ORIGIN)
    public = json.dumps(keys.published_at("https://b.example", PEM).to_fields())
    for secret in (keys.signing_key.seed(), keys.hpke_key.seed()):
        text = b64(bytes(secret.view()))
        assert text in (folder / KEY_FILE).read_text()
        assert text not in public


def test_identities_cross_json(folder: Path) -> None:
    keys = BrokerKeys.create(folder, ORIGIN)
    for identity in (keys.identity, keys.published_at("https://b.example", PEM)):
        fields = json.loads(json.dumps(identity.to_fields()))
        assert BrokerIdentity.from_fields(fields) == identity


@pytest.mark.parametrize(
    "change",
    [
        {"origin": "two words"},
        {"origin": ""},
        {"url": "http://broker.example"},
        {"url": "https://a\n.example"},
        {"url": ""},
        {"signing_key": b64(bytes(31))},
        {"signing_key": "not base64"},
        {"signing_key": None},
        {"hpke_key": b64(bytes(32))},
        {"hpke_key": b64(bytes(1217))},
        {"more": 1},
    ],
)
def test_identities_that_cannot_be(folder: Path, change: dict[str, Any]) -> None:
    fields = BrokerKeys.create(folder, ORIGIN).identity.to_fields()
    with pytest.raises(DocumentError):
        BrokerIdentity.from_fields({**fields, **change})


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("mode", [0o755, 0o750, 0o701, 0o770])
def test_a_folder_open_to_others_is_refused(folder: Path, mode: int) -> None:
    BrokerKeys.create(folder, ORIGIN)
    folder.chmod(mode)
    with pytest.raises(InputError, match="chmod 700"):
        BrokerKeys.load(folder)
    with pytest.raises(InputError, match="chmod 700"):
        BrokerKeys.open(folder, ORIGIN)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660])
def test_a_file_open_to_others_is_refused(folder: Path, mode: int) -> None:
    BrokerKeys.create(folder, ORIGIN)
    (folder / KEY_FILE).chmod(mode)
    with pytest.raises(InputError, match="chmod 600"):
        BrokerKeys.open(folder, ORIGIN)
    with pytest.raises(InputError, match="chmod 600"):
        check_private_file(folder / KEY_FILE)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_somebody_elses_file_is_refused(folder: Path) -> None:
    BrokerKeys.create(folder, ORIGIN)
    os.chown(folder / KEY_FILE, 65534, -1)
    with pytest.raises(InputError, match="own user"):
        BrokerKeys.load(folder)


def test_a_used_folder_without_keys_is_refused(folder: Path) -> None:
    """Keys were lost: new ones in their place could not open what parties handed in."""
    BrokerKeys.create(folder, ORIGIN)
    (folder / "broker.db").touch()
    (folder / KEY_FILE).unlink()
    with pytest.raises(InputError, match="Restore it from a backup"):
        BrokerKeys.open(folder, ORIGIN)
    assert not (folder / KEY_FILE).exists()


def test_a_first_start_that_was_killed_is_begun_again(folder: Path) -> None:
    folder.mkdir(0o700)
    (folder / ".cenacle-0123456789abcdef.partial").touch(0o600)
    BrokerKeys.open(folder, ORIGIN)
    BrokerKeys.open(folder, ORIGIN)


def test_keys_are_never_overwritten(folder: Path) -> None:
    keys = BrokerKeys.create(folder, ORIGIN)
    with pytest.raises(InputError, match="has keys already"):
        BrokerKeys.create(folder, ORIGIN)
    assert BrokerKeys.load(folder).identity == keys.identity


def test_another_origin_is_refused(folder: Path) -> None:
    BrokerKeys.create(folder, ORIGIN)
    with pytest.raises(InputError, match="of another broker"):
        BrokerKeys.open(folder, "other.example")


def test_a_missing_folder_has_no_keys(folder: Path) -> None:
    with pytest.raises(InputError, match="no keys"):
        BrokerKeys.load(folder)
    assert not folder.exists()


def test_links_are_not_followed(folder: Path, tmp_path: Path) -> None:
    BrokerKeys.create(folder, ORIGIN)
    link = tmp_path / "link"
    link.symlink_to(folder)
    with pytest.raises(CenacleError):
        BrokerKeys.load(link)
    (folder / KEY_FILE).rename(folder / "moved")
    (folder / KEY_FILE).symlink_to("moved")
    with pytest.raises(CenacleError):
        BrokerKeys.load(folder)


def test_a_folder_of_keys_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch(0o600)
    with pytest.raises(CenacleError):
        BrokerKeys.open(tmp_path / "file", ORIGIN)
    folder = tmp_path / "folder"
    folder.mkdir(0o700)
    (folder / KEY_FILE).mkdir(0o700)
    with pytest.raises(CenacleError):
        BrokerKeys.load(folder)


def test_every_damage_is_seen(folder: Path) -> None:
    """Each truncation and flipped bits all along the file: refused, and left as it is."""
    BrokerKeys.create(folder, ORIGIN)
    path = folder / KEY_FILE
    whole = path.read_bytes()
    damaged = [whole[:length] for length in range(0, len(whole), 13)]
    damaged += [b"", b"{}", b"[]", b"null", b'{"format":"cenacle-broker-key-v1"}', b"\xff" * 100]
    damaged += [whole + b"x", whole + whole, whole.replace(b"key-v1", b"key-v2")]
    damaged += [
        whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :]
        for at in range(0, len(whole), 7)
        for bit in (0, 1, 5)
    ]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(InputError, match="damaged") as caught:
            BrokerKeys.open(folder, ORIGIN)
        assert "seed" not in caught.value.diagnostics()
        assert path.read_bytes() == content


CREATE = """
import sys, pathlib
from cenacle.broker.identity import BrokerKeys
sys.stdin.readline()
print(BrokerKeys.open(pathlib.Path(sys.argv[1]), "hospitals.example/broker").identity.digest)
"""


@pytest.mark.processes
def test_two_first_starts_make_one_set_of_keys(folder: Path) -> None:
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CREATE, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    digests = {child.communicate("go\n", timeout=60)[0].strip() for child in children}
    assert digests == {BrokerKeys.load(folder).identity.digest}
