"""Makes the pictures of the tutorials: the sample pair, the modules' own logic, Slicer's slice views off the screen.

    python Docs/pictures/make_pictures.py [--scene build/pictures/tutorial.mrb] [--output Docs/pictures]

A scene that is there is read instead of being computed again (some minutes on two cores).
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import slicer
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT, ROOT / "UAELandmark", ROOT / "UAERegistration", ROOT / "Testing" / "mrml"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from headless import Headless  # noqa: E402
from offscreen import SliceView  # noqa: E402

from UAECommonLib import compare_views, result_nodes  # noqa: E402
from UAELandmarkLib import views as landmark_views  # noqa: E402
from UAELandmarkLib.link import MAP  # noqa: E402

logger = logging.getLogger(__name__)

PLANES = ("Axial", "Sagittal", "Coronal")
CT, MR, CHEST = "Phantom CT", "Phantom MR", "Phantom CT, chest only"
SHOWN, DOUBTFUL = "kidney_left_lateral", "iliac_crest_left"
"""Points of the sample pair that the landmark pictures show: a confident one and one that is not."""
SHORT = {"kidney_left_lateral": "left kidney", "iliac_crest_left": "left iliac crest"}
CT_WINDOW = (-160.0, 240.0)
PIXELS = 384
BAND = 30
COLORS, GREYS = 176, 64
"""Size of the written files' palettes, with and without coloured marks: they look the same and are a third as large."""


class Studio:
    """Slice views of one scene, one for each plane, and pictures of rows of them."""

    def __init__(self, headless: Headless, pixels: int = PIXELS) -> None:
        self.headless, self.scene, self.pixels = headless, headless.scene, pixels
        self.views = [SliceView(headless, f"Picture{plane}", plane, pixels) for plane in PLANES]
        for view in self.views:
            manager = slicer.vtkMRMLTransformsDisplayableManager2D()
            manager.SetMRMLApplicationLogic(headless.application)
            view.group.AddDisplayableManager(manager)
            view.managers.append(manager)

    def close(self) -> None:
        """Let go of the views."""
        for view in self.views:
            view.close()

    def row(
        self,
        title: str,
        background: Any,
        center: Sequence[float],
        size_mm: float,
        foreground: Any = None,
        opacity: float = 0.5,
        height: int = PIXELS,
    ) -> Image.Image:
        """Three planes through a world place (RAS mm), with a title above.

        Args:
            title: a few words.
            background: volume node.
            center: (3,) RAS mm, the middle of each view.
            size_mm: width of each view.
            foreground: volume node laid over it, or None.
            opacity: of the foreground.
            height: pixels of it that are kept, around the middle.
        """
        height = min(height, self.pixels)
        cut = (self.pixels - height) // 2
        picture = Image.new("RGB", (3 * self.pixels, height + BAND), "black")
        for index, view in enumerate(self.views):
            view.show(background, foreground, opacity)
            view.node.SetFieldOfView(size_mm, size_mm, view.node.GetFieldOfView()[2])
            view.node.JumpSliceByCentering(*map(float, center))
            pixels = view.render()[cut : cut + height]
            picture.paste(Image.fromarray(pixels), (index * self.pixels, BAND))
        draw = ImageDraw.Draw(picture)
        draw.text((8, 4), title, fill="white", font=ImageFont.load_default(19))
        for edge in (1, 2):
            draw.line([(edge * self.pixels, BAND), (edge * self.pixels, picture.height)], fill=(90, 90, 90))
        return picture


def stack(rows: Sequence[Image.Image]) -> Image.Image:
    """Rows below each other."""
    picture = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)))
    top = 0
    for row in rows:
        picture.paste(row, (0, top))
        top += row.height
    return picture


