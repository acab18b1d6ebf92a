"""Contrast augmentation of a batch of patches: curves are drawn in NumPy, applied to all patches on their device.

Every option is a probability of the table [contrast]; 0 switches it off. All draws come from one NumPy generator per
view, so that a step is repeated exactly from its seed. The contrasts are random; no table of the validation simulator
is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from uae.training.curves import HU_STEP, LEVELS, ct_curve, drawn_curve, label_table, random_curve, signal_curve

Rng = np.random.Generator


@dataclass
class Contrast:
    """How one view is rendered; what is None or 0 is not applied.

    Attributes:
        scale: index into `curve` per unit of the patch's values.
        curve: (LEVELS,) signal by value; `second` is blended in by a smooth random map (cells, steepness).
        region_curves: (R, LEVELS) a curve for each superpixel, instead of `curve`.
        before, after: per axis (z, y, x) a (n, n) filter matrix before and after the curve, or None.
        gain, offset, added_noise: value' = gain value + offset + noise, before the curve.
        texture: (LEVELS,) relative texture by value.
        shading: (cells, amplitude) of smooth multiplicative fields.
        noise: standard deviation of Rician noise.
        window: lower and upper quantile that become 0 and 1, or None; gamma: exponent after it.
        seed: of the noise.
    """

    scale: float
    curve: np.ndarray
    seed: int
    second: np.ndarray | None = None
    blend: tuple[float, float] = (0.0, 0.0)
    region_curves: np.ndarray | None = None
    before: list[np.ndarray | None] = field(default_factory=lambda: [None] * 3)
    after: list[np.ndarray | None] = field(default_factory=lambda: [None] * 3)
    gain: float = 1.0
    offset: float = 0.0
    added_noise: float = 0.0
    texture: np.ndarray | None = None
    shading: list[tuple[float, float]] = field(default_factory=list)
    noise: float = 0.0
    window: tuple[float, float] | None = None
    gamma: float = 1.0


def box_matrix(n: int) -> np.ndarray:
    """(n, n) mean over three neighbours, borders counted without padding."""
    matrix = np.eye(n) + np.eye(n, k=1) + np.eye(n, k=-1)
    return matrix / matrix.sum(1, keepdims=True)


def gauss_matrix(n: int, sigma: float) -> np.ndarray:
    """(n, n) Gaussian filter, sigma in voxels, borders renormalised."""
    offset = np.arange(n)[:, None] - np.arange(n)
    matrix = np.exp(-0.5 * (offset / max(sigma, 1e-3)) ** 2)
    return matrix / matrix.sum(1, keepdims=True)


def thick_matrix(n: int, factor: float) -> np.ndarray:
    """(n, n) average into slices `factor` times thicker, then linear interpolation back (partial volume)."""
    few = max(round(n / factor), 2)
    edges = np.arange(few + 1) * n / few
    starts, stops = np.maximum(edges[:-1, None], np.arange(n)), np.minimum(edges[1:, None], np.arange(n) + 1)
    average = np.maximum(stops - starts, 0)
    average /= average.sum(1, keepdims=True)
    at = np.clip((np.arange(n) + 0.5) * few / n - 0.5, 0, few - 1)
    low = np.minimum(at.astype(int), few - 2)
    back = np.zeros((n, few))
    back[np.arange(n), low], back[np.arange(n), low + 1] = 1 - (at - low), at - low
    return back @ average


def _add_filter(filters: list[np.ndarray | None], axis: int, matrix: np.ndarray) -> None:
    filters[axis] = matrix if filters[axis] is None else matrix @ filters[axis]


def _smooth(filters: list[np.ndarray | None], shape: Sequence[int]) -> None:
    for axis, n in enumerate(shape):
        _add_filter(filters, axis, box_matrix(n))


def _thicken(rng: Rng, filters: list[np.ndarray | None], shape: Sequence[int], factors: Sequence[float]) -> None:
    axis = int(rng.integers(3))
    _add_filter(filters, axis, thick_matrix(shape[axis], float(rng.uniform(*factors))))


def _seed(rng: Rng) -> int:
    return int(rng.integers(1 << 62))


def draw_contrast(
    rng: Rng, kind: str, settings: Mapping[str, Any], shape: Sequence[int], input_map: str = "soft-tissue",
    regions: int = 0,
) -> Contrast:  # fmt: skip
    """Draw how a view is rendered.

    Args:
        rng: source of every draw.
        kind: "ct"; "mr-like" (a CT under a random contrast); "synthetic" (a label map under random intensities);
            "mr" or "partner" (a real or rendered MR under another curve).
        settings: the table [contrast].
        shape: (z, y, x) of the patch.
        input_map: name of the model's input map; decides the curve of a CT.
        regions: number of superpixels, where the subject has them.
    """
    if kind == "ct":
        return _draw_ct(rng, settings, shape, input_map)
    if kind == "mr-like":
        drawn = Contrast(1.0 / HU_STEP, drawn_curve(rng, settings), _seed(rng))
        smoothing = rng.random()
        for limit in (settings["smooth"], settings["smooth"] * 3 / 7):
            if smoothing < limit:
                _smooth(drawn.before, shape)
        if regions and rng.random() < settings["regions"]:
            drawn.region_curves = np.stack([drawn_curve(rng, settings) for _ in range(regions)])
        elif rng.random() < settings["region_blend"]:
            drawn.second = drawn_curve(rng, settings)
            drawn.blend = (float(rng.uniform(12, 40)), float(rng.uniform(1, 5)))
        if rng.random() < settings["texture"]:
            drawn.texture = rng.uniform(0, 0.25) * random_curve(rng)
    elif kind == "synthetic":
        means, spread = label_table(rng)
        drawn = Contrast(1.0, means, _seed(rng), texture=spread)
        if rng.random() < settings["smooth"]:
            _smooth(drawn.after, shape)
    else:
        drawn = Contrast(LEVELS - 1.0, signal_curve(rng, settings), _seed(rng))
    _draw_scanner(rng, drawn, settings, shape)
    return drawn


def _draw_ct(rng: Rng, settings: Mapping[str, Any], shape: Sequence[int], input_map: str) -> Contrast:
    drawn = Contrast(1.0 / HU_STEP, ct_curve(input_map), _seed(rng))
    if rng.random() < settings["ct_smooth"]:
        _smooth(drawn.before, shape)
    drawn.gain, drawn.offset = float(rng.uniform(0.97, 1.03)), float(rng.uniform(-15, 15))
    if rng.random() < settings["ct_noise"]:
        drawn.added_noise = float(rng.uniform(0, 30))
    if rng.random() < settings["ct_thick"]:
        _thicken(rng, drawn.before, shape, (1.2, 3.5))
    _draw_blur(rng, drawn.before, settings, shape)
    return drawn


def _draw_blur(rng: Rng, filters: list[np.ndarray | None], settings: Mapping[str, Any], shape: Sequence[int]) -> None:
    if settings["blur"] and rng.random() < settings["blur"]:
        for axis, n in enumerate(shape):
            _add_filter(filters, axis, gauss_matrix(n, float(rng.uniform(*settings["blur_mm"])) / 2.0))


def _draw_scanner(rng: Rng, drawn: Contrast, settings: Mapping[str, Any], shape: Sequence[int]) -> None:
    """Bias field, mid-frequency shading, thick slices, noise, window and gamma of an MR."""
    if rng.random() < settings["bias"]:
        drawn.shading.append((60.0, float(rng.uniform(0, settings["bias_strength"]))))
    if rng.random() < settings["shading"]:
        drawn.shading.append((16.0, float(rng.uniform(0, 0.2))))
    if rng.random() < settings["smooth"] * 3 / 7:
        _smooth(drawn.after, shape)
    if rng.random() < settings["thick"]:
        _thicken(rng, drawn.after, shape, settings["thick_factor"])
    _draw_blur(rng, drawn.after, settings, shape)
    if rng.random() < settings["noise"]:
        drawn.noise = float(rng.uniform(0, settings["noise_sd"]))
    if rng.random() < settings["window"]:
        drawn.window = (float(rng.uniform(0, 0.02)), float(rng.uniform(0.97, 1.0)))
        drawn.gamma = float(rng.uniform(*settings["gamma"]))


def _generator(seed: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def _noise(images: Tensor, seeds: Sequence[int]) -> Tensor:
    """Standard normal noise (B, z, y, x), each from its own seed."""
    shape, device = images.shape[1:], images.device
    return torch.stack([torch.randn(shape, generator=_generator(s, device), device=device) for s in seeds])


def smooth_fields(images: Tensor, cells: Sequence[float], seeds: Sequence[int]) -> Tensor:
    """Smooth random fields (B, z, y, x) of about unit variance whose features span `cells` voxels."""
    shape = tuple(images.shape[1:])
    fields = []
    for size, seed in zip(cells, seeds, strict=True):
        nodes = [max(int(np.ceil(n / size)) + 2, 3) for n in shape]
        coarse = torch.randn(nodes, generator=_generator(seed, images.device), device=images.device)[None, None]
        fields.append(F.interpolate(coarse, size=shape, mode="trilinear", align_corners=True)[0, 0] * 1.4)
    return torch.stack(fields)


def filtered(images: Tensor, filters: Sequence[Sequence[np.ndarray | None]]) -> Tensor:
    """Apply to each image (B, z, y, x) its own filter matrix per axis (None: no filter)."""
    for axis in range(3):
        rows = [i for i, own in enumerate(filters) if own[axis] is not None]
        if not rows:
            continue
        stack = np.stack([filters[i][axis] for i in rows]).astype(np.float32)
        matrix = torch.from_numpy(stack).to(images.device)
        part = images[rows]
        shape = part.shape
        if axis == 0:
            part = matrix @ part.reshape(shape[0], shape[1], -1)
        elif axis == 1:
            part = matrix[:, None] @ part
        else:
            part = part.reshape(shape[0], -1, shape[3]) @ matrix.transpose(1, 2)
        images[rows] = part.reshape(shape)
    return images


def lookup(values: Tensor, curves: Sequence[np.ndarray]) -> Tensor:
    """Read each image's curve at its integer values: int64 (B, z, y, x) in 0..LEVELS-1 -> float32 (B, z, y, x)."""
    table = torch.from_numpy(np.stack(curves).astype(np.float32)).to(values.device)
    offset = torch.arange(len(table), device=values.device).reshape(-1, 1, 1, 1) * table.shape[1]
    return table.reshape(-1)[values + offset]


