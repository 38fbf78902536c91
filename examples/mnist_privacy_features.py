"""Scattering features of grey pictures: what fixed wavelets see, before anything is learned.

The transform has no parameter that data could set, so it costs no privacy. Two orders of Morlet
wavelets (Mallat 2012, arXiv:1101.2286; Oyallon and Mallat 2015, arXiv:1412.8659) at two scales and
eight angles give 1 + 16 + 64 = 81 channels at a quarter of the picture's height and width. Filters,
border and order of channels are those of kymatio's ``Scattering2D(J=2)`` (Andreux et al. 2020,
arXiv:1812.11214), so that results of the literature compare.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["CHANNELS", "Scattering"]

ANGLES: Final = 8
CHANNELS: Final = 1 + 2 * ANGLES + ANGLES * ANGLES
"""Means, edges at two scales, and edges among the fine edges."""

_SLANT: Final = 4 / ANGLES
_COPIES: Final = range(-2, 3)
"""Of a filter, a period apart; what lies farther out is below float64's resolution."""


class Scattering:
    """The transform of pictures of one size, (height, width), both multiples of 4.

    It acts on each picture alone.
    """

    def __init__(self, height: int, width: int) -> None:
        if height % 4 or width % 4 or min(height, width) < 8:
            raise ValueError(f"sizes are multiples of 4 from 8 on, found {height} x {width}")
        size = (height + 8, width + 8)  # a border of 4 mirrors the picture
        self.fine, self.coarse = (_wavelets(size, scale) for scale in (0, 1))
        # The low-pass filter is a product of two lines, and few of its values are wanted: a matrix.
        self.blurs = [torch.kron(*(_blur(n, step) for n in size)).T for step in (4, 2)]
        self.shape = (height // 4, width // 4)

    def __call__(self, pictures: Tensor) -> Tensor:
        """Features, (B, 81, height / 4, width / 4) float32, of pictures (B, height, width)."""
        seen = torch.fft.fft2(pad(pictures.float().unsqueeze(1), (4, 4, 4, 4), mode="reflect"))
        fine = torch.fft.ifft2(seen * self.fine).abs()  # (B, 8, H, W): first order, fine
        coarse = torch.fft.ifft2(_folded(seen * self.coarse)).abs()  # (B, 8, H / 2, W / 2)
        found = [
            self._blurred(torch.fft.ifft2(seen).real, 0),
            self._blurred(fine, 0),
            self._blurred(coarse, 1),
        ]
        for each in torch.fft.fft2(fine).unbind(1):
            second = torch.fft.ifft2(_folded(each.unsqueeze(1) * self.coarse)).abs()
            found.append(self._blurred(second, 1))
        return torch.cat(found, 1)

    def _blurred(self, maps: Tensor, halved: int) -> Tensor:
        return (maps.flatten(-2) @ self.blurs[halved]).view(*maps.shape[:2], *self.shape)


def _folded(spectrum: Tensor) -> Tensor:
    """The spectrum of every second row and column."""
    height, width = spectrum.shape[-2] // 2, spectrum.shape[-1] // 2
    rows = spectrum[..., :height, :] + spectrum[..., height:, :]
    return (rows[..., :width] + rows[..., width:]) / 4


def _wavelets(size: tuple[int, int], scale: int) -> Tensor:
    """Spectra of Morlet wavelets, (8, *size) float32: waves under a long bell, of mean 0."""
    sigma, frequency = 0.8 * 2**scale, 0.75 * math.pi / 2**scale
    y, x = (_positions(n) for n in size)
    found = []
    for angle in range(ANGLES):
        theta = (ANGLES // 2 - 1 - angle) * math.pi / ANGLES
        along = math.cos(theta) * y[:, None] + math.sin(theta) * x
        across = math.cos(theta) * x - math.sin(theta) * y[:, None]
        bell = np.exp((along**2 + (_SLANT * across) ** 2) / (-2 * sigma**2))
        bell *= _SLANT / (2 * math.pi * sigma**2)
        wave = bell * np.exp(1j * frequency * along)
        wave -= bell * (wave.sum() / bell.sum())
        found.append(np.fft.fft2(_wrapped(_wrapped(wave, 0), 1)).real)
    return torch.tensor(np.stack(found), dtype=torch.float32)


def _blur(period: int, step: int) -> Tensor:
    """The low-pass filter along one axis and every ``step``-th value of it, without the border.

    Returns:
        (period / 4 - 2, period * step / 4): acts on the full picture, or on one of half the size.
    """
    sigma = 1.6
    line = np.exp(_positions(period) ** 2 / (-2 * sigma**2)) / (math.sqrt(2 * math.pi) * sigma)
    spectrum = np.fft.fft(_wrapped(line, 0)).real
    if step == 2:
        quarter = period // 4
        spectrum = np.concatenate([spectrum[:quarter], spectrum[-quarter:]])
    line = np.fft.ifft(spectrum).real
    rows = [np.roll(line[::-1], 1 + step * place) for place in range(1, period // 4 - 1)]
    return torch.tensor(np.stack(rows), dtype=torch.float32)


def _positions(period: int) -> NDArray[np.float64]:
    return np.arange(_COPIES.start * period, _COPIES.stop * period, dtype=np.float64)


def _wrapped(filter_: NDArray[Any], axis: int) -> NDArray[Any]:
    """Copies of a filter, a period apart, added up along one axis."""
    moved = np.moveaxis(filter_, axis, 0)
    total = moved.reshape(len(_COPIES), -1, *moved.shape[1:]).sum(0)
    return np.moveaxis(total, 0, axis)
