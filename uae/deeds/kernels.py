"""Compiled kernels of DEEDS (numba). Each has an exact numpy twin beside its caller, which is tested against it.

Every kernel releases the interpreter lock and works on a chunk, so that two directions run in two threads and a
registration can be cancelled between chunks. There is no parallel loop inside: a barrier per tree level costs many
times the work itself as soon as another process uses the cores (our measurement).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic


def _compile(function: Callable) -> Callable:
    """Compile lazily, without the interpreter lock, with the disk cache where a folder for it can be written."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:
        return njit(nogil=True)(function)


@intrinsic
def _popcount(typing_context: Any, word: types.Type) -> tuple:
    """Set bits of an unsigned 64-bit word by the processor's instruction (LLVM ctpop)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), generate


@_compile
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
        squares: (last - first + 2 q, Y, X) float32 scratch.
        box: (last - first, Y, X) float32 out.
    """
    nz, ny, nx = image.shape
    low = max(first - q, 0)
    high = min(last + q, nz)
    x_low = max(0, -dx)
    x_high = min(nx, nx - dx)
    for z in range(low, high):
        plane = squares[z - low]
        plane[:] = np.float32(0)
        if z + dz < 0 or z + dz >= nz:
            continue
        for y in range(max(0, -dy), min(ny, ny - dy)):
            here = image[z, y]
            there = image[z + dz, y + dy]
            row = plane[y]
            for x in range(x_low, x_high):
                difference = there[x + dx] - here[x]
                row[x] = difference * difference
    column = np.empty((ny, nx), np.float32)
    line = np.empty(nx, np.float32)
    for z in range(first, last):
        column[:] = np.float32(0)
        for source in range(max(z - q, low), min(z + q + 1, high)):
            for y in range(ny):
                row = squares[source - low, y]
                total = column[y]
                for x in range(nx):
                    total[x] += row[x]
        for y in range(ny):
            line[:] = np.float32(0)
            for source in range(max(y - q, 0), min(y + q + 1, ny)):
                row = column[source]
                for x in range(nx):
                    line[x] += row[x]
            target = box[z - first, y]
            target[:] = np.float32(0)
            for shift in range(-q, q + 1):
                for x in range(max(0, -shift), min(nx, nx - shift)):
                    target[x] += line[x + shift]


@_compile
def mind_words(
    box: np.ndarray,
    first: int,
    box_first: int,
    last: int,
    pairs: np.ndarray,
    anchors: np.ndarray,
    thresholds: np.ndarray,
    out: np.ndarray,
) -> None:
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
    values = np.empty(12, np.float32)
    for z in range(first, last):
        for y in range(ny):
            for x in range(nx):
                least = np.float32(np.inf)
                for channel in range(12):
                    az = z + anchors[channel, 0]
                    ay = y + anchors[channel, 1]
                    ax = x + anchors[channel, 2]
                    if az < 0 or az >= nz or ay < 0 or ay >= ny or ax < 0 or ax >= nx:
                        az, ay, ax = z, y, x
                    value = box[pairs[channel], az - box_first, ay, ax]
                    values[channel] = value
                    least = min(least, value)
                noise = np.float32(0)
                for channel in range(12):
                    values[channel] -= least
                    noise += values[channel]
                noise = max(noise / np.float32(12), np.float32(1e-6))
                word = np.uint64(0)
                for channel in range(12):
                    ratio = values[channel] / noise
                    code = np.uint64(0)
                    for threshold in range(5):
                        if thresholds[threshold] > ratio:
                            code = (code << np.uint64(1)) | np.uint64(1)
                    word |= code << np.uint64(5 * channel)
                out[z, y, x] = word


