"""Training under an offload plan: the same results, an honest account, workers that fail."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter

pytest.importorskip("torch", reason="training needs torch (pip: cenacle[train])")

import torch

from cenacle.accelerators import InlineAccelerator
from cenacle.accelerators.protocol import Pending
from cenacle.documents.offload import OffloadPlan
from cenacle.documents.recipe import Recipe
from cenacle.errors import AcceleratorError
from cenacle.offload.planned import planned_leakage
from cenacle.training import MemoryTensors, Offloading, TrainingResult, train
from cenacle.training.checkpoint import MemorySink

_PLAN: TypeAdapter[Any] = TypeAdapter(OffloadPlan)
NAMES = ("one", "two")


def _plan(scheme: str, **fields: Any) -> Any:
    return _PLAN.validate_python(
        {"scheme": scheme, "accelerators": {"count": 2, "kinds": ("process",)}, **fields}
    )


def _recipe(**fields: Any) -> Recipe:
    return Recipe.from_fields(
        {
            "task": "classification",
            "data": {
                "form": "tensors",
                "assets": ["a", "b"],
                "inputs": "x",
                "labels": "y",
                "classes": [0, 1],
            },
            "model": {"type": "cnn", "channels": [8], "hidden": [16]},
            "optimizer": {"type": "adam", "learning_rate": 0.01},
            "epochs": 2,
            "batch_size": 32,
            **fields,
        }
    )


@pytest.fixture(scope="module")
def sources() -> dict[str, MemoryTensors]:
    """Pictures of noise whose brighter half tells the class."""
    random = np.random.default_rng(3)
    made = {}
    for alias in ("a", "b"):
        labels = random.integers(0, 2, 80)
        pictures = random.normal(size=(80, 8, 8)).astype(np.float32)
        pictures[labels == 1, :4] += 1.0
        made[alias] = MemoryTensors({"x": pictures, "y": labels.astype(np.int64)})
    return made


class Failing(InlineAccelerator):
    """Works for a while, then lies or breaks."""

    def __init__(self, name: str, after: int, *, lie: bool) -> None:
        super().__init__(name)
        self.left = after
        self.lie = lie
        self.closed = 0

    def get(self, handle: int) -> Pending:
        self.left -= 1
        if self.left < 0 and not self.lie:
            raise AcceleratorError(f"accelerator {self.name} broke")
        if self.left < 0:
            self._kept[handle] = self._kept[handle] * 1.5 + 1.0
        return super().get(handle)

    def put(self, handle: int, value: torch.Tensor) -> None:
        if self.closed:
            raise AcceleratorError(f"accelerator {self.name} is gone")
        super().put(handle, value)

    def close(self) -> None:
        self.closed += 1
        super().close()


@pytest.fixture
def lend() -> Iterator[Any]:
    """Makes an Offloading; all of them are closed at the end."""
    made: list[Offloading] = []

    def build(
        plan: Any, accelerators: Sequence[InlineAccelerator] | None = None, secret: str = "aa"
    ) -> Offloading:
        members = accelerators or [InlineAccelerator(name) for name in NAMES]
        kinds = {one.name: "process" for one in members}
        made.append(Offloading(plan, members, kinds, secret=secret))
        return made[-1]

    yield build
    for one in made:
        one.close()


def _same(a: TrainingResult, b: TrainingResult) -> bool:
    return a.model_tensors.keys() == b.model_tensors.keys() and all(
        np.array_equal(a.model_tensors[name], b.model_tensors[name]) for name in a.model_tensors
    )


def test_two_models_are_trained_on_the_same_workers(sources: Any, lend: Any) -> None:
    recipe = _recipe(compare_alone=True)
    offloading = lend(_plan("measured"))
    found = train(recipe, sources, offloading=offloading, threads=1)
    plain = train(recipe, sources, threads=1)
    for name, tensor in plain.model_tensors.items():
        np.testing.assert_allclose(found.model_tensors[name], tensor, atol=2e-3)
    assert set(found.metrics["alone"]) == {"a", "b"}
    told = offloading.record()
    assert told.checked == 0
    assert told.dropped == ()
    assert min(told.products, told.bytes_sent, told.bytes_received) > 0
    assert [one.name for one in told.accelerators] == list(NAMES)
    assert all(not one._kept for one in offloading.accelerators)  # nothing is left there


@pytest.mark.parametrize("scheme", ["lowrank", "permuted"])
def test_every_result_of_a_blinding_scheme_is_checked(scheme: str, sources: Any, lend: Any) -> None:
    offloading = lend(_plan(scheme))
    train(_recipe(), sources, offloading=offloading, threads=1)
    told = offloading.record()
    assert told.checked == told.products > 0
    assert offloading.leakage.scheme == scheme


def test_whoever_fails_under_one_model_stays_lost_under_the_next(sources: Any, lend: Any) -> None:
    recipe = _recipe(compare_alone=True)
    expected = train(recipe, sources, offloading=lend(_plan("measured")), threads=1)
    broken = Failing("two", 10, lie=False)
    offloading = lend(_plan("measured"), [InlineAccelerator("one"), broken])
    found = train(recipe, sources, offloading=offloading, threads=1)
    assert _same(found, expected)
    (dropped,) = offloading.record().dropped
    assert dropped.name == "two"
    assert "broke" in dropped.reason
    assert broken.left == -1  # and was never asked again


def test_a_liar_is_named_and_its_results_do_not_count(sources: Any, lend: Any) -> None:
    expected = train(_recipe(), sources, offloading=lend(_plan("lowrank")), threads=1)
    liar = Failing("one", 7, lie=True)
    offloading = lend(_plan("lowrank"), [liar, InlineAccelerator("two")])
    found = train(_recipe(), sources, offloading=offloading, threads=1)
    assert [one.name for one in offloading.record().dropped] == ["one"]
    assert _same(found, expected)


def test_without_checks_a_liar_is_not_found_out(sources: Any, lend: Any) -> None:
    """What ``check: false`` means."""
    liar = Failing("one", 7, lie=True)
    offloading = lend(_plan("lowrank", check=False), [liar, InlineAccelerator("two")])
    train(_recipe(epochs=1), sources, offloading=offloading, threads=1)
    told = offloading.record()
    assert told.dropped == ()
    assert told.checked == 0


def test_an_interrupted_training_resumes_bit_for_bit(sources: Any, lend: Any) -> None:
    expected = train(_recipe(), sources, offloading=lend(_plan("lowrank")), threads=1)
    sink = MemorySink()

    class Stopped(Exception):
        pass

    def stop(done: int, _: int) -> None:
        if done == 5:
            raise Stopped

    with pytest.raises(Stopped):
        train(
            _recipe(), sources, progress=stop, checkpoints=sink, checkpoint_every=2,
            offloading=lend(_plan("lowrank")), threads=1,
        )  # fmt: skip
    found = train(
        _recipe(), sources, checkpoints=sink, offloading=lend(_plan("lowrank")), threads=1
    )
    assert _same(found, expected)


OPTIMIZERS = {
    "sgd": ({"type": "sgd", "learning_rate": 0.05, "momentum": 0.9, "weight_decay": 0.01}, True),
    "adam": ({"type": "adam", "learning_rate": 0.01}, False),
    "adamw": ({"type": "adamw", "learning_rate": 0.01, "weight_decay": 0.1}, False),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_that_accelerators_keep_are_trained_all_the_same(
    name: str, sources: Any, lend: Any
) -> None:
    optimizer, check = OPTIMIZERS[name]
    recipe = _recipe(
        optimizer=optimizer,
        model={"type": "cnn", "channels": [8], "hidden": [256, 64]},
        batch_size=8,
        schedule={"type": "cosine", "warmup_epochs": 1, "final": 0.1},
    )
    expected = train(recipe, sources, offloading=lend(_plan("permuted", check=check)), threads=1)
    plan = _plan("permuted", check=check, resident=True, options={"rekey": 7})
    offloading = lend(plan)
    found = train(recipe, sources, offloading=offloading, threads=1)
    for tensor, value in expected.model_tensors.items():
        np.testing.assert_allclose(found.model_tensors[tensor], value, rtol=1e-3, atol=1e-4)
    told = offloading.record()
    assert told.dropped == ()
    assert "Workers keep large weights" in offloading.leakage.note

    sink = MemorySink()

    class Stopped(Exception):
        pass

    def stop(done: int, _: int) -> None:
        if done == 31:
            raise Stopped

    with pytest.raises(Stopped):
        train(
            recipe, sources, progress=stop, checkpoints=sink, checkpoint_every=10,
            offloading=lend(plan), threads=1,
        )  # fmt: skip
    resumed = train(recipe, sources, checkpoints=sink, offloading=lend(plan), threads=1)
    for tensor, value in expected.model_tensors.items():
        np.testing.assert_allclose(resumed.model_tensors[tensor], value, rtol=1e-3, atol=1e-4)


def test_first_weights_that_must_be_secret_depend_on_the_secret(sources: Any, lend: Any) -> None:
    """Under ``permuted`` whoever knows them has the permutations, and seeds are public."""
    recipe = _recipe(epochs=1, optimizer={"type": "sgd", "learning_rate": 1e-9})

    def first(scheme: str, secret: str) -> TrainingResult:
        offloading = lend(_plan(scheme), secret=secret)
        return train(recipe, sources, offloading=offloading, threads=1)

    def weight(result: TrainingResult) -> Any:
        return result.model_tensors["conv1.weight"]

    plain = weight(train(recipe, sources, threads=1))
    mine, again, other = (weight(first("permuted", s)) for s in ("aa", "aa", "bb"))
    np.testing.assert_allclose(mine, again, atol=1e-6)
    assert np.abs(mine - other).max() > 1e-2
    assert np.abs(mine - plain).max() > 1e-2
    np.testing.assert_allclose(weight(first("lowrank", "aa")), plain, atol=1e-6)


def test_the_record_of_permuted_over_a_public_base_says_that_nothing_is_hidden() -> None:
    honest = planned_leakage(_plan("permuted"))
    public = planned_leakage(_plan("permuted", allow_public_base=True))
    assert honest.weights == "obfuscated"
    assert (public.inputs, public.weights, public.activations, public.gradients) == (
        "plaintext",
    ) * 4
    assert "may be known to others" in public.note
    assert public.note.startswith(honest.note[:200])
