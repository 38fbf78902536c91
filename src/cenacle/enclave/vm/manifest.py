"""What an image folder holds: five files, and a manifest that names the digest of each."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import Field

from cenacle.documents.base import Digest, Document, Frozen, NonEmpty
from cenacle.enclave.vm.packages import Package
from cenacle.errors import CenacleError, InputError

__all__ = [
    "CMDLINE_FILE",
    "FILES",
    "MANIFEST_FILE",
    "ImageFile",
    "ImageManifest",
    "Software",
    "VerityFields",
    "file_digest",
]

MANIFEST_FILE: Final = "manifest.json"
CMDLINE_FILE: Final = "cmdline"
FILES: Final = {
    "cmdline": CMDLINE_FILE,
    "initrd": "initrd",
    "kernel": "vmlinuz",
    "listing": "allow-list.jsonl",
    "root": "root.img",
}
_MAX_MANIFEST: Final = 4 << 20
_REBUILD: Final = "build the image again with `cenacle image build`"


class ImageFile(Frozen):
    """One file of an image folder."""

    name: NonEmpty
    digest: Digest
    size: Annotated[int, Field(ge=0)]


class VerityFields(Frozen):
    """The verified root, as the kernel's device mapper needs it."""

    root_hash: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    salt: Annotated[str, Field(pattern=r"^(?:[0-9a-f]{2}){0,256}$")]
    data_blocks: Annotated[int, Field(gt=0)]
    hash_start: Annotated[int, Field(gt=0)]
    algorithm: Literal["sha256"] = "sha256"
    block_size: Literal[4096] = 4096


class Software(Frozen):
    """One Debian package or Python distribution."""

    name: NonEmpty
    version: NonEmpty
    digest: Digest

    def to_package(self) -> Package:
        return Package(self.name, self.version, self.digest)


class ImageManifest(Document):
    """What an image is made of. Its digest names the image: equal digests, equal machines.

    Attributes:
        kernel_release: of the kernel, as ``uname -r`` tells it.
        source_date: seconds since 1970, the time of every file.
        packages: Debian packages of root, initrd and kernel.
        distributions: Python packages of the root.
        extras: which of cenacle's extras the root has.
        memory: MiB of the machine; the firmware measures it, so it belongs to the image.
        processors: of the machine; likewise.
    """

    media_type = "application/vnd.cenacle.image+json"

    version: Literal[1] = 1
    architecture: Literal["amd64"] = "amd64"
    kernel_release: NonEmpty
    cmdline: NonEmpty
    source_date: Annotated[int, Field(ge=0)]
    files: dict[str, ImageFile]
    verity: VerityFields
    packages: tuple[Software, ...]
    distributions: tuple[Software, ...]
    extras: tuple[str, ...] = ()
    memory: Annotated[int, Field(ge=512, le=1 << 24)]
    processors: Annotated[int, Field(ge=1, le=255)]

    @classmethod
    def load(cls, folder: Path, *, check: bool = True) -> Self:
        """Read the manifest of an image folder.

        Args:
            check: also compare every file with its digest, which takes a second per GB.

        Raises:
            InputError: this is no image folder, or a file is not the one of the manifest.
        """
        path = folder / MANIFEST_FILE
        try:
            raw = path.read_bytes() if path.stat().st_size <= _MAX_MANIFEST else b""
            manifest = cls.from_canonical(raw)
        except (OSError, CenacleError) as error:
            reason = error.strerror if isinstance(error, OSError) else error.what
            raise InputError(
                "a folder holds no image of a virtual machine",
                found=f"{path}: {reason}",
                remedy=_REBUILD,
            ) from None
        if {kind: file.name for kind, file in manifest.files.items()} != FILES:
            raise InputError(
                "an image has other files than images have",
                found=", ".join(sorted(manifest.files)),
                expected=", ".join(FILES),
                remedy=_REBUILD,
            )
        if check:
            manifest.check(folder)
        return manifest

    def check(self, folder: Path) -> None:
        """Compare every file with its digest; raises InputError naming the first that differs."""
        for kind, file in self.files.items():
            found = file_digest(folder / file.name)
            if found != file.digest:
                raise InputError(
                    f"the {kind} of an image is not the one of its manifest",
                    found=found,
                    expected=file.digest,
                    remedy=_REBUILD,
                )


def file_digest(path: Path) -> str:
    """``sha256:`` and the SHA-256 of a file; raises InputError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(
            "a file of an image cannot be read", found=f"{path}: {error.strerror}", remedy=_REBUILD
        ) from None
