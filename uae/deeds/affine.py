"""An affine start from the same descriptors: block matches in both directions, fitted by least trimmed squares.

The idea of linearBCV, which goes before deedsBCV (authors' code; its README).
"""

from __future__ import annotations

import logging

import numpy as np

from uae.deeds import fields
from uae.deeds.backend import Memory, Work
from uae.deeds.cost import ControlGrid, data_cost
from uae.deeds.inputs import Image
from uae.deeds.mind import NEUTRAL_WORD, mind_ssc, popcount
from uae.deeds.presets import Level, Preset, make_levels
from uae.transform import Affine
from uae.volume import Geometry

logger = logging.getLogger(__name__)

LEVELS = make_levels((7, 6, 5, 4), (5, 4, 3, 2), (4, 3, 2, 1))
"""Defaults of linearBCV."""
SMOOTHING = (0.5, 1.0, 0.5)
"""Weights with which the costs of neighbouring blocks are added along each axis (linearBCV, made symmetric)."""
BEST_SHARE = 0.5
TRIMMING_ROUNDS = 15
"""Share of the blocks that give matches, and rounds in which the worse half of these is left out (linearBCV)."""
MIN_KNOWN = 0.5
"""Share of a block inside the field of view, and below it spread (in units of the image's own) of its values."""
MIN_SPREAD = 0.05
MIN_MATCHES = 24
"""Twice the twelve numbers of an affine map."""
MAX_STRETCH = 1.5
"""Largest factor by which an axis may grow or shrink: more is no patient but a wrong fit."""


def hamming_distance(fixed: Image, moving: Image, q: int, backend: str) -> float:
    """Mean Hamming distance 0..60 of the descriptors where both images are valid; 60 where they share nothing."""
    one, other = (mind_ssc(image.values, q, valid=image.valid, backend=backend) for image in (fixed, moving))
    common = (one != NEUTRAL_WORD) & (other != NEUTRAL_WORD)
    return float(popcount(one[common] ^ other[common]).mean()) if common.any() else 60.0


def affine_step(
    fixed: Image, moving: Image, grid: Geometry, backend: str, cpu: str, work: Work
) -> tuple[Affine | None, float, float]:
    """An affine map X, fixed -> moving on the working grid, that makes the descriptors more alike.

    Args:
        fixed: on the working grid.
        moving: the same.
        grid: the working grid.
        backend: of descriptors and costs.
        cpu: of the warps.
        work: asked whether to stop.

    Returns:
        (X or None where it does not lower the mean Hamming distance, that distance before, after).
    """
    preset = Preset("affine", LEVELS, "defaults of linearBCV", alpha=1.0)
    found = Affine.identity()
    memory = Memory()
    for level in LEVELS:
        control = ControlGrid.over(fixed.values.shape, level.step)
        if min(control.counts) < 3:
            continue
        pairs = []
        for base, other, way in ((fixed, moving, found), (moving, fixed, found.inverse())):
            work.check()
            carried = _carried(other, way, grid, cpu, work)
            here, there = _matches(base, carried, control, level, preset, grid, backend, memory, work)
            # `carried` shows at x what `other` has at way(x).
            places = way.apply(there)
            pairs.append((here, places) if base is fixed else (places, here))
        points, targets = (np.concatenate(side) for side in zip(*pairs))
        fitted = _trimmed_fit(points, targets)
        if fitted is None:
            break
        found = fitted
    before = hamming_distance(fixed, moving, 2, backend)
    after = hamming_distance(fixed, _carried(moving, found, grid, cpu, work), 2, backend)
    accepted = after < before
    word = "used" if accepted else "not used"
    logger.info("affine start: mean Hamming distance %.2f -> %.2f, %s", before, after, word)
    return (found if accepted else None), before, after


