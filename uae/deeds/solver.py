"""Symmetric coarse-to-fine DEEDS between two volumes anywhere in patient space (Heinrich et al., TMI 2013)."""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from uae.deeds import fields
from uae.deeds.affine import affine_step
from uae.deeds.backend import Memory, Work, processor_backend
from uae.deeds.cost import BLOCK_MB, ControlGrid, block_samples, cost_scale, data_cost
from uae.deeds.inputs import Image, check_overlap, out_of_memory, prepare, usable_levels, working_grid
from uae.deeds.mind import mind_ssc
from uae.deeds.polish import Bending, polish
from uae.deeds.presets import Level, Preset, find_preset
from uae.deeds.result import CancelWork, DeedsResult, finish
from uae.deeds.tree import build_tree, propagate
from uae.deeds.warm import usable_backend
from uae.progress import Cancel, Progress, check_cancel, report
from uae.transform import Affine
from uae.volume import Geometry, Volume

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.1
_SMALL_BLOCK_MB = 20.0
"""Search window of the second attempt: a few control planes."""


@dataclass
class _Direction:
    """One of the two searches: `base` stays, `other` is warped and searched; `memory` serves every level."""

    base: Image
    other: Image
    words: dict[int, np.ndarray] = field(default_factory=dict)
    displacement: np.ndarray | None = None
    memory: Memory = field(default_factory=Memory)

    def descriptors(self, q: int, solver: _Solver) -> np.ndarray:
        """Words of the base image; only those of the last q are kept."""
        if q not in self.words:
            self.words.clear()  # the old ones are not needed while the new ones are made
            self.words = {
                q: mind_ssc(
                    self.base.values, q, valid=solver.validity(self.base), backend=solver.backend, work=solver.work
                )
            }
        return self.words[q]


