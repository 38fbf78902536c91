"""From a contract's offload plan to a scheme and its leakage record."""

from __future__ import annotations

from typing import cast

from cenacle.documents.offload import EnclavePlan, OffloadPlan, PermutedPlan
from cenacle.documents.receipt import LeakageRecord
from cenacle.offload.private import private_record
from cenacle.offload.resident import Keeper
from cenacle.offload.schemes.base import Scheme, make_scheme

__all__ = ["planned_leakage", "planned_scheme"]

_PUBLIC_BASE = (
    " The weights that training starts from may be known to others: whoever knows them, or "
    "weights that they were made from, recovers the permutations and sees all of this in plain."
)


def planned_scheme(plan: OffloadPlan) -> Scheme:
    """A new instance, for one session. Raises InputError for an option it does not know."""
    if isinstance(plan, EnclavePlan):
        return make_scheme(plan.scheme)
    scheme = make_scheme(plan.scheme, **plan.scheme_options())
    if isinstance(plan, PermutedPlan) and plan.resident:
        cast("Keeper", scheme).may_keep()
    return scheme


def planned_leakage(plan: OffloadPlan, *, private: bool = False) -> LeakageRecord:
    """What accelerators learn under a plan: the scheme's record, or a worse one.

    With known initial weights ``permuted`` protects nothing that it sends. With ``private``, a
    privacy plan is kept as well, and its steps show more than others.
    """
    record = _leakage(plan)
    return private_record(record) if private else record


def _leakage(plan: OffloadPlan) -> LeakageRecord:
    record = planned_scheme(plan).leakage
    if not isinstance(plan, PermutedPlan) or not plan.allow_public_base:
        return record
    sent = {
        part: "plaintext"
        for part in ("inputs", "weights", "activations", "gradients")
        if getattr(record, part) != "hidden"
    }
    note = record.note[: 2000 - len(_PUBLIC_BASE)] + _PUBLIC_BASE
    return LeakageRecord.from_fields({**record.to_fields(), **sent, "note": note})
