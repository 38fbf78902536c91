"""The recipe trainer: loaders, models, deterministic training, checkpoints, metrics.

torch is imported at the first use of a name that needs it, so that parties who only seal
and sign need not install it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cenacle._lazy import lazy_names
from cenacle.training.checkpoint import Checkpoint, CheckpointSink
from cenacle.training.sources import (
    MemoryTable,
    MemoryTensors,
    Source,
    TableSource,
    TensorSource,
)

if TYPE_CHECKING:
    from cenacle.training.inference import Predictions, load_model, predict
    from cenacle.training.model_file import read_model, write_model
    from cenacle.training.offloading import Offloading
    from cenacle.training.private import Privacy
    from cenacle.training.run import TrainingResult, train

__all__ = [
    "Checkpoint",
    "CheckpointSink",
    "MemoryTable",
    "MemoryTensors",
    "Offloading",
    "Predictions",
    "Privacy",
    "Source",
    "TableSource",
    "TensorSource",
    "TrainingResult",
    "load_model",
    "predict",
    "read_model",
    "train",
    "write_model",
]

__getattr__ = lazy_names(
    __name__,
    {
        "Offloading": "offloading",
        "Predictions": "inference",
        "Privacy": "private",
        "TrainingResult": "run",
        "load_model": "inference",
        "predict": "inference",
        "read_model": "model_file",
        "train": "run",
        "write_model": "model_file",
    },
)
