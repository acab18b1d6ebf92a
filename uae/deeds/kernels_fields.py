"""Compiled warps, merges and inversions of displacement fields; each equals its scipy twin to the last bit."""

from __future__ import annotations

import numpy as np

from uae.deeds.compiled import compile_kernel


@compile_kernel
def _place(coordinate: float, size: int) -> tuple:
    """Lower neighbour, upper neighbour and weight of the upper one, clamped to 0 .. size - 1."""
    clamped = min(max(coordinate, 0.0), size - 1.0)
    low = int(np.floor(clamped))
    return low, min(low + 1, size - 1), clamped - low


@compile_kernel
def _eight(
    image: np.ndarray, z0: int, z1: int, wz: float, y0: int, y1: int, wy: float, x0: int, x1: int, wx: float
) -> float:
    """Weighted sum of eight neighbours; the order of the sum is that of scipy."""
    vz, vy, vx = 1.0 - wz, 1.0 - wy, 1.0 - wx
    total = image[z0, y0, x0] * vz * vy * vx
    total += image[z0, y0, x1] * vz * vy * wx
    total += image[z0, y1, x0] * vz * wy * vx
    total += image[z0, y1, x1] * vz * wy * wx
    total += image[z1, y0, x0] * wz * vy * vx
    total += image[z1, y0, x1] * wz * vy * wx
    total += image[z1, y1, x0] * wz * wy * vx
    total += image[z1, y1, x1] * wz * wy * wx
    return total


@compile_kernel
def _trilinear(image: np.ndarray, z: float, y: float, x: float) -> float:
    """Image at (z, y, x) voxels, the border value outside."""
    z0, z1, wz = _place(z, image.shape[0])
    y0, y1, wy = _place(y, image.shape[1])
    x0, x1, wx = _place(x, image.shape[2])
    return _eight(image, z0, z1, wz, y0, y1, wy, x0, x1, wx)


@compile_kernel
def spread(
    field: np.ndarray, low: np.ndarray, fraction: np.ndarray, low_z: np.ndarray, fraction_z: np.ndarray,
    low_y: np.ndarray, fraction_y: np.ndarray, out: np.ndarray,
) -> None:  # fmt: skip
    """Control point field (3, nz, ny, nx) float32 on a finer lattice, linear along one axis after the other.

    Args:
        field: values.
        low: (X,) int64 lower neighbour of each output sample along x.
        fraction: (X,) float32 weight of the upper one.
        low_z: the same along z.
        fraction_z: the same along z.
        low_y: the same along y.
        fraction_y: the same along y.
        out: (3, Z, Y, X) float32.
    """
    ny, nx = field.shape[2], field.shape[3]
    plane = np.empty((ny, nx), np.float32)
    line = np.empty(nx, np.float32)
    for component in range(3):
        for z in range(out.shape[1]):
            below = field[component, low_z[z]]
            above = field[component, min(low_z[z] + 1, field.shape[1] - 1)]
            for y in range(ny):
                for x in range(nx):
                    plane[y, x] = below[y, x] + fraction_z[z] * (above[y, x] - below[y, x])
            for y in range(out.shape[2]):
                one, other = plane[low_y[y]], plane[min(low_y[y] + 1, ny - 1)]
                for x in range(nx):
                    line[x] = one[x] + fraction_y[y] * (other[x] - one[x])
                target = out[component, z, y]
                for x in range(target.shape[0]):
                    start = line[low[x]]
                    target[x] = start + fraction[x] * (line[min(low[x] + 1, nx - 1)] - start)


