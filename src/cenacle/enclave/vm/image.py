"""Build an image: the same inputs give the same bytes, wherever and whenever it is built."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cenacle.attestation.ima_allow import AllowList
from cenacle.enclave.vm import initrd
from cenacle.enclave.vm.cpio import write_cpio
from cenacle.enclave.vm.distributions import (
    add_distributions,
    compile_sources,
    required,
)
from cenacle.enclave.vm.erofs import write_erofs
from cenacle.enclave.vm.kernel import find_kernel
from cenacle.enclave.vm.manifest import (
    FILES,
    MANIFEST_FILE,
    ImageFile,
    ImageManifest,
    Software,
    VerityFields,
    file_digest,
)
from cenacle.enclave.vm.packages import Package, PackageCache, kernel_package, resolve, unpack
from cenacle.enclave.vm.tree import Tree
from cenacle.enclave.vm.verity import append_verity
from cenacle.errors import ConflictError, InputError, UnavailableError
from cenacle.sealing.disk import disk_errors

__all__ = [
    "ARGUMENTS",
    "MEASURED_ROOT",
    "ROOT_PACKAGES",
    "ImagePlan",
    "build_image",
    "default_cache",
    "write_image",
]

ROOT_PACKAGES: Final = (
    "libpython3.11-stdlib",
    "libseccomp2",
    "libstdc++6",
    "libtss2-esys-3.0.2-0",
    "libtss2-fapi1",
    "libtss2-rc0",
    "libtss2-tcti-device0",
    "libtss2-tctildr0",
    "python3.11-minimal",
)
ARGUMENTS: Final = (
    "console=ttyS0",
    "quiet",
    "loglevel=4",
    "panic=-1",
    "oops=panic",
    "ima_policy=tcb",
    "ima_hash=sha256",
    "lockdown=confidentiality",
    "module.sig_enforce=1",
    "rdinit=/init",
)
"""Arguments of every kernel; the verified root is added."""

MEASURED_ROOT: Final = "usr/share/cenacle/measured-root"
"""Tells the agent that every file it sees is vouched for by the command line's root hash."""

_WANTED: Final = ("usr/lib/python3", "usr/lib/x86_64-linux-gnu/", "usr/lib64/")
_PYTHON: Final = "usr/bin/python3.11"
_BUILDER: Final = "Python 3.11 on x86_64"
_FOLDERS: Final = ("dev", "proc", "run", "sys", "tmp", "work")
_USERS: Final = (
    b"root:x:0:0::/nonexistent:/nonexistent\nenclave:x:1000:1000::/nonexistent:/nonexistent\n"
)
_GROUPS: Final = b"root:x:0:\nenclave:x:1000:\n"
_HOSTS: Final = b"127.0.0.1 localhost\n"


@dataclass(frozen=True)
class ImagePlan:
    """What goes into an image.

    Attributes:
        extras: of ``cenacle``'s extras, those whose packages the root has.
        more: other installed Python packages, for the programs of contracts.
        lock: the manifest of an earlier build, whose Debian packages are taken again.
        arguments: of the kernel, before the verified root.
        source_date: seconds since 1970, the time of every file.
        memory: MiB of the machine. From 2816 on, only the firmware's own register depends on it.
        processors: of the machine.
    """

    extras: tuple[str, ...] = ("sandbox", "tpm")
    more: tuple[str, ...] = ()
    lock: ImageManifest | None = None
    arguments: tuple[str, ...] = ARGUMENTS
    source_date: int = field(
        default_factory=lambda: int(os.environ.get("SOURCE_DATE_EPOCH", "0") or 0)
    )
    memory: int = 3072
    processors: int = 2

    def __post_init__(self) -> None:
        if self.source_date < 0 or self.source_date >= 1 << 32:
            raise InputError(
                "the time of an image cannot be used", found=self.source_date, expected="seconds"
            )


def default_cache() -> Path:
    """Where packages are kept between builds (XDG base directory specification)."""
    home = os.environ.get("XDG_CACHE_HOME")
    return Path(home if home else Path("~/.cache").expanduser()) / "cenacle" / "packages"


