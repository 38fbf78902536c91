"""Models to measure offloading with, and the error of each of their layers.

VGG as published (Simonyan and Zisserman 2015, configuration D; VGG-9 as usual for 32x32
pictures), and ResNet-50, ViT, BERT and MobileNetV2 as ``transformers`` writes them, all with
random weights. Each takes a ``scale`` that divides its widths, so that tests can use them too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final

import torch
from torch import nn

from cenacle.documents.receipt import LeakageRecord
from cenacle.offload.fleet import Fleet
from cenacle.offload.schemes.base import Gradients, Needs, Scheme, Site, bias_gradient

__all__ = ["MODELS", "LayerErrors", "build", "logits", "picture_size"]

_VGG: Final[Mapping[str, tuple[Sequence[int], Sequence[int]]]] = {
    # 0: pooling. Then the widths of the dense layers.
    "vgg9": ((32, 64, 0, 128, 128, 0, 256, 256, 0), (512, 512)),
    "vgg16": (
        (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0),
        (4096, 4096),
    ),
}
MODELS: Final = ("vgg16", "vgg9", "resnet50", "vit", "bert", "mobilenetv2")


def picture_size(name: str) -> int:
    """The side of the pictures that a model was made for."""
    return 32 if name == "vgg9" else 224


def vgg(
    name: str, size: int, classes: int, *, scale: int, dropout: float, smooth: bool
) -> nn.Sequential:
    """Convolutions of 3x3 with ReLU, pooling, dense layers; no batch normalisation."""
    activation = nn.SiLU if smooth else nn.ReLU
    convolutions, dense = _VGG[name]
    layers: list[nn.Module] = []
    width = 3
    for out in convolutions:
        if out == 0:
            layers.append(nn.MaxPool2d(2))
            size //= 2
        else:
            layers += [nn.Conv2d(width, out // scale, 3, padding=1), activation()]
            width = out // scale
    layers.append(nn.Flatten())
    width *= size * size
    for out in dense:
        layers += [nn.Linear(width, out // scale), activation(), nn.Dropout(dropout)]
        width = out // scale
    model = nn.Sequential(*layers, nn.Linear(width, classes))
    for layer in model:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
    return model


def build(
    name: str,
    size: int,
    classes: int = 10,
    *,
    scale: int = 1,
    dropout: float = 0.0,
    smooth: bool = False,
) -> nn.Module:
    """One of :data:`MODELS` with random weights, for pictures of size x size.

    ``scale`` divides widths; above 1 there are fewer layers too, of the same structure.
    ``smooth``: SiLU instead of ReLU. Where a ReLU's argument is nearly zero, a rounding error
    decides over a whole gradient, so gradients of float32 and float64 cannot be compared.

    Raises:
        ImportError: ``transformers`` is not installed (all but VGG need it).
    """
    if name in _VGG:
        return vgg(name, size, classes, scale=scale, dropout=dropout, smooth=smooth)
    import transformers  # noqa: PLC0415 - optional

    small = scale > 1
    labels: dict[str, Any] = {"num_labels": classes}
    if name == "resnet50":
        return _classifier(
            transformers.ResNetForImageClassification,
            transformers.ResNetConfig(
                embedding_size=64 // scale,
                hidden_sizes=[width // scale for width in (256, 512, 1024, 2048)],
                depths=[1, 2, 1, 1] if small else [3, 4, 6, 3],
                layer_type="bottleneck",
                hidden_act="silu" if smooth else "relu",
                **labels,
            ),
        )
    if name == "mobilenetv2":
        return _classifier(
            transformers.MobileNetV2ForImageClassification,
            transformers.MobileNetV2Config(
                image_size=size,
                hidden_act="silu" if smooth else "relu6",
                depth_multiplier=1 / scale,
                classifier_dropout_prob=dropout,
                **labels,
            ),
        )
    widths: dict[str, Any] = {
        "hidden_size": 768 // scale,
        "intermediate_size": 3072 // scale,
        "num_hidden_layers": 2 if small else 12,
        "num_attention_heads": 4 if small else 12,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
        **labels,
    }
    if name == "bert":
        return _classifier(
            transformers.BertForSequenceClassification,
            transformers.BertConfig(vocab_size=30522 // scale, **widths),
        )
    if name == "vit":
        patch = 16 if size >= 128 else 4
        return _classifier(
            transformers.ViTForImageClassification,
            transformers.ViTConfig(image_size=size, patch_size=patch, **widths),
        )
    raise ValueError(f"no such model: {name}")


def _classifier(kind: Any, configuration: Any) -> nn.Module:
    model: nn.Module = kind(configuration)
    return model.train()


def logits(output: Any) -> torch.Tensor:
    """What the model says, whoever wrote it."""
    found: torch.Tensor = getattr(output, "logits", output)
    return found


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference / norm of the reference."""
    size = float(expected.norm())
    return float((found.double() - expected).norm()) / size if size else float(found.norm())


class LayerErrors(Scheme):
    """Another scheme, each result of which is compared with float64 on the same operands.

    Attributes:
        errors: by layer and result (``output``, ``input gradient``, ``weight gradient``,
            ``bias gradient``): the norm of the difference / the norm of the reference.
    """

    name: ClassVar[str] = "errors"
    keeps_input: ClassVar[bool] = True

    def __init__(self, inner: Scheme) -> None:
        super().__init__()
        self.inner = inner
        self.errors: dict[tuple[str, str], float] = {}

    @property
    def worst(self) -> float:
        return max(self.errors.values())

    @property
    def leakage(self) -> LeakageRecord:
        return self.inner.leakage

    def attach(self, fleet: Fleet, model: nn.Module) -> None:
        super().attach(fleet, model)
        self.inner.stays = self.stays
        self.inner.attach(fleet, model)

    def detach(self) -> None:
        self.inner.detach()

    def forward(
        self, site: Site, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, Any]:
        y, saved = self.inner.forward(site, x, w, bias)
        expected = site.map.forward().compute(x.double(), w.double())
        if bias is not None:
            expected += bias.double().view(1, -1, *([1] * (y.dim() - 2)))
        self._note(site, "output", y, expected)
        return y, saved

    def backward(
        self,
        site: Site,
        saved: Any,
        gy: torch.Tensor,
        x: torch.Tensor | None,
        w: torch.Tensor,
        needs: Needs,
    ) -> Gradients:
        assert x is not None
        kept = x if self.inner.keeps_input else None
        found = self.inner.backward(site, saved, gy, kept, w, needs)
        wide = gy.double()
        if found.x is not None:
            product = site.map.input_gradient(x.shape)
            self._note(site, "input gradient", found.x, product.compute(wide, w.double()))
        if found.w is not None:
            product = site.map.weight_gradient(w.shape)
            self._note(site, "weight gradient", found.w, product.compute(wide, x.double()))
        if found.bias is not None:
            # The sum may be zero (a bias of attention's keys): relative to what is summed.
            expected, size = (bias_gradient(t, site.map) for t in (wide, wide.abs()))
            self._note(site, "bias gradient", found.bias - expected + size, size)
        return found

    def _note(self, site: Site, what: str, found: torch.Tensor, expected: torch.Tensor) -> None:
        key = (site.name, what)
        self.errors[key] = max(self.errors.get(key, 0.0), _error(found, expected))
