"""Numbers that describe how good a match or a registration is.

Each function says which clinical question it answers and whether it may fail a case (after AAPM TG-132 as commonly
quoted). Points are millimetres, LPS, float64, (N, 3); arrays are (z, y, x).
"""

from __future__ import annotations

import numpy as np

from uae.errors import InputError
from uae.transform import DisplacementField, Transform

CPM_MM = 10.0  # the field's customary limit


def _distances(estimated: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Euclidean distances (N,) mm of paired points (N, 3)."""
    estimated, truth = np.asarray(estimated, dtype=np.float64), np.asarray(truth, dtype=np.float64)
    if estimated.shape != truth.shape or estimated.ndim != 2 or estimated.shape[1] != 3 or not len(truth):
        raise InputError(f"paired points must be two non-empty (N, 3) lists, not {estimated.shape} and {truth.shape}")
    return np.linalg.norm(estimated - truth, axis=1)


def _summary(values: np.ndarray) -> dict[str, float]:
    """Mean, standard deviation, median, 95th percentile and maximum, in the unit of the values."""
    return {
        "mean": float(values.mean()),
        "std": float(values.std()),
        "median": float(np.median(values)),
        "p95": float(np.percentile(values, 95)),
        "max": float(values.max()),
    }


def tre(transform: Transform, fixed_points: np.ndarray, moving_points: np.ndarray) -> dict[str, float]:
    """Target registration error: how far does a structure of the moving scan lie from its place after alignment?

    May fail a case: mean and maximum should stay within the larger voxel dimension, about 2-3 mm (1 mm stereotactic).
    The points must not have been used for the fit.

    Args:
        transform: fixed -> moving.
        fixed_points: (N, 3) mm.
        moving_points: (N, 3) mm, the same places in the moving scan.

    Returns:
        mean, std, median, p95, max of the distances in mm, measured in moving space.

    Raises:
        InputError: no points, or lists of different lengths.
    """
    return _summary(_distances(transform.apply(fixed_points), moving_points))


def med(estimated: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Mean Euclidean distance of matched landmarks: how far is a found point from where an expert puts it?

    Describes a method over many cases; may not fail a single case (an expert's own repeat error is 2-4 mm).

    Args:
        estimated: (N, 3) mm.
        truth: (N, 3) mm.

    Returns:
        mean, std, median, p95, max in mm; x (left-right), y (anterior-posterior), z (cranio-caudal): mean absolute
        differences per axis.

    Raises:
        InputError: no points, or lists of different lengths.
    """
    distances = _distances(estimated, truth)
    per_axis = np.abs(np.asarray(estimated, dtype=np.float64) - np.asarray(truth, dtype=np.float64)).mean(axis=0)
    return {**_summary(distances), **{axis: float(value) for axis, value in zip("xyz", per_axis, strict=True)}}


def cpm(
    estimated: np.ndarray,
    truth: np.ndarray,
    limit_mm: float = CPM_MM,
    radius_mm: np.ndarray | None = None,
    size_mm: np.ndarray | None = None,
) -> dict[str, float]:
    """Correct point matches: what share of lesions or landmarks is found?

    Describes a method over many cases; may not fail a single case. The two published evaluation scripts differ, so both
    are given. DLT, the strict one: distance <= min(radius, limit), and < radius (half of the longest RECIST diameter).
    TLT, the lenient one: distance < min(limit, size), and < size (diagonal of the lesion's 3-D box).

    Args:
        estimated: (N, 3) mm.
        truth: (N, 3) mm.
        limit_mm: 10 mm in all papers.
        radius_mm: (N,) lesion radii for the DLT figures.
        size_mm: (N,) box diagonals for the TLT figures.

    Returns:
        Shares 0..1: `within_limit` (distance < limit); with radii `dlt_at_limit`, `dlt_at_radius`; with sizes
            `tlt_at_limit`, `tlt_at_radius`.

    Raises:
        InputError: no points, or lists of different lengths.
    """
    distances = _distances(estimated, truth)
    shares = {"within_limit": float((distances < limit_mm).mean())}
    if radius_mm is not None:
        radius = _per_point(radius_mm, len(distances), "radius")
        shares["dlt_at_limit"] = float((distances <= np.minimum(radius, limit_mm)).mean())
        shares["dlt_at_radius"] = float((distances < radius).mean())
    if size_mm is not None:
        size = _per_point(size_mm, len(distances), "size")
        shares["tlt_at_limit"] = float((distances < np.minimum(size, limit_mm)).mean())
        shares["tlt_at_radius"] = float((distances < size).mean())
    return shares


def _per_point(values: np.ndarray, count: int, name: str) -> np.ndarray:
    """One number per point (N,) float64."""
    values = np.asarray(values, dtype=np.float64)
    if values.shape != (count,):
        raise InputError(f"there must be one {name} for each of the {count} points, not {values.shape}")
    return values


def dice(first: np.ndarray, second: np.ndarray, labels: list[int] | None = None) -> dict[int, float]:
    """Dice overlap per label: do contours agree after alignment?

    May fail a case (below about 0.80-0.90, lower for small structures); report the worst structure and not the average,
    and leave the body outline out where the scans differ in length.

    Args:
        first: label array (z, y, x).
        second: label array on the same grid.
        labels: which ones; None for all labels > 0 found in either.

    Returns:
        Dice by label; a label absent from both is left out.

    Raises:
        InputError: different grids.
    """
    first, second = np.asarray(first), np.asarray(second)
    if first.shape != second.shape:
        raise InputError(
            f"label maps of shapes {first.shape} and {second.shape} are not on one grid; resample one of them"
        )
    if labels is None:
        labels = [int(v) for v in np.union1d(np.unique(first), np.unique(second)) if v > 0]
    result = {}
    for label in labels:
        a, b = first == label, second == label
        total = int(a.sum()) + int(b.sum())
        if total:
            result[label] = 2.0 * int((a & b).sum()) / total
    return result


def jacobian_statistics(field: DisplacementField, inside: np.ndarray | None = None) -> dict[str, float]:
    """Jacobian determinant of x -> x + u(x) inside the body: does the deformation tear or fold tissue?

    May fail a case by `folding` (there must be no values <= 0); the departure from 1 (volume change) is shown and never
    decides.

    Args:
        field: u.
        inside: bool (z, y, x) on the field's grid, the body; None for the whole grid.

    Returns:
        folding (share of voxels with a determinant <= 0), min, p01, median, p99, max, sd_log (of the logarithm of the
        positive ones).

    Raises:
        InputError: the mask has another grid or holds no voxel.
    """
    determinant = field.jacobian_determinant()
    if inside is not None:
        if inside.shape != determinant.shape:
            raise InputError(
                f"the body mask {inside.shape} is not on the field's grid {determinant.shape}; resample it"
            )
        determinant = determinant[inside]
    values = determinant.ravel()
    if not values.size:
        raise InputError("the body mask is empty; the Jacobian can only be graded inside the body")
    low, middle, high = np.percentile(values, (1, 50, 99))
    positive = values[values > 0]
    return {
        "folding": float((values <= 0).mean()),
        "min": float(values.min()),
        "p01": float(low),
        "median": float(middle),
        "p99": float(high),
        "max": float(values.max()),
        "sd_log": float(np.log(positive).std()) if positive.size else 0.0,
    }


def inverse_consistency(forward: Transform, backward: Transform, points: np.ndarray) -> dict[str, float]:
    """Distance of points from themselves after there and back: do the two directions contradict each other?

    A large value fails a case (beyond the larger voxel dimension); a small one proves nothing, since two wrong
    directions can agree.

    Args:
        forward: fixed -> moving.
        backward: moving -> fixed.
        points: (N, 3) mm in fixed space.

    Returns:
        mean, std, median, p95, max in mm.

    Raises:
        InputError: no points.
    """
    return _summary(_distances(backward.apply(forward.apply(points)), points))
