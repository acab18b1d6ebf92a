"""Compiled data cost: descriptor words unfolded into rows that vectors can run over, and their Hamming distances."""

from __future__ import annotations

import numpy as np

from uae.deeds.compiled import compile_kernel
from uae.deeds.vector import NODES
from uae.deeds.vector import popcount_3 as _bits_3
from uae.deeds.vector import popcount_3_masked as _bits_3_masked
from uae.deeds.vector import popcount_4 as _bits_4
from uae.deeds.vector import popcount_4_masked as _bits_4_masked
from uae.deeds.vector import prefetch as _prefetch

_TILE = 48
"""Reads that all labels of a row take before the next ones: their words stay in the first-level cache."""
_LINE = 64
"""Bytes of a cache line."""


@compile_kernel
def unfold(
    words: np.ndarray, z0: int, y0: int, x0: int, edge: bool, neutral: np.uint64, out: np.ndarray, mask: np.ndarray
) -> None:
    """Copy words, de-interleaved along x by the grid step, so that neighbouring control points are neighbours.

    Args:
        words: (Z, Y, X) uint64.
        z0: plane of `words` in plane 0 of the output; outside the volume the edge's or the neutral word is taken.
        y0: the same for y.
        x0: the same for x.
        edge: replicate the edge instead of the neutral word.
        neutral: word outside the volume.
        out: (Z', Y', step, nx) uint64; x = step * c + s goes to [s, c].
        mask: the shape of `out`, or of size 0; all bits where the word is not the neutral one, else none.
    """
    size_z, size_y, size_x = words.shape
    depth, rows, step, columns = out.shape
    length = step * columns
    first, last = min(max(-x0, 0), length), max(min(size_x - x0, length), 0)
    row = np.empty(length, np.uint64)
    for z in range(depth):
        for y in range(rows):
            vz, vy = z + z0, y + y0
            if edge or (0 <= vz < size_z and 0 <= vy < size_y):
                source = words[min(max(vz, 0), size_z - 1), min(max(vy, 0), size_y - 1)]
                row[:first] = source[0] if edge else neutral
                row[last:] = source[size_x - 1] if edge else neutral
                if first < last:
                    row[first:last] = source[first + x0 : last + x0]
            else:
                row[:] = neutral
            for s in range(step):
                target = out[z, y, s]
                for c in range(columns):
                    target[c] = row[c * step + s]
            if mask.size:
                for s in range(step):
                    target = mask[z, y, s]
                    for c in range(columns):
                        target[c] = np.uint64(0xFFFFFFFFFFFFFFFF) if row[c * step + s] != neutral else np.uint64(0)


@compile_kernel
def _any_and_all(mask: np.ndarray, fixed_at: np.ndarray, node: int, count: int) -> tuple:
    """Whether any, and whether all words of `count` nodes count."""
    some, every = False, True
    for read in range(fixed_at.shape[0]):
        for n in range(count):
            known = mask[fixed_at[read] + node + n] != np.uint64(0)
            some = some or known
            every = every and known
    return some, every


@compile_kernel
def hamming_planes(
    fixed: np.ndarray, mask: np.ndarray, moving: np.ndarray, rows: np.ndarray, reads: np.ndarray, shifts: np.ndarray,
    first: int, last: int, counts_y: int, counts_x: int, scale: np.float32, out: np.ndarray,
) -> None:  # fmt: skip
    """Data cost for the pairs first..last-1 of a plane of control points and a label along z.

    All rows of the plane follow each other, since they search the same few planes of the moving words, which then stay
    in the cache.

    Args:
        fixed: (nz step, ny step, step, nodes) uint64 of `unfold`, nodes a multiple of NODES.
        mask: the same shape, or of size 0 where all words count.
        moving: (nz step + 2 reach, ny step + 2 reach, step, >= nodes + 2 reach / step) uint64 of `unfold`.
        rows: (K, 2) int64 rows of a block that hold samples: z, y.
        reads: (S, 2) int64 sampled words: number of the row, x.
        shifts: (side,) int64 displacement plus reach of each label of one axis, >= 0.
        first: first pair, z * side + label.
        last: pair after the last one.
        counts_y: ny.
        counts_x: nx.
        scale: factor from summed Hamming distance to cost.
        out: (nz ny nx, side^3) float32.
    """
    step, width = fixed.shape[2], fixed.shape[3]
    wide = moving.shape[3]
    side = shifts.shape[0]
    count = reads.shape[0]
    fixed_at = np.empty(count, np.int64)
    moving_at = np.empty(count, np.int64)
    row_at = np.empty((2, rows.shape[0]), np.int64)
    label_at = np.empty((side + 2, count), np.int64)
    for label in range(side + 2):  # groups of four and three may reach beyond the last label
        for read in range(count):
            x = reads[read, 1] + shifts[min(label, side - 1)]
            label_at[label, read] = x % step * wide + x // step
    totals = np.empty((side + 2, NODES), np.int64)
    some, every = np.empty(width // NODES, np.bool_), np.empty(width // NODES, np.bool_)
    words, known, others = fixed.ctypes.data, mask.ctypes.data, moving.ctypes.data
    a, b, c, t = fixed_at.ctypes.data, moving_at.ctypes.data, label_at.ctypes.data, totals.ctypes.data
    flat_mask = mask.reshape(-1)
    for plane in range(first, last):
        z, lz = plane // side, plane % side
        for task in range(counts_y * side + 1):
            # The words of the next task are fetched while this one is computed: they lie far apart.
            if task < counts_y * side:
                for k in range(rows.shape[0]):
                    from_z = z * step + rows[k, 0] + shifts[lz]
                    from_y = task // side * step + rows[k, 1] + shifts[task % side]
                    at = (from_z * moving.shape[1] + from_y) * step * wide
                    row_at[task % 2, k] = at
                    for offset in range(0, 8 * step * wide, _LINE):
                        _prefetch(others + 8 * at + offset)
            if task == 0:
                continue
            y, ly = (task - 1) // side, (task - 1) % side
            for read in range(count):
                moving_at[read] = row_at[(task - 1) % 2, reads[read, 0]]
            if ly == 0:
                for read in range(count):
                    k = reads[read, 0]
                    place = (z * step + rows[k, 0]) * fixed.shape[1] + y * step + rows[k, 1]
                    fixed_at[read] = (place * step + reads[read, 1]) * width
                for part in range(width // NODES):
                    some[part], every[part] = True, True
                    if mask.size:
                        left = min(NODES, counts_x - part * NODES)
                        some[part], every[part] = _any_and_all(flat_mask, fixed_at, part * NODES, left)
            for part in range(width // NODES):
                node = part * NODES
                totals[:] = 0
                for begin in range(0, count if some[part] else 0, _TILE):
                    end = min(begin + _TILE, count)
                    label = 0
                    while label < side:
                        left = side - label
                        four = left >= 4 and left != 5 and left != 6 and left != 9
                        if four and every[part]:
                            _bits_4(words, known, others, a, b, c, count, begin, end, label, node, t)
                        elif four:
                            _bits_4_masked(words, known, others, a, b, c, count, begin, end, label, node, t)
                        elif every[part]:
                            _bits_3(words, known, others, a, b, c, count, begin, end, label, node, t)
                        else:
                            _bits_3_masked(words, known, others, a, b, c, count, begin, end, label, node, t)
                        label += 4 if four else 3
                first_label = (lz * side + ly) * side
                for n in range(min(NODES, counts_x - node)):
                    target = out[(z * counts_y + y) * counts_x + node + n]
                    for lx in range(side):
                        target[first_label + lx] = np.float32(totals[lx, n]) * scale
