"""Workers may read staging memory while it is written: nothing but what is sent may stand there.

So a scheme's operations write each element of it once, with its final value. In particular no
``addmm(out=)``, which copies its addend, plain, to where the result will be.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cenacle.accelerators.inline import InlineAccelerator
from cenacle.offload import offload

# Each writes an element once, and reads none of what it writes.
ONCE = {
    "aten.copy_.default",
    "aten.index_copy_.default",
    "aten.index_copy.out",
    "aten.index_select.out",
    "aten.mul.out",
    "aten.sub.out",
    "aten.where.self_out",
    "aten.zero_.default",
}


class Watched:
    """Remembers where it gave memory."""

    def __init__(self) -> None:
        self.given: list[torch.Tensor] = []

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        self.given.append(torch.empty(tuple(shape), dtype=dtype))
        return self.given[-1]


class Writes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The names of operations that wrote to staging memory."""

    def __init__(self, staging: Watched) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.staging = staging
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        ours = {t.untyped_storage().data_ptr() for t in self.staging.given}
        schema = func._schema
        kwargs = kwargs or {}
        for position, argument in enumerate(schema.arguments):
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            if not argument.is_write or not isinstance(value, torch.Tensor):
                continue
            if value.untyped_storage().data_ptr() in ours:
                self.names.add(str(func))
        return func(*args, **kwargs)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.Flatten(2),
        nn.Linear(64, 16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 5),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scheme", ["measured", "lowrank", "permuted"])
def test_staging_memory_is_written_once(scheme: str, dtype: torch.dtype) -> None:
    worker, staging = InlineAccelerator("worker"), Watched()
    worker.staging = staging
    net = model().to(dtype)
    options: dict[str, Any] = {"guard": None} if scheme == "lowrank" else {}
    with offload(net, scheme, [worker], **options), Writes(staging) as writes:
        for _ in range(2):
            net(torch.randn(16, 3, 8, 8, dtype=dtype)).square().sum().backward()
    assert writes.names <= ONCE
    if scheme != "measured":
        assert staging.given  # the scheme does write into it
