"""Mask images looked up at points, so that masks on any grid can be combined without resampling."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage

from uae.volume import Volume, resample

if TYPE_CHECKING:
    from uae.embedding import Embedding


def inside(mask: Volume | None, points: np.ndarray) -> np.ndarray:
    """Bool (N,): points (N, 3) mm where the mask image is > 0; all True without a mask, False outside its grid."""
    if mask is None or not len(points):
        return np.ones(len(points), dtype=bool)
    return mask.sample(points, fill=0.0, order=0) > 0


def both(first: Volume | None, second: Volume | None) -> Volume | None:
    """Mask image > 0 where both masks are, on the second one's grid; None stands for everywhere."""
    if first is None or second is None:
        return second if first is None else first
    array = (second.array > 0) & (resample(first, second.geometry, fill=0.0, order=0).array > 0)
    return Volume(array.astype(np.uint8), second.geometry)


def body_volume(embedding: Embedding, margin_cells: int = 1) -> Volume:
    """The embedding's body as a mask image on its fine grid (4 mm), grown by some cells.

    The margin keeps the skin, the strongest edge that both modalities share, inside the mask.
    """
    grown = ndimage.binary_dilation(embedding.body, iterations=margin_cells) if margin_cells else embedding.body
    return Volume(grown.astype(np.uint8), embedding.fine_geometry)
