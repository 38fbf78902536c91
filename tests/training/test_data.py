from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cenacle.crypto import SecretBytes
from cenacle.documents.recipe import Recipe
from cenacle.errors import DataError
from cenacle.sealing import SealedWriter, TableReader, TableWriter, TensorReader, seal_tensors
from cenacle.training import MemoryTable, MemoryTensors, TableSource, TensorSource
from cenacle.training.data import load_dataset

CANARY = 7321.25


def table(**changes: Any) -> MemoryTable:
    columns: dict[str, Any] = {
        "x": [1.0, CANARY, 3.0, 4.0],
        "y": [4, 3, 2, 1],
        "label": ["no", "yes", "no", "yes"],
    }
    columns |= changes
    return MemoryTable({name: values for name, values in columns.items() if values is not None})


def sources(other: Any) -> dict[str, Any]:
    return {"a": table(), "b": other, "c": table()}


def test_reads_columns_in_the_order_of_the_first_table(make_recipe: Callable[..., Recipe]) -> None:
    swapped = MemoryTable({"label": ["yes"], "y": pa.array([9], pa.int8()), "x": [True]})
    dataset = load_dataset(make_recipe(), sources(swapped))
    assert dataset.features == ("x", "y")
    np.testing.assert_array_equal(dataset.parties[1].inputs, [[1.0, 9.0]])
    np.testing.assert_array_equal(dataset.parties[0].targets, [0, 1, 0, 1])
    assert dataset.parties[0].inputs.dtype == np.float64


def test_named_features_leave_other_columns_unread(make_recipe: Callable[..., Recipe]) -> None:
    data = {
        "form": "table",
        "assets": ["b"],
        "features": ["y", "x"],
        "target": "label",
        "classes": ["yes", "no"],
    }
    other = table(note=["a", "b", None, "c"])
    dataset = load_dataset(make_recipe(data=data), {"b": other})
    np.testing.assert_array_equal(dataset.parties[0].inputs[0], [4.0, 1.0])
    np.testing.assert_array_equal(dataset.parties[0].targets, [1, 0, 1, 0])


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (table(x=None), "asset 'b' lacks columns.*'x'"),
        (table(label=None), "asset 'b' lacks columns.*'label'"),
        (table(z=[1, 2, 3, 4]), "asset 'b' has columns that the first asset.*'z'"),
        (table(x=["1", "2", "3", "4"]), "column 'x' of asset 'b' does not hold numbers.*string"),
        (table(x=[NAN, 1.0, 2.0, 3.0]), "column 'x' of asset 'b' is not a finite.*row 0"),
        (table(x=[CANARY, 1.0, INF, 3.0]), "column 'x' of asset 'b' is not a finite.*row 2"),
        (table(x=[1.0, 1e300, 2.0, 3.0]), "column 'x' of asset 'b' is not a finite.*row 1"),
        (table(x=[CANARY, None, 2.0, 3.0]), "column 'x' of asset 'b' has no value in row 1"),
        (table(y=[None] * 4), "column 'y' of asset 'b' does not hold numbers.*null"),
        (table(y=pa.array([[1]] * 4)), "column 'y' of asset 'b' does not hold numbers"),
        (table(label=["no", None, "no", "yes"]), "target column 'label' of asset 'b' has no value"),
        (table(label=["no", "yes", "7321", "no"]), "holds a label in row 2 .* not a class"),
        (table(label=[0, 1, 0, 1]), "another type than the recipe's classes.*int64"),
        (table(label=[True, False, True, False]), "another type than the recipe's classes"),
        (table(x=[], y=[], label=[]), "asset 'b' has no rows"),
        (MemoryTensors({"x": np.zeros(3)}), "asset 'b' is not a table"),
        (
            MemoryTable(pa.Table.from_arrays([pa.array([1.0])] * 3, ["x", "x", "label"])),
            "two columns of the same name",
        ),
    ],
)
def test_refuses_tables(make_recipe: Callable[..., Recipe], other: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(make_recipe(), sources(other))
    assert "7321" not in caught.value.diagnostics()


def test_refuses_a_missing_asset(make_recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(DataError, match="'c', which the job does not have"):
        load_dataset(make_recipe(), {"a": table(), "b": table()})


def test_refuses_a_class_that_nobody_has(make_recipe: Callable[..., Recipe]) -> None:
    data = make_recipe().to_fields()["data"] | {"classes": ["no", "yes", "maybe"]}
    with pytest.raises(DataError, match="class 'maybe' of the recipe occurs in no party"):
        load_dataset(make_recipe(data=data), sources(table()))


def test_a_party_may_lack_a_class(make_recipe: Callable[..., Recipe]) -> None:
    dataset = load_dataset(make_recipe(), sources(table(label=["no"] * 4)))
    np.testing.assert_array_equal(dataset.parties[1].targets, [0, 0, 0, 0])


@pytest.mark.parametrize(
    ("classes", "labels", "codes"),
    [
        ([3, 5], pa.array([5, 3, 5, 3], pa.int16()), [1, 0, 1, 0]),
        ([3, 5], pa.array([5.0, 3.0, 5.0, 3.0]), [1, 0, 1, 0]),
        ([3, 5], pa.array([5, 3, 5, 3], pa.uint64()), [1, 0, 1, 0]),
        ([True, False], pa.array([True, False, True, False]), [0, 1, 0, 1]),
        (["u", "v"], pa.array(["v", "u", "v", "u"]).dictionary_encode(), [1, 0, 1, 0]),
        (["u", "v"], pa.array(["v", "u", "v", "u"], pa.large_string()), [1, 0, 1, 0]),
    ],
)
def test_label_types(
    make_recipe: Callable[..., Recipe], classes: list[Any], labels: pa.Array, codes: list[int]
) -> None:
    data = {"form": "table", "assets": ["b"], "target": "label", "classes": classes}
    dataset = load_dataset(make_recipe(data=data), {"b": table(label=labels)})
    np.testing.assert_array_equal(dataset.parties[0].targets, codes)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (pa.array([3.0, 3.5, 5.0, 3.0]), "label in row 1"),
        (pa.array([3.0, 5.0, NAN, 3.0]), "label in row 2"),
        (pa.array([3, 5, 3, 2**64 - 1], pa.uint64()), "beyond 64 bits"),
        (pa.array(["3", "5", "3", "5"]), "another type"),
    ],
)
def test_refuses_integer_labels(
    make_recipe: Callable[..., Recipe], labels: pa.Array, message: str
) -> None:
    data = {"form": "table", "assets": ["b"], "target": "label", "classes": [3, 5]}
    with pytest.raises(DataError, match=message):
        load_dataset(make_recipe(data=data), {"b": table(label=labels)})


