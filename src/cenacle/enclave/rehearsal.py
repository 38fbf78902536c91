"""Run a program here, on made-up data, before it is sealed and approved.

From a real enclave only the class of a program's error leaves. A rehearsal shows everything,
and gives the program the same readers, parameters and rules for outputs. It confines nothing,
and ``ctx.offload`` keeps everything here::

    outputs = rehearse(main.run, {"hospital-a": Path("made-up.csv")}, {"counts": "metrics"})
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cenacle.crypto import SecretBytes
from cenacle.enclave.context import JobContext
from cenacle.enclave.program_runner import OutputRules
from cenacle.enclave.readers import AssetReader, reader_for
from cenacle.errors import EnclaveError
from cenacle.sealing import SealedReader, seal_path

if TYPE_CHECKING:
    from torch import nn

    from cenacle.offload.session import Offload

__all__ = ["rehearse"]


def _ignore(_done: int, _total: int) -> None:
    pass


def _inside(model: nn.Module) -> Offload:
    """A session as programs get one, of which nothing leaves."""
    from cenacle.accelerators.inline import InlineAccelerator  # noqa: PLC0415 - torch
    from cenacle.offload.session import offload  # noqa: PLC0415

    return offload(model, "enclave", [InlineAccelerator("rehearsal")])


def rehearse(
    run: Callable[[JobContext], object],
    files: Mapping[str, Path],
    outputs: Mapping[str, str],
    parameters: Mapping[str, Any] | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Call a program's entry point on files, and return its outputs by name.

    Args:
        run: the entry point.
        files: a table, tensors or any file for each alias; they are sealed and opened again
            under a key that is thrown away.
        outputs: kind by name, as a contract would state them.
        parameters: as a contract would state them.
        progress: gets what the program reports.

    Raises:
        InputError, DataError: a file cannot be sealed, or an output is not of its kind.
        EnclaveError: the program left out an output.
        Exception: whatever the program raises.
    """
    given: dict[str, Any] = {}
    rules = OutputRules(outputs)

    def emit(name: str, value: Any) -> None:
        rules.encode(name, value)
        given[name] = value

    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rehearsal-")))
        readers: dict[str, AssetReader] = {}
        for number, (alias, path) in enumerate(files.items()):
            key = stack.enter_context(SecretBytes.random(32))
            sealed = folder / f"{number}.sealed"
            seal_path(path, sealed, key)
            readers[alias] = reader_for(stack.enter_context(SealedReader(sealed, key)))
        told = json.loads(json.dumps(dict(parameters or {}), allow_nan=False))
        run(JobContext(readers, told, dict(outputs), progress or _ignore, emit, _inside))
    if missing := set(outputs) - set(given):
        raise EnclaveError(
            "the program left out outputs",
            found=", ".join(sorted(given)) or "none",
            expected=", ".join(sorted(outputs)),
            remedy=f"call ctx.output for {', '.join(sorted(missing))}",
        )
    return given
