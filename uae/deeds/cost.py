"""Control grids and the data cost: Hamming distance of MIND-SSC words for every control point and displacement."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from uae.deeds.backend import Memory, Work, numba_kernels, resolve_backend, torch_device
from uae.deeds.device import hamming
from uae.deeds.mind import NEUTRAL_WORD, popcount
from uae.deeds.presets import Level, Preset

_CHUNK_COMPARISONS = 50_000_000
BLOCK_MB = 30.0
"""Search window of one direction that is copied at once: a fifth of a pair of six million voxels at reach 40."""


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
    block_mb: float = BLOCK_MB,
    memory: Memory | None = None,
    work: Work | None = None,
) -> np.ndarray:
    """Cost of every displacement at every control point (deedsBCV: 0.5 step / (alpha quantisation) mean Hamming).

    Args:
        fixed: (Z, Y, X) uint64 words.
            With neutral borders a fixed voxel with the neutral word costs nothing: it is not known. (Were it compared,
            neutral to neutral would cost least, and the rim of the field of view would be drawn outwards: the TRE of
            a phantom CT-MR pair ended at 9.6 mm and at 4.1 mm without it, our measurement.)
        moving: words of the same shape, searched.
        grid: control points.
        level: search radius and quantisation.
        preset: alpha, sampling and border.
        backend: 'auto', 'numba', 'numpy' or 'torch:DEVICE'; the results are equal to the last bit.
        block_mb: bound on the search window that is copied at once, MB; smaller blocks take a little longer.
        memory: where the arrays come from; the result is one of them.
        work: told about finished comparisons, and asked whether to stop.

    Returns:
        (nodes, labels) float32; the label (lz * side + ly) * side + lx means (l - radius) * quantisation voxels.
    """
    work = work or Work()
    samples = block_samples(grid.step, preset.sampling)
    scale = np.float32(cost_scale(level, preset) / len(samples))
    memory = memory or Memory()
    cost = memory.array("cost", (grid.nodes, level.labels), np.float32)
    backend = resolve_backend(backend)
    function = _rows_numba if backend == "numba" else partial(_labels, device=torch_device(backend))
    nz, ny, nx = grid.counts
    planes = _planes_per_block(grid, level, block_mb)
    for first in range(0, nz, planes):
        last = min(first + planes, nz)
        block = _Block(grid, level, samples, first, last, preset.border == "neutral")
        function(fixed, moving, block, scale, cost[first * ny * nx : last * ny * nx], memory, work)
    return cost


@dataclass(frozen=True)
class _Block:
    """The planes first..last-1 of a control grid, whose costs are computed at once."""

    grid: ControlGrid
    level: Level
    samples: np.ndarray
    first: int
    last: int
    neutral: bool

    @property
    def counts(self) -> tuple[int, int, int]:
        """Control points along z, y, x."""
        return (self.last - self.first, *self.grid.counts[1:])

    @property
    def offset(self) -> tuple[int, int, int]:
        """First voxel of the first block along z, y, x."""
        z, y, x = self.grid.offset
        return z + self.first * self.grid.step, y, x


def _planes_per_block(grid: ControlGrid, level: Level, block_mb: float) -> int:
    """Control planes whose search window fits into `block_mb`; at least one."""
    _, ny, nx = grid.counts
    plane = 8.0 * (ny * grid.step + 2 * level.reach) * (nx * grid.step + 2 * level.reach)
    return max(1, int((block_mb * 1e6 / plane - 2 * level.reach) // grid.step))


def cost_scale(level: Level, preset: Preset) -> float:
    """Factor from the mean Hamming distance of a block to its cost."""
    return 0.5 * level.step / (preset.alpha * level.quantisation)


def _rows_numba(
    fixed: np.ndarray, moving: np.ndarray, block: _Block, scale: np.float32, cost: np.ndarray, memory: Memory,
    work: Work,
) -> None:  # fmt: skip
    """Compiled version, a few pairs of control plane and label at a time."""
    kernels = numba_kernels()
    step, reach = block.grid.step, block.level.reach
    nz, ny, nx = block.counts
    z0, y0, x0 = block.offset
    width = -(-nx // kernels.NODES) * kernels.NODES
    here = memory.array("image", (nz * step, ny * step, step, width), np.uint64)
    # A fixed voxel without a word of its own must cost nothing; with replicated borders there is none.
    masked = block.neutral and bool((fixed == NEUTRAL_WORD).any())
    mask = memory.array("mask", here.shape if masked else (0,) * 4, np.uint64)
    kernels.unfold(fixed, z0, y0, x0, False, NEUTRAL_WORD, here, mask)
    work.check()
    wide = width + -(-2 * reach // step) + 1
    there = memory.array("scratch", (nz * step + 2 * reach, ny * step + 2 * reach, step, wide), np.uint64)
    no_mask = np.empty((0,) * 4, np.uint64)
    kernels.unfold(moving, z0 - reach, y0 - reach, x0 - reach, not block.neutral, NEUTRAL_WORD, there, no_mask)
    work.check()
    rows, number = np.unique(block.samples[:, :2], axis=0, return_inverse=True)
    reads = np.stack([number.ravel(), block.samples[:, 2]], axis=1).astype(np.int64)
    shifts = np.arange(block.level.side, dtype=np.int64) * block.level.quantisation
    pairs = nz * block.level.side
    per_pair = ny * nx * block.level.side**2 * len(reads)
    chunk = max(1, _CHUNK_COMPARISONS // per_pair)
    for first in range(0, pairs, chunk):
        last = min(first + chunk, pairs)
        kernels.hamming_planes(here, mask, there, rows, reads, shifts, first, last, ny, nx, scale, cost)
        work.done((last - first) * per_pair)


def _window(words: np.ndarray, block: _Block, reach: int) -> np.ndarray:
    """Words of all places the blocks can move to; outside the volume neutral or the edge's word."""
    window = words
    for axis in range(3):
        index = np.arange(-reach, block.counts[axis] * block.grid.step + reach) + block.offset[axis]
        window = np.take(window, np.clip(index, 0, words.shape[axis] - 1), axis=axis)
        if block.neutral:
            outside = (index < 0) | (index >= words.shape[axis])
            window[(slice(None),) * axis + (outside,)] = NEUTRAL_WORD
    return window


