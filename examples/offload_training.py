"""Train a small network while two worker processes that nobody trusts do the heavy algebra.

The loop is an ordinary one; one line around it sends convolutions and dense layers away,
disguised, and checks what comes back::

    python examples/offload_training.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from cenacle.accelerators import ProcessAccelerator
from cenacle.offload import offload


def pictures(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy pictures of one bar each, and whether it stands (1) or lies (0)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (count,), generator=generator)
    found = 0.3 * torch.randn(count, 1, 12, 12, generator=generator)
    for picture, label, place in zip(
        found[:, 0], labels, torch.randint(0, 12, (count,), generator=generator), strict=True
    ):
        bar = picture.T if label else picture
        bar[place] += 1
    return found, labels


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 6 * 6, 2),
    )


def train(model: nn.Module) -> list[float]:
    """Thirty steps of Adam; returns the losses."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for step in range(30):
        images, labels = pictures(32, seed=step)
        loss = functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    return losses


def main(folder: Path) -> None:
    torch.set_num_threads(1)  # leave the other cores to the workers
    plain, model = network(), network()
    expected = train(plain)
    workers = [ProcessAccelerator("one", threads=1), ProcessAccelerator("two", threads=1)]
    with offload(model, "permuted", workers) as session:
        found = train(model)
    session.profile.write_trace(folder / "trace.json")

    images, labels = pictures(500, seed=1000)
    with torch.no_grad():
        accuracy = (model(images).argmax(1) == labels).double().mean().item()
    print(f"last loss {found[-1]:.4f}, of the plain model {expected[-1]:.4f}")
    print(f"accuracy {accuracy:.3f}")
    print(session.profile.table())
    print(f"workers see inputs {session.leakage.inputs}, weights {session.leakage.weights}")
    print(f"timeline for Perfetto: {folder / 'trace.json'}")
    assert abs(found[-1] - expected[-1]) < 1e-2


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        main(Path.cwd())
