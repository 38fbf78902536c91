"""Changes that one event loop's requests ask for, gathered and committed together."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from typing import Any, Final, TypeVar

from cenacle.broker.store import Committer, Outcome, Transaction

__all__ = ["Together"]

T = TypeVar("T")
_Asked = tuple[asyncio.Future[Any], str, Callable[[Transaction], Any]]
_AT_ONCE: Final = 16  # so that the loop, which may run them itself, is not held up long


class Together:
    """Used by one event loop. While one group is being committed, the next one gathers."""

    def __init__(self, committer: Committer) -> None:
        self._committer = committer
        self._gathered: deque[_Asked] = deque()
        self._under_way = False

    async def commit(self, contract: str, closure: Callable[[Transaction], T]) -> T:
        """What ``closure`` returned, once that is durable; see :meth:`Committer.submit`.

        Args:
            contract: digest of the contract that it is about, read beforehand with the others.
        """
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[T] = loop.create_future()
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
        for waiter, (result, failure) in zip(waiters, outcomes, strict=True):
            if waiter.cancelled():
                continue
            if failure is None:
                waiter.set_result(result)
            else:
                waiter.set_exception(failure)
        # The answers are written first: their requests have waited longest.
        loop.call_soon(self._go, loop)
