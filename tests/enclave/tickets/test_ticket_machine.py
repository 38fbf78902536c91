"""At random: burns, crashes at every step, lost answers, restarts, old folders put back.

However they come: no ticket is answered for more rows than it allows, no answered request is
ever burned twice, and what the client has paid for, it gets by asking again.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from cenacle.documents.ticket import Ticket
from cenacle.enclave import tickets
from cenacle.errors import CenacleError, RefusedError, SealError, UnavailableError

QUERIES = 12


class _CrashError(Exception):
    """The process dies here."""


def _machine(make_shop: Any) -> type[RuleBasedStateMachine]:
    class Selling(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.room = Path(tempfile.mkdtemp(prefix="cenacle-tickets-"))
            self.shop = make_shop(self.room / "tickets")
            self.tickets = [self.shop.ticket(queries=QUERIES) for _ in range(2)]
            self.asked: list[tuple[int, Any]] = []  # ticket and presented, answered or not
            self.answered: dict[int, set[str]] = {0: set(), 1: set()}
            self.rows: dict[str, int] = {}
            self.desk: Any = self.shop.desk()
            self.copies: list[Path] = []

        def teardown(self) -> None:
            if self.desk is not None:
                self.desk.close()
            shutil.rmtree(self.room)

        # -------------------------------------------------------------- what happens

        def _admit(self, batch: list[tuple[int, Any]]) -> None:
            try:
                answers = self.desk.admit([one for _, one in batch])
            except _CrashError:
                self._die()
                return
            for (which, one), problem in zip(batch, answers, strict=True):
                if problem is None:
                    self.answered[which].add(one.use.request)
                    self.rows[one.use.request] = one.rows
                else:
                    assert isinstance(problem, RefusedError | UnavailableError), problem
                    self._entitled(which, one, problem)
            self._sound()

        def _entitled(self, which: int, one: Any, problem: CenacleError) -> None:
            """A refusal for want of queries is right."""
            assert one.use.request not in self.answered[which] or not isinstance(
                problem, RefusedError
            ), "what was answered once is answered again"
            if isinstance(problem, RefusedError):
                burned = self.desk._index.burned.get(
                    self.tickets[which].peek(Ticket).serial_bytes, 0
                )
                assert burned + one.rows > QUERIES

        def _sound(self) -> None:
            for which, requests in self.answered.items():
                answered = sum(self.rows[request] for request in requests)
                serial = self.tickets[which].peek(Ticket).serial_bytes
                burned = 0 if self.desk is None else self.desk._index.burned.get(serial, 0)
                assert answered <= QUERIES
                if self.desk is not None:
                    assert answered <= burned <= QUERIES

        def _die(self) -> None:
            self.desk.close()
            self.desk = None
            self.shop.counter.faults = []

        @precondition(lambda self: self.desk is not None)
        @rule(
            wanted=st.lists(
                st.tuples(st.integers(0, 1), st.integers(1, 4)), min_size=1, max_size=4
            ),
            fault=st.sampled_from([None, None, "before", "after"]),
        )
        def ask(self, wanted: list[tuple[int, int]], fault: str | None) -> None:
            batch = [(which, self.shop.present(self.tickets[which], n)) for which, n in wanted]
            self.asked += batch
            self.shop.counter.faults = [fault]
            self._admit(batch)

        @precondition(lambda self: self.desk is not None and self.asked)
        @rule(data=st.data())
        def ask_again(self, data: Any) -> None:
            at = data.draw(st.integers(0, len(self.asked) - 1))
            self._admit([self.asked[at]])

        @precondition(lambda self: self.desk is not None)
        @rule(
            rows=st.integers(1, 3),
            step=st.sampled_from(["write", "half", "sync", "count", "counted"]),
        )
        def crash(self, rows: int, step: str) -> None:
            """The process dies while it burns, at one of the steps."""
            one = self.shop.present(self.tickets[0], rows)
            self.asked.append((0, one))
            write, advance = os.pwrite, self.desk._counter.advance

            def dies(*_: Any) -> Any:
                raise _CrashError

            def half(fd: int, data: Any, offset: int) -> Any:
                write(fd, bytes(data)[: len(data) // 2], offset)
                raise _CrashError

            def counted(*states: Any) -> Any:
                advance(*states)
                raise _CrashError

            with pytest.MonkeyPatch.context() as patch:
                match step:
                    case "write":
                        patch.setattr(os, "pwrite", dies)
                    case "half":
                        patch.setattr(os, "pwrite", half)
                    case "sync":
                        patch.setattr(os, "fdatasync", dies)
                    case "count":
                        self.desk._counter.advance = dies
                    case "counted":
                        self.desk._counter.advance = counted
                self._admit([(0, one)])
                if self.desk is not None:  # refused before that step
                    self.desk._counter.advance = advance

        @precondition(lambda self: self.desk is not None)
        @rule()
        def stop(self) -> None:
            self._die()

        @rule(away=st.booleans(), anew=st.booleans())
        def start(self, away: bool, anew: bool) -> None:
            """A new enclave on the same folder, as often as it takes."""
            if self.desk is not None:
                self._die()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(tickets, "_WORTH_BYTES", 0 if anew else 1 << 40)
                if away:
                    self.shop.counter.faults = ["before"]
                    with pytest.raises(UnavailableError):
                        self.shop.desk()
                self.desk = self.shop.desk()
            self._sound()

        @rule()
        def copy(self) -> None:
            """The host keeps the folder as it is now."""
            self.copies.append(self.room / f"copy-{len(self.copies)}")
            shutil.copytree(self.shop.folder, self.copies[-1])

        @precondition(lambda self: self.copies)
        @rule(data=st.data())
        def put_an_old_folder_back(self, data: Any) -> None:
            old = self.copies[data.draw(st.integers(0, len(self.copies) - 1))]
            kept = self.room / "kept"
            if self.desk is not None:
                self._die()
            self.shop.folder.rename(kept)
            shutil.copytree(old, self.shop.folder)
            same = _content(self.shop.folder) == _content(kept)
            try:
                self.desk = self.shop.desk()
            except SealError:
                assert not same, "the folder as it was is taken"
                shutil.rmtree(self.shop.folder)
                kept.rename(self.shop.folder)
                self.desk = self.shop.desk()
            else:
                shutil.rmtree(kept)
            self._sound()

    return Selling


def _content(folder: Path) -> bytes:
    return (folder / "journal").read_bytes()


def test_never_one_too_many_and_none_lost(make_shop: Any) -> None:
    run_state_machine_as_test(
        _machine(make_shop),
        settings=settings(
            max_examples=40,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.slow
def test_never_one_too_many_and_none_lost_at_length(make_shop: Any) -> None:
    run_state_machine_as_test(
        _machine(make_shop),
        settings=settings(
            max_examples=1000,
            stateful_step_count=50,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
