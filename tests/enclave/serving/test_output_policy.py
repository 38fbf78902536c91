"""What leaves of scores: by tables of cases, ties and numbers that are none included."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cenacle.cut.specs import TensorSpec
from cenacle.documents.serving import OutputPolicy
from cenacle.enclave.output_policy import apply_policy, outputs_under
from cenacle.errors import InputError

NAN, INF = np.nan, np.inf
LABEL = OutputPolicy(form="label")


def top(k: int, decimals: int | None = None) -> OutputPolicy:
    return OutputPolicy(form="top-k", k=k, decimals=decimals)


def scores(decimals: int | None = None) -> OutputPolicy:
    return OutputPolicy(form="scores", decimals=decimals)


def f32(*rows: list[float]) -> dict[str, Any]:
    return {"y": np.array(rows, np.float32)}


@pytest.mark.parametrize(
    ("row", "label"),
    [
        ([0.1, 0.7, 0.2], 1),
        ([0.5, 0.5, 0.2], 0),
        ([-1.0, -3.0, -0.5], 2),
        ([NAN, 0.1, 0.2], 2),
        ([0.1, NAN, -INF], 0),
        ([NAN, NAN, NAN], 0),
        ([-INF, NAN, -INF], 0),
        ([-INF, INF, INF], 1),
        ([-0.0, 0.0, 0.0], 0),
        ([1e-45, 0.0, 0.0], 0),
    ],
)
def test_the_label_is_the_first_of_the_greatest(row: list[float], label: int) -> None:
    told = apply_policy(LABEL, f32(row))
    assert list(told) == ["y.label"]
    assert told["y.label"].dtype == np.int64
    assert told["y.label"].tolist() == [label]


@pytest.mark.parametrize(
    ("row", "k", "labels"),
    [
        ([0.1, 0.7, 0.2], 2, [1, 2]),
        ([0.5, 0.5, 0.5], 2, [0, 1]),
        ([0.2, 0.5, 0.5, 0.5], 2, [1, 2]),
        ([0.2, 0.5, 0.1, 0.2], 3, [1, 0, 3]),
        ([NAN, 0.1, NAN], 3, [1, 0, 2]),
        ([NAN, -INF, -INF], 3, [0, 1, 2]),
        ([INF, 1.0, INF], 2, [0, 2]),
        ([0.3, 0.1], 5, [0, 1]),
    ],
)
def test_the_greatest_come_first_and_lower_indices_before_equals(
    row: list[float], k: int, labels: list[int]
) -> None:
    told = apply_policy(top(k), f32(row))
    assert told["y.label"].tolist() == [labels]
    np.testing.assert_array_equal(told["y.score"][0], np.array(row, np.float32)[labels])
    assert told["y.label"].flags.c_contiguous


def test_labels_are_chosen_before_scores_are_rounded() -> None:
    told = apply_policy(top(2, 1), f32([0.31, 0.33, 0.34]))
    assert told["y.label"].tolist() == [[2, 1]]
    np.testing.assert_array_equal(told["y.score"], np.array([[0.3, 0.3]], np.float32))


@pytest.mark.parametrize(
    ("value", "decimals", "rounded"),
    [
        (0.126, 2, 0.13),
        (-0.126, 2, -0.13),
        (0.5, 0, 0.0),
        (1.5, 0, 2.0),
        (2.5, 0, 2.0),
        (-2.5, 0, -2.0),
        (1e30, 9, 1e30),
        (-1e30, 9, -1e30),
        (3.4e38, 0, 3.4e38),
        (INF, 3, INF),
        (-INF, 3, -INF),
        (1e-20, 9, 0.0),
        (16777217.0, 9, 16777216.0),
    ],
)
def test_rounding(value: float, decimals: int, rounded: float) -> None:
    told = apply_policy(scores(decimals), f32([value]))["y"]
    assert told.dtype == np.float32
    assert told[0, 0] == np.float32(rounded)


@pytest.mark.parametrize("kind", ["<f2", "<f4", "<f8"])
def test_a_small_negative_score_does_not_show_its_sign(kind: str) -> None:
    row = np.array([[-1e-6, 1e-6, -0.0, 0.0]], kind)
    told = apply_policy(scores(3), {"y": row})["y"]
    assert told.dtype == row.dtype
    assert not np.signbit(told).any()


def test_nan_carries_nothing() -> None:
    row = np.array([0x7FC01234, 0xFFC05678], np.uint32).view(np.float32)[None]
    for told in (
        apply_policy(scores(1), {"y": row})["y"],
        apply_policy(top(2, 1), {"y": row})["y.score"],
    ):
        assert len(set(told.view(np.uint32).ravel().tolist())) == 1


def test_without_decimals_scores_leave_as_they_are() -> None:
    row = f32([0.123456789, -0.0, NAN])
    assert apply_policy(scores(), row)["y"] is row["y"]


def test_integers_are_ranked_exactly_and_not_rounded() -> None:
    for kind in (np.int64, np.uint64):
        row = np.array([[2**62, 2**62 + 1, 5]], kind)
        assert apply_policy(LABEL, {"y": row})["y.label"].tolist() == [1]
        assert apply_policy(top(2), {"y": row})["y.label"].tolist() == [[1, 0]]
        np.testing.assert_array_equal(apply_policy(scores(0), {"y": row})["y"], row)


def test_each_output_and_each_position_gets_its_own_labels() -> None:
    outputs = {
        "a": np.array([[[0.1, 0.9], [0.8, 0.2]]], np.float32),
        "b": np.array([[3.0, 1.0, 2.0]], np.float32),
    }
    told = apply_policy(LABEL, outputs)
    assert {name: one.tolist() for name, one in told.items()} == {
        "a.label": [[1, 0]],
        "b.label": [0],
    }
    told = apply_policy(top(2), outputs)
    assert told["a.label"].tolist() == [[[1, 0], [0, 1]]]
    assert told["b.label"].tolist() == [[0, 2]]


_ROWS = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(1, 6)),
    elements=st.floats(width=32, allow_nan=True, allow_infinity=True),
)


@given(_ROWS, st.integers(1, 8))
def test_top_k_is_what_sorting_gives(rows: Any, k: int) -> None:
    told = apply_policy(top(k), {"y": rows})["y.label"].tolist()
    keyed = np.where(np.isnan(rows), -np.inf, rows)
    wanted = [sorted(range(len(row)), key=row.__neg__().__getitem__)[:k] for row in keyed]
    assert told == wanted
    assert [one[0] for one in told] == apply_policy(LABEL, {"y": rows})["y.label"].tolist()


@given(_ROWS, st.integers(0, 9))
def test_rounding_is_final_and_near(rows: Any, decimals: int) -> None:
    policy = scores(decimals)
    once = apply_policy(policy, {"y": rows})["y"]
    np.testing.assert_array_equal(apply_policy(policy, {"y": once})["y"], once)
    finite = np.isfinite(rows)
    np.testing.assert_array_equal(np.isfinite(once), finite)
    error = np.abs(once[finite].astype(float) - rows[finite].astype(float))
    assert (error <= 0.5001 * 10.0**-decimals + np.abs(rows[finite].astype(float)) * 1e-7).all()


@given(_ROWS, _ROWS)
def test_a_label_tells_nothing_but_the_label(one: Any, other: Any) -> None:
    """Rows of the same greatest class give the same bytes, whatever their scores are."""
    same = min(one.shape[0], other.shape[0])
    a, b = (apply_policy(LABEL, {"y": x[:same]})["y.label"] for x in (one, other))
    labels = [np.nanargmax(np.where(np.isnan(x), -np.inf, x), -1) for x in (one, other)]
    assert (a.tobytes() == b.tobytes()) == (labels[0][:same] == labels[1][:same]).all()


# ---------------------------------------------------------------------- what clients are told


Y = TensorSpec("y", "F32", (None, 10))


@pytest.mark.parametrize(
    ("policy", "spec", "told"),
    [
        (LABEL, Y, [("y.label", "I64", (None,))]),
        (top(3), Y, [("y.label", "I64", (None, 3)), ("y.score", "F32", (None, 3))]),
        (top(20), Y, [("y.label", "I64", (None, 10)), ("y.score", "F32", (None, 10))]),
        (scores(2), Y, [("y", "F32", (None, 10))]),
        (scores(), TensorSpec("y", "F16", (None,)), [("y", "F16", (None,))]),
        (LABEL, TensorSpec("y", "F64", (None, None, 5)), [("y.label", "I64", (None, None))]),
        (LABEL, TensorSpec("y", "F32", (5,)), [("y.label", "I64", ())]),
    ],
    ids=range(7),
)
def test_outputs_under_a_policy(
    policy: OutputPolicy, spec: TensorSpec, told: list[tuple[Any, ...]]
) -> None:
    found = outputs_under(policy, [spec])
    assert [(s.name, s.dtype, s.shape) for s in found] == told
    shape = [2 if size is None else size for size in spec.shape]
    answer = apply_policy(policy, {"y": np.zeros(shape, spec.numpy_dtype)})
    for one in found:
        array = answer[one.name]
        assert array.dtype == one.numpy_dtype
        assert array.shape == tuple(2 if size is None else size for size in one.shape)


@pytest.mark.parametrize(
    ("policy", "specs", "message"),
    [
        (LABEL, [TensorSpec("y", "F32", (None,))], "has no labels"),
        (top(1), [TensorSpec("y", "F32", ())], "has no labels"),
        (LABEL, [TensorSpec("y", "F32", (None, None))], "has no labels"),
        (scores(), [TensorSpec("y", "BF16", (None, 2))], "no client can read"),
        (scores(), [TensorSpec("y", "C64", (None, 2))], "no client can read"),
        (scores(), [Y, Y], "the same name"),
    ],
    ids=range(6),
)
def test_a_policy_that_does_not_fit_is_refused_before_anything_is_served(
    policy: OutputPolicy, specs: list[TensorSpec], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        outputs_under(policy, specs)
