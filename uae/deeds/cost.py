"""Control grids and the data cost: Hamming distance of MIND-SSC words for every control point and displacement."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from uae.deeds.backend import Work, numba_kernels, resolve_backend
from uae.deeds.mind import NEUTRAL_WORD, popcount
from uae.deeds.presets import Level, Preset

_CHUNK_COMPARISONS = 50_000_000


@dataclass(frozen=True)
class ControlGrid:
    """Control points over a volume, each owning a block of step^3 voxels.

    Attributes:
        shape: (Z, Y, X) of the volume in voxels.
        step: side of a block.
        counts: control points along z, y, x.
        offset: first voxel of the first block along z, y, x; the voxels that are left over belong to no block.
        corner: True where control points are placed as the original does (node 0 at voxel 0, stretched to the end).
    """

    shape: tuple[int, int, int]
    step: int
    counts: tuple[int, int, int]
    offset: tuple[int, int, int]
    corner: bool

    @classmethod
    def over(cls, shape: tuple[int, int, int], step: int, alignment: str = "centre") -> ControlGrid:
        """The grid of one level; with 'centre' the left-over voxels are shared between both ends."""
        counts = tuple(size // step for size in shape)
        corner = alignment == "corner"
        offset = (0, 0, 0) if corner else tuple((size - count * step) // 2 for size, count in zip(shape, counts))
        return cls(tuple(shape), step, counts, offset, corner)

    @property
    def nodes(self) -> int:
        """Number of control points."""
        return int(np.prod(self.counts))

    def voxel_positions(self, axis: int) -> np.ndarray:
        """Voxel coordinate (n,) of the block centres along one axis."""
        return self.offset[axis] + (self.step - 1) / 2.0 + self.step * np.arange(self.counts[axis])

    def crop(self, array: np.ndarray) -> np.ndarray:
        """The part (..., nz step, ny step, nx step) of a volume (..., Z, Y, X) that the blocks cover."""
        window = tuple(slice(o, o + n * self.step) for o, n in zip(self.offset, self.counts))
        return array[(..., *window)]


def block_samples(step: int, sampling: str) -> np.ndarray:
    """Voxels of a block that enter its cost, (S, 3) int64 as z, y, x.

    'original' (deedsBCV with its hard-wired setting): every second voxel along y and z where step > 4, else all.
    'stride2': every second voxel along all axes where step > 4, a checkerboard where step is 4, else all.
    """
    pitch = 2 if step > 4 else 1
    pitch_x = pitch if sampling == "stride2" else 1
    z, y, x = np.meshgrid(
        np.arange(0, step, pitch), np.arange(0, step, pitch), np.arange(0, step, pitch_x), indexing="ij"
    )
    samples = np.stack([z.ravel(), y.ravel(), x.ravel()], axis=1).astype(np.int64)
    if sampling == "stride2" and step == 4:
        samples = samples[samples.sum(axis=1) % 2 == 0]
    return samples


def data_cost(
    fixed: np.ndarray,
    moving: np.ndarray,
    grid: ControlGrid,
    level: Level,
    preset: Preset,
    *,
    backend: str = "auto",
    work: Work | None = None,
) -> np.ndarray:
    """Cost of every displacement at every control point (deedsBCV: 0.5 step / (alpha quantisation) mean Hamming).

    Args:
        fixed: (Z, Y, X) uint64 words.
            A fixed voxel with the neutral word costs nothing anywhere: it is not known. (Were it compared,
            neutral to neutral would cost least, and the rim of the field of view would be drawn outwards: the TRE of
            a phantom CT-MR pair ended at 9.6 mm and at 4.1 mm without it, our measurement.)
        moving: words of the same shape, searched.
        grid: control points.
        level: search radius and quantisation.
        preset: alpha, sampling and border.
        backend: 'auto', 'numba' or 'numpy'; the results are equal to the last bit.
        work: told about finished comparisons, and asked whether to stop.

    Returns:
        (nodes, labels) float32; the label (lz * side + ly) * side + lx means (l - radius) * quantisation voxels.
    """
    work = work or Work()
    samples = block_samples(grid.step, preset.sampling)
    scale = np.float32(cost_scale(level, preset) / len(samples))
    window = _search_window(moving, grid, level.reach, preset.border)
    function = _rows_numba if resolve_backend(backend) == "numba" else _labels_numpy
    return function(grid.crop(fixed), window, grid, level, samples, scale, work)


def cost_scale(level: Level, preset: Preset) -> float:
    """Factor from the mean Hamming distance of a block to its cost."""
    return 0.5 * level.step / (preset.alpha * level.quantisation)


def _search_window(moving: np.ndarray, grid: ControlGrid, reach: int, border: str) -> np.ndarray:
    """Words of all places the blocks can move to; outside the volume neutral or the edge's word."""
    window = moving
    for axis in range(3):
        index = np.arange(-reach, grid.counts[axis] * grid.step + reach) + grid.offset[axis]
        window = np.take(window, np.clip(index, 0, moving.shape[axis] - 1), axis=axis)
        if border == "neutral":
            outside = (index < 0) | (index >= moving.shape[axis])
            window[(slice(None),) * axis + (outside,)] = NEUTRAL_WORD
    return window


