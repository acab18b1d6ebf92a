"""What speaks for or against a transform between two embeddings, in figures that a verdict can be calibrated on."""

from __future__ import annotations

import math

import numpy as np
from scipy.special import betainc

from uae.embedding import Embedding
from uae.errors import NoConfidentResultError
from uae.registration.rigid import arun
from uae.transform import Affine

TOLERANCE_MM = 10.0
"""Matches agree with a transform within this distance (our measurement; also the field's CPM@10mm)."""

HELDOUT_CUBE_MM, HELDOUT_SHARE = 16.0, 0.2
LEAST_IN_PLACE = 8


def held_out(points: np.ndarray, seed: int = 0) -> np.ndarray:
    """Bool (N,): points (N, 3) mm in about a fifth of all cubes of 16 mm, the same cubes at every call.

    Whole cubes are kept from every fit, in both passes of a registration, so that the matches around one that judges a
    fit are mostly unseen as well, and no match of the first pass comes back in the second.
    """
    cubes, which = np.unique(np.floor(points / HELDOUT_CUBE_MM).astype(np.int64), axis=0, return_inverse=True)
    # Seeds are non-negative: 2**20 cubes are 16 km.
    draws = [np.random.default_rng([seed, *(cube + 2**20)]).random() for cube in cubes]
    return (np.array(draws) < HELDOUT_SHARE)[which.reshape(-1)]


def _log10_at_least(hits: int, count: int, chance: float) -> float:
    """log10 of the binomial probability of `hits` or more among `count`, not below -300."""
    # scipy.stats says the same and takes more than a second to import.
    probability = float(betainc(hits, count - hits + 1, chance)) if hits else 1.0
    return math.log10(probability) if probability > 1e-300 else -300.0


def heldout_figures(transform: Affine, source: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """Judge a transform on matches it has not seen, against the share that chance gives.

    Chance = how often the predicted place of one match lies within 10 mm of the match of another: it is high where all
    matches crowd in one corner.
    """
    predicted = transform.apply(source)
    residual = np.linalg.norm(predicted - target, axis=1)
    count = len(residual)
    crossed = np.linalg.norm(predicted[:, None] - target[None], axis=2) <= TOLERANCE_MM
    np.fill_diagonal(crossed, False)
    chance = float(crossed.sum() / max(count * (count - 1), 1))
    hits = int((residual <= TOLERANCE_MM).sum())
    # One more hit and miss than seen keeps a chance of 0 from looking like certainty with few matches.
    smoothed = (chance * count + 1.0) / (count + 2.0)
    return {
        "heldout": count,
        "heldout_within_10mm": hits / max(count, 1),
        "heldout_chance": chance,
        "heldout_log10_p": _log10_at_least(hits, count, smoothed),
        "heldout_residual_median_mm": float(np.median(residual)) if count else math.nan,
        "heldout_inlier_median_mm": float(np.median(residual[residual <= TOLERANCE_MM])) if hits else math.nan,
    }


def stability(
    source: np.ndarray, target: np.ndarray, corners: np.ndarray, rng: np.random.Generator, rounds: int = 20
) -> float:
    """How much the result depends on which matches agree, mm.

    Median over random halves of the inliers of the largest distance between the two halves' places of the body's
    corners (8, 3).
    """
    moved = []
    for _ in range(rounds):
        order = rng.permutation(len(source))
        half = len(order) // 2
        try:
            one, two = (arun(source[part], target[part]) for part in (order[:half], order[half:]))
        except NoConfidentResultError:
            continue
        moved.append(np.linalg.norm(one.apply(corners) - two.apply(corners), axis=1).max())
    return float(np.median(moved)) if moved else 1e3


def similarity_gain(
    source: Embedding, target: Embedding, transform: Affine, points: np.ndarray, step_mm: float = 24.0
) -> float:
    """Mean over points (N, 3) of the similarity at the predicted place minus the mean over six places `step_mm` away.

    It uses the whole body, also the places that gave no mutual match, so that agreement of a few matches alone cannot
    raise it.
    """
    places = transform.apply(points)
    landed = target.geometry.contains(places)
    if landed.sum() < LEAST_IN_PLACE:
        return 0.0
    places, own = places[landed], source.descriptors(points[landed]).astype(np.float32)
    at_place = np.einsum("nd,nd->n", own, target.descriptors(places).astype(np.float32))
    around, known = np.zeros(len(places)), np.zeros(len(places))
    for axis in range(3):
        for sign in (-1.0, 1.0):
            shifted = places + sign * step_mm * np.eye(3)[axis]
            usable = target.geometry.contains(shifted)
            if usable.any():
                around[usable] += np.einsum(
                    "nd,nd->n", own[usable], target.descriptors(shifted[usable]).astype(np.float32)
                )
                known += usable
    both = known > 0
    return float(np.nanmean(at_place[both] - around[both] / known[both])) if both.any() else 0.0


def body_overlap(target: Embedding, transform: Affine, points: np.ndarray) -> float:
    """Share of the source's body points (N, 3) that land in the target's body, of those that land in its scan."""
    index = np.rint(target.fine_geometry.mm_to_index(transform.apply(points))).astype(int)[:, ::-1]
    within = ((index >= 0) & (index < target.body.shape)).all(axis=1)
    index = index[within]
    valid = target.valid[tuple(index.T)]
    return float(target.body[tuple(index[valid].T)].mean()) if valid.any() else 0.0