class _Solver:
    """Levels of one registration on the working grid; displacements in voxels, components z, y, x."""

    def __init__(
        self,
        fixed: Image,
        moving: Image,
        levels: tuple[Level, ...],
        preset: Preset,
        backend: str,
        threads: int,
        block_mb: float,
        progress: Progress | None,
        cancel: Cancel | None,
    ) -> None:
        self.directions = (_Direction(fixed, moving), _Direction(moving, fixed))
        self.levels = levels
        self.preset = preset
        self.backend = backend
        self.cpu = processor_backend(backend)
        self.block_mb = block_mb
        self.threads = threads
        self.progress = progress
        self.cancel = cancel
        self.work = Work()
        self.shape = fixed.values.shape
        self.reports: list[dict] = []

    def validity(self, image: Image) -> np.ndarray | None:
        """Where descriptors count; with replicated borders, as in the original, they count everywhere."""
        return image.valid if self.preset.border == "neutral" else None

    def run(self) -> tuple[np.ndarray, np.ndarray]:
        """Solve all levels; dense forward and backward displacement (3, Z, Y, X) float32 in voxels."""
        previous: ControlGrid | None = None
        if self.threads == 1:
            self.directions[1].memory = self.directions[0].memory
        for number, level in enumerate(self.levels):
            started = time.perf_counter()
            grid = ControlGrid.over(self.shape, level.step, self.preset.alignment)
            for direction in self.directions:
                if previous is None:
                    direction.displacement = np.zeros((3, *grid.counts))
                else:
                    direction.displacement = fields.transfer(direction.displacement, previous, grid, self.cpu)
            stage = f"deeds level {number + 1}/{len(self.levels)}"
            tasks = [partial(self._search, direction, grid, level, number > 0) for direction in self.directions]
            found = self._both(tasks, stage, 2 * self._units(grid, level))
            merged = fields.merge(found[0][0], found[1][0], grid.step, backend=self.cpu)
            for direction, displacement in zip(self.directions, merged):
                direction.displacement = displacement
            folded = [float(np.mean(fields.jacobian_determinant(one, grid.step, self.cpu) <= 0)) for one in merged]
            self.reports.append(
                {
                    "step": level.step,
                    "radius": level.radius,
                    "quantisation": level.quantisation,
                    "control_points": grid.nodes,
                    "energy": [one[1] for one in found],
                    "hamming": [one[2] for one in found],
                    "folding": folded,
                    "seconds": time.perf_counter() - started,
                }
            )
            logger.info(
                "%s: %d control points, Hamming distance before it %.2f and %.2f",
                stage,
                grid.nodes,
                found[0][2],
                found[1][2],
            )
            report(self.progress, stage, 1.0)
            previous = grid
        for number in range(self.preset.polish):
            self._polish(previous, f"deeds polish {number + 1}/{self.preset.polish}")
        for direction in self.directions:
            direction.words, direction.memory = {}, Memory()
        dense = [fields.transfer(one.displacement, previous, None, self.cpu) for one in self.directions]
        return dense[0], dense[1]

    def _polish(self, grid: ControlGrid, stage: str) -> None:
        """One sub-voxel round of both directions on the last control grid."""
        level = Level(grid.step, 1, 1)

        def task(direction: _Direction) -> tuple[np.ndarray]:
            cost = self._cost(direction, grid, level, True)
            bending = Bending(grid.counts, self.cpu)
            return (polish(cost, direction.displacement, bending, self.preset.bending, self.work),)

        tasks = [partial(task, direction) for direction in self.directions]
        found = self._both(tasks, stage, 2 * self._units(grid, level))
        merged = fields.merge(found[0][0], found[1][0], grid.step, cubic=True, backend=self.cpu)
        for direction, displacement in zip(self.directions, merged):
            direction.displacement = displacement
        report(self.progress, stage, 1.0)

    def _units(self, grid: ControlGrid, level: Level) -> float:
        """Work of one direction of a level as the kernels count it."""
        comparisons = grid.nodes * level.labels * len(block_samples(level.step, self.preset.sampling))
        return comparisons + grid.nodes * 3.0 * level.side**4

    def _cost(self, direction: _Direction, grid: ControlGrid, level: Level, warped: bool) -> np.ndarray:
        """Data cost (nodes, labels) of one direction around its present displacement."""
        self.work.check()
        other, valid, memory = direction.other.values, self.validity(direction.other), direction.memory
        if warped:
            other, valid = fields.warp(other, valid, direction.displacement, grid, self.work, self.cpu, memory)
        words = mind_ssc(other, level.mind_step, valid=valid, backend=self.backend, memory=memory, work=self.work)
        base = direction.descriptors(level.mind_step, self)
        return data_cost(
            base, words, grid, level, self.preset, backend=self.backend, block_mb=self.block_mb, memory=memory,
            work=self.work,
        )  # fmt: skip

    def _search(
        self, direction: _Direction, grid: ControlGrid, level: Level, warped: bool
    ) -> tuple[np.ndarray, float, float]:
        """One direction of one level: (control point displacement, energy, Hamming distance before), as a thread."""
        cost = self._cost(direction, grid, level, warped)
        before = float(cost[:, level.labels // 2].mean()) / cost_scale(level, self.preset)
        tree = build_tree(direction.base.values, grid, self.cpu)
        inherited = direction.displacement.reshape(3, -1).T
        labels, energy = propagate(
            cost, tree, inherited / level.quantisation, level.side, backend=self.backend, work=self.work
        )
        steps = np.stack(np.unravel_index(labels, (level.side,) * 3)) - level.radius
        found = direction.displacement + (steps * level.quantisation).reshape(3, *grid.counts)
        return found, energy / grid.nodes, before

    def _both(self, tasks: list[partial], stage: str, total: float) -> list[tuple]:
        """Run the two directions in threads; this thread reports progress and listens for the wish to stop."""
        start = self.work.units
        with ThreadPoolExecutor(self.threads, thread_name_prefix="deeds") as pool:
            futures: list[Future] = [pool.submit(task) for task in tasks]
            try:
                waiting = set(futures)
                while waiting:
                    check_cancel(self.cancel)
                    report(self.progress, stage, min(0.99, (self.work.units - start) / total))
                    done, waiting = wait(waiting, timeout=_POLL_SECONDS)
                    for future in done:
                        future.result()
            except BaseException:
                # Whatever happened, the other thread must not go on behind the caller's back.
                self.work.stop()
                raise
        return [future.result() for future in futures]


def register(
    fixed: Volume,
    moving: Volume,
    initial: Affine | None = None,
    *,
    fixed_mask: Volume | None = None,
    moving_mask: Volume | None = None,
    preset: str | Preset = "default",
    spacing: float = 2.0,
    region: Geometry | None = None,
    backend: str = "auto",
    threads: int = 2,
    block_mb: float = BLOCK_MB,
    affine: bool = False,
    progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> DeedsResult:
    """Find the residual displacement u with x_moving = A(x + u(x)).

    The moving volume is carried through A onto the working grid once, and u is solved between the fixed and the carried
    image. Forward and backward fields then are inverses of each other whatever A is, which the original's A x + u_d(x)
    gives only for A near identity; u_d = A3 u, with A3 the 3x3 part of A.

    Args:
        fixed: any spacing and direction.
        moving: any spacing and direction, any modality: MIND-SSC needs no common contrast.
        initial: A, fixed -> moving in LPS mm; identity where None.
        fixed_mask: voxels > 0 of the fixed image that count, on any grid in fixed space.
        moving_mask: voxels > 0 of the moving image that count, on any grid in moving space.
        preset: a name of PRESETS, or a Preset of one's own.
        spacing: of the isotropic working grid, mm (2 mm: CrossSAM).
        region: box of the fixed space to register; the fixed volume's where None.
        backend: 'auto', 'numba', 'numpy' or 'torch:DEVICE' (descriptors, costs and messages on that device).
        threads: 2 runs both directions at once, 1 one after the other (half the peak memory). Where memory does not
            suffice for 2, 1 is tried.
        block_mb: bound on the search window that a direction copies at once.
        affine: improve A by an affine step first, kept where it lowers the mean Hamming distance of the descriptors.
        progress: told about each level.
        cancel: asked about ten times a second.

    Returns:
        DeedsResult.

    Raises:
        InputError: images, masks, spacing, preset or region cannot be used, or do not overlap.
        ResourceError: not enough memory.
        CancelledError: the user stopped it.
    """
    preset = find_preset(preset)
    backend = usable_backend(backend)
    clock = {"start": time.perf_counter()}
    report(progress, "deeds preparation", 0.0)
    grid = working_grid(region or fixed.geometry, spacing)
    levels = usable_levels(preset.levels, grid.shape)
    try:
        images = []
        for name, volume, mask, transform in (
            ("fixed", fixed, fixed_mask, None),
            ("moving", moving, moving_mask, initial),
        ):
            check_cancel(cancel)
            images.append(prepare(name, volume, mask, grid, transform))
        check_overlap(*images)
        linear = initial or Affine.identity()
        if affine:
            report(progress, "deeds affine", 0.0)
            step = affine_step(*images, grid, backend, processor_backend(backend), CancelWork(cancel))[0]
            if step is not None:
                linear = Affine(linear.matrix @ step.matrix)
                images[1] = prepare("moving", moving, moving_mask, grid, linear)
            report(progress, "deeds affine", 1.0)
        clock["prepare"] = time.perf_counter()
        solver, dense = _solve(images, levels, preset, backend, threads, block_mb, progress, cancel)
        clock["levels"] = time.perf_counter()
        report(progress, "deeds result", 0.0)
        result = finish(grid, images, *dense, processor_backend(backend), cancel)
    except MemoryError as error:
        raise out_of_memory(grid.shape) from error
    clock["finish"] = time.perf_counter()
    times = list(clock.values())
    seconds = {name: after - before for name, before, after in zip(list(clock)[1:], times, times[1:])}
    seconds["total"] = times[-1] - times[0]
    report(progress, "deeds result", 1.0)
    return DeedsResult(
        **result, linear=linear, levels=solver.reports, seconds=seconds, preset=preset.name, backend=solver.backend
    )


def _solve(
    images: list[Image], levels: tuple[Level, ...], preset: Preset, backend: str, threads: int, block_mb: float,
    progress: Progress | None, cancel: Cancel | None,
) -> tuple[_Solver, tuple[np.ndarray, np.ndarray]]:  # fmt: skip
    """Solve; where memory does not suffice, one direction after the other, and then off the device."""
    threads = max(1, min(int(threads), 2))
    attempts = [(backend, threads, block_mb), (backend, 1, min(block_mb, _SMALL_BLOCK_MB))]
    if processor_backend(backend) != backend:
        attempts.append((processor_backend(backend), 1, min(block_mb, _SMALL_BLOCK_MB)))
    for number, attempt in enumerate(attempts):
        solver = _Solver(*images, levels, preset, *attempt, progress, cancel)
        try:
            return solver, solver.run()
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            if number + 1 == len(attempts):
                raise MemoryError from error
            following = attempts[number + 1]
            logger.warning(
                "not enough memory for DEEDS with %s and %d threads: trying %s with %d thread, which takes longer",
                *attempt[:2], *following[:2],
            )  # fmt: skip
    raise AssertionError("an attempt either returns or raises")


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is exhausted; torch's own kinds are known by name, since it may be absent."""
    words = f"{type(error).__name__} {error}".lower()
    return isinstance(error, MemoryError) or "outofmemory" in words or "out of memory" in words
