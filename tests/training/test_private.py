from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter

from cenacle.accelerators import InlineAccelerator
from cenacle.accelerators.protocol import Operation
from cenacle.accounting import epsilon
from cenacle.cli.demo_patients import HOSPITALS, hospital_patients, share_with_clinic
from cenacle.cli.demo_patients import RANGES as RANGES_OF_PATIENTS
from cenacle.documents.base import parse_yaml
from cenacle.documents.offload import OffloadPlan
from cenacle.documents.privacy import PrivacyEvent, PrivacyPlan
from cenacle.documents.private_recipe import check_private_recipe, privacy_events
from cenacle.documents.recipe import Recipe
from cenacle.errors import DataError, DocumentError, EnclaveError, InputError, VerificationError
from cenacle.offload.private import PRIVATE_NOTE
from cenacle.training import (
    MemoryTable,
    MemoryTensors,
    Offloading,
    Privacy,
    TrainingResult,
    load_model,
    predict,
    read_model,
    train,
    write_model,
)
from cenacle.training import private_trainer as module
from cenacle.training.checkpoint import Checkpoint, MemorySink
from cenacle.training.data import load_dataset
from cenacle.training.evaluation import evaluate
from cenacle.training.loop import Rows
from cenacle.training.models import build_model
from cenacle.training.private import noisy_counts
from cenacle.training.private_trainer import Keys, PrivateTrainer, planned_steps
from cenacle.training.split import split_rows

MakeRecipe = Callable[..., Recipe]
Tables = Mapping[str, MemoryTable]

RANGES = {"x0": [-3, 3], "x1": [70, 130], "x2": [-0.3, 0.3], "x3": [-15, 12], "x4": [-3, 3]}
TABLE: dict[str, Any] = {
    "form": "table",
    "assets": ["a", "b", "c"],
    "target": "label",
    "classes": ["no", "yes"],
    "standardize": False,
    "ranges": RANGES,
}
PRIVATE: dict[str, Any] = {
    "data": TABLE,
    "model": {"type": "logistic"},
    "optimizer": {"type": "sgd", "learning_rate": 0.5},
    "epochs": 2,
    "batch_size": 8,
    "holdout": {"fraction": 0.25, "stratified": False},
}
DROPOUT = {"model": {"type": "mlp", "hidden": [6], "dropout": 0.3}}
TINY = 1e-4
"""Noise that hides nothing, so that what it should hide can be seen."""


def plan(**changes: Any) -> PrivacyPlan:
    fields: dict[str, Any] = {
        "epsilon": 8.0,
        "delta": 1e-5,
        "clipping_norm": 1.0,
        "noise_multiplier": 1.0,
        "sampling_probability": 0.25,
        "metrics_noise": 2.0,
    }
    if changes.get("sampling") == "shuffle":
        del fields["sampling_probability"]
    return PrivacyPlan.from_fields(fields | changes)


def secret(number: int = 1) -> bytes:
    return bytes([number]) * 32


def privately(
    recipe: Recipe, sources: Mapping[str, Any], number: int = 1, **changes: Any
) -> TrainingResult:
    return train(recipe, sources, privacy=Privacy(plan(**changes), secret(number)))


def bits(result: TrainingResult) -> bytes:
    return b"".join(name.encode() + array.tobytes() for name, array in result.model_tensors.items())


def same(one: TrainingResult, two: TrainingResult) -> None:
    assert bits(one) == bits(two)
    assert one.metrics == two.metrics
    assert (one.metadata, one.events) == (two.metadata, two.events)


@pytest.fixture(scope="module")
def recipe(make_recipe: MakeRecipe) -> Recipe:
    return make_recipe(**PRIVATE)


# --- what is spent is what was planned ---------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "planned"),
    [
        ({}, {}),
        ({"optimizer": {"type": "sgd", "learning_rate": 0.5, "momentum": 0.9}}, {}),
        ({**DROPOUT, "compare_alone": True}, {"clipping": "per-layer"}),
        ({"optimizer": {"type": "adam", "learning_rate": 0.01}}, {"sampling": "shuffle"}),
        ({"compare_alone": True, "batch_size": 100}, {"sampling": "shuffle"}),
        ({"schedule": {"type": "cosine", "warmup_epochs": 1}}, {"sampling_probability": 0.3}),
        ({"holdout": {"fraction": 0, "stratified": False}}, {"metrics_noise": None}),
    ],
)
def test_events_are_the_plans(
    make_recipe: MakeRecipe, tables: Tables, changes: dict[str, Any], planned: dict[str, Any]
) -> None:
    recipe = make_recipe(**PRIVATE | changes)
    calls: list[tuple[int, int]] = []
    privacy = Privacy(plan(**planned), secret())
    result = train(recipe, tables, privacy=privacy, progress=lambda *call: calls.append(call))
    assert result.events == privacy_events(privacy.plan, recipe)
    assert calls[-1][0] == calls[-1][1]
    assert [step for step, _ in calls] == list(range(1, calls[-1][1] + 1))
    assert json.loads(json.dumps(result.metrics, allow_nan=False)) == result.metrics
    assert "loss" not in json.dumps(result.metrics)
    model = load_model(result.model_tensors, result.metadata)
    assert len(predict(model, result.metadata, tables["a"].read()).labels) == 40


