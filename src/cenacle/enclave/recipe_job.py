"""The recipe job: training that the contract declares, by the measured package itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cenacle.crypto import SecretBytes
from cenacle.documents.contract import Contract, RecipeJob
from cenacle.documents.privacy import PrivacyEvent
from cenacle.documents.recipe import Recipe
from cenacle.enclave.outputs import OutputValue
from cenacle.enclave.readers import AssetReader
from cenacle.errors import EnclaveError
from cenacle.sealing import TensorReader
from cenacle.training import CheckpointSink

if TYPE_CHECKING:
    from cenacle.cut.runtime import TailRuntime
    from cenacle.training import Offloading

__all__ = ["run_recipe"]


def run_recipe(
    contract: Contract,
    assets: Mapping[str, AssetReader],
    checkpoints: CheckpointSink,
    progress: Callable[[int, int], None],
    offloading: Offloading | None = None,
    *,
    secret: SecretBytes,
) -> tuple[dict[str, OutputValue], tuple[PrivacyEvent, ...]]:
    """Train and return the value of each of the contract's outputs, and what they cost.

    Args:
        secret: what the noise of a privacy plan is drawn from; see :meth:`Session.privacy_secret`.

    Raises:
        DataError: the data does not fit the recipe.
        EnclaveError: training diverged.
    """
    from cenacle.training import Privacy, train, write_model  # noqa: PLC0415 - torch is heavy
    from cenacle.training.sources import TableSource, TensorSource  # noqa: PLC0415

    job = contract.job
    assert isinstance(job, RecipeJob)
    sources: dict[str, TableSource | TensorSource] = {}
    for alias, reader in assets.items():
        if not isinstance(reader, (TableSource, TensorSource)):
            raise EnclaveError(
                f"asset {alias} is neither a table nor tensors", expected="what recipes read"
            )
        sources[alias] = reader
    with secret:
        privacy = None
        if contract.privacy is not None:
            privacy = Privacy(contract.privacy, bytes(secret.view()))
    with _front(job.recipe, assets) as front:
        result = train(
            job.recipe,
            sources,
            progress=progress,
            checkpoints=checkpoints,
            checkpoint_every=job.checkpoint_every,
            offloading=offloading,
            privacy=privacy,
            front=front,
        )
    values: dict[str, OutputValue] = {}
    for output in contract.outputs:
        values[output.name] = (
            write_model(result.model_tensors, result.metadata)
            if output.kind == "model"
            else result.metrics
        )
    return values, result.events


@contextmanager
def _front(recipe: Recipe, assets: Mapping[str, AssetReader]) -> Iterator[TailRuntime | None]:
    """What runs the recipe's front, from its sealed asset; None without one."""
    if recipe.front is None:
        yield None
        return
    from cenacle.cut.runtime import TailRuntime  # noqa: PLC0415 - imports ONNX Runtime

    alias = recipe.front.asset
    reader = assets[alias]
    if not isinstance(reader, TensorReader):
        raise EnclaveError(
            f"asset {alias} does not hold tensors",
            expected="a front as `cenacle cut` packs it",
        )
    runtime = TailRuntime(reader)
    try:
        yield runtime
    finally:
        runtime.close()
