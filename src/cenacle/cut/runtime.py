"""Computing a tail: in memory whole, or paged from its sealed container.

What an enclave runs. It needs numpy and ONNX Runtime, neither ``onnx`` nor torch; ADR 0021 says
what else was measured. All that the tail's file says is checked before ONNX Runtime sees it: see
:mod:`cenacle.cut.tail_format` and :mod:`cenacle.cut.tail_graph`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from cenacle.cut.onnx_runtime import Session, trim_memory
from cenacle.cut.paging import Buffer, Pager, piece_bytes
from cenacle.cut.specs import TensorSpec
from cenacle.cut.tail_format import (
    GRAPH,
    Piece,
    TailManifest,
    TailReader,
    read_graph,
    read_manifest,
    segment_graph,
)
from cenacle.cut.tail_graph import check_graph
from cenacle.errors import DataError, EnclaveError, InputError

__all__ = ["TailRuntime", "check_inputs"]

_COPIES: Final = 5  # of the weights while ONNX Runtime optimizes a graph; 2.7 to 4.4 were measured
_MOST_THREADS: Final = 128  # over all segments; each has threads of its own
Array = NDArray[Any]


def check_inputs(specs: tuple[TensorSpec, ...], inputs: Mapping[str, Array]) -> int:
    """Refuse tensors that are not what the tail takes.

    Args:
        specs: what it takes.
        inputs: tensors by name.

    Returns:
        How many rows the batch has; 1 if no input is batched.

    Raises:
        DataError: a tensor too many or missing, of another type or shape, a batch without rows
            or with different numbers of rows, or truth values that are neither 0 nor 1.
    """
    names = {spec.name for spec in specs}
    if set(inputs) != names:
        odd = min(names ^ set(inputs))
        raise DataError(
            "the inputs are not those of the model",
            found=f"{odd[:80]!r} {'missing' if odd in names else 'too many'}",
            expected=", ".join(sorted(names))[:400],
        )
    rows: set[int] = set()
    for spec in specs:
        array = inputs[spec.name]
        fits = len(array.shape) == len(spec.shape) and all(
            wanted is None or wanted == size
            for wanted, size in zip(spec.shape, array.shape, strict=True)
        )
        if array.dtype != spec.numpy_dtype or not fits:
            raise DataError(
                f"the input {spec.name[:80]!r} is of another type or shape",
                found=f"{array.dtype} {list(array.shape)}",
                expected=f"{spec.numpy_dtype} {list(spec.shape)}",
            )
        if spec.batched:
            rows.add(array.shape[0])
        if spec.dtype == "BOOL" and array.size and array.view(np.uint8).max() > 1:
            raise DataError(
                f"the input {spec.name[:80]!r} has truth values that are neither 0 nor 1",
                expected="0 or 1",
            )
    if len(rows) > 1 or 0 in rows:
        raise DataError(
            "the inputs do not make one batch",
            found=" and ".join(str(count) for count in sorted(rows)) + " rows",
            expected="the same number of rows, one or more, in each",
        )
    return next(iter(rows), 1)


class TailRuntime:
    """A tail, ready to compute.

    Without a limit, or with one of five times the weights, all are decrypted once and handed to
    ONNX Runtime, which folds, rearranges and copies them: once it is done they are in memory
    once, but up to 4.4 times were measured while it works. With less, segments stay in memory
    just as they were decrypted, where operators are slower, or are paged: see
    :class:`cenacle.cut.paging.Pager`.

    Args:
        reader: the tail's sealed container, opened with the digest that the contract pins. It
            stays the caller's to close, after the runtime.
        memory_limit: most bytes of weights in memory at any time, with what the reader keeps.
        threads: how many compute; by default one a core.

    Attributes:
        memory_limit: as given.

    Raises:
        DataError: not a tail, or one that does not hold what its manifest says.
        InputError: a limit that is too small, or ONNX Runtime is not installed.
        SealError: a chunk of the container is damaged or forged.
        EnclaveError: ONNX Runtime does not take the graph.
    """

    def __init__(
        self,
        reader: TailReader,
        *,
        memory_limit: int | None = None,
        threads: int | None = None,
    ) -> None:
        if memory_limit is not None and memory_limit <= 0:
            raise InputError(
                "the memory limit must be positive", found=memory_limit, expected="bytes"
            )
        self.memory_limit = memory_limit
        self._threads = threads or len(os.sched_getaffinity(0))
        self._lock = threading.Lock()
        self._manifest = read_manifest(reader)
        self._last_uses = _last_uses(self._manifest)
        self.inputs = tuple(value.spec() for value in self._manifest.inputs)
        self.outputs = tuple(value.spec() for value in self._manifest.outputs)
        whole = [Piece(name=name, tensor=name) for name in self._manifest.weights]
        sizes = [piece_bytes(reader, piece) for piece in whole]
        self._whole: Session | None = None
        self._pager: Pager | None = None
        self._sessions: list[Session] = []
        peak = _COPIES * sum(sizes) + reader.cache_bytes
        if memory_limit is None or peak <= memory_limit:
            self._load(reader, whole)
        else:
            self._page(reader, memory_limit)

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers of the model that lie in the tail."""
        return self._manifest.layers

    @property
    def paged(self) -> bool:
        """Whether weights are read from the container while it computes."""
        return bool(self._pager and self._pager.paged)

    def _load(self, reader: TailReader, whole: list[Piece]) -> None:
        graph = read_graph(reader, GRAPH)
        self._check(check_graph(graph, external=self._manifest.weights))
        # A buffer a weight, so that each is freed as soon as nothing needs it.
        buffers = {piece.name: Buffer(piece_bytes(reader, piece)) for piece in whole}
        arrays: dict[str, Array] = {}
        for piece in whole:
            arrays.update(buffers[piece.name].fill(reader, [piece]))
        self._whole = Session(graph, arrays, threads=self._threads)
        for buffer in buffers.values():
            buffer.wipe()
        trim_memory()

    def _check(self, names: tuple[tuple[str, ...], tuple[str, ...]]) -> None:
        wanted = (
            tuple(spec.name for spec in self.inputs),
            tuple(spec.name for spec in self.outputs),
        )
        if names != wanted:
            raise DataError(
                "the graph of a tail has other inputs or outputs than its manifest",
                expected="the same, in the same order",
                remedy="write the tail again with cenacle cut",
            )

    def _page(self, reader: TailReader, memory_limit: int) -> None:
        segments = self._manifest.segments
        threads = max(1, min(self._threads, _MOST_THREADS // len(segments)))
        for index, segment in enumerate(segments):
            graph = read_graph(reader, segment_graph(index))
            inputs, outputs = check_graph(graph)
            pieces = tuple(piece.name for piece in segment.weights)
            if set(inputs) != {*segment.inputs, *pieces} or set(outputs) != set(segment.outputs):
                raise DataError(
                    f"the graph of segment {index} of a tail is not what its manifest says",
                    expected="the same inputs, weights and outputs",
                    remedy="write the tail again with cenacle cut",
                )
            self._sessions.append(Session(graph, threads=threads))
        self._pager = Pager(reader, segments, memory_limit)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Compute the outputs of a batch. Safe to call from several threads.

        Args:
            inputs: one tensor for each of :attr:`inputs`.

        Returns:
            One tensor for each of :attr:`outputs`, in that order.

        Raises:
            DataError: inputs that the tail does not take.
            SealError: the container was altered or exchanged meanwhile; there is no output.
            EnclaveError: an operator failed, there is no memory, or the runtime is closed.
        """
        rows = check_inputs(self.inputs, inputs)
        names = [spec.name for spec in self.outputs]
        if self._whole is not None:
            found = dict(zip(names, self._whole.run(inputs, names), strict=True))
        else:
            with self._lock:
                found = self._run_paged(inputs, names)
        for spec in self.outputs:
            self._check_output(spec, found[spec.name], rows)
        return found

    def _run_paged(self, inputs: Mapping[str, Array], names: list[str]) -> dict[str, Array]:
        if self._pager is None:
            raise EnclaveError("the model was closed", remedy="open it again")
        values = dict(inputs)
        for index, segment in enumerate(self._manifest.segments):
            feeds = {name: values[name] for name in segment.inputs}
            feeds.update(self._pager.weights(index))
            made = self._sessions[index].run(feeds, segment.outputs)
            values.update(zip(segment.outputs, made, strict=True))
            for name in self._last_uses[index]:
                del values[name]
        return {name: values[name] for name in names}

    @staticmethod
    def _check_output(spec: TensorSpec, array: Array, rows: int) -> None:
        fits = len(array.shape) == len(spec.shape) and all(
            wanted is None or wanted == size
            for wanted, size in zip(spec.shape, array.shape, strict=True)
        )
        if not fits or array.dtype != spec.numpy_dtype or (spec.batched and len(array) != rows):
            raise EnclaveError(
                f"the model's output {spec.name[:80]!r} is not what its manifest says",
                found=f"{array.dtype} {list(array.shape)}",
                expected=f"{spec.numpy_dtype} {list(spec.shape)}, {rows} rows",
                remedy="export the model again with the shapes of its outputs",
            )

    def close(self) -> None:
        """Forget the weights; no call may be under way. Safe to call twice."""
        with self._lock:
            self._whole = None
            self._sessions.clear()
            if self._pager is not None:
                self._pager.close()
                self._pager = None
            trim_memory()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _last_uses(manifest: TailManifest) -> list[set[str]]:
    """For each segment, the values that nothing needs after it."""
    last: dict[str, int] = {value.name: 0 for value in manifest.inputs}
    for index, segment in enumerate(manifest.segments):
        last.update(dict.fromkeys((*segment.inputs, *segment.outputs), index))
    for value in manifest.outputs:
        last.pop(value.name, None)
    found: list[set[str]] = [set() for _ in manifest.segments]
    for name, index in last.items():
        found[index].add(name)
    return found
