"""Least-squares and robust linear transforms from matched points.

The paper's AdaReg fits an unweighted rigid transform (Arun, SVD) to all matches above a score. Free matches of two
unrelated scans also reach high scores, so here the fit is RANSAC over matches that survived a mutual check, followed by
a re-weighted Arun. All points are millimetres, LPS, (N, 3).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np

from uae.errors import InputError, NoConfidentResultError
from uae.transform import Affine, Rigid

log = logging.getLogger(__name__)

RANSAC_ITERATIONS = 4000  # our measurement on simulated MR -> CT pairs, as the two limits below
RANSAC_TOLERANCE_MM = 10.0
RANSAC_MAX_ROTATION_DEG = 40.0
ELSEWHERE_MM = (
    20.0  # another place of the anatomy: about one vertebral level, the distance used for competitors of a match
)
_CHUNK = 256  # hypotheses scored at once: keeps the residual block of some hundred matches inside the cache


@dataclass(frozen=True)
class RansacResult:
    """Outcome of `ransac`.

    transform: rigid source -> target after the re-weighted fit.
    inliers: bool (N,), residual within the tolerance under `transform`.
    runner_up: support of the best hypothesis that puts the matches more than ELSEWHERE_MM away from where the winner
        puts them.
    hypotheses: number of triples scored.
    """

    transform: Rigid
    inliers: np.ndarray
    runner_up: int
    hypotheses: int


def _pairs(source: np.ndarray, target: np.ndarray, least: int) -> tuple[np.ndarray, np.ndarray]:
    """Validate matched points; returns float64 copies (N, 3)."""
    source, target = np.asarray(source, dtype=np.float64), np.asarray(target, dtype=np.float64)
    if source.ndim != 2 or source.shape[1] != 3 or source.shape != target.shape:
        raise InputError(
            f"matched points must be two (N, 3) lists of one length, not {source.shape} and {target.shape}; check them"
        )
    if not (np.isfinite(source).all() and np.isfinite(target).all()):
        raise InputError("matched points contain NaN or infinite coordinates; remove these points")
    if len(source) < least:
        raise NoConfidentResultError(
            f"only {len(source)} matched points, {least} are needed for a fit; check that the scans show one region"
        )
    return source, target


def _weights(weights: np.ndarray | None, count: int) -> np.ndarray:
    """Validate weights (N,) and scale their sum to 1."""
    values = np.ones(count) if weights is None else np.asarray(weights, dtype=np.float64)
    if values.shape != (count,) or not np.isfinite(values).all() or (values < 0).any() or values.sum() <= 0:
        raise InputError(f"weights must be {count} finite numbers >= 0 with a positive sum; check the weights")
    return values / values.sum()


def _kabsch(source: np.ndarray, target: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weighted Arun for B sets: (B, N, 3), (B, N, 3), weights (B, N) summing to 1 -> (B, 3, 3), (B, 3)."""
    source_mean = np.einsum("bn,bni->bi", weights, source)
    target_mean = np.einsum("bn,bni->bi", weights, target)
    covariance = np.einsum("bn,bni,bnj->bij", weights, source - source_mean[:, None], target - target_mean[:, None])
    left, _, right = np.linalg.svd(covariance)
    # A determinant of -1 is the mirrored optimum: turning the weakest axis back gives the best proper rotation (Arun
    # 1987, Umeyama 1991).
    sign = np.sign(np.linalg.det(np.einsum("bij,bjk->bik", left, right)))
    flip = np.ones_like(source_mean)
    flip[:, 2] = np.where(sign < 0, -1.0, 1.0)
    rotation = np.einsum("bji,bj,bkj->bik", right, flip, left)
    return rotation, target_mean - np.einsum("bij,bj->bi", rotation, source_mean)


def box_corners(points: np.ndarray) -> np.ndarray:
    """The 8 corners (8, 3) mm of the box, along L, P, S, around points (N, 3) mm."""
    limits = np.stack([points.min(axis=0), points.max(axis=0)])
    return np.stack(np.meshgrid(*limits.T, indexing="ij"), axis=-1).reshape(8, 3)


def spread_mm(points: np.ndarray) -> np.ndarray:
    """Standard deviations (3,) mm of points (N, 3) along their principal axes, largest first; zeros for one point."""
    points = np.asarray(points, dtype=np.float64)
    if len(points) < 2:
        return np.zeros(3)
    return np.sqrt(np.clip(np.linalg.eigvalsh(np.cov(points.T))[::-1], 0.0, None))


