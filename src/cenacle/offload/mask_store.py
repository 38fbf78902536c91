"""Masks that can be used once: made offline, kept sealed, and marked as used before they are.

A mask R is a keystream, so only what R becomes under a layer's weight, the correction R W, is
stored. A store is a folder:

``masks-<generation>.sealed``
    The corrections of all layers, in frames that are sealed with AES-256-GCM. Key: HKDF of the
    store's key and the generation, a random number; nonce: the frame's place.
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
import torch
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from numpy.typing import NDArray

from cenacle.crypto import SecretBytes, derive_key
from cenacle.errors import ConflictError, InputError, SealError, UnavailableError
from cenacle.offload.field import FieldStream, piece
from cenacle.offload.mask_ledger import MaskLedger, MonotonicCounter
from cenacle.sealing.disk import AtomicFile, disk_errors, open_source, pread_into, pwrite_all

__all__ = ["Correct", "Mask", "MaskPlan", "MaskStore", "MonotonicCounter"]

_TAG: Final = 16


@dataclass(frozen=True)
class MaskPlan:
    """What masks a layer needs.

    Attributes:
        name: the layer and the shape of its input's rows; unique.
        x_size, y_size: elements of a row of its input and of its output.
        rows: of one unit.
        record: rows whose corrections are sealed together; divides ``rows``.
        digest: of the weight and geometry that the corrections are for.
    """

    name: str
    x_size: int
    y_size: int
    rows: int
    record: int
    digest: str

    @property
    def frames(self) -> int:
        """Sealed frames of a record."""
        return -(-self.record * self.y_size // piece())

    def rounded(self, rows: int) -> int:
        """Rows that are taken when ``rows`` are asked for: whole records."""
        return -(-rows // self.record) * self.record

    @property
    def record_bytes(self) -> int:
        return 4 * self.record * self.y_size + _TAG * self.frames


Correct = Callable[[MaskPlan, torch.Tensor], torch.Tensor]
"""The correction R W, (rows, y_size), for a mask R (rows, x_size); int32 field elements."""


class Mask:
    """Masks for some rows of one layer, with their corrections. Works once.

    Attributes:
        rows: how many rows it masks.
    """

    def __init__(self, store: MaskStore, layer: int, plan: MaskPlan, first: int, rows: int) -> None:
        self.rows = rows
        self._store, self._layer, self._plan, self._first = store, layer, plan, first
        self._used = False

    def consume(self) -> Iterator[tuple[int, NDArray[np.uint32]]]:
        """The mask, in pieces: (first element, elements). A piece lasts until the next.

        Raises:
            ConflictError: it was consumed before.
        """
        self._store.check_mine()
        if self._used:
            raise ConflictError("a mask was used already", remedy="take a new mask from the store")
        self._used = True
        return self._pieces()

    def _pieces(self) -> Iterator[tuple[int, NDArray[np.uint32]]]:
        stream = self._store._stream(self._layer)
        begin, size = self._first * self._plan.x_size, self.rows * self._plan.x_size
        words = np.empty(min(piece(), size), np.uint32)
        for at in range(0, size, piece()):
            part = words[: min(piece(), size - at)]
            stream.fill(begin + at, part)
            yield at, part

    def corrections(self, start: int, end: int) -> Iterator[tuple[int, NDArray[np.int32]]]:
        """R W for rows ``start`` to ``end`` of this mask: (first element, elements), in order.
        A piece lasts until the next.

        It may be asked for again, e.g. when a product is computed anew by another worker.

        Raises:
            ConflictError: the mask was not consumed.
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
                self._store._frame(self._layer, record, frame, found)
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
        self._masks = -1
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
            return Mask(self, layer, plan, first, rows)

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
            streams = [self._derive(generation, n, 64) for n in range(len(plans))]
            cipher = self._cipher(generation)
            path = self._path(generation)
            with AtomicFile(path, 0o600) as file, disk_errors("write the masks"):
                offset = 0
                for layer, plan in enumerate(plans):
                    stream = FieldStream(streams[layer])
                    for record in range(count * plan.rows // plan.record):
                        first = record * plan.record * plan.x_size
                        mask = stream.tensor(first, (plan.record, plan.x_size))
                        values = correct(plan, mask).contiguous().numpy().reshape(-1)
                        if values.size != plan.record * plan.y_size or values.dtype != np.int32:
                            raise InputError("a correction has the wrong form", found=plan.name)
                        for frame in range(plan.frames):
                            part = values[frame * piece() : (frame + 1) * piece()]
                            nonce = self._nonce(layer, record * plan.frames + frame)
                            sealed = cipher.encrypt(nonce, memoryview(part.data).cast("B"), None)
                            pwrite_all(file.fd, sealed, offset)
                            offset += len(sealed)
                file.commit()
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

    # ------------------------------------------------------------------ files and keys

    def _forget(self) -> None:
        if self._masks >= 0:
            os.close(self._masks)
        self._masks = -1
        self._generation: str | None = None
        self.plans: tuple[MaskPlan, ...] = ()
        self._by_name: dict[str, int] = {}
        self._count = self._reserved = 0
        self._next: list[int] = []

    def _use(self, generation: str, plans: Sequence[MaskPlan], count: int, reserved: int) -> None:
        masks = open_source(self._path(generation))
        self._forget()
        self._masks, self._generation = masks, generation
        self.plans, self._count, self._reserved = tuple(plans), count, reserved
        self._by_name = {plan.name: n for n, plan in enumerate(plans)}
        self._next = [reserved * plan.rows for plan in plans]
        self._streams = [self._derive(generation, n, 64) for n in range(len(plans))]
        self._aead = self._cipher(generation)
        self._offsets, offset = [], 0
        for plan in plans:
            self._offsets.append(offset)
            offset += plan.record_bytes * (count * plan.rows // plan.record)
        self._sealed = bytearray(4 * piece() + _TAG)

    def _path(self, generation: str) -> Path:
        return self.folder / f"masks-{generation}.sealed"

    def _derive(self, generation: str, layer: int, length: int) -> SecretBytes:
        context = (generation.encode(), layer.to_bytes(4, "big"))
        return derive_key(self._key, "offload/mask", *context, length=length)

    def _cipher(self, generation: str) -> AESGCM:
        label = "offload/mask-corrections"
        with derive_key(self._key, label, generation.encode()) as key, key.view() as view:
            return AESGCM(view)

    @staticmethod
    def _nonce(layer: int, frame: int) -> bytes:
        return layer.to_bytes(4, "big") + frame.to_bytes(8, "big")

    def _stream(self, layer: int) -> FieldStream:
        return FieldStream(self._streams[layer])

    def _frame(self, layer: int, record: int, frame: int, out: NDArray[np.int32]) -> None:
        """One frame's corrections."""
        self.check_mine()
        plan = self.plans[layer]
        offset = self._offsets[layer] + record * plan.record_bytes
        offset += frame * (4 * piece() + _TAG)
        view = memoryview(self._sealed)[: out.nbytes + _TAG]
        with disk_errors("read the masks"):
            size = pread_into(self._masks, view, offset)
        try:
            # read into the enclave's memory first: the disk cannot change it any more
            nonce = self._nonce(layer, record * plan.frames + frame)
            self._aead.decrypt_into(nonce, view[:size], None, memoryview(out.data).cast("B"))
        except (InvalidTag, ValueError):
            raise SealError(
                "stored masks are damaged or forged",
                found=f"layer {plan.name}",
                remedy="remove the store and prepare masks anew",
            ) from None
