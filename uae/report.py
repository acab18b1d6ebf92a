"""One picture of a registration: both scans before and after, in three planes, with the matches that led to it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from uae.files import atomic_path
from uae.registration.refine import overlap_points
from uae.transform import Rigid, Transform
from uae.volume import Volume

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from uae.registration.pipeline import RegistrationResult

PIXEL_MM = 1.25
TILE_MM = 25.0
MARGIN_MM = 20.0
SLAB_MM = 12.0  # matches this near to a plane are drawn on it
CT_WINDOW_HU = (-200.0, 300.0)
COLORS = {"accepted": "#2ca25f", "review": "#e6a117", "refused": "#d7301f"}
INLIER, HELDOUT, OUTLIER = "#39d98a", "#4cc3ff", "#ff5a4f"
BACKGROUND, TEXT = "#15181c", "#e8eaed"

PLANES = (
    # name, horizontal axis, vertical axis, axis across (0 L, 1 P, 2 S), letters left, right, top, bottom
    ("Axial", 0, 1, 2, "RLAP"),
    ("Coronal", 0, 2, 1, "RLSI"),
    ("Sagittal", 1, 2, 0, "APSI"),
)
COLUMNS = ("As stored: checkerboard", "Registered: checkerboard", "As stored: blend", "Registered: blend", "Matches")


def write_overview(result: RegistrationResult, path: str | Path) -> None:
    """Write overview.png: rows axial, coronal, sagittal through the centre of the overlap; columns as COLUMNS.

    Args:
        result: a registration that was not refused.
        path: of the PNG file; it appears whole or not at all.

    Raises:
        InputError: no permission.
        ResourceError: the disk is full.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    center, box = _view(result)
    widths = [1.0] * len(COLUMNS)
    heights = [np.ptp(box[:, vertical]) / np.ptp(box[:, horizontal]) for _, horizontal, vertical, _, _ in PLANES]
    figure = Figure(figsize=(18.0, 2.2 + 3.3 * sum(heights)), facecolor=BACKGROUND)
    FigureCanvasAgg(figure)
    top = 1.0 - 1.25 / figure.get_figheight()
    axes = figure.subplots(
        len(PLANES),
        len(COLUMNS),
        gridspec_kw={"width_ratios": widths, "height_ratios": heights, "hspace": 0.04, "wspace": 0.03},
    )
    figure.subplots_adjust(left=0.012, right=0.988, top=top, bottom=0.55 / figure.get_figheight())
    windows = _window(result.fixed, box), _window(result.moving, None)
    for row, plane in zip(axes, PLANES, strict=True):
        _draw_row(row, plane, result, center, box, windows)
    for axis, title in zip(axes[0], COLUMNS, strict=True):
        axis.set_title(title, color=TEXT, fontsize=11, pad=6)
    _draw_header(figure, result)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=100, facecolor=BACKGROUND, format="png")


def _view(result: RegistrationResult) -> tuple[np.ndarray, np.ndarray]:
    """Centre (3,) and box (2, 3) mm in fixed space of what is shown: the overlap with a margin."""
    points = overlap_points(result.fixed.geometry, result.moving.geometry, result.linear, 6.0)
    if not len(points):
        points = result.fixed.geometry.corners_mm()
    center = result.report.get("center_mm")
    center = points.mean(axis=0) if center is None else np.asarray(center)
    return center, np.stack([points.min(axis=0) - MARGIN_MM, points.max(axis=0) + MARGIN_MM])


def _window(volume: Volume, box: np.ndarray | None) -> tuple[float, float]:
    """Grey limits: a soft-tissue window for CT, percentiles of what is not air for the rest."""
    if volume.modality == "ct":
        return CT_WINDOW_HU
    values = volume.array[::2, ::2, ::2].astype(np.float32).ravel()
    values = values[values > np.percentile(values, 30)]
    if not values.size:
        return float(volume.minimum), float(volume.minimum) + 1.0
    low, high = np.percentile(values, (1.0, 99.5))
    return float(low), float(max(high, low + 1e-3))


def _sampled(volume: Volume, points: np.ndarray, shape: tuple[int, int], window: tuple[float, float]) -> np.ndarray:
    """Grey values 0..1 at points (N, 3) mm as (rows, columns); NaN outside the scan."""
    values = volume.sample(points, fill=0.0)
    grey = np.clip((values - window[0]) / (window[1] - window[0]), 0.0, 1.0)
    grey[~volume.geometry.contains(points)] = np.nan
    return grey.reshape(shape)