def apply_contrasts(images: Tensor, drawn: Sequence[Contrast], regions: Sequence[Tensor | None] = ()) -> Tensor:
    """Render a batch of patches.

    Args:
        images: float32 (B, z, y, x): HU + 1024, label numbers, or MR as 0..1.
        drawn: how each is rendered.
        regions: per patch (z, y, x) superpixel numbers where its contrast has `region_curves`.

    Returns:
        float32 (B, z, y, x) in 0..1.
    """

    def which(use) -> list[int]:
        return [i for i, contrast in enumerate(drawn) if use(contrast)]

    images = filtered(images.clone(), [c.before for c in drawn])
    rows = which(lambda c: (c.gain, c.offset) != (1.0, 0.0))
    if rows:
        gain, offset = (_column([getattr(drawn[i], name) for i in rows], images) for name in ("gain", "offset"))
        images[rows] = images[rows] * gain + offset
    rows = which(lambda c: c.added_noise)
    if rows:
        sigma = _column([drawn[i].added_noise for i in rows], images)
        images[rows] += _noise(images[rows], [drawn[i].seed for i in rows]) * sigma
    index = (images * _column([c.scale for c in drawn], images)).round_().clamp_(0, LEVELS - 1).long()
    signal = lookup(index, [c.curve for c in drawn])
    _regional(signal, index, drawn, regions)
    rows = which(lambda c: c.texture is not None)
    if rows:
        half = _noise(signal[rows][:, ::2, ::2, ::2], [drawn[i].seed + 1 for i in rows])
        texture = F.interpolate(half[:, None], size=tuple(signal.shape[1:]), mode="trilinear", align_corners=False)
        signal[rows] *= 1 + texture[:, 0] * lookup(index[rows], [drawn[i].texture for i in rows])
    for layer in (0, 1):
        rows = which(lambda c, layer=layer: len(c.shading) > layer)
        if rows:
            cells, amplitude = zip(*[drawn[i].shading[layer] for i in rows])
            fields = smooth_fields(signal[rows], cells, [drawn[i].seed + 2 + layer for i in rows])
            signal[rows] *= torch.exp(fields * _column(amplitude, signal))
    signal = filtered(signal, [c.after for c in drawn])
    rows = which(lambda c: c.noise)
    if rows:
        sigma = _column([drawn[i].noise for i in rows], signal)
        real, imaginary = (_noise(signal[rows], [drawn[i].seed + k for i in rows]) * sigma for k in (4, 5))
        signal[rows] = torch.hypot(signal[rows] + real, imaginary)
    rows = which(lambda c: c.window is not None)
    if rows:
        signal[rows] = _windowed(signal[rows], [drawn[i] for i in rows])
    return signal.clamp_(0, 1)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device).reshape(-1, 1, 1, 1)