def test_regression_target(make_recipe: Callable[..., Recipe]) -> None:
    data = {"form": "table", "assets": ["b"], "target": "y", "ignore": ["label"]}
    recipe = make_recipe(task="regression", data=data)
    dataset = load_dataset(recipe, {"b": table()})
    assert dataset.features == ("x",)
    np.testing.assert_array_equal(dataset.parties[0].targets, [4.0, 3.0, 2.0, 1.0])
    with pytest.raises(DataError, match="target column 'y' of asset 'b' is not a finite"):
        load_dataset(recipe, {"b": table(y=[1.0, 2.0, 3.0, INF])})


# --- tensors -----------------------------------------------------------------------------


def tensor_recipe(make_recipe: Callable[..., Recipe], **changes: Any) -> Recipe:
    data: dict[str, Any] = {
        "form": "tensors",
        "assets": ["a", "b"],
        "inputs": "images",
        "labels": "labels",
        "classes": [0, 1, 7],
    }
    return make_recipe(data=data | changes, model={"type": "mlp", "hidden": [4]})


def tensors(**changes: Any) -> MemoryTensors:
    arrays: dict[str, Any] = {
        "images": np.arange(3 * 4, dtype=np.uint8).reshape(3, 2, 2),
        "labels": np.array([7, 0, 1], dtype=np.uint8),
    }
    arrays |= changes
    return MemoryTensors({name: array for name, array in arrays.items() if array is not None})