@_compile
def hamming_rows(
    fixed: np.ndarray,
    counted: np.ndarray,
    moving: np.ndarray,
    samples: np.ndarray,
    shifts: np.ndarray,
    step: int,
    first: int,
    last: int,
    counts_y: int,
    scale: np.float32,
    out: np.ndarray,
) -> None:
    """Data cost of the control points in the grid rows first..last-1, all labels.

    Both word volumes are de-interleaved along x by the grid step, so that the samples of neighbouring control points
    are neighbours in memory and the inner loop runs over control points in vector registers.

    Args:
        fixed: (nz step, ny step, step, nx) uint64.
        counted: the same shape; all bits where the fixed voxel counts, none where it is not known.
        moving: (nz step + 2 reach, ny step + 2 reach, step, >= nx + 2 reach / step) uint64.
        samples: (S, 3) int64 sampled voxels of a block, z, y, x.
        shifts: (side,) int64 displacement plus reach of each label of one axis, >= 0.
        step: grid step.
        first: first row (z * ny + y of the control grid).
        last: row after the last one.
        counts_y: ny.
        scale: factor from summed Hamming distance to cost.
        out: (nz ny nx, side^3) float32.
    """
    nx = fixed.shape[3]
    side = shifts.shape[0]
    total = np.empty(nx, np.uint64)
    for row in range(first, last):
        base_z = row // counts_y * step
        base_y = row % counts_y * step
        label = 0
        for lz in range(side):
            for ly in range(side):
                for lx in range(side):
                    total[:] = np.uint64(0)
                    for sample in range(samples.shape[0]):
                        z = base_z + samples[sample, 0]
                        y = base_y + samples[sample, 1]
                        x = samples[sample, 2]
                        start = (x + shifts[lx]) // step
                        a = fixed[z, y, x]
                        c = counted[z, y, x]
                        b = moving[z + shifts[lz], y + shifts[ly], (x + shifts[lx]) % step, start : start + nx]
                        for node in range(nx):
                            total[node] += _popcount((a[node] ^ b[node]) & c[node])
                    for node in range(nx):
                        out[row * nx + node, label] = np.float32(total[node]) * scale
                    label += 1


@_compile
def _min_plus(source: np.ndarray, weight: np.ndarray, side: int, out: np.ndarray) -> None:
    """One pass along the slowest axis: out[r, p] = min_c source[c, r] + weight[p, c], the axes rotated by one."""
    rest = side * side
    best = np.empty(rest, np.float32)
    for p in range(side):
        w = weight[p, 0]
        for r in range(rest):
            best[r] = source[r] + w
        for c in range(1, side):
            w = weight[p, c]
            line = source[c * rest : (c + 1) * rest]
            for r in range(rest):
                value = line[r] + w
                best[r] = value if value < best[r] else best[r]
        for r in range(rest):
            out[r * side + p] = best[r]


@_compile
def send_messages(
    cost: np.ndarray,
    order: np.ndarray,
    parent: np.ndarray,
    weight: np.ndarray,
    delta: np.ndarray,
    side: int,
    first: int,
    last: int,
    minima: np.ndarray,
) -> None:
    """Upward pass over order[first:last], last first: scale each node's cost, add its message to its parent.

    Args:
        cost: (N, side^3) float32, in: own data (plus messages received); out: scaled by the edge weight.
        order: (N,) nodes, every parent before its children.
        parent: (N,) parent of each node, negative at the root.
        weight: (N,) float32 weight of the edge to the parent.
        delta: (N, 3) float32 inherited displacement of parent minus node in quantisation steps, z, y, x.
        side: labels along one axis.
        first: first position in order.
        last: position after the last one.
        minima: (N,) float32 out, the constant taken off each message.
    """
    labels = side * side * side
    table = np.empty((side, side), np.float32)
    a = np.empty(labels, np.float32)
    b = np.empty(labels, np.float32)
    for position in range(last - 1, first - 1, -1):
        node = order[position]
        if parent[node] < 0:
            continue
        row = cost[node]
        factor = weight[node]
        for label in range(labels):
            row[label] *= factor
            a[label] = row[label]
        for axis in range(3):
            for p in range(side):
                for c in range(side):
                    distance = np.float32(p - c) + delta[node, axis]
                    table[p, c] = distance * distance
            _min_plus(a, table, side, b)
            a, b = b, a
        least = a[0]
        for label in range(1, labels):
            least = a[label] if a[label] < least else least
        minima[node] = least
        target = cost[parent[node]]
        for label in range(labels):
            target[label] += a[label] - least


@_compile
def choose_labels(
    cost: np.ndarray,
    order: np.ndarray,
    parent: np.ndarray,
    delta: np.ndarray,
    side: int,
    first: int,
    last: int,
    chosen: np.ndarray,
) -> None:
    """Downward pass over order[first:last]: the best label of each node, given that of its parent.

    Searching again is cheaper than storing a back-pointer for every label on the way up.
    """
    rest = np.empty((3, side), np.float32)
    for position in range(first, last):
        node = order[position]
        row = cost[node]
        above = parent[node]
        if above < 0:
            chosen[node] = np.argmin(row)
            continue
        label = chosen[above]
        for axis in range(3):
            here = label // (side * side) if axis == 0 else (label // side % side if axis == 1 else label % side)
            for c in range(side):
                distance = np.float32(here - c) + delta[node, axis]
                rest[axis, c] = distance * distance
        best = np.float32(np.inf)
        winner = 0
        for z in range(side):
            for y in range(side):
                plane = rest[0, z] + rest[1, y]
                offset = (z * side + y) * side
                for x in range(side):
                    value = row[offset + x] + (plane + rest[2, x])
                    if value < best:
                        best = value
                        winner = offset + x
        chosen[node] = winner
