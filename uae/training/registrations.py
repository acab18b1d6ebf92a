"""AdaReg over unregistered pairs with model k-1: pairs in parallel, every outcome in a table, refused ones left out."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import multiprocessing
import os
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from uae.errors import InputError, UAEError
from uae.files import atomic_path, sha256
from uae.preprocess import body_mask, network_geometry
from uae.progress import Cancel, Progress, check_cancel, report
from uae.training import distributed
from uae.training.data import check_training_file
from uae.training.subjects import Subject, as_tensor, check_finite, lattice_cells, network_units, unit_mr
from uae.transform import Transform
from uae.volume import Volume, resample_with_mask

logger = logging.getLogger(__name__)

COLUMNS = ("fixed", "moving", "fixed_modality", "moving_modality")
TABLE = "registrations.csv"
SIGNAL_LEVELS = 65535
FAILED = "failed"


@dataclass
class Row:
    """One pair and what became of it; `key` says with what it was made, `file` holds the registered pair."""

    fixed: str
    moving: str
    status: str = ""
    reason: str = ""
    seconds: float = 0.0
    overlap_percent: float = 0.0
    file: str = ""
    key: str = ""


def read_pairs(path: Path) -> list[tuple[Path, Path]]:
    """The pairs of a pairs.csv, each as (CT, MR): the CT stays fixed whichever column it stands in.

    Files are relative to the table. A column with the truth, if there is one, is not read.

    Raises:
        InputError: no such table, a column or a file is missing, or a pair is not one CT and one MR.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or [])]
            rows = list(reader)
    except OSError as error:
        raise InputError(f"crossmodal.pairs {path}: {error.strerror}; give a table with {','.join(COLUMNS)}") from error
    if missing or not rows:
        what = f"no column {missing[0]}" if missing else "no pair"
        raise InputError(f"{path}: {what} in the table; its first line must be {','.join(COLUMNS)}")
    pairs = []
    for number, row in enumerate(rows, start=2):
        modalities = [str(row[f"{role}_modality"]).strip().lower() for role in ("fixed", "moving")]
        if sorted(modalities) != ["ct", "mr"]:
            raise InputError(f"{path}, line {number}: a pair needs one ct and one mr, not {' and '.join(modalities)}")
        for role in ("fixed", "moving"):
            check_training_file(row[role])
        files = [path.parent / row[role].strip() for role in ("fixed", "moving")]
        absent = [str(file) for file in files if not file.exists()]
        if absent:
            raise InputError(f"{path}, line {number}: {absent[0]} is missing; paths are relative to the table")
        pairs.append((files[0], files[1]) if modalities[0] == "ct" else (files[1], files[0]))
    return pairs


def registered_arrays(
    ct: Volume, mr: Volume, transform: Transform, margin_voxels: float
) -> dict[str, np.ndarray]:
    """CT and MR on the CT's 2 mm grid, the MR resampled once through the whole transform.

    Args:
        ct: fixed scan.
        mr: moving scan.
        transform: CT mm -> MR mm.
        margin_voxels: dilation of the overlap, voxels of 2 mm, beyond which nothing counts as overlap.

    Returns:
        image int16 (HU + 1024), partner uint16 (0..65535), mask and partner_mask uint8 (0, 1, 2: see Subject),
        beyond uint8 (1: body outside the dilated overlap); all (z, y, x).

    Raises:
        InputError: the scans share no body under the transform.
    """
    grid = network_geometry(ct.geometry, (1, 1, 1))
    carried, inside = resample_with_mask(ct, grid, antialias=True)
    valid = inside.array > 0
    body = body_mask(carried) & valid
    warped, covered = resample_with_mask(mr, grid, transform, antialias=True)
    overlap = (covered.array > 0) & valid
    shared = overlap & body
    if not shared.any():
        raise InputError("the scans share no part of the patient under this transform; the pair is left out")
    apart = ndimage.distance_transform_edt(~overlap)
    return {
        "image": np.where(valid, network_units(carried, valid), 0).astype(np.int16),
        "partner": np.rint(unit_mr(warped.array, overlap) * SIGNAL_LEVELS).astype(np.uint16),
        "mask": valid.astype(np.uint8) + body,
        "partner_mask": overlap.astype(np.uint8) + shared,
        "beyond": (body & (apart > margin_voxels)).astype(np.uint8),
    }


