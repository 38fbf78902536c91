"""Randomness by key: every draw depends on the recipe's seed and its place, on nothing else.

No global generator is read or moved. Because the draws of an epoch or step are named
rather than taken from a running stream, training resumes anywhere with the same numbers
and a checkpoint holds no generator state. This is for reproducible training only; it is
neither secret nor cryptographic.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final

import numpy as np
import rfc8785

from cenacle.errors import EnclaveError

if TYPE_CHECKING:
    import torch

__all__ = ["numpy_generator", "secret_state", "torch_generator"]

_WORDS: Final = 624
_LEFT, _STATE, _SIZE = 8, 24, 5056
"""Where torch keeps the Mersenne Twister's count and its words (of 8 bytes each) in a state."""


def _key(seed: int, place: tuple[str | int, ...]) -> bytes:
    return hashlib.sha256(rfc8785.dumps(["cenacle/training", seed, *place])).digest()


def numpy_generator(seed: int, *place: str | int) -> np.random.Generator:
    """A Philox generator (Salmon et al. 2011) keyed by ``seed`` and ``place``."""
    key = int.from_bytes(_key(seed, place)[:16], "big")
    return np.random.Generator(np.random.Philox(key=key))


def torch_generator(seed: int, *place: str | int) -> torch.Generator:
    """A CPU generator seeded from ``seed`` and ``place``."""
    from cenacle.training._torch import torch as framework  # noqa: PLC0415 - torch is optional

    generator = framework.Generator(device="cpu")
    generator.manual_seed(int.from_bytes(_key(seed, place)[:8], "big"))
    return generator


def secret_state(secret: str, *place: str | int) -> torch.Tensor:
    """A state for a CPU generator of torch whose draws nobody without the secret can guess.

    A seed is not enough: of its 64 bits torch uses 32, so whoever has something to compare with
    can try them all. Here all 624 words of the Mersenne Twister (Matsumoto and Nishimura 1998) come
    from SHAKE-256 of the secret. Its draws are not cryptographic: many of them in a row tell the
    others.

    Args:
        secret: of 128 bits at least, as text.

    Raises:
        EnclaveError: this torch keeps its state in another form.
    """
    from cenacle.training._torch import torch as framework  # noqa: PLC0415 - torch is optional

    generator = framework.Generator(device="cpu").manual_seed(0)
    state = generator.get_state().numpy().copy()
    words = np.frombuffer(
        hashlib.shake_256(rfc8785.dumps(["cenacle/secret", secret, *place])).digest(4 * _WORDS),
        dtype="<u4",
    )
    if state.size != _SIZE or state[_LEFT : _LEFT + 4].view(np.int32)[0] != 1:
        raise EnclaveError(
            "this version of torch keeps the state of its generator in an unknown form",
            found=f"{state.size} bytes",
            expected=f"{_SIZE} bytes",
            remedy="install the version that this package was tested with",
        )
    state[_STATE : _STATE + 8 * _WORDS].view(np.uint64)[:] = words
    return framework.from_numpy(state)
