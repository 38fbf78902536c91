"""Cut a model at any layer into a public front and a confidential tail.

Names are imported at their first use: the enclave needs numpy and ONNX Runtime of this package,
never ``onnx`` or torch. See ``docs/cut.md``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cenacle._lazy import lazy_names

if TYPE_CHECKING:
    from cenacle.cut.cutting import Cut, Cutter, cut
    from cenacle.cut.onnx_model import OnnxModel
    from cenacle.cut.runtime import TailRuntime
    from cenacle.cut.specs import TensorSpec
    from cenacle.cut.suggestion import Choice, Suggestion, suggest
    from cenacle.cut.tail_file import write_tail

__all__ = [
    "Choice",
    "Cut",
    "Cutter",
    "OnnxModel",
    "Suggestion",
    "TailRuntime",
    "TensorSpec",
    "cut",
    "suggest",
    "write_tail",
]

__getattr__ = lazy_names(
    __name__,
    {
        "Choice": "suggestion",
        "Cut": "cutting",
        "Cutter": "cutting",
        "OnnxModel": "onnx_model",
        "Suggestion": "suggestion",
        "TailRuntime": "runtime",
        "TensorSpec": "specs",
        "cut": "cutting",
        "suggest": "suggestion",
        "write_tail": "tail_file",
    },
)
