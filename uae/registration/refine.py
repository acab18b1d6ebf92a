"""Rigid refinement inside the overlap by mutual information, started from the embedding's transform.

The embedding's cells are 4 mm wide and its rigid is some millimetres off; planning needs 1-2 mm. Mutual information is
accurate close to the answer and wrong far from it, so a result that moves far is discarded, never trusted.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk

from uae.progress import Cancel, Progress, check_cancel, report
from uae.registration.masks import inside
from uae.registration.rigid import arun, box_corners
from uae.transform import Affine, Rigid
from uae.volume import Geometry, Volume, resample

log = logging.getLogger(__name__)

MAX_MOVED_MM = 10.0  # contract, section 7
MAX_TURNED_DEG = 5.0
WORKING_SPACING_MM = 1.5  # finer voxels cost time and add no accuracy to a rigid fit over a whole overlap
BINS = 32  # our measurement, as the sampled share and the two levels
SAMPLED_SHARE = 0.2
MAX_SAMPLES = 60_000  # keeps the step at seconds for large overlaps
MIN_VOXELS = 2_000  # a joint histogram of 32 x 32 bins needs a few samples a bin
CT_WINDOW_HU = (
    -300.0,
    400.0,
)  # fat to trabecular bone: over the whole range of CT, 32 bins would not tell soft tissues apart
MR_PERCENTILES = (0.5, 99.5)
LEVELS_MM = (3.0, 0.0)  # smoothing of the two levels


@dataclass(frozen=True)
class RefineResult:
    """Outcome of a refinement.

    transform: the refined transform where `used`, else the initial one.
    moved_mm: movement of the worst corner of the overlap's body box; moved_deg: rotation; both of the attempt, also
        where it was discarded.
    used: whether `transform` is the refined one. failed: the refinement ran away or could not be computed, so the
        verdict is at most review.
    metric_before, metric_after: mutual information (higher is better), None where it was not computed.
    """

    transform: Affine
    moved_mm: float
    moved_deg: float
    used: bool
    reason: str
    failed: bool = False
    metric_before: float | None = None
    metric_after: float | None = None


def _window(volume: Volume, body: np.ndarray) -> Volume:
    """Clip intensities to where soft tissues differ; MR percentiles are taken inside `body`, bool (z, y, x)."""
    if volume.modality == "ct":
        low, high = CT_WINDOW_HU
    else:
        values = volume.array[body] if body.any() else volume.array.ravel()
        low, high = (float(v) for v in np.percentile(values, MR_PERCENTILES))
    return volume.replace(np.clip(volume.array, low, high))


def _working_grid(geometry: Geometry, points: np.ndarray) -> Geometry:
    """Grid along `geometry`'s axes around points (N, 3) mm, voxels not finer than WORKING_SPACING_MM."""
    index = geometry.mm_to_index(points)
    spacing = np.maximum(geometry.spacing, WORKING_SPACING_MM)
    first, last = np.maximum(index.min(axis=0) - 2, 0), np.minimum(index.max(axis=0) + 2, geometry.size - 1)
    size = np.maximum(np.floor((last - first) * geometry.spacing / spacing).astype(int) + 1, 1)
    return Geometry(tuple(size[::-1]), spacing, geometry.index_to_mm(first)[0], geometry.direction)


def _in_fixed_space(grid: Geometry, initial: Affine, points: np.ndarray) -> Geometry:
    """The same grid carried to fixed space by the rigid transform closest to `initial`, so its axes stay orthogonal.

    For a rigid initial transform resampling onto it only relabels voxels, so nothing is smoothed by interpolation.
    """
    closest = arun(initial.apply(points), points)
    return Geometry(grid.shape, grid.spacing, closest.apply(grid.origin[None])[0], closest.rotation @ grid.direction)


def _mask_on(mask: Volume | None, geometry: Geometry, transform: Affine | None = None) -> np.ndarray:
    """Bool (z, y, x): where a mask image is > 0 on another grid, met through a transform; everywhere without a mask."""
    if mask is None:
        return np.ones(geometry.shape, dtype=bool)
    return resample(mask, geometry, transform, fill=0.0, order=0).array > 0