def arun(source: np.ndarray, target: np.ndarray, weights: np.ndarray | None = None) -> Rigid:
    """Weighted least-squares rigid transform source -> target (Arun 1987, reflection excluded).

    Args:
        source: (N, 3) mm, N >= 3, not all on one line.
        target: (N, 3) mm.
        weights: (N,) >= 0, or None for equal weights.

    Raises:
        NoConfidentResultError: fewer than three points, or points on one line (the turn about it is undetermined).
        InputError: wrong shapes, NaN, bad weights.
    """
    source, target = _pairs(source, target, 3)
    weights = _weights(weights, len(source))
    for points in (source[weights > 0], target[weights > 0]):
        deviation = spread_mm(points)
        if deviation[1] <= 1e-6 * max(deviation[0], 1.0):
            raise NoConfidentResultError(
                "the matched points lie on one line, so the rotation is undetermined; use points that spread in space"
            )
    rotation, translation = _kabsch(source[None], target[None], weights[None])
    return Rigid.from_rotation(rotation[0], translation[0])


def fit_affine(
    source: np.ndarray,
    target: np.ndarray,
    weights: np.ndarray | None = None,
    huber_mm: float | None = 4.0,
    iterations: int = 20,
) -> Affine:
    """Affine source -> target by iteratively re-weighted least squares with Huber weights on the 3-D residual.

    Args:
        source: (N, 3) mm, N >= 4, not all in one plane.
        target: (N, 3) mm.
        weights: (N,) >= 0, or None.
        huber_mm: residual from which a match counts only linearly (4 mm is one cell of the fine grid); None = plain
            least squares.
        iterations: re-weighting rounds.

    Raises:
        NoConfidentResultError: fewer than four points, or points in one plane.
        InputError: wrong shapes, NaN, bad weights.
    """
    source, target = _pairs(source, target, 4)
    base = _weights(weights, len(source))
    deviation = spread_mm(source[base > 0])
    if deviation[2] <= 1e-6 * max(deviation[0], 1.0):
        raise NoConfidentResultError(
            "the matched points lie in one plane, so an affine transform is undetermined; use the rigid transform"
        )
    center = base @ source  # centring keeps the system well conditioned when the patient origin is far away
    system = np.column_stack([source - center, np.ones(len(source))])
    current = base
    for _ in range(iterations if huber_mm else 1):
        root = np.sqrt(current)[:, None]
        solution = np.linalg.lstsq(system * root, target * root, rcond=None)[0]
        residual = np.linalg.norm(system @ solution - target, axis=1)
        if huber_mm:
            current = base * np.minimum(1.0, huber_mm / np.maximum(residual, 1e-9))
    matrix = np.eye(4)
    matrix[:3, :3] = solution[:3].T
    matrix[:3, 3] = solution[3] - matrix[:3, :3] @ center
    return Affine(matrix)


def trimmed_rigid(
    source: np.ndarray, target: np.ndarray, initial: Rigid, tolerance_mm: float, iterations: int = 20
) -> Rigid:
    """Polish a rigid transform: Arun re-weighted by Tukey's biweight, which is zero beyond `tolerance_mm`.

    The smooth weight keeps the result from jumping when a match crosses the limit. Returns `initial` where too few
    matches support a fit.
    """
    source, target = _pairs(source, target, 3)
    current = initial
    for _ in range(iterations):
        residual = np.linalg.norm(current.apply(source) - target, axis=1)
        weights = np.clip(1.0 - (residual / tolerance_mm) ** 2, 0.0, None) ** 2
        if (weights > 0).sum() < 3:
            return current
        try:
            updated = arun(source, target, weights)
        except NoConfidentResultError:
            return current
        moved = np.abs(updated.apply(source) - current.apply(source)).max()
        current = updated
        if moved < 1e-4:
            break
    return current


def _draw_triples(
    source: np.ndarray, target: np.ndarray, wanted: int, tolerance_mm: float, rng: np.random.Generator
) -> np.ndarray:
    """Index triples (M <= wanted, 3) whose triangles are wide enough and of similar size on both sides.

    A rigid transform keeps distances, so a triple whose sides differ by more than the tolerance cannot be all right;
    dropping it before scoring lets the same number of hypotheses reach far lower shares of right matches.
    """
    height = min(2.0 * tolerance_mm, 0.5 * spread_mm(source)[1])
    kept: list[np.ndarray] = []
    found = 0
    for _ in range(20):
        triples = rng.integers(0, len(source), size=(2 * wanted, 3))
        a, b = source[triples], target[triples]
        sides_a = np.linalg.norm(a - np.roll(a, 1, axis=1), axis=2)
        sides_b = np.linalg.norm(b - np.roll(b, 1, axis=1), axis=2)
        area = 0.5 * np.linalg.norm(np.cross(a[:, 1] - a[:, 0], a[:, 2] - a[:, 0]), axis=1)
        good = (
            (np.abs(sides_a - sides_b) <= tolerance_mm).all(axis=1)
            & (2.0 * area >= height * sides_a.max(axis=1))
            & (area > 1e-6)
        )
        kept.append(triples[good])
        found += int(good.sum())
        if found >= wanted:
            break
    return np.concatenate(kept)[:wanted]


