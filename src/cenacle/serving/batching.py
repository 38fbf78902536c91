"""Run what waits together: one batch computes while the next one gathers.

Nothing waits for company. A request that finds the front idle runs at once and alone; those
that come meanwhile are joined along their first axis when it is done. So an idle service has no
added latency, and a busy one works in batches that grow with its load.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["Arrays", "Batcher", "Step"]

Arrays: TypeAlias = Mapping[str, NDArray[Any]]
Step: TypeAlias = Callable[[Arrays], Awaitable[Arrays]]
_Form: TypeAlias = tuple[tuple[str, str, tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True)
class _Waiting:
    inputs: Arrays
    rows: int
    form: _Form
    answer: asyncio.Future[Arrays]

    def settle(self, found: Arrays | Exception) -> None:
        if self.answer.done():
            return  # whoever asked has stopped waiting
        if isinstance(found, Exception):
            self.answer.set_exception(found)
        else:
            self.answer.set_result(found)


class Batcher:
    """Joins requests of one form (names, types, shapes of a row), computes, and takes them apart.

    Args:
        front: the step that is done for one batch at a time.
        tail: the step after it, in which many batches may be at once.
        max_rows: of one batch; a request has no more.
        observe: told the rows of each batch.

    One request's failure is its own: when a joined batch fails, its requests run one by one.
    """

    def __init__(
        self,
        front: Step,
        tail: Step,
        max_rows: int,
        observe: Callable[[int], None] | None = None,
    ) -> None:
        self._front = front
        self._tail = tail
        self._max_rows = max_rows
        self._observe = observe
        self._waiting: deque[_Waiting] = deque()
        self._worker: asyncio.Task[None] | None = None
        self._tails: set[asyncio.Task[None]] = set()

    async def submit(self, inputs: Arrays, rows: int) -> Arrays:
        """Outputs of ``rows`` rows; raises what the steps raise for these inputs."""
        form = tuple((name, a.dtype.str, a.shape[1:]) for name, a in sorted(inputs.items()))
        answer: asyncio.Future[Arrays] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(inputs, rows, form, answer))
        if self._worker is None:
            self._worker = asyncio.create_task(self._work())
        return await answer

    def _gather(self) -> list[_Waiting]:
        """The first that waits, and all others that fit beside it, in their order."""
        first = self._waiting.popleft()
        batch, rows, others = [first], first.rows, deque[_Waiting]()
        while self._waiting:
            one = self._waiting.popleft()
            if one.form == first.form and rows + one.rows <= self._max_rows:
                batch.append(one)
                rows += one.rows
            else:
                others.append(one)
        self._waiting = others
        return batch

    async def _work(self) -> None:
        try:
            while self._waiting:
                batch = self._gather()
                try:
                    crossing = await self._front(_join(batch))
                except Exception as error:
                    self._failed(batch, error)
                else:
                    if self._observe is not None:
                        self._observe(sum(one.rows for one in batch))
                    task = asyncio.create_task(self._finish(batch, crossing))
                    self._tails.add(task)
                    task.add_done_callback(self._tails.discard)
        finally:
            self._worker = None

    async def _finish(self, batch: list[_Waiting], crossing: Arrays) -> None:
        try:
            outputs = await self._tail(crossing)
        except Exception as error:
            self._failed(batch, error)
            return
        first = 0
        for one in batch:
            one.settle({name: a[first : first + one.rows] for name, a in outputs.items()})
            first += one.rows

    def _failed(self, batch: list[_Waiting], error: Exception) -> None:
        if len(batch) == 1:
            batch[0].settle(error)
            return
        for one in batch:
            task = asyncio.create_task(self._alone(one))
            self._tails.add(task)
            task.add_done_callback(self._tails.discard)

    async def _alone(self, one: _Waiting) -> None:
        try:
            one.settle(await self._tail(await self._front(one.inputs)))
        except Exception as error:
            one.settle(error)


def _join(batch: list[_Waiting]) -> Arrays:
    if len(batch) == 1:
        return batch[0].inputs
    return {name: np.concatenate([one.inputs[name] for one in batch]) for name in batch[0].inputs}
