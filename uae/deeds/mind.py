"""MIND-SSC descriptors packed into 60-bit words (Heinrich et al., MICCAI 2013; quantised as in deedsBCV).

A voxel's word holds twelve self-similarities of its neighbourhood, each quantised to 0..5 in a thermometer code of
five bits. The Hamming distance of two words is therefore the L1 distance of the twelve levels.
"""

from __future__ import annotations

import numpy as np

from uae.deeds import device
from uae.deeds.backend import Memory, Work, numba_kernels, resolve_backend, torch_device

CHANNELS = 12
NEUTRAL_WORD = np.uint64(sum(0b111 << (5 * channel) for channel in range(CHANNELS)))
"""Level 3 in all channels: says nothing about the place. Verified to remove streaks outside the field of view."""

# Neighbour offsets (z, y, x) of the six squared-difference images, and for each channel the image and where it is read
# (z, y, x), both in units of q. Together: the twelve pairs of non-opposite face neighbours (deedsBCV, MIND-SSC).
_PAIRS = ((0, 1, 1), (0, 1, -1), (1, -1, 0), (1, 0, -1), (1, 1, 0), (1, 0, 1))
_CHANNELS = (
    (0, (0, -1, 0)),
    (0, (0, 0, -1)),
    (1, (0, -1, 0)),
    (1, (0, 0, 1)),
    (2, (-1, 0, 0)),
    (2, (0, 1, 0)),
    (3, (-1, 0, 0)),
    (3, (0, 0, 1)),
    (4, (-1, 0, 0)),
    (4, (0, -1, 0)),
    (5, (-1, 0, 0)),
    (5, (0, 0, -1)),
)
# exp(-value) is compared with (c + 1.5) / 6 without computing it.
_THRESHOLDS = np.array([-np.log((c + 1.5) / 6.0) for c in range(5)], dtype=np.float32)
_SLAB_VOXELS = 600_000


