"""Tissue classes of a CT and the MR signal drawn from them.

The tables of this file are for validation only: weights trained elsewhere in the package must never have seen them, so
nothing under `uae.training` imports this module.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

AIR_HU = -1024.0
SOFT_HU = np.array([-20.0, 8.0, 25.0, 45.0, 68.0, 105.0, 170.0])
"""Centres (HU) of the soft-tissue bins: watery fat, fluid, bowel wall / plain blood, muscle, liver and spleen, enhanced
organ, enhanced blood. Common radiological ranges."""


@dataclass(frozen=True)
class ContrastTable:
    """Signal (1 = brightest common tissue) of one kind of sequence.

    `soft` belongs to the bins of SOFT_HU. `opposed_phase` cancels water and fat that share a voxel.
    """

    name: str
    air: float
    lung: float
    fat: float
    soft: tuple[float, ...]
    marrow: float
    cortical: float
    opposed_phase: bool = False


TABLES = (
    ContrastTable("t1", 0.01, 0.06, 0.95, (0.40, 0.22, 0.40, 0.43, 0.58, 0.38, 0.26), 0.62, 0.07),
    ContrastTable("t2", 0.01, 0.05, 0.72, (0.60, 0.98, 0.52, 0.22, 0.36, 0.62, 0.14), 0.46, 0.05),
    ContrastTable("t2_fat_saturated", 0.01, 0.06, 0.12, (0.35, 1.00, 0.58, 0.27, 0.44, 0.78, 0.22), 0.24, 0.04),
    ContrastTable("in_phase", 0.01, 0.05, 0.84, (0.42, 0.34, 0.48, 0.50, 0.62, 0.46, 0.56), 0.55, 0.08),
    ContrastTable("opposed_phase", 0.01, 0.05, 0.72, (0.42, 0.34, 0.50, 0.52, 0.64, 0.48, 0.58), 0.26, 0.08, True),
    ContrastTable("t1_enhanced_fat_saturated", 0.01, 0.07, 0.14, (0.22, 0.14, 0.45, 0.38, 0.66, 0.88, 1.0), 0.26, 0.05),
    ContrastTable("balanced", 0.01, 0.06, 0.66, (0.55, 0.95, 0.55, 0.20, 0.34, 0.58, 0.90), 0.34, 0.04),
)
"""Signals in the order of what the sequences show at 1.5 T; rounded by hand, not measured."""


@dataclass
class Tissue:
    """What a CT says about tissue, all arrays (z, y, x) on one grid.

    core: HU of the soft tissue around, noise and borders removed.
    fat, dark, lung: shares 0..1 of fat, of air-like content, and of lung within that air-like content.
    bone, cortical: mask of bones and share of hard bone inside them.
    spacing: (z, y, x) mm.
    """

    core: np.ndarray
    fat: np.ndarray
    dark: np.ndarray
    lung: np.ndarray
    bone: np.ndarray
    cortical: np.ndarray
    body: np.ndarray
    spacing: np.ndarray


def gaussian_mm(array: np.ndarray, sigma_mm: float, spacing: np.ndarray) -> np.ndarray:
    """Gaussian filter of `array` (z, y, x), sigma in mm; `spacing` (z, y, x) mm."""
    return ndimage.gaussian_filter(array, sigma_mm / spacing, mode="nearest", truncate=3.0)


def smooth_noise(shape: tuple[int, ...], spacing: np.ndarray, scale_mm: float, rng: np.random.Generator) -> np.ndarray:
    """Smooth random field (z, y, x) with unit standard deviation and a wavelength of about `scale_mm`.

    Drawn on a lattice of scale_mm and interpolated with cubic splines, so it costs little at any size.
    """
    extent = np.asarray(shape) * spacing
    lattice = rng.standard_normal(np.maximum(np.ceil(extent / scale_mm).astype(int) + 3, 4)).astype(np.float32)
    steps = spacing / scale_mm
    field_ = lattice
    for axis in range(3):
        where = 1.0 + (np.arange(shape[axis]) + 0.5) * steps[axis]
        field_ = np.moveaxis(np.tensordot(spline_weights(where, field_.shape[axis]), field_, (1, axis)), 0, axis)
    return (field_ / 0.33).astype(np.float32)


def spline_weights(where: np.ndarray, count: int) -> np.ndarray:
    """Cubic B-spline weights (len(where), count) of knots 0..count-1 at positions in knot units."""
    distance = np.abs(where[:, None] - np.arange(count)[None, :])
    near = 2.0 / 3.0 - distance**2 + distance**3 / 2.0
    far = np.clip(2.0 - distance, 0.0, None) ** 3 / 6.0
    return np.where(distance < 1.0, near, far).astype(np.float32)


def classify(hu: np.ndarray, body: np.ndarray, spacing: np.ndarray) -> Tissue:
    """Tissue shares of a CT.

    Args:
        hu: (z, y, x) HU.
        body: (z, y, x) bool, the patient without the table.
        spacing: (z, y, x) mm.

    Returns:
        Tissue on the same grid. Hounsfield ranges alone cannot tell enhanced blood from spongy bone: bone is what is
        connected to cortical bone within a few millimetres.
    """
    hu = np.clip(hu, -1024.0, 2000.0).astype(np.float32)
    denoised = gaussian_mm(hu, 1.0, spacing)
    bone = _bone(denoised, spacing)

    gas = denoised < -400.0
    near_gas = gaussian_mm(gas.astype(np.float32), 2.0, spacing) > 0.05
    soft = (denoised > -20.0) & (denoised < 350.0) & ~bone & body
    inner = ndimage.binary_erosion(soft)
    # Borders of soft tissue carry mixed Hounsfield values that would read as fluid; only inner voxels vote.
    weight = gaussian_mm(inner.astype(np.float32), 1.8, spacing)
    core = gaussian_mm(np.where(inner, hu, 0.0).astype(np.float32), 1.8, spacing) / np.maximum(weight, 1e-3)
    core = np.where(weight > 0.02, core, np.clip(denoised, 25.0, 170.0))

    fat = np.clip((core - denoised) / (core + 100.0), 0.0, 1.0)
    # Below fat a voxel holds gas; beside gas a value in the fat range is a mixture of gas and soft tissue, not fat.
    dark = np.clip((-150.0 - denoised) / 600.0, 0.0, 1.0)
    mixed = np.clip((core - denoised) / (core + 800.0), 0.0, 1.0)
    dark = np.where(near_gas, mixed, dark)
    fat = np.where(near_gas & (denoised > -400.0), 0.0, fat)
    lung = np.clip((denoised + 980.0) / 120.0, 0.0, 1.0)
    cortical = np.clip((denoised - 220.0) / 330.0, 0.0, 1.0)
    return Tissue(core, fat, dark, lung, bone, cortical, body, spacing)


def _bone(denoised: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Bones with their marrow: dense voxels (> 180 HU) joined to hard ones (> 420 HU), small gaps filled."""
    labels, count = ndimage.label(denoised > 180.0)
    if count == 0:
        return np.zeros(denoised.shape, bool)
    hard = np.bincount(labels.ravel(), denoised.ravel() > 420.0, count + 1)
    size = np.bincount(labels.ravel(), minlength=count + 1)
    keep = (hard > 0.02 * size) & (size * spacing.prod() > 60.0)
    keep[0] = False
    region = gaussian_mm(keep[labels].astype(np.float32), 3.0, spacing) > 0.35
    return region & (denoised > 60.0)


