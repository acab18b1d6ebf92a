"""The canonical body as one label function, and its named landmarks."""

from __future__ import annotations

import numpy as np

from uae.phantom import body, organs, skeleton
from uae.phantom.canvas import Canvas

CONTENT_STREAM = 77
"""Separates the random numbers for the gut's content from those of shape and contrast."""


def paint_body(points: np.ndarray, content_seed: int, grid: bool = True) -> Canvas:
    """Labels and tissues at canonical points.

    Args:
        points: (3, z, y, x) or (3, N) canonical mm, float32.
        content_seed: decides which parts of stomach and bowel hold gas.
        grid: whether `points` is a grid or loose points.
    """
    canvas = Canvas(points, grid)
    body.paint_trunk(canvas)
    body.paint_muscles(canvas)
    body.paint_lung_vessels(canvas)
    skeleton.paint_chest_bones(canvas)
    skeleton.paint_ribs(canvas)
    skeleton.paint_pelvis_bones(canvas)
    skeleton.paint_spine(canvas)
    organs.paint_chest(canvas)
    organs.paint_abdomen(canvas, np.random.default_rng([CONTENT_STREAM, content_seed]))
    organs.paint_pelvis(canvas)
    body.paint_fine_structure(canvas)
    return canvas


def landmarks() -> dict[str, np.ndarray]:
    """Named landmarks, each (3,) canonical mm."""
    found = {f"vertebra_{name}": center.copy() for name, center in skeleton.VERTEBRA_CENTERS.items()}
    found["sternum_top"] = np.array([0.0, -60.5, 398.0])
    found["sternum_bottom"] = np.array([0.0, -95.0, 238.0])
    found["symphysis"] = np.array([0.0, -67.0, -107.0])
    found["sacral_promontory"] = np.array([0.0, 36.0, -12.0])
    for side, sign in skeleton.SIGN.items():
        found[f"iliac_crest_{side}"] = np.array([sign * 135.0, 0.0, 52.0])
        found[f"rib_5_{side}"] = skeleton.rib_points(5)[5] * [sign, 1, 1]
    return found | organs.organ_landmarks()