def registered_subject(name: str, arrays: Mapping[str, np.ndarray], weight: float = 1.0) -> Subject:
    """The subject of one registered pair; views are centred where both scans show the patient."""
    return Subject(
        name,
        "ct",
        as_tensor(arrays["image"]),
        np.asarray(arrays["mask"]),
        partner=as_tensor(arrays["partner"].astype(np.float32) / SIGNAL_LEVELS),
        partner_mask=np.asarray(arrays["partner_mask"]),
        beyond_mask=np.asarray(arrays["beyond"]),
        beyond=lattice_cells(np.asarray(arrays["beyond"]) > 0),
        body_cells=lattice_cells(np.asarray(arrays["partner_mask"]) == 2),
        weight=weight,
    )


def load_registered(folder: Path, rows: Iterable[Row]) -> list[Subject]:
    """Subjects of all rows that have a registered pair.

    Raises:
        InputError: a file of the table is missing or damaged.
    """
    subjects = []
    for row in rows:
        if not row.file:
            continue
        try:
            with np.load(folder / row.file) as stored:
                subjects.append(registered_subject(Path(row.file).stem, {k: stored[k] for k in stored.files}))
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{folder / row.file}: damaged ({error}); delete {TABLE} and register again") from error
    return subjects


def read_table(path: Path) -> list[Row]:
    """Rows of an earlier run, none where there is no table."""
    if not path.is_file():
        return []
    kinds = {field.name: field.type for field in fields(Row)}
    with path.open(encoding="utf-8", newline="") as stream:
        rows = [{k: v for k, v in row.items() if k in kinds} for row in csv.DictReader(stream)]
    return [Row(**{k: float(v) if kinds[k] == "float" else v for k, v in row.items()}) for row in rows]


def write_table(path: Path, rows: Iterable[Row]) -> None:
    """Write the table whole or not at all."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def register_pairs(
    pairs: list[tuple[Path, Path]],
    settings: Mapping[str, Any],
    folder: Path,
    device: str = "cpu",
    progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> list[Row]:
    """Register all pairs with model k-1; what an earlier run has done with the same model and settings is kept.

    Args:
        pairs: (CT, MR) files.
        settings: the table [crossmodal].
        folder: takes `registrations.csv` and one .npz for each pair that may be trained on.
        device: of the embeddings; several processes at a time share a GPU.
        progress: told after each pair.
        cancel: asked after each pair.

    Returns:
        A row for each pair, in order. With several ranks each registers its share and all get all rows.

    Raises:
        InputError: the model or the settings cannot be used (a pair that fails is a row, not an error).
        CancelledError: the user stopped; finished pairs stay in the table.
    """
    from uae.models import load_model

    folder.mkdir(parents=True, exist_ok=True)
    model = load_model(settings["model"])
    limits = json.dumps(model.thresholds.get("registration"), sort_keys=True)
    tables = [folder / TABLE, *sorted(folder.glob(f".*.{TABLE}"))]
    earlier = {row.key: row for table in tables for row in read_table(table) if row.status != FAILED}
    jobs = []
    for ct, mr in pairs:
        work = {
            "ct": str(ct), "mr": str(mr), "model": settings["model"], "deformable": settings["deformable"],
            "preset": settings["preset"], "margin": margin_of(settings), "verdicts": list(settings["verdicts"]),
            "device": device,
        }  # fmt: skip
        parts = {k: v for k, v in work.items() if k not in ("device", "model")}
        parts |= {"sha": model.sha256, "limits": limits}
        parts |= {"files": [sha256(file) if file.is_file() else str(file) for file in (ct, mr)]}
        work["key"] = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
        # Named by what it holds: pairs may be added, left out or listed in another order between two runs.
        work["file"] = str(folder / f"pair-{work['key']}.npz")
        jobs.append(work)
    mine = distributed.strided_share(range(len(jobs)))
    done = {i: earlier[jobs[i]["key"]] for i in mine if jobs[i]["key"] in earlier}
    todo = [i for i in mine if i not in done]
    own_table = folder / (TABLE if distributed.world() == 1 else f".{distributed.rank()}.{TABLE}")
    for count, (index, row) in enumerate(_run([jobs[i] for i in todo], todo, int(settings["jobs"]))):
        done[index] = row
        write_table(own_table, [done[i] for i in sorted(done)])
        logger.info("%s - %s: %s (%s)", row.fixed, row.moving, row.status, row.reason)
        report(progress, "registering pairs", (count + 1) / len(todo))
        check_cancel(cancel)
    write_table(own_table, [done[i] for i in sorted(done)])
    return _merged(folder, jobs)


def _merged(folder: Path, jobs: list[dict[str, Any]]) -> list[Row]:
    """All ranks' rows in the order of the pairs, in one table."""
    distributed.barrier()
    if distributed.world() == 1:
        tables = [folder / TABLE]
    else:
        tables = [folder / f".{number}.{TABLE}" for number in range(distributed.world())]
    rows = {row.key: row for table in tables for row in read_table(table)}
    ordered = [rows[job["key"]] for job in jobs]
    distributed.barrier()
    if distributed.rank() == 0 and distributed.world() > 1:
        write_table(folder / TABLE, ordered)
    if distributed.rank() == 0:
        for table in folder.glob(f".*.{TABLE}"):
            table.unlink(missing_ok=True)
    distributed.barrier()
    return ordered


