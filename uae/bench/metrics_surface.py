"""Distances between the surfaces of two segmentations, in millimetres on any grid."""

from __future__ import annotations

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

from uae.errors import InputError
from uae.volume import Geometry


def surface_points(mask: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Centres (N, 3) LPS mm of the voxels at a mask's border: inside, with a face neighbour outside or off the grid."""
    inner = ndimage.binary_erosion(mask, border_value=0)
    return geometry.index_to_mm(np.argwhere(mask & ~inner)[:, ::-1].astype(np.float64))


def surface_distances(
    first: np.ndarray, second: np.ndarray, geometry: Geometry, labels: list[int] | None = None
) -> dict[int, dict[str, float]]:
    """How far do two outlines lie apart? Mean distance to agreement and 95th percentile, by label.

    MDA (AAPM TG-132; also called average symmetric surface distance): mean over both surfaces' points of the distance
    to the other surface. HD95: the 95th percentile of all these distances together, so that one stray voxel does not
    decide. May fail a case (MDA within the contouring uncertainty, 2-3 mm; TG-132).

    Args:
        first: label array (z, y, x).
        second: label array on the same grid.
        geometry: the grid, any spacing and direction; distances are Euclidean in patient millimetres.
        labels: which ones; None for all labels > 0 found in both.

    Returns:
        By label `mda_mm`, `hd95_mm`, `hausdorff_mm`; a label that one of the two lacks is left out, since no distance
        exists.

    Raises:
        InputError: different grids.
    """
    first, second = np.asarray(first), np.asarray(second)
    if not first.shape == second.shape == geometry.shape:
        raise InputError(
            f"label maps of shapes {first.shape} and {second.shape} are not on the grid {geometry.shape}; resample one"
        )
    if labels is None:
        labels = [int(v) for v in np.intersect1d(np.unique(first), np.unique(second)) if v > 0]
    result = {}
    for label in labels:
        a, b = (surface_points(array == label, geometry) for array in (first, second))
        if not len(a) or not len(b):
            continue
        distances = np.concatenate([cKDTree(b).query(a)[0], cKDTree(a).query(b)[0]])
        result[label] = {
            "mda_mm": float(distances.mean()),
            "hd95_mm": float(np.percentile(distances, 95)),
            "hausdorff_mm": float(distances.max()),
        }
    return result


def label_centroids(labels: np.ndarray, geometry: Geometry) -> dict[int, np.ndarray]:
    """Centroid (3,) LPS mm of every label > 0, as painted landmarks are read; sources: the CT-MR tables of UAE."""
    found = [int(v) for v in np.unique(labels) if v > 0]
    if not found:
        return {}
    centres = np.array(ndimage.center_of_mass(np.ones(labels.shape), labels, found))
    return dict(zip(found, geometry.index_to_mm(centres[:, ::-1]), strict=True))
