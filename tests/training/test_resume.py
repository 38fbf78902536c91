from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from numpy.typing import NDArray

from cenacle.documents.recipe import Recipe
from cenacle.errors import VerificationError
from cenacle.training import Checkpoint, MemoryTable, TrainingResult, train
from cenacle.training.checkpoint import MemorySink

MakeRecipe = Callable[..., Recipe]
Tables = dict[str, MemoryTable]


class Interrupted(Exception):
    pass


class StoringSink(MemorySink):
    """Also proves that a state survives safetensors and JSON, and keeps every version."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[Checkpoint] = []

    def save(
        self, version: int, tensors: Mapping[str, NDArray[Any]], meta: Mapping[str, Any]
    ) -> None:
        data = safetensors.numpy.save(dict(tensors))
        stored = safetensors.numpy.load(data)
        super().save(version, stored, json.loads(json.dumps(meta, allow_nan=False)))
        assert self.newest is not None
        self.all.append(self.newest)


def same(one: TrainingResult, two: TrainingResult) -> None:
    assert one.model_tensors.keys() == two.model_tensors.keys()
    for name, array in one.model_tensors.items():
        assert array.tobytes() == two.model_tensors[name].tobytes()
    assert one.metrics == two.metrics
    assert one.metadata == two.metadata


FULL: dict[str, Any] = {
    # 64 training rows, batches of 16 with momentum, dropout, batch norm and a schedule.
    "model": {
        "type": "graph",
        "nodes": [
            {"op": "linear", "name": "a", "out_features": 6},
            {"op": "batch_norm", "name": "norm"},
            {"op": "relu", "name": "r"},
            {"op": "dropout", "name": "d", "p": 0.3},
            {"op": "linear", "name": "b", "out_features": 6},
            {"op": "add", "name": "sum", "inputs": ["b", "a"]},
            {"op": "linear", "name": "head", "out_features": 2},
        ],
    },
    "schedule": {"type": "cosine", "warmup_epochs": 1},
    "epochs": 3,
    "compare_alone": True,
    "early_stopping": {"patience": 2, "validation_fraction": 0.2},
}


@pytest.mark.parametrize(
    ("optimizer", "every"),
    [
        ({"type": "adamw", "learning_rate": 0.01}, 1),
        ({"type": "sgd", "learning_rate": 0.05, "momentum": 0.9, "nesterov": True}, 3),
        ({"type": "sgd", "learning_rate": 0.05}, 3),
    ],
)
def test_resuming_from_every_step_is_bit_identical(
    make_recipe: MakeRecipe, tables: Tables, optimizer: dict[str, Any], every: int
) -> None:
    recipe = make_recipe(**FULL, optimizer=optimizer)
    sink = StoringSink()
    whole = train(recipe, tables, checkpoints=sink, checkpoint_every=every)
    same(whole, train(recipe, tables))
    versions = [state.version for state in sink.all]
    assert versions == list(range(1, len(versions) + 1))
    # Mid-epoch, epoch borders, between models and after the end are all among them.
    steps = [state.meta["trainer"] and state.meta["trainer"]["step"] for state in sink.all]
    assert steps.count(None) == 4
    for state in sink.all:
        resumed = MemorySink()
        resumed.newest = state
        same(whole, train(recipe, tables, checkpoints=resumed))


def test_an_interrupted_job_goes_on(make_recipe: MakeRecipe, tables: Tables) -> None:
    recipe = make_recipe(**FULL)
    whole = train(recipe, tables)
    sink = StoringSink()
    calls = 0

    def interrupt(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls % 5 == 0:
            raise Interrupted

    interruptions = 0
    while True:
        try:
            result = train(recipe, tables, progress=interrupt, checkpoints=sink, checkpoint_every=2)
            break
        except Interrupted:
            interruptions += 1
            assert interruptions < 100
    assert interruptions > 3
    same(whole, result)


def test_progress_rises_to_the_total(make_recipe: MakeRecipe, tables: Tables) -> None:
    recipe = make_recipe(**FULL)
    calls: list[tuple[int, int]] = []
    sink = MemorySink()
    train(recipe, tables, progress=lambda *call: calls.append(call), checkpoints=sink)
    assert len({total for _, total in calls}) == 1
    done = [step for step, _ in calls]
    assert done == sorted(set(done))
    assert calls[-1][0] == calls[-1][1]
    again: list[tuple[int, int]] = []
    train(recipe, tables, progress=lambda *call: again.append(call), checkpoints=sink)
    assert again == [calls[-1]]


@pytest.mark.parametrize("field", ["recipe", "data", "version", "format"])
def test_a_checkpoint_of_another_job_is_refused(
    make_recipe: MakeRecipe, tables: Tables, field: str
) -> None:
    sink = MemorySink()
    train(make_recipe(), tables, checkpoints=sink)
    assert sink.newest is not None
    sink.newest = replace(sink.newest, meta={**sink.newest.meta, field: "other"})
    with pytest.raises(VerificationError, match=f"its {field} differs"):
        train(make_recipe(), tables, checkpoints=sink)


def test_other_rows_or_another_recipe_are_noticed(make_recipe: MakeRecipe, tables: Tables) -> None:
    sink = MemorySink()
    train(make_recipe(), tables, checkpoints=sink)
    with pytest.raises(VerificationError, match="its recipe differs"):
        train(make_recipe(epochs=4), tables, checkpoints=sink)
    rows = tables["c"].read()
    with pytest.raises(VerificationError, match="its data differs"):
        train(make_recipe(), tables | {"c": MemoryTable(rows.slice(1))}, checkpoints=sink)


@pytest.mark.parametrize(
    "change", [{"stage": 7}, {"stage": -1}, {"stage": "1"}, {"results": []}, {"stage": None}]
)
def test_a_checkpoint_that_contradicts_itself_is_refused(
    make_recipe: MakeRecipe, tables: Tables, change: dict[str, Any]
) -> None:
    sink = MemorySink()
    train(make_recipe(), tables, checkpoints=sink)
    assert sink.newest is not None
    sink.newest = replace(sink.newest, meta={**sink.newest.meta, **change})
    with pytest.raises(VerificationError, match="contradicts itself"):
        train(make_recipe(), tables, checkpoints=sink)


def test_memory_sink_refuses_older_versions() -> None:
    sink = MemorySink()
    sink.save(2, {"x": np.zeros(2)}, {})
    for version in (1, 2):
        with pytest.raises(VerificationError, match="would replace a newer one"):
            sink.save(version, {}, {})


def test_a_full_disk_ends_training_and_loses_nothing(
    make_recipe: MakeRecipe, tables: Tables
) -> None:
    class Full(StoringSink):
        def save(self, version: int, tensors: Any, meta: Any) -> None:
            if version == 3:
                raise OSError(28, "No space left on device")
            super().save(version, tensors, meta)

    recipe = make_recipe(**FULL)
    full = Full()
    with pytest.raises(OSError, match="No space"):
        train(recipe, tables, checkpoints=full, checkpoint_every=1)
    sink = MemorySink()
    sink.newest = full.newest
    same(train(recipe, tables), train(recipe, tables, checkpoints=sink))


SCRIPT = """
import hashlib, json, sys
import numpy as np, torch
from cenacle.documents.recipe import Recipe
from cenacle.training import MemoryTable, train

