"""Private steps of an offloaded model: gradients of weights wait until examples are clipped.

Whoever clips examples (``cenacle.training.privacy``) runs the model's forward pass within
:meth:`PrivatePasses.around`. Products with weights then leave no way for autograd to reach the
weight; each leaves a :class:`Waiting` instead, which computes the weight's gradient from
the gradient of its output, scaled row by row, once the clip factors are known.

What accelerators see of it more than of other training is in :data:`PRIVATE_NOTE`; what a
lying one could do to the guarantee, in ``docs/private-training.md``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import torch

from cenacle.documents.receipt import LeakageRecord
from cenacle.errors import InputError
from cenacle.offload.schemes.base import Needs, Site

if TYPE_CHECKING:
    from cenacle.offload.session import Offload

__all__ = ["PRIVATE_NOTE", "PrivatePasses", "Waiting", "private_record"]

PRIVATE_NOTE: Final = (
    " The privacy plan bounds what outputs tell, not what accelerators see: of each step they "
    "see gradients of single examples, their clipped sum before there is noise in it, and so, "
    "with the weights before and after, the noise. A layer's gradients leave twice, as they are "
    "and scaled by each example's clip factor, which tells how far the norm of the example's "
    "whole gradient is above the clipping norm. Results are checked up to rounding: a lie below "
    "that passes, and lets one example move a sum by a little more than the clipping norm."
)
_LONGEST: Final = 2000


def private_record(record: LeakageRecord) -> LeakageRecord:
    """The record of a scheme under which examples are clipped."""
    if all(
        getattr(record, part) == "hidden"
        for part in ("inputs", "weights", "activations", "gradients", "labels")
    ):
        return record
    note = record.note[: _LONGEST - len(PRIVATE_NOTE)] + PRIVATE_NOTE
    return LeakageRecord.from_fields({**record.to_fields(), "note": note})


class Waiting:
    """A product with a weight whose gradient is still to be asked for.

    Attributes:
        rows: shape of the output of the map itself, of which gradients are taken: (rows, out)
            of a dense layer, (batch, out, *space) of a convolution.
    """

    def __init__(
        self, session: Offload, site: Site, saved: Any, x: torch.Tensor, w: torch.Tensor
    ) -> None:
        self._session = session
        self._site = site
        self._saved = saved
        self._x = x.detach() if session.scheme.keeps_input else None
        self._w = w.detach()

    def weight_gradient(self, gy: torch.Tensor) -> torch.Tensor:
        """The gradient of the weight (as it was used, so perhaps of its transpose).

        Args:
            gy: of the map's output, whatever it was multiplied with since.

        Raises:
            InputError: the session has ended.
        """
        session, site = self._session, self._site
        session.check_open()
        spans = session.profile.span(site.name, "backward")
        with spans, torch.no_grad(), session.eyes_shut(), torch._C.DisableTorchFunction():
            found = session.scheme.backward(
                site, self._saved, gy, self._x, self._w, Needs(x=False, w=True, bias=False)
            ).w
        assert found is not None
        return found


class PrivatePasses:
    """How one session serves private steps.

    Args:
        session: open.

    Raises:
        InputError: examples would not stay apart, or a lie of a worker could pass the clipping
            norm.
    """

    def __init__(self, session: Offload) -> None:
        _require_safe(session)
        self._session = session
        self.waiting: list[Waiting] = []

    @contextmanager
    def around(self) -> Iterator[None]:
        """Forward passes of the model within; modes entered within see its functions first."""
        session = self._session
        with session.steps_apart(self):
            yield

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Forward passes within stay in the enclave, every product of them."""
        with self._session.staying():
            yield

    @contextmanager
    def collecting(self) -> Iterator[list[Waiting]]:
        """What products within the block leave, in order."""
        before, self.waiting = self.waiting, []
        try:
            yield self.waiting
        finally:
            self.waiting = before


def _require_safe(session: Offload) -> None:
    reason = session.scheme.hinders_privacy
    if reason is not None:
        raise InputError(
            f"private steps cannot be offloaded under {session.scheme.name}: {reason}",
            found=session.scheme.name,
            expected="enclave, permuted, lowrank without noise, or measured",
        )
    if session.residency is not None:
        raise InputError(
            "private steps need every gradient back, to add noise to it",
            found="weights that workers keep and train (resident=)",
            remedy="leave out resident=",
        )
    if not session.checked:
        raise InputError(
            "private steps need checked results: a worker that lies could move a sum by more "
            "than the clipping norm, and noise would not cover it",
            found="check=False",
            remedy="offload with check=True",
        )
    verifier = session.fleet.verifier
    if verifier is not None and verifier.roundoff is not None:
        coarsest = torch.finfo(torch.float32).eps / 2
        if verifier.roundoff > coarsest:
            raise InputError(
                "private steps need workers of full precision: what passes their check as "
                "rounding adds to what one example can move",
                found=f"Verifier(roundoff={verifier.roundoff:g})",
                expected=f"at most {coarsest:g}",
                remedy="turn TF32 off on the workers, and leave roundoff out",
            )
