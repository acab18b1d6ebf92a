"""convexAdam with MIND: deformable only; both images on one isotropic grid."""

from __future__ import annotations

import numpy as np

from uae.bench.peers.job import Job, Outcome, Scan

SETTINGS = {
    "settings": "the package's defaults (mind_r 1, mind_d 2, lambda 1.25, grid_sp 6, disp_hw 4, 80 Adam iterations, "
    "grid_sp_adam 2, inverse consistent), tuned by its authors on Learn2Reg",
    "selected_smooth": "3 instead of 0: the authors' choice for smooth deformations of one patient",
    "grid": "2 mm over the reference's box, the other scan resampled onto it through the start: the package needs one "
    "grid. disp_hw x grid_sp gives a capture range of 48 mm",
    "linear part": "none: it knows no rigid registration, so far starts are beyond it",
    "starts": "middles of the boxes and centres of mass, the better",
}
SPACING_MM = 2.0
SMOOTH = 3


def register(job: Job, other: Scan) -> Outcome:
    """Deform from the identity.

    Args:
        job: reference, method ("deformable"), threads.
        other: the other scan, its header already carried to the start.

    Raises:
        ValueError: any other method.
    """
    if job.method != "deformable":
        raise ValueError(f"convexAdam is deformable only, it has no {job.method!r}")
    import torch
    from convexAdam.convex_adam_MIND import convex_adam_pt

    torch.set_num_threads(job.threads)
    torch.manual_seed(job.seed)
    grid = isotropic(job.reference)
    fixed, moving = (sampled(scan, grid) for scan in (job.reference, other))
    found = convex_adam_pt(fixed, moving, selected_smooth=SMOOTH)
    # Voxels along the array's axes z, y, x, from a fixed voxel to its place in the moving image.
    millimetres = (np.asarray(found, dtype=np.float64)[..., ::-1] * grid.spacing) @ grid.direction.T
    return Outcome(np.eye(4), millimetres.astype(np.float32), grid)


def isotropic(scan: Scan) -> Scan:
    """The grid of SPACING_MM over a scan's box along its own axes (its array is empty memory)."""
    extent = scan.size * scan.spacing
    size = np.maximum(np.rint(extent / SPACING_MM).astype(int), 1)
    first = scan.to_mm((((extent - (size - 1) * SPACING_MM) / 2) / scan.spacing - 0.5)[None])[0]
    return Scan(np.zeros(size[::-1], np.float32), np.full(3, SPACING_MM), first, scan.direction)


def sampled(scan: Scan, grid: Scan) -> np.ndarray:
    """Values (z, y, x) float32 of a scan at the voxels of a grid, linear; the scan's minimum outside."""
    from scipy import ndimage

    index = scan.to_index(grid.grid_mm())[:, ::-1].T
    values = ndimage.map_coordinates(scan.array, index, order=1, mode="nearest")
    sizes = np.array(scan.array.shape)[:, None]
    outside = ((index < -0.5) | (index > sizes - 0.5)).any(axis=0)
    values[outside] = scan.array.min()
    return values.reshape(grid.array.shape).astype(np.float32)
