"""Intensity curves of the contrast augmentation, sampled at LEVELS values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from uae.preprocess import SOFT_TISSUE_KNOTS

LEVELS = 2048
HU_STEP = 1.5
HU_LOW = -1024.0
WINDOW_TOP_HU = 3071.0
RANDOM_MAP_KNOTS = np.array(
    [-1024, -930, -820, -650, -400, -200, -120, -80, -40, -10, 15, 40, 65, 95, 140, 220, 400, 800, 2000], dtype=float
)
"""HU places of the random contrast curve, denser in soft tissue (our choice)."""
AIR_HU_BELOW = -750.0

Rng = np.random.Generator

_HU = HU_LOW + HU_STEP * np.arange(LEVELS)
_SOFT = np.interp(_HU, *np.transpose(SOFT_TISSUE_KNOTS))
_LINEAR = np.clip((_HU - HU_LOW) / (WINDOW_TOP_HU - HU_LOW), 0, 1)


def ct_curve(input_map: str) -> np.ndarray:
    """HU -> 0..1 of a model's input map, (LEVELS,)."""
    return _SOFT if input_map == "soft-tissue" else _LINEAR


def random_curve(rng: Rng) -> np.ndarray:
    """Non-monotone HU -> signal curve (LEVELS,): jittered knots, some dropped; air and cortical bone mostly dark."""
    knots = RANDOM_MAP_KNOTS.copy()
    gaps = np.diff(knots)
    knots[1:-1] += rng.uniform(-0.35, 0.35, len(knots) - 2) * np.minimum(gaps[:-1], gaps[1:])
    values = rng.uniform(0.0, 1.0, len(knots))
    if rng.random() < 0.9:
        values[knots < -750] = rng.uniform(0, 0.12)
        values[(knots >= -750) & (knots < -300)] = rng.uniform(0, 0.3)
    if rng.random() < 0.8:
        values[knots > 500] = rng.uniform(0, 0.25)
    keep = rng.random(len(knots)) > 0.35
    keep[[0, -1]] = True
    return np.interp(_HU, knots[keep], values[keep])


def histogram_shift(rng: Rng, level: np.ndarray) -> np.ndarray:
    """Monotone map of `level` (0..1): 5-15 evenly spaced points, the inner ones moved between their neighbours.

    As the authors' code enables it; values outside are clipped.
    """
    places = np.linspace(0, 1, int(rng.integers(5, 16)))
    values = places.copy()
    for k in range(1, len(places) - 1):
        values[k] = rng.uniform(values[k - 1], places[k + 1])
    return np.interp(level, places, values)


def bezier(rng: Rng, level: np.ndarray) -> np.ndarray:
    """Map of `level` (0..1) along a cubic Bezier curve with two random inner points, made a function by sorting.

    The papers cite Models Genesis for it.
    """
    x1, x2, y1, y2 = rng.random(4)
    t = np.linspace(0, 1, 200)
    x, y = (3 * (1 - t) ** 2 * t * a + 3 * (1 - t) * t**2 * b + t**3 for a, b in ((x1, x2), (y1, y2)))
    order = np.argsort(x)
    return np.interp(level, x[order], y[order])


def drawn_curve(rng: Rng, settings: Mapping[str, Any]) -> np.ndarray:
    """HU -> signal (LEVELS,) by one of the three kinds of curve, chosen by their weights in [contrast].

    Histogram shift and Bezier curves are inverted with probability `invert`; open air then stays dark.
    """
    kinds = ("tissue_curve", "histogram_shift", "bezier")
    weights = np.array([settings[kind] for kind in kinds], dtype=float)
    if weights.sum() <= 0:
        return _SOFT
    kind = kinds[int(rng.choice(3, p=weights / weights.sum()))] if (weights > 0).sum() > 1 else kinds[weights.argmax()]
    if kind == "tissue_curve":
        return random_curve(rng)
    curve = (histogram_shift if kind == "histogram_shift" else bezier)(rng, _SOFT)
    if rng.random() < settings["invert"]:
        curve = np.where(_HU < AIR_HU_BELOW, 0.0, 1 - curve)
    return curve


def signal_curve(rng: Rng, settings: Mapping[str, Any]) -> np.ndarray:
    """0..1 -> 0..1 for an MR (LEVELS,): a monotone curve between identity and random, sometimes inverted."""
    values = np.sort(rng.uniform(0, 1, 6))
    values[0], values[-1] = 0.0, 1.0
    mix = rng.uniform(0, 1)
    curve = (1 - mix) * np.linspace(0, 1, 6) + mix * values
    if rng.random() < settings["invert"]:
        curve = np.concatenate([[0.0], 1 - curve[1:]])
    return np.interp(np.arange(LEVELS) / (LEVELS - 1), np.linspace(0, 1, 6), curve)


def label_table(rng: Rng) -> tuple[np.ndarray, np.ndarray]:
    """Random intensity and relative texture of every label number, (LEVELS,) each; label 0 (air) is dark.

    Means uniform in 0.05..1 and texture up to 15 % (our choice; anatomix draws means of 25-255 and deviations of 5-20).
    """
    means = rng.uniform(0.05, 1.0, LEVELS)
    means[0] = rng.uniform(0, 0.04)
    return means, rng.uniform(0.02, 0.15, LEVELS)
