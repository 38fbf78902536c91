"""One process of two: takes its part of the examples, and says what it released."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from cenacle.training.privacy import (
    AdaptiveClip,
    Noise,
    PoissonSampler,
    PrivacyError,
    Sampling,
    ShuffledSampler,
    make_private,
)

PART = {0: slice(0, 5), 1: slice(5, 8)}


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3))


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    return torch.randn(8, 4), torch.randint(0, 3, (8,))


def step(rank: int | None, part: slice, steps: int = 1, **options: Any) -> dict[str, Any]:
    """Steps of one process, or of the only one where ``rank`` is ``None``."""
    model = net(1 if not rank else 7)
    x, y = data()
    settings = {"clip": 0.8, "noise_multiplier": 0.0, "expected_batch": 8.0} | options
    settings.setdefault("noise", Noise(compiled=False))
    group = None if rank is None else dist.group.WORLD
    try:
        private = make_private(model, group=group, **settings)
        for _ in range(steps):
            private.backward(
                lambda x, y: functional.cross_entropy(model(x), y, reduction="none"),
                x[part], y[part],
            )  # fmt: skip
    except PrivacyError as problem:
        return {"refused": str(problem)}
    return {
        "gradients": [p.grad.flatten().tolist() for p in model.parameters() if p.grad is not None],
        "weights": [p.flatten().tolist() for p in model.parameters()],
        "clip": private.clip,
        "events": [event.to_dict() for event in private.record.events],
    }


def scenarios(rank: int | None) -> dict[str, Any]:
    """What every process does, in the same order."""
    part = slice(0, 8) if rank is None else PART[rank]
    empty = slice(0, 8) if rank is None else (slice(0, 8), slice(0, 0))[rank]
    key = bytes([rank or 0] * 32)
    found = {
        "plain": step(rank, part),
        "layered": step(rank, part, per_layer=True, micro_batch=2),
        "empty": step(rank, empty),
        "noised": step(rank, part, noise_multiplier=1.5, noise=Noise(key=key, compiled=False)),
        "adaptive": step(
            rank, part, steps=3, noise_multiplier=0.5, noise=Noise(key=key, compiled=False),
            adaptive=AdaptiveClip(count_noise=0.5),
        ),
        "too_large": step(rank, part, noise_multiplier=1e-9),
    }  # fmt: skip
    if rank is not None:
        sampler = PoissonSampler((5, 3)[rank], 0.25)
        shuffled = ShuffledSampler(4, 2)
        found |= {
            "poisson": step(rank, part, noise_multiplier=1.0, sampling=sampler.sampling),
            "shuffled": step(rank, part, sampling=shuffled.sampling),
            "mixed": step(
                rank, part, sampling=Sampling("poisson", 5, rate=(0.25, 0.5)[rank])
            ),
            "other_clip": step(rank, part, clip=(0.8, 0.9)[rank]),
        }  # fmt: skip
    return found


def main() -> None:
    """Join the other process, and print."""
    rank, store = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    sys.stdout.write(json.dumps(scenarios(rank)) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
