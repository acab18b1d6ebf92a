"""Pictures of the model cards: learning curves, and validation cases that the model gets wrong.

    python Docs/models/make_figures.py curve RUN/log.jsonl Docs/models/uae-m_curve.png
    UAE_DATA=... python Docs/models/make_figures.py cases uae-m mr ct_mij_abdpelvis:hard:1003,... Docs/models/x.png
    UAE_DATA=... python Docs/models/make_figures.py matches uae-s ct ct_lidc0001_chest:hard:2001,... Docs/models/y.png

A case stands in the JSON of `uae bench embedding`: its CT, set and seed.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from uae.bench.data import find_data
from uae.bench.embedding import case_points
from uae.bench.metrics import MATCH_LIMIT_MM, transform_tre
from uae.bench.parts import PARTIAL, PARTIAL_FROM, partial_pair
from uae.embedding import embed
from uae.files import atomic_path
from uae.matching import limits_for, match_points
from uae.models import load_model
from uae.registration.relate import relate
from uae.report import CT_WINDOW_HU
from uae.simulate import simulate_scan
from uae.volume import Geometry, Volume, resample

logger = logging.getLogger(__name__)

SMOOTHED_STEPS = 50
MATCHES = 60
FIGURES = {"joint": "appearance, both heads", "semantic": "semantic", "excess": "semantic, above log n"}


def save(figure: Figure, path: Path) -> None:
    """Write a PNG that appears whole or not at all."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")


def curve(log: Path, output: Path) -> None:
    """Losses of a run over its steps, each smoothed over SMOOTHED_STEPS values."""
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    names = [name for name in FIGURES if any(name in record for record in records)]
    figure = Figure(figsize=(4.0 * len(names), 3.0), layout="constrained")
    for axis, name in zip(np.atleast_1d(figure.subplots(1, len(names))), names, strict=True):
        steps, values = np.array([(r["step"], r[name]) for r in records if name in r]).T
        width = min(SMOOTHED_STEPS, len(values))
        axis.plot(steps, values, ".", markersize=1, alpha=0.25)
        axis.plot(steps[width - 1 :], np.convolve(values, np.full(width, 1.0 / width), "valid"))
        axis.set(xlabel="step", ylabel="loss", title=FIGURES[name], ylim=tuple(np.quantile(values, [0.001, 0.98])))
    save(figure, output)


def middle(volume: Volume) -> np.ndarray:
    """The slice (y, x) through the middle of a volume."""
    return np.asarray(volume.array[volume.array.shape[0] // 2])


def cases(model_name: str, modality: str, names: Sequence[str], output: Path) -> None:
    """One row a case: a slice of the moving scan, and of the CT at the true and at the found place."""
    model, data = load_model(model_name), find_data(None)
    figure = Figure(figsize=(9.0, 3.1 * len(names)), layout="constrained")
    axes = figure.subplots(len(names), 3, squeeze=False)
    for row, name in zip(axes, names, strict=True):
        subject, set_name, seed = name.split(":")
        pair = simulate_scan(data.ct(subject), int(seed), PARTIAL_FROM if set_name == PARTIAL else set_name, modality)
        if set_name == PARTIAL:
            pair = partial_pair(pair)
        fixed, moving = (embed(scan, model, cache=False) for scan in (pair.fixed, pair.moving))
        found = relate(pair.fixed, pair.moving, fixed, moving, model, "auto").found
        tre = transform_tre(found.transform, pair.moving_body_points, pair.fixed_body_points)
        slab = _square_pixels(pair.moving.geometry)
        places = [pair.moving_to_fixed, None if found.transform is None else found.transform.inverse()]
        shown = [middle(resample(pair.moving, slab))]
        shown += [np.zeros((1, 1)) if place is None else middle(resample(pair.fixed, slab, place)) for place in places]
        windows = [tuple(np.percentile(shown[0], (1, 99))) if modality == "mr" else CT_WINDOW_HU, *[CT_WINDOW_HU] * 2]
        wrong = f"found: {tre:.0f} mm off (floor {pair.rigid_floor_mm:.0f})" if np.isfinite(tre) else "nothing found"
        titles = (f"{set_name} {seed}, {modality.upper()}", "CT, true place", f"{wrong}, {found.verdict}")
        for axis, image, window, title in zip(row, shown, windows, titles, strict=True):
            axis.imshow(image, cmap="gray", vmin=window[0], vmax=window[1], aspect="equal")
            axis.set_title(title, fontsize=9)
            axis.axis("off")
        logger.info("%s: TRE %s mm, %s", name, tre, found.verdict)
    save(figure, output)


def matches(model_name: str, modality: str, names: Sequence[str], output: Path) -> None:
    """One panel a case: free fixed-point matches on a coronal mean of the CT, lines from true to found places."""
    model, data = load_model(model_name), find_data(None)
    figure = Figure(figsize=(4.4 * len(names), 3.1), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        subject, set_name, seed = name.split(":")
        pair = simulate_scan(data.ct(subject), int(seed), set_name, modality)
        fixed, moving = (embed(scan, model, cache=False) for scan in (pair.fixed, pair.moving))
        points, truth = case_points(pair, MATCHES)
        found = match_points(moving, fixed, points, method="fixed-point", limits=limits_for(
            model.thresholds.get("match"), "fixed-point"))  # fmt: skip
        places = np.array([match.point_mm for match in found])
        errors = np.linalg.norm(places - truth, axis=1)
        sure = np.array([match.confident for match in found])
        grid = _square_pixels(pair.fixed.geometry)
        shown = np.clip(resample(pair.fixed, grid).array, *CT_WINDOW_HU).mean(axis=1)
        axis.imshow(shown, cmap="gray", origin="lower")
        first, last = (grid.mm_to_index(place)[:, [0, 2]] for place in (truth, places))
        wrong = errors > MATCH_LIMIT_MM
        for which, colour in ((~wrong, "limegreen"), (wrong & ~sure, "orange"), (wrong & sure, "red")):
            for a, b in zip(first[which], last[which], strict=True):
                axis.plot(*np.stack([a, b]).T, color=colour, linewidth=0.8)
            axis.plot(*last[which].T, ".", color=colour, markersize=5)
        axis.set_title(
            f"{set_name} {seed}: {wrong.sum()} of {len(found)} over 10 mm\n"
            f"{sure.sum()} confident, {(wrong & sure).sum()} of them over 10 mm", fontsize=9,
        )  # fmt: skip
        axis.axis("off")
        logger.info("%s: median %.1f mm", name, np.median(errors))
    save(figure, output)


def _square_pixels(grid: Geometry) -> Geometry:
    """The grid's box with cubic voxels, so that a slice keeps its shape."""
    step = float(grid.spacing.min())
    count = np.maximum(np.round(grid.size * grid.spacing / step), 1).astype(int)
    first = grid.index_to_mm(((step / grid.spacing - 1.0) / 2.0)[None])[0]
    return Geometry(tuple(int(n) for n in count[::-1]), np.full(3, step), first, grid.direction)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if sys.argv[1] == "curve":
        curve(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        draw = {"cases": cases, "matches": matches}[sys.argv[1]]
        draw(sys.argv[2], sys.argv[3], sys.argv[4].split(","), Path(sys.argv[5]))
