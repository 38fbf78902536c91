"""Asset keys in the clear: opened once, only under their own context, and wiped at the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import pytest

from cenacle.broker.store import AssetRow
from cenacle.broker.unwrapping import UnwrappedKeys
from cenacle.crypto import HpkePrivateKey, SecretBytes
from cenacle.documents.asset import Asset
from cenacle.errors import SealError


@dataclass
class Manifest:
    """As much of an asset as a wrapped key is bound to."""

    digest: str

    def wrapping_context(self) -> tuple[bytes, ...]:
        return (b"cenacle/asset-key", self.digest.encode())


class Shelf:
    """A broker's key, and assets whose keys are wrapped to it; it counts what is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.key = HpkePrivateKey.generate()
        self.opened: list[SecretBytes] = []
        self.assets: dict[str, Any] = {}
        self.rows: dict[str, AssetRow] = {}
        for name in ("a", "b", "c"):
            self.assets[name] = Manifest(name)
            context = self.assets[name].wrapping_context()
            wrapped = self.key.public_key.seal(self.plain(name), *context)
            self.rows[name] = AssetRow(name, name, "owner", "{}", wrapped, None)
        really = HpkePrivateKey.open

        def open_and_count(key: HpkePrivateKey, sealed: bytes, *context: bytes) -> SecretBytes:
            self.opened.append(really(key, sealed, *context))
            return self.opened[-1]

        monkeypatch.setattr(HpkePrivateKey, "open", open_and_count)

    @staticmethod
    def plain(name: str) -> bytes:
        return name.encode() * 32

    def take(self, keys: UnwrappedKeys, **rows: str) -> dict[str, bytes]:
        """What the aliases' keys are; each alias has the manifest and row of the asset named."""
        found = keys.of(
            cast("dict[str, Asset]", {alias: self.assets[name] for alias, name in rows.items()}),
            {alias: self.rows[name] for alias, name in rows.items()},
        )
        return {alias: bytes(key.view()) for alias, key in found.items()}

    def assert_wiped(self) -> None:
        for secret in self.opened:
            with pytest.raises(ValueError, match="wiped"):
                secret.view()


@pytest.fixture
def shelf(monkeypatch: pytest.MonkeyPatch) -> Shelf:
    return Shelf(monkeypatch)


def test_each_key_is_opened_once_and_wiped_at_the_end(shelf: Shelf) -> None:
    with UnwrappedKeys(shelf.key) as keys:
        assert shelf.take(keys, x="a", y="b") == {"x": shelf.plain("a"), "y": shelf.plain("b")}
        assert shelf.take(keys, y="a", z="c") == {"y": shelf.plain("a"), "z": shelf.plain("c")}
        assert len(shelf.opened) == 3
    shelf.assert_wiped()
    with UnwrappedKeys(shelf.key) as keys:  # nothing is kept beyond a block
        shelf.take(keys, x="a")
    assert len(shelf.opened) == 4
    shelf.assert_wiped()


def test_the_same_bytes_open_under_their_own_manifest_alone(shelf: Shelf) -> None:
    """An edited store that gives an asset another's wrapped key gains nothing by a good one."""
    shelf.rows["b"] = shelf.rows["a"]
    with UnwrappedKeys(shelf.key) as keys:
        assert shelf.take(keys, x="a") == {"x": shelf.plain("a")}
        for _ in range(2):
            with pytest.raises(SealError):
                shelf.take(keys, x="a", y="b")
        assert shelf.take(keys, x="a", y="c") == {"x": shelf.plain("a"), "y": shelf.plain("c")}
    shelf.assert_wiped()


def test_keys_are_wiped_when_a_block_fails(shelf: Shelf) -> None:
    def fail() -> None:
        with UnwrappedKeys(shelf.key) as keys:
            shelf.take(keys, x="a", y="b")
            raise LookupError

    with pytest.raises(LookupError):
        fail()
    assert len(shelf.opened) == 2
    shelf.assert_wiped()
