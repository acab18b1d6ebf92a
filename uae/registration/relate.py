"""Two passes of AdaReg: what the first finds lets the second see both scans upright and on the same grid.

The network is equivariant to shifts by a coarse cell (32 mm) and barely to turns, so two scans whose grids differ give
somewhat different features at the same anatomy. Once a rigid transform is known, the smaller scan is embedded again
on the continued grid of the larger one, carried over by that transform, and matched again.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from uae.embedding import Embedding, embed
from uae.errors import InputError, ResourceError
from uae.geometry import Geometry
from uae.preprocess import network_geometry
from uae.progress import Cancel, Progress
from uae.registration.adareg import N_POINTS, REFUSED, AdaRegResult, estimate
from uae.transform import Rigid
from uae.volume import Volume

if TYPE_CHECKING:
    from uae.models import Model

log = logging.getLogger(__name__)

GROWTH, GROWTH_IF_REFUSED = 3.0, 2.0
"""How much larger than a scan's own grid its turned one may be; 30 degrees on a long torso take 2.5 times the cells."""


@dataclass
class Relation:
    """Result of the last pass and the embeddings it rests on.

    Attributes:
        found: transform fixed -> moving with its verdict.
        fixed, moving: embeddings; after a second pass one of them lies on the other's continued grid.
        own: embeddings of the scans each on its own grid, fixed and moving.
        passes: 2, or 1 where the first found no candidate or the second could not be made (the log says why).
        seconds: wall time of "match", "embed_again" and "match_again".
    """

    found: AdaRegResult
    fixed: Embedding
    moving: Embedding
    own: tuple[Embedding, Embedding]
    passes: int = 1
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def seen(self) -> tuple[Embedding, Embedding]:
        """Embeddings for guided matching: the last pass's, or the scans' own where that was refused."""
        return self.own if self.found.verdict == REFUSED else (self.fixed, self.moving)


def carried(grid: Geometry, transform: Rigid) -> Geometry:
    """A grid with its axes and its origin moved by a rigid transform."""
    rotation = transform.matrix[:3, :3]
    return Geometry(grid.shape, grid.spacing, transform.apply(grid.origin[None])[0], rotation @ grid.direction)


def relate(
    fixed: Volume,
    moving: Volume,
    fixed_embedding: Embedding,
    moving_embedding: Embedding,
    model: Model,
    device: str = "auto",
    memory_mb: float = 2000.0,
    cache: bool = True,
    second_pass: bool = True,
    n_points: int = N_POINTS,
    affine: bool = False,
    seed: int = 0,
    fixed_mask: Volume | None = None,
    moving_mask: Volume | None = None,
    progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> Relation:
    """AdaReg, then once more with the smaller scan embedded on the larger one's grid.

    Args:
        fixed: the scan that stays, modality decided.
        moving: the other scan.
        fixed_embedding: of `fixed`, by `model`.
        moving_embedding: of `moving`, by `model`.
        model: the weights with their limits.
        device: of the second embedding, as in `embed`.
        memory_mb: the same.
        cache: the same.
        second_pass: False keeps the first pass's result.
        n_points: see `estimate`.
        affine: see `estimate`.
        seed: see `estimate`.
        fixed_mask: see `estimate`.
        moving_mask: see `estimate`.
        progress: told the stages "match" and "embedding".
        cancel: asked inside them.

    Raises:
        InputError: a scan (or its mask) holds no body at all.
        CancelledError: the user stopped.
    """
    options = {
        "limits": model.thresholds.get("registration"), "n_points": n_points, "affine": affine, "seed": seed,
        "fixed_mask": fixed_mask, "moving_mask": moving_mask, "progress": progress, "cancel": cancel,
    }  # fmt: skip
    start = time.perf_counter()
    first = estimate(fixed_embedding, moving_embedding, **options)
    own = (fixed_embedding, moving_embedding)
    relation = Relation(first, *own, own, 1, {"match": time.perf_counter() - start})
    if first.rigid is None or not second_pass:
        return relation
    if first.searched == "moving":
        scan, lattice = moving, carried(fixed_embedding.geometry, first.rigid)
    else:
        scan, lattice = fixed, carried(moving_embedding.geometry, first.rigid.inverse())
    try:
        _check_growth(scan, lattice, model, GROWTH_IF_REFUSED if first.verdict == REFUSED else GROWTH)
        start = time.perf_counter()
        again = embed(scan, model, device, memory_mb, cache, lattice, progress, cancel)
        middle = time.perf_counter()
        pair = (fixed_embedding, again) if first.searched == "moving" else (again, moving_embedding)
        found = estimate(*pair, first=first, **options)
    except (InputError, ResourceError) as error:
        level = logging.INFO if first.verdict == REFUSED else logging.WARNING
        log.log(level, "no second pass, the first one stands: %s", error)
        return relation
    seconds = {**relation.seconds, "embed_again": middle - start, "match_again": time.perf_counter() - middle}
    log.info("second pass: %s after %s", found.verdict, first.verdict)
    return Relation(found, *pair, own, 2, seconds)


def _check_growth(scan: Volume, lattice: Geometry, model: Model, most: float) -> None:
    """Raise InputError where the turned grid would be more than `most` times as large as the scan's own."""
    stride = model.config.coarse_stride
    own, turned = (network_geometry(scan.geometry, stride, grid) for grid in (None, lattice))
    if np.prod(turned.size) > most * np.prod(own.size):
        raise InputError("the turned scan's grid would be too large")
