"""Two overlapping views of one subject and exact correspondences between them, at continuous positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial.transform import Rotation
from torch import Tensor

from uae.preprocess import InputMap
from uae.training.augment import Rng, ct_view, mr_like_view, real_mr_view
from uae.training.data import Subject


def _normalised(points: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Voxel positions (..., 3) z, y, x -> grid_sample coordinates (..., 3) x, y, z with align_corners."""
    size = torch.tensor([max(n - 1, 1) for n in shape], dtype=points.dtype, device=points.device)
    return (2 * points / size - 1).flip(-1)


def sample_at(volume: Tensor, points: Tensor, mode: str = "bilinear", padding: str = "zeros") -> Tensor:
    """Read (1, C, z, y, x) at voxel positions (..., 3) z, y, x -> (C, ...)."""
    grid = _normalised(points, volume.shape[2:]).reshape(1, 1, 1, -1, 3)
    values = F.grid_sample(volume, grid.to(volume.dtype), mode=mode, padding_mode=padding, align_corners=True)
    return values.reshape(volume.shape[1], *points.shape[:-1])


@dataclass
class ViewMap:
    """Patch voxels -> subject voxels: X = center + A (p + D(p) - middle), D a smooth random displacement.

    Attributes:
        matrix: (3, 3) float64 in voxels, axes z, y, x.
        center: (3,) subject voxel that the patch's middle shows.
        middle: (3,) patch voxel of the middle.
        displacement: (1, 3, z, y, x) coarse control grid over the patch, in patch voxels, or None.
        shape: patch shape.
    """

    matrix: np.ndarray
    center: np.ndarray
    middle: np.ndarray
    displacement: Tensor | None
    shape: tuple[int, int, int]

    def _displace(self, points: Tensor) -> Tensor:
        scale = torch.tensor([(m - 1) / (n - 1) for m, n in zip(self.displacement.shape[2:], self.shape, strict=True)])
        return sample_at(self.displacement, points * scale, padding="border").movedim(0, -1)

    def to_subject(self, points: Tensor) -> Tensor:
        """(..., 3) patch voxels -> (..., 3) subject voxels, float32."""
        if self.displacement is not None:
            points = points + self._displace(points)
        matrix = torch.from_numpy(self.matrix).float()
        return (points - torch.from_numpy(self.middle).float()) @ matrix.T + torch.from_numpy(self.center).float()

    def to_patch(self, points: Tensor) -> Tensor:
        """Inverse of to_subject by fixed-point iteration (the displacements are small and smooth)."""
        inverse = torch.from_numpy(np.linalg.inv(self.matrix)).float()
        target = (points - torch.from_numpy(self.center).float()) @ inverse.T + torch.from_numpy(self.middle).float()
        found = target.clone()
        if self.displacement is not None:
            for _ in range(16):
                found = target - self._displace(found)
        return found


@dataclass
class View:
    """One network input with its map.

    Attributes:
        image: (z, y, x) network units.
        valid: bool (z, y, x), inside the scan and the field of view.
        body: bool (z, y, x), inside the patient and the field of view.
        map: patch voxels -> subject voxels.
    """

    image: Tensor
    valid: Tensor
    body: Tensor
    map: ViewMap