def _labels(
    fixed: np.ndarray, moving: np.ndarray, block: _Block, scale: np.float32, cost: np.ndarray, memory: Memory,
    work: Work, device: str | None,
) -> None:  # fmt: skip
    """The same with numpy or on a torch device, one label at a time over all blocks."""
    level, samples, step = block.level, block.samples, block.grid.step
    window = _window(moving, block, level.reach)
    strides = [np.unique(samples[:, axis]) for axis in range(3)]
    pitch = [int(values[1] - values[0]) if len(values) > 1 else step for values in strides]
    # The samples are a lattice, or a checkerboard on it: words that are not sampled are masked before they are counted.
    used = np.zeros((step,) * 3, bool)
    used[tuple(samples.T)] = True
    used = used[:: pitch[0], :: pitch[1], :: pitch[2]]
    keep = np.where(used, np.uint64(0xFFFFFFFFFFFFFFFF), np.uint64(0))[None, :, None, :, None, :]

    def lattice(words: np.ndarray) -> np.ndarray:
        nz, ny, nx = block.counts
        return words.reshape(nz, step, ny, step, nx, step)[:, :: pitch[0], :, :: pitch[1], :, :: pitch[2]]

    here = np.ascontiguousarray(lattice(_window(fixed, block, 0)))
    counted = np.where(here == NEUTRAL_WORD, np.uint64(0), keep) if block.neutral else np.broadcast_to(keep, here.shape)
    if device is not None:
        hamming(here, counted, window, block, pitch, scale, cost, work, device)
        return
    size = [count * step for count in block.counts]
    for label, shift in enumerate(np.ndindex(level.side, level.side, level.side)):
        begin = [value * level.quantisation for value in shift]
        there = lattice(window[tuple(slice(b, b + n) for b, n in zip(begin, size))])
        total = popcount((here ^ there) & counted).sum(axis=(1, 3, 5), dtype=np.uint32)
        cost[:, label] = total.ravel().astype(np.float32) * scale
        work.done(len(cost) * len(samples))
