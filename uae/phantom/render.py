"""From tissues to grey values: CT with noise and table, MR with bias field, Rician noise and thick slices."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from uae.geometry import Geometry
from uae.phantom.tissues import TISSUE, ct_table, mr_table

CT_STREAM, MR_STREAM = 21, 22


def _noise(rng: np.random.Generator, shape: tuple[int, ...], sigma: tuple[float, ...]) -> np.ndarray:
    """Gaussian noise of unit variance, correlated over `sigma` voxels, float32."""
    out = ndimage.gaussian_filter(rng.standard_normal(shape, dtype=np.float32), sigma, mode="wrap", truncate=3.0)
    return out / max(float(out.std()), 1e-6)


def _texture(rng: np.random.Generator, geometry: Geometry, millimetres: float) -> np.ndarray:
    """Noise correlated over some millimetres whatever the spacing."""
    return _noise(rng, geometry.shape, tuple(np.maximum(millimetres / geometry.spacing[::-1], 0.3)))


def _smooth_field(rng: np.random.Generator, geometry: Geometry, millimetres: float) -> np.ndarray:
    """A random field of unit size that changes over `millimetres`, (z, y, x) float32."""
    weights = [_spline_weights(n, millimetres / s) for n, s in zip(geometry.shape, geometry.spacing[::-1])]
    field = rng.standard_normal([w.shape[1] for w in weights]).astype(np.float32)
    for w in weights:
        # Each turn replaces the first axis and moves it to the end: after three the order is z, y, x again.
        field = np.tensordot(field, w, axes=(0, 1))
    return field / max(float(field.std()), 1e-6)


def _spline_weights(n: int, step: float) -> np.ndarray:
    """(n, K) cubic B-spline weights of knots every `step` voxels, float32."""
    at = np.arange(n) / step
    base = np.floor(at).astype(int)
    t = at - base
    out = np.zeros((n, int(base[-1]) + 4))
    for k, w in enumerate(((1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3)):
        out[np.arange(n), base + k] = w / 6
    return out.astype(np.float32)


def render_ct(
    tissues: np.ndarray, geometry: Geometry, seed: int, table: bool | None = None, noise: float = 1.0
) -> np.ndarray:
    """Hounsfield units of a tissue map.

    Args:
        tissues: (z, y, x) tissue numbers.
        geometry: their grid.
        seed: decides contrast agent, densities and noise.
        table: show the patient table; drawn from the seed where None.
        noise: factor on the scanner's noise.

    Returns:
        (z, y, x) float32 HU, at least -1024.
    """
    rng = np.random.default_rng([CT_STREAM, seed])
    means, spreads = (a.astype(np.float32) for a in ct_table(rng))
    image = means[tissues]
    image += spreads[tissues] * _texture(rng, geometry, 2.2)
    lung = tissues == TISSUE["lung"]
    if lung.any():
        # Gravity: the back of the lung of a supine patient is denser.
        height = np.linspace(-1.0, 1.0, geometry.shape[1], dtype=np.float32)[None, :, None]
        image += lung * (float(rng.uniform(20, 70)) * height)
    show = rng.random() < 0.6 if table is None else table
    if show:
        _add_table(image, tissues, geometry)
    image = ndimage.gaussian_filter(
        image, rng.uniform(0.45, 0.7, 3) * min(1.0, 2.0 / geometry.spacing.min()), truncate=3.0
    )
    image += noise * float(rng.uniform(6, 20)) * _texture(rng, geometry, 0.9)
    return np.maximum(image, -1024.0)


def _add_table(image: np.ndarray, tissues: np.ndarray, geometry: Geometry) -> None:
    """A curved carbon table some millimetres under the back."""
    outside = tissues == 0
    rows = np.flatnonzero((~outside).any(axis=(0, 2)))
    if rows.size == 0:
        return
    step = geometry.spacing
    middle = 0.5 * (geometry.shape[2] - 1)
    x = (np.arange(geometry.shape[2]) - middle) * step[0]
    bottom = (rows[-1] + 1) * step[1]
    y = np.arange(geometry.shape[1])[:, None] * step[1]
    depth = y - (bottom + 3.0 - 0.00030 * x**2)
    shell = ((depth > 0) & (depth < max(3.0, step[1]))) | ((depth > 20) & (depth < 20 + max(3.0, step[1])))
    shell &= np.abs(x) < 215
    core = (depth > 0) & (depth < 21) & (np.abs(x) < 215) & ~shell
    for mask, value in ((shell, -250.0), (core, -930.0)):
        image[outside & mask[None]] = value


def mr_values(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and texture of every tissue in this seed's MR, (T,) float32 each."""
    means, spreads = mr_table(np.random.default_rng([MR_STREAM, seed]))
    return means.astype(np.float32), spreads.astype(np.float32)


def mr_signal(tissues: np.ndarray, geometry: Geometry, seed: int) -> np.ndarray:
    """Noise-free relative signal with tissue texture, (z, y, x) float32."""
    means, spreads = mr_values(seed)
    rng = np.random.default_rng([MR_STREAM, seed, 1])
    return np.maximum(means[tissues] + spreads[tissues] * _texture(rng, geometry, 2.5), 0.0)


def finish_mr(signal: np.ndarray, geometry: Geometry, seed: int, slice_mm: float | None = None) -> np.ndarray:
    """Blur, coil shading, Rician noise and scanner scale.

    Args:
        signal: (z, y, x) relative signal.
        geometry: its grid.
        seed: decides all of it.
        slice_mm: thickness over which neighbouring slices are averaged; None: the spacing.

    Returns:
        (z, y, x) float32, arbitrary units from 0 to some hundreds.
    """
    rng = np.random.default_rng([MR_STREAM, seed, 2])
    image = ndimage.gaussian_filter(signal, (0.0, *rng.uniform(0.35, 0.6, 2)), truncate=3.0)
    if slice_mm is not None and slice_mm > geometry.spacing[2]:
        image = ndimage.uniform_filter1d(image, max(round(slice_mm / geometry.spacing[2]), 1), axis=0, mode="nearest")
    image *= np.exp(float(rng.uniform(0.08, 0.25)) * _smooth_field(rng, geometry, 180.0))
    level = float(rng.uniform(0.012, 0.04))
    real = image + level * rng.standard_normal(image.shape, dtype=np.float32)
    imaginary = level * rng.standard_normal(image.shape, dtype=np.float32)
    return np.hypot(real, imaginary) * float(rng.uniform(250.0, 1200.0))
