"""Changes that one event loop's requests ask for, gathered and committed together."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, Generic, TypeVar

from cenacle.broker.store import Committer, Outcome, Transaction

__all__ = ["Together"]

T = TypeVar("T")
R = TypeVar("R")
_Asked = tuple[asyncio.Future[Any], str, Callable[[Transaction], Any]]
_AT_ONCE: Final = 16  # so that the loop, which may run them itself, is not held up long


class Together(Generic[T, R]):
    """Used by one event loop. While one group is being committed, the next one gathers.

    Args:
        committer: the store's.
        finish: turns what the closures of a group returned, once that is durable, into their
            answers, one each, in the same order; an exception is raised to whoever asked.
    """

    def __init__(
        self, committer: Committer, finish: Callable[[Sequence[T]], Sequence[R | Exception]]
    ) -> None:
        self._committer = committer
        self._finish = finish
        self._gathered: deque[_Asked] = deque()
        self._under_way = False

    async def commit(self, contract: str, closure: Callable[[Transaction], T]) -> R:
        """The answer to what ``closure`` returned, which is durable: see :meth:`Committer.submit`.

        Args:
            contract: digest of the contract that it is about, read beforehand with the others.
        """
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[R] = loop.create_future()
        self._gathered.append((waiter, contract, closure))
        if not self._under_way:
            self._under_way = True
            loop.call_soon(self._go, loop)  # after the other requests that came with this one
        return await waiter

    def _go(self, loop: asyncio.AbstractEventLoop) -> None:
        group: list[_Asked] = []
        while self._gathered and len(group) < _AT_ONCE:
            asked = self._gathered.popleft()
            if not asked[0].cancelled():
                group.append(asked)
        if not group:
            self._under_way = False
            return
        waiters = [waiter for waiter, _, _ in group]
        contracts = [contract for _, contract, _ in group]

        def look_up(tx: Transaction) -> None:
            tx.look_up(contracts)

        def answer(outcomes: list[Outcome]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits
                loop.call_soon_threadsafe(self._answer, loop, waiters, outcomes[1:])

        try:
            self._committer.together([look_up, *(closure for _, _, closure in group)], answer)
        except Exception as error:  # it is shutting down
            self._answer(loop, waiters, [Outcome(None, error)] * len(waiters))

    def _answer(
        self,
        loop: asyncio.AbstractEventLoop,
        waiters: list[asyncio.Future[Any]],
        outcomes: list[Outcome],
    ) -> None:
        durable: list[tuple[asyncio.Future[Any], Any]] = []
        for waiter, (result, failure) in zip(waiters, outcomes, strict=True):
            if waiter.cancelled():
                continue
            if failure is None:
                durable.append((waiter, result))
            else:
                waiter.set_exception(failure)
        for (waiter, _), answer in zip(durable, self._finished(durable), strict=True):
            if isinstance(answer, Exception):
                waiter.set_exception(answer)
            else:
                waiter.set_result(answer)
        # The answers are written first: their requests have waited longest.
        loop.call_soon(self._go, loop)

    def _finished(self, durable: list[tuple[asyncio.Future[Any], Any]]) -> Sequence[Any]:
        try:
            return self._finish([result for _, result in durable]) if durable else ()
        except Exception as error:
            return [error] * len(durable)
