"""Accelerators from the inside: sockets that the launcher made, used as the contract says."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cenacle.crypto import derive_key
from cenacle.documents.contract import Contract
from cenacle.documents.offload import EnclavePlan
from cenacle.enclave.sandbox.entry import AgentConfig
from cenacle.enclave.session import Session
from cenacle.errors import EnclaveError

if TYPE_CHECKING:
    from cenacle.training import Offloading

__all__ = ["attach", "require_agreed"]


def require_agreed(contract: Contract, config: AgentConfig) -> None:
    """Refuse accelerators that are not those of the contract; before any key arrives.

    What is behind a socket cannot be known in here: its kind is the launcher's word.

    Raises:
        EnclaveError: there are others, or more, or fewer.
    """
    plan = contract.offload
    told = [described for described, _ in config.accelerators]
    threads = [one.get("threads") for one in told]
    wanted = "none" if isinstance(plan, EnclavePlan) else _wanted(plan.accelerators)
    found = ", ".join(str(one.get("kind"))[:40] for one in told) or "none"
    if isinstance(plan, EnclavePlan):
        agreed = not told and not config.plan.accelerators
    else:
        agreed = (
            len(told) == plan.accelerators.count
            and all(one.get("kind") in plan.accelerators.kinds for one in told)
            and len({str(one.get("name")) for one in told}) == len(told)
            and all(type(number) is int and number > 0 for number in threads)
        )
    if not agreed:
        raise EnclaveError(
            "the accelerators are not those of the contract",
            found=found,
            expected=wanted,
            remedy="start the job with `cenacle run`",
        )


def _wanted(plan: Any) -> str:
    return f"{plan.count} of kind {' or '.join(plan.kinds)}"


@contextmanager
def attach(
    contract: Contract, config: AgentConfig, session: Session
) -> Iterator[Offloading | None]:
    """The contract's offload plan on the launcher's accelerators, or None if nothing leaves.

    Raises:
        AcceleratorError: an accelerator does not answer.
    """
    if isinstance(contract.offload, EnclavePlan):
        yield None
        return
    from cenacle.accelerators.child import Attached  # noqa: PLC0415
    from cenacle.accelerators.process import ProcessAccelerator  # noqa: PLC0415 - torch
    from cenacle.accelerators.shared_memory import SharedStaging  # noqa: PLC0415
    from cenacle.training.offloading import Offloading  # noqa: PLC0415

    # Workers that must not see each other's tensors share no memory with each other either.
    apart = contract.offload.scheme == "masked-training"
    staging = None if apart else SharedStaging()
    members = [
        ProcessAccelerator(
            str(described["name"]),
            staging,
            threads=int(described["threads"]),
            attached=Attached(os.dup(socket)),
        )
        for described, socket in config.accelerators
    ]
    kinds = {str(described["name"]): str(described["kind"]) for described, _ in config.accelerators}
    with derive_key(session.job_secret, "enclave/initial-weights") as key:
        secret = bytes(key.view()).hex()
    offloading = Offloading(contract.offload, members, kinds, secret=secret)
    try:
        yield offloading
    finally:
        offloading.close()
        if staging is not None:
            staging.close()
