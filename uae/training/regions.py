"""Superpixels of a scan, in which the contrast augmentation may draw a curve each (the first UAE paper uses SLIC)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from uae.errors import InputError
from uae.training.subjects import BODY, Subject, as_tensor

STEP = 4
"""Superpixels are made on every fourth voxel (8 mm): a torso takes seconds, and their borders are arbitrary anyway."""
PATCH_CELLS = 8 * 24 * 24
"""Voxels at that step of one of the papers' patches (32 x 96 x 96), to which the number of segments refers."""
MOST_REGIONS = 400


def superpixels(subject: Subject, segments: int, compactness: float) -> Tensor:
    """SLIC superpixels of the body.

    Args:
        subject: its image and mask are read.
        segments: superpixels in the volume of one patch (authors' code: 15).
        compactness: of SLIC on values 0..1 (authors' code: 0.01 for CT, 0.05 for MR).

    Returns:
        (1, 1, z, y, x) float32; 0 outside the body, superpixels from 1.

    Raises:
        InputError: scikit-image is not installed.
    """
    try:
        from skimage.segmentation import slic
    except ImportError as error:
        raise InputError("contrast.regions needs scikit-image; install it or set contrast.regions=0") from error
    body = subject.mask[::STEP, ::STEP, ::STEP] == BODY
    image = subject.image[0, 0, ::STEP, ::STEP, ::STEP].numpy()
    if subject.modality == "ct":
        image = np.clip((image - 824) / 400, 0, 1)  # -200..200 HU: where organs differ
    count = int(np.clip(segments * body.sum() / PATCH_CELLS, 2, MOST_REGIONS))
    found = slic(image, n_segments=count, compactness=compactness, mask=body, channel_axis=None, start_label=1)
    wide = torch.from_numpy(found.astype(np.float32))
    for axis, size in enumerate(subject.mask.shape):
        wide = wide.repeat_interleave(STEP, axis).narrow(axis, 0, size)
    return as_tensor(wide.numpy())
