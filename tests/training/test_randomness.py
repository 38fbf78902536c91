"""Draws by key, and first weights that nobody can find by trying seeds."""

from __future__ import annotations

import pytest
import torch

from cenacle.errors import EnclaveError
from cenacle.training.randomness import secret_state


def _drawn(secret: str, *place: str | int) -> torch.Tensor:
    generator = torch.Generator()
    generator.set_state(secret_state(secret, *place))
    return torch.rand(200_000, generator=generator)


def test_torch_uses_half_of_a_seed() -> None:
    """Why a secret does not become a seed."""
    one, two = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5 + (1 << 32))
    assert torch.equal(torch.rand(9, generator=one), torch.rand(9, generator=two))


def test_draws_follow_from_the_secret_and_the_place() -> None:
    found = _drawn("a", "weights", 1)
    assert torch.equal(found, _drawn("a", "weights", 1))
    for other in (_drawn("b", "weights", 1), _drawn("a", "weights", 2), _drawn("a")):
        assert not torch.equal(found[:9], other[:9])
    assert abs(float(found.mean()) - 0.5) < 5 * (1 / 12 / len(found)) ** 0.5
    assert abs(float(found.var()) - 1 / 12) < 0.002


def test_all_words_of_the_state_differ() -> None:
    words = [secret_state(s).numpy()[24 : 24 + 8 * 624].view("uint64") for s in ("a", "b")]
    assert all(len(set(one.tolist())) > 620 and int(one.max()) < 1 << 32 for one in words)
    assert (words[0] != words[1]).sum() > 620


def test_another_form_of_states_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(torch.Generator):
        def get_state(self) -> torch.Tensor:
            return super().get_state()[:16].clone()

    monkeypatch.setattr(torch, "Generator", Other)
    with pytest.raises(EnclaveError, match="unknown form"):
        secret_state("a")
