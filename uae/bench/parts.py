"""Parts of a scan along the body, and simulated pairs whose scans share only a part."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from uae.simulate import SimulatedPair
from uae.volume import Geometry, Volume

PARTIAL = "partial"
"""Name of the set of partial pairs: a `standard15` scan against the part of its CT that shows 40-75 % of it."""
PARTIAL_FROM = "standard15"
PARTIAL_SHARE = (0.4, 0.75)


def body_axis(volume: Volume) -> int:
    """The index axis (0 = x) that runs along the body."""
    return int(np.argmax(np.abs(volume.geometry.direction[2])))


def slab(volume: Volume, first: int, last: int) -> Volume:
    """The planes first <= k < last along the body's axis."""
    axis, grid = body_axis(volume), volume.geometry
    cut = [slice(None)] * 3
    cut[2 - axis] = slice(first, last)
    start = np.zeros(3)
    start[axis] = first
    array = volume.array[tuple(cut)]
    return volume.replace(array, Geometry(array.shape, grid.spacing, grid.index_to_mm(start)[0], grid.direction))


def along_body(volume: Volume, low: float, high: float) -> Volume:
    """The part of a scan between two fractions of its height, 0 = caudal end, 1 = cranial end."""
    axis = body_axis(volume)
    count = int(volume.geometry.size[axis])
    if volume.geometry.direction[2, axis] < 0:
        low, high = 1.0 - high, 1.0 - low
    return slab(volume, round(low * count), round(high * count))


def partial_pair(pair: SimulatedPair) -> SimulatedPair:
    """The same moving scan against the caudal or the cranial part of its CT, which ends inside the moving scan.

    Args:
        pair: whose seed also decides the end that stays and the share, PARTIAL_SHARE, of the moving body inside it.
    """
    rng = np.random.default_rng([int(pair.meta["seed"]), 2])
    share, high = rng.uniform(*PARTIAL_SHARE), bool(rng.random() < 0.5)
    axis = body_axis(pair.fixed)
    along = pair.fixed.geometry.mm_to_index(pair.fixed_body_points)[:, axis]
    edge = round(float(np.quantile(along, 1.0 - share if high else share)))
    count = int(pair.fixed.geometry.size[axis])
    fixed = slab(pair.fixed, edge, count) if high else slab(pair.fixed, 0, edge)
    return replace(pair, fixed=fixed, meta={**pair.meta, "set": PARTIAL})