def _deinterleave(words: np.ndarray, step: int) -> np.ndarray:
    """(Z, Y, X) -> (Z, Y, step, ceil(X / step)): x = step * c + s goes to [s, c]."""
    nz, ny, nx = words.shape
    columns = -(-nx // step)
    padded = np.zeros((nz, ny, columns * step), np.uint64)
    padded[..., :nx] = words
    return np.ascontiguousarray(padded.reshape(nz, ny, columns, step).swapaxes(2, 3))


def _rows_numba(
    fixed: np.ndarray,
    window: np.ndarray,
    grid: ControlGrid,
    level: Level,
    samples: np.ndarray,
    scale: np.float32,
    work: Work,
) -> np.ndarray:
    """Compiled version, a few grid rows at a time."""
    kernels = numba_kernels()
    all_bits = np.uint64(0xFFFFFFFFFFFFFFFF)
    counted = _deinterleave(np.where(fixed == NEUTRAL_WORD, np.uint64(0), all_bits), grid.step)
    fixed = _deinterleave(fixed, grid.step)
    window = _deinterleave(window, grid.step)
    shifts = np.arange(level.side, dtype=np.int64) * level.quantisation
    cost = np.empty((grid.nodes, level.labels), np.float32)
    rows = grid.counts[0] * grid.counts[1]
    per_row = grid.counts[2] * level.labels * len(samples)
    chunk = max(1, _CHUNK_COMPARISONS // per_row)
    for first in range(0, rows, chunk):
        last = min(first + chunk, rows)
        kernels.hamming_rows(
            fixed, counted, window, samples, shifts, grid.step, first, last, grid.counts[1], scale, cost
        )
        work.done((last - first) * per_row)
    return cost


def _labels_numpy(
    fixed: np.ndarray,
    window: np.ndarray,
    grid: ControlGrid,
    level: Level,
    samples: np.ndarray,
    scale: np.float32,
    work: Work,
) -> np.ndarray:
    """The same with numpy, one label at a time over all blocks."""
    step = grid.step
    strides = [np.unique(samples[:, axis]) for axis in range(3)]
    pitch = [int(values[1] - values[0]) if len(values) > 1 else step for values in strides]
    # The samples are a lattice, or a checkerboard on it: words that are not sampled are masked before they are counted.
    used = np.zeros((step,) * 3, bool)
    used[tuple(samples.T)] = True
    used = used[:: pitch[0], :: pitch[1], :: pitch[2]]
    keep = np.where(used, np.uint64(0xFFFFFFFFFFFFFFFF), np.uint64(0))[None, :, None, :, None, :]

    def lattice(words: np.ndarray) -> np.ndarray:
        nz, ny, nx = grid.counts
        return words.reshape(nz, step, ny, step, nx, step)[:, :: pitch[0], :, :: pitch[1], :, :: pitch[2]]

    here = np.ascontiguousarray(lattice(fixed))
    counted = np.where(here == NEUTRAL_WORD, np.uint64(0), keep)
    size = [count * step for count in grid.counts]
    cost = np.empty((grid.nodes, level.labels), np.float32)
    for label, shift in enumerate(np.ndindex(level.side, level.side, level.side)):
        begin = [value * level.quantisation for value in shift]
        there = lattice(window[tuple(slice(b, b + n) for b, n in zip(begin, size))])
        total = popcount((here ^ there) & counted).sum(axis=(1, 3, 5), dtype=np.uint32)
        cost[:, label] = total.ravel().astype(np.float32) * scale
        work.done(grid.nodes * len(samples))
    return cost