def draw_map(rng: Rng, settings: dict[str, Any], seed_voxel: np.ndarray, overlap: float) -> ViewMap:
    """Random scale, rotation, deformation and position such that `seed_voxel` lies well inside the patch.

    Args:
        rng: source of every draw.
        settings: `patch`, `scale`, `axis_scale`, `rotation_deg`, `deform_probability`, `deform_mm`.
        seed_voxel: (3,) subject voxel both views must show.
        overlap: share of the patch's half size within which the seed may lie from the middle.
    """
    shape = tuple(settings["patch"])
    low, high = settings["scale"]
    scale = rng.uniform(low, high) * rng.uniform(1 - settings["axis_scale"], 1 + settings["axis_scale"], 3)
    angles = rng.uniform(-1, 1, 3) * settings["rotation_deg"]
    matrix = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ np.diag(scale)
    middle = (np.array(shape) - 1) / 2
    place = rng.uniform(-overlap, overlap, 3) * middle
    center = np.asarray(seed_voxel, float) - matrix @ place
    displacement = None
    if rng.random() < settings["deform_probability"]:
        control = rng.standard_normal((1, 3, *[int(np.ceil(n / rng.uniform(14, 26))) + 2 for n in shape]))
        size = tuple(n // 4 + 1 for n in shape)
        fine = F.interpolate(torch.from_numpy(control).float(), size=size, mode="trilinear", align_corners=True)
        fine = F.avg_pool3d(F.pad(fine, (2,) * 6, mode="replicate"), 5, 1)
        rms = float(rng.uniform(*settings["deform_mm"])) / 2.0
        displacement = fine * (rms / float(fine.square().sum(1).mean().sqrt()))
    return ViewMap(matrix, center, middle, displacement, (shape[0], shape[1], shape[2]))


def _well_filled_map(rng: Rng, settings: dict[str, Any], subject: Subject, seed_voxel: np.ndarray) -> ViewMap:
    """The first of a few draws that shows enough of the patient, else the one that shows most (air teaches little)."""
    best, best_share = None, -1.0
    lattice = _grid((5, 5, 5)) / 4 * (torch.tensor(settings["patch"], dtype=torch.float32) - 1)
    for _ in range(6):
        view_map = draw_map(rng, settings, seed_voxel, settings["seed_offset"])
        mask = sample_at(subject.mask, view_map.to_subject(lattice), mode="nearest")
        share = float((mask > 1.5).float().mean())
        if share > best_share:
            best, best_share = view_map, share
        if share >= settings["body_share"]:
            break
    return best


def _grid(shape: tuple[int, ...]) -> Tensor:
    return torch.stack(torch.meshgrid(*[torch.arange(n, dtype=torch.float32) for n in shape], indexing="ij"), -1)


def draw_view(
    rng: Rng, subject: Subject, kind: str, view_map: ViewMap, settings: dict[str, Any], input_map: InputMap
) -> View:
    """Resample a subject once through `view_map` and give it the contrast `kind`: ct, mr-like, partner or mr."""
    points = view_map.to_subject(_grid(view_map.shape))
    source = subject.partner if kind == "partner" else subject.image
    image = sample_at(source, points)[0]
    mask = sample_at(subject.mask, points, mode="nearest")[0]
    valid, body = mask > 0.5, mask > 1.5
    no_table = rng.random() < (settings["table_removed"] if kind == "ct" else 0.95)
    if no_table:
        image = torch.where(body, image, torch.zeros(()))
    if kind == "ct":
        unit = ct_view(rng, image)
    elif kind == "mr-like":
        unit = mr_like_view(rng, image)
    else:
        unit = real_mr_view(rng, image)
    field_of_view = settings["field_of_view_probability"] * (0.4 if kind == "ct" else 1.0)
    if rng.random() < field_of_view:
        inside = torch.zeros(view_map.shape, dtype=torch.bool)
        cuts = rng.uniform(0, settings["field_of_view_cut"], (3, 2)) * (rng.random((3, 2)) < 0.7)
        box = [
            slice(int(a * n), max(int(n - b * n), int(a * n) + 8)) for n, (a, b) in zip(inside.shape, cuts, strict=True)
        ]
        inside[tuple(box)] = True
        valid, body = valid & inside, body & inside
    image = (unit - 0.5) / 0.25 if input_map.name == "soft-tissue" else unit * 255.0 - 50.0
    image = torch.where(valid, image, torch.full((), input_map.pad))
    return View(image, valid, body, view_map)


@dataclass
class Pair:
    """Two views of one subject.

    Attributes:
        views: the two views.
        cells: per view (K, 3) int fine cells (z, y, x) where that view's queries lie.
        partners: per view (K, 3) float voxel positions in the OTHER view of the same anatomy.
        subject_index: which subject.
        kinds: contrast of the views.
    """

    views: tuple[View, View]
    cells: tuple[Tensor, Tensor]
    partners: tuple[Tensor, Tensor]
    subject_index: int
    kinds: tuple[str, str]


def _correspondences(rng: Rng, source: View, target: View, count: int) -> tuple[Tensor, Tensor] | None:
    """Random body cells of `source` whose anatomy `target` shows: (K, 3) cells and (K, 3) positions."""
    candidates = source.body[::2, ::2, ::2].nonzero()
    if len(candidates) == 0:
        return None
    generator = torch.Generator().manual_seed(int(rng.integers(1 << 62)))
    picked = candidates[torch.randint(len(candidates), (count * 8,), generator=generator)]
    positions = target.map.to_patch(source.map.to_subject(picked * 2 + 0.5))
    limit = torch.tensor(target.map.shape, dtype=torch.float32) - 1.5
    inside = ((positions > 0.5) & (positions < limit)).all(-1)
    rounded = positions.round().long().clamp(min=0)
    rounded = torch.minimum(rounded, torch.tensor(target.map.shape) - 1)
    inside &= target.body[rounded[:, 0], rounded[:, 1], rounded[:, 2]]
    chosen = inside.nonzero()[:count, 0]
    if len(chosen) < count:
        return None
    return picked[chosen], positions[chosen]


def draw_pair(rng: Rng, subjects: list[Subject], settings: dict[str, Any], input_map: InputMap) -> Pair:
    """One training pair: subject, two contrasts, two poses, `positions` correspondences (half from each side)."""
    half = settings["positions"] // 2
    ct = [i for i, s in enumerate(subjects) if s.modality == "ct"]
    mr = [i for i, s in enumerate(subjects) if s.modality == "mr"]
    while True:
        pool = mr if mr and (not ct or rng.random() < settings["real_mr_probability"]) else ct
        weights = np.array([subjects[i].weight for i in pool])
        index = int(pool[rng.choice(len(pool), p=weights / weights.sum())])
        subject = subjects[index]
        kinds = _draw_kinds(rng, subject, settings)
        seed = subject.body_cells[rng.integers(len(subject.body_cells))]
        maps = [_well_filled_map(rng, settings, subject, seed) for _ in range(2)]
        views = tuple(
            draw_view(rng, subject, kind, view_map, settings, input_map)
            for kind, view_map in zip(kinds, maps, strict=True)
        )
        forward = _correspondences(rng, views[0], views[1], half)
        backward = _correspondences(rng, views[1], views[0], half) if forward else None
        if forward and backward:
            return Pair(views, (forward[0], backward[0]), (forward[1], backward[1]), index, kinds)


def _draw_kinds(rng: Rng, subject: Subject, settings: dict[str, Any]) -> tuple[str, str]:
    if subject.modality == "mr":
        return ("mr", "mr")
    both, cross = settings["mr_mr_probability"], settings["ct_mr_probability"]
    draw = rng.random()
    kinds = ["mr-like", "mr-like"] if draw < both else ["ct", "mr-like"] if draw < both + cross else ["ct", "ct"]
    if subject.partner is not None:
        kinds = ["partner" if kind == "mr-like" and rng.random() < 0.4 else kind for kind in kinds]
    if rng.random() < 0.5:
        kinds.reverse()
    return (kinds[0], kinds[1])
