"""Synthetic embeddings with known correspondence: random smooth fields of the patient's millimetre coordinates."""

from __future__ import annotations

import numpy as np

from uae.embedding import Embedding
from uae.geometry import Geometry

CHANNELS = 64


class Field:
    """Random Fourier features: a smooth unit vector for each point; the length sets how fast it changes."""

    def __init__(self, seed: int, length_mm: float, channels: int = CHANNELS):
        rng = np.random.default_rng(seed)
        self.frequency = rng.normal(size=(3, channels)) / length_mm
        self.phase = rng.uniform(0, 2 * np.pi, channels)

    def __call__(self, points):
        values = np.cos(points @ self.frequency + self.phase)
        return values / np.linalg.norm(values, axis=1, keepdims=True)


def unit(values):
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


FINE, COARSE = Field(1, 14.0), Field(2, 70.0)
NOISE_FINE, NOISE_COARSE = Field(3, 8.0), Field(4, 50.0)


def make(shape=(24, 24, 24), origin=(0.0, 0.0, 0.0), to_anatomy=None, noise=0.0, body=None, valid=None, sha="0" * 64):
    """Embedding on `shape` fine cells (multiples of 8); to_anatomy maps its LPS mm to the common anatomy's mm.

    noise: share of an unrelated field mixed in (cosine between the clean and the noisy fields about 1 - noise^2 / 2).
    """
    geometry = Geometry(tuple(2 * n for n in shape), (2.0, 2.0, 2.0), origin, np.eye(3))
    levels = []
    for stride, field, noisy in ((2, FINE, NOISE_FINE), (16, COARSE, NOISE_COARSE)):
        size = [n // stride for n in geometry.shape]
        cells = np.stack(np.meshgrid(*(np.arange(n) for n in size), indexing="ij"), axis=-1).reshape(-1, 3)
        points = geometry.index_to_mm((cells * stride + (stride - 1) / 2)[:, ::-1])
        anatomy = points if to_anatomy is None else to_anatomy(points)
        values = unit(field(anatomy) + noise * noisy(points))
        levels.append(values.T.reshape(-1, *size).astype(np.float16))
    valid = np.ones(shape, bool) if valid is None else valid
    body = valid if body is None else body & valid
    return Embedding(levels[0], levels[1], None, geometry, valid, body, sha, "ct")


def cell_mm(embedding, cell):
    """LPS mm of a fine cell z, y, x, by the contract's rule: fine cell k lies at 2k + 0.5 network voxels."""
    return embedding.geometry.origin + 2.0 * (2.0 * np.array(cell, float)[::-1] + 0.5)


def brute_force(query, descriptors):
    """(N, M) cosines of descriptors with all body cells, and the cells' millimetres, without any search structure."""
    cells = np.argwhere(query.body)
    fine = query.fine.astype(np.float64)[:, query.body].T
    coarse = query.cell_descriptors(cells)[:, CHANNELS:].astype(np.float64)
    half = descriptors.shape[1] // 2
    scores = unit(descriptors[:, :half].astype(np.float64)) @ unit(fine).T
    scores += unit(descriptors[:, half:].astype(np.float64)) @ unit(coarse).T
    return scores / 2, np.array([cell_mm(query, cell) for cell in cells])