@compile_kernel
def warp_planes(
    image: np.ndarray, valid: np.ndarray, dense: np.ndarray, first: int, last: int, warped: np.ndarray,
    warped_valid: np.ndarray,
) -> None:  # fmt: skip
    """Image at x + u(x), and where that is valid, for the planes first..last-1.

    Args:
        image: (Z, Y, X) float32.
        valid: (Z, Y, X) bool, or of size 0.
        dense: (3, last - first, Y, X) float32 displacement in voxels of these planes.
        first: first plane.
        last: plane after the last one.
        warped: (Z, Y, X) float32 out.
        warped_valid: (Z, Y, X) bool out, or of size 0.
    """
    nz, ny, nx = image.shape
    for z in range(first, last):
        for y in range(ny):
            for x in range(nx):
                vz = z + np.float64(dense[0, z - first, y, x])
                vy = y + np.float64(dense[1, z - first, y, x])
                vx = x + np.float64(dense[2, z - first, y, x])
                z0, z1, wz = _place(vz, nz)
                y0, y1, wy = _place(vy, ny)
                x0, x1, wx = _place(vx, nx)
                warped[z, y, x] = _eight(image, z0, z1, wz, y0, y1, wy, x0, x1, wx)
                if valid.size == 0:
                    continue
                inside = -0.5 <= vz <= nz - 0.5 and -0.5 <= vy <= ny - 0.5 and -0.5 <= vx <= nx - 0.5
                corners = 0
                if inside:
                    corners = (
                        valid[z0, y0, x0] + valid[z0, y0, x1] + valid[z0, y1, x0] + valid[z0, y1, x1]
                        + valid[z1, y0, x0] + valid[z1, y0, x1] + valid[z1, y1, x0] + valid[z1, y1, x1]
                    )  # fmt: skip
                warped_valid[z, y, x] = corners == 8 or (
                    corners > 0 and np.float32(_eight(valid, z0, z1, wz, y0, y1, wy, x0, x1, wx)) > 0.5
                )


@compile_kernel
def _cubic(fraction: float, weights: np.ndarray) -> None:
    """Cubic B-spline weights of four neighbours, as scipy computes them."""
    other = 1.0 - fraction
    weights[1] = (fraction * fraction * (fraction - 2.0) * 3.0 + 4.0) / 6.0
    weights[2] = (other * other * (other - 2.0) * 3.0 + 4.0) / 6.0
    weights[0] = other * other * other / 6.0
    weights[3] = 1.0 - weights[0] - weights[1] - weights[2]


@compile_kernel
def sample(field: np.ndarray, coordinates: np.ndarray, margin: int, cubic: bool, out: np.ndarray) -> None:
    """Each component of a field at places, the border value outside.

    Args:
        field: (3, nz, ny, nx) float64; spline coefficients with `margin` samples around where cubic.
        coordinates: (3, Z, Y, X) float64 places in samples, without the margin.
        margin: samples that the field is padded by on all sides.
        cubic: cubic B-spline instead of trilinear.
        out: (3, Z, Y, X) float64.
    """
    wz, wy, wx = np.empty(4), np.empty(4), np.empty(4)
    sizes = field.shape
    for z in range(out.shape[1]):
        for y in range(out.shape[2]):
            for x in range(out.shape[3]):
                vz = coordinates[0, z, y, x] + margin
                vy = coordinates[1, z, y, x] + margin
                vx = coordinates[2, z, y, x] + margin
                if not cubic:
                    for component in range(3):
                        out[component, z, y, x] = _trilinear(field[component], vz, vy, vx)
                    continue
                vz = min(max(vz, 0.0), sizes[1] - 1.0)
                vy = min(max(vy, 0.0), sizes[2] - 1.0)
                vx = min(max(vx, 0.0), sizes[3] - 1.0)
                fz, fy, fx = int(np.floor(vz)), int(np.floor(vy)), int(np.floor(vx))
                _cubic(vz - fz, wz)
                _cubic(vy - fy, wy)
                _cubic(vx - fx, wx)
                a, b, c = 0.0, 0.0, 0.0
                for k in range(4):
                    sz = min(max(fz - 1 + k, 0), sizes[1] - 1)
                    for j in range(4):
                        sy = min(max(fy - 1 + j, 0), sizes[2] - 1)
                        for i in range(4):
                            sx = min(max(fx - 1 + i, 0), sizes[3] - 1)
                            a += field[0, sz, sy, sx] * wz[k] * wy[j] * wx[i]
                            b += field[1, sz, sy, sx] * wz[k] * wy[j] * wx[i]
                            c += field[2, sz, sy, sx] * wz[k] * wy[j] * wx[i]
                out[0, z, y, x], out[1, z, y, x], out[2, z, y, x] = a, b, c


