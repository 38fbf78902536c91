"""Noise for gradients: on several threads, from one keystream."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from cenacle.training.privacy.gaussian import BLOCK, add_noise, normals
from cenacle.training.privacy.keystream import Keystream
from cenacle.training.privacy.refusals import PrivacyError

__all__ = ["Noise"]


class Noise:
    """Adds Gaussian noise to sums; see :mod:`gaussian` and :mod:`keystream`.

    Args:
        key: 32 bytes that determine everything, for tests alone; the record then says that
            the noise was not secret.
        terms: normal samples that are summed to one (Holohan and Braghin 2021).
    """

    def __init__(self, *, key: bytes | None = None, terms: int = 2) -> None:
        if terms < 1:
            raise PrivacyError("terms cannot be used", found=terms, expected="1 or more")
        self.stream = Keystream(key)
        self.terms = terms

    @property
    def secure(self) -> bool:
        """Whether the key is fresh and secret."""
        return self.stream.secure

    def number(self) -> float:
        """One standard normal sample."""
        return float(normals(self.stream, 1, terms=self.terms)[0])

    def release(
        self,
        pairs: Sequence[tuple[Tensor, Tensor | None]],
        *,
        scale: float,
        divisor: float,
    ) -> None:
        """Write ``(sum + noise) / divisor`` into parameters' ``.grad``.

        Args:
            pairs: parameters with their sums, which are overwritten; ``None`` is a sum of zeros.
            scale: standard deviation of the noise; 0 adds none.
            divisor: the expected batch size.

        Raises:
            PrivacyError: a sum is not finite, or beyond 2^22 times the noise's scale;
                nothing was written.
        """
        sums = [torch.zeros_like(p) if s is None else s for p, s in pairs]
        if not scale:
            for (p, _), total in zip(pairs, sums, strict=True):
                p.grad = (total / divisor).to(p.dtype)
            return
        for total in sums:
            low, high = torch.aminmax(total) if total.numel() else (total.sum(), total.sum())
            if not max(-float(low), float(high)) < scale * 2.0**22:
                raise PrivacyError(
                    "the clipped sum cannot be noised exactly",
                    expected="finite, and below 2^22 times the noise's standard deviation",
                    remedy="use a larger noise multiplier or smaller batches",
                )
        flat = [_flat(total) for total in sums]
        chunks: list[list[tuple[Any, Any]]] = [[]]
        room = BLOCK
        for total in flat:
            begin = 0
            while begin < total.size:
                end = min(begin + room, total.size)
                chunks[-1].append((total[begin:end], total[begin:end]))
                room -= end - begin
                begin = end
                if not room:
                    chunks.append([])
                    room = BLOCK

        def work(pieces: list[tuple[Any, Any]]) -> None:
            add_noise(self.stream, pieces, scale=scale, divisor=divisor, terms=self.terms)

        threads = min(torch.get_num_threads(), len(chunks))
        if threads < 2 or not self.secure:  # with a given key the order decides the numbers
            for pieces in chunks:
                work(pieces)
        else:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(work, chunks))
        for (p, _), out in zip(pairs, flat, strict=True):
            p.grad = torch.from_numpy(out).view(p.shape).to(device=p.device, dtype=p.dtype)


def _flat(total: Tensor) -> Any:
    kind = torch.float64 if total.dtype == torch.float64 else torch.float32
    return total.detach().to(device="cpu", dtype=kind).contiguous().view(-1).numpy()
