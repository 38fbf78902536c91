"""Who is computed together with whom, and who waits for how long."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cenacle.cut.specs import TensorSpec
from cenacle.enclave.batching import Batcher
from cenacle.enclave.rows import answer_bytes, can_join, group_of, join, split
from cenacle.errors import DataError


class Clock:
    """Moves only when nobody can come any more: waiting takes no time in these tests."""

    def __init__(self) -> None:
        self.now = 0.0
        self.waits: list[float] = []

    def __call__(self) -> float:
        return self.now


def batcher(
    max_rows: int = 4, max_wait: float = 1.0
) -> tuple[Batcher[str], Clock, pytest.MonkeyPatch]:
    """A batcher whose waiting only moves the clock."""
    clock, patch = Clock(), pytest.MonkeyPatch()
    made: Batcher[str] = Batcher(max_rows, max_wait, clock)

    def wait(seconds: float | None = None) -> None:
        assert seconds is not None, "nobody would ever come"
        clock.waits.append(seconds)
        clock.now += seconds

    patch.setattr(made._changed, "wait", wait)
    return made, clock, patch


def test_a_single_client_never_waits() -> None:
    made, clock, _ = batcher()
    for number in range(5):
        made.put(str(number), 1)
        assert made.take() == [str(number)]
        made.answered(1)
    assert clock.waits == []


def test_who_came_together_a_moment_ago_is_waited_for_but_not_longer_than_allowed() -> None:
    made, clock, _ = batcher(max_wait=0.5)
    for name in "abc":
        made.put(name, 1)
    assert made.take() == ["a", "b", "c"]
    made.answered(3)
    made.put("a", 1)
    clock.now += 0.2
    assert made.take() == ["a"]
    assert clock.waits == [pytest.approx(0.3)]
    made.answered(1)
    # Two of them left: they are forgotten after two batches.
    made.put("a", 1)
    made.take()
    made.answered(1)
    clock.waits.clear()
    for _ in range(3):
        made.put("a", 1)
        assert made.take() == ["a"]
        made.answered(1)
    assert clock.waits == []


def test_a_full_batch_does_not_wait_and_nobody_is_overtaken() -> None:
    made, clock, _ = batcher(max_rows=4)
    for name, rows in (("a", 2), ("b", 1), ("c", 2), ("d", 1)):
        made.put(name, rows)
    assert made.take() == ["a", "b"]  # d would fit, and comes after c
    assert made.take() == ["c", "d"]
    assert clock.waits == [1.0]


def test_a_query_larger_than_a_batch_is_alone() -> None:
    made, _, _ = batcher(max_rows=4)
    made.put("large", 9)
    made.put("small", 1)
    assert made.take() == ["large"]
    made.answered(9)
    assert made.take() == ["small"]


def test_groups_are_not_mixed_and_keep_their_order() -> None:
    made, _, _ = batcher(max_rows=8)
    for name, group in (("a", 1), ("b", 2), ("c", 1), ("d", 2)):
        made.put(name, 1, group)
    assert made.take() == ["a", "c"]
    assert made.take() == ["b", "d"]


def test_a_closed_queue_hands_out_what_it_has_at_once_and_takes_no_more() -> None:
    made, clock, _ = batcher(max_rows=2)
    for name in "abc":
        assert made.put(name, 1)
    made.close()
    assert not made.put("d", 1)
    assert [made.take(), made.take(), made.take(), made.take()] == [["a", "b"], ["c"], [], []]
    assert clock.waits == []


def test_a_cleared_queue_gives_back_what_waits() -> None:
    made, _, _ = batcher()
    for name in "abc":
        made.put(name, 1)
    assert made.clear() == ["a", "b", "c"]
    assert made.take() == []


@pytest.mark.parametrize("end", ["put", "close", "clear"])
def test_a_thread_that_waits_is_woken(end: str) -> None:
    made: Batcher[str] = Batcher(4, 60.0)
    taken: list[list[str]] = []
    thread = threading.Thread(target=lambda: taken.append(made.take()))
    thread.start()
    {"put": lambda: made.put("a", 4), "close": made.close, "clear": made.clear}[end]()
    thread.join(30)
    assert taken == [["a"] if end == "put" else []]


def test_a_thread_that_waits_for_more_is_woken_by_the_end() -> None:
    for end in ("close", "clear"):
        made: Batcher[str] = Batcher(4, 60.0)
        made.put("a", 1)
        made.put("b", 1)
        made.take()
        made.answered(2)
        made.put("a", 1)
        taken: list[list[str]] = []
        thread = threading.Thread(target=lambda m=made, t=taken: t.append(m.take()))
        thread.start()
        getattr(made, end)()
        thread.join(30)
        assert taken in ([["a"]], [[]])


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 2)), max_size=30))
def test_everything_comes_out_once_in_order_and_within_bounds(
    items: list[tuple[int, int]],
) -> None:
    made: Batcher[int] = Batcher(4, 0.0)
    for number, (rows, group) in enumerate(items):
        made.put(number, rows, group)
    made.close()
    seen: list[int] = []
    while batch := made.take():
        assert len({items[one][1] for one in batch}) == 1
        assert len(batch) == 1 or sum(items[one][0] for one in batch) <= 4
        seen += batch
    assert sorted(seen) == list(range(len(items)))
    for group in range(3):
        mine = [one for one in seen if items[one][1] == group]
        assert mine == sorted(mine)


# ---------------------------------------------------------------------- rows


def f(*shape: int) -> Any:
    return np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_rows_are_joined_and_split_again(counts: list[int]) -> None:
    queries = [{"x": f(n, 2) + n, "k": f(n)} for n in counts]
    found = split(join(queries), counts)
    for one, query in zip(found, queries, strict=True):
        assert one.keys() == query.keys()
        for name, array in query.items():
            np.testing.assert_array_equal(one[name], array)


def test_a_single_query_is_not_copied() -> None:
    query = {"x": f(2, 2)}
    assert join([query]) is query


@pytest.mark.parametrize("array", [f(5, 2), f(3, 2), np.float32(1)], ids=["more", "less", "none"])
def test_a_model_that_gives_another_number_of_rows_is_refused(array: Any) -> None:
    with pytest.raises(DataError, match="another number of rows"):
        split({"y": np.asarray(array)}, [2, 2])


def test_only_rows_of_one_shape_are_joined() -> None:
    assert group_of({"x": f(1, 2)}) == group_of({"x": f(5, 2)})
    assert group_of({"x": f(1, 2)}) != group_of({"x": f(1, 3)})
    assert group_of({"x": f(1, 2)}) != group_of({"y": f(1, 2)})
    rows, fixed = TensorSpec("x", "F32", (None, 2)), TensorSpec("x", "F32", (2, 2))
    assert can_join([rows], [rows])
    assert not can_join([rows, fixed], [rows])
    assert not can_join([rows], [fixed])


def test_the_size_of_an_answer() -> None:
    specs = [TensorSpec("y", "F32", (None, 3)), TensorSpec("k", "I64", (2,))]
    assert answer_bytes(specs, 1) == 16 + 16
    assert answer_bytes(specs, 3) == 48 + 16
    assert answer_bytes([TensorSpec("y", "F32", (None, None))], 3) == 0
