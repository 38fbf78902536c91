"""Three lines make a loop private: handwritten digits, a small network, Poisson batches.

Prints the accuracy, how many examples the batches had, and the events that an accountant
needs. Needs scikit-learn for the 8 x 8 digits (pip: cenacle[demo])::

    python examples/private_training.py
"""

from __future__ import annotations

import json
import sys

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from cenacle.training.privacy import PoissonSampler, batches, make_private


def main() -> None:
    """Train with differential privacy, and without."""
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(digits.target)
    torch.manual_seed(0)  # of weights alone: noise and batches are never seeded
    order = torch.randperm(len(x))
    test, train = order[:360], order[360:]

    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.Tanh(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.GroupNorm(8, 32), nn.Tanh(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)

    sampler = PoissonSampler(len(train), rate=0.1, steps=150)
    private = make_private(
        model,
        clip=1.0,
        noise_multiplier=1.5,
        expected_batch=sampler.expected_batch,
        sampling=sampler.sampling,
    )
    sizes = []
    for xb, yb in batches(sampler, x[train], y[train]):
        private.backward(lambda x, y: cross_entropy(model(x), y, reduction="none"), xb, yb)
        optimizer.step()
        sizes.append(len(xb))

    with torch.no_grad():
        accuracy = (model(x[test]).argmax(1) == y[test]).double().mean()
    print(f"accuracy {float(accuracy):.3f}")
    print(f"batches of {min(sizes)} to {max(sizes)} examples, {sampler.expected_batch:g} expected")
    print(json.dumps([event.to_dict() for event in private.record.events]))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
