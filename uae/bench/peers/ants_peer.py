"""ANTsPy: rigid by Mattes mutual information, SyN."""

from __future__ import annotations

import os
import tempfile

import numpy as np

from uae.bench.peers.job import Job, Outcome, Scan
from uae.bench.peers.sampling import isotropic, sampled
from uae.bench.peers.starts import matrix_of_points, probe_points

SETTINGS = {
    "rigid": "`Rigid` with its default schedule (mattes, 32 bins, 20 % regular samples, 2100/1200/1200/10 iterations "
    "at shrink 6, 4, 2, 1): the package's recommendation",
    "affine": "`Affine`, the same schedule, from the rigid result",
    "deformable": "`SyNOnly` after the rigid result, mattes with 32 bins (the CT-MR choice), 100/70/50 iterations "
    "instead of 40/20/0: the default leaves the finest level out; both scans on 2 mm grids over their boxes: as they "
    "are, one pair took a thread more than 25 minutes",
    "starts": "middles of the boxes and centres of mass (its own default start), the better",
    "precision": "one thread and a fixed seed: random samples and threaded sums otherwise differ from run to run",
}
SYN_ITERATIONS = (100, 70, 50)


def _image(scan: Scan):
    import ants

    array = np.ascontiguousarray(scan.array.astype(np.float32).transpose(2, 1, 0))
    return ants.from_numpy(
        array, origin=scan.origin.tolist(), spacing=scan.spacing.tolist(), direction=np.array(scan.direction)
    )


def register(job: Job, other: Scan) -> Outcome:
    """Register from the identity.

    Args:
        job: reference, method, threads, seed.
        other: the other scan, its header already carried to the start.

    Raises:
        ValueError: this peer has no such method.
    """
    if job.method not in ("rigid", "affine", "deformable"):
        raise ValueError(f"ANTs has no method {job.method!r}")
    # Read when the library starts a filter; set again here because the package may set them when it is imported.
    os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = str(job.threads)
    os.environ["ANTS_RANDOM_SEED"] = str(job.seed)
    import ants

    fixed, moving = _image(job.reference), _image(other)
    with tempfile.TemporaryDirectory(prefix="uae-ants-") as folder:

        def stage(kind: str, number: int, initial: str, **options):
            prefix = os.path.join(folder, f"stage{number}_")
            return ants.registration(
                fixed, moving, kind, initial_transform=[initial], outprefix=prefix, random_seed=str(job.seed), **options
            )["fwdtransforms"]

        linear = stage("Rigid", 0, _identity(folder))[-1]
        if job.method == "affine":
            linear = stage("Affine", 1, linear)[-1]
        matrix = _matrix(linear)
        if job.method != "deformable":
            return Outcome(matrix)
        grid = isotropic(job.reference)
        fixed, moving = (_image(coarse(scan)) for scan in (job.reference, other))
        steps = int(job.options.get("iterations", 0))
        steps = (steps,) * len(SYN_ITERATIONS) if steps else SYN_ITERATIONS
        files = stage("SyNOnly", 2, linear, syn_metric="mattes", syn_sampling=32, reg_iterations=steps)
        warp = next(name for name in files if "Warp" in os.path.basename(name))
        matrices = [name for name in files if name.endswith(".mat")]
        matrix = _matrix(matrices[0]) if matrices else np.eye(4)
        vectors = ants.image_read(warp).numpy()  # (x, y, z, 3) mm, LPS
    here = grid.grid_mm()
    moved = here + vectors.transpose(2, 1, 0, 3).reshape(-1, 3)
    images = moved @ matrix[:3, :3].T + matrix[:3, 3]
    return Outcome(matrix, (images - here).reshape(*grid.array.shape, 3).astype(np.float32), grid)


def coarse(scan: Scan) -> Scan:
    """A scan on the isotropic grid over its own box."""
    grid = isotropic(scan)
    return Scan(sampled(scan, grid), grid.spacing, grid.origin, grid.direction)


def _identity(folder: str) -> str:
    """File of the identity: without a start the package would put the centres of mass on each other."""
    import ants

    path = os.path.join(folder, "identity.mat")
    transform = ants.create_ants_transform(
        transform_type="Euler3DTransform", dimension=3, parameters=[0.0] * 6, fixed_parameters=[0.0] * 3
    )
    ants.write_transform(transform, path)
    return path


def _matrix(path: str) -> np.ndarray:
    import ants

    transform = ants.read_transform(path)
    return matrix_of_points(np.array([transform.apply_to_point(tuple(p)) for p in probe_points()], dtype=np.float64))