def _draw_row(
    row: np.ndarray,
    plane: tuple[str, int, int, int, str],
    result: RegistrationResult,
    center: np.ndarray,
    box: np.ndarray,
    windows: tuple[tuple[float, float], tuple[float, float]],
) -> None:
    """Draw one plane into its five axes."""
    name, horizontal, vertical, across, letters = plane
    steps = [np.arange(box[0, axis], box[1, axis], PIXEL_MM) for axis in (horizontal, vertical)]
    points = np.tile(center, (len(steps[0]) * len(steps[1]), 1))
    grid = np.meshgrid(*steps)
    points[:, horizontal], points[:, vertical] = grid[0].ravel(), grid[1].ravel()
    shape = grid[0].shape
    fixed = _sampled(result.fixed, points, shape, windows[0])
    maps: tuple[Transform, Transform] = (Rigid.identity(), result.transform)
    before, after = (_sampled(result.moving, t.apply(points), shape, windows[1]) for t in maps)
    tiles = (np.floor(grid[0] / TILE_MM) + np.floor(grid[1] / TILE_MM)) % 2 == 0
    extent = (steps[0][0], steps[0][-1], steps[1][0], steps[1][-1])
    base = np.repeat(np.nan_to_num(fixed)[..., None], 3, axis=2)
    pictures = (
        _checkerboard(fixed, before, tiles),
        _checkerboard(fixed, after, tiles),
        _blend(fixed, before),
        _blend(fixed, after),
        0.75 * base,
    )
    for axis, picture in zip(row, pictures, strict=True):
        axis.imshow(picture, origin="lower", extent=extent, interpolation="bilinear", aspect="equal")
        axis.set_xlim(extent[:2])
        axis.set_ylim(extent[2:] if letters[2] == "S" else extent[3:1:-1])  # posterior points down in axial pictures
        axis.set_xticks([])
        axis.set_yticks([])
        for spine in axis.spines.values():
            spine.set_visible(False)
        _letters(axis, letters)
    if np.isnan(before).all():
        for axis in (row[0], row[2]):
            _note(axis, "the moving scan is stored elsewhere")
    _note(row[0], f"{name} at {'LPS'[across]} {center[across]:.0f} mm", y=0.02)
    _draw_matches(row[4], result, horizontal, vertical, across, center[across])


def _checkerboard(fixed: np.ndarray, moving: np.ndarray, tiles: np.ndarray) -> np.ndarray:
    """RGB: fixed (slightly blue) and moving (slightly warm) in turn, the fixed scan alone where the moving one ends."""
    show = tiles & ~np.isnan(moving)
    grey = np.where(show, np.nan_to_num(moving), np.nan_to_num(fixed))
    tint = np.where(show[..., None], (1.0, 0.93, 0.80), (0.88, 0.95, 1.0))
    return grey[..., None] * tint


def _blend(fixed: np.ndarray, moving: np.ndarray) -> np.ndarray:
    """RGB: the fixed scan in grey, the moving one over it in a heat scale."""
    from matplotlib import colormaps

    base = np.repeat(np.nan_to_num(fixed)[..., None], 3, axis=2)
    heat = colormaps["inferno"](np.nan_to_num(moving))[..., :3]
    weight = np.where(np.isnan(moving), 0.0, 0.5)[..., None]
    return (1.0 - weight) * base + weight * heat


def _letters(axis: Axes, letters: str) -> None:
    """Patient directions at the four edges."""
    places = (
        (0.015, 0.5, "left", "center"),
        (0.985, 0.5, "right", "center"),
        (0.5, 0.985, "center", "top"),
        (0.5, 0.015, "center", "bottom"),
    )
    for letter, (x, y, ha, va) in zip(letters, places, strict=True):
        axis.text(x, y, letter, transform=axis.transAxes, ha=ha, va=va, color=TEXT, fontsize=9, alpha=0.85)


def _note(axis: Axes, text: str, y: float = 0.9) -> None:
    """A short remark inside a picture."""
    style: dict[str, Any] = {"facecolor": "black", "alpha": 0.55, "edgecolor": "none", "pad": 2.0}
    axis.text(0.03, y, text, transform=axis.transAxes, color=TEXT, fontsize=8.5, bbox=style, va="bottom")


