"""Files of a job inside the guest: received before it runs, sent back as the agent writes them."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, Final

from cenacle.enclave.vm.link import CHUNK, MAX_FILE, Frame, Kind, check_path, frame, json_frame
from cenacle.errors import EnclaveError

__all__ = ["FolderWatch", "Received"]

_NAME: Final = re.compile(r"[a-z][a-z0-9_-]{0,31}", re.ASCII)
_TAKEN: Final = frozenset({"broker_socket", "platform_socket", "serving_socket"})
_State = tuple[int, int, int]


class Received:
    """The host's files, below one folder, a mount each.

    Args:
        work: existing folder.
        read_only: names of mounts that are files or folders of the host's.
        writable: names of mounts that are folders.
        user: who may write to those; None for this process's user.
    """

    def __init__(
        self,
        work: Path,
        read_only: tuple[str, ...],
        writable: tuple[str, ...],
        user: int | None,
    ) -> None:
        self.paths: dict[str, Path] = {}
        self._writable = writable
        self._user = user
        self._file: BinaryIO | None = None
        self._left = 0
        for name in (*read_only, *writable):
            if not isinstance(name, str) or not _NAME.fullmatch(name) or name in _TAKEN:
                raise EnclaveError("the host named a mount that cannot be", found=str(name)[:40])
            self.paths[name] = work / name
        for name in writable:
            self._make_folder(self.paths[name])

    def take(self, one: Frame) -> None:
        """A frame FILE or DATA; raises EnclaveError if it cannot come now."""
        if one.kind is Kind.FILE and self._file is None:
            fields = one.fields()
            path = check_path(fields.get("path"), may_be_empty=True)
            size = fields.get("size")
            mount = self.paths.get(str(fields.get("mount")))
            if mount is None or type(size) is not int or not 0 <= size <= MAX_FILE:
                raise EnclaveError("the host sent a file for no mount of this job")
            target = mount / path if path else mount
            self._make_folders(mount, target)
            # Exclusive: a file cannot be replaced by a later one, nor a folder.
            self._file = target.open("xb")
            self._left = size
            target.chmod(0o644)
            if fields["mount"] in self._writable and self._user is not None:
                os.chown(target, self._user, self._user)
            self._end_file()
        elif one.kind is Kind.DATA and self._file is not None:
            if len(one.payload) > self._left:
                raise EnclaveError("the host sent more of a file than it said")
            self._file.write(one.payload)
            self._left -= len(one.payload)
            self._end_file()
        else:
            raise EnclaveError("the host sent files out of order")

    def finish(self) -> None:
        """No file is left open and every mount exists; raises EnclaveError."""
        missing = [name for name, path in self.paths.items() if not path.exists()]
        if self._file is not None or missing:
            raise EnclaveError("the host has not sent all files", found=", ".join(missing)[:80])

    def close(self) -> None:
        """Close what is open. Safe to call twice."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _end_file(self) -> None:
        if self._left == 0:
            self.close()

    def _make_folders(self, mount: Path, target: Path) -> None:
        for folder in reversed([p for p in target.parents if p.is_relative_to(mount)]):
            if not folder.exists():
                self._make_folder(folder)

    def _make_folder(self, folder: Path) -> None:
        folder.mkdir(mode=0o755)
        top = next((n for n in self._writable if folder.is_relative_to(self.paths[n])), None)
        if top is not None and self._user is not None:
            os.chown(folder, self._user, self._user)


class FolderWatch:
    """Files that changed in some folders since the last look.

    Looking costs a system call a file, so the agent's few files may be looked at before every
    piece of what it says.

    Args:
        folders: mount name -> folder; what is in them now counts as known.
    """

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self._folders = dict(folders)
        self._known = {key: state for key, state, _ in self._look()}

    def changes(self) -> Iterator[bytes]:
        """Frames that tell the host what changed."""
        seen = set()
        for key, state, path in self._look():
            seen.add(key)
            if self._known.get(key) != state:
                yield from self._send(key, path)
        for key in sorted(set(self._known) - seen):
            del self._known[key]
            yield json_frame(Kind.REMOVED, {"mount": key[0], "path": key[1]})

    def _look(self) -> Iterator[tuple[tuple[str, str], _State, Path]]:
        for mount, root in self._folders.items():
            for folder, _, names in os.walk(root):
                for name in sorted(names):
                    path = Path(folder, name)
                    if name.startswith("."):
                        continue  # not finished: it has no name yet
                    try:
                        status = path.lstat()
                    except FileNotFoundError:
                        continue
                    if not stat.S_ISREG(status.st_mode):
                        continue
                    state = (status.st_ino, status.st_size, status.st_mtime_ns)
                    yield (mount, path.relative_to(root).as_posix()), state, path

    def _send(self, key: tuple[str, str], path: Path) -> Iterator[bytes]:
        try:
            # A link could name a file of somebody else's; the agent makes none.
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            descriptor = os.open(path, flags)
        except FileNotFoundError:
            return
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            status = os.fstat(descriptor)
            size = status.st_size
            yield json_frame(Kind.FILE, {"mount": key[0], "path": key[1], "size": size})
            done = 0
            while done < size:
                block = file.read(min(CHUNK, size - done))
                if not block:
                    # It shrank meanwhile: its next look is another state, and is sent again.
                    block = bytes(min(CHUNK, size - done))
                done += len(block)
                yield frame(Kind.DATA, block)
            self._known[key] = (status.st_ino, size, status.st_mtime_ns)
