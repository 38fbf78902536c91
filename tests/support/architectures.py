"""Real architectures with random weights, and the proof that a cut of them changes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import nn

from benchmarks._offload_models import build, logits
from cenacle.cli.demo_lite0 import EfficientNetLite0
from cenacle.cut.cutting import Cutter
from cenacle.cut.onnx_model import OnnxModel
from cenacle.cut.sources import load_model
from cenacle.cut.specs import TensorSpec
from cenacle.errors import InputError

__all__ = ["ARCHITECTURES", "Tensors", "check_every_cut", "make", "relative_error", "run"]

ARCHITECTURES: Final = ("vgg16", "resnet50", "vit", "mobilenetv2", "efficientnet-lite0")
ROWS: Final = 3  # more than the rows of the example that the model was exported with
_BATCH_NORMS: Final = (nn.BatchNorm1d, nn.BatchNorm2d)

Tensors = Mapping[str, NDArray[Any]]


class _Logits(nn.Module):
    """The model's answer as a plain tensor, whoever wrote the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return logits(self.model(pixel_values))


def make(name: str, size: int, *, scale: int = 1) -> tuple[OnnxModel, Tensors, Tensors]:
    """An architecture in ONNX, a query, and what the PyTorch module answers to it.

    Batch normalisation has the statistics of random pictures, and weights and biases of its own.
    ``scale`` divides widths; above 1 there are fewer layers too, of the same structure.
    """
    torch.manual_seed(5)
    inner: Any = (
        EfficientNetLite0(10, scale=scale)
        if name == "efficientnet-lite0"
        else build(name, size, scale=scale)
    )
    if scale > 1:
        _shorten(inner)
    _normalise(inner, torch.randn(4 if size > 64 else 32, 3, size, size))
    module = _Logits(inner).eval()
    x = torch.randn(ROWS, 3, size, size)
    with torch.no_grad():
        y = module(x).numpy()
    # Otherwise nothing would be proved: each row must be answered for itself.
    assert relative_error(y[:1], y[1:2]) > 1e-3
    spec = TensorSpec("pixel_values", "F32", (None, 3, size, size))
    return load_model(module, inputs=[spec]), {"pixel_values": x.numpy()}, {"output": y}


def _shorten(model: Any) -> None:
    """Three blocks of those networks that have so many: with stride, residual and without."""
    if isinstance(model, EfficientNetLite0):
        model.blocks = model.blocks[:3]
        last: Any = model.blocks[-1].project_conv
        model.conv_head.weight = nn.Parameter(model.conv_head.weight[:, : last.out_channels])
    elif hasattr(model, "mobilenet_v2"):
        model.mobilenet_v2.layer = model.mobilenet_v2.layer[:3]
        last = model.mobilenet_v2.layer[-1].reduce_1x1.convolution
        head = model.mobilenet_v2.conv_1x1.convolution
        head.weight = nn.Parameter(head.weight[:, : last.out_channels].detach())


def _normalise(module: nn.Module, pictures: torch.Tensor) -> None:
    norms = [part for part in module.modules() if isinstance(part, _BATCH_NORMS)]
    # As in trained networks each residual branch adds little: otherwise a rounding error of
    # float32 grows with every block, and kernels of two libraries differ by more than 1e-5.
    last = {id(n) for name, n in module.named_modules() if name.endswith("layer.2.normalization")}
    for norm in norms:
        assert norm.weight is not None
        assert norm.bias is not None
        norm.momentum = None  # the mean over all that it has seen
        low, high = (0.1, 0.3) if id(norm) in last else (0.8, 1.2)
        nn.init.uniform_(norm.weight, low, high)
        nn.init.normal_(norm.bias, 0.0, 0.1)
    if norms:
        with torch.no_grad():
            module.train()(pictures)
    module.eval()


def relative_error(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """Largest difference / largest value."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def run(model: OnnxModel, inputs: Tensors, *, fast: bool = False) -> dict[str, NDArray[Any]]:
    """A model through ONNX Runtime; ``fast``: without the optimizer, which takes longer to run
    than small models do."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if fast:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(inputs)), strict=True))


def _cuts(cutter: Cutter) -> Iterator[tuple[str, frozenset[int]]]:
    """Each place where a model can be cut, by one of its names."""
    seen: set[frozenset[int]] = set()
    for name in cutter.layers.names:
        front = cutter.front_of(cutter.resolve(name))
        if front not in seen:
            seen.add(front)
            yield name, front


def check_every_cut(
    model: OnnxModel,
    inputs: Tensors,
    expected: Tensors,
    *,
    fast: bool = False,
    atomic: Sequence[str] = (),
) -> int:
    """Cuts at every layer: front and tail together answer as the whole does, to 1e-5.

    Only a layer after which, or before which, nothing is left may be refused.

    Args:
        atomic: layers that must be refused to be split, for what is inside them.

    Returns:
        how many different cuts there were.
    """
    cutter = Cutter(model)
    done = 0
    nodes = frozenset(range(len(cutter.index.nodes))) - cutter.neutral.nodes
    for name, front in _cuts(cutter):
        try:
            found = cutter.cut(name)
        except InputError as error:
            inside = any(name.startswith(f"{layer}.") for layer in atomic)
            assert front in (frozenset(), nodes) or inside, error  # noqa: PT017
            continue
        crossing = run(found.front, inputs, fast=fast)
        assert list(crossing) == [spec.name for spec in found.crossing]
        answer = run(found.tail, crossing, fast=fast)
        assert set(answer) == set(expected)
        for output, value in expected.items():
            assert relative_error(answer[output], value) <= 1e-5, (name, output)
        assert all(spec.batched for spec in found.crossing), name
        done += 1
    return done
