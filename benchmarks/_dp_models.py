"""The models of :mod:`benchmarks.dp`, and one step of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["BATCHES", "batch_of", "build", "losses_of"]

BATCHES = {"vgg9": 64, "resnet32": 64, "vit": 64, "gpt2": 8}

Step = Callable[..., Tensor]


class Block(nn.Module):
    """Two convolutions beside a shortcut (He et al. 2016, CIFAR variant), with GroupNorm."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(8, outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(8, outside)
        self.short = (
            nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False))
            if stride > 1 or inside != outside
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        out = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(out)) + self.short(x))


def _vgg9() -> nn.Module:
    layers: list[nn.Module] = []
    inside = 3
    for width, pool in (
        (32, False),
        (64, True),
        (128, False),
        (128, True),
        (256, False),
        (256, True),
    ):
        layers += [nn.Conv2d(inside, width, 3, 1, 1), nn.GroupNorm(8, width), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if pool else []
        inside = width
    head = [nn.Flatten(), nn.Linear(256 * 16, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU()]
    return nn.Sequential(*layers, *head, nn.Linear(512, 10))


def _resnet32() -> nn.Module:
    layers: list[nn.Module] = [
        nn.Conv2d(3, 16, 3, 1, 1, bias=False),
        nn.GroupNorm(8, 16),
        nn.ReLU(),
    ]
    inside = 16
    for width in (16, 32, 64):
        for place in range(5):
            layers.append(Block(inside, width, 2 if width > 16 and place == 0 else 1))
            inside = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification  # noqa: PLC0415

    model = ViTForImageClassification(
        ViTConfig(  # type: ignore[call-arg]
            hidden_size=192, num_hidden_layers=6, num_attention_heads=3, intermediate_size=768,
            image_size=32, patch_size=4, num_labels=10, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip
    # Opacus has no rule for parameters of their own; frozen for all contenders.
    model.vit.embeddings.cls_token.requires_grad_(False)
    model.vit.embeddings.position_embeddings.requires_grad_(False)
    return model


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel  # noqa: PLC0415

    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=5000, n_positions=128, n_embd=384, n_layer=6, n_head=6,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=False,
            use_cache=False,
        )
    )  # fmt: skip
    model.transformer.wpe.weight.requires_grad_(False)
    return model


_MODELS = {"vgg9": _vgg9, "resnet32": _resnet32, "vit": _vit, "gpt2": _gpt2}


def build(name: str) -> nn.Module:
    """The model, with weights from a fixed seed."""
    torch.manual_seed(0)
    return _MODELS[name]().train()


def batch_of(name: str, size: int) -> tuple[Tensor, Tensor]:
    """Random examples and labels of the model's shapes."""
    generator = torch.Generator().manual_seed(1)
    if name == "gpt2":
        ids = torch.randint(0, 5000, (size, 129), generator=generator)
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    x = torch.randn(size, 3, 32, 32, generator=generator)
    return x, torch.randint(0, 10, (size,), generator=generator)


def losses_of(name: str, model: nn.Module) -> Step:
    """One loss per example."""

    def losses(x: Tensor, y: Tensor) -> Tensor:
        out: Any = model(x)
        logits = out if isinstance(out, Tensor) else out.logits
        if name == "gpt2":
            each = functional.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none")
            return each.view(y.shape).mean(1)
        return functional.cross_entropy(logits, y, reduction="none")

    return losses
