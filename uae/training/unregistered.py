"""Unregistered CT/MR pairs to train on where no real ones are at hand: phantoms, and simulated MR of training CTs.

The truth is written beside the pairs for measurements; neither AdaReg nor the training reads it. The contrasts are
those of the training augmentation: the tables of the validation simulator are not used.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.spatial.transform import Rotation

from uae.errors import InputError
from uae.files import atomic_path
from uae.geometry import Geometry
from uae.phantom import make_phantom
from uae.phantom.correspond import Smooth, Waves
from uae.preprocess import AIR_HU, body_mask
from uae.progress import Cancel, Progress, check_cancel, report
from uae.training.augment import apply_contrasts, draw_contrast
from uae.training.config import shipped
from uae.training.data import check_training_file
from uae.training.registrations import COLUMNS
from uae.transform import Composite, Rigid
from uae.volume import Volume

logger = logging.getLogger(__name__)

TRUTH = "truth.json"
LARGEST_TURN_DEG, LARGEST_SHIFT_MM = 15.0, 100.0
"""How far the header of a made MR is turned and moved (our choice: patients and couches differ by less)."""
SIDES = (0.45, 0.8)
"""Sides of a simulated MR's box relative to the CT body's."""
LEAST_SIDE_MM = 120.0
SPACING_MM, SLICE_MM = (1.4, 2.0), (3.0, 5.0)
PARTS = ("abdomen", "chest")


def make_pairs(
    config: dict[str, Any], root: Path, table: Path, progress: Progress | None = None, cancel: Cancel | None = None
) -> None:
    """Write the pairs that `[crossmodal]` asks for, and their pairs.csv; pairs that are there are kept.

    Args:
        config: `crossmodal.phantom_pairs`, `crossmodal.simulated_pairs`, `data.volumes`, `optimiser.seed`.
        root: folder of the training volumes.
        table: the pairs.csv to be written; images and truth.json go to its folder.
        progress: told after each pair.
        cancel: asked before each pair.

    Raises:
        InputError: a phantom seed or a scan is not for training.
    """
    settings, folder = config["crossmodal"], table.parent
    folder.mkdir(parents=True, exist_ok=True)
    first, last = settings["phantom_pairs"]
    cts = [entry["file"] for entry in config["data"]["volumes"] if entry["modality"] == "ct"]
    work = [("phantom", seed, 0) for seed in range(first, last)]
    work += [("simulated", file, k) for file in cts for k in range(int(settings["simulated_pairs"]))]
    rows = []
    seed = int(config["optimiser"]["seed"])
    for count, (kind, source, number) in enumerate(work):
        check_cancel(cancel)
        name = f"phantom-{source}" if kind == "phantom" else f"{_short_name(str(source))}-{number}"
        ct_file, mr_file = folder / f"{name}-ct.nii.gz", folder / f"{name}-mr.nii.gz"
        truth = folder / f"{name}-{TRUTH}"
        rng = np.random.default_rng([seed, *name.encode()])
        if kind == "simulated":
            check_training_file(str(source))
            ct_file = root / str(source)
        if not truth.is_file():
            if kind == "phantom":
                matrix = _phantom_pair(int(source), rng, ct_file, mr_file)
            else:
                matrix = _simulated_pair(ct_file, rng, mr_file)
            with atomic_path(truth) as temporary:
                temporary.write_text(json.dumps({"fixed_to_moving_rigid": matrix.tolist()}))
        rows.append((ct_file.resolve(), mr_file.resolve(), "ct", "mr"))
        report(progress, "making pairs", (count + 1) / len(work))
    with atomic_path(table) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(COLUMNS)
        writer.writerows(rows)
    logger.info("%d pairs in %s", len(rows), table)


def _short_name(file: str) -> str:
    """A name for what is made of a scan, different for every path: CTs may share a folder or be called alike."""
    path = Path(file)
    label = path.parent.name or path.name.split(".")[0]
    return f"{label}-{hashlib.sha256(path.as_posix().encode()).hexdigest()[:8]}"


def _random_move(rng: np.random.Generator, center: np.ndarray) -> Rigid:
    """A rigid motion about `center` (3,) mm."""
    turn = Rotation.from_rotvec(np.radians(rng.uniform(-1, 1, 3) * LARGEST_TURN_DEG / np.sqrt(3))).as_matrix()
    shift = rng.uniform(-1, 1, 3) * LARGEST_SHIFT_MM / np.sqrt(3)
    return Rigid.from_rotation(turn, center - turn @ center + shift)


def _phantom_pair(seed: int, rng: np.random.Generator, ct_file: Path, mr_file: Path) -> np.ndarray:
    """A CT of the torso and an MR of a part of the same body in another pose; returns CT mm -> MR mm (4, 4)."""
    if not 0 <= seed < 100_000:
        raise InputError(f"phantom seed {seed} is not for training; use 0 to 99999")
    poses = [_random_move(rng, np.array([0.0, 0.0, 120.0])) for _ in range(2)]
    part = str(rng.choice(PARTS))
    make_phantom(seed, 2.0, mr=False, pose=poses[0]).ct.write(ct_file)
    spacing = (*[rng.uniform(*SPACING_MM)] * 2, rng.uniform(*SLICE_MM))
    make_phantom(seed, spacing, ct=False, part=part, pose=poses[1]).mr.write(mr_file)
    return poses[1].matrix @ poses[0].inverse().matrix


def _simulated_pair(ct_file: Path, rng: np.random.Generator, mr_file: Path) -> np.ndarray:
    """An MR-like scan of part of a CT under a random training contrast; returns CT mm -> MR mm (4, 4)."""
    ct = Volume.read(ct_file)
    ct.modality = "ct"
    body = body_mask(ct)
    index = np.argwhere(body)[::50, ::-1].astype(float)
    points = ct.geometry.index_to_mm(index)
    low, high = points.min(axis=0), points.max(axis=0)
    sides = np.minimum(np.maximum((high - low) * rng.uniform(*SIDES, 3), LEAST_SIDE_MM), high - low)
    start = low + rng.uniform(0, 1, 3) * (high - low - sides)
    center = start + sides / 2
    move = _random_move(rng, center)
    spacing = np.array([*[rng.uniform(*SPACING_MM)] * 2, rng.uniform(*SLICE_MM)])
    shape = np.maximum(np.rint(sides / spacing).astype(int), 8)
    axes = move.matrix[:3, :3] @ Rotation.from_rotvec(rng.normal(0, 0.08, 3)).as_matrix()
    middle = move.apply(center[None])[0]
    origin = middle - axes @ ((shape - 1) / 2 * spacing)
    geometry = Geometry(tuple(int(n) for n in shape[::-1]), spacing, origin, axes)
    waves = Waves.random(rng, 12, (90.0, 250.0), float(rng.uniform(1.0, 4.0)))
    to_ct = Composite([move.inverse(), Smooth(waves)])
    grid = to_ct.apply(geometry.grid_points_mm())
    hu = ct.sample(grid, fill=AIR_HU).reshape(geometry.shape)
    inside = Volume(body.astype(np.uint8), ct.geometry).sample(grid, fill=0.0, order=0).reshape(geometry.shape) > 0
    image = torch.from_numpy(np.where(inside, np.clip(hu, AIR_HU, 2000) - AIR_HU, 0).astype(np.float32))[None]
    drawn = draw_contrast(rng, "mr-like", shipped("small")["contrast"] | {"thick": 0.0}, geometry.shape)
    signal = apply_contrasts(image, [drawn])[0].numpy()
    Volume(np.rint(signal * 1000).astype(np.float32), geometry, "mr").write(mr_file)
    return move.matrix