def test_a_regression_gives_a_model_and_no_measure(tables: Tables) -> None:
    columns = {alias: table.read().drop_columns("label") for alias, table in tables.items()}
    recipe = Recipe.from_fields(
        {
            "task": "regression",
            **PRIVATE,
            "data": {
                "form": "table",
                "assets": ["a", "b", "c"],
                "target": "x4",
                "standardize": False,
                "ranges": {"x0": [-3, 3]},
            },
            "model": {"type": "linear"},
        }
    )
    sources = {alias: MemoryTable(table) for alias, table in columns.items()}
    result = privately(recipe, sources, metrics_noise=None)
    assert result.metrics["pooled"] == {"rows": 21, "noisy": True, "epochs": 2}
    assert len(result.events) == 1


@pytest.mark.parametrize(
    "model",
    [
        {"type": "cnn", "channels": [3], "hidden": [4], "dropout": 0.2},
        {
            "type": "graph",
            "nodes": [
                {"op": "reshape", "name": "r", "shape": [4, 4, 4]},
                {"op": "group_norm", "name": "n", "groups": 2},
                {"op": "conv2d", "name": "c", "out_channels": 2, "kernel_size": 3},
                {"op": "flatten", "name": "f"},
                {"op": "linear", "name": "head", "out_features": 2},
            ],
        },
    ],
)
@pytest.mark.parametrize("clipping", ["flat", "per-layer"])
def test_tensors(make_recipe: MakeRecipe, model: dict[str, Any], clipping: str) -> None:
    generator = np.random.default_rng(0)
    source = MemoryTensors(
        {"x": generator.integers(0, 17, (30, 8, 8)), "y": generator.integers(0, 2, 30)}
    )
    data = {"form": "tensors", "assets": ["a"], "inputs": "x", "labels": "y", "classes": [0, 1]}
    recipe = make_recipe(**PRIVATE | {"data": data | {"scale": 0.0625}, "model": model})
    result = privately(recipe, {"a": source}, clipping=clipping)
    assert result.events == privacy_events(plan(), recipe)


def test_embeddings(make_recipe: MakeRecipe) -> None:
    generator = np.random.default_rng(0)
    words, labels = generator.integers(0, 9, (40, 5)), generator.integers(0, 2, 40)
    recipe = make_recipe(
        **PRIVATE
        | {
            "data": {
                "form": "tensors",
                "assets": ["a"],
                "inputs": "words",
                "labels": "labels",
                "classes": [0, 1],
                "integers": True,
            },
            "model": {
                "type": "graph",
                "nodes": [
                    {"op": "embedding", "name": "e", "num_embeddings": 9, "embedding_dim": 3},
                    {"op": "mean", "name": "m", "axis": 1},
                    {"op": "linear", "name": "head", "out_features": 2},
                ],
            },
        }
    )
    result = privately(recipe, {"a": MemoryTensors({"words": words, "labels": labels})})
    assert result.events == privacy_events(plan(), recipe)


# --- what is drawn ------------------------------------------------------------------------


def test_the_secret_determines_every_bit(make_recipe: MakeRecipe, tables: Tables) -> None:
    recipe = make_recipe(**PRIVATE | DROPOUT)
    one = privately(recipe, tables)
    same(one, privately(recipe, tables))
    other = privately(recipe, tables, 2)
    assert bits(one) != bits(other)
    assert one.metrics["pooled"]["confusion"] != other.metrics["pooled"]["confusion"]
    assert one.events == other.events


def test_other_rows_never_share_noise(recipe: Recipe, tables: Tables) -> None:
    """A row that is only measured moves all noise: else differences would tell what it hides."""
    dataset = load_dataset(recipe, tables, plan())
    held = split_rows(recipe, dataset)[2].holdout[0]
    columns = tables["c"].read().to_pydict()
    columns["x0"][held] += 1e-9
    one, two = privately(recipe, tables), privately(recipe, {**tables, "c": MemoryTable(columns)})
    moved = np.abs(one.model_tensors["output.weight"] - two.model_tensors["output.weight"])
    assert moved.min() > 1e-4
    assert one.metrics["pooled"]["confusion"] != two.metrics["pooled"]["confusion"]


def test_dropout_hangs_on_the_secret(make_recipe: MakeRecipe, tables: Tables) -> None:
    recipe = make_recipe(**PRIVATE | DROPOUT)
    settings = {"noise_multiplier": TINY, "sampling_probability": 1.0}
    one, two = (privately(recipe, tables, number, **settings) for number in (1, 2))
    moved = np.abs(one.model_tensors["hidden1.weight"] - two.model_tensors["hidden1.weight"])
    assert moved.max() > 100 * TINY


def trainer(
    recipe: Recipe,
    count: int,
    *,
    owners: NDArray[np.int64] | None = None,
    rows: Rows | None = None,
    **changes: Any,
) -> PrivateTrainer:
    generator = np.random.default_rng(7)
    x = torch.from_numpy(generator.standard_normal((count, 5)).astype(np.float32))
    y = torch.from_numpy(generator.integers(0, 2, count))
    model = build_model(recipe, (5,), integers=False)
    own = np.arange(count) if owners is None else owners
    return PrivateTrainer(
        recipe, plan(**changes), model, rows or Rows(x, y), own, Keys.of(secret(), b"test")
    )


