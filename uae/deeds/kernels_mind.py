"""Compiled MIND-SSC descriptors: every inner loop runs over a row of voxels, so that it becomes vector instructions."""

from __future__ import annotations

import numpy as np

from uae.deeds.compiled import compile_kernel
from uae.deeds.vector import FLOATS
from uae.deeds.vector import quantise as _quantise


@compile_kernel
def _sum_3(a: np.ndarray, b: np.ndarray, c: np.ndarray, out: np.ndarray) -> None:
    for x in range(out.shape[0]):
        out[x] = a[x] + b[x] + c[x]


@compile_kernel
def _sum_5(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray, e: np.ndarray, out: np.ndarray) -> None:
    for x in range(out.shape[0]):
        out[x] = a[x] + b[x] + c[x] + d[x] + e[x]


@compile_kernel
def _sum_7(
    a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray, e: np.ndarray, f: np.ndarray, g: np.ndarray,
    out: np.ndarray,
) -> None:  # fmt: skip
    for x in range(out.shape[0]):
        out[x] = a[x] + b[x] + c[x] + d[x] + e[x] + f[x] + g[x]


@compile_kernel
def _sum_ring(rows: np.ndarray, first: int, last: int, out: np.ndarray) -> None:
    """Elementwise sum of the rows first..last-1, which stand in a ring, added up in their order."""
    ring, count = rows.shape[0], last - first
    if count == 3:
        _sum_3(rows[first % ring], rows[(first + 1) % ring], rows[(first + 2) % ring], out)
    elif count == 5:
        _sum_5(
            rows[first % ring], rows[(first + 1) % ring], rows[(first + 2) % ring], rows[(first + 3) % ring],
            rows[(first + 4) % ring], out,
        )  # fmt: skip
    elif count == 7:
        _sum_7(
            rows[first % ring], rows[(first + 1) % ring], rows[(first + 2) % ring], rows[(first + 3) % ring],
            rows[(first + 4) % ring], rows[(first + 5) % ring], rows[(first + 6) % ring], out,
        )  # fmt: skip
    else:
        out[:] = np.float32(0)
        for number in range(first, last):
            row = rows[number % ring]
            for x in range(out.shape[0]):
                out[x] += row[x]


@compile_kernel
def ssd_planes(
    image: np.ndarray, dz: int, dy: int, dx: int, q: int, first: int, last: int, squares: np.ndarray, box: np.ndarray
) -> None:
    """Box sums of squared differences for the planes first..last-1 of one neighbour offset.

    Args:
        image: (Z, Y, X) float32.
        dz: offset of the neighbour along z in voxels; where it leaves the volume the difference is 0.
        dy: along y.
        dx: along x.
        q: half-width of the box, cut at the volume's border.
        first: first plane.
        last: plane after the last one.
        squares: (2 q + 1, Y, X) float32 scratch: a ring of planes.
        box: (last - first, Y, X) float32 out.
    """
    nz, ny, nx = image.shape
    x_low, x_high = max(0, -dx), max(min(nx, nx - dx), max(0, -dx))
    column = np.empty((ny, nx), np.float32)
    line = np.zeros(nx + 2 * q, np.float32)  # its ends stay 0
    shifts = np.empty((2 * q + 1, nx), np.float32)
    ring = squares.shape[0]
    made = max(first - q, 0)
    for z in range(first, last):
        while made < min(z + q + 1, nz):
            plane = squares[made % ring]
            plane[:] = np.float32(0)
            if 0 <= made + dz < nz:
                for y in range(max(0, -dy), min(ny, ny - dy)):
                    here = image[made, y, x_low:x_high]
                    there = image[made + dz, y + dy, x_low + dx : x_high + dx]
                    row = plane[y, x_low:x_high]
                    for x in range(row.shape[0]):
                        difference = there[x] - here[x]
                        row[x] = difference * difference
            made += 1
        _sum_ring(squares.reshape(ring, ny * nx), max(z - q, 0), min(z + q + 1, nz), column.reshape(-1))
        for y in range(ny):
            _sum_ring(column, max(y - q, 0), min(y + q + 1, ny), line[q : q + nx])
            target = box[z - first, y]
            if q == 1:
                _sum_3(line[:nx], line[1 : 1 + nx], line[2 : 2 + nx], target)
            elif q == 2:
                _sum_5(line[:nx], line[1 : 1 + nx], line[2 : 2 + nx], line[3 : 3 + nx], line[4 : 4 + nx], target)
            elif q == 3:
                _sum_7(
                    line[:nx], line[1 : 1 + nx], line[2 : 2 + nx], line[3 : 3 + nx], line[4 : 4 + nx],
                    line[5 : 5 + nx], line[6 : 6 + nx], target,
                )  # fmt: skip
            else:
                for shift in range(2 * q + 1):
                    shifts[shift] = line[shift : shift + nx]
                _sum_ring(shifts, 0, 2 * q + 1, target)


@compile_kernel
def mind_words(
    box: np.ndarray, first: int, box_first: int, last: int, pairs: np.ndarray, anchors: np.ndarray,
    thresholds: np.ndarray, out: np.ndarray,
) -> None:  # fmt: skip
    """Normalise and quantise twelve channels into words, for the planes first..last-1.

    Args:
        box: (6, planes, Y, X) float32, plane 0 is volume plane box_first.
        first: first plane of the volume to write.
        box_first: volume plane of box plane 0.
        last: plane after the last one.
        pairs: (12,) which of the six images a channel reads.
        anchors: (12, 3) where it reads it, in voxels z, y, x; outside the volume it is read in place.
        thresholds: (5,) float32, decreasing.
        out: (Z, Y, X) uint64.
    """
    nz, ny, nx = out.shape
    padded = max(nx, FLOATS)
    values = np.zeros((12, padded), np.float32)
    words = np.zeros(padded, np.uint64)
    rows = np.empty(12, np.int64)
    narrow = nx < FLOATS
    for z in range(first, last):
        for y in range(ny):
            for channel in range(12):
                az, ay, dx = z + anchors[channel, 0], y + anchors[channel, 1], anchors[channel, 2]
                inside = 0 <= az < nz and 0 <= ay < ny
                if dx == 0 and not narrow:
                    source = box[pairs[channel], (az if inside else z) - box_first, ay if inside else y]
                    rows[channel] = source.ctypes.data
                    continue
                # Near the ends of the row the voxel itself is read: such rows are put together first.
                target = values[channel]
                target[:nx] = box[pairs[channel], z - box_first, y]
                low, high = max(0, -dx), min(nx, nx - dx)
                if inside and low < high:
                    target[low:high] = box[pairs[channel], az - box_first, ay, low + dx : high + dx]
                rows[channel] = target.ctypes.data
            place = words.ctypes.data if narrow else out[z, y].ctypes.data
            for x in range(0, padded, FLOATS):
                _quantise(rows.ctypes.data, thresholds.ctypes.data, place, min(x, padded - FLOATS))
            if narrow:
                out[z, y, :] = words[:nx]