def _scored_hypotheses(
    source: np.ndarray,
    target: np.ndarray,
    tolerance_mm: float,
    iterations: int,
    max_rotation_deg: float,
    seed: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rigid hypotheses of random triples: (H, 3, 3), (H, 3), MSAC cost (H,) and number of inliers (H,)."""
    triples = _draw_triples(source, target, iterations, tolerance_mm, np.random.default_rng(seed))
    if not len(triples):
        raise NoConfidentResultError(
            "no three matches agree with a rigid transform; check that both scans show the same region"
        )
    rotation, translation = _kabsch(source[triples], target[triples], np.full(triples.shape, 1.0 / 3.0))
    angle = np.degrees(np.arccos(np.clip((np.trace(rotation, axis1=1, axis2=2) - 1.0) / 2.0, -1.0, 1.0)))
    allowed = angle <= max_rotation_deg
    if not allowed.any():
        raise NoConfidentResultError(
            f"all agreeing matches turn by more than {max_rotation_deg:.0f} degrees; check the scans' orientation"
        )
    rotation, translation = rotation[allowed], translation[allowed]
    cost, count = np.empty(len(rotation)), np.empty(len(rotation), dtype=int)
    for start in range(0, len(rotation), _CHUNK):
        part = slice(start, start + _CHUNK)
        predicted = source @ rotation[part].transpose(0, 2, 1) + translation[part, None]
        squared = np.square(predicted - target).sum(axis=2)
        count[part] = (squared <= tolerance_mm**2).sum(axis=1)
        # MSAC: closer inliers count more (Torr and Zisserman 2000)
        cost[part] = np.minimum(squared, tolerance_mm**2).sum(axis=1)
    return rotation, translation, cost, count


def distinct_rigids(
    source: np.ndarray,
    target: np.ndarray,
    corners: np.ndarray,
    most: int,
    apart_mm: float,
    tolerance_mm: float = RANSAC_TOLERANCE_MM,
    iterations: int = 2 * RANSAC_ITERATIONS,
    max_rotation_deg: float = RANSAC_MAX_ROTATION_DEG,
    seed: int = 0,
) -> list[Rigid]:
    """The best hypotheses of `ransac` that differ from each other, best first.

    Args:
        source: (N, 3) mm.
        target: (N, 3) mm.
        corners: (8, 3) mm of the source's body.
        most: how many at most.
        apart_mm: mean distance of the carried corners from which two hypotheses differ.
        tolerance_mm: see `ransac`.
        iterations: see `ransac`.
        max_rotation_deg: see `ransac`.
        seed: see `ransac`.

    Raises:
        NoConfidentResultError, InputError: as `ransac`.
    """
    source, target = _pairs(source, target, 3)
    rotation, translation, cost, _ = _scored_hypotheses(
        source, target, tolerance_mm, iterations, max_rotation_deg, seed
    )
    kept: list[int] = []
    places = corners @ rotation.transpose(0, 2, 1) + translation[:, None]
    for index in np.argsort(cost, kind="stable"):
        if all(np.linalg.norm(places[index] - places[other], axis=1).mean() > apart_mm for other in kept):
            kept.append(int(index))
            if len(kept) == most:
                break
    return [Rigid.from_rotation(rotation[index], translation[index]) for index in kept]


def ransac(
    source: np.ndarray,
    target: np.ndarray,
    tolerance_mm: float = RANSAC_TOLERANCE_MM,
    iterations: int = RANSAC_ITERATIONS,
    max_rotation_deg: float = RANSAC_MAX_ROTATION_DEG,
    seed: int = 0,
) -> RansacResult:
    """Rigid source -> target that the most matches agree with, all triples scored in batches.

    Args:
        source: (N, 3) mm.
        target: (N, 3) mm.
        tolerance_mm: residual up to which a match is an inlier.
        iterations: triples scored.
        max_rotation_deg: hypotheses that turn further are dropped (patients lie alike in CT and MR; 40 degrees covers
            head-first tilts).
        seed: of the random triples; the same seed gives the same result.

    Raises:
        NoConfidentResultError: fewer than three matches, all on one line, or no triple gives an allowed transform.
        InputError: wrong shapes, NaN.
    """
    source, target = _pairs(source, target, 3)
    rotation, translation, cost, count = _scored_hypotheses(
        source, target, tolerance_mm, iterations, max_rotation_deg, seed
    )
    best = int(np.argmin(cost))
    center = source[
        np.square(source @ rotation[best].T + translation[best] - target).sum(axis=1) <= tolerance_mm**2
    ].mean(axis=0)
    places = rotation @ center + translation
    elsewhere = np.linalg.norm(places - places[best], axis=1) > ELSEWHERE_MM
    transform = trimmed_rigid(source, target, Rigid.from_rotation(rotation[best], translation[best]), tolerance_mm)
    inliers = np.linalg.norm(transform.apply(source) - target, axis=1) <= tolerance_mm
    return RansacResult(transform, inliers, int(count[elsewhere].max(initial=0)), len(rotation))
