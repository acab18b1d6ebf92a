"""Contrast augmentation: a CT patch as a CT, or as an MR that never was (aggressive contrast augmentation, UAE-M0).

All functions take and return float32 tensors (z, y, x) and draw from one numpy generator, so that a step is repeated
exactly from its seed. The contrast here is random; no table of the validation simulator is used.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from uae.preprocess import SOFT_TISSUE_KNOTS

LEVELS = 2048
HU_STEP = 1.5
HU_LOW = -1024.0
RANDOM_MAP_KNOTS = np.array(
    [-1024, -930, -820, -650, -400, -200, -120, -80, -40, -10, 15, 40, 65, 95, 140, 220, 400, 800, 2000], dtype=float
)
"""HU places of the random contrast curve, denser in soft tissue (our choice)."""

Rng = np.random.Generator


def lookup(image: Tensor, table: np.ndarray) -> Tensor:
    """Read a curve sampled every HU_STEP from -1024 HU at HU + 1024 values `image`."""
    index = (image * (1.0 / HU_STEP)).round_().clamp_(0, LEVELS - 1).to(torch.int32)
    return torch.from_numpy(table.astype(np.float32))[index]


def _grid_hu() -> np.ndarray:
    return HU_LOW + HU_STEP * np.arange(LEVELS)


_HU = _grid_hu()
_CT_TABLE = np.interp(_HU, *np.transpose(SOFT_TISSUE_KNOTS))


def smooth_field(rng: Rng, shape: tuple[int, ...], cells: float) -> Tensor:
    """Smooth random field of about unit variance whose features span `cells` voxels."""
    size = [max(int(np.ceil(n / cells)) + 2, 3) for n in shape]
    coarse = torch.from_numpy(rng.standard_normal(size).astype(np.float32))[None, None]
    return F.interpolate(coarse, size=tuple(shape), mode="trilinear", align_corners=True)[0, 0] * 1.4


def box_smooth(image: Tensor, width: int = 3) -> Tensor:
    """Mean over width^3 voxels, borders counted without padding."""
    return F.avg_pool3d(image[None, None], width, 1, width // 2, count_include_pad=False)[0, 0]


def noise(rng: Rng, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise from a seed drawn from `rng`."""
    generator = torch.Generator().manual_seed(int(rng.integers(1 << 62)))
    return torch.randn(tuple(shape), generator=generator)


def thick_slices(image: Tensor, axis: int, factor: float) -> Tensor:
    """Average along `axis` into slices `factor` times thicker, then interpolate back (partial volume)."""
    shape = list(image.shape)
    small = list(shape)
    small[axis] = max(round(shape[axis] / factor), 2)
    averaged = F.interpolate(image[None, None], size=tuple(small), mode="area")
    return F.interpolate(averaged, size=tuple(shape), mode="trilinear", align_corners=False)[0, 0]


def random_curve(rng: Rng) -> np.ndarray:
    """Non-monotone HU -> signal curve (LEVELS,): jittered knots, some dropped; air and cortical bone mostly dark."""
    knots = RANDOM_MAP_KNOTS.copy()
    gaps = np.diff(knots)
    knots[1:-1] += rng.uniform(-0.35, 0.35, len(knots) - 2) * np.minimum(gaps[:-1], gaps[1:])
    values = rng.uniform(0.0, 1.0, len(knots))
    if rng.random() < 0.9:
        values[knots < -750] = rng.uniform(0, 0.12)
        values[(knots >= -750) & (knots < -300)] = rng.uniform(0, 0.3)
    if rng.random() < 0.8:
        values[knots > 500] = rng.uniform(0, 0.25)
    keep = rng.random(len(knots)) > 0.35
    keep[[0, -1]] = True
    return np.interp(_HU, knots[keep], values[keep])


def ct_view(rng: Rng, image: Tensor) -> Tensor:
    """HU + 1024 (z, y, x) -> 0..1 through the soft-tissue map, with noise, blur and small shifts of the scale."""
    if rng.random() < 0.3:
        image = box_smooth(image)
    image = image * float(rng.uniform(0.97, 1.03)) + float(rng.uniform(-15, 15))
    if rng.random() < 0.6:
        image = image + noise(rng, image.shape) * float(rng.uniform(0, 30))
    if rng.random() < 0.3:
        image = thick_slices(image, int(rng.integers(3)), float(rng.uniform(1.2, 3.5)))
    return lookup(image, _CT_TABLE)


def mr_like_view(rng: Rng, image: Tensor) -> Tensor:
    """HU + 1024 (z, y, x) -> 0..1 signal with a random contrast by tissue and by region."""
    smoothing = rng.random()
    if smoothing < 0.7:
        image = box_smooth(image)
    if smoothing < 0.3:
        image = box_smooth(image)
    signal = lookup(image, random_curve(rng))
    if rng.random() < 0.6:
        weight = torch.sigmoid(smooth_field(rng, image.shape, float(rng.uniform(12, 40))) * float(rng.uniform(1, 5)))
        signal = signal * weight + lookup(image, random_curve(rng)) * (1 - weight)
    if rng.random() < 0.6:
        coarse = noise(rng, tuple(n // 2 for n in image.shape))[None, None]
        texture = F.interpolate(coarse, size=tuple(image.shape), mode="trilinear", align_corners=False)[0, 0]
        signal = signal * (1 + texture * lookup(image, rng.uniform(0, 0.25) * random_curve(rng)))
    return shade(rng, signal)


def real_mr_view(rng: Rng, image: Tensor) -> Tensor:
    """0..1 signal of a real or rendered MR -> the same under another monotone or inverted curve and shading."""
    values = np.sort(rng.uniform(0, 1, 6))
    values[0], values[-1] = 0.0, 1.0
    mix = rng.uniform(0, 1)
    curve = (1 - mix) * np.linspace(0, 1, 6) + mix * values
    if rng.random() < 0.2:
        curve = np.concatenate([[0.0], 1 - curve[1:]])
    table = np.interp(np.arange(LEVELS) / (LEVELS - 1), np.linspace(0, 1, 6), curve)
    return shade(rng, lookup(image * (HU_STEP * (LEVELS - 1)), table))


def shade(rng: Rng, signal: Tensor) -> Tensor:
    """Bias field, mid-frequency shading, thick slices, Rician noise, percentile window and gamma -> 0..1."""
    if rng.random() < 0.8:
        signal = signal * torch.exp(smooth_field(rng, signal.shape, 60.0) * float(rng.uniform(0, 0.35)))
    if rng.random() < 0.5:
        signal = signal * torch.exp(smooth_field(rng, signal.shape, 16.0) * float(rng.uniform(0, 0.2)))
    if rng.random() < 0.3:
        signal = box_smooth(signal)
    if rng.random() < 0.7:
        signal = thick_slices(signal, int(rng.integers(3)), float(rng.uniform(1.2, 4.0)))
    if rng.random() < 0.8:
        sigma = float(rng.uniform(0, 0.08))
        signal = torch.hypot(signal + noise(rng, signal.shape) * sigma, noise(rng, signal.shape) * sigma)
    sample = signal.reshape(-1)[::37]
    low, high = np.quantile(sample.numpy(), [rng.uniform(0, 0.02), rng.uniform(0.97, 1.0)])
    signal = ((signal - float(low)) / max(float(high - low), 1e-3)).clamp_(0, 1)
    return signal.pow(float(rng.uniform(0.7, 1.4)))
