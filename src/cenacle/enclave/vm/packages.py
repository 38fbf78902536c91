"""Debian packages for an image: chosen by apt, checked by digest, unpacked without root.

apt's solver works on the signed package lists of this machine with an empty installation, so
what is installed here does not matter. A package is used only if its SHA-256 is the one in
those lists, or in the manifest of an earlier build that is being repeated.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final
from urllib.parse import quote

from cenacle.enclave.vm.tree import Tree
from cenacle.errors import InputError, UnavailableError

__all__ = ["Package", "PackageCache", "kernel_package", "resolve", "unpack"]

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9+.-]+")
_VERSION: Final = re.compile(r"[A-Za-z0-9.+:~-]+")
_INSTALL: Final = re.compile(r"^Inst (\S+) (?:\[\S+\] )?\((\S+) .*\[(\S+)\]\)", re.MULTILINE)
_LIST_REMEDY: Final = "run `apt-get update`, on Debian 12 or in a container of it"
_DOWNLOAD_TIMEOUT_S: Final = 900
# Tools that a package needs while it is installed, and nothing does while the image runs.
_INSTALLERS: Final = frozenset({"debconf", "dpkg", "install-info", "perl-base", "tar"})


@dataclass(frozen=True, order=True)
class Package:
    """One version of a package.

    Attributes:
        digest: ``sha256:`` and the SHA-256 of the ``.deb`` file.
    """

    name: str
    version: str
    digest: str

    def to_dict(self) -> dict[str, str]:
        return {"name": self.name, "version": self.version, "digest": self.digest}


def resolve(names: Sequence[str]) -> list[Package]:
    """The packages and everything that they depend on, sorted by name.

    Raises:
        UnavailableError: apt is not here, or does not know a package.
    """
    with tempfile.NamedTemporaryFile(prefix="cenacle-status-") as status:
        text = _run(
            "apt-get",
            *("-o", f"Dir::State::status={status.name}", "-o", "Debug::NoLocking=1"),
            *("--simulate", "--no-install-recommends", "install"),
            *names,
        )
    chosen = {name.partition(":")[0]: version for name, version, _ in _INSTALL.findall(text)}
    if missing := [name for name in names if name not in chosen]:
        raise UnavailableError("apt does not install what an image needs", found=", ".join(missing))
    return _described({n: v for n, v in chosen.items() if n not in _INSTALLERS})


def kernel_package(meta: str = "linux-image-cloud-amd64") -> Package:
    """The kernel that a meta package stands for, without what would install it.

    Raises:
        UnavailableError: apt does not know it.
    """
    text = _run("apt-cache", "show", "--no-all-versions", meta)
    found = re.search(r"^Depends: (linux-image-\S+) \(= (\S+)\)", text, re.MULTILINE)
    if found is None:
        raise UnavailableError(
            "a kernel package does not name its kernel", found=meta, remedy=_LIST_REMEDY
        )
    return _described({found[1]: found[2]})[0]


def _described(versions: Mapping[str, str]) -> list[Package]:
    """Packages with the digests that the signed lists give them."""
    wanted = [f"{name}={version}" for name, version in versions.items()]
    text = _run("apt-cache", "show", *wanted)
    digests = {}
    for entry in text.split("\n\n"):
        fields = dict(re.findall(r"^(Package|Version|SHA256): (\S+)$", entry, re.MULTILINE))
        if len(fields) == 3:
            digests[fields["Package"], fields["Version"]] = fields["SHA256"]
    try:
        return sorted(Package(n, v, f"sha256:{digests[n, v]}") for n, v in versions.items())
    except KeyError as error:
        raise UnavailableError(
            "the package lists give no digest of a package",
            found=" ".join(error.args[0]),
            remedy=_LIST_REMEDY,
        ) from None


class PackageCache:
    """Downloaded packages in a folder, named by their digests.

    Args:
        folder: made if it does not exist.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, package: Package) -> Path:
        """Where the package is or will be."""
        return self._folder / f"{package.digest.removeprefix('sha256:')}.deb"

    def fetch(self, packages: Iterable[Package]) -> None:
        """Have all of them in the folder, each with its digest.

        Raises:
            UnavailableError: one cannot be downloaded.
            InputError: one has other bytes than its digest says.
        """
        missing = []
        for package in sorted(set(packages)):
            if not (_NAME.fullmatch(package.name) and _VERSION.fullmatch(package.version)):
                raise InputError("a package has an unusable name", found=package.name[:80])
            if not self.path(package).is_file():
                missing.append(package)
            else:
                _check(package, self.path(package))
        if not missing:
            return
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=self._folder) as folder:
            _run(
                *("apt-get", "-q", "-q", "download"),
                *(f"{package.name}={package.version}" for package in missing),
                cwd=Path(folder),
            )
            for package in missing:
                # apt names the file with the epoch's colon quoted.
                pattern = f"{package.name}_{quote(package.version, safe='~+')}_*.deb"
                found = [*Path(folder).glob(pattern.replace("%3A", "%3a"))]
                if len(found) != 1:
                    raise UnavailableError(
                        "apt has not downloaded a package", found=package.name, remedy=_LIST_REMEDY
                    )
                _check(package, found[0])
                found[0].replace(self.path(package))