def _draw_matches(
    axis: Axes, result: RegistrationResult, horizontal: int, vertical: int, across: int, position: float
) -> None:
    """Dots at the fixed points of matches near the plane, with a line to where their partners are carried."""
    found = result.adareg
    if found is None or not len(found.fixed_points):
        _note(axis, "no matches were used")
        return
    places = result.linear.inverse().apply(found.moving_points)
    near = np.abs(found.fixed_points[:, across] - position) <= SLAB_MM
    wrong = ~found.inlier_mask & ~found.heldout_mask
    groups = (
        ("outlier", wrong, OUTLIER),
        ("inlier", found.inlier_mask, INLIER),
        ("held out", found.heldout_mask, HELDOUT),
    )
    left, right = sorted(axis.get_xlim())
    low, high = sorted(axis.get_ylim())
    for label, members, color in groups:
        chosen = near & members
        start, end = found.fixed_points[chosen], places[chosen]
        shown = (
            (start[:, horizontal] > left)
            & (start[:, horizontal] < right)
            & (start[:, vertical] > low)
            & (start[:, vertical] < high)
        )
        start, end = start[shown], end[shown]
        axis.scatter(
            start[:, horizontal],
            start[:, vertical],
            s=13,
            c=color,
            linewidths=0,
            label=f"{label} ({len(start)})",
            zorder=3,
        )
        # The partner of a wrong match can be anywhere; lines across the whole picture would hide it.
        short = np.linalg.norm(end - start, axis=1) < 40.0
        axis.plot(
            np.stack([start[short, horizontal], end[short, horizontal]]),
            np.stack([start[short, vertical], end[short, vertical]]),
            color=color, linewidth=0.9, zorder=2,
        )  # fmt: skip
    axis.legend(
        loc="upper right",
        fontsize=7.5,
        facecolor="black",
        edgecolor="none",
        labelcolor=TEXT,
        framealpha=0.55,
        handletextpad=0.2,
    )


def _draw_header(figure: Any, result: RegistrationResult) -> None:
    """Verdict and figures above the pictures, origin below."""
    height = figure.get_figheight()
    values = result.report
    figure.text(
        0.014, 1.0 - 0.42 / height, f" {result.status.upper()} ", color="white", fontsize=15, weight="bold",
        va="center", bbox={"facecolor": COLORS[result.status], "edgecolor": "none", "pad": 5.0},
    )  # fmt: skip
    facts = []
    if values.get("shift_mm") is not None:
        shift = ", ".join(
            f"{axis} {value:+.1f}" for axis, value in zip(("LR", "AP", "CC"), values["shift_mm"], strict=True)
        )
        facts.append(f"shift {shift} mm")
        facts.append(f"rotation {values['rotation_deg']:.1f}°")
    if values.get("overlap_percent") is not None:
        facts.append(f"overlap {values['overlap_percent']:.0f} %")
    matches = values.get("matches")
    if matches:
        facts.append(f"{matches['inliers']} of {matches['mutual']} mutual matches agree")
        facts.append(f"held out within 10 mm: {100 * matches['heldout_within_10mm']:.0f} %")
    if result.refinement is not None:
        facts.append(
            f"refined by {result.refinement.moved_mm:.1f} mm" if result.refinement.used else "refinement not used"
        )
    figure.text(0.10, 1.0 - 0.34 / height, "   ·   ".join(facts), color=TEXT, fontsize=11, va="center")
    if values.get("deformable"):
        largest = values["deformable"]["largest_mm"]
        figure.text(
            0.10,
            1.0 - 0.86 / height,
            f"deformed by up to {largest:.0f} mm: contour support, not dose",
            color="#f2c14e",
            fontsize=9.5,
            va="center",
        )
    reason = result.reason if len(result.reason) < 230 else result.reason[:227] + "..."
    figure.text(0.10, 1.0 - 0.62 / height, reason, color=TEXT, fontsize=9.5, alpha=0.8, va="center")
    names = [str(v.path.name) if v.path else kind for kind, v in (("fixed", result.fixed), ("moving", result.moving))]
    model = values.get("model") or {}
    origin = f"fixed: {names[0]}   moving: {names[1]}   model: {model.get('name', '-')} {model.get('version', '')}"
    figure.text(0.014, 0.2 / height, origin, color=TEXT, fontsize=8.5, alpha=0.7, va="center")
    figure.text(
        0.986, 0.2 / height, "research; not a medical device", color=TEXT, fontsize=8.5, alpha=0.7, va="center",
        ha="right",
    )  # fmt: skip