def signal(tissue: Tissue, table: ContrastTable) -> np.ndarray:
    """Signal (z, y, x) float32 of one table, without noise; air outside the body."""
    water = np.interp(tissue.core, SOFT_HU, table.soft).astype(np.float32)
    water_part, fat_part = (1.0 - tissue.fat) * water, tissue.fat * np.float32(table.fat)
    flesh = np.abs(water_part - fat_part) if table.opposed_phase else water_part + fat_part
    bone = table.marrow + tissue.cortical * (table.cortical - table.marrow)
    flesh = np.where(tissue.bone, bone, flesh)
    empty = table.air + tissue.lung * (table.lung - table.air)
    return np.where(tissue.body, flesh + tissue.dark * (empty - flesh), table.air).astype(np.float32)


def jitter(table: ContrastTable, rng: np.random.Generator, amount: float = 0.12) -> ContrastTable:
    """The table with every signal scaled by its own random factor (1 +- amount), as sequences differ between sites."""
    factors = rng.uniform(1.0 - amount, 1.0 + amount, 4 + len(table.soft))
    soft = tuple(float(value * factor) for value, factor in zip(table.soft, factors[4:], strict=True))
    return ContrastTable(
        table.name, table.air, table.lung * factors[0], table.fat * factors[1], soft,
        table.marrow * factors[2], table.cortical * factors[3], table.opposed_phase,
    )


