"""Embedding of one volume: unit vectors on the fine and coarse grids, looked up at millimetre points.

A position's descriptor is the concatenation of its heads' unit vectors over the square root of their number, so that
the dot product of two descriptors is the mean of the heads' cosines (authors' code: mean of fine, coarse, semantic).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import SimpleITK as sitk

from uae.device import inference_dtype, resolve_device
from uae.embedding_cache import (
    cache_key,
    cache_limit_bytes,
    discard,
    read_archive,
    read_cached,
    write_archive,
    write_cached,
)
from uae.errors import InputError
from uae.geometry import Geometry, as_points
from uae.inference import STAGE, run_model
from uae.lookup import gather, interpolation, joined, level_geometry, single, trilinear
from uae.preprocess import decide_modality, prepare
from uae.progress import Cancel, Progress, report
from uae.volume import Volume, write_image

if TYPE_CHECKING:
    from uae.models import Model

SEARCH_FP32_BYTES = 600_000_000
"""A search matrix larger than this in fp32 is kept in fp16: two whole torsos then fit the 4 GB of the contract."""
POINT_CHUNK = 20_000
PCA_SAMPLE = 20_000
ARRAYS = ("fine", "coarse", "semantic", "valid", "body")

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Embedding:
    """Features of one volume.

    Attributes:
        fine: (C, z, y, x) float16 unit vectors at stride 2 (4 mm).
        coarse: (C, z, y, x) float16 unit vectors at the coarse stride.
        semantic: as fine, or None where the model has no trained semantic head.
        geometry: the padded 2 mm network grid.
        valid: bool, fine grid: the cell's centre lies inside the scan.
        body: bool, fine grid: valid and inside the body.
        model_sha256: hash of the weights.
        modality: "ct" or "mr".
        meta: plain values: the model's name and version, where the volume came from, how its modality was decided.
    """

    fine: np.ndarray
    coarse: np.ndarray
    semantic: np.ndarray | None
    geometry: Geometry
    valid: np.ndarray
    body: np.ndarray
    model_sha256: str
    modality: str
    meta: dict[str, Any] = field(default_factory=dict)
    _search: tuple[np.ndarray, np.ndarray] | None = field(default=None, repr=False)

    @property
    def heads(self) -> tuple[str, ...]:
        """Names of the heads in a descriptor, in order."""
        return ("fine", "coarse") if self.semantic is None else ("fine", "coarse", "semantic")

    @property
    def dimension(self) -> int:
        """Length D of a descriptor."""
        return sum(len(getattr(self, name)) for name in self.heads)

    @property
    def fine_geometry(self) -> Geometry:
        """Grid of the fine cells."""
        return level_geometry(self.geometry, self.fine.shape[1:])

    @property
    def coarse_geometry(self) -> Geometry:
        """Grid of the coarse cells."""
        return level_geometry(self.geometry, self.coarse.shape[1:])

    def descriptors(self, points_mm: np.ndarray) -> np.ndarray:
        """Descriptors at points: each head trilinear at the position, at unit length again.

        Only valid fine cells take part. A point without a valid cell around it (outside the scan) gets zeros: its
        similarity to everything is 0.

        Args:
            points_mm: (N, 3) LPS mm.

        Returns:
            float32 (N, D).
        """
        points = as_points(points_mm)
        return self._in_chunks(self.fine_geometry.mm_to_index(points)[:, ::-1])

    def cell_descriptors(self, cells: np.ndarray) -> np.ndarray:
        """Descriptors of fine cells: the fine heads' own vector, the coarse head at the cell's position.

        Args:
            cells: (N, 3) int, z, y, x on the fine grid.

        Returns:
            float32 (N, D).

        Raises:
            IndexError: a cell is outside the grid.
        """
        cells = np.asarray(cells, dtype=np.intp).reshape(-1, 3)
        if len(cells) and (cells.min() < 0 or np.any(cells.max(axis=0) >= self.fine.shape[1:])):
            raise IndexError(f"cells outside the fine grid {self.fine.shape[1:]}")
        return self._in_chunks(cells.astype(np.float64))

    def search_matrix(self) -> tuple[np.ndarray, np.ndarray]:
        """All body cells and their descriptors, kept for the next call.

        Returns:
            cells (M, 3) int32 z, y, x on the fine grid in C order, and descriptors (M, D): float32, or float16 beyond
            SEARCH_FP32_BYTES (accumulate similarities in fp32).
        """
        if self._search is None:
            cells = np.argwhere(self.body).astype(np.int32)
            wide = len(cells) * self.dimension * 4 > SEARCH_FP32_BYTES
            matrix = np.empty((len(cells), self.dimension), dtype=np.float16 if wide else np.float32)
            weights = [interpolation(n, m) for n, m in zip(self.fine.shape[1:], self.coarse.shape[1:], strict=True)]
            coarse = single(self.coarse)
            row = 0
            for z in range(self.fine.shape[1]):
                here = self.body[z]
                count = int(here.sum())
                if count:
                    matrix[row : row + count] = self._plane(z, here, coarse, weights)
                    row += count
            self._search = (cells, matrix)
        return self._search

    def _plane(self, z: int, here: np.ndarray, coarse: np.ndarray, weights: list[np.ndarray]) -> np.ndarray:
        """Descriptors (n, D) of the cells `here` (bool (y, x)) of fine plane z."""
        plane = np.tensordot(weights[0][z], coarse, axes=(0, 1))
        plane = np.matmul(np.matmul(weights[1], plane), weights[2].T)
        parts = {"coarse": plane[:, here].T}
        for name in self.heads:
            if name != "coarse":
                parts[name] = single(getattr(self, name)[:, z][:, here].T)
        return joined([parts[name] for name in self.heads])

    def _in_chunks(self, index: np.ndarray) -> np.ndarray:
        """Descriptors at continuous fine indices (N, 3) in the order z, y, x."""
        found = np.empty((len(index), self.dimension), dtype=np.float32)
        ratio = [n / m for n, m in zip(self.fine.shape[1:], self.coarse.shape[1:], strict=True)]
        for start in range(0, len(index), POINT_CHUNK):
            part = index[start : start + POINT_CHUNK]
            corners, weights = trilinear(part, self.valid.shape)
            weights = weights * self.valid.reshape(-1)[corners]
            outside = ~weights.any(axis=0)
            # A coarse cell spans `ratio` fine cells: the same position in coarse indices.
            coarse_corners, coarse_weights = trilinear((part + 0.5) / ratio - 0.5, self.coarse.shape[1:])
            values = []
            for name in self.heads:
                which = (coarse_corners, coarse_weights) if name == "coarse" else (corners, weights)
                values.append(gather(getattr(self, name), *which))
            together = joined(values)
            together[outside] = 0.0
            found[start : start + POINT_CHUNK] = together
        return found

    def write_pca(self, path: str | Path) -> None:
        """Write `pca_volume` as an image file (.nii.gz, .nrrd, .mha).

        Raises:
            InputError, ResourceError: the file cannot be written.
        """
        write_image(pca_volume(self), path)

    def save(self, path: str | Path) -> None:
        """Write the embedding so that Embedding.load reads it back bit by bit.

        Raises:
            InputError, ResourceError: the file cannot be written.
        """
        write_archive(path, *self._to_archive())

    @classmethod
    def load(cls, path: str | Path) -> Embedding:
        """Read what `save` or `uae embed` wrote.

        Raises:
            InputError: no such file, no embedding, or damaged.
        """
        return cls._from_archive(*read_archive(path), str(path))

    def _to_archive(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        geometry = self.geometry
        header = {
            "shape": list(geometry.shape),
            "spacing": geometry.spacing.tolist(),
            "origin": geometry.origin.tolist(),
            "direction": geometry.direction.tolist(),
            "model_sha256": self.model_sha256,
            "modality": self.modality,
            "meta": self.meta,
        }
        arrays = {name: getattr(self, name) for name in ARRAYS}
        return header, {name: array for name, array in arrays.items() if array is not None}

    @classmethod
    def _from_archive(cls, header: dict[str, Any], arrays: dict[str, np.ndarray], source: str) -> Embedding:
        try:
            geometry = Geometry(header["shape"], header["spacing"], header["origin"], header["direction"])
            parts = {name: arrays.get(name) if name == "semantic" else arrays[name] for name in ARRAYS}
            found = cls(
                geometry=geometry,
                model_sha256=str(header["model_sha256"]),
                modality=str(header["modality"]),
                meta=dict(header["meta"]),
                **parts,
            )
            grids = [found.valid.shape, found.body.shape, found.fine.shape[1:]]
            if any(grid != grids[0] for grid in grids) or found.coarse.ndim != 4:
                raise ValueError("the arrays do not fit each other")
            level_geometry(geometry, found.coarse.shape[1:])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{source}: the embedding is incomplete ({error}); make it again") from error
        return found


def embed(
    volume: Volume,
    model: Model,
    device: str = "auto",
    memory_mb: float = 2000.0,
    cache: bool = True,
    lattice: Geometry | None = None,
    progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> Embedding:
    """Embed a volume, or take its embedding from the cache on disk.

    Args:
        volume: the scan; its modality is decided here where it is None.
        model: the weights.
        device: auto, cpu, cuda or cuda:N.
        memory_mb: bound on the network's activations and results, megabytes (the result does not depend on it).
        cache: look up and store in the cache.
        lattice: network grid to be continued over this scan, see `uae.preprocess.network_geometry`.
        progress: told the fraction done, stage "embedding".
        cancel: asked between slabs.

    Returns:
        The embedding.

    Raises:
        ModalityError: CT or MR cannot be decided.
        InputError: no such device.
        ResourceError: memory is exhausted.
        CancelledError: the user stopped the work.
    """
    if cache:
        cache_limit_bytes()  # a bad setting is told now, not after the work
    if volume.modality is None:
        modality, reason = decide_modality(volume)
        volume = replace(volume, modality=modality, modality_reason=reason)
    target = resolve_device(device)
    report(progress, STAGE, 0.0)
    key = cache_key(volume, model, str(inference_dtype(target)), lattice) if cache else ""
    found = _cached(key) if cache else None
    if found is None:
        found = _compute(volume, model, target, memory_mb, lattice, progress, cancel)
        if cache:
            write_cached(key, *found._to_archive())
    # The entry belongs to voxels, whatever file held them and however their modality was decided.
    found.meta = {
        "model": model.name,
        "model_version": model.version,
        "source": str(volume.path) if volume.path else "",
        "modality_reason": volume.modality_reason,
    }
    report(progress, STAGE, 1.0)
    return found


def _cached(key: str) -> Embedding | None:
    entry = read_cached(key)
    if entry is None:
        return None
    try:
        found = Embedding._from_archive(*entry, key)
    except InputError as error:
        logger.warning("cached embedding is unusable and is computed again: %s", error)
        discard(key)
        return None
    logger.info("embedding taken from the cache (%s...)", key[:12])
    return found


def _compute(
    volume: Volume,
    model: Model,
    device: Any,
    memory_mb: float,
    lattice: Geometry | None,
    progress: Progress | None,
    cancel: Cancel | None,
) -> Embedding:
    prepared = prepare(volume, model.input_map, model.config.coarse_stride, lattice)
    heads = run_model(model, prepared.image, device, memory_mb, progress, cancel)
    grid = level_geometry(prepared.geometry, heads["fine"].shape[1:])
    valid = _inside(grid, volume.geometry) & (_share(prepared.valid, grid.shape) > 0)
    body = valid & (_share(prepared.body, grid.shape) >= 0.5)
    if not body.any():
        logger.warning("no body was found in the volume; all of it is searched")
        body = valid.copy()
    return Embedding(
        fine=heads["fine"],
        coarse=heads["coarse"],
        semantic=heads.get("semantic"),
        geometry=prepared.geometry,
        valid=valid,
        body=body,
        model_sha256=model.sha256,
        modality=str(volume.modality),
    )


def _inside(grid: Geometry, scan: Geometry) -> np.ndarray:
    """Which cells of `grid` have their centre inside the scan, bool (z, y, x)."""
    inside = np.empty(grid.shape, dtype=bool)
    for z in range(grid.shape[0]):
        inside[z] = scan.contains(grid.slab_points_mm(z, z + 1)).reshape(grid.shape[1:])
    return inside


def _share(mask: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Share of true voxels in each cell of the level of `shape`, float32."""
    (z, y, x), step = shape, [whole // n for whole, n in zip(mask.shape, shape, strict=True)]
    return mask.reshape(z, step[0], y, step[1], x, step[2]).mean(axis=(1, 3, 5), dtype=np.float32)


def pca_volume(embedding: Embedding) -> sitk.Image:
    """The first three principal components of the body's descriptors as a colour picture on the fine grid.

    Each component runs from its 1st to its 99th percentile; outside the body is black. Signs are fixed by the largest
    loading, so the same embedding gives the same picture.

    Returns:
        Vector image of three uint8 components.
    """
    cells, matrix = embedding.search_matrix()
    picture = np.zeros((*embedding.body.shape, 3), dtype=np.uint8)
    if len(cells):
        sample = matrix[:: max(1, len(cells) // PCA_SAMPLE)].astype(np.float32)
        mean = sample.mean(axis=0)
        axes = np.linalg.eigh(np.cov(sample, rowvar=False) if len(sample) > 1 else np.eye(len(mean)))[1][:, :-4:-1]
        axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), range(3)])
        low, high = np.percentile((sample - mean) @ axes, (1, 99), axis=0)
        shades = np.empty((len(cells), 3), dtype=np.uint8)
        for start in range(0, len(cells), PCA_SAMPLE):
            part = (matrix[start : start + PCA_SAMPLE].astype(np.float32) - mean) @ axes
            shades[start : start + PCA_SAMPLE] = 255 * np.clip((part - low) / np.maximum(high - low, 1e-6), 0, 1)
        picture[tuple(cells.T)] = shades
    image = sitk.GetImageFromArray(picture, isVector=True)
    embedding.fine_geometry.apply_to_sitk(image)
    return image
