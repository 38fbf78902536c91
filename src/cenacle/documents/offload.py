"""The offload plan of a contract: under which scheme algebra leaves the enclave, and to what.

Every option is bounded here and made into a scheme in the enclave; importing this module does
not import torch.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import Field, StringConstraints, model_validator

from cenacle.documents.base import Frozen

__all__ = [
    "PUBLIC_BASE",
    "AcceleratorKind",
    "Accelerators",
    "EnclavePlan",
    "LowRankNoise",
    "LowRankOptions",
    "LowRankPlan",
    "MaskedOptions",
    "MaskedPlan",
    "MaskedTrainingOptions",
    "MaskedTrainingPlan",
    "MeasuredPlan",
    "OffloadPlan",
    "PermutedOptions",
    "PermutedPlan",
]

PUBLIC_BASE: Final = "permuted-public-base"
"""What terms must allow for ``permuted`` over weights that others may know."""

AcceleratorKind = Literal["process", "ray", "cuda"]
Rank = Annotated[int, Field(ge=1, le=1024)]
LayerName = Annotated[str, StringConstraints(min_length=1, max_length=200)]


class Accelerators(Frozen):
    """The workers that the algebra goes to. None of them is trusted.

    Attributes:
        count: how many the launcher must start.
        kinds: of which kinds they may be: a ``process`` of the launcher's machine, one with a
            ``cuda`` device, or workers of a ``ray`` cluster.
    """

    count: Annotated[int, Field(ge=1, le=64)] = 1
    kinds: Annotated[tuple[AcceleratorKind, ...], Field(min_length=1, max_length=3)] = ("process",)

    @model_validator(mode="after")
    def _kinds_differ(self) -> Accelerators:
        if len(set(self.kinds)) != len(self.kinds):
            raise ValueError("a kind of accelerator is named twice")
        return self


class EnclavePlan(Frozen):
    """Nothing leaves the enclave."""

    scheme: Literal["enclave"] = "enclave"


class _Plan(Frozen):
    accelerators: Accelerators = Accelerators()

    def scheme_options(self) -> dict[str, Any]:
        """Arguments of the scheme, by name."""
        return {}


class MeasuredPlan(_Plan):
    """No blinding: the accelerators' host is trusted because its software was measured."""

    scheme: Literal["measured"]


class _CheckedPlan(_Plan):
    """Attributes:
    check: whether the enclave verifies what workers answer (Freivalds 1977).
    """

    check: bool = True


class LowRankNoise(Frozen):
    """Each residual is clipped to a Frobenius norm of ``clip``, and Gaussian noise makes one
    release of it (epsilon, delta)-private."""

    epsilon: Annotated[float, Field(gt=0.0, le=1e6)]
    delta: Annotated[float, Field(gt=0.0, lt=1.0)]
    clip: Annotated[float, Field(gt=0.0, le=1e6)]


class LowRankOptions(Frozen):
    """Of ``lowrank``; see :class:`cenacle.offload.schemes.lowrank.LowRank`.

    Attributes:
        ranks: ``doubling`` with each layer up to ``max_rank``; or one number for all layers;
            or numbers by layer name, where layers that are not named stay in the enclave.
        rounds: of subspace iteration for each split.
        guard: the largest share of a layer's hidden part that linear equations may determine.
    """

    ranks: Literal["doubling"] | Rank | Annotated[dict[LayerName, Rank], Field(max_length=1024)] = (
        "doubling"
    )
    max_rank: Rank = 32
    rounds: Annotated[int, Field(ge=1, le=16)] = 2
    guard: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    noise: LowRankNoise | None = None


class LowRankPlan(_CheckedPlan):
    """A low-rank part of every activation stays; residuals, weights and gradients leave."""

    scheme: Literal["lowrank"]
    options: LowRankOptions = LowRankOptions()

    def scheme_options(self) -> dict[str, Any]:
        noise = self.options.noise
        return {
            **self.options.model_dump(exclude={"noise"}),
            "noise": noise and (noise.epsilon, noise.delta, noise.clip),
        }


class PermutedOptions(Frozen):
    """Of ``permuted``.

    Attributes:
        rekey: new permutations of a weight's features after so many uses of it.
        coefficients: ``signs``: +1 and -1; ``general``: powers of two with signs.
    """

    rekey: Annotated[int, Field(ge=1, le=1_000_000)] = 100
    coefficients: Literal["signs", "general"] = "signs"


class PermutedPlan(_CheckedPlan):
    """Rows and features are permuted and signed: obfuscation, never encryption.

    Attributes:
        allow_public_base: train from initial weights all the same. Whoever knows weights that
            these were made from recovers both permutations completely. Without initial
            weights the first ones are drawn from a secret of the run, not from the recipe's
            seed, which everyone knows.
        resident: accelerators keep large weights and carry out the optimizer's steps for them;
            they learn its settings. With ``check`` only SGD, whose steps can be checked.
    """

    scheme: Literal["permuted"]
    options: PermutedOptions = PermutedOptions()
    allow_public_base: bool = False
    resident: bool = False

    @model_validator(mode="after")
    def _weights_can_stay(self) -> PermutedPlan:
        if self.resident and self.options.coefficients != "signs":
            raise ValueError(
                "resident weights need coefficients signs: an optimizer's step does not commute "
                "with general ones"
            )
        return self

    def scheme_options(self) -> dict[str, Any]:
        return {
            **self.options.model_dump(),
            "public_base": self.allow_public_base,
            "allow_public_base": self.allow_public_base,
        }


class MaskedOptions(Frozen):
    """Of ``masked``."""


class MaskedPlan(_CheckedPlan):
    """Inference with single-use masks: inputs are hidden perfectly, weights are public."""

    scheme: Literal["masked"]
    options: MaskedOptions = MaskedOptions()

    def scheme_options(self) -> dict[str, Any]:
        return self.options.model_dump()


class MaskedTrainingOptions(Frozen):
    """Of ``masked-training``."""


class MaskedTrainingPlan(_CheckedPlan):
    """Training with two workers who do not collude: each sees only random values."""

    scheme: Literal["masked-training"]
    options: MaskedTrainingOptions = MaskedTrainingOptions()

    @model_validator(mode="after")
    def _two(self) -> MaskedTrainingPlan:
        if self.accelerators.count != 2:
            raise ValueError("masked-training needs two accelerators, of operators who differ")
        return self

    def scheme_options(self) -> dict[str, Any]:
        return self.options.model_dump()


OffloadPlan = Annotated[
    EnclavePlan | MeasuredPlan | LowRankPlan | PermutedPlan | MaskedPlan | MaskedTrainingPlan,
    Field(discriminator="scheme"),
]