def test_poisson_sampling_is_independent(recipe: Recipe) -> None:
    ours = trainer(recipe, 200, sampling_probability=0.1)
    taken = np.zeros((300, 200))
    for step in range(300):
        taken[step, ours.chosen(step)] = 1
    deviation = np.sqrt(0.09 / 60_000)
    assert abs(taken.mean() - 0.1) < 5 * deviation
    # Sizes vary as a binomial's, and neither steps nor rows know of each other.
    assert 0.75 < taken.sum(axis=1).var() / 18 < 1.3
    assert abs(np.corrcoef(taken[:-1].ravel(), taken[1:].ravel())[0, 1]) < 5 / np.sqrt(60_000)


def test_empty_batches_are_steps_of_noise(recipe: Recipe) -> None:
    ours = trainer(recipe, 4, sampling_probability=0.02)
    sizes = [len(ours.chosen(step)) for step in range(ours.total_steps)]
    assert sizes.count(0) > 50
    before = ours.model.state_dict()["output.weight"].clone()
    first = sizes.index(0)
    steps = ours.steps()
    for _ in range(first + 1):
        before = ours.model.state_dict()["output.weight"].clone()
        next(steps)
    assert not torch.equal(before, ours.model.state_dict()["output.weight"])
    ours.run()
    assert ours.spent == plan(sampling_probability=0.02).events(recipe.epochs)


@pytest.mark.parametrize(("count", "size"), [(37, 8), (37, 37), (5, 8), (16, 8), (17, 1)])
def test_a_shuffled_epoch_uses_each_row_once(
    make_recipe: MakeRecipe, count: int, size: int
) -> None:
    recipe = make_recipe(**PRIVATE | {"batch_size": size, "epochs": 3})
    ours = trainer(recipe, count, sampling="shuffle")
    batches = max(1, count // size)
    assert ours.total_steps == 3 * batches == planned_steps(recipe, ours.plan, count)
    orders = []
    for epoch in range(3):
        parts = [ours.chosen(step) for step in range(epoch * batches, (epoch + 1) * batches)]
        assert sorted(np.concatenate(parts)) == list(range(count))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        orders.append(tuple(np.concatenate(parts)))
    assert len(set(orders)) == 3
    ours.run()
    assert ours.spent == ours.plan.events(3)


def test_noise_on_counts_has_its_scale() -> None:
    counts = np.array([[50, 3], [7, 40]])
    noise = np.array(
        [noisy_counts(counts, 2.5, Keys(secret())("metrics", n)) - counts for n in range(1000)]
    )
    assert abs(noise.mean()) < 5 * 2.5 / np.sqrt(4000)
    assert abs(noise.std() / 2.5 - 1) < 5 / np.sqrt(8000)
    cells = np.corrcoef(noise.reshape(1000, 4).T) - np.eye(4)
    assert np.abs(cells).max() < 5 / np.sqrt(1000)


def test_noise_on_gradients_has_its_scale(recipe: Recipe) -> None:
    ours = trainer(recipe, 4, sampling_probability=1e-4, clipping_norm=3.0, noise_multiplier=2.0)
    assert not any(len(ours.chosen(step)) for step in range(40))
    released = []
    for _ in zip(range(40), ours.steps(), strict=False):
        gradients = [p.grad for p in ours.model.parameters()]
        released.append(torch.cat([g.ravel() for g in gradients if g is not None]).numpy())
    noise = np.array(released) * 4e-4
    assert abs(noise.std() / 6.0 - 1) < 5 / np.sqrt(2 * noise.size)


# --- nothing exact leaves -----------------------------------------------------------------


def keys_of(value: Any) -> set[str]:
    if isinstance(value, Mapping):
        return set(value) | {name for part in value.values() for name in keys_of(part)}
    if isinstance(value, list | tuple):
        return {name for part in value for name in keys_of(part)}
    return set()


class StoringSink(MemorySink):
    def __init__(self) -> None:
        super().__init__()
        self.all: list[Checkpoint] = []

    def save(self, version: int, tensors: Any, meta: Any) -> None:
        super().save(version, tensors, json.loads(json.dumps(meta, allow_nan=False)))
        assert self.newest is not None
        self.all.append(self.newest)


def test_no_exact_figure_is_kept(make_recipe: MakeRecipe, tables: Tables) -> None:
    recipe = make_recipe(**PRIVATE | {"compare_alone": True})
    sink = StoringSink()
    result = train(
        recipe,
        tables,
        privacy=Privacy(plan(), secret()),
        checkpoints=sink,
        checkpoint_every=1,
    )
    figures = {"rows", "noisy", "noise_std", "accuracy", "balanced_accuracy", "confusion", "epochs"}
    for measured in (result.metrics["pooled"], *result.metrics["alone"].values()):
        assert set(measured) == figures
        assert 0 <= measured["accuracy"] <= 1
        assert 0 <= measured["balanced_accuracy"] <= 1
        assert all(count != round(count) for row in measured["confusion"] for count in row)
    for state in sink.all:
        assert not {"losses", "loss_sum", "best_loss", "training_loss"} & keys_of(state.meta)
        trained = state.meta["trainer"]
        assert trained is None or set(trained) == {"step", "record"}
        assert {name.split("/")[0] for name in state.tensors} <= {"pooled", "trainer"}
    metadata = result.metadata["preprocessing"]
    assert not {"inputs", "target"} & set(metadata)
    assert metadata["ranges"] == [RANGES[f"x{n}"] for n in range(5)]


def test_a_class_that_occurs_nowhere_is_not_told(recipe: Recipe, tables: Tables) -> None:
    sources = {
        alias: MemoryTable({**table.read().to_pydict(), "label": ["no"] * table.num_rows})
        for alias, table in tables.items()
    }
    with pytest.raises(DataError, match="occurs in no party"):
        train(recipe, sources)
    assert privately(recipe, sources).events


def test_the_secret_is_not_shown() -> None:
    privacy = Privacy(plan(), bytes(range(32)))
    assert repr(privacy.secret) not in repr(privacy)
    assert "root" not in repr(Keys.of(privacy.secret))
    with pytest.raises(InputError, match="secret has the wrong length"):
        Privacy(plan(), b"short")


# --- going on -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "planned"),
    [
        (
            {**DROPOUT, "optimizer": {"type": "sgd", "learning_rate": 0.5, "momentum": 0.9}},
            {"clipping": "per-layer"},
        ),
        (
            {"optimizer": {"type": "adamw"}, "compare_alone": True, "epochs": 1},
            {"sampling_probability": 0.4},
        ),
        (
            {"optimizer": {"type": "adam"}, "schedule": {"type": "cosine"}, "batch_size": 25},
            {"sampling": "shuffle"},
        ),
    ],
)
def test_resuming_from_every_step_is_bit_identical(
    make_recipe: MakeRecipe, tables: Tables, changes: dict[str, Any], planned: dict[str, Any]
) -> None:
    recipe = make_recipe(**PRIVATE | changes)
    privacy = Privacy(plan(**planned), secret())
    sink = StoringSink()
    whole = train(recipe, tables, privacy=privacy, checkpoints=sink, checkpoint_every=1)
    same(whole, train(recipe, tables, privacy=privacy))
    assert len(sink.all) > 4
    for state in sink.all:
        resumed = MemorySink()
        resumed.newest = state
        same(whole, train(recipe, tables, privacy=privacy, checkpoints=resumed))