def _regional(signal: Tensor, index: Tensor, drawn: Sequence[Contrast], regions: Sequence[Tensor | None]) -> None:
    """Second curves blended in smooth regions, and curves by superpixel; in place."""
    rows = [i for i, c in enumerate(drawn) if c.second is not None]
    if rows:
        cells, steepness = zip(*[drawn[i].blend for i in rows])
        fields = smooth_fields(signal[rows], cells, [drawn[i].seed + 6 for i in rows])
        share = torch.sigmoid(fields * _column(steepness, signal))
        other = lookup(index[rows], [drawn[i].second for i in rows])
        signal[rows] = other + share * (signal[rows] - other)
    for i, contrast in enumerate(drawn):
        if contrast.region_curves is not None and i < len(regions) and regions[i] is not None:
            table = torch.from_numpy(contrast.region_curves.astype(np.float32)).to(signal.device)
            which = regions[i].long().clamp(0, len(table) - 1)
            signal[i] = table[which, index[i]]


def _windowed(signal: Tensor, drawn: Sequence[Contrast]) -> Tensor:
    sample = signal.reshape(len(signal), -1)[:, ::37].sort(dim=1).values
    last = sample.shape[1] - 1
    rows = torch.arange(len(signal), device=signal.device)
    ends = [
        sample[rows, torch.tensor([round(c.window[end] * last) for c in drawn], device=signal.device)]
        for end in (0, 1)
    ]
    low, high = (end.reshape(-1, 1, 1, 1) for end in ends)
    unit = ((signal - low) / (high - low).clamp(min=1e-3)).clamp_(0, 1)
    return unit.pow(_column([c.gamma for c in drawn], signal))
