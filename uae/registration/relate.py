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

from uae.embedding import Embedding, embed
from uae.geometry import Geometry
from uae.progress import Cancel, Progress
from uae.registration.adareg import N_POINTS, AdaRegResult, estimate
from uae.transform import Rigid
from uae.volume import Volume

if TYPE_CHECKING:
    from uae.models import Model

log = logging.getLogger(__name__)


@dataclass
class Relation:
    """Result of the last pass and the embeddings it rests on.

    Attributes:
        found: transform fixed -> moving with its verdict.
        fixed, moving: embeddings; after a second pass one of them lies on the other's continued grid. Guided matching
            is best done with these, free matching with the scans' own.
        passes: 1 where the first found no candidate, else 2.
        seconds: wall time of "match", "embed_again" and "match_again".
    """

    found: AdaRegResult
    fixed: Embedding
    moving: Embedding
    passes: int = 1
    seconds: dict[str, float] = field(default_factory=dict)


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
        ResourceError: out of memory.
        CancelledError: the user stopped.
    """
    options = {
        "limits": model.thresholds.get("registration"), "n_points": n_points, "affine": affine, "seed": seed,
        "fixed_mask": fixed_mask, "moving_mask": moving_mask, "progress": progress, "cancel": cancel,
    }  # fmt: skip
    start = time.perf_counter()
    first = estimate(fixed_embedding, moving_embedding, **options)
    relation = Relation(first, fixed_embedding, moving_embedding, 1, {"match": time.perf_counter() - start})
    if first.rigid is None or not second_pass:
        return relation
    start = time.perf_counter()
    if first.searched == "moving":
        lattice = carried(fixed_embedding.geometry, first.rigid)
        relation.moving = embed(moving, model, device, memory_mb, cache, lattice, progress, cancel)
    else:
        lattice = carried(moving_embedding.geometry, first.rigid.inverse())
        relation.fixed = embed(fixed, model, device, memory_mb, cache, lattice, progress, cancel)
    relation.seconds["embed_again"] = time.perf_counter() - start
    start = time.perf_counter()
    relation.found = estimate(relation.fixed, relation.moving, first=first, **options)
    relation.passes = 2
    relation.seconds["match_again"] = time.perf_counter() - start
    log.info("second pass: %s after %s", relation.found.verdict, first.verdict)
    return relation
