"""Scans, label maps and a model made by hand for the tests of the embedding benchmark's studies."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
from matching_fields import make

from uae.bench.study import Setup
from uae.geometry import Geometry
from uae.volume import Volume

SHIFT = np.array([32.0, -64.0, 16.0])
MARKS = {
    "vertebra_L1": np.array([45.0, 49.0, 21.0]), "vertebra_T12": np.array([45.0, 45.0, 49.0]),
    "vertebra_T11": np.array([45.0, 45.0, 73.0]), "carina": np.array([25.0, 33.0, 61.0]),
    "only_here": np.array([40.0, 40.0, 40.0]),
}  # fmt: skip


def model(**thresholds):
    return SimpleNamespace(name="m", version="1", sha256="f" * 64, thresholds=thresholds)


def setup(*sides, **thresholds):
    return Setup(model(**thresholds), sides=sides or (0, 5))


def shuffled(embedding):
    """The same vectors in other places."""
    rng = np.random.default_rng(0)

    def mix(values):
        flat = values.reshape(len(values), -1)
        return flat[:, rng.permutation(flat.shape[1])].reshape(values.shape)

    return replace(embedding, fine=mix(embedding.fine), coarse=mix(embedding.coarse))


def two_scans():
    """Two scans of one anatomy, the second one elsewhere in the world."""
    return make(origin=(0.0, 0.0, 0.0)), make(origin=SHIFT, to_anatomy=lambda p: p - SHIFT)


def box_labels(origin=(0.0, 0.0, 0.0), flip=False):
    """Voxels of 4 mm over the scans of `make`: 1 in a left box, 2 in a right one."""
    direction = np.diag([1.0, -1.0 if flip else 1.0, 1.0])
    start = np.add(origin, (0.0, 92.0 if flip else 0.0, 0.0))
    grid = Geometry((24, 24, 24), (4.0, 4.0, 4.0), start, direction)
    points = grid.grid_points_mm() - np.asarray(origin)
    array = np.zeros(len(points), np.uint8)
    for number, low in ((1, (56, 8, 32)), (2, (16, 8, 32))):
        array[np.all((points >= low) & (points <= np.add(low, (20, 24, 28))), axis=1)] = number
    return Volume(array.reshape(grid.shape), grid)