def test_reads_tensors(make_recipe: Callable[..., Recipe]) -> None:
    recipe = tensor_recipe(make_recipe, shape=[1, 4])
    dataset = load_dataset(recipe, {"a": tensors(), "b": tensors(labels=np.array([[0], [1], [7]]))})
    assert dataset.features is None
    assert dataset.parties[0].inputs.shape == (3, 1, 4)
    assert dataset.parties[0].inputs.dtype == np.uint8
    np.testing.assert_array_equal(dataset.parties[0].targets, [2, 0, 1])
    np.testing.assert_array_equal(dataset.parties[1].targets, [0, 1, 2])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (tensors(images=None), "asset 'b' lacks tensor 'images'"),
        (tensors(labels=None), "asset 'b' lacks tensor 'labels'"),
        (tensors(images=np.zeros((4, 2, 2))), "another number of labels"),
        (tensors(images=np.zeros((3, 2, 3))), "another shape"),
        (tensors(images=np.zeros((0, 2, 2)), labels=np.zeros(0, int)), "no samples"),
        (tensors(images=np.zeros(())), "no samples"),
        (tensors(images=np.zeros((3, 0))), "are empty"),
        (tensors(images=np.full((3, 2, 2), NAN)), "not a finite.*row 0"),
        (tensors(images=np.array([[[1, 2]], [[3, INF]], [[1, 1]]])), "not a finite.*row 1"),
        (tensors(images=np.array([["a", "b"]] * 3)), "wrong type of element"),
        (tensors(images=np.zeros((3, 2, 2), complex)), "wrong type of element"),
        (tensors(labels=np.array([0.0, 1.0, 7.0])), "another type"),
        (tensors(labels=np.array([True, False, True])), "another type"),
        (tensors(labels=np.array([0, 1, 8])), "label in row 2"),
        (tensors(labels=np.array([0, -1, 7])), "label in row 1"),
        (tensors(labels=np.zeros((3, 2), int)), "not one label a sample"),
        (table(), "asset 'b' does not hold tensors"),
    ],
)
def test_refuses_tensors(make_recipe: Callable[..., Recipe], other: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_dataset(tensor_recipe(make_recipe), {"a": tensors(), "b": other})


def test_refuses_another_size_than_the_recipes_shape(make_recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(DataError, match="do not fit the recipe's shape"):
        load_dataset(tensor_recipe(make_recipe, shape=[5]), {"a": tensors(), "b": tensors()})


def test_digest_depends_on_every_value(make_recipe: Callable[..., Recipe]) -> None:
    def digest(other: MemoryTable) -> str:
        return load_dataset(make_recipe(), sources(other)).digest

    digests = {
        digest(table()),
        digest(table(x=[1.0, CANARY, 3.0, 4.5])),
        digest(table(label=["no", "yes", "yes", "yes"])),
    }
    assert len(digests) == 3
    assert digest(table()) in digests


def test_sealed_tensors_are_a_source(tmp_path: Path, make_recipe: Callable[..., Recipe]) -> None:
    key = SecretBytes(bytearray(range(32)))
    arrays = {name: tensors().read(name) for name in tensors().names}
    for alias in "ab":
        seal_tensors(arrays, tmp_path / alias, key)
    with TensorReader(tmp_path / "a", key) as one, TensorReader(tmp_path / "b", key) as two:
        assert isinstance(one, TensorSource)
        assert not isinstance(one, TableSource)
        dataset = load_dataset(tensor_recipe(make_recipe), {"a": one, "b": two})
    np.testing.assert_array_equal(dataset.parties[1].targets, [2, 0, 1])


def test_sealed_table_is_a_source(tmp_path: Path, make_recipe: Callable[..., Recipe]) -> None:
    key = SecretBytes(bytearray(range(32)))
    rows = table().read()
    with SealedWriter(tmp_path / "b", key, "table") as writer:
        columns = TableWriter(writer, rows.schema)
        for batch in rows.to_batches():
            columns.write(batch)
        writer.set_schema(columns.finish())
    with TableReader(tmp_path / "b", key) as sealed:
        assert isinstance(sealed, TableSource)
        assert not isinstance(sealed, TensorSource)
        dataset = load_dataset(make_recipe(), sources(sealed))
    assert dataset.digest == load_dataset(make_recipe(), sources(table())).digest


def test_ranges_name_features(make_recipe: Callable[..., Recipe]) -> None:
    data = make_recipe().to_fields()["data"] | {"standardize": False}
    recipe = make_recipe(data=data | {"ranges": {"x": [0, 1], "z": [0, 1], "label": [0, 1]}})
    with pytest.raises(DataError, match=r"ranges of columns that are no features.*'label', 'z'"):
        load_dataset(recipe, sources(table()))
