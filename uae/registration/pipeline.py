"""Two scans in, one transform with a verdict out: embed, AdaReg, refine, and where asked for deform."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import TYPE_CHECKING, Any

import numpy as np

from uae.errors import InputError
from uae.progress import Cancel, Progress
from uae.registration.adareg import ACCEPTED, N_POINTS, REFUSED, REVIEW, AdaRegResult
from uae.registration.deformable import deform_overlap
from uae.registration.masks import body_volume, both, inside
from uae.registration.output import write_result
from uae.registration.refine import RefineResult, overlap_points, refine_rigid
from uae.registration.relate import relate
from uae.registration.summary import build_report
from uae.transform import Affine, Composite, DisplacementField, Rigid, Transform
from uae.volume import Volume

if TYPE_CHECKING:
    from uae.embedding import Embedding
    from uae.models import Model

__all__ = ["RegisterOptions", "RegistrationResult", "deform", "register", "write_result"]

log = logging.getLogger(__name__)


@dataclass
class RegisterOptions:
    """Choices of `register`.

    affine: affine instead of rigid. deformable: add DEEDS. refine: mutual information inside the overlap.
    margin_voxels: 2 mm voxels around the overlap in the deformable step (10: the paper's first round).
    preset: of the deformable solver. affine_start: first improve the linear part by its affine step.
    fixed_mask, moving_mask: images > 0 where the scans count.
    device: of embedding and solver. memory_mb, cache: of the embedding.
    threads: of the deformable solver (1 halves its memory).
    n_points, seed: of the matching.
    """

    affine: bool = False
    deformable: bool = False
    refine: bool = True
    margin_voxels: float = 10
    preset: str = "after-rigid"
    affine_start: bool = False
    fixed_mask: Volume | None = None
    moving_mask: Volume | None = None
    device: str = "auto"
    memory_mb: float = 2000.0
    cache: bool = True
    threads: int = 2
    n_points: int = N_POINTS
    seed: int = 0


@dataclass
class RegistrationResult:
    """What a registration found; transforms run fixed -> moving in mm, LPS.

    status: accepted, review or refused; reason: why.
    linear: R, also of a refused registration where there is a candidate (for measurements; it is never written), else
        None.
    field: tapered u of x_moving = R(x + u(x)), None where there is no deformable part.
    affine: write the linear part as affine.tfm.
    report: what report.json holds.
    """

    status: str
    reason: str
    fixed: Volume
    moving: Volume
    linear: Affine | None = None
    field: DisplacementField | None = None
    affine: bool = False
    adareg: AdaRegResult | None = None
    refinement: RefineResult | None = None
    report: dict[str, Any] = dataclass_field(default_factory=dict)

    @property
    def transform(self) -> Transform | None:
        """The whole map fixed -> moving, None where there is not even a candidate."""
        if self.linear is None or self.field is None:
            return self.linear
        return Composite([self.field, self.linear])

    def review(self, reason: str) -> None:
        """Take an acceptance back to review and say why."""
        if self.status == ACCEPTED:
            self.status, self.reason = REVIEW, f"look at the overlay before use: {reason}"
        else:
            self.reason = f"{self.reason}; {reason}"


class _Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start

    def total(self) -> dict[str, float]:
        return {**self.seconds, "total": time.perf_counter() - self._start}


def register(
    fixed: Volume,
    moving: Volume,
    model: Model,
    options: RegisterOptions | None = None,
    progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> RegistrationResult:
    """Register a moving scan to a fixed one by anatomical embeddings.

    Args:
        fixed: the scan that stays, modality decided; any grid.
        moving: the scan to be brought to it; any overlap, no common frame needed.
        model: trained weights; `thresholds["registration"]` holds the calibrated limits of the verdict.
        options: see RegisterOptions.
        progress: told the stages "embedding", "match", "refine" and the solver's own.
        cancel: asked inside all of them.

    Returns:
        The result with its report. A refusal is a result and raises nothing here.

    Raises:
        InputError, ModalityError: a scan or mask cannot be used.
        ResourceError: out of memory.
        CancelledError: the user stopped.
    """
    from uae.device import describe_device, resolve_device
    from uae.embedding import embed

    options = options or RegisterOptions()
    _check_mask("fixed", options.fixed_mask, fixed)
    _check_mask("moving", options.moving_mask, moving)
    if options.deformable:
        from uae.deeds.warm import warm_up_in_background

        warm_up_in_background()  # nobody waits for the compiler while the scans are embedded
    clock = _Clock()
    embeddings = []
    for name, volume in (("fixed", fixed), ("moving", moving)):
        with clock.stage(f"embed_{name}"):
            embeddings.append(
                embed(
                    volume,
                    model,
                    options.device,
                    options.memory_mb,
                    cache=options.cache,
                    progress=progress,
                    cancel=cancel,
                )
            )
    relation = relate(
        fixed,
        moving,
        *embeddings,
        model,
        device=options.device,
        memory_mb=options.memory_mb,
        cache=options.cache,
        n_points=options.n_points,
        affine=options.affine,
        seed=options.seed,
        fixed_mask=options.fixed_mask,
        moving_mask=options.moving_mask,
        progress=progress,
        cancel=cancel,
    )
    clock.seconds |= relation.seconds
    found = relation.found
    result = RegistrationResult(
        found.verdict, found.reason, fixed, moving, found.transform, affine=options.affine, adareg=found
    )
    bodies = [
        both(body_volume(e), m) for e, m in zip(embeddings, (options.fixed_mask, options.moving_mask), strict=True)
    ]
    deformable = None
    if result.status != REFUSED and options.refine:
        with clock.stage("refine"):
            refined = refine_rigid(
                fixed, moving, result.linear, *bodies, seed=options.seed, progress=progress, cancel=cancel
            )
        result.refinement, result.linear = refined, refined.transform
        if refined.failed:
            result.review(refined.reason)
    if result.status != REFUSED and options.deformable:
        with clock.stage("deform"):
            deformable = deform_overlap(result, options, bodies[0], progress, cancel)
    reported = None if result.status == REFUSED else result.linear
    center, percent = _overlap(embeddings, reported, options)
    device = describe_device(resolve_device(options.device))
    result.report = build_report(
        result.status, result.reason, reported, center, percent, found, result.refinement, deformable,
        model, device, clock.total(), fixed, moving,
    )  # fmt: skip
    return result


def deform(
    fixed: Volume,
    moving: Volume,
    initial: Affine | None = None,
    preset: str = "default",
    fixed_mask: Volume | None = None,
    moving_mask: Volume | None = None,
    margin_voxels: float = 10,
    threads: int = 2,
    affine: bool = False,
    device: str = "cpu",
    progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> RegistrationResult:
    """The deformable step alone, from a given linear transform.

    Args:
        fixed: the scan that stays.
        moving: the scan to be deformed onto it.
        initial: fixed -> moving; identity where None.
        preset: of the solver.
        fixed_mask: image > 0 where the fixed scan counts.
        moving_mask: the same for the moving scan.
        margin_voxels: 2 mm voxels around the overlap.
        threads: of the solver.
        affine: improve `initial` by an affine step first, kept where the descriptors agree better.
        device: of the solver, as `uae.device.resolve_device` takes it.
        progress: told the solver's stages.
        cancel: asked inside them.

    Returns:
        A result with status "review", since nothing but the images themselves vouches for it.

    Raises:
        InputError: `initial` is not linear, or the scans do not overlap under it.
        ResourceError, CancelledError: as in `register`.
    """
    initial = Rigid.identity() if initial is None else initial
    if not initial.is_linear:
        raise InputError("the initial transform must be linear (rigid or affine); give the .tfm file of a registration")
    linear = initial.as_linear()
    _check_mask("fixed", fixed_mask, fixed)
    _check_mask("moving", moving_mask, moving)
    options = RegisterOptions(
        margin_voxels=margin_voxels, preset=preset, fixed_mask=fixed_mask, moving_mask=moving_mask, threads=threads,
        affine_start=affine, device=device,
    )  # fmt: skip
    reason = "deformed from the given transform; no matches were asked whether it is right"
    result = RegistrationResult(REVIEW, reason, fixed, moving, linear, affine=not isinstance(linear, Rigid))
    clock = _Clock()
    with clock.stage("deform"):
        figures = deform_overlap(result, options, None, progress, cancel)
    linear = result.linear
    points = overlap_points(fixed.geometry, moving.geometry, linear)
    # Without an embedding there is no body: the share is that of the smaller scan's box.
    smaller = min(g.voxel_volume_mm3 * np.prod(g.size) for g in (fixed.geometry, moving.geometry))
    percent = float(min(100.0 * len(points) * 4.0**3 / smaller, 100.0))
    result.report = build_report(
        result.status, result.reason, linear, points.mean(axis=0), percent, None, None, figures, None, "cpu",
        clock.total(), fixed, moving,
    )  # fmt: skip
    return result


def _check_mask(name: str, mask: Volume | None, volume: Volume) -> None:
    """A mask must hold something inside its scan."""
    if mask is None:
        return
    cells = np.argwhere(mask.array > 0)[:, ::-1]
    cells = cells[:: max(1, len(cells) // 100_000)]  # a sample is enough to see whether anything lies inside
    if not len(cells) or not volume.geometry.contains(mask.geometry.index_to_mm(cells)).any():
        raise InputError(f"the {name} mask is empty or lies outside the {name} image; check that it belongs to it")


def _overlap(
    embeddings: list[Embedding], linear: Affine | None, options: RegisterOptions
) -> tuple[np.ndarray | None, float | None]:
    """Centre (3,) mm of the overlap in fixed space, and the percentage of the smaller body inside the other scan."""
    if linear is None:
        return None, None
    from uae.registration.adareg import body_points

    fixed, moving = embeddings
    of_fixed = body_points(fixed, options.fixed_mask)
    of_moving = body_points(moving, options.moving_mask)
    if len(of_moving) <= len(of_fixed):
        points = linear.inverse().apply(of_moving)
        hit = _valid(fixed, points)
    else:
        points = of_fixed
        hit = _valid(moving, linear.apply(points))
    center = points[hit].mean(axis=0) if hit.any() else points.mean(axis=0)
    return center, 100.0 * float(hit.mean())


def _valid(embedding: Embedding, points: np.ndarray) -> np.ndarray:
    """Bool (N,): points (N, 3) mm in a fine cell inside the scan."""
    return inside(Volume(embedding.valid.astype(np.uint8), embedding.fine_geometry), points)
