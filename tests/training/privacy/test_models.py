"""Whole models that nobody here wrote, against the loop; and Opacus, where it is installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from cenacle.training.privacy import make_private

transformers = pytest.importorskip("transformers", reason="needs transformers (pip: cenacle[dev])")


def vit() -> tuple[nn.Module, Tensor]:
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        image_size=8, patch_size=4, num_labels=3, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config), torch.randn(5, 3, 8, 8)


def bert() -> tuple[nn.Module, Tensor]:
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=12, num_labels=3, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config), torch.randint(0, 30, (5, 7))


def gpt2() -> tuple[nn.Module, Tensor]:
    config = transformers.GPT2Config(
        vocab_size=30, n_positions=12, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config), torch.randint(0, 30, (5, 7))


def resnet() -> tuple[nn.Module, Tensor]:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )
    model = transformers.ResNetForImageClassification(config)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.GroupNorm(4, child.num_features))
    return model, torch.randn(5, 3, 32, 32)


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "vit": vit, "bert": bert, "gpt2": gpt2, "resnet": resnet,
}  # fmt: skip


def losses_of(checks: Any) -> Callable[[nn.Module], Callable[..., Tensor]]:
    def losses(of: nn.Module) -> Callable[..., Tensor]:
        return lambda x: checks.square_loss(of(x).logits)

    return losses


@pytest.mark.parametrize("name", MODELS)
def test_transformers_models(name: str, checks: Any) -> None:
    torch.manual_seed(4)
    model, batch = MODELS[name]()
    model.train()
    losses = losses_of(checks)
    norms = checks.reference(model, losses, [batch], 1.0).norms
    clip = float(norms.median())
    expected = checks.reference(model, losses, [batch], clip)
    checks.close(checks.private_sums(model, losses, [batch], clip), expected, rtol=2e-5)
    layered = checks.reference(model, losses, [batch], clip, per_layer=True)
    found = checks.private_sums(model, losses, [batch], clip, per_layer=True, micro_batch=2)
    if name != "gpt2":  # its one table is in two layers, and clipped with the first
        checks.close(found, layered, norms=False, rtol=2e-5)


def test_low_rank_adapters(checks: Any) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: adapters are not tested")
    torch.manual_seed(4)
    model, batch = bert()
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["query", "value"], lora_dropout=0.0)
    adapted = peft.get_peft_model(model, config)
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    losses = losses_of(checks)
    expected = checks.reference(adapted, losses, [batch], 0.5)
    checks.close(checks.private_sums(adapted, losses, [batch], 0.5), expected, rtol=2e-5)
    assert {n.split(".")[-3] for n in expected.sums} == {"lora_A", "lora_B"}


def test_equals_opacus() -> None:
    opacus = pytest.importorskip("opacus", reason="opacus is not installed: no comparison with it")
    from opacus.optimizers import DPOptimizer  # noqa: PLC0415

    torch.manual_seed(4)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2),
        nn.InstanceNorm2d(8, affine=True), nn.Flatten(2), nn.Linear(9, 6), nn.LayerNorm(6),
        nn.Flatten(), nn.Linear(48, 3),
    )  # fmt: skip
    x, y = torch.randn(6, 3, 8, 8), torch.randint(0, 3, (6,))
    make_private(model, clip=0.5, noise_multiplier=0.0, expected_batch=6).backward(
        lambda x, y: functional.cross_entropy(model(x), y, reduction="none"), x, y
    )
    ours = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    wrapped = opacus.GradSampleModule(model)
    optimizer = DPOptimizer(
        torch.optim.SGD(wrapped.parameters(), lr=0.1), noise_multiplier=0.0, max_grad_norm=0.5,
        expected_batch_size=6,
    )  # fmt: skip
    optimizer.zero_grad()
    functional.cross_entropy(wrapped(x), y).backward()  # type: ignore[no-untyped-call]
    optimizer.pre_step()
    for one, p in zip(ours, model.parameters(), strict=True):
        torch.testing.assert_close(one, p.grad, rtol=1e-4, atol=1e-6)