@pytest.mark.parametrize(
    "other", [None, Privacy(plan(), secret(2)), Privacy(plan(delta=1e-6), secret())]
)
def test_a_checkpoint_of_another_secret_or_plan_is_refused(
    recipe: Recipe, tables: Tables, other: Privacy | None
) -> None:
    sink = MemorySink()
    train(recipe, tables, privacy=Privacy(plan(), secret()), checkpoints=sink)
    with pytest.raises(VerificationError, match="its privacy differs"):
        train(recipe, tables, privacy=other, checkpoints=sink)


def test_a_record_that_lacks_steps_is_refused(recipe: Recipe, tables: Tables) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(done: int, total: int) -> None:
        if done == 3:
            raise Interrupted

    sink = StoringSink()
    privacy = Privacy(plan(), secret())
    with pytest.raises(Interrupted):
        train(
            recipe,
            tables,
            privacy=privacy,
            checkpoints=sink,
            checkpoint_every=1,
            progress=interrupt,
        )
    assert sink.newest is not None
    sink.newest.meta["trainer"]["record"][0]["steps"] -= 1
    with pytest.raises(VerificationError, match="does not fit"):
        train(recipe, tables, privacy=privacy, checkpoints=sink)


# --- canaries -----------------------------------------------------------------------------


def summed(recipe: Recipe, sources: Tables, count: int, **changes: Any) -> NDArray[np.float64]:
    """The clipped sum of all training rows, as the first step of training releases it."""
    settings = {"noise_multiplier": TINY, "sampling_probability": 1.0, "metrics_noise": None}
    result = privately(recipe, sources, **settings | changes)
    model = build_model(recipe, (5,), integers=False)
    parts = [
        (parameter.detach().numpy() - result.model_tensors[name]).ravel()
        for name, parameter in model.named_parameters()
    ]
    return np.concatenate(parts).astype(np.float64) * count / 0.5


@pytest.mark.parametrize("clipping", ["flat", "per-layer"])
@pytest.mark.parametrize("model", [{"type": "logistic"}, {"type": "mlp", "hidden": [4]}])
def test_no_record_moves_the_sum_by_more_than_the_clipping_norm(
    make_recipe: MakeRecipe, tables: Tables, model: dict[str, Any], clipping: str
) -> None:
    recipe = make_recipe(
        **PRIVATE
        | {
            "data": TABLE | {"ranges": {name: RANGES[name] for name in ("x0", "x1", "x2", "x3")}},
            "model": model,
            "epochs": 1,
            "holdout": {"fraction": 0, "stratified": False},
        }
    )
    limits = {"clipping_norm": 0.5, "clipping": clipping}
    plain = summed(recipe, tables, 83, **limits)
    for row in (0, 7, 17):
        extreme = []
        for label in ("no", "yes"):
            columns = tables["c"].read().to_pydict()
            columns["x4"][row], columns["label"][row] = 1e30, label
            changed = tables | {"c": MemoryTable(columns)}  # type: ignore[operator]
            extreme.append(summed(recipe, changed, 83, **limits))
        # So extreme a record is either right beyond doubt, which gives no gradient at all, or
        # clipped: zero-out moves the sum by one norm, and replacing by two at most.
        moved = sorted(float(np.linalg.norm(plain - one)) for one in extreme)
        assert 0.01 < moved[0] < 0.5 + 20 * TINY
        assert moved[1] < 1.0 + 20 * TINY
        assert 0.4 < np.linalg.norm(extreme[0] - extreme[1]) < 0.5 + 20 * TINY


