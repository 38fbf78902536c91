"""The models that are cut, with weights that nobody trained where none are at hand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from benchmarks._offload_models import build
from cenacle.cut.cutting import Cut, cut
from cenacle.cut.onnx_model import OnnxModel
from cenacle.cut.sources import load_model
from cenacle.cut.tail_file import SEGMENT_BYTES, write_tail
from cenacle.serving.front import Front, front_digest

__all__ = ["CUTS", "SHAPES", "CutModel", "cut_model", "tail_module"]

SIZE: Final = 224
_ENDS: Final = ("whole.onnx", "front.onnx", "tail.safetensors")

CUTS: Final = {
    "vgg16": "30",
    "resnet50": "resnet.encoder.stages.2",
    "lite0": "blocks.15",
}
"""The last public layer. VGG-16 keeps its dense layers secret, as in eNNclave (Schlögl and Böhme,
ACM Workshop on AI and Security 2020), ResNet-50 its last stage, EfficientNet-Lite0 its head."""


SHAPES: Final = {"vgg16": (512, 7, 7), "resnet50": (1024, 14, 14), "lite0": (192, 7, 7)}
"""A row of the input of :func:`tail_module`."""


def _module(name: str) -> Any:
    torch.manual_seed(0)
    if name == "lite0":
        from cenacle.cli.demo_lite0 import load_lite0  # noqa: PLC0415 - reads its weights

        return load_lite0()
    return build(name, SIZE, classes=1000).eval()


class _Logits(nn.Module):
    """A classifier of ``transformers``, without the record around its result."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.resnet = model.resnet
        self.classifier = model.classifier

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = self.resnet(x).pooler_output
        result: torch.Tensor = self.classifier(pooled)
        return result


class _Stage(nn.Module):
    """The last stage of ResNet-50 with its classifier."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.stage = model.resnet.encoder.stages[3]
        self.pooler = model.resnet.pooler
        self.classifier = model.classifier

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.classifier(self.pooler(self.stage(x)))
        return result


class _Lite(nn.Module):
    """The last four blocks of EfficientNet-Lite0 and its head."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*model.blocks[12:])
        names = ("conv_head", "bn1", "relu1", "avg_pooling", "flatten", "fc")
        self.head = nn.Sequential(*(getattr(model, name) for name in names))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.blocks(x))
        return result


def tail_module(name: str) -> nn.Module:
    """A tail as a PyTorch module; its input is a batch of :data:`SHAPES`."""
    model = _module(name)
    if name == "vgg16":
        return nn.Sequential(*model[31:]).eval()
    return (_Stage(model) if name == "resnet50" else _Lite(model)).eval()


@dataclass(frozen=True)
class CutModel:
    """A model and its parts, in files.

    Attributes:
        whole, front: ONNX files.
        tail: the tail's file, before it is sealed.
        parameters: bytes of the tail's weights.
        crossing: bytes of one row that cross.
    """

    name: str
    whole: Path
    front: Path
    front_digest: str
    tail: Path
    parameters: int
    crossing: int


def cut_model(name: str, folder: Path, *, segment_bytes: int = SEGMENT_BYTES) -> CutModel:
    """Export, cut and write a model of :data:`CUTS`, unless its files are in the folder already."""
    whole, front, tail = (folder / f"{name}-{end}" for end in _ENDS)
    if not tail.exists():
        module = _module(name)
        if name == "resnet50":
            module = _Logits(module).eval()
        model: OnnxModel = load_model(module, inputs=[torch.zeros(2, 3, SIZE, SIZE)])
        parts: Cut = cut(model, CUTS[name])
        model.save(whole)
        parts.front.save(front)
        write_tail(parts.tail, tail, segment_bytes=segment_bytes)
    crossing = sum(spec.row_bytes or 0 for spec in Front(front.read_bytes()).outputs)
    return CutModel(name, whole, front, front_digest(front), tail, tail.stat().st_size, crossing)