def build_image(
    folder: Path,
    plan: ImagePlan,
    *,
    cache: Path | None = None,
    step: Callable[[str], None] = lambda _: None,
) -> ImageManifest:
    """Build an image from Debian packages and this installation of ``cenacle``.

    Args:
        folder: must not exist, or be empty; appears whole or not at all.
        step: told what is being done, for people.

    Raises:
        ConflictError: the folder has something in it.
        UnavailableError: a tool or a package is missing.
        InputError: something has other content than it should.
    """
    _check_builder()
    step("choosing packages")
    store = PackageCache(default_cache() if cache is None else cache)
    if plan.lock is None:
        kernel = kernel_package()
        packages = resolve((*ROOT_PACKAGES, *initrd.PACKAGES))
    else:
        locked = [one.to_package() for one in plan.lock.packages]
        kernel = next(p for p in locked if p.name.startswith("linux-image-"))
        packages = [p for p in locked if p != kernel]
    step("fetching packages")
    store.fetch([kernel, *packages])
    step("unpacking packages")
    unpacked, modules = Tree(), Tree()
    for package in packages:
        unpack(store.path(package), unpacked, lambda _: True)
    unpack(store.path(kernel), modules, lambda _: True)
    root = Tree(nodes={path: node for path, node in unpacked.nodes.items() if _in_root(path)})
    step("collecting Python packages")
    distributions = add_distributions(root, required(plan.extras, plan.more))
    step("compiling Python packages")
    compile_sources(root)
    step("writing")
    return write_image(
        folder,
        plan,
        root=root,
        packages=unpacked,
        kernel=modules,
        software=sorted([kernel, *packages]),
        distributions=[Software(**one.to_dict()) for one in distributions],
    )


def write_image(
    folder: Path,
    plan: ImagePlan,
    *,
    root: Tree,
    packages: Tree,
    kernel: Tree,
    software: Sequence[Package] = (),
    distributions: Sequence[Software] = (),
) -> ImageManifest:
    """Write the files of an image and its manifest into a folder.

    Args:
        root: the files of the root; folders that every root has are added.
        packages: unpacked packages with what the first root folder needs.
        kernel: the unpacked kernel package.

    Raises:
        ConflictError: the folder has something in it.
        InputError: something that an image needs is not in the trees.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConflictError(
            "an image is not written over something else",
            found=str(folder),
            expected="a folder that does not exist, or is empty",
        )
    with disk_errors(f"write {folder}"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that it takes its name in one step.
        part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            manifest = _write_files(part, plan, root, packages, kernel, software, distributions)
            (part / MANIFEST_FILE).write_bytes(manifest.canonical_bytes())
            for path in part.iterdir():
                path.chmod(0o644)
                _sync(path)
            part.chmod(0o755)
            if folder.exists():
                folder.rmdir()
            part.rename(folder)
            _sync(folder.parent)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
    return manifest


def _check_builder() -> None:
    """Compiled packages of this installation must fit the image's interpreter."""
    found = f"Python {sys.version_info[0]}.{sys.version_info[1]} on {platform.machine()}"
    if found != _BUILDER or sys.platform != "linux":
        raise UnavailableError(
            "an image cannot be built from this installation",
            found=f"{found}, {sys.platform}",
            expected=f"{_BUILDER}, linux",
            remedy="install cenacle for Debian 12's Python, and build with that",
        )


def _in_root(path: str) -> bool:
    return path.startswith(_WANTED) or path == _PYTHON


def _write_files(
    part: Path,
    plan: ImagePlan,
    root: Tree,
    packages: Tree,
    kernel: Tree,
    software: Sequence[Package],
    distributions: Sequence[Software],
) -> ImageManifest:
    for name in _FOLDERS:
        root.add_folder(name)
    root.add_file(MEASURED_ROOT, b"")
    root.add_file("etc/passwd", _USERS)
    root.add_file("etc/group", _GROUPS)
    root.add_file("etc/hosts", _HOSTS)
    root.add_merged_links()
    release, binary = find_kernel(kernel)
    # What the guest's kernel will list as executed can only be of these.
    listing = AllowList(
        {path: (bytes.fromhex(digest),) for path, digest in root.digests().items()},
        required=[f"/{_PYTHON}"],
    ).serialized
    with (part / FILES["root"]).open("wb+") as file:
        write_erofs(root, file, plan.source_date)
        # Unpredictable enough for its purpose, and equal for equal contents.
        salt = hashlib.sha256(b"cenacle/verity/v1\0" + listing).digest()
        table = append_verity(file, salt)
    with (part / FILES["initrd"]).open("wb") as file:
        write_cpio(initrd.initrd_tree(packages, kernel, release), file, plan.source_date)
    cmdline = " ".join((*plan.arguments, f"cenacle.verity={table.argument()}"))
    (part / FILES["kernel"]).write_bytes(binary)
    (part / FILES["listing"]).write_bytes(listing)
    (part / FILES["cmdline"]).write_bytes(cmdline.encode("ascii"))
    files = {
        kind: ImageFile(
            name=name, digest=file_digest(part / name), size=(part / name).stat().st_size
        )
        for kind, name in FILES.items()
    }
    return ImageManifest(
        kernel_release=release,
        cmdline=cmdline,
        source_date=plan.source_date,
        files=files,
        verity=VerityFields(
            root_hash=table.root.hex(),
            salt=table.salt.hex(),
            data_blocks=table.data_blocks,
            hash_start=table.hash_start,
        ),
        packages=tuple(Software(**one.to_dict()) for one in software),
        distributions=tuple(distributions),
        extras=plan.extras,
        memory=plan.memory,
        processors=plan.processors,
    )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
