"""From opened assets to arrays: what the recipe asked for, checked row by row.

A source is an asset opened inside the enclave. Errors name the asset, the column and the
row index, and never a value: they may leave the enclave, the data may not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cenacle.documents.privacy import PrivacyPlan, SubjectUnit
from cenacle.documents.recipe import Recipe, TableData, TensorData
from cenacle.errors import DataError, InputError
from cenacle.training.front import FrontGraph, FrontUse, front_features
from cenacle.training.sources import Source, TableSource, TensorSource
from cenacle.training.subjects import array_subjects, column_subjects

__all__ = [
    "Dataset",
    "PartyRows",
    "feature_matrix",
    "load_dataset",
    "sample_array",
]


@dataclass(frozen=True)
class PartyRows:
    """The rows of one asset.

    Attributes:
        alias: the contract's name of the asset.
        inputs: (rows, *sample shape), as stored (tables: float64), not yet scaled; with a
            front, what it gives (float32).
        targets: (rows,) class codes (int64) or values (float64).
        subjects: (rows,) whose each row is, numbered within the asset; None: nobody asked.
    """

    alias: str
    inputs: NDArray[Any]
    targets: NDArray[Any]
    subjects: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True)
class Dataset:
    """All parties' rows.

    Attributes:
        features: names of the columns of a table, in the order of the inputs.
    """

    parties: tuple[PartyRows, ...]
    features: tuple[str, ...] | None

    @property
    def digest(self) -> str:
        """SHA-256 over every value, so that a checkpoint is not resumed on other rows."""
        state = hashlib.sha256()
        for party in self.parties:
            for array in (party.inputs, party.targets, party.subjects):
                if array is None:
                    continue
                state.update(f"{party.alias} {array.dtype.str} {array.shape};".encode())
                state.update(np.ascontiguousarray(array).data)
        return "sha256:" + state.hexdigest()


def load_dataset(
    recipe: Recipe,
    sources: Mapping[str, Source],
    plan: PrivacyPlan | None = None,
    front: FrontGraph | None = None,
) -> Dataset:
    """Read and check every party's rows.

    Args:
        sources: opened assets by alias; must hold every alias of the recipe's data.
        front: runs the recipe's front, if it has one.
        plan: under which nothing is said about the rows as a whole; ids of subjects are read
            if they are its unit.

    Raises:
        DataError: an asset is missing or of the wrong kind, has no rows, lacks columns or
            has others than its peers, or a value is missing, not finite or no number; a
            label is not among the classes, or a class occurs nowhere.
    """
    data = recipe.data
    for alias in data.assets:
        if alias not in sources:
            raise DataError(
                f"the recipe reads asset {alias!r}, which the job does not have",
                found=", ".join(sorted(sources)) or "no assets",
            )
    unit = plan.unit if plan is not None else None
    subject = unit.subject if isinstance(unit, SubjectUnit) else None
    if isinstance(data, TableData):
        dataset = _load_tables(data, sources, subject)
    else:
        through = None
        if (use := FrontUse.of(recipe)) is not None:
            if front is None:
                raise InputError("the recipe has a front, and there is nothing that runs it")
            through = _Through(front, use, alone=plan is not None)
        dataset = _load_tensors(data, sources, subject, through)
    if plan is None:
        _check_classes(recipe, dataset)
    return dataset


def _check_classes(recipe: Recipe, dataset: Dataset) -> None:
    if recipe.data.classes is None:
        return
    counts = sum(
        np.bincount(party.targets, minlength=len(recipe.data.classes)) for party in dataset.parties
    )
    for label, count in zip(recipe.data.classes, np.atleast_1d(counts), strict=True):
        if count == 0:
            raise DataError(
                f"class {label!r} of the recipe occurs in no party's rows",
                remedy="take it out of the recipe's classes or add data of that class",
            )


# --- tables ------------------------------------------------------------------------------


def _load_tables(data: TableData, sources: Mapping[str, Source], subject: str | None) -> Dataset:
    named = () if data.features == "all_but_target" else data.features
    if subject is not None and subject in (data.target, *named):
        raise DataError(
            f"column {subject!r} holds ids of subjects and is also the target or a feature",
            remedy="take it out of the recipe's features, or name another column in the plan",
        )
    others = set(data.ignore) if subject is None else {*data.ignore, subject}
    features: tuple[str, ...] | None = None
    parties = []
    for alias in data.assets:
        source = sources[alias]
        if not isinstance(source, TableSource):
            raise DataError(f"asset {alias!r} is not a table", remedy="seal it as a table")
        names = list(source.schema.names)
        if len(set(names)) != len(names):
            raise DataError(f"asset {alias!r} has two columns of the same name")
        if features is None:
            features = _feature_names(data, names, others, alias)
        _check_columns(data, features, names, others, alias)
        if subject is not None and subject not in names:
            raise DataError(f"asset {alias!r} lacks the column {subject!r} with ids of subjects")
        if source.num_rows == 0:
            raise DataError(f"asset {alias!r} has no rows")
        table = source.read([*features, data.target, *([] if subject is None else [subject])])
        parties.append(
            PartyRows(
                alias,
                feature_matrix(table, features, alias),
                _table_targets(data, table, alias),
                None
                if subject is None
                else column_subjects(
                    table.column(subject), f"column {subject!r} of asset {alias!r}"
                ),
            )
        )
    return Dataset(tuple(parties), features)


def _feature_names(
    data: TableData, names: list[str], others: set[str], alias: str
) -> tuple[str, ...]:
    features = data.features
    if features == "all_but_target":
        left_out = {data.target, *others}
        features = tuple(name for name in names if name not in left_out)
        if not features:
            raise DataError(f"asset {alias!r} has no column but the target and the ignored ones")
    unknown = sorted(set(data.ranges or ()) - set(features))
    if unknown:
        raise DataError(
            "the recipe states ranges of columns that are no features",
            found=_listing(unknown),
            remedy="correct the names in data.ranges",
        )
    return features


def _check_columns(
    data: TableData, features: Sequence[str], names: list[str], others: set[str], alias: str
) -> None:
    wanted = {*features, data.target}
    missing = [name for name in (*features, data.target) if name not in names]
    if missing:
        raise DataError(
            f"asset {alias!r} lacks columns",
            found=f"{len(names)} columns without {_listing(missing)}",
            expected=f"{len(wanted)} columns of the recipe",
        )
    extra = [name for name in names if name not in wanted and name not in others]
    if data.features == "all_but_target" and extra:
        raise DataError(
            f"asset {alias!r} has columns that the first asset does not have",
            found=_listing(extra),
            remedy="name the features in the recipe, or list these under ignore",
        )


def _listing(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:8])
    return shown + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def feature_matrix(table: pa.Table, features: Sequence[str], asset: str) -> NDArray[np.float64]:
    """Columns as one array, shape (rows, features).

    Raises:
        DataError: naming the column, and the row of the first bad value.
    """
    matrix = np.empty((table.num_rows, len(features)), dtype=np.float64)
    for index, name in enumerate(features):
        matrix[:, index] = _numbers(table.column(name), f"column {name!r} of asset {asset!r}")
    return matrix


def _numbers(column: pa.ChunkedArray, what: str) -> NDArray[np.float64]:
    kind = column.type
    if not (
        pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_decimal(kind)
    ):
        raise DataError(
            f"{what} does not hold numbers",
            found=f"type {kind}",
            expected="an integer, floating-point, decimal or boolean type",
        )
    _refuse_nulls(column, what)
    if pa.types.is_boolean(kind):
        column = column.cast(pa.uint8())
    values = np.asarray(column.cast(pa.float64(), safe=False).to_numpy(), dtype=np.float64)
    _refuse_non_finite(values, what)
    return values


def _refuse_nulls(column: pa.ChunkedArray, what: str) -> None:
    if column.null_count:
        row = pc.index(pc.is_null(column), True).as_py()
        raise DataError(f"{what} has no value in row {row}", remedy="fill or drop such rows")


def _refuse_non_finite(values: NDArray[Any], what: str) -> None:
    """Also refuses what overflows float32, in which training computes."""
    with np.errstate(over="ignore", invalid="ignore"):
        good = np.isfinite(values.astype(np.float32, copy=False))
    if not good.all():
        row = int(np.argmin(good.reshape(len(values), -1).all(axis=1)))
        raise DataError(
            f"{what} is not a finite float32 number in row {row}",
            remedy="NaN, infinite and huge values cannot be trained on; fill or drop such rows",
        )


def _table_targets(data: TableData, table: pa.Table, alias: str) -> NDArray[Any]:
    what = f"target column {data.target!r} of asset {alias!r}"
    column = table.column(data.target)
    if data.classes is None:
        return _numbers(column, what)
    _refuse_nulls(column, what)
    sample = data.classes[0]
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    if isinstance(sample, str):
        fits = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        wanted: pa.DataType = pa.string()
    elif isinstance(sample, bool):
        fits = pa.types.is_boolean(kind)
        wanted = pa.bool_()
    else:
        fits = pa.types.is_integer(kind) or pa.types.is_floating(kind)
        wanted = pa.int64()
    if not fits:
        raise DataError(
            f"{what} has another type than the recipe's classes",
            found=f"type {kind}",
            expected=f"{type(sample).__name__} labels",
        )
    # Floating-point labels are compared as they are: 1.5 is not class 1.
    values = pa.array(data.classes, type=wanted)
    if pa.types.is_floating(kind):
        values, column = values.cast(pa.float64(), safe=False), column.cast(pa.float64())
    elif pa.types.is_integer(kind):
        column = _as_int64(column, what)
    else:
        column = column.cast(wanted)
    codes = pc.index_in(column, value_set=values)
    if codes.null_count:
        row = pc.index(pc.is_null(codes), True).as_py()
        raise DataError(
            f"{what} holds a label in row {row} that is not a class of the recipe",
            expected=f"one of {_listing([str(label) for label in data.classes])}",
        )
    return np.asarray(codes.to_numpy(), dtype=np.int64)


def _as_int64(column: pa.ChunkedArray, what: str) -> pa.ChunkedArray:
    try:
        return column.cast(pa.int64())
    except pa.ArrowInvalid:
        raise DataError(f"{what} holds integers beyond 64 bits") from None


# --- tensors -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Through:
    """A front for the samples of every asset."""

    graph: FrontGraph
    use: FrontUse
    alone: bool

    def __call__(self, samples: NDArray[Any], source: TensorSource, what: str) -> NDArray[Any]:
        others = {name: np.asarray(source.read(t)) for name, t in self.use.others.items()}
        return front_features(self.graph, self.use, samples, others, what=what, alone=self.alone)


def _load_tensors(
    data: TensorData,
    sources: Mapping[str, Source],
    subject: str | None,
    through: _Through | None,
) -> Dataset:
    fed = tuple(through.use.others.values()) if through is not None else ()
    if subject in (data.inputs, data.labels, *fed):
        raise DataError(f"tensor {subject!r} holds ids of subjects and is also read as data")
    parties: list[PartyRows] = []
    for alias in data.assets:
        source = sources[alias]
        if not isinstance(source, TensorSource):
            raise DataError(f"asset {alias!r} does not hold tensors", remedy="seal it as tensors")
        for name in (data.inputs, data.labels, *fed, subject):
            if name is not None and name not in source.names:
                raise DataError(
                    f"asset {alias!r} lacks tensor {name!r}", found=_listing(list(source.names))
                )
        what = f"tensor {data.inputs!r} of asset {alias!r}"
        inputs = sample_array(
            np.asarray(source.read(data.inputs)), what, shape=data.shape, integers=data.integers
        )
        targets = _tensor_targets(data, np.asarray(source.read(data.labels)), alias)
        if len(inputs) != len(targets):
            raise DataError(
                f"asset {alias!r} has another number of labels than of samples",
                found=f"{len(targets)} labels",
                expected=f"{len(inputs)} samples",
            )
        if through is not None:
            inputs = through(inputs, source, what)
        if parties and inputs.shape[1:] != parties[0].inputs.shape[1:]:
            raise DataError(
                f"samples of asset {alias!r} have another shape than those of the first asset",
                found=inputs.shape[1:],
                expected=parties[0].inputs.shape[1:],
            )
        subjects = None
        if subject is not None:
            which = f"tensor {subject!r} of asset {alias!r}"
            subjects = array_subjects(np.asarray(source.read(subject)), len(inputs), which)
        parties.append(PartyRows(alias, inputs, targets, subjects))
    return Dataset(tuple(parties), None)


def sample_array(
    array: NDArray[Any], what: str, *, shape: tuple[int, ...] | None, integers: bool
) -> NDArray[Any]:
    """Samples along axis 0, checked and given the recipe's shape.

    Raises:
        DataError: no rows, no numbers, a value that is not finite, or another size.
    """
    if array.ndim == 0 or len(array) == 0:
        raise DataError(f"{what} has no samples", found=f"shape {array.shape}")
    if array.dtype.kind not in ("iu" if integers else "biuf"):
        raise DataError(
            f"{what} has the wrong type of element",
            found=array.dtype,
            expected="integers" if integers else "integers, booleans or floats",
        )
    size = int(np.prod(array.shape[1:]))
    if shape is not None:
        if size != int(np.prod(shape)):
            raise DataError(
                f"samples of {what} do not fit the recipe's shape",
                found=array.shape[1:],
                expected=shape,
            )
        array = array.reshape(len(array), *shape)
    elif array.ndim == 1:
        array = array.reshape(-1, 1)
    if size == 0:
        raise DataError(f"samples of {what} are empty", found=f"shape {array.shape}")
    if array.dtype.kind == "f":
        _refuse_non_finite(array, what)
    return array


def _tensor_targets(data: TensorData, array: NDArray[Any], alias: str) -> NDArray[Any]:
    what = f"tensor {data.labels!r} of asset {alias!r}"
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise DataError(f"{what} is not one label a sample", found=f"shape {array.shape}")
    if data.classes is None:
        if array.dtype.kind not in "iuf":
            raise DataError(f"{what} does not hold numbers", found=array.dtype)
        _refuse_non_finite(array, what)
        return array.astype(np.float64)
    boolean = isinstance(data.classes[0], bool)
    if array.dtype.kind not in ("b" if boolean else "iu"):
        raise DataError(
            f"{what} has another type than the recipe's classes",
            found=array.dtype,
            expected="booleans" if boolean else "integers",
        )
    labels = np.array(data.classes, dtype=np.bool_ if boolean else np.int64)
    order = np.argsort(labels)
    places = np.searchsorted(labels[order], array).clip(max=len(labels) - 1)
    codes: NDArray[np.int64] = order[places].astype(np.int64)
    wrong = labels[codes] != array
    if wrong.any():
        raise DataError(
            f"{what} holds a label in row {int(np.argmax(wrong))} that is not a class",
            expected=f"one of {_listing([str(label) for label in data.classes])}",
        )
    return codes
