"""Our own system on one pair, in a process of its own like every peer: `python -m uae.bench.own_child JOB.npz OUT.npz`.

The job's options name the task: register, match, embed or deeds.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from uae.bench.peers.job import Job, Outcome, Scan, read_job, write_outcome
from uae.errors import InputError
from uae.json_values import plain
from uae.volume import Geometry, Volume

if TYPE_CHECKING:
    from uae.embedding import Embedding


def volume_of(scan: Scan, modality: str) -> Volume:
    """A job's scan as a volume with its known modality."""
    geometry = Geometry(scan.array.shape, scan.spacing, scan.origin, scan.direction)
    return Volume(scan.array, geometry, modality, "known from the benchmark")


def run(job: Job) -> Outcome:
    """Do the job's task; the outcome's matrix and field run fixed -> moving, its info holds the figures."""
    import torch

    torch.set_num_threads(job.threads)
    fixed, moving = (
        volume_of(scan, modality) for scan, modality in zip((job.reference, job.other), job.options["modalities"])
    )
    outcome = TASKS[job.options["task"]](fixed, moving, job)
    if torch.cuda.is_initialized():
        outcome.info["gpu_peak_mb"] = torch.cuda.max_memory_allocated() / 1e6
    return outcome


def _register(fixed: Volume, moving: Volume, job: Job) -> Outcome:
    from uae.models import load_model
    from uae.registration.pipeline import RegisterOptions, register

    names = {item.name for item in dataclasses.fields(RegisterOptions)}
    given = {key: value for key, value in job.options.items() if key in names}
    options = RegisterOptions(threads=job.threads, **given)
    model = load_model(job.options["model"])
    begin = time.perf_counter()
    result = register(fixed, moving, model, options)
    seconds = time.perf_counter() - begin
    found = result.adareg
    info = {
        "seconds": seconds, "stages": result.report["seconds"], "status": result.status, "reason": result.reason,
        "unrefined": None if found is None or found.transform is None else found.transform.matrix,
        "features": {} if found is None else found.features, "deformable": result.report.get("deformable"),
    }  # fmt: skip
    if result.linear is None:
        return Outcome(np.full((4, 4), np.nan), info=plain(info))
    if result.field is None:
        return Outcome(result.linear.matrix, info=plain(info))
    return Outcome(result.linear.matrix, result.field.vectors, Scan.on(result.field.geometry), plain(info))


def _deeds(fixed: Volume, moving: Volume, job: Job) -> Outcome:
    from uae import deeds
    from uae.deeds.warm import warm_up

    warm_up()
    begin = time.perf_counter()
    result = deeds.register(fixed, moving, preset=job.options.get("preset", "default"), threads=job.threads)
    info = {"seconds": time.perf_counter() - begin, "consistency_mm": result.consistency_mm, "status": "done"}
    return Outcome(np.eye(4), result.field.vectors, Scan.on(result.field.geometry), plain(info))


def _embed(fixed: Volume, moving: Volume, job: Job) -> Outcome:
    from uae.embedding import embed
    from uae.models import load_model

    model = load_model(job.options["model"])
    begin = time.perf_counter()
    found = embed(fixed, model, job.options.get("device", "auto"), cache=False)
    voxels = int(np.prod(found.geometry.shape))
    return Outcome(np.eye(4), info={"seconds": time.perf_counter() - begin, "network_voxels": voxels, "status": "done"})


def _match(fixed: Volume, moving: Volume, job: Job) -> Outcome:
    """Match points of the fixed scan in the moving one by every way asked for."""
    from uae.embedding import embed
    from uae.matching import match_points
    from uae.models import load_model

    model, options = load_model(job.options["model"]), job.options
    device, cache = options.get("device", "auto"), options.get("cache", False)
    begin = time.perf_counter()
    template, query = (embed(scan, model, device, cache=cache) for scan in (fixed, moving))
    embedded = time.perf_counter() - begin
    points = np.array(options["points"], dtype=np.float64)
    found: dict[str, Any] = {}
    pairs = {template.heads: (template, query)}
    for name, method, side, heads in options["ways"]:
        wanted = template.heads if heads is None else tuple(heads)
        if wanted not in pairs:
            pairs[wanted] = with_heads(template, wanted), with_heads(query, wanted)
        # Limits are calibrated for all heads together.
        limits = model.thresholds.get("match") if wanted == template.heads else None
        start = time.perf_counter()
        matches = match_points(*pairs[wanted], points, method=method, side=side, limits=limits)
        found[name] = {
            "seconds": time.perf_counter() - start,
            "matches": [
                {key: getattr(m, key) for key in ("point_mm", "score", "margin", "confident")} for m in matches
            ],
        }  # fmt: skip
    seconds = time.perf_counter() - begin
    return Outcome(np.eye(4), info=plain({"seconds": seconds, "embed_seconds": embedded, "ways": found}))


def with_heads(embedding: Embedding, heads: Sequence[str]) -> Embedding:
    """An embedding whose descriptors hold some of its heads alone: fine with coarse, or semantic.

    Raises:
        InputError: it lacks a head, or the choice is another one.
    """
    if missing := sorted(set(heads) - set(embedding.heads)):
        raise InputError(f"the model has no trained head {missing[0]!r}; choose a model that has")
    if set(heads) == {"fine", "coarse"}:
        return dataclasses.replace(embedding, semantic=None, _search=None)
    if set(heads) == {"semantic"}:
        # A coarse head that is the same everywhere changes no order of similarities.
        same = np.ones((1, *embedding.coarse.shape[1:]), embedding.coarse.dtype)
        return dataclasses.replace(embedding, fine=embedding.semantic, coarse=same, semantic=None, _search=None)
    raise InputError(f"heads {', '.join(heads)}; give fine and coarse, or semantic")


TASKS = {"register": _register, "deeds": _deeds, "embed": _embed, "match": _match}


if __name__ == "__main__":
    write_outcome(Path(sys.argv[2]), run(read_job(sys.argv[1])))
