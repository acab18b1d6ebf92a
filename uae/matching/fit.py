"""Local maps from matched points in millimetres: Huber affine, rigid or translation, as the points allow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

HUBER_K = 1.345
"""95 % efficiency for normal residuals; the constant of the M-estimator in the authors' code."""

MAX_CONDITION = 20.0
"""Largest ratio of the widest to the narrowest spread of a point set that counts as non-coplanar."""

MIN_SPREAD_MM = 1.0
"""Smallest root-mean-square spread along an axis that counts: a quarter of a fine cell."""

MIN_SCALE_MM = 0.5
"""Floor of the residuals' scale: fine cells are 4 mm apart, smaller residuals say nothing."""

_ITERATIONS = 50
_MEDIAN_OF_CHI3 = 1.538

_Linear = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class LocalMap:
    """x -> linear @ x + shift in LPS mm; kind: 'affine', 'rigid' or 'translation'; residual_mm: median residual."""

    linear: np.ndarray
    shift: np.ndarray
    kind: str
    residual_mm: float

    def apply(self, points_mm: np.ndarray) -> np.ndarray:
        """Map points (N, 3) mm."""
        return points_mm @ self.linear.T + self.shift


def rank(points_mm: np.ndarray) -> int:
    """Dimensions that the points (N, 3) truly span: 0 one place, 1 a line, 2 a plane, 3 space (condition number)."""
    if len(points_mm) < 2:
        return 0
    spread = np.linalg.svd(points_mm - points_mm.mean(0), compute_uv=False) / np.sqrt(len(points_mm))
    return int(np.sum((spread >= MIN_SPREAD_MM) & (spread * MAX_CONDITION >= spread[0])))


def local_map(source_mm: np.ndarray, target_mm: np.ndarray, at_mm: np.ndarray) -> LocalMap:
    """Robust map of source to target (N, 3) mm, N >= 3, to be used at `at_mm` (3,).

    Both sets span space (N >= 4): affine. One of them only a plane: rigid, which the plane still determines
    completely. A line or one place: translation. The affine also gives way to the rigid map where `at_mm` lies so far
    outside the points that its statistical leverage exceeds that of a single observation: it would extrapolate.
    Raises ValueError for fewer than 3 pairs.
    """
    if len(source_mm) < 3:
        raise ValueError(f"a local map needs at least 3 pairs of points, got {len(source_mm)}")
    span = min(rank(source_mm), rank(target_mm))
    if span == 3 and len(source_mm) >= 4 and _leverage(source_mm, at_mm) <= 1.0:
        return _huber(source_mm, target_mm, _affine, "affine")
    if span >= 2:
        return _huber(source_mm, target_mm, _rigid, "rigid")
    return _huber(source_mm, target_mm, _translation, "translation")


def _leverage(source_mm: np.ndarray, at_mm: np.ndarray) -> float:
    """Variance of an affine prediction at `at_mm` in units of one observation's variance."""
    design = np.hstack([source_mm - at_mm, np.ones((len(source_mm), 1))])
    return float(np.linalg.pinv(design.T @ design)[3, 3])


def _huber(source: np.ndarray, target: np.ndarray, fit: Callable[..., _Linear], kind: str) -> LocalMap:
    """Iteratively re-weighted least squares with Huber weights on the residual's length.

    The authors' code fits each output axis by itself; the length of the residual does not depend on the axes.
    """
    weights = np.ones(len(source))
    for _ in range(_ITERATIONS):
        linear, shift = fit(source, target, weights)
        residual = np.linalg.norm(source @ linear.T + shift - target, axis=1)
        limit = HUBER_K * max(float(np.median(residual)) / _MEDIAN_OF_CHI3, MIN_SCALE_MM)
        new = limit / np.maximum(residual, limit)
        if np.max(np.abs(new - weights)) < 1e-4:
            break
        weights = new
    return LocalMap(linear, shift, kind, float(np.median(residual)))


def _affine(source: np.ndarray, target: np.ndarray, weights: np.ndarray) -> _Linear:
    center = source.mean(0)
    root = np.sqrt(weights)[:, None]
    design = np.hstack([source - center, np.ones((len(source), 1))])
    solution = np.linalg.lstsq(design * root, target * root, rcond=None)[0]
    linear = solution[:3].T
    return linear, solution[3] - linear @ center


def _rigid(source: np.ndarray, target: np.ndarray, weights: np.ndarray) -> _Linear:
    """Weighted least-squares rotation and translation (Arun et al. 1987, with the determinant kept at +1)."""
    share = weights / weights.sum()
    source_center, target_center = share @ source, share @ target
    u, _, vt = np.linalg.svd((source - source_center).T @ ((target - target_center) * share[:, None]))
    turn = np.diag([1.0, 1.0, np.sign(np.linalg.det(vt.T @ u.T))])
    linear = vt.T @ turn @ u.T
    return linear, target_center - linear @ source_center


def _translation(source: np.ndarray, target: np.ndarray, weights: np.ndarray) -> _Linear:
    return np.eye(3), (weights / weights.sum()) @ (target - source)
