"""Requests that are committed together: each is answered, whatever happens to the others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from cenacle.broker.store import Outcome, Store, Transaction
from cenacle.broker.together import Together
from cenacle.errors import UnavailableError

CONTRACT = "sha256:" + "c" * 64


def note(tx: Transaction) -> int:
    return tx.append_entry("note", b'{"kind":"note"}')


def plain(results: Sequence[int]) -> Sequence[int | Exception]:
    """Answers that are what was committed."""
    return results


def test_many_at_once_fail_and_succeed_alone(store: Store) -> None:
    def fail(_: Transaction) -> int:
        raise KeyError("its own")

    async def play() -> list[Any]:
        changes = Together(store.committer, plain)
        asked = [changes.commit(CONTRACT, fail if n % 5 == 0 else note) for n in range(70)]
        return await asyncio.gather(*asked, return_exceptions=True)

    answers = asyncio.run(play())
    kept = [answer for answer in answers if not isinstance(answer, KeyError)]
    assert [isinstance(answer, KeyError) for answer in answers] == [n % 5 == 0 for n in range(70)]
    assert kept == list(range(56))  # first come, first served
    with store.read() as tx:
        assert tx.log_size() == 56


def test_a_request_that_was_given_up_stops_no_other(store: Store) -> None:
    async def play() -> list[int]:
        changes = Together(store.committer, plain)
        asked = [asyncio.ensure_future(changes.commit(CONTRACT, note)) for _ in range(40)]
        await asyncio.sleep(0)
        for given_up in asked[::4]:
            given_up.cancel()
        first = [await asked[n] for n in range(40) if n % 4]
        return [*first, await changes.commit(CONTRACT, note)]

    answers = asyncio.run(play())
    assert sorted(set(answers)) == answers
    assert len(answers) == 31


def test_a_store_that_closed_answers_unavailable(store_target: str) -> None:
    with Store.open(store_target) as store:
        changes = Together(store.committer, plain)
    for _ in range(2):
        with pytest.raises(UnavailableError, match="shutting down"):
            asyncio.run(changes.commit(CONTRACT, note))


def test_an_answer_to_a_loop_that_is_gone_harms_nobody(store: Store) -> None:
    kept: list[Callable[[list[Outcome]], None]] = []

    class Later:
        def together(self, _: Any, answer: Callable[[list[Outcome]], None]) -> None:
            kept.append(answer)

    async def play() -> None:
        changes = Together(Later(), plain)  # type: ignore[arg-type]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(changes.commit(CONTRACT, note), 0.05)

    asyncio.run(play())
    kept[0]([Outcome(None, None), Outcome(0, None)])
    assert store.run(note) == 0


def test_answers_are_made_of_what_is_durable_and_of_nothing_else(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a group, what failed or was given up is not finished; of a lost commit, nothing is."""
    finished: list[Sequence[int]] = []

    def finish(results: Sequence[int]) -> list[str | Exception]:
        with store.read() as tx:
            assert all(tx.entry(index) is not None for index in results)
        finished.append(results)
        return [LookupError(f"{n}") if n % 3 == 0 else f"answer {n}" for n in results]

    def fail(_: Transaction) -> int:
        raise KeyError("its own")

    def lose() -> None:
        raise UnavailableError("no disk")

    async def play() -> tuple[list[Any], list[Any]]:
        changes = Together(store.committer, finish)
        closures = [fail if n == 2 else note for n in range(8)]
        asked = [asyncio.ensure_future(changes.commit(CONTRACT, c)) for c in closures]
        await asyncio.sleep(0)
        asked[5].cancel()
        answers = await asyncio.gather(*asked, return_exceptions=True)
        monkeypatch.setattr(store.committer._writer, "commit", lose)
        lost = await asyncio.gather(changes.commit(CONTRACT, note), return_exceptions=True)
        return [*answers], [*lost]

    answers, lost = asyncio.run(play())
    assert [type(answer) for answer in [answers[2], answers.pop(5), *lost]] == [
        KeyError,
        asyncio.CancelledError,
        UnavailableError,
    ]
    numbers = finished[0]
    assert len(finished) == 1
    assert len(numbers) == 6
    told = [answer for answer in answers if not isinstance(answer, KeyError)]
    for number, answer in zip(numbers, told, strict=True):
        if number % 3 == 0:
            assert isinstance(answer, LookupError)
        else:
            assert answer == f"answer {number}"


def test_who_cannot_be_answered_is_told_so(store: Store) -> None:
    def break_down(_: Sequence[int]) -> list[int | Exception]:
        raise MemoryError("of the broker's own")

    async def play() -> list[Any]:
        changes = Together(store.committer, break_down)
        asked = [changes.commit(CONTRACT, note) for _ in range(3)]
        first = await asyncio.gather(*asked, return_exceptions=True)
        return [
            *first,
            *await asyncio.gather(changes.commit(CONTRACT, note), return_exceptions=True),
        ]

    assert [type(answer) for answer in asyncio.run(play())] == [MemoryError] * 4
    with store.read() as tx:
        assert tx.log_size() == 4