@pytest.mark.slow
def test_noise_hides_a_record_as_much_as_planned(make_recipe: MakeRecipe, tables: Tables) -> None:
    """What a release tells of one record is the Gaussian mechanism's, neither more nor less."""
    recipe = make_recipe(
        **PRIVATE
        | {
            "data": TABLE | {"ranges": {name: RANGES[name] for name in ("x0", "x1", "x2", "x3")}},
            "epochs": 1,
            "batch_size": 100,
            "holdout": {"fraction": 0, "stratified": False},
        }
    )
    found = []
    for label in ("no", "yes"):
        columns = tables["c"].read().to_pydict()
        columns["x4"][5], columns["label"][5] = 1e30, label
        sources = {**tables, "c": MemoryTable(columns)}
        sums = [
            summed(recipe, sources, 83, noise_multiplier=2.0, number=n).reshape(-1)[[4, 9]]
            for n in range(1, 201)
        ]
        # With one label the record is clipped and lies along this line; with the other it is nil.
        found.append(np.array(sums) @ [1.0, -1.0] / np.sqrt(2))
    apart = abs(found[0].mean() - found[1].mean())
    spread = np.sqrt((found[0].var() + found[1].var()) / 2)
    assert abs(spread / 2.0 - 1) < 5 / np.sqrt(2 * 400)
    assert abs(apart - 1.0) < 5 * 2.0 / np.sqrt(100)


# --- subjects -----------------------------------------------------------------------------

SUBJECTS: dict[str, Any] = {"unit": {"subject": "patient", "most_records": 2}}


def with_patients(tables: Tables, ids: Callable[[int], Any]) -> dict[str, MemoryTable]:
    out = {}
    for alias, table in tables.items():
        columns = table.read().to_pydict()
        out[alias] = MemoryTable({**columns, "patient": [ids(n) for n in range(table.num_rows)]})
    return out