torch.manual_seed(int(sys.argv[2]))
np.random.seed(int(sys.argv[2]))
recipe = Recipe.from_fields(json.loads(open(sys.argv[1]).read()))
generator = np.random.Generator(np.random.Philox(key=1))
tables = {}
for alias, rows in (("a", 30), ("b", 20), ("c", 10)):
    x = generator.standard_normal((rows, 3))
    label = np.where(x[:, 0] > 0, "yes", "no").tolist()
    tables[alias] = MemoryTable({"x": x[:, 0], "y": x[:, 1], "z": x[:, 2], "label": label})
result = train(recipe, tables, threads=1)
state = hashlib.sha256()
for name, array in sorted(result.model_tensors.items()):
    state.update(name.encode() + array.tobytes())
sys.stdout.write(state.hexdigest() + json.dumps(result.metrics, sort_keys=True))
"""


@pytest.mark.slow
@pytest.mark.processes
def test_processes_agree_whatever_the_global_generators(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    path = tmp_path / "recipe.json"
    path.write_bytes(make_recipe(**FULL).canonical_bytes())
    outputs = [
        subprocess.run(
            [sys.executable, "-c", SCRIPT, str(path), seed],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) > 64


def test_another_seed_gives_another_model(make_recipe: MakeRecipe, tables: Tables) -> None:
    one, two = train(make_recipe(), tables), train(make_recipe(seed=6), tables)
    assert (
        one.model_tensors["output.weight"].tobytes() != two.model_tensors["output.weight"].tobytes()
    )
