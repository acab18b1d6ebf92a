"""Compiled trees and belief propagation.

There is no parallel loop inside: a barrier per tree level costs many times the work itself as soon as another process
uses the cores (our measurement).
"""

from __future__ import annotations

import numpy as np

from uae.deeds.compiled import compile_kernel
from uae.deeds.vector import FLOATS
from uae.deeds.vector import least_sums_1 as _least_sums_1
from uae.deeds.vector import least_sums_4 as _least_sums_4


@compile_kernel
def _min_plus(source: np.ndarray, weight: np.ndarray, side: int, best: np.ndarray, out: np.ndarray) -> None:
    """One pass along the slowest axis: out[r, p] = min_c source[c, r] + weight[p, c], the axes rotated by one.

    Args:
        source: (side^3 + padding,) float32; the padding of 4 FLOATS may be read.
        weight: (side, side) float32.
        side: labels along one axis.
        best: (side^2 + padding,) float32 scratch.
        out: (side^3,) float32.
    """
    rest = side * side
    a, w, b = source.ctypes.data, weight.ctypes.data, best.ctypes.data
    for p in range(side):
        r = 0
        while r < rest:
            if r + 2 * FLOATS < rest:
                _least_sums_4(a + 4 * r, w + 4 * p * side, b + 4 * r, side, rest)
                r += 4 * FLOATS
            else:
                _least_sums_1(a + 4 * r, w + 4 * p * side, b + 4 * r, side, rest)
                r += FLOATS
        for r in range(rest):
            out[r * side + p] = best[r]


@compile_kernel
def _minimum(values: np.ndarray, zeros: np.ndarray, scratch: np.ndarray, count: int) -> np.float32:
    """Smallest of the first `count` values."""
    width = 4 * FLOATS
    least = values[0]
    lines = count // width
    if lines > 0:
        _least_sums_4(values.ctypes.data, zeros.ctypes.data, scratch.ctypes.data, lines, width)
        for n in range(width):
            least = min(least, scratch[n])
    for n in range(lines * width, count):
        least = min(least, values[n])
    return least


@compile_kernel
def send_messages(
    cost: np.ndarray, order: np.ndarray, parent: np.ndarray, weight: np.ndarray, delta: np.ndarray, side: int,
    first: int, last: int, minima: np.ndarray,
) -> None:  # fmt: skip
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
    a = np.zeros(labels + 4 * FLOATS, np.float32)
    b = np.zeros(labels + 4 * FLOATS, np.float32)
    best = np.zeros(side * side + 4 * FLOATS, np.float32)
    zeros = np.zeros(labels // (4 * FLOATS) + 1, np.float32)
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
            _min_plus(a, table, side, best, b)
            a, b = b, a
        least = _minimum(a, zeros, best, labels)
        minima[node] = least
        target = cost[parent[node]]
        for label in range(labels):
            target[label] += a[label] - least


@compile_kernel
def choose_labels(
    cost: np.ndarray, order: np.ndarray, parent: np.ndarray, delta: np.ndarray, side: int, first: int, last: int,
    chosen: np.ndarray,
) -> None:  # fmt: skip
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


@compile_kernel
def block_differences(image: np.ndarray, step: int, offset: np.ndarray, out: np.ndarray) -> None:
    """Mean absolute difference of each block to its next neighbour along z, y and x; 0 where there is none.

    Args:
        image: (Z, Y, X) float32.
        step: side of a block.
        offset: (3,) first voxel of the first block, z, y, x.
        out: (3, nz, ny, nx) float64.
    """
    nz, ny, nx = out.shape[1:]
    sums = np.empty((3, nx))
    for z in range(nz):
        for y in range(ny):
            sums[:] = 0.0
            for dz in range(step):
                vz = offset[0] + z * step + dz
                for dy in range(step):
                    vy = offset[1] + y * step + dy
                    row = image[vz, vy, offset[2] : offset[2] + nx * step]
                    if z + 1 < nz:
                        _add_differences(row, image[vz + step, vy, offset[2] : offset[2] + nx * step], step, sums[0])
                    if y + 1 < ny:
                        _add_differences(row, image[vz, vy + step, offset[2] : offset[2] + nx * step], step, sums[1])
                    _add_differences(row[: (nx - 1) * step], row[step:], step, sums[2])
            for axis in range(3):
                for x in range(nx):
                    out[axis, z, y, x] = sums[axis, x] / step**3


@compile_kernel
def _add_differences(one: np.ndarray, other: np.ndarray, step: int, sums: np.ndarray) -> None:
    """Add the absolute differences of two rows, block by block."""
    for x in range(one.shape[0] // step):
        total = np.float32(0)
        for s in range(step):
            total += abs(other[x * step + s] - one[x * step + s])
        sums[x] += total


@compile_kernel
def depths(order: np.ndarray, parent: np.ndarray, depth: np.ndarray) -> None:
    """Generation of each node, from the root's 0 on; `order` has every parent before its children."""
    for position in range(1, order.shape[0]):
        depth[order[position]] = depth[parent[order[position]]] + 1
