"""One simulated MR (or CT) scan of a real CT: placement, truth, signal, slices."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy import ndimage

from uae.errors import InputError
from uae.preprocess import body_mask
from uae.registration.rigid import arun
from uae.simulate.contrast import AIR_HU, classify, ct_effects, gaussian_mm, render, scanner_effects
from uae.simulate.pose import MINIMUM_BODY_SHARE, SETS, Placement, SetDefinition, propose, random_displacement
from uae.transform import Composite, Transform
from uae.volume import Geometry, Volume

MAXIMUM_POINTS = 20000
ATTEMPTS = 4000
DETAIL_VOXEL_MM = 2.0
"""CT detail of the hard set is smoothed in units of the network's 2 mm voxels."""


@dataclass
class SimulatedPair:
    """A CT and a simulated scan of the same patient with the exact truth.

    fixed: the CT as given. moving: the simulated scan on its own grid, modality 'mr' or 'ct'.
    fixed_to_moving, moving_to_fixed: exact inverses of each other inside the scan (0.02 mm).
    rigid_floor_mm: mean residual of the least-squares rigid fitted to the true places.
    moving_body_points: (N, 3) centres of its body voxels, mm (a random 20000 where there are more).
    fixed_body_points: (N, 3) their true places in the CT, mm.
    meta: seed, set, share, rotation_deg, rms_mm, knot_mm, body_share, tables, slice orientation.
    """

    fixed: Volume
    moving: Volume
    fixed_to_moving: Transform
    moving_to_fixed: Transform
    rigid_floor_mm: float
    moving_body_points: np.ndarray
    fixed_body_points: np.ndarray
    meta: dict = field(default_factory=dict)


def simulate_mr(ct: Volume, seed: int, set_name: str, body: np.ndarray | None = None) -> SimulatedPair:
    """Simulate an MR scan of a CT.

    Args:
        ct: the CT, HU, any grid.
        seed: with the set's name it fixes everything.
        set_name: 'standard15', 'standard30' or 'hard' (field of view, rotation, deformation of the benchmark's sets).
        body: (z, y, x) bool body mask of the CT where it is already known.

    Raises:
        InputError: unknown set, an image that is no CT, or a CT too small for the set's field of view.
    """
    return simulate_scan(ct, seed, set_name, "mr", body)


def simulate_scan(
    ct: Volume, seed: int, set_name: str, modality: str = "mr", body: np.ndarray | None = None
) -> SimulatedPair:
    """Simulate another scan of a CT: place, turn, field of view, slices and deformation are the same for both kinds.

    Args:
        ct: as in `simulate_mr`.
        seed: likewise.
        set_name: likewise.
        modality: 'mr', or 'ct' for another CT of the same patient: other noise and sharpness, air instead of a couch.
        body: as in `simulate_mr`.

    Raises:
        InputError: as `simulate_mr`, or unknown modality.
    """
    if set_name not in SETS:
        raise InputError(f"unknown set '{set_name}'; choose one of {', '.join(SETS)}")
    if modality not in ("mr", "ct"):
        raise InputError(f"cannot simulate a scan of modality '{modality}'; choose mr or ct")
    if ct.modality not in (None, "ct"):
        raise InputError(f"a simulated scan needs a CT, got modality '{ct.modality}'; pass a CT volume")
    definition = SETS[set_name]
    rng = np.random.default_rng([int(seed), list(SETS).index(set_name)])
    if body is None:
        body = body_mask(ct)
    if not body.any():
        raise InputError("no body found in the CT; check that its values are Hounsfield units")

    placement, truth, meta = _place(definition, ct, body, rng)
    grid = placement.geometry
    places = truth.apply(grid.grid_points_mm())
    is_body = _sample_mask(body, ct.geometry, places)
    chosen = np.flatnonzero(is_body)
    if len(chosen) > MAXIMUM_POINTS:
        chosen = np.sort(rng.choice(chosen, MAXIMUM_POINTS, replace=False))
    moving_points, fixed_points = grid.grid_points_mm()[chosen], places[chosen]
    fitted = arun(moving_points, fixed_points)
    floor = float(np.linalg.norm(fitted.apply(moving_points) - fixed_points, axis=1).mean())

    image, tables = _scan(ct, body, placement, truth, definition, modality, rng)
    meta |= {
        "seed": int(seed), "set": set_name, "share": placement.share, "rotation_deg": placement.rotation_deg,
        "slices": placement.slice_axis, "body_share": float(is_body.mean()), "tables": tables,
    }
    moving = Volume(image, grid, modality=modality, modality_reason="simulated")
    return SimulatedPair(ct, moving, truth.inverse(), truth, floor, moving_points, fixed_points, meta)


