"""What a program sees: ``run(ctx)`` gets a :class:`JobContext` and nothing else.

::

    def run(ctx: JobContext) -> None:
        table = ctx.assets["hospital-a"].read()      # a pyarrow.Table
        ctx.progress(1, 2)
        ctx.output("counts", {"rows": table.num_rows})
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from cenacle.enclave.readers import AssetReader
from cenacle.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from cenacle.offload.session import Offload

__all__ = ["JobContext"]


class JobContext:
    """The job, to a program.

    Attributes:
        assets: opened assets by alias: a :class:`~cenacle.sealing.TableReader` for tables, a
            :class:`~cenacle.sealing.TensorReader` for tensors, a
            :class:`~cenacle.sealing.SealedReader` for files. They decrypt what is read.
        parameters: the contract's, as JSON values.
        outputs: kind by name of every output that the contract expects.
    """

    def __init__(
        self,
        assets: Mapping[str, AssetReader],
        parameters: Mapping[str, Any],
        outputs: Mapping[str, str],
        report: Callable[[int, int], None],
        emit: Callable[[str, Any], None],
        offload: Callable[[nn.Module], Offload] | None = None,
    ) -> None:
        self.assets = assets
        self.parameters = parameters
        self.outputs = outputs
        self._report = report
        self._emit = emit
        self._offload = offload

    def progress(self, done: int, total: int) -> None:
        """Show how far the job is, in at most a thousand steps; the host sees this."""
        self._report(done, total)

    def output(self, name: str, value: Any) -> None:
        """Give one of the contract's outputs, once each.

        Args:
            name: as in the contract.
            value: for ``model`` numpy arrays by name, for ``metrics`` JSON values by name,
                for ``table`` a ``pyarrow.Table``, for ``file`` bytes.
        """
        self._emit(name, value)

    def offload(self, model: nn.Module) -> Offload:
        """A session in which the model's linear algebra goes to the contract's accelerators::

            with ctx.offload(model):
                loss = criterion(model(x), y)
                loss.backward()
                optimizer.step()

        The agent disguises what leaves and checks what returns, as the contract's ``offload``
        says. Torch's own generator starts from a secret of the run: do not seed it before the
        model is made, or its first weights are known to everyone who knows the program.

        Raises:
            InputError: the contract sends nothing to accelerators; or the model cannot be
                offloaded, or is in a session already.
            RefusedError: the scheme must not be used for this model.
        """
        if self._offload is None:
            raise InputError(
                "the contract sends nothing to accelerators",
                expected="a scheme under offload",
                remedy="state offload in the contract, or use the model as it is",
            )
        return self._offload(model)
