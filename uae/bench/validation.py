"""A short measurement during training: nearest neighbours and rigid of simulated scans of the validation CTs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from uae.bench.data import VALIDATION_CTS, DataFolder, find_data
from uae.bench.embedding import case_points, case_seed
from uae.bench.metrics import RIGID_SUCCESS_MM, transform_tre
from uae.embedding import embed
from uae.errors import InputError
from uae.matching import nearest
from uae.models import load_model
from uae.preprocess import body_mask
from uae.registration.adareg import estimate
from uae.simulate import SETS, simulate_mr

POINTS = 500


def check_validation(data: DataFolder, sets: Sequence[str], subjects: Sequence[str] = VALIDATION_CTS) -> None:
    """Find out before the training what `quick_validation` would miss hours later.

    Raises:
        InputError: a validation CT is not there, or an unknown set.
    """
    unknown = [name for name in sets if name not in SETS]
    if unknown or not sets:
        raise InputError(f"validation.sets = {list(sets)}: choose from {', '.join(SETS)}")
    for subject in subjects:
        data.file(f"{subject}/ct.nii.gz")


def quick_validation(
    model_file: Path,
    data_dir: str | Path | None,
    sets: Sequence[str],
    cases: int,
    device: str = "auto",
    subjects: Sequence[str] = VALIDATION_CTS,
) -> dict[str, float]:
    """Measure a model on the first cases of the benchmark's sets.

    Args:
        model_file: weights.
        data_dir: folder of the real volumes; UAE_DATA or the default where None.
        sets: names of `uae.simulate.SETS`.
        cases: of each set and validation CT; about ten seconds each on two cores.
        device: where the network runs.
        subjects: validation CTs.

    Returns:
        By set `<set>_under_10mm`, `<set>_median_mm` (nearest neighbour, by case, then averaged) and
        `<set>_rigid_success` (one AdaReg pass within the floor + 5 mm); `score`: mean of all under_10mm.

    Raises:
        InputError: no data, or an unknown set.
    """
    model, data = load_model(model_file), find_data(data_dir)
    figures: dict[str, list[float]] = {}
    for subject in subjects:
        ct = data.ct(subject)
        body, fixed = body_mask(ct), embed(ct, model, device=device, cache=False)
        for name in sets:
            for index in range(cases):
                pair = simulate_mr(ct, case_seed(subject, index), name, body)
                moving = embed(pair.moving, model, device=device, cache=False)
                points, truth = case_points(pair, POINTS)
                places, _ = nearest(moving, fixed, points)
                errors = np.linalg.norm(places - truth, axis=1)
                found = estimate(fixed, moving).transform
                tre = transform_tre(found, pair.moving_body_points, pair.fixed_body_points)
                right = tre is not None and tre <= pair.rigid_floor_mm + RIGID_SUCCESS_MM
                for key, value in (
                    ("under_10mm", (errors < 10.0).mean()), ("median_mm", np.median(errors)), ("rigid_success", right)
                ):  # fmt: skip
                    figures.setdefault(f"{name}_{key}", []).append(float(value))
    means = {key: float(np.mean(values)) for key, values in figures.items()}
    return means | {"score": float(np.mean([v for key, v in means.items() if key.endswith("under_10mm")]))}
