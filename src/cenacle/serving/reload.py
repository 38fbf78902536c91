"""From one contract to the next without a failed request: enclaves that begin, serve and end.

A new enclave is started, has its keys and says that it is ready before any request goes to it.
Then new requests go there, the old one answers those that it has, ends its job and leaves its
receipt. If the new one cannot be started, the old one goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cenacle.enclave.channel import Failed, Finished, Message, Stage
from cenacle.enclave.launcher import RunningEnclave
from cenacle.errors import CenacleError, EnclaveError
from cenacle.serving.app import ServingApp
from cenacle.serving.deployment import Deployment, Served
from cenacle.serving.front import Front
from cenacle.serving.link import EnclaveLink, LinkListener

__all__ = ["EnclaveRun", "Plan", "Switch"]

_WAIT_S: Final = 30.0


@dataclass(frozen=True)
class Plan:
    """One contract to serve.

    Attributes:
        front: the public front's file, if the contract names one.
        launch: starts the enclave, given the socket that it connects to; blocks.
        threads: of the front.
        answer_s: seconds that a query may wait for the enclave.
    """

    served: Served
    front: Path | None
    launch: Callable[[Path], RunningEnclave]
    threads: int | None = None
    answer_s: float = 60.0


class EnclaveRun:
    """One enclave of this host, from its start to its receipt.

    Args:
        stage: told each stage of the job as it begins.

    Attributes:
        ended: done when the enclave is: with its job, or with the error that ended it.
    """

    def __init__(self, enclave: RunningEnclave, stage: Callable[[str], None]) -> None:
        self._enclave = enclave
        self._stage = stage
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self.ended.add_done_callback(lambda future: future.cancelled() or future.exception())
        # A thread of its own: it waits for the enclave as long as the enclave serves.
        threading.Thread(target=self._read, name="enclave-messages", daemon=True).start()

    def _read(self) -> None:
        error: Exception | None = EnclaveError("the enclave ended without a result")
        try:
            for message in self._enclave.messages():
                error = self._heard(message, error)
            if error is None:
                self._enclave.wait(_WAIT_S)
        except CenacleError as problem:
            error = problem
        except Exception as problem:
            error = EnclaveError("the enclave cannot be watched", found=type(problem).__name__)
        with contextlib.suppress(RuntimeError):  # the loop is gone, and with it who would ask
            self._loop.call_soon_threadsafe(self._end, error)

    def _heard(self, message: Message, error: Exception | None) -> Exception | None:
        match message:
            case Stage(name):
                self._loop.call_soon_threadsafe(self._stage, name)
            case Failed():
                return message.to_error()
            case Finished():
                return None
        return error

    def _end(self, error: Exception | None) -> None:
        if self.ended.done():
            return
        if error is None:
            self.ended.set_result(None)
        else:
            self.ended.set_exception(error)

    async def kill(self) -> None:
        """End it at once; its job can be resumed."""
        await asyncio.to_thread(self._enclave.kill)


@dataclass(frozen=True, eq=False)
class _Running:
    plan: Plan
    deployment: Deployment
    link: EnclaveLink
    run: EnclaveRun


class Switch:
    """Which contract an application serves, and how it comes to serve another.

    Args:
        say: told what happens, in words for the operator.

    Attributes:
        failed: set when the enclave that serves ends unasked; nothing is served from then on.
    """

    def __init__(self, app: ServingApp, say: Callable[[str], None]) -> None:
        self._app = app
        self._say = say
        self._current: _Running | None = None
        self._all: set[_Running] = set()
        self._changing = asyncio.Lock()
        self._draining: set[asyncio.Task[None]] = set()
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.failed.add_done_callback(lambda future: future.cancelled() or future.exception())

    @property
    def served(self) -> Served | None:
        """What is served at the moment."""
        return None if self._current is None else self._current.plan.served

    async def serve(self, plan: Plan) -> None:
        """Serve this contract, instead of the one before if there is one.

        Returns when new requests go to the new enclave; :meth:`drained` waits for the old one.

        Raises:
            CenacleError: the new enclave cannot be started; what was served is served on.
        """
        async with self._changing:
            begun = await self._begin(plan)
            old, self._current = self._current, begun
            self._app.current = begun.deployment
            self._all.add(begun)
            begun.run.ended.add_done_callback(lambda _: self._all.discard(begun))
            begun.run.ended.add_done_callback(lambda _: self._ended(begun))
            begun.link.closed.add_done_callback(lambda _: self._ended(begun))
            if old is not None:
                self._app.metrics.reloads.inc()
                task = asyncio.create_task(self._drain(old))
                self._draining.add(task)
                task.add_done_callback(self._draining.discard)

    async def _begin(self, plan: Plan) -> _Running:
        job = plan.served.job
        front = None
        if job.front is not None and plan.front is not None:
            digest, path = job.front, plan.front
            front = await asyncio.to_thread(lambda: Front.open(path, digest, threads=plan.threads))
        listener = await LinkListener.open(patience_s=plan.answer_s)
        try:
            enclave = await asyncio.to_thread(plan.launch, listener.path)
            run = EnclaveRun(enclave, self._say)
            try:
                await _first(listener.link, run)
                deployment = Deployment(plan.served, listener.link, front, self._app.metrics)
            except BaseException:
                await run.kill()
                raise
        except BaseException:
            listener.link.close()
            raise
        finally:
            listener.close()
        return _Running(plan, deployment, listener.link, run)

    def _ended(self, running: _Running) -> None:
        """An enclave that served is gone; whether it was asked to go, the order tells."""
        if self._current is not running:
            return
        self._current = None
        self._app.current = None
        running.link.close()
        task = asyncio.create_task(self._tell(running))
        self._draining.add(task)
        task.add_done_callback(self._draining.discard)

    async def _tell(self, running: _Running) -> None:
        try:
            await asyncio.wait_for(asyncio.shield(running.run.ended), _WAIT_S)
        except TimeoutError:
            await running.run.kill()
            error: Exception = EnclaveError("the enclave closed its connection and did not end")
        except CenacleError as problem:
            error = problem
        else:
            error = EnclaveError("the enclave ended its job unasked", remedy="start it again")
        if not self.failed.done():
            self.failed.set_exception(error)

    async def _drain(self, running: _Running) -> None:
        await running.deployment.end()
        await running.run.ended

    async def stop(self) -> None:
        """Serve nothing from now on; returns when every enclave has left its receipt.

        Raises:
            CenacleError: what an enclave ended with instead.
        """
        async with self._changing:
            old, self._current, self._app.current = self._current, None, None
            if old is not None:
                task = asyncio.create_task(self._drain(old))
                self._draining.add(task)
        await self.drained()

    async def drained(self) -> None:
        """Wait for enclaves that no new request goes to; raises what the first of them raised."""
        while self._draining:
            task = next(iter(self._draining))
            try:
                await asyncio.shield(task)
            finally:
                if task.done():
                    self._draining.discard(task)

    async def kill(self) -> None:
        """End every enclave at once. Their jobs can be resumed."""
        self._app.current = None
        for running in tuple(self._all):
            await running.run.kill()


async def _first(link: EnclaveLink, run: EnclaveRun) -> None:
    """Wait until the enclave is ready; raises what ended it before.

    An enclave that ends closes its connection first and says why a moment later.
    """
    waiting: list[asyncio.Future[Any]] = [link.arrived, run.ended]
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    if link.arrived.done() and link.arrived.exception() is None:
        return
    await asyncio.wait([run.ended], timeout=_WAIT_S)
    if run.ended.done() and (error := run.ended.exception()) is not None:
        raise error
    raise EnclaveError("the enclave ended before it was ready to serve")