def mind_ssc(
    image: np.ndarray, q: int, *, valid: np.ndarray | None = None, backend: str = "auto", memory: Memory | None = None,
    work: Work | None = None,
) -> np.ndarray:  # fmt: skip
    """Descriptor words of an image.

    Args:
        image: (Z, Y, X) float32, isotropic voxels.
        q: distance of the compared neighbours and half-width of the patches, in voxels.
        valid: (Z, Y, X) bool; elsewhere the neutral word is written. None: valid everywhere.
        backend: 'auto', 'numba', 'numpy' or 'torch:DEVICE'.
        memory: where the arrays come from; the result is one of them.
        work: asked whether to stop after each slab.

    Returns:
        (Z, Y, X) uint64 words, channel c in bits 5 c .. 5 c + 4.

    Raises:
        CancelledError: `work` was stopped.
    """
    image = np.ascontiguousarray(image, dtype=np.float32)
    backend = resolve_backend(backend)
    if torch_device(backend) is not None:
        if work is not None:
            work.check()
        words = device.mind_words(image, q, _PAIRS, _CHANNELS, _THRESHOLDS, torch_device(backend))
        if valid is not None:
            words[~valid] = NEUTRAL_WORD
        return words
    numba = backend == "numba"
    memory = memory or Memory()
    words = memory.array("words", image.shape, np.uint64)
    planes = max(1, _SLAB_VOXELS // (image.shape[1] * image.shape[2]))
    for first in range(0, image.shape[0], planes):
        if work is not None:
            work.check()
        last = min(first + planes, image.shape[0])
        (_slab_numba if numba else _slab_numpy)(image, q, first, last, words, memory)
    if valid is not None:
        words[~valid] = NEUTRAL_WORD
    return words


def _slab_numba(image: np.ndarray, q: int, first: int, last: int, words: np.ndarray, memory: Memory) -> None:
    """Write the words of the planes first..last-1 with the compiled kernels."""
    kernels = numba_kernels()
    # Channels are read up to q planes below, never above.
    low = max(first - q, 0)
    box = memory.array("scratch", (len(_PAIRS), last - low, *image.shape[1:]), np.float32)
    squares = memory.array("squares", (2 * q + 1, *image.shape[1:]), np.float32)
    for pair, offset in enumerate(_PAIRS):
        kernels.ssd_planes(image, *(q * value for value in offset), q, low, last, squares, box[pair])
    pairs = np.array([pair for pair, _ in _CHANNELS])
    anchors = q * np.array([anchor for _, anchor in _CHANNELS])
    kernels.mind_words(box, first, low, last, pairs, anchors, _THRESHOLDS, words)


def _slab_numpy(image: np.ndarray, q: int, first: int, last: int, words: np.ndarray, memory: Memory) -> None:
    """The same with numpy: equal order of additions, hence equal bits."""
    low = max(first - q, 0)
    box = [_ssd_numpy(image, tuple(q * value for value in offset), q, low, last) for offset in _PAIRS]
    shape = (last - first, *image.shape[1:])
    channels = np.empty((CHANNELS, *shape), np.float32)
    for channel, (pair, anchor) in enumerate(_CHANNELS):
        channels[channel] = _read_at(box[pair], [q * value for value in anchor], first, low, image.shape)
    channels -= channels.min(axis=0)
    noise = np.zeros(shape, np.float32)
    for channel in channels:
        noise += channel
    noise /= np.float32(CHANNELS)
    np.maximum(noise, np.float32(1e-6), out=noise)
    slab = np.zeros(shape, np.uint64)
    # value / noise < threshold, without the division
    limits = [threshold * noise for threshold in _THRESHOLDS]
    for number, channel in enumerate(channels):
        level = np.zeros(shape, np.uint64)
        for limit in limits:
            level += channel < limit
        slab |= ((np.uint64(1) << level) - np.uint64(1)) << np.uint64(5 * number)
    words[first:last] = slab


def _ssd_numpy(image: np.ndarray, offset: tuple[int, int, int], q: int, first: int, last: int) -> np.ndarray:
    """Box sums of squared differences to the neighbour at `offset` voxels, for the planes first..last-1."""
    low, high = max(first - q, 0), min(last + q, image.shape[0])
    here, there = [], []
    for axis, shift in enumerate(offset):
        begin, end = max(0, -shift), min(image.shape[axis], image.shape[axis] - shift)
        if axis == 0:
            begin, end = max(begin, low), max(min(end, high), max(begin, low))
        here.append(slice(begin, max(end, begin)))
        there.append(slice(begin + shift, max(end, begin) + shift))
    squares = np.zeros((high - low, *image.shape[1:]), np.float32)
    difference = image[tuple(there)] - image[tuple(here)]
    squares[here[0].start - low : here[0].stop - low, here[1], here[2]] = difference * difference
    for axis in range(3):
        total = np.zeros_like(squares)
        size = squares.shape[axis]
        for shift in range(-q, q + 1):
            target = [slice(None)] * 3
            source = [slice(None)] * 3
            target[axis] = slice(max(0, -shift), max(0, min(size, size - shift)))
            source[axis] = slice(max(0, shift), max(0, min(size, size + shift)))
            total[tuple(target)] += squares[tuple(source)]
        squares = total
    return squares[first - low : last - low]


def _read_at(box: np.ndarray, anchor: list[int], first: int, box_first: int, shape: tuple[int, ...]) -> np.ndarray:
    """Planes first.. of `box` (its plane 0 is box_first) read at an offset; in place where that leaves the volume."""
    last = box_first + box.shape[0]
    z = np.arange(first, last)
    moved = z + anchor[0]
    z = np.where((moved < 0) | (moved >= shape[0]), z, moved) - box_first
    out = box[first - box_first :].copy()
    inside_z = slice(None) if anchor[0] == 0 else np.flatnonzero((moved >= 0) & (moved < shape[0]))
    target: list[slice] = []
    source: list[slice] = []
    for size, shift in zip(shape[1:], anchor[1:]):
        begin, end = max(0, -shift), max(0, min(size, size - shift))
        end = max(end, begin)
        target.append(slice(begin, end))
        source.append(slice(begin + shift, end + shift))
    # A voxel is read in place as soon as one axis leaves the volume, so only voxels inside on all axes are replaced.
    rows = box[z[inside_z]]
    out[inside_z, target[0], target[1]] = rows[:, source[0], source[1]]
    return out


def unpack(words: np.ndarray) -> np.ndarray:
    """Levels 0..5 of each channel, (..., 12) int64, of an array of words."""
    shifts = np.uint64(5) * np.arange(CHANNELS, dtype=np.uint64)
    codes = (np.asarray(words, np.uint64)[..., None] >> shifts) & np.uint64(31)
    return popcount(codes).astype(np.int64)


_BYTE_COUNTS = np.array([bin(byte).count("1") for byte in range(256)], dtype=np.uint8)


def popcount(words: np.ndarray) -> np.ndarray:
    """Set bits of each word, uint8: numpy 2 counts itself, older versions look bytes up in a table."""
    if hasattr(np, "bitwise_count"):
        return np.bitwise_count(words)
    return popcount_table(words)


def popcount_table(words: np.ndarray) -> np.ndarray:
    """Set bits of each uint64 by a table of bytes (numpy < 2)."""
    octets = np.ascontiguousarray(words, np.uint64)[..., None].view(np.uint8)
    return _BYTE_COUNTS[octets].sum(axis=-1, dtype=np.uint8)