@compile_kernel
def invert_planes(dense: np.ndarray, first: int, last: int, tolerance: float, rounds: int, inverse: np.ndarray) -> None:
    """Fixed-point inversion v <- -u(x + v) of the planes first..last-1, in place.

    Args:
        dense: (3, Z, Y, X) float32 u in voxels.
        first: first plane.
        last: plane after the last one.
        tolerance: change in voxels at which a voxel is done.
        rounds: at most so many iterations.
        inverse: (3, Z, Y, X) in: first guess; out: v.
    """
    for z in range(first, last):
        for y in range(dense.shape[2]):
            for x in range(dense.shape[3]):
                a = np.float64(inverse[0, z, y, x])
                b = np.float64(inverse[1, z, y, x])
                c = np.float64(inverse[2, z, y, x])
                for _ in range(rounds):
                    vz, vy, vx = z + a, y + b, x + c
                    # In between the twin keeps its samples in the field's own type.
                    na = -np.float64(np.float32(_trilinear(dense[0], vz, vy, vx)))
                    nb = -np.float64(np.float32(_trilinear(dense[1], vz, vy, vx)))
                    nc = -np.float64(np.float32(_trilinear(dense[2], vz, vy, vx)))
                    change = max(abs(na - a), abs(nb - b), abs(nc - c))
                    a, b, c = na, nb, nc
                    if change <= tolerance:
                        break
                inverse[0, z, y, x], inverse[1, z, y, x], inverse[2, z, y, x] = a, b, c


@compile_kernel
def consistency(forward: np.ndarray, backward: np.ndarray, stride: int) -> float:
    """Mean of |v(x) + u(x + v(x))| in voxels over every `stride`-th voxel of each axis.

    Args:
        forward: (3, Z, Y, X) float32 u.
        backward: the same shape, v.
        stride: >= 1.
    """
    total, count = 0.0, 0
    for z in range(0, forward.shape[1], stride):
        for y in range(0, forward.shape[2], stride):
            for x in range(0, forward.shape[3], stride):
                a, b, c = backward[0, z, y, x], backward[1, z, y, x], backward[2, z, y, x]
                da = a + _trilinear(forward[0], z + a, y + b, x + c)
                db = b + _trilinear(forward[1], z + a, y + b, x + c)
                dc = c + _trilinear(forward[2], z + a, y + b, x + c)
                total += np.sqrt(da * da + db * db + dc * dc)
                count += 1
    return total / count


@compile_kernel
def jacobian_planes(dense: np.ndarray, first: int, last: int, out: np.ndarray) -> None:
    """det(I + grad u) by central differences (one-sided at the border) of the planes first..last-1.

    Args:
        dense: (3, Z, Y, X) float32 u in voxels, two samples or more along each axis.
        first: first plane.
        last: plane after the last one.
        out: (Z, Y, X) float32.
    """
    nz, ny, nx = out.shape
    m = np.empty((3, 3))
    for z in range(first, last):
        z0, z1 = max(z - 1, 0), min(z + 1, nz - 1)
        for y in range(ny):
            y0, y1 = max(y - 1, 0), min(y + 1, ny - 1)
            for x in range(nx):
                x0, x1 = max(x - 1, 0), min(x + 1, nx - 1)
                for c in range(3):
                    m[c, 0] = (np.float64(dense[c, z1, y, x]) - dense[c, z0, y, x]) / (z1 - z0)
                    m[c, 1] = (np.float64(dense[c, z, y1, x]) - dense[c, z, y0, x]) / (y1 - y0)
                    m[c, 2] = (np.float64(dense[c, z, y, x1]) - dense[c, z, y, x0]) / (x1 - x0)
                    m[c, c] += 1.0
                out[z, y, x] = (
                    m[0, 0] * (m[1, 1] * m[2, 2] - m[1, 2] * m[2, 1])
                    - m[0, 1] * (m[1, 0] * m[2, 2] - m[1, 2] * m[2, 0])
                    + m[0, 2] * (m[1, 0] * m[2, 1] - m[1, 1] * m[2, 0])
                )


@compile_kernel
def laplacian(values: np.ndarray, out: np.ndarray) -> None:
    """Minus the discrete Laplacian of (nz, ny, nx) float64 with free ends, as its numpy twin adds it up."""
    nz, ny, nx = values.shape
    for z in range(nz):
        for y in range(ny):
            here, row = values[z, y], out[z, y]
            row[:] = 0.0
            if z + 1 < nz:
                other = values[z + 1, y]
                for x in range(nx):
                    row[x] -= other[x] - here[x]
            if z > 0:
                other = values[z - 1, y]
                for x in range(nx):
                    row[x] += here[x] - other[x]
            if y + 1 < ny:
                other = values[z, y + 1]
                for x in range(nx):
                    row[x] -= other[x] - here[x]
            if y > 0:
                other = values[z, y - 1]
                for x in range(nx):
                    row[x] += here[x] - other[x]
            for x in range(nx - 1):
                row[x] -= here[x + 1] - here[x]
            for x in range(1, nx):
                row[x] += here[x] - here[x - 1]