def render(tissue: Tissue, rng: np.random.Generator, regional: bool) -> tuple[np.ndarray, list[str]]:
    """MR-like signal before the scanner's own effects.

    Args:
        tissue: classes on the CT's working grid.
        rng: source of all randomness.
        regional: let contrast vary by region independently of HU: two tables blended by a smooth random map, and soft
            tissue modulated on a scale of organs.

    Returns:
        (z, y, x) float32 signal and the names of the tables used.
    """
    chosen = rng.permutation(len(TABLES))[: 2 if regional else 1]
    images = [signal(tissue, jitter(TABLES[index], rng)) for index in chosen]
    image = images[0]
    shape, spacing = image.shape, tissue.spacing
    if regional:
        blend = 1.0 / (1.0 + np.exp(-3.0 * smooth_noise(shape, spacing, rng.uniform(40.0, 80.0), rng)))
        image = image + blend * (images[1] - image)
        image = image * np.exp(0.28 * smooth_noise(shape, spacing, rng.uniform(18.0, 35.0), rng))
    # Real organs are never flat: coils, perfusion and fibre give them texture that HU does not show.
    image = image * (1.0 + 0.05 * smooth_noise(shape, spacing, rng.uniform(6.0, 10.0), rng))
    return np.clip(image, 0.0, None).astype(np.float32), [TABLES[index].name for index in chosen]


def scanner_effects(image: np.ndarray, spacing: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Bias field, Rician noise and an arbitrary integer scale.

    Args:
        image: (z, y, x) signal on the MR grid, 1 = bright tissue.
        spacing: (z, y, x) mm.
        rng: source of all randomness.

    Returns:
        (z, y, x) float32, whole numbers as scanners store them.
    """
    bias = smooth_noise(image.shape, spacing, rng.uniform(110.0, 180.0), rng)
    image = image * np.exp(rng.uniform(0.12, 0.35) * bias)
    sigma = rng.uniform(0.015, 0.045)
    real = image + sigma * rng.standard_normal(image.shape, dtype=np.float32)
    imaginary = sigma * rng.standard_normal(image.shape, dtype=np.float32)
    return np.rint(np.hypot(real, imaginary) * rng.uniform(250.0, 1800.0)).astype(np.float32)


def ct_effects(image: np.ndarray, spacing: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Another reconstruction of a CT: sharpness and correlated noise of a softer or harder kernel.

    Args:
        image: (z, y, x) HU on the scan's grid.
        spacing: (z, y, x) mm.
        rng: source of all randomness.

    Returns:
        (z, y, x) float32, whole HU from AIR_HU.
    """
    image = gaussian_mm(image, rng.uniform(0.0, 0.8), spacing)
    noise = gaussian_mm(rng.standard_normal(image.shape, dtype=np.float32), rng.uniform(0.5, 1.2), spacing)
    noise *= rng.uniform(10.0, 40.0) / max(float(noise.std()), 1e-6)
    return np.maximum(np.rint(image + noise), AIR_HU).astype(np.float32)
