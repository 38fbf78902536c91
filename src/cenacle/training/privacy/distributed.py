"""One private step by several processes of ``torch.distributed``, each with its own examples.

Every process clips its own examples. The clipped sums are added to the first process, which
alone adds the noise, once, and the result goes back to all: all processes step alike. What the
whole releases is what one process with all examples would have: its clipping norm and noise
multiplier, and Poisson sampling with the common rate, since every process draws from its part
of the data with a key of its own.

Formal guarantee: that of one process, **if every example is in the data of one process only**.
An example in the data of n processes counts n times, as n examples do. The processes trust each
other: the first sees sums without noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cenacle.training.privacy.noise import Noise
from cenacle.training.privacy.record import Sampling
from cenacle.training.privacy.refusals import PrivacyError

__all__ = ["Ranks"]

_KINDS = ("unknown", "poisson", "shuffled")


class Ranks:
    """The processes of a group.

    Args:
        group: a process group; ``dist.group.WORLD`` for all processes.

    Raises:
        PrivacyError: ``torch.distributed`` was not started.
    """

    def __init__(self, group: Any) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise PrivacyError(
                "there are no processes to work with",
                remedy="call torch.distributed.init_process_group first, or leave out group",
            )
        self.group = group
        self.size = dist.get_world_size(group)
        self.first = dist.get_rank(group) == 0
        self._source = dist.get_global_rank(group, 0) if group is not dist.group.WORLD else 0

    def start(self, model: nn.Module, sampling: Sampling) -> Sampling:
        """Give all the first process's parameters and buffers, and say how all sample.

        Poisson sampling of each part with one rate is Poisson sampling of the whole. Equal
        shuffled parts are the whole in batches of the sum. Anything else is unknown.

        Raises:
            PrivacyError: the models have other shapes.
        """
        tensors = [*model.parameters(), *model.buffers()]
        self._gather(
            [float(len(tensors)), *(float(n) for t in tensors for n in (-1, *t.shape))],
            "shapes of parameters and buffers",
        )
        with torch.no_grad():
            for tensor in tensors:
                dist.broadcast(tensor, self._source, group=self.group)
        mine = [
            float(_KINDS.index(sampling.kind) if sampling.kind in _KINDS else 0),
            *(float(v or 0) for v in (sampling.population, sampling.rate, sampling.batch_size)),
            float(sampling.secure),
        ]
        kinds, populations, rates, sizes, secure = zip(*self._all(mine), strict=True)
        safe, population = all(secure), int(sum(populations)) if all(populations) else None
        if set(kinds) == {1.0} and len(set(rates)) == 1:
            return Sampling("poisson", population, rate=sampling.rate, secure=safe)
        if set(kinds) == {2.0} and len(set(populations)) == len(set(sizes)) == 1:
            size = int(sum(sizes))
            return Sampling("shuffled", population, batch_size=size, secure=safe)
        return Sampling("unknown", population, secure=safe)

    def release(
        self,
        noise: Noise,
        pairs: Sequence[tuple[Tensor, Tensor | None]],
        within: float,
        *,
        settings: Sequence[float],
    ) -> tuple[float, bool]:
        """Add all sums to the first process's, and give every ``.grad`` its noised result.

        Args:
            noise: the first process's is used.
            pairs: parameters and their sums.
            within: this process's centred count of examples within the clipping norm.
            settings: clip, noise multiplier and expected batch, which must be the same in all.

        Returns:
            The count over all processes, and whether the noise that was used is secure.

        Raises:
            PrivacyError: in every process, if settings differ or the sum cannot be noised;
                nothing was written.
        """
        self._gather([*settings, float(len(pairs))], "clip, noise multiplier and expected batch")
        count = torch.tensor([within], dtype=torch.float64, device=self._device(pairs))
        dist.all_reduce(count, group=self.group)
        sums = [torch.zeros_like(p) if s is None else s for p, s in pairs]
        sums = self._together(sums, lambda flat: dist.reduce(flat, self._source, group=self.group))
        problem: PrivacyError | None = None
        if self.first:
            clip, multiplier, expected = settings
            try:
                noise.release(
                    [(p, s) for (p, _), s in zip(pairs, sums, strict=True)],
                    scale=multiplier * clip,
                    divisor=expected,
                )
            except PrivacyError as found:
                problem = found
        state = torch.tensor([float(problem is None), float(noise.secure)]).to(count.device)
        dist.broadcast(state, self._source, group=self.group)
        done, secure = state.tolist()
        if not done:
            raise problem or PrivacyError("the first process could not noise the sum")
        gradients = [
            p.grad if self.first and p.grad is not None else torch.empty_like(p) for p, _ in pairs
        ]
        gradients = self._together(
            gradients, lambda flat: dist.broadcast(flat, self._source, group=self.group)
        )
        for (p, _), gradient in zip(pairs, gradients, strict=True):
            p.grad = gradient
        return float(count), bool(secure)

    @staticmethod
    def _together(tensors: Sequence[Tensor], send: Callable[[Tensor], Any]) -> list[Tensor]:
        """Tensors after one collective for each type and device."""
        kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for place, tensor in enumerate(tensors):
            kinds.setdefault((tensor.dtype, tensor.device), []).append(place)
        out = list(tensors)
        for places in kinds.values():
            flat = torch.cat([tensors[place].detach().reshape(-1) for place in places])
            send(flat)
            parts = torch.split(flat, [tensors[place].numel() for place in places])
            for place, part in zip(places, parts, strict=True):
                out[place] = part.view(tensors[place].shape)
        return out

    def same_number(self, value: float) -> float:
        """The first process's number, in all."""
        box = torch.tensor([value], dtype=torch.float64, device=self._default())
        dist.broadcast(box, self._source, group=self.group)
        return float(box)

    def _gather(self, values: Sequence[float], what: str) -> None:
        lengths = self._all([float(len(values))])
        if len({tuple(one) for one in lengths}) > 1 or len(set(map(tuple, self._all(values)))) > 1:
            raise PrivacyError(
                f"the processes differ in their {what}",
                expected="the same in every process",
                remedy="make the model and the private engine alike in every process",
            )

    def _all(self, values: Sequence[float]) -> list[list[float]]:
        mine = torch.tensor(values, dtype=torch.float64, device=self._default())
        found = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(found, mine, group=self.group)
        return [one.tolist() for one in found]

    def _default(self) -> torch.device:
        nccl = dist.get_backend(self.group) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")

    def _device(self, pairs: Sequence[tuple[Tensor, Tensor | None]]) -> torch.device:
        return pairs[0][0].device if pairs else self._default()
