"""DEEDS on a device that torch drives: the same descriptors, costs and labels by tensor operations.

Additions happen in the order of the numpy version and nothing is fused, so descriptors and costs are equal to the last
bit wherever the device rounds as IEEE 754 asks. It needs no compiler on the user's machine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from uae.deeds.backend import Work

if TYPE_CHECKING:
    import torch

    from uae.deeds.cost import _Block
    from uae.deeds.tree import Tree


def _slices(size: int, shift: int) -> tuple[slice, slice]:
    """Places that stay in a line of `size` when moved by `shift`, and where they go."""
    low, high = max(0, -shift), max(max(0, -shift), min(size, size - shift))
    return slice(low, high), slice(low + shift, high + shift)


def _box_sums(squares: torch.Tensor, q: int) -> torch.Tensor:
    """Sums over the (2 q + 1)^3 neighbourhood, cut at the border, one axis after the other."""
    import torch

    for axis in range(3):
        total = torch.zeros_like(squares)
        for shift in range(-q, q + 1):
            here, there = _slices(squares.shape[axis], shift)
            target, source = [slice(None)] * 3, [slice(None)] * 3
            target[axis], source[axis] = here, there
            total[tuple(target)] += squares[tuple(source)]
        squares = total
    return squares


def mind_words(
    image: np.ndarray, q: int, pairs: tuple, channels: tuple, thresholds: np.ndarray, device: str
) -> np.ndarray:
    """Descriptor words (Z, Y, X) uint64 of an image (Z, Y, X) float32; see `uae.deeds.mind.mind_ssc`.

    Args:
        image: float32.
        q: distance of the compared neighbours and half-width of the patches.
        pairs: offsets of the six difference images in units of q.
        channels: for each channel the difference image and where it is read.
        thresholds: of the quantisation.
        device: torch's name of the device.
    """
    import torch

    whole = torch.from_numpy(np.ascontiguousarray(image)).to(device)
    boxes = []
    for offset in pairs:
        squares = torch.zeros_like(whole)
        spans = [_slices(size, q * part) for size, part in zip(image.shape, offset)]
        here, there = tuple(span[0] for span in spans), tuple(span[1] for span in spans)
        difference = whole[there] - whole[here]
        squares[here] = difference * difference
        boxes.append(_box_sums(squares, q))
    values = []
    for pair, anchor in channels:
        value = boxes[pair].clone()
        spans = [_slices(size, q * part) for size, part in zip(image.shape, anchor)]
        value[tuple(span[0] for span in spans)] = boxes[pair][tuple(span[1] for span in spans)]
        values.append(value)
    least = values[0].clone()
    for value in values[1:]:
        torch.minimum(least, value, out=least)
    noise = torch.zeros_like(whole)
    for value in values:
        value -= least
        noise += value
    noise /= 12.0
    noise.clamp_(min=float(np.float32(1e-6)))
    limits = [noise * float(threshold) for threshold in thresholds]
    words = torch.zeros(image.shape, dtype=torch.int64, device=device)
    for number, value in enumerate(values):
        level = torch.zeros(image.shape, dtype=torch.int64, device=device)
        for limit in limits:
            level += value < limit
        words |= ((1 << level) - 1) << (5 * number)
    return words.cpu().numpy().view(np.uint64)


def popcount(words: torch.Tensor) -> torch.Tensor:
    """Set bits of non-negative int64 words, int64."""
    words = words - ((words >> 1) & 0x5555555555555555)
    words = (words & 0x3333333333333333) + ((words >> 2) & 0x3333333333333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F0F0F0F0F
    for shift in (8, 16, 32):
        words = words + (words >> shift)
    return words & 0x7F


def hamming(
    here: np.ndarray, counted: np.ndarray, window: np.ndarray, block: _Block, pitch: list[int], scale: np.float32,
    cost: np.ndarray, work: Work, device: str,
) -> None:  # fmt: skip
    """Costs of one block of control planes, label by label.

    Args:
        here: (nz, a, ny, b, nx, c) uint64 sampled fixed words.
        counted: the same shape; the bits that count.
        window: words of all places the blocks can move to.
        block: control planes.
        pitch: distance of the samples, z, y, x.
        scale: factor from summed Hamming distance to cost.
        cost: (nodes, labels) float32 out.
        work: told about finished comparisons.
        device: torch's name of the device.
    """
    import torch

    def send(words: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(words).view(np.int64)).to(device)

    fixed, mask, moving = send(here), send(counted), send(window)
    level, step = block.level, block.grid.step
    nz, ny, nx = block.counts
    found = torch.empty((level.labels, nz * ny * nx), dtype=torch.float32, device=device)
    for label, shift in enumerate(np.ndindex(level.side, level.side, level.side)):
        z, y, x = (value * level.quantisation for value in shift)
        there = moving[z : z + nz * step, y : y + ny * step, x : x + nx * step]
        there = there.reshape(nz, step, ny, step, nx, step)[:, :: pitch[0], :, :: pitch[1], :, :: pitch[2]]
        total = popcount((fixed ^ there) & mask).sum(dim=(1, 3, 5))
        found[label] = total.reshape(-1).to(torch.float32) * float(scale)
        work.done(nz * ny * nx * len(block.samples))
    cost[:] = found.T.cpu().numpy()


def _min_plus(values: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """out[n, y, x, p] = min_z values[n, z, y, x] + (p - z + delta[n])^2: one axis done, the axes rotated by one."""
    import torch

    side = values.shape[1]
    steps = torch.arange(side, device=values.device)
    distance = (steps[:, None] - steps[None, :]).to(torch.float32) + delta[:, None, None]
    table = distance * distance
    out = torch.empty((values.shape[0], side, side, side), dtype=torch.float32, device=values.device)
    for p in range(side):
        out[..., p] = (values + table[:, p, :, None, None]).amin(dim=1)
    return out


def propagate(
    cost: np.ndarray, tree: Tree, delta: np.ndarray, side: int, minima: np.ndarray, work: Work, device: str
) -> np.ndarray:
    """Labels (N,) of least energy on a tree, a generation at a time; see `uae.deeds.tree.propagate`."""
    import torch

    total = torch.from_numpy(cost).to(device)
    shift = torch.from_numpy(delta).to(device)
    weight = torch.from_numpy(tree.weight).to(device)
    spans = list(zip(tree.starts[:-1], tree.starts[1:]))
    least = torch.zeros(len(tree.parent), dtype=torch.float32, device=device)
    for first, last in spans[:0:-1]:
        nodes = tree.order[first:last][::-1].copy()
        parents = tree.parent[nodes]
        own = torch.from_numpy(nodes).to(device)
        scaled = total[own] * weight[own, None]
        total[own] = scaled
        message = scaled.reshape(-1, side, side, side)
        for axis in range(3):
            message = _min_plus(message, shift[own, axis])
        message = message.reshape(len(nodes), -1)
        least[own] = message.amin(dim=1)
        message -= least[own, None]
        # One child a parent at a time, in the order of the other versions, so that the sums round alike.
        fresh = np.flatnonzero(np.diff(parents, prepend=-2))
        rank = np.arange(len(nodes)) - np.repeat(fresh, np.diff(fresh, append=len(nodes)))
        for number in range(int(rank.max()) + 1):
            chosen = rank == number
            total[torch.from_numpy(parents[chosen]).to(device)] += message[torch.from_numpy(chosen).to(device)]
        work.done(len(nodes) * 3 * side**4)
    labels = torch.zeros(len(tree.parent), dtype=torch.int64, device=device)
    labels[int(tree.order[0])] = torch.argmin(total[int(tree.order[0])])
    steps = torch.arange(side, device=device)
    for first, last in spans[1:]:
        work.check()
        own = torch.from_numpy(tree.order[first:last]).to(device)
        above = labels[torch.from_numpy(tree.parent[tree.order[first:last]]).to(device)]
        parts = []
        for axis, place in enumerate((above // (side * side), above // side % side, above % side)):
            distance = (place[:, None] - steps).to(torch.float32) + shift[own, axis, None]
            parts.append(distance * distance)
        z, y, x = parts
        pairwise = (z[:, :, None] + y[:, None, :])[..., None] + x[:, None, None, :]
        labels[own] = torch.argmin(total[own] + pairwise.reshape(len(own), -1), dim=1)
    minima[:] = least.cpu().numpy()
    cost[:] = total.cpu().numpy()
    return labels.cpu().numpy()