def write(picture: Image.Image, path: Path, colors: int = COLORS) -> None:
    """Write a picture as a small .png."""
    picture.quantize(colors, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(path, optimize=True)
    logger.info("%s: %d kB", path, path.stat().st_size // 1000)


def center_of(volume: Any) -> np.ndarray:
    """The middle (3,) RAS mm of a volume in the world."""
    bounds = np.zeros(6)
    volume.GetRASBounds(bounds)
    return bounds.reshape(3, 2).mean(axis=1)


def extent_of(volume: Any) -> float:
    """The longest side of a volume in the world, mm."""
    bounds = np.zeros(6)
    volume.GetRASBounds(bounds)
    return float(np.ptp(bounds.reshape(3, 2), axis=1).max())


def compute(headless: Headless) -> dict[str, Any]:
    """Match and register the sample pair, as the tutorials do; the nodes stay in the scene.

    Returns:
        What the tutorials quote: verdicts, figures, texts of the points.
    """
    from UAECommonLib.mrml import add_volume
    from UAECommonLib.sample_data import load_sample, sample_folder
    from UAELandmarkLib.logic import UAELandmarkLogic
    from UAERegistrationLib.logic import UAERegistrationLogic
    from UAERegistrationLib.quality import quality_rows, verdict

    scene = headless.scene
    template, query = load_sample(scene)
    landmarks = UAELandmarkLogic(scene)
    try:
        points = landmarks.loadPoints(sample_folder() / "landmarks_ct.csv")
        found = landmarks.match(template, query, points)
        row = next(i for i in range(points.GetNumberOfControlPoints()) if points.GetNthControlPointLabel(i) == SHOWN)
        landmarks.similarityMap(found, row)
        landmarks.waitForAnswers()
        found.SetName("Found points")
        points.SetName("Template points")
        texts = {
            found.GetNthControlPointLabel(index): found.GetNthControlPointDescription(index)
            for index in range(found.GetNumberOfControlPoints())
        }
    finally:
        landmarks.close()
    registration = UAERegistrationLogic(scene)
    outcome = registration.register(template, query, preset="deformable", resample=True)
    chest = add_volume(scene, _chest(sample_folder() / "ct.nii.gz"), CHEST)
    query.SetAndObserveTransformNodeID(None)
    refusal = registration.register(chest, query)
    quoted = {"points": texts, "prior": found.GetDescription()}
    for name, one in (("aligned", outcome), ("refused", refusal)):
        quoted[name] = {"verdict": verdict(one.report), "rows": quality_rows(one.report)}
    return quoted


def _chest(path: Path) -> Any:
    """The uppermost quarter of the sample's CT, which shows nothing of what the MR shows."""
    import SimpleITK as sitk

    image = sitk.ReadImage(str(path))
    return image[:, :, int(0.76 * image.GetSize()[2]) :]


def prepare_display(scene: Any) -> None:
    """Grey levels, and points large enough for a picture of this size."""
    count = scene.GetNumberOfNodesByClass("vtkMRMLScalarVolumeNode")
    for node in (scene.GetNthNodeByClass(index, "vtkMRMLScalarVolumeNode") for index in range(count)):
        if node.GetName().startswith(CT):
            node.GetDisplayNode().AutoWindowLevelOff()
            node.GetDisplayNode().SetWindowLevelMinMax(*CT_WINDOW)
    for index in range(scene.GetNumberOfNodesByClass("vtkMRMLMarkupsFiducialNode")):
        markups = scene.GetNthNodeByClass(index, "vtkMRMLMarkupsFiducialNode")
        display = markups.GetDisplayNode()
        display.SetTextScale(4.5)
        display.SetGlyphScale(3.0)
        for point in range(markups.GetNumberOfControlPoints()):
            label = markups.GetNthControlPointLabel(point)
            markups.SetNthControlPointLabel(point, SHORT.get(label, label))
            markups.SetNthControlPointVisibility(point, label in SHORT)


def place_of(markups: Any, label: str) -> np.ndarray:
    """World place (3,) RAS mm of the point with a label."""
    for index in range(markups.GetNumberOfControlPoints()):
        if markups.GetNthControlPointLabel(index) == SHORT.get(label, label):
            return np.array(markups.GetNthControlPointPositionWorld(index))
    raise ValueError(f"no point {label}")


def landmark_pictures(studio: Studio, output: Path) -> None:
    """The pair, a confident point, one that is not, and the similarity map."""
    node = studio.headless.node
    template, query, points, found = node(CT), node(MR), node("Template points"), node("Found points")
    rows = [
        studio.row(f"Template: {CT}", template, center_of(template), extent_of(template) * 1.03),
        studio.row(f"Query: {MR}", query, center_of(query), extent_of(query) * 1.03, height=260),
    ]
    write(stack(rows), output / "landmark_scans.png", GREYS)
    for label, words, file in (
        (SHOWN, "green: confident", "landmark_found"),
        (DOUBTFUL, "orange: not confident", "landmark_doubtful"),
    ):
        here, there = place_of(points, label), place_of(found, label)
        rows = [
            studio.row(f"CT: the point {SHORT[label]} as it was placed", template, here, 300.0, height=280),
            studio.row(f"MR: the point {SHORT[label]} as it was found ({words})", query, there, 300.0, height=280),
        ]
        write(stack(rows), output / f"{file}.png")
    place, image = place_of(found, SHOWN), found.GetNodeReference(MAP)
    image.GetDisplayNode().SetAndObserveColorNodeID(_cold_to_hot(studio.scene))
    title = f"MR: similarity to the point {SHORT[SHOWN]} of the CT, blue (low) to red (high)"
    row = studio.row(title, query, place, 260.0, image, landmark_views.OVERLAY_OPACITY)
    write(row, output / "landmark_map.png")


def _cold_to_hot(scene: Any) -> str:
    """ID of a colour node as the module uses it, which only the desktop application has as a file."""
    colors = scene.AddNewNodeByClass("vtkMRMLColorTableNode")
    colors.SetTypeToUser()
    colors.SetNumberOfColors(256)
    colors.GetLookupTable().SetHueRange(2 / 3, 0.0)
    colors.GetLookupTable().ForceBuild()
    return colors.GetID()


def registration_pictures(studio: Studio, output: Path) -> None:
    """Before and after, checkerboard, the deformation's grid, and the pair that is refused."""
    scene, node = studio.scene, studio.headless.node
    fixed, moving = node(CT), node(MR)
    for markups in ("Template points", "Found points"):
        node(markups).GetDisplayNode().SetVisibility(False)
    linear = result_nodes.find_results(scene)[0]
    result = result_nodes.nodes_of(linear)
    result_nodes.show(linear)
    place = center_of(moving)
    rows = []
    for words, shown in (
        ("Before: the MR where its file says, laid over the CT", False),
        ("After Align, rigid part", True),
    ):
        result_nodes.show(linear, with_linear=shown, with_grid=False)
        rows.append(studio.row(words, fixed, place, 440.0, moving, 0.5, 300))
    write(stack(rows), output / "registration_before_after.png", GREYS)
    board = compare_views.checkerboard(scene, fixed, result.image)
    row = studio.row("Checkerboard of CT and aligned MR", board, place, 330.0, height=300)
    write(row, output / "registration_checkerboard.png", GREYS)
    scene.RemoveNode(board)
    result_nodes.show(linear)
    _show_grid(result.grid, moving)
    row = studio.row("The deformable part as a grid over the aligned MR", moving, place, 330.0, height=320)
    write(row, output / "registration_grid.png")
    result.grid.GetDisplayNode().SetVisibility(False)
    result_nodes.show(linear, with_linear=False, with_grid=False)
    chest = node(CHEST)
    rows = [studio.row(f"{role}: {volume.GetName()}", volume, center_of(volume), 460.0, height=200)
            for role, volume in (("Fixed", chest), ("Moving", moving))]  # fmt: skip
    write(stack(rows), output / "registration_refused.png", GREYS)


def _show_grid(grid: Any, region: Any) -> None:
    """Display a grid transform as bent lines in the slice views."""
    grid.CreateDefaultDisplayNodes()
    display = grid.GetDisplayNode()
    display.SetAndObserveRegionNode(region)
    display.SetVisualizationMode(display.VIS_MODE_GRID)
    display.SetGridSpacingMm(15.0)
    display.SetGridScalePercent(100.0)
    display.SetVisibility(True)
    display.SetVisibility2D(True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compute or read the scene, and write all pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scene", type=Path, default=ROOT / "build" / "pictures" / "tutorial.mrb")
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent)
    chosen = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    headless = Headless()
    if chosen.scene.is_file():
        headless.load_scene(chosen.scene)
    else:
        chosen.scene.parent.mkdir(parents=True, exist_ok=True)
        quoted = compute(headless)
        headless.save_scene(chosen.scene)
        chosen.scene.with_suffix(".json").write_text(json.dumps(quoted, indent=2), encoding="utf-8")
    prepare_display(headless.scene)
    studio = Studio(headless)
    landmark_pictures(studio, chosen.output)
    registration_pictures(studio, chosen.output)
    studio.close()
    headless.close()


if __name__ == "__main__":
    main()
