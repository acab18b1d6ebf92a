"""One augmented view of a subject: where its patch lies, what it may show, and its rendered image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial.transform import Rotation
from torch import Tensor

from uae.preprocess import InputMap
from uae.training.augment import Contrast, Rng, apply_contrasts, draw_contrast
from uae.training.frames import sample_at
from uae.training.subjects import BODY, Subject

INVERSE_STEPS = 16


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
        field_ = self.displacement.to(points.device)
        steps = [(m - 1) / (n - 1) for m, n in zip(field_.shape[2:], self.shape, strict=True)]
        return sample_at(field_, points * points.new_tensor(steps), padding="border").movedim(0, -1)

    def to_subject(self, points: Tensor) -> Tensor:
        """(..., 3) patch voxels -> (..., 3) subject voxels, float32."""
        if self.displacement is not None:
            points = points + self._displace(points)
        return (points - points.new_tensor(self.middle)) @ points.new_tensor(self.matrix).T + points.new_tensor(
            self.center
        )

    def to_patch(self, points: Tensor) -> Tensor:
        """Inverse of to_subject by fixed-point iteration (the displacements are small and smooth)."""
        inverse = points.new_tensor(np.linalg.inv(self.matrix))
        target = (points - points.new_tensor(self.center)) @ inverse.T + points.new_tensor(self.middle)
        found = target.clone()
        if self.displacement is not None:
            for _ in range(INVERSE_STEPS):
                found = target - self._displace(found)
        return found


@dataclass
class View:
    """One network input with its map.

    Attributes:
        subject: what is seen.
        kind: "ct", "mr-like", "synthetic", "partner" or "mr".
        map: patch voxels -> subject voxels.
        box: (3, 2) int, first and last patch voxel (exclusive) of the field of view along z, y, x.
        bare: the table and everything else outside the patient is removed.
        contrast: how it is rendered.
        canonical: places are compared in the canonical body, not in the subject (pairs of two phantoms).
        image: (z, y, x) network units once rendered.
    """

    subject: Subject
    kind: str
    map: ViewMap
    box: np.ndarray
    bare: bool
    contrast: Contrast
    canonical: bool = False
    image: Tensor | None = field(default=None, repr=False)

    @property
    def mask(self) -> np.ndarray:
        """The subject's mask that holds for this view's image."""
        own = self.subject.partner_mask if self.kind == "partner" else None
        return self.subject.mask if own is None else own

    def mask_at(self, positions: Tensor) -> np.ndarray:
        """Mask values (N,) at patch voxels (N, 3); 0 outside the field of view."""
        value = read_mask(self.mask, self.map.to_subject(positions))
        place = positions.numpy()
        shown = np.all((place > self.box[:, 0] - 0.5) & (place < self.box[:, 1] - 0.5), axis=1)
        return np.where(shown, value, 0)

    def common(self, positions: Tensor) -> Tensor:
        """Patch voxels (N, 3) -> voxels of the frame in which the views of a pair compare."""
        voxels = self.map.to_subject(positions)
        return self.subject.frame.to_common(voxels) if self.canonical else voxels

    def from_common(self, voxels: Tensor) -> Tensor:
        """Inverse of `common`."""
        return self.map.to_patch(self.subject.frame.from_common(voxels) if self.canonical else voxels)


def read_mask(mask: np.ndarray, voxels: Tensor) -> np.ndarray:
    """Values (N,) of a mask (z, y, x) at the nearest of voxels (N, 3); 0 outside."""
    index = np.rint(voxels.numpy()).astype(np.int64)
    inside = np.all((index >= 0) & (index < mask.shape), axis=1)
    index = np.where(inside[:, None], index, 0)
    return np.where(inside, mask[index[:, 0], index[:, 1], index[:, 2]], 0)


def draw_map(rng: Rng, settings: Mapping[str, Any], seed_voxel: np.ndarray, overlap: float) -> ViewMap:
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


def well_filled_map(rng: Rng, settings: Mapping[str, Any], mask: np.ndarray, seed_voxel: np.ndarray) -> ViewMap:
    """The first of a few draws that shows enough of the patient, else the one that shows most (air teaches little)."""
    best, best_share = None, -1.0
    lattice = (patch_grid((5, 5, 5)) / 4 * (torch.tensor(settings["patch"], dtype=torch.float32) - 1)).reshape(-1, 3)
    for _ in range(6):
        view_map = draw_map(rng, settings, seed_voxel, settings["seed_offset"])
        share = float((read_mask(mask, view_map.to_subject(lattice)) >= BODY).mean())
        if share > best_share:
            best, best_share = view_map, share
        if share >= settings["body_share"]:
            break
    return best


def patch_grid(shape: Sequence[int], device: torch.device | None = None) -> Tensor:
    """(z, y, x, 3) float32 voxel positions of a patch."""
    axes = [torch.arange(n, dtype=torch.float32, device=device) for n in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)


def draw_view(
    rng: Rng, subject: Subject, kind: str, seed_voxel: np.ndarray, settings: Mapping[str, Any], input_map: InputMap
) -> View:
    """Draw pose, field of view and contrast of one view; nothing is rendered yet.

    Args:
        rng: source of every draw.
        subject: what is seen.
        kind: see View.
        seed_voxel: (3,) subject voxel near which the patch lies.
        settings: the tables [views] and [contrast] together.
        input_map: of the model.
    """
    view = View(subject, kind, None, None, False, None)
    view.map = well_filled_map(rng, settings, view.mask, seed_voxel)
    view.bare = bool(rng.random() < (settings["table_removed"] if kind == "ct" else 0.95))
    regions = 0 if subject.regions is None else int(subject.regions.max()) + 1
    view.contrast = draw_contrast(rng, kind, settings, view.map.shape, input_map.name, regions)
    shape = np.array(view.map.shape)
    view.box = np.stack([np.zeros(3, int), shape], 1)
    if rng.random() < settings["field_of_view_probability"] * (0.4 if kind == "ct" else 1.0):
        cuts = rng.uniform(0, settings["field_of_view_cut"], (3, 2)) * (rng.random((3, 2)) < 0.7)
        first = (cuts[:, 0] * shape).astype(int)
        view.box = np.stack([first, np.maximum((shape - cuts[:, 1] * shape).astype(int), first + 8)], 1)
    return view


def render_views(views: Sequence[View], input_map: InputMap) -> Tensor:
    """Resample every view once, give all of them their contrasts at once and store the images.

    Returns:
        (B, z, y, x) network units on the subjects' device.
    """
    device = views[0].subject.image.device
    grid = patch_grid(views[0].map.shape, device)
    raw, bodies, valids, regions = [], [], [], []
    for view in views:
        subject = view.subject
        points = view.map.to_subject(grid)
        labels = view.kind == "synthetic"
        source = subject.tissues if labels else subject.partner if view.kind == "partner" else subject.image
        image = sample_at(source, points, mode="nearest" if labels else "bilinear")[0]
        mask = sample_at(_mask_tensor(view, device), points, mode="nearest")[0]
        shown = torch.zeros(mask.shape, dtype=torch.bool, device=device)
        shown[tuple(slice(int(a), int(b)) for a, b in view.box)] = True
        bodies.append(mask > 1.5)
        valids.append((mask > 0.5) & shown)
        raw.append(torch.where(bodies[-1], image, torch.zeros((), device=device)) if view.bare else image)
        regional = view.contrast.region_curves is not None
        regions.append(sample_at(subject.regions, points, mode="nearest")[0] if regional else None)
    unit = apply_contrasts(torch.stack(raw), [view.contrast for view in views], regions)
    images = (unit - 0.5) / 0.25 if input_map.name == "soft-tissue" else unit * 255.0 - 50.0
    images = torch.where(torch.stack(valids), images, torch.full((), input_map.pad, device=device))
    for view, image in zip(views, images, strict=True):
        view.image = image
    return images


def _mask_tensor(view: View, device: torch.device) -> Tensor:
    """The view's mask (1, 1, z, y, x) float32 on the device, kept with the subject."""
    cache = view.subject.__dict__.setdefault("_mask_tensors", {})
    key = (view.kind == "partner" and view.subject.registered, str(device))
    if key not in cache:
        cache[key] = torch.from_numpy(view.mask.astype(np.float32))[None, None].to(device)
    return cache[key]