@pytest.mark.parametrize("ids", [lambda n: f"p{n // 5}", lambda n: 10**12 + n // 5])
def test_subjects_are_used_up_to_their_limit(
    recipe: Recipe, tables: Tables, ids: Callable[[int], Any]
) -> None:
    result = privately(recipe, with_patients(tables, ids), **SUBJECTS)
    # 8, 5 and 4 patients of 5, 5 and up to 5 records, of whom 2, 1 and 1 are held out.
    assert result.metrics["rows"] == {
        "a": {"training": 12, "holdout": 4},
        "b": {"training": 8, "holdout": 2},
        "c": {"training": 6, "holdout": 2},
    }
    assert result.metrics["pooled"]["rows"] == 8
    assert result.metadata["features"] == [f"x{n}" for n in range(5)]
    assert result.events == privacy_events(plan(**SUBJECTS), recipe)
    assert [event.noise_multiplier for event in result.events] == [0.5, 1.0]
    names = privately(recipe, with_patients(tables, lambda n: f"q{n // 5}"), **SUBJECTS)
    assert names.events == result.events


def test_which_records_of_a_subject_are_used_is_secret(recipe: Recipe, tables: Tables) -> None:
    settings = {"noise_multiplier": TINY, "sampling_probability": 1.0, **SUBJECTS}
    sources = with_patients(tables, lambda n: n // 5)
    one, again, two = (privately(recipe, sources, number, **settings) for number in (1, 1, 2))
    same(one, again)
    moved = np.abs(one.model_tensors["output.weight"] - two.model_tensors["output.weight"])
    assert moved.max() > 20 * TINY


def test_a_subjects_records_come_together(recipe: Recipe) -> None:
    owners = np.array([0, 1, 0, 2, 2, 2, 3, 1])
    ours = trainer(recipe, 8, owners=owners, **SUBJECTS)
    sizes = set()
    for step in range(100):
        rows = ours.chosen(step)
        assert set(np.flatnonzero(np.isin(owners, owners[rows]))) == set(rows)
        sizes.add(len(set(owners[rows])))
    assert sizes >= {0, 1, 2}
    assert ours.private.sampling.population == 4


@pytest.mark.parametrize("clipping", ["flat", "per-layer"])
def test_a_subject_moves_the_sum_by_most_records_times_the_norm(
    recipe: Recipe, clipping: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owners = np.array([0, 1, 0, 2, 2, 1])
    x = torch.full((6, 5), 50.0)
    x[[1, 3], 2] = -3.0
    rows = Rows(x, torch.tensor([0, 1, 0, 1, 0, 1]))
    settings = {"clipping": clipping, "noise_multiplier": TINY, "clipping_norm": 0.5, **SUBJECTS}
    found = []
    for chosen in (np.arange(6), np.flatnonzero(owners != 0)):
        ours = trainer(recipe, 6, owners=owners, rows=rows, sampling_probability=1.0, **settings)
        monkeypatch.setattr(ours, "chosen", lambda step, chosen=chosen: chosen)
        next(ours.steps())
        gradients = [p.grad for p in ours.model.parameters()]
        found.append(torch.cat([g.ravel() for g in gradients if g is not None]).numpy() * 6)
    moved = np.linalg.norm(found[0] - found[1])
    assert 0.5 < moved < 2 * 0.5 * (1 + 1e-4)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ([1.5] * 18, "does not hold ids"),
        ([None] + ["p"] * 17, "has no value in row 0"),
        (None, "lacks the column 'patient'"),
    ],
)
def test_ids_that_are_none(
    recipe: Recipe, tables: Tables, column: list[Any] | None, message: str
) -> None:
    sources = with_patients(tables, lambda n: str(n))
    columns = tables["c"].read().to_pydict()
    sources["c"] = MemoryTable(columns if column is None else {**columns, "patient": column})
    with pytest.raises(DataError, match=message):
        privately(recipe, sources, **SUBJECTS)


def test_an_id_is_no_feature(make_recipe: MakeRecipe, tables: Tables) -> None:
    for changes, subject in (({"features": ["x0", "x1"], "ranges": None}, "x1"), ({}, "label")):
        recipe = make_recipe(**PRIVATE | {"data": TABLE | changes})
        with pytest.raises(DataError, match="is also the target or a feature"):
            privately(recipe, tables, unit={"subject": subject, "most_records": 1})


def test_subjects_of_tensors(make_recipe: MakeRecipe) -> None:
    generator = np.random.default_rng(0)
    tensors: dict[str, Any] = {
        "x": generator.standard_normal((30, 4)),
        "y": generator.integers(0, 2, 30),
        "patient": np.arange(30)[::-1, None] // 3,
    }
    data = {"form": "tensors", "assets": ["a"], "inputs": "x", "labels": "y", "classes": [0, 1]}
    recipe = make_recipe(**PRIVATE | {"data": data})
    result = privately(recipe, {"a": MemoryTensors(tensors)}, **SUBJECTS)
    assert result.metrics["rows"] == {"a": {"training": 14, "holdout": 6}}
    for wrong in (np.arange(29), np.zeros(30), np.zeros((30, 2), dtype=int)):
        with pytest.raises(DataError, match="is not one id a sample"):
            privately(recipe, {"a": MemoryTensors(tensors | {"patient": wrong})}, **SUBJECTS)
    with pytest.raises(DataError, match="is also read as data"):
        privately(recipe, {"a": MemoryTensors(tensors)}, unit={"subject": "y", "most_records": 1})


# --- refusals -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "planned", "message"),
    [
        ({"data": TABLE | {"standardize": True, "ranges": None}}, {}, "standardize makes means"),
        ({"early_stopping": {"patience": 1}}, {}, "early_stopping looks at records"),
        ({"holdout": {"fraction": 0.2}}, {}, "stratified"),
        ({"compare_alone": True}, {"metrics_noise": None}, "compare_alone"),
        ({}, {"noise_multiplier": None}, "noise_multiplier"),
        ({}, {"noise_multiplier": 1e-6}, "cannot be added exactly"),
        ({}, {"metrics_noise": 1e-6}, "cannot be added exactly"),
    ],
)
def test_recipes_that_a_plan_forbids(
    make_recipe: MakeRecipe,
    tables: Tables,
    changes: dict[str, Any],
    planned: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(DocumentError, match=message):
        privately(make_recipe(**PRIVATE | changes), tables, **planned)


OFFLOADED: dict[str, dict[str, Any]] = {
    "measured": {},
    "lowrank": {"options": {"ranks": 1}},
    "permuted": {},
}
PICTURES: dict[str, Any] = {
    "data": {
        "form": "tensors",
        "assets": ["a"],
        "inputs": "x",
        "labels": "y",
        "classes": [0, 1],
    },
    "model": {"type": "cnn", "channels": [4, 8], "hidden": [8], "dropout": 0.2},
    "optimizer": {"type": "adam", "learning_rate": 0.01},
    "epochs": 2,
    "batch_size": 16,
    "holdout": {"fraction": 0.25, "stratified": False},
}


@pytest.fixture(scope="module")
def pictures() -> dict[str, MemoryTensors]:
    random = np.random.default_rng(3)
    labels = random.integers(0, 2, 80)
    x = random.normal(size=(80, 16, 16)).astype(np.float32)
    x[labels == 1, :8] += 1.0
    return {"a": MemoryTensors({"x": x, "y": labels.astype(np.int64)})}


def lent(scheme: str, worker: type[InlineAccelerator] = InlineAccelerator) -> Offloading:
    offload: Any = TypeAdapter(OffloadPlan).validate_python(
        {"scheme": scheme, "accelerators": {"count": 2}, **OFFLOADED.get(scheme, {})}
    )
    members = [worker("one"), InlineAccelerator("two")]
    return Offloading(offload, members, dict.fromkeys(("one", "two"), "process"), secret="aa")


class FirstWeights(Offloading):
    """Under ``permuted`` a recipe's first weights follow from a secret; here, to compare, not."""

    weights_secret = None


class Doubling(InlineAccelerator):
    """Doubles sums of gradients, and gradients of inputs."""

    def call(self, operation: Operation, result: int, operands: Sequence[int]) -> None:
        super().call(operation, result, operands)
        if operation.name in {"conv_weight", "conv_input"} or operation.attributes.get(
            "transpose_a"
        ):
            self._kept[result] = self._kept[result] * 2


@pytest.mark.parametrize("clipping", ["flat", "per-layer"])
@pytest.mark.parametrize("scheme", OFFLOADED)
def test_an_offloaded_training_is_the_same_and_costs_the_same(
    make_recipe: MakeRecipe, pictures: Any, scheme: str, clipping: str
) -> None:
    recipe = make_recipe(**PICTURES)
    privacy = Privacy(plan(noise_multiplier=0.5, clipping=clipping), secret())
    expected = train(recipe, pictures, privacy=privacy, threads=1)
    offloading = lent(scheme)
    offloading.__class__ = FirstWeights
    found = train(recipe, pictures, privacy=privacy, offloading=offloading, threads=1)
    assert found.events == expected.events == privacy_events(privacy.plan, recipe)
    for name, tensor in expected.model_tensors.items():
        np.testing.assert_allclose(found.model_tensors[name], tensor, rtol=1e-3, atol=1e-4)
    told = offloading.record()
    assert told.checked == told.products > 0
    assert told.dropped == ()
    assert offloading.leakage.note.endswith(PRIVATE_NOTE)


@pytest.mark.parametrize("scheme", OFFLOADED)
def test_an_accelerator_that_doubles_gradients_is_dropped(
    make_recipe: MakeRecipe, pictures: Any, scheme: str
) -> None:
    recipe = make_recipe(**PICTURES | {"epochs": 1})
    privacy = Privacy(plan(noise_multiplier=0.5), secret())
    offloading = lent(scheme, Doubling)
    offloading.__class__ = FirstWeights
    found = train(recipe, pictures, privacy=privacy, offloading=offloading, threads=1)
    assert [one.name for one in offloading.record().dropped] == ["one"]
    expected = train(recipe, pictures, privacy=privacy, threads=1)
    for name, tensor in expected.model_tensors.items():
        np.testing.assert_allclose(found.model_tensors[name], tensor, rtol=1e-3, atol=1e-4)


def test_an_offloaded_training_goes_on_to_the_same_bits(
    make_recipe: MakeRecipe, pictures: Any
) -> None:
    """Between accelerators that compute alike, under a scheme without secrets of its own."""
    recipe = make_recipe(**PICTURES)
    privacy, sink = Privacy(plan(), secret()), MemorySink()
    expected = train(recipe, pictures, privacy=privacy, offloading=lent("lowrank"), threads=1)

    class Stopped(Exception):
        pass

    def stop(done: int, _: int) -> None:
        if done == 5:
            raise Stopped

    with pytest.raises(Stopped):
        train(
            recipe, pictures, privacy=privacy, offloading=lent("lowrank"), threads=1,
            progress=stop, checkpoints=sink, checkpoint_every=2,
        )  # fmt: skip
    found = train(
        recipe, pictures, privacy=privacy, offloading=lent("lowrank"), threads=1, checkpoints=sink
    )
    same(found, expected)
    again = train(
        recipe, pictures, privacy=privacy, offloading=lent("permuted"), threads=1, checkpoints=sink
    )
    same(again, expected)  # what ended is not computed again, whatever accelerators would answer


def test_plans_that_lose_the_bound_are_refused(recipe: Recipe, tables: Tables) -> None:
    with pytest.raises(DocumentError, match="largest numbers of a batch"):
        train(recipe, tables, privacy=Privacy(plan(), secret()), offloading=lent("masked-training"))


@pytest.mark.parametrize(
    "worse",
    [
        {"steps": 9},
        {"noise_multiplier": 0.999},
        {"sampling_probability": 0.26},
    ],
)
def test_more_spent_than_planned_releases_nothing(
    recipe: Recipe, tables: Tables, monkeypatch: pytest.MonkeyPatch, worse: dict[str, Any]
) -> None:
    (planned,) = plan().events(2)
    event = planned.model_copy(update=worse)
    monkeypatch.setattr(PrivateTrainer, "spent", property(lambda _: (event,)))
    with pytest.raises(EnclaveError, match="spent more privacy than its plan allows"):
        privately(recipe, tables)
    monkeypatch.setattr(PrivateTrainer, "spent", property(lambda _: (planned, planned)))
    with pytest.raises(EnclaveError, match="were not all alike"):
        privately(recipe, tables)


def test_fewer_steps_are_told(
    recipe: Recipe, tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    (planned,) = plan().events(2)
    fewer = planned.model_copy(update={"steps": 5})
    monkeypatch.setattr(PrivateTrainer, "spent", property(lambda _: (fewer,)))
    counted = PrivacyEvent(noise_multiplier=2.0, sampling_probability=1.0, steps=1)
    assert privately(recipe, tables).events == (fewer, counted)


@pytest.mark.parametrize(
    ("name", "changes"),
    [("Noise", {}), ("PoissonSampler", {}), ("ShuffledSampler", {"sampling": "shuffle"})],
)
def test_randomness_that_is_not_secret_releases_nothing(
    recipe: Recipe,
    tables: Tables,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    changes: dict[str, Any],
) -> None:
    original = getattr(module, name)

    def known(*values: Any, **options: Any) -> Any:
        return original(*values, **options | {"secret": False})

    monkeypatch.setattr(module, name, known)
    with pytest.raises(EnclaveError, match="randomness that is not secret"):
        privately(recipe, tables, **changes)


# --- as a whole ---------------------------------------------------------------------------

SCRIPT = """
import sys
import numpy as np
from cenacle.documents.privacy import PrivacyPlan
from cenacle.documents.recipe import Recipe
from cenacle.training import MemoryTable, train
fields = {
    "task": "classification",
    "data": {"form": "table", "assets": ["a"], "target": "y", "classes": [0, 1],
             "standardize": False, "ranges": {"x": [0, 1]}},
    "model": {"type": "mlp", "hidden": [4], "dropout": 0.5},
    "optimizer": {"type": "adam"},
    "epochs": 1,
    "holdout": {"stratified": False},
}
from cenacle.documents.recipe import GraphModel
from cenacle.training.graph import Graph
layers = [
    {"op": "conv2d", "name": "a", "out_channels": 2, "kernel_size": 3},
    {"op": "group_norm", "name": "b", "groups": 2},
    {"op": "max_pool2d", "name": "c", "kernel_size": 2},
    {"op": "adaptive_avg_pool2d", "name": "d"},
    {"op": "flatten", "name": "e"},
    {"op": "linear", "name": "f", "out_features": 2},
]
words = [
    {"op": "embedding", "name": "a", "num_embeddings": 5, "embedding_dim": 2},
    {"op": "mean", "name": "b", "axis": 1},
]
Graph(GraphModel.from_fields({"type": "graph", "nodes": layers}).nodes, (1, 8, 8))
Graph(GraphModel.from_fields({"type": "graph", "nodes": words}).nodes, (4,), integers=True)
table = MemoryTable({"x": np.linspace(0, 1, 20), "y": [0, 1] * 10})
assert train(Recipe.from_fields(fields), {"a": table}).metrics
print(*sys.modules)
from cenacle.training import Privacy
plan = PrivacyPlan(epsilon=1, delta=1e-5, clipping_norm=1, noise_multiplier=1,
                   sampling_probability=0.5, metrics_noise=1)
assert train(Recipe.from_fields(fields), {"a": table}, privacy=Privacy(plan, bytes(32))).events
print(*sys.modules)
"""


def test_the_file_has_what_prediction_needs(recipe: Recipe, tables: Tables) -> None:
    result = privately(recipe, tables)
    tensors, metadata = read_model(write_model(result.model_tensors, result.metadata))
    rows = {**tables["a"].read().to_pydict(), "x0": [99.0] * 40}
    got = predict(load_model(tensors, metadata), metadata, rows).probabilities
    x = np.array([rows[name] for name in RANGES]).T
    low, high = np.array(list(RANGES.values())).T
    scaled = 2 * (np.clip(x, low, high) - low) / (high - low) - 1
    scores = scaled @ tensors["output.weight"].T + tensors["output.bias"]
    wanted = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    assert got is not None
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


@pytest.mark.processes
def test_what_a_job_imports() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True
    )
    plain, private = (set(line.split()) for line in done.stdout.splitlines())
    assert "cenacle.training.privacy" not in plain
    assert "cenacle.training.privacy" in private
    assert not {"numba", "scipy", "dp_accounting", "torch._dynamo", "sympy"} & private


def documented(data: dict[str, Any]) -> tuple[PrivacyPlan, Recipe]:
    """The contract of the documentation, with the noise that epsilon 1 takes, on other data."""
    text = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text("utf-8")
    (block,) = re.findall(r"```\n(privacy:.*?)```", text, re.DOTALL)
    stated = parse_yaml(block)
    agreed = PrivacyPlan.from_fields(stated["privacy"] | {"noise_multiplier": 3.39})
    fields = stated["job"]["recipe"]
    return agreed, Recipe.from_fields(fields | {"data": fields["data"] | data})


def test_the_documented_contract_is_valid() -> None:
    agreed, recipe = documented({})
    check_private_recipe(agreed, recipe, metrics=False)
    assert privacy_events(agreed, recipe)[0].steps == 100
    text = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text("utf-8")
    names = {f"`{name}`" for name in PrivacyPlan.model_fields}
    assert {name for name in names if name not in text} == set()


def patients_right(number: int, hospital: str | None = None) -> tuple[float, TrainingResult]:
    """The share of the clinic's 171 patients that a model at epsilon 1 gets right."""
    names, patients = hospital_patients()
    stay, clinic = share_with_clinic(patients)
    tables = {
        alias: MemoryTable(dict(zip(names, zip(*rows, strict=True), strict=True)))
        for alias, rows in stay.items()
        if hospital in (None, alias)
    }
    data = {"assets": list(tables), "features": "all_but_target", "ranges": RANGES_OF_PATIENTS}
    agreed, recipe = documented(data)
    result = train(recipe, tables, privacy=Privacy(agreed, secret(number)))
    test = pa.table({name: [row[i] for row in clinic] for i, name in enumerate(names)})
    measured = evaluate(write_model(result.model_tensors, result.metadata), test)
    return measured["accuracy"], result


def test_breast_cancer_at_epsilon_one() -> None:
    accuracy, result = patients_right(1)
    assert accuracy >= 0.92
    assert result.events[0].steps == 100


@pytest.mark.slow
def test_breast_cancer_at_epsilon_one_for_many_secrets() -> None:
    pytest.importorskip("dp_accounting", reason="dp-accounting is not installed")
    accuracies, results = zip(*map(patients_right, range(30)), strict=True)
    assert np.mean(accuracies) >= 0.945
    assert min(accuracies) >= 0.92
    assert epsilon(results[0].events, 1e-4) <= 1.0
    for hospital in HOSPITALS:
        alone = np.mean([patients_right(number, hospital)[0] for number in range(10)])
        assert alone < np.mean(accuracies) - 0.1
