"""Fetching MNIST from an address that the user names, which need not be trusted.

Files are believed by the digest of what is in them, not by where they come from, and appear
whole or not at all.
"""

from __future__ import annotations

import hashlib
import ipaddress
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cenacle.errors import DataError, InputError, UnavailableError
from cenacle.sealing.disk import AtomicFile, disk_errors, pwrite_all

if TYPE_CHECKING:
    import httpx

__all__ = ["MNIST", "download"]

MNIST: Final[Mapping[str, str]] = {
    "train-images-idx3-ubyte.gz": (
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"
    ),
    "train-labels-idx1-ubyte.gz": (
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"
    ),
    "t10k-images-idx3-ubyte.gz": (
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"
    ),
    "t10k-labels-idx1-ubyte.gz": (
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"
    ),
}
"""SHA-256 of each file as it is unpacked: mirrors pack them anew."""

_MAX_PACKED: Final = 16 << 20
_MAX_UNPACKED: Final = 64 << 20
_MAX_REDIRECTS: Final = 5
_BLOCK: Final = 1 << 16
_SECONDS: Final = 30.0
_BY_HAND: Final = "fetch the files by hand and name their folder by --data"


def download(
    url: str,
    folder: Path,
    digests: Mapping[str, str] = MNIST,
    report: Callable[[int, int], None] | None = None,
) -> Path:
    """Fetch gzipped files from below ``url`` into ``folder``, unless they are there.

    Args:
        url: HTTPS, or HTTP of this machine. It may redirect within the same origin only.
        digests: SHA-256, in hexadecimal digits, of each file's unpacked content, by name.
        report: told how many files are done, of how many.

    Raises:
        InputError: the address cannot be used, or the folder cannot be written to.
        DataError: a file that arrived is not the one of this name.
        UnavailableError: the address does not give the files, or the disk has no room.
    """
    import httpx

    local = _check(url)
    with disk_errors(f"write to {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    missing = [name for name in digests if not _is_there(folder / name, digests[name])]
    # A proxy of the environment knows nothing of this machine's own addresses.
    with httpx.Client(timeout=_SECONDS, trust_env=not local) as client:
        for done, name in enumerate(missing):
            if report is not None:
                report(done, len(missing))
            try:
                _fetch(client, f"{url.rstrip('/')}/{name}", folder / name, digests[name])
            except httpx.HTTPError as error:
                raise UnavailableError(
                    "MNIST cannot be downloaded",
                    found=f"{name}: {str(error)[:200] or type(error).__name__}",
                    remedy=_BY_HAND,
                ) from None
    if report is not None and missing:
        report(len(missing), len(missing))
    return folder


def _check(url: str) -> bool:
    """Whether the address is of this machine. Raises InputError if it cannot be used."""
    import httpx

    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        parsed = httpx.URL("")
    local = _is_loopback(parsed.host)
    if not parsed.host or not (parsed.scheme == "https" or (parsed.scheme == "http" and local)):
        raise InputError(
            "a download needs an HTTPS address",
            found=url[:200],
            expected="https://..., or http:// of this machine",
        )
    if parsed.userinfo or parsed.query or parsed.fragment:
        raise InputError(
            "a download's address is the folder that holds the files",
            found=f"{parsed.scheme}://{parsed.host} with a name, a password or a query",
            expected="https://host/folder",
        )
    return local


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_there(path: Path, digest: str) -> bool:
    if not path.is_file():
        return False
    unpacked = _Unpacked(path.name, digest)
    try:
        with disk_errors(f"read {path}"), path.open("rb") as file:
            while block := file.read(_BLOCK):
                unpacked.take(block)
        unpacked.finish()
    except DataError:
        return False  # fetched again, and replaced only by the true one
    return True


def _fetch(client: httpx.Client, url: str, target: Path, digest: str) -> None:
    """One file: whole and genuine, or not at all."""
    import httpx

    origin = httpx.URL(url)
    place = origin
    for _ in range(_MAX_REDIRECTS):
        # As it is stored: a server that packs it once more gives another file.
        headers = {"Accept-Encoding": "identity"}
        with client.stream("GET", place, headers=headers) as answer:
            if answer.next_request is not None:
                place = answer.next_request.url
                if (place.scheme, place.host, place.port) != (
                    origin.scheme, origin.host, origin.port,
                ):  # fmt: skip
                    raise UnavailableError(
                        "a download is redirected to another address",
                        found=f"{target.name}: {place.scheme}://{place.host}"[:200],
                        expected=f"{origin.scheme}://{origin.host}",
                        remedy="if you trust that address, name it by --download-url",
                    )
                continue
            if answer.status_code != 200:
                raise UnavailableError(
                    "MNIST cannot be downloaded",
                    found=f"{target.name}: status {answer.status_code}",
                    expected="status 200",
                    remedy=f"check the address, or {_BY_HAND}",
                )
            _store(answer, target, digest)
            return
    raise UnavailableError(
        "a download is redirected again and again",
        found=target.name,
        expected=f"at most {_MAX_REDIRECTS - 1} redirections",
        remedy=_BY_HAND,
    )


def _store(answer: httpx.Response, target: Path, digest: str) -> None:
    unpacked = _Unpacked(target.name, digest)
    done = 0
    with AtomicFile(target) as file:
        for block in answer.iter_raw():
            unpacked.take(block)
            with disk_errors(f"write {target}"):
                pwrite_all(file.fd, block, done)
            done += len(block)
        unpacked.finish()
        file.commit()


class _Unpacked:
    """Unpacks a gzip stream as it comes, for its digest alone; bounded on both sides."""

    def __init__(self, name: str, digest: str) -> None:
        self._name = name
        self._digest = digest
        self._inflate = zlib.decompressobj(wbits=31)
        self._hash = hashlib.sha256()
        self._packed = self._size = 0

    def take(self, block: bytes) -> None:
        """Raises :class:`DataError` for what no file of MNIST's can be."""
        self._packed += len(block)
        if self._packed > _MAX_PACKED:
            raise self._wrong(f"more than {_MAX_PACKED >> 20} MiB")
        try:
            while block:
                content = self._inflate.decompress(block, _BLOCK)
                self._size += len(content)
                if self._size > _MAX_UNPACKED:
                    raise self._wrong(f"more than {_MAX_UNPACKED >> 20} MiB when unpacked")
                self._hash.update(content)
                if self._inflate.unused_data:
                    raise self._wrong("more bytes after the end")
                block = self._inflate.unconsumed_tail
        except zlib.error:
            raise self._wrong("damaged, or not gzipped") from None

    def finish(self) -> None:
        """Raises :class:`DataError` unless all of it came and is what it should be."""
        if not self._inflate.eof:
            raise self._wrong("an end too early")
        if self._hash.hexdigest() != self._digest:
            raise self._wrong(f"content with SHA-256 {self._hash.hexdigest()[:16]}...")

    def _wrong(self, found: str) -> DataError:
        return DataError(
            "a downloaded file is not the one of MNIST",
            found=f"{self._name}: {found}",
            expected=f"content with SHA-256 {self._digest[:16]}...",
            remedy="use another address; nothing of it was kept",
        )
