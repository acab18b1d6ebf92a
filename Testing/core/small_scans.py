"""A small CT-like scan made of formulas."""

from __future__ import annotations

import numpy as np
import SimpleITK as sitk


def torso_ct(shape: tuple[int, int, int] = (36, 44, 48), spacing: float = 4.0, seed: int = 0) -> sitk.Image:
    """A small CT-like scan: soft tissue in air with two lungs, a spine and noise, in Hounsfield units."""
    rng = np.random.default_rng(seed)
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    hu = np.full(shape, -1000.0)
    hu[(x / 0.85) ** 2 + (y / 0.75) ** 2 < 1] = 40
    for side in (-1, 1):
        hu[((x - 0.4 * side) / 0.3) ** 2 + (y / 0.45) ** 2 + ((z - 0.3) / 0.6) ** 2 < 1] = -800
    hu[(x / 0.12) ** 2 + ((y - 0.5) / 0.14) ** 2 < 1] = 400
    image = sitk.GetImageFromArray((hu + rng.normal(0, 12, shape)).astype(np.float32))
    image.SetSpacing((spacing, spacing, spacing))
    image.SetOrigin((-90.0, -80.0, 20.0))
    return image
