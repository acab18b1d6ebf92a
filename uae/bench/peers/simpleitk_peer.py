"""SimpleITK: rigid and affine by Mattes mutual information."""

from __future__ import annotations

import numpy as np
import SimpleITK as sitk

from uae.bench.peers.job import Job, Outcome, Scan
from uae.bench.peers.starts import matrix_of_points, probe_points

SETTINGS = {
    "metric": "Mattes mutual information, 32 bins: fewer blur soft tissues, more starve a small scan's histogram",
    "sampling": "20 % of the reference's voxels at random at the finest level; 5 and 10 % at "
    "the smoothed ones, whose voxels repeat each other; fixed seed",
    "optimiser": "regular step gradient descent from 2 mm down to 0.01 mm, halved at each turn, 200 steps a level; "
    "scaled so that a step is a movement in millimetres",
    "levels": "3 levels of Gaussian smoothing (6, 3, 0 mm) without shrinking: slices 3-6 mm thick leave nothing to "
    "shrink",
    "starts": "middles of the boxes and centres of mass (GEOMETRY and MOMENTS of its initialiser), the better",
}
LEVELS_MM = (6.0, 3.0, 0.0)
STEP_MM, SMALLEST_MM, STEPS = 2.0, 0.01, 200
BINS, SHARES = 32, (0.05, 0.1, 0.2)


def image_of(scan: Scan) -> sitk.Image:
    """A Scan as a SimpleITK image."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(scan.array, dtype=np.float32))
    image.SetSpacing(scan.spacing.tolist())
    image.SetOrigin(scan.origin.tolist())
    image.SetDirection(scan.direction.ravel().tolist())
    return image


def register(job: Job, other: Scan) -> Outcome:
    """Register from the identity.

    Args:
        job: reference, method ("rigid" or "affine"), threads, seed.
        other: the other scan, its header already carried to the start.

    Raises:
        ValueError: this peer has no such method.
    """
    if job.method not in ("rigid", "affine"):
        raise ValueError(f"SimpleITK runs rigid and affine here, not {job.method!r}")
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(job.threads)
    fixed, moving = image_of(job.reference), image_of(other)
    transform = sitk.Euler3DTransform() if job.method == "rigid" else sitk.AffineTransform(3)
    middle = job.reference.to_mm((job.reference.size - 1)[None] / 2)[0]
    transform.SetCenter(middle.tolist())
    radius = float(np.linalg.norm(job.reference.size * job.reference.spacing)) / 4.0
    turning = 3 if job.method == "rigid" else 9
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(BINS)
    method.SetMetricSamplingStrategy(method.RANDOM)
    method.SetMetricSamplingPercentagePerLevel(list(SHARES), job.seed)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(
        STEP_MM, SMALLEST_MM, STEPS, relaxationFactor=0.5, gradientMagnitudeTolerance=1e-8
    )
    method.SetOptimizerScales([radius**2] * turning + [1.0] * 3)
    method.SetShrinkFactorsPerLevel([1] * len(LEVELS_MM))
    method.SetSmoothingSigmasPerLevel(list(LEVELS_MM))
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
    method.SetInitialTransform(transform, True)
    method.Execute(fixed, moving)
    images = np.array([transform.TransformPoint(point.tolist()) for point in probe_points()])
    return Outcome(matrix_of_points(images), info={"metric": -float(method.GetMetricValue())})
