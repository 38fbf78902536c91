"""Masks that can be used once: made offline, kept sealed, and marked as used before they are.

A store is a folder:

``masks-<generation>.sealed``
    The corrections of all layers: a :class:`~cenacle.offload.mask_file.MaskFile`.
``ledger``
    The generation, how many units there are, how many are reserved, and a sequence number;
    sealed with AES-256-GCM, replaced atomically, and on the disk **before** any mask of the
    units that it reserves is handed out. A crash loses reserved masks; none is used again.
``lock``
    Held while a process uses the store.

A unit is what one sample takes in one pass through the model. Masks of one generation differ
from each other by key (one for each layer) and position.

An old copy of the folder that comes back is noticed through a :class:`MonotonicCounter` that
the copy does not contain. Without one, a store in a folder can be rolled back by whoever owns
the disk; a store without a folder cannot, because its key dies with its process.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from cenacle.crypto import SecretBytes
from cenacle.errors import ConflictError, InputError, UnavailableError
from cenacle.offload.field import piece
from cenacle.offload.mask_file import Correct, MaskFile, MaskPlan
from cenacle.offload.mask_ledger import MaskLedger, MonotonicCounter
from cenacle.sealing.disk import disk_errors

__all__ = ["Correct", "Mask", "MaskPlan", "MaskStore", "MonotonicCounter"]


class Mask:
    """Masks for some rows of one layer, with their corrections. Works once.

    Attributes:
        rows: how many rows it masks.
    """

    def __init__(
        self, store: MaskStore, file: MaskFile, layer: int, plan: MaskPlan, first: int, rows: int
    ) -> None:
        self.rows = rows
        self._store, self._file, self._layer, self._plan = store, file, layer, plan
        self._first, self._used = first, False

    def consume(self) -> Iterator[tuple[int, NDArray[np.uint32]]]:
        """The mask, in pieces: (first element, elements). A piece lasts until the next.

        Each element comes once, not necessarily in order.

        Raises:
            ConflictError: it was consumed before, or the store was filled anew.
        """
        self._store.check_holds(self._file)
        if self._used:
            raise ConflictError("a mask was used already", remedy="take a new mask from the store")
        self._used = True
        return self._pieces()

    def _pieces(self) -> Iterator[tuple[int, NDArray[np.uint32]]]:
        stream, row = self._file.stream(self._layer), self._plan.x_size
        begin, size, step = self._first * row, self.rows * row, piece() // 2
        memory = np.empty(min(step, size) + 4, np.uint32)
        # Large rows side by side: what belongs to a place in a row stays in the cache.
        starts = range(0, size, row) if row > step else [0]
        length = size // len(starts)
        readers = [stream.reader(begin + start) for start in starts]
        for at in range(0, length, step):
            for start, read in zip(starts, readers, strict=True):
                yield start + at, read(memory, min(step, length - at))

    def corrections(self, start: int, end: int) -> Iterator[tuple[int, NDArray[np.int32]]]:
        """R W for rows ``start`` to ``end`` of this mask: (first element, elements), in order.
        A piece lasts until the next.

        It may be asked for again, e.g. when a product is computed anew by another worker.

        Raises:
            ConflictError: the mask was not consumed, or the store was filled anew.
            SealError: the stored corrections are damaged or forged.
        """
        if not self._used:
            raise ConflictError("a mask has corrections once it was consumed")
        plan = self._plan
        row = plan.y_size
        scratch = np.empty(min(piece(), plan.record * row), np.int32)
        low, high = (self._first + start) * row, (self._first + end) * row
        base, size = self._first * row, plan.record * row
        for record in range(low // size, -(-high // size)):
            for frame in range(plan.frames):
                at = record * size + frame * piece()
                until = min(at + piece(), (record + 1) * size)
                if until <= low or at >= high:
                    continue
                found = scratch[: until - at]
                self._store.check_holds(self._file)
                self._file.read(self._layer, record, frame, found)
                cut = found[max(0, low - at) : min(until, high) - at]
                yield max(at, low) - base, cut

    def __reduce__(self) -> Any:
        raise TypeError("a mask cannot be copied: it works once")


class MaskStore:
    """A store of masks; a context manager.

    Args:
        folder: made if it is not there; without one, a temporary folder and a key that dies
            with this object.
        key: 32 bytes, used for nothing else; needed with a folder.
        counter: notices an old copy of the folder.
        stride: units that are reserved at once: that many are lost by a crash at most, and
            so many passes share one wait for the disk.

    Raises:
        ConflictError: another process uses the store.
        SealError: the ledger is damaged, forged or too old.
    """

    def __init__(
        self,
        folder: Path | None = None,
        key: SecretBytes | None = None,
        *,
        counter: MonotonicCounter | None = None,
        stride: int = 16,
    ) -> None:
        if (folder is None) != (key is None):
            raise InputError("a mask store in a folder needs a key, and one without has its own")
        if stride < 1:
            raise InputError("a mask store reserves at least one unit", found=stride)
        self._temporary = tempfile.TemporaryDirectory(prefix="cenacle-") if folder is None else None
        self.folder = Path(self._temporary.name) if self._temporary else Path(str(folder))
        self._key = SecretBytes.random() if key is None else key
        self._stride = stride
        self._guard, self._pid = threading.Lock(), os.getpid()
        self._masks: MaskFile | None = None
        self._open = True
        self._reserved = 0
        self._forget()
        with disk_errors(f"open the mask store {self.folder}"):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise ConflictError(
                "a mask store is in use by another process",
                found=str(self.folder),
                remedy="give each process its own store",
            ) from None
        self._ledger = MaskLedger(self.folder / "ledger", self._key, counter)
        try:
            self._load()
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------------ using

    @property
    def remaining(self) -> int:
        """Units that no layer has begun."""
        begun = max(
            (-(-n // p.rows) for n, p in zip(self._next, self.plans, strict=True)), default=0
        )
        return self._count - begun

    def take(self, name: str, rows: int, digest: str) -> Mask:
        """The next masks of a layer, marked as used on the disk before this returns.

        Raises:
            ConflictError: this process was forked from the store's.
            InputError: the store was filled for another layer, shape or weight.
            UnavailableError: the store is used up, or its disk cannot be written.
        """
        self.check_mine()
        with self._guard:
            layer = self._by_name.get(name)
            plan = None if layer is None else self.plans[layer]
            if layer is None or plan is None or plan.digest != digest:
                raise InputError(
                    f"no masks were prepared for layer {name}",
                    found="another weight or geometry" if plan else "no such layer or shape",
                    remedy="call prepare() with this model and an input of this shape",
                )
            first = self._next[layer]
            past = first + plan.rounded(rows)
            units = -(-past // plan.rows)
            if units > self._count:
                raise UnavailableError(
                    "the mask store is used up",
                    found=f"{self._count - first // plan.rows} masks left for layer {name}",
                    expected=f"{units - first // plan.rows}",
                    remedy="call prepare() for more",
                )
            if units > self._reserved:
                reserved = min(self._count, max(units, self._reserved + self._stride))
                assert self._generation is not None
                self._write(self._generation, self.plans, self._count, reserved)
                self._reserved = reserved
            self._next[layer] = past
            assert self._masks is not None
            return Mask(self, self._masks, layer, plan, first, rows)

    def lacks(self, name: str, rows: int) -> bool:
        """Whether :meth:`take` would find too few masks for this layer."""
        layer = self._by_name.get(name)
        if layer is None:
            return True
        plan = self.plans[layer]
        return self._next[layer] + plan.rounded(rows) > self._count * plan.rows

    def check_mine(self) -> None:
        """Raise :class:`ConflictError` in a forked child: its masks are its parent's too."""
        if not self._open or self._pid != os.getpid():
            raise ConflictError(
                "a mask store cannot be used after it was closed, or in a forked process"
            )

    def check_holds(self, masks: MaskFile) -> None:
        """Raise :class:`ConflictError` if these are not the masks that the store has now."""
        self.check_mine()
        if masks is not self._masks:
            raise ConflictError(
                "a mask was given up when its store was filled anew",
                remedy="take a new mask from the store",
            )

    def fill(self, plans: Sequence[MaskPlan], count: int, correct: Correct) -> None:
        """Make masks for ``count`` units; whatever was left is given up.

        Raises:
            UnavailableError: no room on the disk; the masks that there were are kept.
        """
        self.check_mine()
        names = [plan.name for plan in plans]
        if count < 1 or not plans or len(set(names)) != len(names):
            raise InputError("masks are made for one unit or more of distinct layers", found=count)
        with self._guard:
            generation = secrets.token_hex(16)
            path = self._path(generation)
            MaskFile.write(path, self._key, generation, plans, count, correct)
            old = self._generation
            self._write(generation, plans, count, 0)
            self._use(generation, plans, count, 0)
            if old is not None:
                self._path(old).unlink(missing_ok=True)

    def close(self) -> None:
        """Let the store go. Safe to call twice."""
        if self._open:
            self._open = False
            self._forget()
            os.close(self._lock)
            if self._temporary is not None:
                self._key.wipe()
                self._temporary.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # ------------------------------------------------------------------ the ledger

    def _write(self, generation: str, plans: Sequence[MaskPlan], count: int, reserved: int) -> None:
        content = {
            "generation": generation,
            "count": count,
            "reserved": reserved,
            "layers": [asdict(plan) for plan in plans],
        }
        try:
            self._ledger.write(content)
        except BaseException:
            self.close()  # nothing more may be written, so nothing more may be handed out
            raise

    def _load(self) -> None:
        content = self._ledger.load()
        if content is not None:
            plans = [MaskPlan(**plan) for plan in content["layers"]]
            self._use(content["generation"], plans, content["count"], content["reserved"])
        for path in self.folder.glob("masks-*.sealed"):
            # masks that no ledger speaks of: a crash left them while they were made
            if self._generation is None or path != self._path(self._generation):
                with contextlib.suppress(OSError):
                    path.unlink()

    # ------------------------------------------------------------------ the masks

    def _forget(self) -> None:
        if self._masks is not None:
            self._masks.close()
        self._masks = None
        self._generation: str | None = None
        self.plans: tuple[MaskPlan, ...] = ()
        self._by_name: dict[str, int] = {}
        self._count = self._reserved = 0
        self._next: list[int] = []

    def _use(self, generation: str, plans: Sequence[MaskPlan], count: int, reserved: int) -> None:
        masks = MaskFile(self._path(generation), self._key, generation, plans, count)
        self._forget()
        self._masks, self._generation = masks, generation
        self.plans, self._count, self._reserved = tuple(plans), count, reserved
        self._by_name = {plan.name: n for n, plan in enumerate(plans)}
        self._next = [reserved * plan.rows for plan in plans]

    def _path(self, generation: str) -> Path:
        return self.folder / f"masks-{generation}.sealed"