def _place(
    definition: SetDefinition, ct: Volume, body: np.ndarray, rng: np.random.Generator
) -> tuple[Placement, Transform, dict]:
    """Draw placements until one satisfies the set: its grid, the map moving -> fixed and figures."""
    for attempt in range(ATTEMPTS):
        # One angle is kept for many draws: otherwise flat CTs, where large turns rarely fit, would see small ones only.
        if attempt % (ATTEMPTS // 20) == 0:
            angle = rng.uniform(*definition.rotation_deg)
        placement = propose(definition, angle, body, ct.geometry, rng)
        if placement is None:
            continue
        rigid = placement.to_fixed.apply(_lattice(placement.geometry))
        is_body = _sample_mask(body, ct.geometry, rigid)
        if is_body.mean() <= MINIMUM_BODY_SHARE:
            continue
        if definition.rms_mm is None:
            return placement, placement.to_fixed, {}
        drawn = random_displacement(placement, rigid[is_body], definition, rng)
        if drawn is None:
            continue
        displacement, knot = drawn
        truth = Composite([placement.to_fixed, displacement])
        # The deformation moves body in and out of the box: the figures count at the final places.
        is_body = _sample_mask(body, ct.geometry, truth.apply(_lattice(placement.geometry)))
        rms = float(np.sqrt((displacement.displacement(rigid[is_body]) ** 2).sum(axis=1).mean()))
        if is_body.mean() > MINIMUM_BODY_SHARE and definition.rms_mm[0] <= rms <= definition.rms_mm[1]:
            return placement, truth, {"rms_mm": rms, "knot_mm": knot}
    raise InputError(
        f"no field of view of set '{definition.name}' fits into this CT (sides of 80 mm and more, "
        f"{definition.share[0]:.0%} of the body and more); use a larger CT"
    )


def _lattice(geometry: Geometry) -> np.ndarray:
    """About 8000 evenly spread points (N, 3) of a grid, mm: enough to judge shares to a percent."""
    axes = [np.linspace(0.0, count - 1.0, min(count, 20)) for count in geometry.shape]
    z, y, x = np.meshgrid(*axes, indexing="ij")
    return geometry.index_to_mm(np.stack([x.ravel(), y.ravel(), z.ravel()], axis=1))


def _sample_mask(mask: np.ndarray, geometry: Geometry, points: np.ndarray) -> np.ndarray:
    """Mask value (N,) bool of the voxel each point lies in; False outside."""
    index = np.rint(geometry.mm_to_index(points)).astype(np.int64)
    inside = np.all((index >= 0) & (index < np.array(geometry.shape[::-1])), axis=1)
    result = np.zeros(len(points), bool)
    x, y, z = index[inside].T
    result[inside] = mask[z, y, x]
    return result


def _work_grid(ct: Volume, body: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, Geometry]:
    """HU and body around `points` on the CT's axes, fine axes averaged in blocks to about 1.4 mm (MR has no more)."""
    geometry = ct.geometry
    block = np.maximum(np.floor(1.45 / geometry.spacing), 1).astype(int)
    index = geometry.mm_to_index(points)
    margin = np.ceil(12.0 / geometry.spacing)
    size = np.array(geometry.shape[::-1])
    first = np.clip(np.floor(index.min(axis=0) - margin), 0, size - 1).astype(int)
    last = np.clip(np.ceil(index.max(axis=0) + margin) + 1, first + 1, size).astype(int)
    count = np.maximum((last - first) // block, 1)
    block = np.minimum(block, last - first)
    last = first + count * block
    crop = tuple(slice(a, b) for a, b in zip(first[::-1], last[::-1], strict=True))
    parts = tuple(value for pair in zip(count[::-1], block[::-1], strict=True) for value in pair)
    hu = np.clip(ct.array[crop], AIR_HU, 3071.0).astype(np.float32).reshape(parts).mean(axis=(1, 3, 5))
    inside = body[crop].reshape(parts).mean(axis=(1, 3, 5)) > 0.5
    origin = geometry.index_to_mm((first + (block - 1) / 2.0)[None])[0]
    return hu, inside, Geometry(hu.shape, geometry.spacing * block, origin, geometry.direction)


def _scan(
    ct: Volume, body: np.ndarray, placement: Placement, truth: Transform, definition: SetDefinition, modality: str,
    rng: np.random.Generator,
) -> tuple[np.ndarray, list[str]]:
    """Voxels (z, y, x) of the placed scan and the names of its contrast tables (none for a CT)."""
    grid = placement.geometry
    corners = truth.apply(_lattice(grid))
    hu, inside, work = _work_grid(ct, body, corners)
    spacing = work.spacing[::-1]
    if definition.rms_mm is not None:
        hu = ndimage.median_filter(hu, 3)
        hu = gaussian_mm(hu, rng.uniform(0.8, 1.5) * DETAIL_VOXEL_MM, spacing)
    tables: list[str] = []
    if modality == "ct":
        signal, outside = np.where(inside, hu, AIR_HU), AIR_HU
    else:
        tissue = classify(hu, inside, spacing)
        (signal, tables), outside = render(tissue, rng, regional=definition.rms_mm is not None), 0.0

    # Thick slices: the signal, not the HU, is averaged over a slice profile with the slice's thickness as its FWHM.
    thickness = grid.spacing[2]
    per_slice = int(np.ceil(thickness / 1.5))
    offsets = (np.arange(3 * per_slice) - (3 * per_slice - 1) / 2.0) / per_slice
    profile = np.exp(-4.0 * np.log(2.0) * offsets**2)
    profile = profile / profile.sum()
    planes = (grid.shape[0] + 2) * per_slice
    image = np.zeros(grid.shape, np.float32)
    y, x = np.meshgrid(np.arange(grid.shape[1]), np.arange(grid.shape[2]), indexing="ij")
    flat = np.stack([x.ravel(), y.ravel(), np.zeros(x.size)], axis=1).astype(np.float64)
    for plane in range(planes):
        flat[:, 2] = -1.0 + (plane + 0.5) / per_slice - 0.5
        index = work.mm_to_index(truth.apply(grid.index_to_mm(flat)))
        values = ndimage.map_coordinates(signal, index.T[::-1], order=1, mode="constant", cval=outside, prefilter=False)
        values = values.reshape(grid.shape[1:])
        for k in range(max(0, plane // per_slice - 2), min(grid.shape[0], plane // per_slice + 1)):
            image[k] += np.float32(profile[plane - k * per_slice]) * values
    effects = ct_effects if modality == "ct" else scanner_effects
    return effects(image, grid.spacing[::-1], rng), tables
