"""Pairs that must not be registered: no common anatomy, or other people. They calibrate the refusals."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from uae.bench.data import VALIDATION_CTS, DataFolder, find_data
from uae.bench.embedding import match_records, pair_score_of
from uae.bench.parts import along_body
from uae.embedding import embed
from uae.errors import InputError
from uae.json_values import plain
from uae.phantom import VALIDATION_SEEDS, make_phantom
from uae.progress import Cancel, Progress, check_cancel, report
from uae.registration.adareg import body_points, spread_sample
from uae.registration.relate import relate
from uae.simulate import simulate_scan
from uae.volume import Volume

if TYPE_CHECKING:
    from uae.models import Model

logger = logging.getLogger(__name__)

NO_OVERLAP, OTHER_SUBJECT = "no-overlap", "other-subject"
ABDOMEN, CHEST = VALIDATION_CTS
VALIDATION_MRS = ("mr_ukatge_abdcor", "mr_ukatphilips04_abdcor", "mr_ukatsiemens02_abdcor", "mr_ukatsiemens04_abdcor")
SETS_USED = ("standard15", "hard")
"""The wide rotations of standard30 do not fit into half a CT."""
SEED_OFFSET = 500
"""Seeds of the simulated scans differ from those of the benchmark's cases."""
QUERIES = 30


@dataclass(frozen=True)
class NegativePair:
    """Two scans that share nothing (NO_OVERLAP: must be refused) or are of two people (must not be accepted).

    `cts` are the validation CTs that it shows.
    """

    name: str
    kind: str
    fixed: Volume
    moving: Volume
    cts: tuple[str, ...] = ()


def negative_pairs(data: DataFolder, per_kind: int = 4, modality: str = "mr") -> Iterator[NegativePair]:
    """Pairs from the validation subjects and phantoms of validation seeds, one after the other (each holds two scans).

    Args:
        data: the real volumes.
        per_kind: simulated scans for every pairing and set, and phantom pairs.
        modality: of the second scans; with "ct" other people are phantoms instead of the real MR scans.
    """
    abdomen, chest = data.ct(ABDOMEN), data.ct(CHEST)
    both, one = VALIDATION_CTS, (ABDOMEN,)
    pelvis, upper = along_body(abdomen, 0.0, 0.45), along_body(abdomen, 0.55, 1.0)
    yield NegativePair("chest CT / lower half of another person's abdomen CT", NO_OVERLAP, chest, pelvis, both)
    yield NegativePair("lower half of an abdomen CT / another person's chest CT", NO_OVERLAP, pelvis, chest, both)
    yield NegativePair("upper / lower part of one CT", NO_OVERLAP, upper, pelvis, one)
    for set_name in SETS_USED:
        for index in range(per_kind):
            seed = SEED_OFFSET + index
            of_pelvis, of_chest = (simulate_scan(ct, seed, set_name, modality).moving for ct in (pelvis, chest))
            yield NegativePair(f"chest CT / {set_name} {seed} of the pelvis", NO_OVERLAP, chest, of_pelvis, both)
            yield NegativePair(f"pelvis CT / {set_name} {seed} of another chest", NO_OVERLAP, pelvis, of_chest, both)
            yield NegativePair(f"upper part of one / {set_name} {seed} of its lower", NO_OVERLAP, upper, of_pelvis, one)
    for index in range(per_kind):
        seed = VALIDATION_SEEDS[0] + 2 * index
        top = make_phantom(seed, mr=False, part="chest").ct
        bottom = _phantom_scan(seed + index % 2, modality, "pelvis")
        yield NegativePair(f"phantom {seed} chest / phantom {seed + index % 2} pelvis", NO_OVERLAP, top, bottom)
    if modality == "ct":
        for index in range(per_kind):
            seed = VALIDATION_SEEDS[0] + 2 * index
            first, second = (_phantom_scan(s, "ct", ("torso", "chest")[index % 2]) for s in (seed, seed + 1))
            yield NegativePair(f"phantom {seed} / phantom {seed + 1}", OTHER_SUBJECT, first, second)
        return
    for name in VALIDATION_MRS:
        yield NegativePair(
            f"abdomen CT / {name}", OTHER_SUBJECT, abdomen, data.volume(f"{name}/mr.nii.gz", "mr"), one
        )


def _phantom_scan(seed: int, modality: str, part: str) -> Volume:
    phantom = make_phantom(seed, ct=modality == "ct", mr=modality == "mr", part=part, mr_slice_mm=4.0)
    return phantom.ct if modality == "ct" else phantom.mr


def run_negatives(
    model: Model,
    data_dir: str | Path | None = None,
    per_kind: int = 4,
    save: Callable[[list[dict[str, Any]]], None] | None = None,
    device: str = "auto",
    modality: str = "mr",
    earlier: Sequence[Mapping[str, Any]] = (),
    progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> list[dict[str, Any]]:
    """Register and match every negative pair.

    Args:
        model: the weights.
        data_dir: folder of the real volumes.
        per_kind: see `negative_pairs`.
        save: given all records after every pair.
        device: as in `embed`.
        modality: see `negative_pairs`.
        earlier: records of the same model and modality, which are not measured again.
        progress: told the share of pairs done, stage "negatives".
        cancel: asked between and within pairs.

    Returns:
        Records {name, kind, cts, registration: {verdict, features, ...}, fixed_point, guided}; error_mm None.

    Raises:
        InputError: no data.
        CancelledError: the user stopped.
    """
    known = {record["name"]: dict(record) for record in earlier}
    records: list[dict[str, Any]] = []
    total = 3 + 6 * per_kind + per_kind + (per_kind if modality == "ct" else len(VALIDATION_MRS))
    for pair in negative_pairs(find_data(data_dir), per_kind, modality):
        check_cancel(cancel)
        report(progress, "negatives", len(records) / total)
        if pair.name in known:
            records.append(known.pop(pair.name))
            continue
        fixed, moving = (embed(scan, model, device=device, cancel=cancel) for scan in (pair.fixed, pair.moving))
        try:
            relation = relate(pair.fixed, pair.moving, fixed, moving, model, device, cancel=cancel)
        except InputError as error:
            logger.warning("%s: left out, %s", pair.name, error)
            continue
        found = relation.found
        points = spread_sample(body_points(moving), QUERIES, np.random.default_rng(0))
        score = pair_score_of(model, "fixed-point")
        free = match_records(moving, fixed, points, None, "fixed-point", pair_score=score, cancel=cancel)
        guided = free
        if found.transform is not None:
            # Whatever the verdict: other limits may let the pair pass.
            guided = match_records(
                relation.moving, relation.fixed, points, None, "guided", found.transform.inverse(), found.verdict,
                pair_score_of(model, "guided"), cancel=cancel,
            )
        records.append(plain({
            "name": pair.name, "kind": pair.kind, "cts": pair.cts, "fixed_point": free, "guided": guided,
            "registration": {
                "verdict": found.verdict, "reason": found.reason, "queried": found.queried, "mutual": found.mutual,
                "inliers": found.inliers, "features": found.features,
            },
        }))
        if save is not None:
            save([*records, *known.values()])
        logger.info("%s: %s, %d of %d mutual", pair.name, found.verdict, found.inliers, found.mutual)
    report(progress, "negatives", 1.0)
    return records