def _mask_image(mask: np.ndarray, geometry: Geometry) -> sitk.Image:
    """SimpleITK mask image of a bool array."""
    return Volume(mask.astype(np.uint8), geometry).to_sitk()


def _method(fixed_mask: sitk.Image, moving_mask: sitk.Image) -> sitk.ImageRegistrationMethod:
    """Mattes mutual information inside both masks."""
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(numberOfHistogramBins=BINS)
    method.SetMetricFixedMask(fixed_mask)
    method.SetMetricMovingMask(moving_mask)
    method.SetInterpolator(sitk.sitkLinear)
    return method


@contextmanager
def _one_thread() -> Iterator[None]:
    """ITK on one thread: the order of parallel sums changes last digits, and one pair must have one result.

    The method's own setting does not reach the threads of its metric, so the process-wide one is borrowed.
    """
    threads = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)


def _matrix(transform: sitk.Transform) -> np.ndarray:
    """4x4 matrix of any linear SimpleITK transform, read off four points."""
    origin = np.array(transform.TransformPoint((0.0, 0.0, 0.0)))
    columns = [np.array(transform.TransformPoint(tuple(axis))) - origin for axis in np.eye(3)]
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = np.column_stack(columns), origin
    return matrix


def overlap_points(fixed: Geometry, moving: Geometry, initial: Affine, step_mm: float = 4.0) -> np.ndarray:
    """Points (N, 3) mm, a lattice of about `step_mm` in the fixed image, that `initial` carries into the moving one."""
    corners = initial.inverse().apply(moving.corners_mm())  # search only the box that the moving image can reach
    index = fixed.mm_to_index(corners)
    first, last = np.maximum(index.min(axis=0), -0.49), np.minimum(index.max(axis=0), fixed.size - 0.51)
    if (last <= first).any():
        return np.zeros((0, 3))
    axes = [
        np.linspace(lo, hi, max(2, int((hi - lo) * s / step_mm) + 1))
        for lo, hi, s in zip(first, last, fixed.spacing, strict=True)
    ]
    points = fixed.index_to_mm(np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3))
    return points[moving.contains(initial.apply(points))]


