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
        key: 32 bytes that determine everything, whatever the number of threads; unless
            ``secret``, for tests alone: the record then says that the noise was not secret.
        secret: the given key is known to nobody else, and no other noise has it.
        terms: normal samples that are summed to one (Holohan and Braghin 2021).
        compiled: use the compiled sampler where numba is. Importing and compiling it takes
            seconds, which a hundred million samples repay; the numbers are others.
    """

    def __init__(
        self,
        *,
        key: bytes | None = None,
        secret: bool = False,
        terms: int = 2,
        compiled: bool = True,
    ) -> None:
        if terms < 1:
            raise PrivacyError("terms cannot be used", found=terms, expected="1 or more")
        self.stream = Keystream(key, secret=secret)
        self.terms = terms
        self._compiled = compiled
        self._given = key is not None

    @property
    def secure(self) -> bool:
        """Whether the key is fresh and secret."""
        return self.stream.secure

    def number(self) -> float:
        """One standard normal sample."""
        return float(normals(self.stream, 1, terms=self.terms, compiled=self._compiled)[0])

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
        flat, whole = _flat(sums)
        for total in whole:
            low, high = torch.aminmax(torch.from_numpy(total))
            if not max(-float(low), float(high)) < scale * 2.0**22:
                raise PrivacyError(
                    "the clipped sum cannot be noised exactly",
                    expected="finite, and below 2^22 times the noise's standard deviation",
                    remedy="use a larger noise multiplier or smaller batches",
                )
        chunks: list[list[tuple[Any, Any]]] = [[]]
        room = BLOCK
        for total in whole:
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
            add_noise(
                self.stream,
                pieces,
                scale=scale,
                divisor=divisor,
                terms=self.terms,
                compiled=self._compiled,
            )

        threads = min(torch.get_num_threads(), len(chunks))
        if threads < 2 or self._given:  # with a given key the order decides the numbers
            for pieces in chunks:
                work(pieces)
        else:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(work, chunks))
        for (p, _), out in zip(pairs, flat, strict=True):
            p.grad = out.to(device=p.device, dtype=p.dtype)


def _flat(sums: Sequence[Tensor]) -> tuple[list[Tensor], list[Any]]:
    """The sums in the processor's memory, and flat arrays that hold them: small ones in one."""
    out: list[Tensor] = [torch.empty(0)] * len(sums)
    whole: list[Any] = []
    small: dict[Any, list[int]] = {}
    for place, total in enumerate(sums):
        if total.numel() < BLOCK:
            small.setdefault((total.dtype, total.device), []).append(place)
        else:
            out[place] = _plain(total)
            whole.append(out[place].view(-1).numpy())
    for places in small.values():
        joined = _plain(torch.cat([sums[place].reshape(-1) for place in places]))
        parts = torch.split(joined, [sums[place].numel() for place in places])
        for place, part in zip(places, parts, strict=True):
            out[place] = part.view(sums[place].shape)
        if joined.numel():
            whole.append(joined.numpy())
    return out, whole


def _plain(total: Tensor) -> Tensor:
    kind = torch.float64 if total.dtype == torch.float64 else torch.float32
    return total.detach().to(device="cpu", dtype=kind).contiguous()
