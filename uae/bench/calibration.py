"""`uae bench calibrate`: measure a model on the validation data, fit its limits, store them in a copy of the model."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uae.bench.calibrate import calibrate, cross_check, judge_thresholds
from uae.bench.embedding import FIXED_POINTS, SETTLED, BenchOptions, read_result, write_json
from uae.bench.inter_subject import INTER_SUBJECT
from uae.bench.negatives import run_negatives
from uae.bench.study import PRODUCT_SIDE, method_name
from uae.bench.suite import NEGATIVES, SIMULATED, run_suite
from uae.errors import InputError
from uae.json_values import plain
from uae.model_files import save_model
from uae.progress import Cancel, Progress
from uae.registration.adareg import ACCEPTED, REVIEW

if TYPE_CHECKING:
    from uae.models import Model

logger = logging.getLogger(__name__)

NO_LIMIT = {"inliers": {"min": 0.0}}
NEGATIVES_PER_KIND, QUICK_NEGATIVES_PER_KIND = 2, 1


def run_calibration(
    model: Model,
    json_path: Path,
    calibrated: Path | None = None,
    data_dir: str | Path | None = None,
    quick: bool = False,
    moving: str = "mr",
    device: str = "auto",
    progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> dict[str, Any]:
    """Limits of a model for CT with MR, or for CT with CT.

    Args:
        model: the weights; limits they already have do not count.
        json_path: takes all measurements; an interrupted run of the same model goes on there.
        calibrated: file of a copy of the model with the limits.
        data_dir: folder of the real volumes; UAE_DATA or the default where None.
        quick: few cases: enough to try the model, not to trust it.
        moving: "mr" or "ct", what is put on a CT.
        device: as in `embed`.
        progress: told the share of each part done.
        cancel: asked between and within cases.

    Returns:
        The studies `simulated` and `inter_subject` of `uae.bench.suite.run_suite`, `negatives`, `thresholds`,
        `judged` (what the limits do on what they were fitted on: optimistic) and `cross_check` (limits from one CT,
        judged on the other).

    Raises:
        InputError: no data, or the file holds measurements of something else.
        CancelledError: the user stopped; what is measured stays in the file.
    """
    points = FIXED_POINTS // (3 if quick else 2)
    options = BenchOptions(fixed_points=points, device=device, moving=moving)
    # Guided matches are recorded as under an accepted pair: whether it is one, the new limits will say.
    measured = replace(model, thresholds={"registration": {ACCEPTED: NO_LIMIT, REVIEW: NO_LIMIT}})
    _check_own(json_path, measured, options)
    result = run_suite(
        measured, (SIMULATED, INTER_SUBJECT.name), data_dir, quick, (0, PRODUCT_SIDE), json_path, options, progress,
        cancel,
    )  # fmt: skip
    settings = {"model_sha256": model.sha256, "moving": moving}
    before = result.get(NEGATIVES, {})

    def save(records: list[dict[str, Any]]) -> None:
        result[NEGATIVES] = {"meta": settings, "records": records}
        write_json(json_path, result)

    negatives = run_negatives(
        measured, data_dir, QUICK_NEGATIVES_PER_KIND if quick else NEGATIVES_PER_KIND, save, device, moving,
        before.get("records", ()) if before.get("meta") == settings else (), progress, cancel,
    )  # fmt: skip
    people = [
        match
        for pair in result[INTER_SUBJECT.name]["cases"] if pair["kind"] == f"ct_{moving}"
        for match in pair["matches"][method_name(PRODUCT_SIDE)]
    ]  # fmt: skip
    thresholds = calibrate(result["cases"], negatives, people)
    result["thresholds"] = thresholds
    result["judged"] = plain(judge_thresholds(result["cases"], negatives, thresholds))
    result["cross_check"] = plain(cross_check(result["cases"], negatives, people))
    write_json(json_path, result)
    if calibrated is not None:
        meta = {**model.meta, "calibration": {"moving": moving, "judged": result["judged"]}}
        save_model(calibrated, model.state_dict(), model.config, model.input_map, thresholds, meta)
        logger.info("limits are stored in %s", calibrated)
    return result


def _check_own(path: Path, model: Model, options: BenchOptions) -> None:
    """Refuse a file whose measurements would be thrown away, those of `bench embedding` among them."""
    earlier = read_result(path)
    meta = earlier.get("meta", {})
    own = plain({"model_sha256": model.sha256, "options": vars(options), "thresholds": model.thresholds})
    if earlier and any(meta.get(key) != own[key] for key in SETTLED):
        raise InputError(f"{path} holds measurements of another model or with other settings; choose another --json")
