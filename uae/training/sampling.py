"""Pairs of views and exact correspondences between them, at continuous positions.

Two views of one subject; of a scan and the scan registered to it; or of two phantoms through the canonical body.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from uae.errors import InputError
from uae.preprocess import InputMap
from uae.training.augment import Rng
from uae.training.frames import sample_at
from uae.training.subjects import BODY, Subject
from uae.training.views import View, ViewMap, draw_map, draw_view, read_mask, render_views

__all__ = ["Pair", "View", "ViewMap", "draw_map", "draw_pair", "fine_positions", "render_views", "sample_at"]

CANONICAL = -1
"""Subject number of pairs whose places lie in the canonical body."""
TRIES = 50
OVERDRAW = 16
"""Random cells drawn for each correspondence wanted; about one in five lies in both bodies."""


@dataclass
class Pair:
    """Two views with correspondences; positions are patch voxels, cells are fine cells, axes z, y, x.

    Attributes:
        views: the two views.
        cells: per view (K, 3) int fine cells where that view's queries lie.
        partners: per view (K, 3) float voxel positions in the OTHER view of the same anatomy.
        negatives: per view (N, 3) int random fine cells inside the scan.
        subject_index: which subject; CANONICAL for two phantoms.
        kinds: contrast of the views.
        beyond: a third view of the larger scan outside the dilated overlap, with (F, 3) int fine cells there; or None.
        seed: of the random choices inside the loss.
    """

    views: tuple[View, View]
    cells: tuple[Tensor, Tensor]
    partners: tuple[Tensor, Tensor]
    negatives: tuple[Tensor, Tensor]
    subject_index: int
    kinds: tuple[str, str]
    beyond: tuple[View, Tensor] | None = None
    seed: int = 0
    all_views: list[View] = field(init=False)

    def __post_init__(self) -> None:
        self.all_views = [*self.views] + ([self.beyond[0]] if self.beyond else [])


def fine_positions(cells: Tensor) -> Tensor:
    """Voxel positions (N, 3) of fine cells (N, 3): cell k lies at 2 k + 0.5."""
    return cells * 2 + 0.5


def random_cells(rng: Rng, view: View, count: int) -> Tensor:
    """(count, 3) int random fine cells of a view, anywhere in the patch."""
    shape = np.array(view.map.shape) // 2
    return torch.from_numpy((rng.random((count, 3)) * shape).astype(np.int64))


def cells_inside(rng: Rng, view: View, count: int) -> Tensor | None:
    """(count, 3) int random fine cells of a view inside the scan and the field of view, None where it shows little."""
    found = np.zeros((0, 3), np.int64)
    for _ in range(4):
        cells = random_cells(rng, view, 2 * count)
        found = np.concatenate([found, cells.numpy()[view.mask_at(fine_positions(cells)) > 0]])
        if len(found) >= count:
            return torch.from_numpy(found[:count])
    return None


def _correspondences(rng: Rng, source: View, target: View, count: int) -> tuple[Tensor, Tensor] | None:
    """Random body cells of `source` whose anatomy `target` shows: (K, 3) cells and (K, 3) positions."""
    picked = random_cells(rng, source, count * OVERDRAW)
    picked = picked[torch.from_numpy(source.mask_at(fine_positions(picked)) == BODY)]
    if len(picked) < count:
        return None
    positions = target.from_common(source.common(fine_positions(picked)))
    limit = torch.tensor(target.map.shape, dtype=torch.float32) - 1.5
    inside = ((positions > 0.5) & (positions < limit)).all(-1).numpy() & (target.mask_at(positions) == BODY)
    chosen = np.flatnonzero(inside)[:count]
    return (picked[chosen], positions[chosen]) if len(chosen) == count else None


def draw_pair(
    rng: Rng, subjects: Sequence[Subject], settings: Mapping[str, Any], input_map: InputMap, registered: bool = False
) -> Pair:
    """One training pair, not rendered yet: subjects, two contrasts, two poses, `positions` correspondences.

    Args:
        rng: source of every draw.
        subjects: all of them.
        settings: the tables [views], [contrast] and [synthetic] together; `fov_negatives` for registered pairs.
        input_map: of the model.
        registered: draw among registered pairs, else among the others.

    Raises:
        InputError: no two views of these subjects show enough common anatomy.
    """
    half = settings["positions"] // 2
    for _ in range(TRIES):
        views, index = _draw_ends(rng, subjects, settings, input_map, registered)
        if rng.random() < 0.5:
            views = views[::-1]
        forward = _correspondences(rng, views[0], views[1], half)
        backward = _correspondences(rng, views[1], views[0], half) if forward else None
        negatives = [cells_inside(rng, v, settings["negatives_per_view"]) for v in views] if backward else [None]
        if any(cells is None for cells in negatives):
            continue
        beyond = _draw_beyond(rng, views, settings, input_map) if registered else None
        return Pair(
            views, (forward[0], backward[0]), (forward[1], backward[1]), (negatives[0], negatives[1]), index,
            (views[0].kind, views[1].kind), beyond, int(rng.integers(1 << 62)),
        )  # fmt: skip
    raise InputError(
        "the training scans show too little of a patient for views of this size; lower views.patch or views.positions"
    )


def _draw_ends(
    rng: Rng, subjects: Sequence[Subject], settings: Mapping[str, Any], input_map: InputMap, registered: bool
) -> tuple[tuple[View, View], int]:
    index = _draw_subject(rng, subjects, settings, registered)
    subject = subjects[index]
    seed = subject.body_cells[rng.integers(len(subject.body_cells))]
    if registered:
        views = tuple(draw_view(rng, subject, kind, seed, settings, input_map) for kind in ("ct", "partner"))
        return (views[0], views[1]), index
    kinds = _draw_kinds(rng, subject, settings)
    others = [i for i, s in enumerate(subjects) if s.frame is not None and i != index]
    if subject.frame is None or not others or rng.random() >= settings["cross_subject"]:
        views = tuple(draw_view(rng, subject, kind, seed, settings, input_map) for kind in kinds)
        return (views[0], views[1]), index
    other = subjects[int(rng.choice(others))]
    common = subject.frame.to_common(torch.from_numpy(seed[None].astype(np.float32)))
    there = other.frame.from_common(common)[0].numpy()
    first = draw_view(rng, subject, kinds[0], seed, settings, input_map)
    second = draw_view(rng, other, kinds[1], there, settings, input_map)
    first.canonical = second.canonical = True
    return (first, second), CANONICAL


def _draw_subject(rng: Rng, subjects: Sequence[Subject], settings: Mapping[str, Any], registered: bool) -> int:
    usable = [i for i, s in enumerate(subjects) if s.registered == registered]
    if not usable:
        raise InputError("no registered pair to train on; look into registrations.csv" if registered else
                         "no training volumes; list them under [data] volumes or give phantom_seeds")  # fmt: skip
    mr = [i for i in usable if subjects[i].modality == "mr"]
    ct = [i for i in usable if subjects[i].modality == "ct"]
    pool = mr if mr and (not ct or rng.random() < settings["real_mr_probability"]) else ct
    weights = np.array([subjects[i].weight for i in pool])
    return int(pool[rng.choice(len(pool), p=weights / weights.sum())])


def _draw_kinds(rng: Rng, subject: Subject, settings: Mapping[str, Any]) -> tuple[str, str]:
    if subject.modality == "mr":
        return ("mr", "mr")
    both, cross = settings["mr_mr_probability"], settings["ct_mr_probability"]
    draw = rng.random()
    kinds = ["mr-like", "mr-like"] if draw < both else ["ct", "mr-like"] if draw < both + cross else ["ct", "ct"]
    if subject.tissues is not None and settings["label_contrast"]:
        kinds = ["synthetic" if k == "mr-like" and rng.random() < settings["label_contrast"] else k for k in kinds]
    if subject.partner is not None:
        kinds = ["partner" if k == "mr-like" and rng.random() < settings["rendered"] else k for k in kinds]
    return (kinds[0], kinds[1])


def _draw_beyond(
    rng: Rng, views: tuple[View, View], settings: Mapping[str, Any], input_map: InputMap
) -> tuple[View, Tensor] | None:
    """A view of the larger scan where the smaller one has nothing, and fine cells outside the dilated overlap."""
    subject = views[0].subject
    wanted = settings["fov_negatives"]
    if not wanted or not len(subject.beyond):
        return None
    seed = subject.beyond[rng.integers(len(subject.beyond))]
    view = draw_view(rng, subject, "ct", seed, settings, input_map)
    cells = random_cells(rng, view, wanted * OVERDRAW)
    positions = fine_positions(cells)
    outside = read_mask(subject.beyond_mask, view.map.to_subject(positions)) > 0
    chosen = np.flatnonzero(outside & (view.mask_at(positions) == BODY))[:wanted]
    return (view, cells[chosen]) if len(chosen) else None
