"""The one place where ONNX Runtime is imported, and how its sessions are made.

Its official builds for Linux collect telemetry by default: at the import they write an
identifier into the user's cache folder and start a thread that uploads events. The variable
``ORT_DISABLE_TELEMETRY``, set before the import, is a full opt-out; so nothing else in this
package imports it (``Privacy.md`` of ONNX Runtime, section *Disabling Telemetry*).

An error of ONNX Runtime may quote values and paths. None of its words leave: every error here
has words of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import os
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cenacle.errors import EnclaveError, InputError

__all__ = ["Session", "onnxruntime", "trim_memory"]

_SILENT: Final = 4  # log only what is fatal
Array = NDArray[Any]


@functools.cache
def onnxruntime() -> Any:
    """The module ``onnxruntime``, silent and without telemetry. Its import starts threads.

    Raises:
        InputError: it is not installed.
    """
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    try:
        module = importlib.import_module("onnxruntime")
    except ImportError:
        raise InputError(
            "ONNX Runtime is not installed",
            expected="the package onnxruntime",
            remedy="install it with: pip install 'cenacle[serving]'",
        ) from None
    # Somebody else may have imported it before, with telemetry.
    module.disable_telemetry_events()
    module.set_default_logger_severity(_SILENT)
    return module


def trim_memory() -> None:
    """Give freed memory back to the system, which overwrites it: copies of weights lay there."""
    with contextlib.suppress(OSError, AttributeError):  # glibc alone keeps so much
        ctypes.CDLL(None).malloc_trim(0)


class Session:
    """A graph, ready to run on this machine's processor.

    Threads spin while a call runs and sleep between calls; nothing is written to the log; the
    same input gives the same output.

    Args:
        graph: an ONNX model, which must have been checked: see
            :func:`cenacle.cut.tail_graph.check_graph`.
        weights: initializers that the graph marks as external. They are copied; the memory can
            be reused as soon as the session is there.
        threads: how many compute; by default one a core.

    Raises:
        EnclaveError: ONNX Runtime does not take the graph or has no memory for it.
    """

    def __init__(
        self,
        graph: bytes,
        weights: Mapping[str, Array] | None = None,
        *,
        threads: int | None = None,
    ) -> None:
        ort = onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = _SILENT
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.inter_op_num_threads = 1
        options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
        options.use_deterministic_compute = True
        # It would keep a plan, and memory for it, of each number of rows that it met.
        options.enable_mem_pattern = False
        # Bytes of another form (flatbuffers) would go to another parser.
        options.add_session_config_entry("session.load_model_format", "ONNX")
        options.add_session_config_entry("session.force_spinning_stop", "1")
        values = {
            name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in (weights or {}).items()
        }
        try:
            if values:
                options.add_external_initializers(list(values), list(values.values()))
            self._session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception:
            raise EnclaveError(
                "ONNX Runtime does not take the model",
                expected="operators that it has, on tensors of types that it has for them",
                remedy="run the model with ONNX Runtime before it is cut",
            ) from None

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(each.name for each in self._session.get_inputs())

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(each.name for each in self._session.get_outputs())

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """Compute the outputs named; inputs are read where they lie.

        Raises:
            EnclaveError: an operator failed, or there is no memory.
        """
        ort = onnxruntime()
        try:
            feeds = {
                name: ort.OrtValue.ortvalue_from_numpy(np.asarray(array, order="C"))
                for name, array in inputs.items()
            }
            found = self._session.run_with_ort_values(list(outputs), feeds)
            return [value.numpy() for value in found]
        except Exception:
            raise EnclaveError(
                "the model failed on an input",
                expected="tensors that each of its operators can compute with",
                remedy="run the model with ONNX Runtime on tensors of this shape",
            ) from None
