"""Digests of the files in a Debian package, read without unpacking it to disk.

Formats: deb(5), ar(5). ``data.tar`` compressed with xz or gzip, or not; Debian 12 uses xz.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final

from cenacle.errors import InputError

__all__ = ["files_of_package"]

_AR: Final = b"!<arch>\n"
_MERGED: Final = ("bin", "sbin", "lib", "lib32", "lib64", "libo32", "libx32")
_PIECE: Final = 1 << 20


def files_of_package(package: Path, *, merged_usr: bool = True) -> Iterator[tuple[str, bytes]]:
    """Absolute path and SHA-256 of every regular file.

    Args:
        merged_usr: file ``/bin``, ``/sbin`` and ``/lib*`` under ``/usr``.

    Raises:
        InputError: it is no package, damaged, or of another compression.
    """
    try:
        with package.open("rb") as file:
            _find_data(file, package)
            with tarfile.open(fileobj=file, mode="r|*") as archive:
                yield from _members(archive, merged_usr=merged_usr)
    except (OSError, EOFError, ValueError, tarfile.TarError) as error:
        raise InputError(
            "a Debian package cannot be read",
            found=f"{package.name}: {error}",
            remedy="unpack it with `dpkg-deb -x`, and measure the folder",
        ) from None


def _find_data(file: IO[bytes], package: Path) -> None:
    """Leave the file where ``data.tar*`` begins; the tar's own end marks the end."""
    if file.read(len(_AR)) != _AR:
        raise InputError("the file is no Debian package", found=package.name, expected="a .deb")
    while len(header := file.read(60)) == 60:
        name, size = header[:16].rstrip(b" /"), header[48:58].strip()
        if header[58:] != b"`\n" or not size.isdigit():
            break
        if name.startswith(b"data.tar"):
            return
        file.seek(int(size) + int(size) % 2, 1)
    raise InputError("a Debian package has no data", found=package.name, expected="data.tar")


def _members(archive: tarfile.TarFile, *, merged_usr: bool) -> Iterator[tuple[str, bytes]]:
    hashes: dict[str, bytes] = {}
    for member in archive:
        name = "/" + member.name.removeprefix("./").lstrip("/")
        if member.isreg():
            content = archive.extractfile(member)
            assert content is not None  # of a regular member, there is
            digest = hashlib.sha256()
            while piece := content.read(_PIECE):
                digest.update(piece)
            hashes[name] = digest.digest()
        elif member.islnk():  # a second name of a file that came before
            target = "/" + member.linkname.removeprefix("./").lstrip("/")
            if target not in hashes:
                raise InputError("a Debian package links to a file that it lacks", found=name)
            hashes[name] = hashes[target]
        else:
            continue
        first = name.split("/", 2)[1]
        yield ("/usr" + name if merged_usr and first in _MERGED else name), hashes[name]
