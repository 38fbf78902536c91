"""A recipe from start to end: load, split, train pooled and alone, measure, describe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cenacle.documents.recipe import GraphModel, Recipe, TensorData
from cenacle.errors import DataError, VerificationError
from cenacle.training import checkpoint as checkpointing
from cenacle.training._torch import torch
from cenacle.training.checkpoint import CheckpointSink, Tensors
from cenacle.training.data import Dataset, load_dataset
from cenacle.training.front import FrontUse
from cenacle.training.loop import Loop, Rows, reproducible
from cenacle.training.method import Chosen, Method, OrdinaryMethod, Stage
from cenacle.training.model_file import ModelMetadata
from cenacle.training.models import build_model, model_shape, model_tensors
from cenacle.training.preprocessing import Preprocessing
from cenacle.training.sources import Source, TensorSource
from cenacle.training.split import split_rows

if TYPE_CHECKING:
    from cenacle.documents.privacy import PrivacyEvent
    from cenacle.training.front import FrontGraph
    from cenacle.training.offloading import Offloading
    from cenacle.training.private import Privacy

__all__ = ["Progress", "TrainingResult", "train"]

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class TrainingResult:
    """What training leaves.

    Attributes:
        model_tensors: the pooled model's parameters and buffers by name.
        metadata: what rebuilds and feeds it (:class:`ModelMetadata` as JSON values).
        metrics: JSON values: ``measured_on`` (holdout or training), ``pooled``, ``alone`` by
            alias, ``rows`` by alias (training, holdout), ``epochs`` and ``loss`` run. Under a
            privacy plan from noisy counts alone, and without a loss.
        description: one line for people.
        events: what was spent under a privacy plan: training, then metrics.
    """

    model_tensors: Tensors
    metadata: dict[str, Any]
    metrics: dict[str, Any]
    description: str
    events: tuple[PrivacyEvent, ...] = ()


def train(
    recipe: Recipe,
    sources: Mapping[str, Source],
    *,
    progress: Progress | None = None,
    checkpoints: CheckpointSink | None = None,
    checkpoint_every: int = 0,
    threads: int | None = None,
    offloading: Offloading | None = None,
    privacy: Privacy | None = None,
    front: FrontGraph | None = None,
) -> TrainingResult:
    """Run a recipe on opened assets.

    If ``checkpoints`` holds a state of this very job, training goes on from there and ends
    with the same weights, bit for bit, as if it had never stopped; with ``offloading`` only
    if :attr:`~cenacle.training.offloading.Offloading.reproducible`.

    Args:
        sources: opened assets by alias.
        progress: called with (steps done, steps in all); may raise to interrupt.
        checkpoints: where states go; one is saved after each model.
        checkpoint_every: also after so many steps; 0: no more.
        threads: of torch; None leaves them as they are.
        offloading: where the models' linear algebra goes; None: nowhere.
        privacy: what bounds what the result tells of single records; None: nothing does.
        front: runs the recipe's front, if it has one. Samples go through it once, before
            training; under a privacy plan one at a time.

    Raises:
        DataError: the data does not fit the recipe.
        DocumentError: the model does not fit the data, or the recipe or the offload plan the
            privacy plan.
        EnclaveError: training diverged, or spent more privacy than planned.
        VerificationError: the checkpoint belongs to another job.
    """
    with reproducible(threads):
        job = _Job(
            recipe, sources, progress, checkpoints, checkpoint_every, offloading, privacy, front
        )
        return job.run()


class _Job:
    def __init__(
        self,
        recipe: Recipe,
        sources: Mapping[str, Source],
        progress: Progress | None,
        sink: CheckpointSink | None,
        every: int,
        offloading: Offloading | None,
        privacy: Privacy | None,
        front: FrontGraph | None,
    ) -> None:
        self.recipe = recipe
        self.offloading = offloading
        dataset = load_dataset(recipe, sources, privacy.plan if privacy else None, front)
        self.data_digest = dataset.digest if sink is not None or privacy is not None else ""
        self.method = self._method(dataset, privacy)
        self.dataset = self.method.dataset
        self.initial = _initial_weights(recipe, sources)
        self.splits = split_rows(recipe, self.dataset)
        self.shape = model_shape(recipe, self.dataset.parties[0].inputs.shape[1:])
        self.stages = self._plan()
        self.progress = progress
        self.sink = sink
        self.every = every
        self.version = 0
        self.stage = 0
        self.results: list[dict[str, Any]] = []
        self.pooled: Tensors = {}

    def _method(self, dataset: Dataset, privacy: Privacy | None) -> Method:
        if privacy is None:
            return OrdinaryMethod(self.recipe, dataset)
        if self.offloading is not None:
            self.offloading.keep_private()
        from cenacle.training.private import PrivateMethod  # noqa: PLC0415 - for such jobs alone

        return PrivateMethod(self.recipe, privacy, dataset, self.data_digest)

    # --- planning ------------------------------------------------------------------------

    def _plan(self) -> tuple[Stage, ...]:
        nothing = np.empty(0, dtype=np.int64)
        aliases: list[str | None] = [None]
        if self.recipe.compare_alone:
            aliases += [party.alias for party in self.dataset.parties]
        stages = []
        for number, alias in enumerate(aliases):
            training = tuple(
                split.training if alias in (None, party.alias) else nothing
                for party, split in zip(self.dataset.parties, self.splits, strict=True)
            )
            learnt, _ = self.method.divide(training)
            steps = self.method.steps(sum(len(rows) for rows in learnt))
            stages.append(Stage(number, alias, training, steps))
        return tuple(stages)

    # --- running -------------------------------------------------------------------------

    def run(self) -> TrainingResult:
        state = self._resume()
        if self.stage == len(self.stages) and self.progress is not None:
            total = sum(stage.steps for stage in self.stages)
            self.progress(total, total)
        for index in range(self.stage, len(self.stages)):
            self.stage = index
            self._run_stage(self.stages[index], state)
            state = None
        self.stage = len(self.stages)
        return self._result()

    def _run_stage(self, stage: Stage, state: tuple[Tensors, Mapping[str, Any]] | None) -> None:
        loop, preprocessing = self._prepare(stage)
        if state is not None:
            loop.restore(*state)
        before = sum(earlier.steps for earlier in self.stages[: self.stage])
        total = sum(each.steps for each in self.stages)

        def after_step() -> None:
            if self.sink is not None and self.every and loop.step % self.every == 0:
                self._save(loop)
            if self.progress is not None:
                self.progress(before + loop.step, total)

        outside: AbstractContextManager[object] = nullcontext()
        if self.offloading:
            outside = self.offloading.session(loop.model, loop.optimizer)
        with outside:
            loop.run(after_step)
            self.results.append(self._measure(stage, loop, preprocessing))
        if stage.alias is None:
            self.pooled = model_tensors(loop.model)
            self.results[0]["preprocessing"] = preprocessing.to_fields()
        if self.sink is not None:
            self.stage += 1
            self._save(None)
        if self.progress is not None and loop.step < stage.steps:
            self.progress(before + stage.steps, total)

    def _prepare(self, stage: Stage) -> tuple[Loop, Preprocessing]:
        learnt, held = self.method.divide(stage.training)
        inputs, targets = self._gather(learnt)
        preprocessing = Preprocessing.fit(
            self.recipe, self.shape, inputs, targets, self.dataset.features
        )
        model = build_model(
            self.recipe,
            self.shape,
            integers=preprocessing.integers,
            initial=self.initial,
            secret=self.offloading.weights_secret if self.offloading else None,
        )
        rows = self._rows(inputs, targets, preprocessing)
        if preprocessing.integers:
            for party in self.dataset.parties:
                model.check_integers(party.inputs)
        watched = self._rows(*self._gather(held), preprocessing) if held is not None else None
        return self.method.loop(stage, model, learnt, rows, watched), preprocessing

    def _gather(self, chosen: Chosen) -> tuple[NDArray[Any], NDArray[Any]]:
        pairs = list(zip(self.dataset.parties, chosen, strict=True))
        return (
            np.concatenate([party.inputs[rows] for party, rows in pairs]),
            np.concatenate([party.targets[rows] for party, rows in pairs]),
        )

    def _rows(
        self, inputs: NDArray[Any], targets: NDArray[Any], preprocessing: Preprocessing
    ) -> Rows:
        if self.recipe.task == "regression":
            targets = preprocessing.apply_target(targets)
        return Rows(torch.from_numpy(preprocessing.apply(inputs)), torch.from_numpy(targets))

    def _measure(self, stage: Stage, loop: Loop, preprocessing: Preprocessing) -> dict[str, Any]:
        """Every model is measured on the same rows: the pooled holdout, or all training rows."""
        chosen = tuple(
            split.holdout if self.recipe.holdout.fraction > 0 else split.training
            for split in self.splits
        )
        return self.method.measure(stage, loop, preprocessing, *self._gather(chosen))

    # --- checkpoints ---------------------------------------------------------------------

    def _save(self, loop: Loop | None) -> None:
        """``loop`` None: between two models."""
        assert self.sink is not None
        tensors: Tensors = {f"pooled/{name}": array for name, array in self.pooled.items()}
        meta: dict[str, Any] = {
            "format": 1,
            "version": self.version + 1,
            "recipe": self.recipe.digest,
            "data": self.data_digest,
            "privacy": self.method.mark,
            "stage": self.stage,
            "results": self.results,
            "trainer": None,
        }
        if loop is not None:
            state, meta["trainer"] = loop.state()
            tensors |= {f"trainer/{name}": array for name, array in state.items()}
        self.sink.save(self.version + 1, tensors, meta)
        self.version += 1

    def _resume(self) -> tuple[Tensors, Mapping[str, Any]] | None:
        newest = self.sink.load() if self.sink is not None else None
        if newest is None:
            return None
        checkpointing.check(
            newest, recipe=self.recipe.digest, data=self.data_digest, privacy=self.method.mark
        )
        meta = newest.meta
        results, trainer = meta.get("results"), meta.get("trainer")
        if (
            not isinstance(results, list)
            or meta.get("stage") not in range(len(self.stages) + 1)
            or len(results) != meta["stage"]
        ):
            raise VerificationError("a checkpoint contradicts itself", found="stage and results")
        self.version = newest.version
        self.stage = meta["stage"]
        self.results = list(results)
        parts: dict[str, Tensors] = {"pooled": {}, "trainer": {}}
        for name, array in newest.tensors.items():
            part, _, rest = name.partition("/")
            parts.setdefault(part, {})[rest] = array
        self.pooled = parts["pooled"]
        return None if trainer is None else (parts["trainer"], trainer)

    # --- result --------------------------------------------------------------------------

    def _result(self) -> TrainingResult:
        data = self.recipe.data
        preprocessing = Preprocessing.from_fields(self.results[0]["preprocessing"])
        model = build_model(self.recipe, self.shape, integers=preprocessing.integers)
        metadata = ModelMetadata(
            task=self.recipe.task,
            features=self.dataset.features,
            target=data.labels if isinstance(data, TensorData) else data.target,
            classes=data.classes,
            front=FrontUse.of(self.recipe),
            preprocessing=preprocessing,
            nodes=model.nodes,
            recipe=self.recipe.digest,
            torch=str(torch.__version__),
            threads=torch.get_num_threads(),
        )
        on_holdout = self.recipe.holdout.fraction > 0
        measured = [result["metrics"] for result in self.results]
        metrics = {
            "task": self.recipe.task,
            "measured_on": "holdout" if on_holdout else "training",
            "pooled": measured[0],
            "alone": {
                str(stage.alias): values
                for stage, values in zip(self.stages[1:], measured[1:], strict=True)
            },
            "rows": {
                party.alias: {"training": len(split.training), "holdout": len(split.holdout)}
                for party, split in zip(self.dataset.parties, self.splits, strict=True)
            },
        }
        rows = sum(len(split.training) for split in self.splits)
        description = (
            f"{self.recipe.model.type} {self.recipe.task} with {model.count_parameters()} "
            f"parameters, trained on {rows} rows of {len(self.splits)} parties "
            f"in {measured[0]['epochs']} epochs"
        )
        return TrainingResult(
            self.pooled,
            metadata.to_fields(),
            metrics,
            description,
            self.method.events(self.results),
        )


def _initial_weights(
    recipe: Recipe, sources: Mapping[str, Source]
) -> dict[str, NDArray[Any]] | None:
    if not isinstance(recipe.model, GraphModel) or recipe.model.initial_weights is None:
        return None
    alias = recipe.model.initial_weights
    source = sources.get(alias)
    if not isinstance(source, TensorSource):
        raise DataError(
            f"the initial weights {alias!r} are not an asset of tensors of this job",
            remedy="seal them as tensors and name the asset in the contract",
        )
    return {name: np.asarray(source.read(name)) for name in source.names}