def margin_of(settings: Mapping[str, Any]) -> float:
    """Dilation margin of the round, voxels of 2 mm.

    Raises:
        InputError: no margin for the round.
    """
    margins, number = settings["margin_voxels"], int(settings["round"])
    if not 1 <= number <= len(margins):
        raise InputError(f"crossmodal.round = {number}: crossmodal.margin_voxels names {len(margins)} rounds")
    return float(margins[number - 1])


def _run(jobs: list[dict[str, Any]], numbers: list[int], workers: int) -> Iterable[tuple[int, Row]]:
    """Register jobs, `workers` at a time; yields (number, row) as they end."""
    if workers < 2 or len(jobs) < 2:
        for number, job in zip(numbers, jobs, strict=True):
            yield number, register_one(job)
        return
    context = multiprocessing.get_context("spawn")
    workers = min(workers, len(jobs))
    threads = max((os.cpu_count() or 1) // workers, 1)
    with ProcessPoolExecutor(workers, context, limit_threads, (threads,)) as pool:
        futures = {pool.submit(register_one, job): (number, job) for number, job in zip(numbers, jobs, strict=True)}
        try:
            for future in as_completed(futures):
                number, job = futures[future]
                error = future.exception()
                yield number, _failure(job, error, 0.0) if error else future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def limit_threads(threads: int) -> None:
    """Bound the threads of one of several worker processes."""
    import torch

    torch.set_num_threads(threads)


def _failure(job: Mapping[str, Any], error: BaseException, seconds: float) -> Row:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return Row(job["ct"], job["mr"], FAILED, reason, round(seconds, 1), key=job["key"])


def register_one(job: Mapping[str, Any]) -> Row:
    """Register one pair and store it where its verdict allows; every failure becomes a row."""
    from uae.models import load_model
    from uae.registration.pipeline import RegisterOptions, register

    start = time.perf_counter()
    try:
        ct, mr = Volume.read(job["ct"]), Volume.read(job["mr"])
        ct.modality, mr.modality = "ct", "mr"
        for name in ("ct", "mr"):
            check_finite(job[name], ct if name == "ct" else mr)
        options = RegisterOptions(
            deformable=job["deformable"], preset=job["preset"], margin_voxels=job["margin"], device=job["device"],
            cache=False, threads=1,
        )  # fmt: skip
        found = register(ct, mr, load_model(job["model"]), options)
        row = Row(job["ct"], job["mr"], found.status, " ".join(found.reason.split()), key=job["key"])
        if found.status in job["verdicts"] and found.status != "refused":
            arrays = registered_arrays(ct, mr, found.transform, job["margin"])
            percent = 100.0 * (arrays["partner_mask"] == 2).sum() / max((arrays["mask"] == 2).sum(), 1)
            row.overlap_percent = round(float(percent), 1)
            with atomic_path(job["file"]) as temporary, temporary.open("wb") as stream:
                np.savez_compressed(stream, **arrays)
            row.file = Path(job["file"]).name
    except (UAEError, RuntimeError, ValueError, OSError, MemoryError) as error:
        return _failure(job, error, time.perf_counter() - start)
    row.seconds = round(time.perf_counter() - start, 1)
    return row

