"""Pairs of `uae bench deeds`: two images on one isotropic grid with the true map between them known everywhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from uae.bench.data import DataFolder
from uae.errors import InputError
from uae.preprocess import body_mask
from uae.simulate.contrast import classify, render, scanner_effects
from uae.simulate.pose import Placement, SetDefinition, random_displacement
from uae.transform import DisplacementField, Rigid
from uae.volume import Geometry, Volume, resample

SPACING_MM = 2.0
"""Working grid of CrossSAM."""
MAXIMUM_POINTS = 20_000
MAXIMUM_SHAPE = (192, 180, 180)
"""Largest grid (z, y, x): with it a pair has about the six million voxels of the measurements of the original."""
AIR_HU = -1024.0
PROBE_RMS_MM = 4.0
"""Of the field that is drawn first and then scaled to the wanted size; small enough to be drawn without folds."""
BREATH_MM = 22.0
"""Way of the diaphragm from end expiration to deep inspiration; quiet breathing moves it by 10-20 mm (Keall et al.,
AAPM TG-76, Med. Phys. 2006)."""
BREATH_RIM_MM = 14.0
"""Over this distance the motion fades from the lung into the chest wall."""


@dataclass
class DeedsPair:
    """Two images on the same grid, already aligned but for a deformation.

    Attributes:
        fixed: the image that stays.
        moving: the other one, on the same grid.
        moving_points: (N, 3) mm, body voxels of the moving image whose place lies inside the fixed one.
        fixed_points: (N, 3) mm, their true places.
        body: (z, y, x) bool, body in the fixed image.
        test: the volumes are for testing: reported, never used to choose a setting.
    """

    fixed: Volume
    moving: Volume
    moving_points: np.ndarray
    fixed_points: np.ndarray
    body: np.ndarray
    test: bool = False

    @property
    def initial_tre_mm(self) -> float:
        """Mean distance before any registration."""
        return float(np.linalg.norm(self.moving_points - self.fixed_points, axis=1).mean())


def _on_grid(volume: Volume, fill: float) -> Volume:
    """The volume on an isotropic grid of SPACING_MM with identity direction, its middle where it is too large."""
    low, high = volume.geometry.bounds_mm()
    size = np.minimum(np.floor((high - low) / SPACING_MM).astype(int), MAXIMUM_SHAPE[::-1])
    origin = (low + high) / 2.0 - (size - 1) / 2.0 * SPACING_MM
    grid = Geometry(tuple(int(n) for n in size[::-1]), np.full(3, SPACING_MM), origin, np.eye(3))
    return resample(volume, grid, fill=fill, antialias=True)


def _ct_on_grid(data: DataFolder, subject: str) -> Volume:
    ct = data.ct(subject)
    return _on_grid(ct.replace(np.clip(ct.array, AIR_HU, 3071.0)), AIR_HU)


def _bspline(grid: Geometry, body: np.ndarray, rms_mm: float, knot_mm: float, seed: int) -> DisplacementField:
    """Random smooth one-to-one displacement of the given RMS over the body."""
    inside = grid.index_to_mm(np.argwhere(body)[::50, ::-1].astype(np.float64))
    definition = SetDefinition("deeds", (0, 1), (0, 0), (rms_mm, rms_mm), (knot_mm, knot_mm))
    rng = np.random.default_rng(seed)
    for _ in range(100):
        drawn = random_displacement(Placement(grid, Rigid.identity(), 1.0, 0.0, "axial"), inside, definition, rng)
        if drawn is not None:
            return drawn[0]
    raise InputError(f"no deformation of {rms_mm} mm with knots of {knot_mm} mm without folds; use larger knots")


def _points(grid: Geometry, to_fixed: DisplacementField, body: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Body voxels of the moving image and their places in the fixed image, (N, 3) mm each."""
    moving = grid.grid_points_mm()
    fixed = to_fixed.apply(moving)
    index = np.rint(grid.mm_to_index(fixed)).astype(int)
    inside = np.flatnonzero(((index >= 0) & (index < grid.size)).all(axis=1))
    inside = inside[body[tuple(index[inside, ::-1].T)]]
    rng = np.random.default_rng(seed)
    if len(inside) > MAXIMUM_POINTS:
        inside = np.sort(rng.choice(inside, MAXIMUM_POINTS, replace=False))
    return moving[inside], fixed[inside]


def _pair(fixed: Volume, source: Volume, to_fixed: DisplacementField, body: np.ndarray, seed: int) -> DeedsPair:
    """The pair of a fixed image and `source`, which shows the same anatomy, carried along the map moving -> fixed."""
    moving = resample(source, fixed.geometry, to_fixed, fill=source.minimum)
    moving_points, fixed_points = _points(fixed.geometry, to_fixed, body, seed)
    return DeedsPair(fixed, moving, moving_points, fixed_points, body)


def _simulated_mr(data: DataFolder, subject: str, rms_mm: float, knot_mm: float, seed: int) -> DeedsPair:
    """A CT against an MR-like picture of it (regional contrast, bias, noise) with a random smooth deformation."""
    fixed = _ct_on_grid(data, subject)
    body = body_mask(fixed)
    spacing = fixed.geometry.spacing[::-1]
    to_fixed = _bspline(fixed.geometry, body, rms_mm, knot_mm, seed)
    rng = np.random.default_rng([seed, 1])
    signal, _ = render(classify(fixed.array, body, spacing), rng, regional=True)
    pair = _pair(fixed, Volume(signal, fixed.geometry, "mr"), to_fixed, body, seed)
    pair.moving = Volume(scanner_effects(np.asarray(pair.moving.array), spacing, rng), fixed.geometry, "mr")
    return pair


