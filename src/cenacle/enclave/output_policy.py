"""What of a model's scores leaves the enclave: the contract's output policy, applied.

Along the last axis of each output ``y``, which counts classes:

==========  ============================================================================
form        leaves
==========  ============================================================================
``label``   ``y.label``: the index of the greatest score
``top-k``   ``y.label``: the indices of the ``k`` greatest, from the greatest on, and
            ``y.score``: their scores
``scores``  ``y`` as it is
==========  ============================================================================

Edge cases:

- Equal scores: the lower index comes first. Order and choice go by the scores before they are
  rounded, so labels are right where rounding makes scores equal.
- NaN counts as less than every number; where nothing else is left, the lower index comes first.
- Fewer classes than ``k``: all of them.
- Rounding is to the nearest, ties to even, computed in double precision; minus zero becomes zero,
  so a small negative score does not show its sign; infinities stay, and every NaN becomes the
  same. Integers are not rounded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from cenacle.cut.specs import TensorSpec
from cenacle.documents.serving import OutputPolicy
from cenacle.enclave.tensor_bytes import Dtype
from cenacle.errors import InputError

__all__ = ["apply_policy", "outputs_under"]

_EXACT = 2.0**53


def outputs_under(policy: OutputPolicy, outputs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """What clients get of a model with these outputs.

    Raises:
        InputError: an output that the policy cannot be applied to.
    """
    told: list[TensorSpec] = []
    for spec in outputs:
        if spec.dtype not in get_args(Dtype):
            raise InputError(
                f"the model's output {spec.name} is of a type that no client can read",
                found=spec.dtype,
                expected=", ".join(get_args(Dtype)),
            )
        if policy.form == "scores":
            told.append(spec)
            continue
        classes = spec.shape[-1] if len(spec.shape) > int(spec.batched) else None
        if classes is None or classes < 1:
            raise InputError(
                f"the model's output {spec.name} has no labels",
                found=f"shape {list(spec.shape)}",
                expected="a last axis that counts classes",
                remedy="state the form scores in the contract, if the model's owner allows it",
            )
        above = spec.shape[:-1]
        if policy.form == "label":
            told.append(TensorSpec(f"{spec.name}.label", "I64", above))
        else:
            shape = (*above, min(policy.k or 1, classes))
            told.append(TensorSpec(f"{spec.name}.label", "I64", shape))
            told.append(TensorSpec(f"{spec.name}.score", spec.dtype, shape))
    if len({spec.name for spec in told}) < len(told):
        raise InputError(
            "two of the model's outputs would have the same name",
            found=", ".join(spec.name for spec in outputs),
            remedy="rename the model's outputs",
        )
    return tuple(told)


def apply_policy(policy: OutputPolicy, outputs: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """The arrays that may leave, by their names in :func:`outputs_under`."""
    told: dict[str, NDArray[Any]] = {}
    for name, scores in outputs.items():
        if policy.form == "scores":
            told[name] = _rounded(scores, policy.decimals)
        elif policy.form == "label":
            told[f"{name}.label"] = np.argmax(_comparable(scores), axis=-1).astype(np.int64)
        else:
            labels = _greatest(_comparable(scores), policy.k or 1)
            told[f"{name}.label"] = labels
            chosen = np.take_along_axis(scores, labels, axis=-1)
            told[f"{name}.score"] = _rounded(chosen, policy.decimals)
    return told


def _comparable(scores: NDArray[Any]) -> NDArray[Any]:
    if not np.issubdtype(scores.dtype, np.floating):
        return scores
    return np.where(np.isnan(scores), scores.dtype.type(-np.inf), scores)


def _greatest(scores: NDArray[Any], k: int) -> NDArray[np.int64]:
    """Indices of the ``k`` greatest along the last axis; the lower first among equals."""
    classes = scores.shape[-1]
    # A stable sort of the reversed scores, read from its end: descending, equals ascending.
    order = np.argsort(scores[..., ::-1], axis=-1, kind="stable")
    greatest: NDArray[np.int64] = (classes - 1 - order[..., ::-1])[..., :k].astype(np.int64)
    return np.ascontiguousarray(greatest)


def _rounded(scores: NDArray[Any], decimals: int | None) -> NDArray[Any]:
    if decimals is None or not np.issubdtype(scores.dtype, np.floating):
        return scores
    exact = scores.astype(np.float64)
    # Where a double has no digit left to round, scaling it would only overflow.
    small = np.abs(exact) < _EXACT / 10.0**decimals
    rounded = np.where(small, np.round(np.where(small, exact, 0.0), decimals), exact)
    rounded = np.where(np.isnan(rounded), np.nan, rounded) + 0.0
    return rounded.astype(scores.dtype)