def _carried(image: Image, way: Affine, grid: Geometry, backend: str, work: Work) -> Image:
    """The image at way(x) for every voxel x of the grid."""
    dense = np.empty((3, *grid.shape), np.float32)
    for plane in range(grid.shape[0]):
        points = grid.slab_points_mm(plane, plane + 1)
        moved = (way.apply(points) - points) / grid.spacing
        dense[:, plane] = moved[:, ::-1].T.reshape(3, *grid.shape[1:])
    values, valid = fields.warp(image.values, image.valid, dense, work=work, backend=backend)
    return Image(values, valid)


def _matches(
    base: Image, other: Image, control: ControlGrid, level: Level, preset: Preset, grid: Geometry, backend: str,
    memory: Memory, work: Work,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Centres (N, 3) mm of the blocks that match best, and where in `other` they do."""
    words = mind_ssc(base.values, level.mind_step, valid=base.valid, backend=backend, work=work)
    searched = mind_ssc(other.values, level.mind_step, valid=other.valid, backend=backend, work=work)
    cost = data_cost(words, searched, control, level, preset, backend=backend, memory=memory, work=work)
    smooth = cost.reshape(*control.counts, level.labels)
    for axis in range(3):
        before, after = (np.roll(smooth, shift, axis) for shift in (1, -1))
        np.moveaxis(before, axis, 0)[0] = np.moveaxis(smooth, axis, 0)[0]
        np.moveaxis(after, axis, 0)[-1] = np.moveaxis(smooth, axis, 0)[-1]
        smooth = SMOOTHING[0] * before + SMOOTHING[1] * smooth + SMOOTHING[2] * after
    smooth = smooth.reshape(control.nodes, level.labels)
    best = smooth.argmin(axis=1)
    value = smooth[np.arange(control.nodes), best]
    usable = np.flatnonzero(_informative(base, control))
    kept = usable[np.argsort(value[usable], kind="stable")[: int(BEST_SHARE * len(usable))]]
    place = np.stack(np.meshgrid(*(control.voxel_positions(axis) for axis in range(3)), indexing="ij"), axis=-1)
    here = place.reshape(-1, 3)[kept]
    steps = np.stack(np.unravel_index(best[kept], (level.side,) * 3), axis=1) - level.radius
    there = here + steps * level.quantisation
    return grid.index_to_mm(here[:, ::-1]), grid.index_to_mm(there[:, ::-1])


def _informative(image: Image, control: ControlGrid) -> np.ndarray:
    """Bool (nodes,): blocks inside the field of view that show something."""
    step = control.step
    nz, ny, nx = control.counts
    shape = (nz, step, ny, step, nx, step)
    known = control.crop(image.valid).reshape(shape).mean(axis=(1, 3, 5))
    spread = control.crop(image.values).reshape(shape).std(axis=(1, 3, 5))
    return ((known >= MIN_KNOWN) & (spread > MIN_SPREAD * float(image.values.std()))).ravel()


def _trimmed_fit(points: np.ndarray, targets: np.ndarray) -> Affine | None:
    """Affine map of points (N, 3) to targets (N, 3) mm that fits the better half, None where there is no sane one."""
    if len(points) < MIN_MATCHES:
        return None
    design = np.column_stack([points - points.mean(axis=0), np.ones(len(points))])
    kept = np.ones(len(points), bool)
    for _ in range(TRIMMING_ROUNDS):
        solution, *_ = np.linalg.lstsq(design[kept], targets[kept], rcond=None)
        residual = np.linalg.norm(design @ solution - targets, axis=1)
        kept = residual <= np.median(residual)
    matrix = np.eye(4)
    matrix[:3, :3] = solution[:3].T
    matrix[:3, 3] = solution[3] - matrix[:3, :3] @ points.mean(axis=0)
    stretches = np.linalg.svd(matrix[:3, :3], compute_uv=False)
    sane = stretches.max() < MAX_STRETCH and stretches.min() > 1 / MAX_STRETCH and np.linalg.det(matrix[:3, :3]) > 0
    return Affine(matrix) if sane else None