def known_deformation(data: DataFolder, subject: str, largest_mm: float, knot_mm: float, seed: int) -> DeedsPair:
    """A CT against an MR-like picture of it whose smooth deformation reaches `largest_mm` somewhere in the body.

    Args:
        data: the real volumes.
        subject: folder of the CT.
        largest_mm: length of the largest displacement.
        knot_mm: knot distance of the cubic spline.
        seed: fixes everything.

    Raises:
        InputError: no such CT, or no deformation of this size without folds.
    """
    probe = _simulated_mr(data, subject, PROBE_RMS_MM, knot_mm, seed)
    reached = float(np.linalg.norm(probe.moving_points - probe.fixed_points, axis=1).max())
    return _simulated_mr(data, subject, PROBE_RMS_MM * largest_mm / reached, knot_mm, seed)


def _lung(data: DataFolder, subject: str, seed: int) -> DeedsPair:
    """A CT against itself in another breath: the diaphragm moves, the chest wall stays, air dilutes, noise differs."""
    fixed = _ct_on_grid(data, subject)
    grid = fixed.geometry
    body = body_mask(fixed)
    lung = ndimage.binary_opening(body & (fixed.array < -500.0), iterations=2)
    if not lung.any():
        raise InputError(f"{subject} shows no lung; the pair needs a chest CT")
    planes = np.flatnonzero(lung.any(axis=(1, 2)))
    height = np.clip((planes[-1] - np.arange(grid.shape[0])) / (planes[-1] - planes[0]), 0.0, 1.0)
    share = height.astype(np.float32)[:, None, None]
    # Organs below the diaphragm follow it: what lies under the lung moves with its base.
    moving_part = lung | ((np.cumsum(lung[::-1], axis=0)[::-1] > 0) & body)
    weight = ndimage.gaussian_filter(moving_part.astype(np.float32), BREATH_RIM_MM / SPACING_MM) * share**1.5
    vectors = np.zeros((*grid.shape, 3), np.float32)
    vectors[..., 2] = BREATH_MM * weight
    vectors[..., 1] = -0.25 * BREATH_MM * weight
    to_fixed = DisplacementField(vectors, grid)
    pair = _pair(fixed, fixed, to_fixed, body, seed)
    # Inspired lung holds more air: 1/J of its tissue (Yin et al., Med. Phys. 2009).
    tissue = np.clip((pair.moving.array + 1000.0) / 1000.0, 0.0, None)
    inflated = (tissue * np.clip(to_fixed.jacobian_determinant(), 0.3, 3.0) - 1.0) * 1000.0
    values = np.where((pair.moving.array < -500.0) & (tissue > 0), inflated, pair.moving.array)
    rng = np.random.default_rng([seed, 1])
    values = values + 20.0 * rng.standard_normal(values.shape)
    pair.moving = Volume(np.clip(values, AIR_HU, 3071.0).astype(np.float32), grid, "ct")
    return pair


def _head(data: DataFolder, rms_mm: float, knot_mm: float, seed: int) -> DeedsPair:
    """The CT and T1 head templates of MNI space, the T1 carried along a random smooth deformation."""
    fixed = data.volume("head_mni_ctmr/ct_scct_2mm_smooth_cormack.nii.gz", "mr")  # not in HU: a transformed scale
    t1 = data.volume("head_mni_ctmr/mr_mni152_t1_2mm_head.nii.gz", "mr")
    fixed = _on_grid(fixed, 0.0)
    t1 = resample(t1, fixed.geometry, fill=0.0)
    body = (fixed.array > 1000.0) & (t1.array > 500.0)
    body = ndimage.binary_fill_holes(ndimage.binary_opening(body))
    pair = _pair(fixed, t1, _bspline(fixed.geometry, body, rms_mm, knot_mm, seed), body, seed)
    pair.test = True
    return pair


PAIRS: dict[str, Callable[[DataFolder], DeedsPair]] = {
    "abdomen_small": lambda data: _simulated_mr(data, "ct_mij_abdpelvis", 6.0, 50.0, 11),
    "abdomen_large": lambda data: _simulated_mr(data, "ct_mij_abdpelvis", 17.0, 110.0, 12),
    "chest_small": lambda data: _simulated_mr(data, "ct_lidc0001_chest", 6.0, 50.0, 13),
    "chest_large": lambda data: _simulated_mr(data, "ct_lidc0001_chest", 17.0, 110.0, 14),
    "lung": lambda data: _lung(data, "ct_lidc0001_chest", 15),
    "head": lambda data: _head(data, 6.0, 50.0, 16),
}
"""Name -> how it is made; fixed seeds. Knots and RMS: `hard` of the registration sets (5-10 mm, 36-60 mm) for the small
ones; the large ones have the initial error of the measurements of the original, about 16 mm."""


def make_pair(name: str, data: DataFolder) -> DeedsPair:
    """One pair of PAIRS.

    Raises:
        InputError: unknown name, or a volume is missing.
    """
    if name not in PAIRS:
        raise InputError(f"unknown pair {name!r}; use one of {', '.join(PAIRS)}")
    return PAIRS[name](data)
