"""Compiled MIND-SSC descriptors: every inner loop runs over a row of voxels, so that it becomes vector instructions."""

from __future__ import annotations

import numpy as np

from uae.deeds.compiled import compile_kernel


@compile_kernel
def _add_rows(source: np.ndarray, target: np.ndarray) -> None:
    """Add source to target, elementwise over rows of equal length."""
    for x in range(target.shape[0]):
        target[x] += source[x]


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
    line = np.empty(nx, np.float32)
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
        column[:] = np.float32(0)
        for source in range(max(z - q, 0), min(z + q + 1, nz)):
            _add_rows(squares[source % ring].reshape(-1), column.reshape(-1))
        for y in range(ny):
            line[:] = np.float32(0)
            for source in range(max(y - q, 0), min(y + q + 1, ny)):
                _add_rows(column[source], line)
            target = box[z - first, y]
            target[:] = np.float32(0)
            for shift in range(-q, q + 1):
                low, high = max(0, -shift), min(nx, nx - shift)
                if low < high:
                    _add_rows(line[low + shift : high + shift], target[low:high])


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
    values = np.empty((12, nx), np.float32)
    least, noise = np.empty(nx, np.float32), np.empty(nx, np.float32)
    limits = np.empty((5, nx), np.float32)
    thirds = np.empty((3, nx), np.float32)
    twelve, floor, zero = np.float32(12), np.float32(1e-6), np.float32(0)
    bits = (np.float32(1), np.float32(2), np.float32(4), np.float32(8), np.float32(16))
    for z in range(first, last):
        for y in range(ny):
            for channel in range(12):
                az, ay, dx = z + anchors[channel, 0], y + anchors[channel, 1], anchors[channel, 2]
                home = box[pairs[channel], z - box_first, y]
                values[channel] = home
                low, high = max(0, -dx), min(nx, nx - dx)
                if 0 <= az < nz and 0 <= ay < ny and low < high:
                    values[channel, low:high] = box[pairs[channel], az - box_first, ay, low + dx : high + dx]
            least[:] = values[0]
            for channel in range(1, 12):
                row = values[channel]
                for x in range(nx):
                    least[x] = row[x] if row[x] < least[x] else least[x]
            noise[:] = np.float32(0)
            for channel in range(12):
                row = values[channel]
                for x in range(nx):
                    row[x] -= least[x]
                    noise[x] += row[x]
            for x in range(nx):
                mean = noise[x] / twelve
                noise[x] = mean if mean > floor else floor
            for number in range(5):
                limit = limits[number]
                for x in range(nx):
                    limit[x] = thresholds[number] * noise[x]
            # Codes of four channels are collected as one float, exactly: float32 lanes stay narrow, integers do not.
            thirds[:] = zero
            a, b, c, d, e = limits[0], limits[1], limits[2], limits[3], limits[4]
            for channel in range(12):
                row, third = values[channel], thirds[channel // 4]
                scale = np.float32(32 ** (channel % 4))
                for x in range(nx):
                    value = row[x]
                    code = bits[0] if value < a[x] else zero
                    code += bits[1] if value < b[x] else zero
                    code += bits[2] if value < c[x] else zero
                    code += bits[3] if value < d[x] else zero
                    code += bits[4] if value < e[x] else zero
                    third[x] += code * scale
            words, low, middle, high = out[z, y], thirds[0], thirds[1], thirds[2]
            for x in range(nx):
                word = np.int64(low[x]) | (np.int64(middle[x]) << 20) | (np.int64(high[x]) << 40)
                words[x] = np.uint64(word)