def refine_rigid(
    fixed: Volume,
    moving: Volume,
    initial: Affine,
    fixed_mask: Volume | None = None,
    moving_mask: Volume | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> RefineResult:
    """Refine a linear transform by a rigid correction that raises mutual information inside the bodies' overlap.

    Args:
        fixed: the scan that stays; its `modality` chooses the intensity window.
        moving: the other scan, likewise.
        initial: fixed -> moving; an affine keeps its stretches.
        fixed_mask: image > 0 inside the fixed body (any grid), None for everywhere.
        moving_mask: the same for the moving body.
        seed: of the sampled voxels; the same seed gives the same result to the last digit.
        progress: told the stage "refine".
        cancel: asked at every step of the optimiser.

    Returns:
        See RefineResult. Runaways beyond the contract's limits and failures come back as `used=False, failed=True` with
        the initial transform.

    Raises:
        CancelledError: the user stopped.
    """
    report(progress, "refine", 0.0)
    points = overlap_points(fixed.geometry, moving.geometry, initial)
    points = points[inside(fixed_mask, points)]
    points = points[inside(moving_mask, initial.apply(points))]
    if len(points) < 8:
        return RefineResult(initial, 0.0, 0.0, False, "the bodies do not overlap enough to refine", failed=True)
    fixed_grid = _working_grid(fixed.geometry, points)
    moving_grid = _in_fixed_space(_working_grid(moving.geometry, initial.apply(points)), initial, points)
    fixed_body, moving_body = _mask_on(fixed_mask, fixed_grid), _mask_on(moving_mask, moving_grid, initial)
    count = int(fixed_body.sum())
    if count < MIN_VOXELS or int(moving_body.sum()) < MIN_VOXELS // 4:
        return RefineResult(
            initial, 0.0, 0.0, False, f"the overlap holds only {count} voxels, too few to refine", failed=True
        )
    fixed_image = _window(resample(fixed, fixed_grid, antialias=True), fixed_body).to_sitk()
    moving_image = _window(resample(moving, moving_grid, initial, antialias=True), moving_body).to_sitk()
    share = min(SAMPLED_SHARE, MAX_SAMPLES / fixed_body.size)
    masks = _mask_image(fixed_body, fixed_grid), _mask_image(moving_body, moving_grid)
    corners = box_corners(points)
    center = corners.mean(axis=0)
    correction = sitk.Euler3DTransform()
    correction.SetCenter(center.tolist())
    method = _method(*masks)
    method.SetMetricSamplingStrategy(method.RANDOM)
    method.SetMetricSamplingPercentage(share, seed + 1)  # SimpleITK takes 0 for the wall clock
    method.SetOptimizerAsRegularStepGradientDescent(
        2.0, 0.01, 150, relaxationFactor=0.5, gradientMagnitudeTolerance=1e-8
    )
    # One radian moves the body by its radius: with this scale a step of the optimiser is a movement in millimetres.
    radius = float(np.sqrt(np.square(points - center).sum(axis=1).mean()))
    method.SetOptimizerScales([radius**2] * 3 + [1.0] * 3)
    method.SetShrinkFactorsPerLevel([1] * len(LEVELS_MM))
    method.SetSmoothingSigmasPerLevel(list(LEVELS_MM))
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
    method.SetInitialTransform(correction, True)
    if cancel is not None:
        method.AddCommand(sitk.sitkIterationEvent, lambda: method.StopRegistration() if cancel() else None)
    try:
        with _one_thread():
            method.Execute(fixed_image, moving_image)
            check_cancel(cancel)
            turn = _matrix(correction)
            refined = _compose(initial, turn)
            before, after = (_information(fixed_image, moving_image, masks, m) for m in (np.eye(4), turn))
    except RuntimeError as error:
        log.warning("refinement failed: %s", str(error).strip().splitlines()[-1])
        return RefineResult(
            initial, 0.0, 0.0, False, "mutual information could not be computed in the overlap", failed=True
        )
    moved = float(np.linalg.norm(refined.apply(corners) - initial.apply(corners), axis=1).max())
    turned = float(np.degrees(np.arccos(np.clip((np.trace(turn[:3, :3]) - 1.0) / 2.0, -1.0, 1.0))))
    report(progress, "refine", 1.0)
    log.info(
        "refinement: %.2f mm at the worst corner, %.2f degrees, mutual information %.4f -> %.4f",
        moved,
        turned,
        before,
        after,
    )
    if moved > MAX_MOVED_MM or turned > MAX_TURNED_DEG:
        reason = (
            f"the refinement moved a body corner by {moved:.1f} mm and turned by {turned:.1f} degrees "
            f"(limits {MAX_MOVED_MM:.0f} mm, {MAX_TURNED_DEG:.0f} degrees) and was discarded"
        )
        return RefineResult(initial, moved, turned, False, reason, True, before, after)
    if after <= before:
        return RefineResult(
            initial, moved, turned, False, "the refinement did not raise mutual information", False, before, after
        )
    return RefineResult(refined, moved, turned, True, "refined inside the overlap", False, before, after)


def _compose(initial: Affine, turn: np.ndarray) -> Affine:
    """Initial after turn (4x4), rigid where `initial` is."""
    matrix = initial.matrix @ turn
    return Rigid.from_rotation(matrix[:3, :3], matrix[:3, 3]) if isinstance(initial, Rigid) else Affine(matrix)


def _information(
    fixed: sitk.Image, moving: sitk.Image, masks: tuple[sitk.Image, sitk.Image], matrix: np.ndarray
) -> float:
    """Mutual information of two images under a 4x4 matrix, over all voxels of both masks."""
    method = _method(*masks)
    method.SetInitialTransform(Affine(matrix).to_sitk())
    return -float(method.MetricEvaluate(fixed, moving))
