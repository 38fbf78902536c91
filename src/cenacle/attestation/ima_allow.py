"""Allow-lists: which content each measured file may have, and the appraisal of an IMA list.

A list is a file of JSON lines whose SHA-256 is the reference value ``allow-list`` of a contract.
It is made from what will be installed (a root folder, Debian packages), never from a running
machine's own measurements. Packages' ``md5sums`` are of no use: MD5 collides at will, and IMA
does not measure with it.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from cenacle.attestation.deb import files_of_package
from cenacle.attestation.ima_list import BOOT_AGGREGATE, ImaEntry, show_name
from cenacle.documents.base import Digest, sha256_digest, short
from cenacle.errors import DocumentError, EvidenceError, InputError

__all__ = ["MAX_VIOLATIONS", "AllowList", "Appraisal"]

MAX_VIOLATIONS: Final = 256
_MAX_BYTES: Final = 128 * 1024 * 1024
_MAX_LINES: Final = 1_000_000
_MAX_NAME: Final = 4096
_NAMED: Final = 20
_HEAD: Final = {"algorithm": "sha256", "format": "cenacle/ima-allow-list", "version": 1}
_ALGORITHM: Final = "sha256"
_BUFFER: Final = b"ima-buf"


@dataclass(slots=True)
class Appraisal:
    """What an appraised list showed; continued when more entries of the same boot come.

    Attributes:
        entries: how many were appraised.
        violations: names of files that were written while they were being measured; how many
            there are is proven, the names are the sender's word.
        replaced: names that were measured with two allowed contents.
        seen: name to the first content measured.
    """

    entries: int = 0
    violations: list[str] = field(default_factory=list)
    replaced: set[str] = field(default_factory=set)
    seen: dict[bytes, bytes] = field(default_factory=dict)

    def copy(self) -> Appraisal:
        return Appraisal(self.entries, list(self.violations), set(self.replaced), dict(self.seen))


class AllowList:
    """Path to allowed SHA-256 digests, and label to digests of measured buffers.

    ``serialized`` is the list as a file, and ``digest`` what a contract names it by.

    Args:
        files: absolute, normal path to digests (32 bytes each).
        buffers: label of ``ima-buf`` entries (``kexec-cmdline``, ``kernel_version``) to digests.
        required: paths without which a list proves nothing, e.g. the agent's program.

    Raises:
        DocumentError: a path is not absolute and normal, or a digest has another length.
    """

    __slots__ = ("_index", "buffers", "digest", "files", "required", "serialized")

    def __init__(
        self,
        files: Mapping[str, Iterable[bytes]],
        buffers: Mapping[str, Iterable[bytes]] | None = None,
        required: Iterable[str] = (),
    ) -> None:
        self.files = {_path(name): _digests(files[name]) for name in sorted(files)}
        given = buffers or {}
        self.buffers = {_label(name): _digests(given[name]) for name in sorted(given)}
        self.required = frozenset(required)
        if missing := sorted(self.required - set(self.files)):
            raise DocumentError("an allow-list requires files that it does not list", found=missing)
        self._index: dict[bytes, frozenset[bytes]] = {}
        for name, digests in self.files.items():
            key = _kernel_name(name)
            self._index[key] = self._index.get(key, frozenset()) | digests
        self.serialized = b"".join(self._lines())
        self.digest: Digest = sha256_digest(self.serialized)

    def _lines(self) -> Iterator[bytes]:
        yield _line(_HEAD)
        for name, digests in self.files.items():
            fields: dict[str, Any] = {"digests": sorted(d.hex() for d in digests), "file": name}
            if name in self.required:
                fields["required"] = True
            yield _line(fields)
        for name, digests in self.buffers.items():
            yield _line({"buffer": name, "digests": sorted(d.hex() for d in digests)})

    @classmethod
    def parse(cls, raw: bytes) -> Self:
        """Read the file form; only the one form that :attr:`serialized` has.

        Raises:
            DocumentError: it is not an allow-list, or not in canonical form.
        """
        if len(raw) > _MAX_BYTES:
            raise DocumentError(
                "an allow-list is too large", found=len(raw), expected=f"<= {_MAX_BYTES} bytes"
            )
        files: dict[str, Iterable[bytes]] = {}
        buffers: dict[str, Iterable[bytes]] = {}
        required = []
        lines = raw.split(b"\n")
        for place, line in enumerate(lines[:-1]):
            try:
                fields = json.loads(line)
                if place == 0:
                    if fields != _HEAD:
                        raise ValueError
                    continue
                digests = [bytes.fromhex(text) for text in fields["digests"]]
                name = fields["file"] if "file" in fields else fields["buffer"]
                if not isinstance(name, str):
                    raise TypeError
                (files if "file" in fields else buffers)[name] = digests
                required += [name] if fields.get("required") else []
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise DocumentError(
                    f"line {place + 1} of an allow-list is not understood",
                    expected="a list written by `cenacle image measure`",
                ) from None
        made = cls(files, buffers, required)
        if made.serialized != raw:
            raise DocumentError(
                "an allow-list is not in canonical form",
                found="lines out of order, twice, or written in another way",
                remedy="write it with `cenacle image measure`",
            )
        return made

    @classmethod
    def of_tree(cls, root: Path, required: Iterable[str] = ()) -> Self:
        """Every regular file below a folder (an unpacked or mounted root), links not followed.

        Raises:
            InputError: a file cannot be read, or has a name that is not UTF-8.
        """
        return cls(dict(_walk(root)), required=required)

    @classmethod
    def of_listing(cls, listing: bytes, required: Iterable[str] = ()) -> Self:
        """From the output of ``sha256sum`` over absolute paths.

        Raises:
            InputError: a line is not in that form.
        """
        files: dict[str, set[bytes]] = {}
        for place, line in enumerate(listing.split(b"\n")):
            if not line:
                continue
            try:
                escaped = line.startswith(b"\\")
                digest, name = line.removeprefix(b"\\").split(b"  ", 1)
                text = name.decode()
                if escaped:
                    text = _unescape(text)
                files.setdefault(text, set()).add(bytes.fromhex(digest.decode()))
            except ValueError:
                raise InputError(
                    f"line {place + 1} of a listing is not understood",
                    expected="sha256sum's form, with names in UTF-8",
                ) from None
        return cls(files, required=required)

    @classmethod
    def of_packages(cls, packages: Iterable[Path], *, merged_usr: bool = True) -> Self:
        """Every regular file in Debian packages (``.deb``); nothing is unpacked to disk.

        What installation generates (``ld.so.cache``, an initial RAM disk) is in no package.

        Args:
            merged_usr: file ``/bin``, ``/sbin`` and ``/lib*`` under ``/usr``, where they are on
                every Debian since 12.

        Raises:
            InputError: a package is not readable, or compressed in a way that Python is not
                able to read.
        """
        files: dict[str, set[bytes]] = {}
        for package in packages:
            for name, digest in files_of_package(package, merged_usr=merged_usr):
                files.setdefault(name, set()).add(digest)
        return cls(files)

    def merged(self, *others: AllowList) -> AllowList:
        """One list that allows what any of them does."""
        files: dict[str, set[bytes]] = {}
        buffers: dict[str, set[bytes]] = {}
        for part in (self, *others):
            for name, digests in part.files.items():
                files.setdefault(name, set()).update(digests)
            for name, digests in part.buffers.items():
                buffers.setdefault(name, set()).update(digests)
        return AllowList(files, buffers, frozenset().union(*(p.required for p in (self, *others))))

    def appraise(
        self, entries: list[ImaEntry], aggregates: frozenset[bytes], before: Appraisal | None = None
    ) -> Appraisal:
        """Every entry is allowed, or a violation; required files are there.

        Args:
            entries: an authenticated list, or what came since ``before``.
            aggregates: what the boot aggregate may be (see
                :func:`~cenacle.attestation.ima_list.boot_aggregates`).
            before: what earlier entries of the same boot showed.

        Raises:
            EvidenceError: naming the first twenty entries that are not allowed, and how many
                there are; or a required file that was not measured.
        """
        state = Appraisal() if before is None else before.copy()
        if before is None and (not entries or entries[0].name != BOOT_AGGREGATE):
            raise EvidenceError(
                "the IMA list does not begin with the boot aggregate",
                found="an empty list" if not entries else show_name(entries[0].name),
                expected="boot_aggregate",
                remedy="boot with ima_policy=tcb, and send the list from its beginning",
            )
        index, seen, wrong = self._index, state.seen, []
        nothing: frozenset[bytes] = frozenset()
        for entry in entries:
            name, digest = entry.name, entry.digest
            if (
                digest in index.get(name, nothing)
                and entry.algorithm == _ALGORITHM
                and entry.template != _BUFFER
                and not entry.violation
            ):
                if seen.setdefault(name, digest) != digest:
                    state.replaced.add(show_name(name))
            elif entry.violation:
                state.violations.append(show_name(name))
            elif not self._is_special(entry, aggregates):
                wrong.append(entry)
        state.entries += len(entries)
        if wrong:
            raise self._refusal(wrong)
        if len(state.violations) > MAX_VIOLATIONS:
            raise EvidenceError(
                "the IMA list has too many violations to judge them",
                found=f"{len(state.violations)}, the first of {state.violations[0]}",
                expected=f"<= {MAX_VIOLATIONS}",
                remedy="measure files that programs do not write to",
            )
        self._check_required(state)
        return state

    def _is_special(self, entry: ImaEntry, aggregates: frozenset[bytes]) -> bool:
        """A measured buffer that is listed, or the right boot aggregate."""
        if entry.algorithm != _ALGORITHM:
            return False
        if entry.template == _BUFFER:
            label = entry.name.decode("utf-8", "replace")
            return entry.digest in self.buffers.get(label, ())
        return entry.name == BOOT_AGGREGATE and entry.digest in aggregates

    def _check_required(self, state: Appraisal) -> None:
        missing = [name for name in sorted(self.required) if _kernel_name(name) not in state.seen]
        if missing or not state.seen:
            raise EvidenceError(
                "the IMA list lacks files that must have been measured",
                found=f"{len(state.seen)} files, without {', '.join(missing[:_NAMED]) or 'any'}",
                expected="every required file",
                remedy="boot with an IMA policy that measures programs: ima_policy=tcb",
            )

    def _refusal(self, wrong: list[ImaEntry]) -> EvidenceError:
        contents = {digest for digests in self.files.values() for digest in digests}
        told = [self._explain(entry, contents) for entry in wrong[:_NAMED]]
        if len(wrong) > _NAMED:
            told.append(f"and {len(wrong) - _NAMED} more")
        count = "a file" if len(wrong) == 1 else f"{len(wrong)} files"
        return EvidenceError(
            f"the kernel measured {count} that the allow-list does not allow",
            found="; ".join(told),
            expected=f"entries of the allow-list {short(self.digest)}",
            remedy="restore or remove the file, or have a new allow-list signed in a new contract",
        )

    def _explain(self, entry: ImaEntry, contents: set[bytes]) -> str:
        name, shown = show_name(entry.name), f"{entry.algorithm}:{entry.digest.hex()[:12]}"
        if entry.algorithm != _ALGORITHM:
            return f"{name} measured with {entry.algorithm}, not {_ALGORITHM} (ima_hash=)"
        if entry.name == BOOT_AGGREGATE:
            return f"boot_aggregate of other registers ({shown})"
        if entry.template == _BUFFER:
            return f"buffer {name} ({shown})"
        if entry.name in self._index:
            return f"{name} with other content ({shown})"
        if entry.digest in contents:
            return f"{name}, unknown, with the content of a listed file ({shown})"
        return f"{name}, unknown ({shown})"


def _kernel_name(name: str) -> bytes:
    """As the kernel writes it into its list: it replaces spaces, so that lines stay apart."""
    return name.encode().replace(b" ", b"_")


def _path(name: str) -> str:
    normal = name.startswith("/") and not name.startswith("//") and posixpath.normpath(name) == name
    if not normal or "\0" in name or len(name) > _MAX_NAME or not _is_unicode(name):
        raise DocumentError(
            "an allow-list has a path that no file can have",
            found=ascii(name)[:100],
            expected="an absolute path without . or .. or //",
        )
    return name


def _label(name: str) -> str:
    if not name or not name.isprintable() or len(name) > _MAX_NAME:
        raise DocumentError("an allow-list has a buffer without a label", found=ascii(name)[:100])
    return name


def _is_unicode(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _digests(digests: Iterable[bytes]) -> frozenset[bytes]:
    found = frozenset(digests)
    if not found or any(len(digest) != 32 for digest in found):
        raise DocumentError(
            "an allow-list has an entry without a digest",
            found=f"{len(found)} digests",
            expected="SHA-256 digests, at least one",
        )
    return found


def _line(fields: Mapping[str, Any]) -> bytes:
    return (
        json.dumps(fields, ensure_ascii=False, separators=(",", ":"), sort_keys=True).encode()
        + b"\n"
    )


def _unescape(name: str) -> str:
    """sha256sum writes a backslash and a line break in names as ``\\\\`` and ``\\n``."""
    marked = name.replace("\\\\", "\0").replace("\\n", "\n").replace("\\r", "\r")
    if "\\" in marked:
        raise ValueError("an escape that sha256sum does not write")
    return marked.replace("\0", "\\")


def _walk(root: Path) -> Iterator[tuple[str, list[bytes]]]:
    def refuse(error: OSError) -> None:
        raise InputError("a folder cannot be read", found=f"{error.strerror}: {error.filename}")

    start = len(os.fspath(root).rstrip("/"))
    for folder, _, names in os.walk(root, onerror=refuse):
        for name in names:
            path = Path(folder, name)
            try:
                if stat.S_ISREG(path.lstat().st_mode):
                    with path.open("rb") as file:
                        digest = hashlib.file_digest(file, "sha256").digest()
                    yield os.fspath(path)[start:], [digest]
            except OSError as error:
                refuse(error)