def _check(package: Package, path: Path) -> None:
    with path.open("rb") as file:
        digest = "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
    if digest != package.digest:
        raise InputError(
            "a package is not the one that was chosen",
            found=f"{package.name} with {digest}",
            expected=package.digest,
            remedy="delete it from the cache of packages, and build again",
        )


def unpack(path: Path, tree: Tree, wanted: Callable[[str], bool]) -> None:
    """Add the files of a ``.deb`` to a tree, those whose path is wanted.

    Raises:
        InputError: it is no Debian package, or holds something else than files and links.
        UnavailableError: ``dpkg-deb`` is not here.
    """
    command = [_program("dpkg-deb"), "--fsys-tarfile", str(path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        try:
            _add_archive(process.stdout, tree, wanted)
            process.stdout.read()
        except (tarfile.TarError, EOFError, KeyError):
            raise InputError("a package cannot be unpacked", found=path.name) from None
    if process.returncode != 0:
        raise InputError("a package cannot be unpacked", found=path.name)


def _add_archive(file: IO[bytes], tree: Tree, wanted: Callable[[str], bool]) -> None:
    files: dict[str, bytes] = {}
    with tarfile.open(fileobj=file, mode="r|") as archive:
        for member in archive:
            name = member.name.removeprefix("./").strip("/")
            if member.isdir() or not name or not (member.islnk() or wanted(name)):
                continue
            if member.issym():
                tree.add_link(name, member.linkname)
            elif member.isfile():
                content = archive.extractfile(member)
                assert content is not None
                files[name] = content.read()
                tree.add_file(name, files[name], member.mode)
            elif member.islnk():
                if wanted(name):
                    source = files[member.linkname.removeprefix("./")]
                    tree.add_file(name, source, member.mode)
            else:
                raise InputError(
                    "a package holds something else than files and links", found=f"/{name}"
                )


def _program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise UnavailableError(
            "a program that builds images is not here",
            found=f"no {name}",
            remedy="build the image on Debian 12, or in a container of it",
        )
    return found


def _run(program: str, *arguments: str, cwd: Path | None = None) -> str:
    try:
        done = subprocess.run(
            [_program(program), *arguments],
            cwd=cwd,
            env={
                "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
                "LC_ALL": "C.UTF-8",
                "HOME": "/nonexistent",
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_DOWNLOAD_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UnavailableError(
            "apt does not come to an end", found=f"{program} after {_DOWNLOAD_TIMEOUT_S} s"
        ) from None
    if done.returncode != 0:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise UnavailableError(
            "apt cannot provide the packages of an image",
            found=lines[-1] if lines else f"{program} ended with {done.returncode}",
            remedy=_LIST_REMEDY,
        )
    return done.stdout.decode("utf-8", "replace")
