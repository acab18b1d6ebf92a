"""convexAdam with MIND: deformable only; both images on one isotropic grid."""

from __future__ import annotations

import numpy as np

from uae.bench.peers.job import Job, Outcome, Scan
from uae.bench.peers.sampling import isotropic, sampled

SETTINGS = {
    "settings": "the package's defaults (mind_r 1, mind_d 2, lambda 1.25, grid_sp 6, disp_hw 4, 80 Adam iterations, "
    "grid_sp_adam 2, inverse consistent), tuned by its authors on Learn2Reg",
    "selected_smooth": "3 instead of 0: the authors' choice for smooth deformations of one patient",
    "grid": "2 mm over the reference's box, the other scan resampled onto it through the start: the package needs one "
    "grid. disp_hw x grid_sp gives a capture range of 48 mm",
    "linear part": "none: it knows no rigid registration, so far starts are beyond it",
    "starts": "middles of the boxes and centres of mass, the better",
}
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
