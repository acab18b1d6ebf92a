"""itk-elastix: rigid, affine and b-spline by advanced Mattes mutual information."""

from __future__ import annotations

import numpy as np

from uae.bench.peers.job import Job, Outcome, Scan

SETTINGS = {
    "parameter maps": "the package's own defaults (rigid; rigid then affine; rigid, affine, then b-spline), which "
    "follow the manual's advice for CT-MR: AdvancedMattesMutualInformation, adaptive stochastic gradient descent",
    "resolutions": "4: the default, and the widest capture range",
    "iterations": "1000 a level instead of 256: the manual asks for 500-2000 where samples are random",
    "samples": "4000 new random ones each iteration (default 2048): a small moving scan has room for them",
    "samples outside": "RequiredRatioOfValidSamples 0.05: field-of-view overlap is partial, and the default of 0.25 "
    "ends in an error where a start is far off",
    "b-spline": "final grid 20 mm (10 mm would follow noise at a knot distance of 36-60 mm)",
    "starts": "middles of the boxes and centres of mass, the better",
}
ITERATIONS, SAMPLES, RESOLUTIONS, GRID_MM = 1000, 4000, 4, 20.0


def _image(scan: Scan):
    import itk

    image = itk.image_from_array(np.ascontiguousarray(scan.array, dtype=np.float32))
    image.SetSpacing(scan.spacing.tolist())
    image.SetOrigin(scan.origin.tolist())
    image.SetDirection(itk.matrix_from_array(np.ascontiguousarray(scan.direction, dtype=np.float64)))
    return image


def register(job: Job, other: Scan) -> Outcome:
    """Register from the identity; "deformable" is rigid, affine and b-spline after each other.

    Args:
        job: reference, method, threads, seed.
        other: the other scan, its header already carried to the start.

    Raises:
        ValueError: this peer has no such method.
    """
    import itk

    chains = {"rigid": ["rigid"], "affine": ["rigid", "affine"], "deformable": ["rigid", "affine", "bspline"]}
    if job.method not in chains:
        raise ValueError(f"elastix has no method {job.method!r}")
    parameters = itk.ParameterObject.New()
    for name in chains[job.method]:
        if name == "bspline":
            entries = parameters.GetDefaultParameterMap(name, RESOLUTIONS, GRID_MM)
        else:
            entries = parameters.GetDefaultParameterMap(name, RESOLUTIONS)
        entries["MaximumNumberOfIterations"] = [str(int(job.options.get("iterations", ITERATIONS)))]
        entries["NumberOfSpatialSamples"] = [str(SAMPLES)]
        entries["RequiredRatioOfValidSamples"] = ["0.05"]
        entries["RandomSeed"] = [str(job.seed)]
        entries["AutomaticTransformInitialization"] = ["false"]
        entries["WriteResultImage"] = ["false"]
        parameters.AddParameterMap(entries)
    fixed, moving = _image(job.reference), _image(other)
    method = itk.ElastixRegistrationMethod.New(fixed, moving)
    method.SetParameterObject(parameters)
    method.SetNumberOfThreads(job.threads)
    method.SetLogToConsole(False)
    method.UpdateLargestPossibleRegion()
    found = method.GetTransformParameterObject()
    maps = [found.GetParameterMap(i) for i in range(found.GetNumberOfParameterMaps())]
    linear = np.eye(4)
    for entries in maps:
        if entries["Transform"][0] != "BSplineTransform":
            linear = linear_matrix(entries) @ linear
    if job.method != "deformable":
        return Outcome(linear)
    field = itk.transformix_deformation_field(moving, found)
    vectors = np.asarray(itk.array_from_image(field), dtype=np.float32)
    return Outcome(linear, vectors, job.reference)


def linear_matrix(entries) -> np.ndarray:
    """(4, 4) LPS mm, reference -> other, of a rigid (Euler) or affine transform's parameter map.

    elastix's angles are ITK's Euler3DTransform: R = Rz Rx Ry about CenterOfRotationPoint, in radians.
    """
    values = np.array([float(v) for v in entries["TransformParameters"]])
    center = np.array([float(v) for v in entries["CenterOfRotationPoint"]])
    if entries["Transform"][0] == "EulerTransform":
        (cx, cy, cz), (sx, sy, sz) = np.cos(values[:3]), np.sin(values[:3])
        about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
        about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
        about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
        order_zyx = str(entries["ComputeZYX"][0]).lower() == "true" if "ComputeZYX" in entries else False
        rotation = about_z @ about_y @ about_x if order_zyx else about_z @ about_x @ about_y
    elif entries["Transform"][0] == "AffineTransform":
        rotation = values[:9].reshape(3, 3)
    else:
        raise ValueError(f"elastix returned an unexpected {entries['Transform'][0]}")
    matrix = np.eye(4)
    matrix[:3, :3] = rotation
    matrix[:3, 3] = center + values[-3:] - rotation @ center
    return matrix
